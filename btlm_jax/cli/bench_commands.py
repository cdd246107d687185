"""Subcommands that measure."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import OmitArgPrefixes, Positional, UseAppendAction, subcommand

from btlm_jax.cli.arguments import Bytes, check_output, write_json
from btlm_jax.model.remat import Remat
from btlm_jax.utils.format import DEFAULT_MEMORY


@dataclasses.dataclass(frozen=True)
class BenchConvert:
    """Convert a random checkpoint of the 3B shape, beside a plain copy of it; rates and memory.

    Needs three to four times the checkpoint's bytes (5.3 GB with 32 layers) on the disk.
    """

    directory: Positional[Path] = Path("btlm-bench")
    """Where to work; must not exist, and is removed afterwards."""
    layers: int = 32
    """Of the model; the embedding stays."""
    form: Literal["safetensors", "safetensors-sharded", "bin", "bin-sharded"] = "safetensors"
    """Of the checkpoint that is converted."""
    max_memory: Bytes = DEFAULT_MEMORY
    """Of weights in flight, such as 512MiB."""
    keep: bool = False
    """Keep the files."""

    def run(self) -> None:
        from btlm_jax.train.bench.convert_bench import bench_convert

        bench_convert(
            self.directory,
            layers=self.layers,
            form=self.form,
            max_memory=self.max_memory,
            keep=self.keep,
        )


@dataclasses.dataclass(frozen=True)
class BenchLoad:
    """Load a random checkpoint of the 3B shape, from Hugging Face files and from Orbax ones, onto
    the devices, beside reading its bytes; rates and memory."""

    directory: Positional[Path] = Path("btlm-bench")
    """Where to work; must not exist, and is removed afterwards."""
    layers: int = 32
    """Of the model; the embedding stays."""
    keep: bool = False
    """Keep the files."""

    def run(self) -> None:
        from btlm_jax.train.bench.convert_bench import bench_load

        bench_load(self.directory, layers=self.layers, keep=self.keep)


@dataclasses.dataclass(frozen=True)
class BenchTrain:
    """Time the training step beside a large matrix product, PyTorch's step (where torch is
    installed), and the data loader, all in turn in one run."""

    preset: str = "btlm-40m"
    """Of the model."""
    length: int = 512
    """Tokens per sequence."""
    batch_size: int = 4
    """Sequences per device and step."""
    rounds: int = 5
    """How often everything is measured; medians are reported."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Of the computation; default bfloat16 on accelerators, float32 on CPU."""
    remat: Remat = "dots"
    """What our forward pass keeps for the backward pass."""
    torch: bool | None = None
    """Whether to measure PyTorch; default where it is installed and there is one device."""
    json: Path | None = None
    """A file for the measurements and their conditions."""

    def run(self) -> None:
        from btlm_jax.train.bench.step_bench import bench_train

        check_output(self.json)
        report = bench_train(
            preset=self.preset,
            length=self.length,
            batch_size=self.batch_size,
            rounds=self.rounds,
            dtype=self.dtype,
            remat=self.remat,
            torch=self.torch,
        )
        write_json(self.json, report)


@dataclasses.dataclass(frozen=True)
class BenchLoss:
    """Time the loss with its head, forward and backward, beside the same loss of whole logits, a
    rematerialized one and a large matrix product, all in turn in one run; compiled memory of each.
    """

    preset: str | None = None
    """Of the model, for the sizes of the head; default btlm-3b-8k on accelerators, btlm-40m on
    CPU."""
    rows: int | None = None
    """Tokens; default 8192 on accelerators, 2048 on CPU."""
    rounds: int = 5
    """How often everything is measured; medians are reported."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Of the computation; default bfloat16 on accelerators, float32 on CPU."""
    json: Path | None = None
    """A file for the measurements and their conditions."""

    def run(self) -> None:
        from btlm_jax.train.bench.loss_bench import bench_loss

        check_output(self.json)
        report = bench_loss(
            preset=self.preset, rows=self.rows, rounds=self.rounds, dtype=self.dtype
        )
        write_json(self.json, report)


@dataclasses.dataclass(frozen=True)
class BenchDecode:
    """Time steps of decoding with random weights on one device, beside the rate at which its memory
    is read, and PyTorch (where torch is installed), in turn in one run; memory."""

    preset: str = "btlm-3b-8k"
    """Of the model."""
    layers: int | None = None
    """Of the model; default all."""
    weights: str = "bfloat16"
    """float32, bfloat16, int8, int4 (in groups of 64) or int4:128."""
    context: int = 512
    """Tokens in the cache before the first step."""
    steps: int = 16
    """Tokens in a measurement."""
    batch_size: tuple[int, ...] = (1,)
    """Rows; several are measured one after the other."""
    cache_dtype: Literal["int8"] | None = None
    """Of the KV cache; default the compute dtype."""
    rounds: int = 5
    """How often everything is measured; medians are reported."""
    torch: bool | None = None
    """Whether to measure PyTorch; default where it is installed. It holds weights of its own."""
    json: Path | None = None
    """A file for the measurements and their conditions."""

    def run(self) -> None:
        from btlm_jax.train.bench.generation_bench import bench_decode

        check_output(self.json)
        report = bench_decode(
            preset=self.preset,
            layers=self.layers,
            weights=self.weights,
            context=self.context,
            steps=self.steps,
            batch_sizes=self.batch_size,
            cache_dtype=self.cache_dtype,
            rounds=self.rounds,
            torch=self.torch,
        )
        write_json(self.json, report)


@dataclasses.dataclass(frozen=True)
class BenchPrefill:
    """Time reading prompts with random weights on one device, beside a large matrix product and
    PyTorch (where torch is installed), in turn in one run; memory."""

    preset: str = "btlm-3b-8k"
    """Of the model."""
    layers: int | None = None
    """Of the model; default all."""
    weights: str = "bfloat16"
    """float32, bfloat16, int8, int4 (in groups of 64) or int4:128."""
    length: tuple[int, ...] = (512,)
    """Tokens of the prompt; several are measured one after the other."""
    rounds: int = 5
    """How often everything is measured; medians are reported."""
    torch: bool | None = None
    """Whether to measure PyTorch; default where it is installed. It holds weights of its own."""
    json: Path | None = None
    """A file for the measurements and their conditions."""

    def run(self) -> None:
        from btlm_jax.train.bench.generation_bench import bench_prefill

        check_output(self.json)
        report = bench_prefill(
            preset=self.preset,
            layers=self.layers,
            weights=self.weights,
            lengths=self.length,
            rounds=self.rounds,
            torch=self.torch,
        )
        write_json(self.json, report)


@dataclasses.dataclass(frozen=True)
class BenchAttention:
    """Time attention and its gradients on one device, beside plain XLA, a full ALiBi bias and a
    large matrix product, all in turn in one run; compiled memory of each."""

    preset: str = "btlm-3b-8k"
    """Of the model, for heads and their size."""
    length: int | None = None
    """Tokens per sequence; default 8192 on accelerators, 1024 on CPU."""
    batch_size: int = 1
    """Sequences."""
    rounds: int = 5
    """How often everything is measured; medians are reported."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Of the computation; default bfloat16 on accelerators, float32 on CPU."""
    json: Path | None = None
    """A file for the measurements and their conditions."""

    def run(self) -> None:
        from btlm_jax.train.bench.attention_bench import bench_attention

        check_output(self.json)
        report = bench_attention(
            preset=self.preset,
            length=self.length,
            batch_size=self.batch_size,
            rounds=self.rounds,
            dtype=self.dtype,
        )
        write_json(self.json, report)


@dataclasses.dataclass(frozen=True)
class BenchAll:
    """Measure this machine: runs the other commands, each in a process of its own, and writes what
    they print, and with what, as Markdown. Hours on two cores; on an accelerator also btlm-3b-8k at
    2k and 8k tokens, beside the rates published for MPT-3B."""

    file: Positional[Path]
    """Where to, one file per machine; sections are replaced as they are measured. Pictures
    are written beside it."""
    only: Annotated[tuple[str, ...], UseAppendAction] = ()
    """A section to measure, by the beginning of its title; may be repeated. Default all."""
    work: Path | None = None
    """A folder that keeps what the commands write; what is found there is gone on with. Default a
    temporary one."""

    def run(self) -> None:
        from btlm_jax.train.bench.bench_all import bench_all

        bench_all(self.file, only=self.only, work=self.work)


@dataclasses.dataclass(frozen=True)
class Bench:
    """Measure speed and memory, each beside a peer or a limit measured in the same run."""

    what: OmitArgPrefixes[
        Annotated[BenchConvert, subcommand("convert")]
        | Annotated[BenchLoad, subcommand("load")]
        | Annotated[BenchTrain, subcommand("train")]
        | Annotated[BenchLoss, subcommand("loss")]
        | Annotated[BenchAttention, subcommand("attention")]
        | Annotated[BenchDecode, subcommand("decode")]
        | Annotated[BenchPrefill, subcommand("prefill")]
        | Annotated[BenchAll, subcommand("all")]
    ]

    def run(self) -> None:
        # PyTorch shares the GPU; JAX would otherwise take three quarters of it at the start.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        self.what.run()
