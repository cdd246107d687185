"""Commands on checkpoints: convert, export, verify, info."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import arg

from btlm_jax.checkpoint.schemes import SCHEME_HELP
from btlm_jax.cli.arguments import (
    Bytes,
    Scheme,
    Text,
    refuse_ignored_options,
    write_json,
)
from btlm_jax.cli.path_arguments import (
    Checkpoint,
    LocalTarget,
    OptionalSource,
    OutputFile,
    Picture,
    Source,
    Target,
)
from btlm_jax.utils.format import DEFAULT_MEMORY, align_columns, format_bytes, join_first

if TYPE_CHECKING:
    from btlm_jax.config import BTLMConfig


@dataclasses.dataclass(frozen=True)
class Convert:
    """Convert Hugging Face files to Orbax bit for bit, or quantize.

    A conversion that was interrupted resumes when the same command is run again.
    """

    source: Source
    """A directory with config.json and safetensors or .bin weights, or a Hub id (org/name). With
    --quantize, an Orbax checkpoint too."""
    target: Target
    """The Orbax checkpoint to write: a directory or a gs:// URL."""
    revision: Text = None
    """Branch, tag or commit on the Hub."""
    max_memory: Bytes = DEFAULT_MEMORY
    """Memory for weights that are being processed, such as 512MiB."""
    allow_nonfinite: bool = False
    """Also convert weights that contain NaN or Inf."""
    overwrite: bool = False
    """Replace an existing checkpoint."""
    quantize: Annotated[
        Scheme, arg(help=f"Quantize the projections of the layers: {SCHEME_HELP}.")
    ] = None
    quantize_embedding: Literal["int8", "bfloat16"] = "int8"
    """With --quantize: dtype of the embedding and the untied head."""

    def run(self) -> None:
        from btlm_jax.checkpoint.quantization import Quantization
        from btlm_jax.convert import convert, quantize

        refuse_ignored_options(self, {"quantize_embedding": ("quantize",)})
        options: Any = dict(
            revision=self.revision, max_memory=self.max_memory, overwrite=self.overwrite
        )
        if self.quantize is None:
            report = convert(
                self.source, self.target, allow_nonfinite=self.allow_nonfinite, **options
            )
        elif self.allow_nonfinite:
            raise ValueError(
                "--allow-nonfinite: found it with --quantize, but NaN and Inf cannot be quantized: "
                "remove one of them"
            )
        else:
            to = Quantization.parse(self.quantize, self.quantize_embedding)
            report = quantize(self.source, self.target, to, **options)
        print(f"{self.target}: {report}")
        print(f"also copied: {', '.join(report.files) or 'no tokenizer'}")


@dataclasses.dataclass(frozen=True)
class Export:
    """Convert an Orbax checkpoint to Hugging Face files bit for bit.

    The weights of a training checkpoint are exported. An export that was interrupted resumes when
    the same command is run again.
    """

    checkpoint: Checkpoint
    """An Orbax checkpoint: a directory or a gs:// URL."""
    target: LocalTarget
    """The directory to write."""
    max_shard_size: Bytes = 5 * 10**9
    """Size limit of a safetensors file, such as 5GB."""
    max_memory: Bytes = DEFAULT_MEMORY
    """Memory for weights that are being processed, such as 512MiB."""
    allow_nonfinite: bool = False
    """Export weights with NaN or Inf too, with a warning."""
    overwrite: bool = False
    """Replace an existing export."""

    def run(self) -> None:
        from btlm_jax.convert import export

        report = export(
            self.checkpoint,
            self.target,
            max_shard_bytes=self.max_shard_size,
            max_memory=self.max_memory,
            allow_nonfinite=self.allow_nonfinite,
            overwrite=self.overwrite,
        )
        print(f"{self.target}: {report}")
        print(f"weights: {', '.join(report.files)}")


@dataclasses.dataclass(frozen=True)
class Verify:
    """Compare two checkpoints, or check one against its checksums.

    Any difference is listed, with exit code 1.
    """

    first: Annotated[Source, arg(metavar="A")]
    """An Orbax checkpoint (directory or URL), a Hugging Face directory, or a Hub id."""
    second: Annotated[OptionalSource, arg(metavar="[B]")] = None
    """A second checkpoint; without it, the first is checked against the SHA-256 that it records."""
    atol: Annotated[float | None, arg(metavar="FLOAT")] = None
    """Accept differences up to this, also between dtypes; by default bits must be equal."""
    logits: bool = False
    """Also run both models on the same tokens (in fp32, one model at a time)."""
    max_memory: Bytes = DEFAULT_MEMORY
    """Memory for weights that are being processed, such as 512MiB."""

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
    """Print parameters, bytes and FLOPs of a checkpoint or preset."""

    source: Annotated[Source, arg(metavar="CHECKPOINT|PRESET")]
    """An Orbax checkpoint, a Hugging Face directory, or the name of a preset."""
    length: Annotated[int, arg(metavar="TOKENS")] = 0
    """Sequence length for FLOPs and cache; 0 is the trained context."""
    compare: bool = False
    """Instead, compare FLOPs and memory with the 7B models of 2023, and check the model card's
    claims."""
    png: Picture = None
    """With --compare: a picture to write."""
    json: OutputFile = None
    """With --compare: a file for the numbers."""

    def run(self) -> None:
        from btlm_jax.config import PRESETS, BTLMConfig
        from btlm_jax.perf import accounting
        from btlm_jax.utils import paths, plots

        refuse_ignored_options(self, {"png": ("compare",), "json": ("compare",)})
        if self.length < 0:
            raise ValueError(f"--length: found {self.length}, expected a number of tokens, or 0")
        if self.png is not None:
            plots.require_matplotlib()
        rows: list[tuple[str, str]] = []
        if paths.location(self.source).exists():
            config, rows = _describe_checkpoint(self.source)
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


def _describe_checkpoint(source: str) -> tuple[BTLMConfig, list[tuple[str, str]]]:
    """Returns the configuration of a checkpoint of either format, and rows on an Orbax one."""
    from btlm_jax.checkpoint import metadata
    from btlm_jax.checkpoint.assets import changed_assets
    from btlm_jax.checkpoint.trained_documents import read_trained_documents
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
    if reading := read_trained_documents(meta.origin).reading:
        rows.append(("trained on", f"{reading} documents"))
    if changes := changed_assets(meta):
        texts = (f"{name} ({change})" for name, change in changes.items())
        rows.append(("not as recorded", join_first(texts)))
    if meta.origin.get("source"):
        rows.append(("converted from", meta.origin["source"]))
    if meta.sha256:
        names = {x.path: x.hf_name for x in meta.disk_leaves}
        rows.append(
            ("checksum of checksums", weights_digest({names[p]: v for p, v in meta.sha256.items()}))
        )
    return meta.config, rows
