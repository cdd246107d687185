"""The `btlm` command: one dataclass per subcommand, its fields the arguments.

What a subcommand needs is imported when it runs, so that `btlm --help` is quick.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import OmitArgPrefixes, Positional, subcommand
from tyro.constructors import PrimitiveConstructorSpec

from btlm_jax import byte_size

Bytes = Annotated[
    int,
    PrimitiveConstructorSpec(
        nargs=1,
        metavar="BYTES",
        instance_from_str=lambda args: byte_size.parse(args[0]),
        is_instance=lambda x: isinstance(x, int),
        str_from_instance=lambda n: [byte_size.show(n).replace(" ", "")],
    ),
]


@dataclasses.dataclass(frozen=True)
class Quickstart:
    """Train a small BTLM on the Python manual, save, export, convert back and generate.

    With --hf, convert that checkpoint and generate from it instead.
    """

    directory: Positional[Path] = Path("btlm-quickstart")
    """Where everything is written; must not exist."""
    hf: str | None = None
    """A Hugging Face directory or Hub id to convert and generate from instead of training."""
    steps: int | None = None
    """Training steps; default the recipe's."""
    seed: int = 0
    """Of the initial weights and the order of the data."""

    def run(self) -> None:
        from btlm_jax.train import quickstart

        if self.hf is not None:
            quickstart.from_hf(self.directory, self.hf)
        else:
            quickstart.train(self.directory, steps=self.steps, seed=self.seed)


@dataclasses.dataclass(frozen=True)
class Convert:
    """Convert a Hugging Face checkpoint to Orbax, without loss.

    Killed or failed, the same command continues it.
    """

    source: Positional[str]
    """A directory with config.json and safetensors or .bin weights, or a Hub id (org/name)."""
    target: Positional[str]
    """The Orbax checkpoint to write: a directory, or a gs:// or s3:// URL."""
    revision: str | None = None
    """Branch, tag or commit on the Hub."""
    max_memory: Bytes = 512 << 20
    """Of weights in flight, such as 512MiB."""
    allow_nonfinite: bool = False
    """Convert weights that hold NaN or Inf too."""
    overwrite: bool = False
    """Replace an existing checkpoint."""

    def run(self) -> None:
        from btlm_jax.convert import convert

        report = convert(
            self.source,
            self.target,
            revision=self.revision,
            max_memory=self.max_memory,
            allow_nonfinite=self.allow_nonfinite,
            overwrite=self.overwrite,
        )
        print(f"{self.target}: {report}")
        print(f"carried along: {', '.join(report.files) or 'no tokenizer'}")


@dataclasses.dataclass(frozen=True)
class Export:
    """Export an Orbax checkpoint to a Hugging Face directory, without loss.

    Of a training checkpoint, the weights. Killed or failed, the same command continues it.
    """

    checkpoint: Positional[str]
    """An Orbax checkpoint: a directory, or a gs:// or s3:// URL."""
    target: Positional[Path]
    """The directory to write."""
    max_shard_size: Bytes = 5 * 10**9
    """Of one safetensors file, such as 5GB."""
    max_memory: Bytes = 512 << 20
    """Of weights in flight, such as 512MiB."""
    overwrite: bool = False
    """Replace an existing export."""

    def run(self) -> None:
        from btlm_jax.convert import export

        report = export(
            self.checkpoint,
            self.target,
            max_shard_bytes=self.max_shard_size,
            max_memory=self.max_memory,
            overwrite=self.overwrite,
        )
        print(f"{self.target}: {report}")
        print(f"weights: {', '.join(report.files)}")


@dataclasses.dataclass(frozen=True)
class Verify:
    """Compare two checkpoints tensor by tensor, or hash one again.

    Exit code 1 and a table on any difference.
    """

    first: Positional[str]
    """An Orbax checkpoint (directory or URL), a Hugging Face directory, or a Hub id."""
    second: Positional[str | None] = None
    """Another; without it, the first is checked against the SHA-256 that it records."""
    atol: float | None = None
    """Accept differences of values up to this, also between dtypes; default equal bits only."""
    logits: bool = False
    """Run both through the model on the same tokens too (in fp32, one model at a time)."""
    max_memory: Bytes = 512 << 20
    """Of weights in flight, such as 512MiB."""

    def run(self) -> int:
        from btlm_jax.convert import verify

        result = verify(
            self.first,
            self.second,
            atol=self.atol,
            logits=self.logits,
            max_memory=self.max_memory,
        )
        print(result)
        return 0 if result else 1


@dataclasses.dataclass(frozen=True)
class Info:
    """Parameters, bytes and FLOPs of a checkpoint or preset."""

    source: Positional[str]
    """An Orbax checkpoint, a Hugging Face directory, or a preset's name."""
    length: int = 0
    """Sequence length for FLOPs and cache; 0 takes the trained context."""

    def run(self) -> None:
        from btlm_jax import accounting, paths
        from btlm_jax.config import PRESETS, BTLMConfig

        path, rows = paths.location(self.source), []
        if not path.exists() and self.source in PRESETS:
            config = BTLMConfig.preset(self.source)
        elif not path.exists():
            raise FileNotFoundError(
                f"{self.source}: no such checkpoint; the presets are {', '.join(PRESETS)}"
            )
        elif (path / "config.json").is_file():
            config = BTLMConfig.from_hf(Path(path))
        else:
            from btlm_jax import manifest, weights

            meta = manifest.read(self.source)
            config = meta.config
            stored: dict[str, int] = {}
            for leaf in meta.leaves.values():
                stored[str(leaf.dtype)] = stored.get(str(leaf.dtype), 0) + leaf.size * (
                    leaf.dtype.itemsize
                )
            rows = [("stored", ", ".join(f"{d} {accounting.gib(n)}" for d, n in stored.items()))]
            if meta.origin.get("source"):
                rows.append(("converted from", meta.origin["source"]))
            if meta.sha256:
                from btlm_jax.convert.report import digest

                names = {x.path: x.hf_name for x in weights.disk_leaves(config)}
                hashes = {names[path]: value for path, value in meta.sha256.items()}
                rows.append(("sha256 of sha256", digest(hashes)))
        rows = accounting.describe(config, self.length or config.n_positions) + rows
        width = max(len(what) for what, _ in rows)
        for what, value in rows:
            print(f"{what:<{width}}  {value}")


@dataclasses.dataclass(frozen=True)
class Generate:
    """Continue a prompt."""

    checkpoint: Positional[str]
    """An Orbax checkpoint that carries a tokenizer: a directory, or a gs:// or s3:// URL."""
    prompt: str
    """The text to continue."""
    max_new_tokens: int = 50
    """How many tokens to add at most."""
    sample: bool = False
    """Draw from the distribution instead of taking the most likely token."""
    temperature: float = 1.0
    """Divides the logits before drawing."""
    top_k: int = 50
    """Draw from the k most likely tokens; 0 for all."""
    top_p: float = 1.0
    """Draw from the most likely tokens that together have this probability."""
    seed: int = 0
    """Of the draws."""
    cache_length: int | None = None
    """Slots of the KV cache; default as many as are needed."""
    dtype: Literal["bfloat16", "float32"] | None = None
    """Of weights and computation; default as stored, computing in the platform's."""

    def run(self) -> None:
        import numpy as np

        import btlm_jax as btlm
        from btlm_jax import manifest
        from btlm_jax.tokenizer import check_vocabulary

        sampled = (self.temperature, self.top_k, self.top_p) != (1.0, 50, 1.0)
        if sampled and not self.sample:
            logging.getLogger(__name__).warning(
                "--temperature, --top-k and --top-p do nothing without --sample"
            )
        # The tokenizer first: the weights may be large.
        config = manifest.read(self.checkpoint).config
        tokenizer = btlm.load_tokenizer(self.checkpoint)
        check_vocabulary(tokenizer, config.vocab_size)
        ids = tokenizer.encode(self.prompt).ids
        if not ids:
            raise ValueError("--prompt is empty: give at least one character")
        model, params = btlm.load(self.checkpoint, dtype=self.dtype)
        if self.dtype:
            model = dataclasses.replace(model, compute_dtype=self.dtype)
        out = btlm.generate(
            model,
            params,
            np.array([ids]),
            max_new_tokens=self.max_new_tokens,
            do_sample=self.sample,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            seed=self.seed,
            cache_length=self.cache_length,
        )
        print(tokenizer.decode(out[0].tolist()))


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
    max_memory: Bytes = 512 << 20
    """Of weights in flight, such as 512MiB."""
    keep: bool = False
    """Keep the files."""

    def run(self) -> None:
        from btlm_jax.convert.bench import bench_convert

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
        from btlm_jax.convert.bench import bench_load

        bench_load(self.directory, layers=self.layers, keep=self.keep)


@dataclasses.dataclass(frozen=True)
class Bench:
    """Measure speed and memory, each beside a peer or a limit measured in the same run."""

    what: OmitArgPrefixes[
        Annotated[BenchConvert, subcommand("convert")] | Annotated[BenchLoad, subcommand("load")]
    ]

    def run(self) -> None:
        self.what.run()


Command = (
    Annotated[Quickstart, subcommand("quickstart")]
    | Annotated[Convert, subcommand("convert")]
    | Annotated[Export, subcommand("export")]
    | Annotated[Verify, subcommand("verify")]
    | Annotated[Bench, subcommand("bench")]
    | Annotated[Info, subcommand("info")]
    | Annotated[Generate, subcommand("generate")]
)


def main(argv: list[str] | None = None) -> int:
    """Runs `btlm`.

    Returns:
      The exit code: 0, 1 if `verify` finds a difference, 2 on a bad argument or input, 130 on
      Ctrl-C, 141 when the output is not wanted any more.
    """
    argv = sys.argv[1:] if argv is None else argv
    debug = "--debug" in argv
    command = tyro.cli(
        Command,  # type: ignore
        prog="btlm",
        description="BTLM in JAX: train, convert, inspect and generate. "
        "--debug, anywhere, shows tracebacks.",
        args=[a for a in argv if a != "--debug"],
    )
    _log_to_stderr()
    try:
        code = command.run()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of our output (head, less) has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ValueError, OSError) as e:
        if debug:
            raise
        print(f"btlm: error: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("btlm: interrupted", file=sys.stderr)
        return 130
    return code or 0


def _log_to_stderr() -> None:
    """Our own notices on standard error; of libraries, warnings only."""
    handler: logging.Handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("btlm: %(message)s"))
    logging.getLogger().addHandler(logging.NullHandler())  # or a library would print them twice
    ours = logging.getLogger("btlm_jax")
    ours.handlers, ours.propagate = [handler], False
    ours.setLevel(logging.INFO)
    for noisy in ("absl", "asyncio"):  # Orbax logs at length, and tracebacks of what it raises
        logging.getLogger(noisy).setLevel(logging.CRITICAL)


if __name__ == "__main__":
    sys.exit(main())
