"""Subcommands on checkpoints: convert, export, verify, info."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tyro.conf import Positional

from btlm_jax.cli.arguments import Bytes, check_output, write_json
from btlm_jax.utils.format import DEFAULT_MEMORY, align_columns, format_bytes

if TYPE_CHECKING:
    from btlm_jax.config import BTLMConfig


@dataclasses.dataclass(frozen=True)
class Convert:
    """Convert a Hugging Face checkpoint to Orbax, without loss; or quantize one of either format.

    Killed or failed, the same command continues it.
    """

    source: Positional[str]
    """A directory with config.json and safetensors or .bin weights, or a Hub id (org/name); to
    quantize, an Orbax checkpoint too."""
    target: Positional[str]
    """The Orbax checkpoint to write: a directory, or a gs:// URL."""
    revision: str | None = None
    """Branch, tag or commit on the Hub."""
    max_memory: Bytes = DEFAULT_MEMORY
    """Of weights in flight, such as 512MiB."""
    allow_nonfinite: bool = False
    """Convert weights that hold NaN or Inf too."""
    overwrite: bool = False
    """Replace an existing checkpoint."""
    quantize: str | None = None
    """int8, int4 (groups of 64), int4:32, int4:64 or int4:128: of the layers' kernels."""
    quantize_embedding: Literal["int8", "bfloat16"] = "int8"
    """With --quantize: of embedding and untied head."""

    def run(self) -> None:
        from btlm_jax.checkpoint.quantization import Quantization
        from btlm_jax.convert import convert, quantize

        options: Any = dict(
            revision=self.revision, max_memory=self.max_memory, overwrite=self.overwrite
        )
        if self.quantize is None:
            report = convert(
                self.source, self.target, allow_nonfinite=self.allow_nonfinite, **options
            )
        elif self.allow_nonfinite:
            raise ValueError("--allow-nonfinite: NaN and Inf cannot be quantized: leave it out")
        else:
            to = Quantization.parse(self.quantize, self.quantize_embedding)
            report = quantize(self.source, self.target, to, **options)
        print(f"{self.target}: {report}")
        print(f"carried along: {', '.join(report.files) or 'no tokenizer'}")


@dataclasses.dataclass(frozen=True)
class Export:
    """Export an Orbax checkpoint to a Hugging Face directory, without loss.

    Of a training checkpoint, the weights. Killed or failed, the same command continues it.
    """

    checkpoint: Positional[str]
    """An Orbax checkpoint: a directory, or a gs:// URL."""
    target: Positional[str]
    """The directory to write."""
    max_shard_size: Bytes = 5 * 10**9
    """Of one safetensors file, such as 5GB."""
    max_memory: Bytes = DEFAULT_MEMORY
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
    max_memory: Bytes = DEFAULT_MEMORY
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
    compare: bool = False
    """FLOPs and memory beside the 7B models of 2023 instead, and whether the card's claims hold."""
    png: Path | None = None
    """With --compare: a picture to write."""
    json: Path | None = None
    """With --compare: a file for the numbers."""

    def run(self) -> None:
        from btlm_jax.config import PRESETS, BTLMConfig
        from btlm_jax.perf import accounting
        from btlm_jax.utils import paths, plots

        for name in ("png", "json"):
            if getattr(self, name) is not None and not self.compare:
                raise ValueError(f"--{name}: found no --compare, to which it belongs: add it")
        check_output(self.json)
        check_output(self.png, ".png")
        if self.png is not None:
            plots.require_matplotlib()
        rows: list[tuple[str, str]] = []
        if paths.location(self.source).exists():
            config, rows = _look_into(self.source)
        elif self.source in PRESETS:
            config = BTLMConfig.preset(self.source)
        else:
            raise FileNotFoundError(
                f"{self.source}: no such checkpoint; the presets are {', '.join(PRESETS)}"
            )
        if self.compare:
            return self._compare(config)
        rows = accounting.describe_config(config, self.length or config.n_positions) + rows
        print("\n".join(align_columns(rows, "<")))

    def _compare(self, config: BTLMConfig) -> None:
        from btlm_jax.perf import comparison, comparison_report

        name = Path(self.source).name
        shape = comparison.shape_of_config(config, name)
        contexts = tuple(sorted({*comparison.CONTEXTS, self.length}))
        print("\n".join(comparison_report.comparison_lines(shape, contexts)))
        write_json(self.json, comparison.comparison_numbers(shape, contexts))
        if self.png is not None:
            comparison_report.draw_comparison(self.png, shape)
            print(f"picture: {self.png}")


def _look_into(source: str) -> tuple[BTLMConfig, list[tuple[str, str]]]:
    """The configuration of a checkpoint of either format, and what an Orbax one says besides."""
    from btlm_jax.checkpoint import metadata
    from btlm_jax.config import BTLMConfig
    from btlm_jax.convert import auto
    from btlm_jax.convert.conversion_report import format_quantization_errors, weights_digest
    from btlm_jax.model import weights
    from btlm_jax.utils import paths

    if auto.is_huggingface(source):
        return BTLMConfig.from_hf(Path(paths.location(source))), []
    meta = metadata.read_metadata(source)
    stored: Counter[str] = Counter()
    for leaf in meta.leaves.values():
        stored[str(leaf.dtype)] += leaf.size * leaf.dtype.itemsize
    rows = [("stored", ", ".join(f"{d} {format_bytes(n)}" for d, n in stored.items()))]
    if meta.quantization is not None:
        bits = 8 * meta.nbytes / weights.count_parameters(meta.config)
        size = f"{format_bytes(meta.nbytes)}, {bits:.2f} bits a parameter"
        rows.append(("quantized", f"{meta.quantization}: {size}"))
        rows += [("", line) for line in format_quantization_errors(meta.errors)]
    if meta.origin.get("source"):
        rows.append(("converted from", meta.origin["source"]))
    if meta.sha256:
        names = {x.path: x.hf_name for x in meta.disk_leaves}
        rows.append(
            ("sha256 of sha256", weights_digest({names[p]: v for p, v in meta.sha256.items()}))
        )
    return meta.config, rows
