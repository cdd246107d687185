"""Results of a conversion, an export or a quantization, for people and for scripts."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Iterator, Mapping

from btlm_jax.model import weights
from btlm_jax.utils.format import format_bytes


@dataclasses.dataclass(frozen=True)
class ConversionReport:
    """Results of a conversion, an export or a quantization.

    Attributes:
      tensors: number of tensors in the target, including those of an interrupted run.
      resumed: number of tensors that an interrupted run had written.
      nbytes: bytes of all tensors.
      dtypes: dtype -> number of tensors.
      seconds: wall-clock time of this run.
      peak_rss: largest resident set of this process, in bytes.
      digest: `weights_digest` of the tensors.
      files: names of the carried files (conversion) or of the weight files (export).
      errors: quantization errors of every quantized weight, by path (see
        `CheckpointMetadata`).
    """

    tensors: int
    resumed: int
    nbytes: int
    dtypes: Mapping[str, int]
    seconds: float
    peak_rss: int
    digest: str
    files: tuple[str, ...]
    errors: Mapping[weights.Path, Mapping[str, float]] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        dtypes = ", ".join(f"{n} {dtype}" for dtype, n in self.dtypes.items())
        resumed = f", {self.resumed} of them by an interrupted run" if self.resumed else ""
        rate = format_bytes(self.nbytes / max(self.seconds, 1e-9))
        speed = "" if self.resumed else f" ({rate}/s)"
        return (
            f"{self.tensors} tensors ({dtypes}){resumed}, {self.nbytes:,} bytes, "
            f"{self.seconds:.1f} s{speed}, peak memory {format_bytes(self.peak_rss)}\n"
            f"sha256 of the tensors' sha256: {self.digest}"
            + "".join(f"\n{line}" for line in format_quantization_errors(self.errors))
        )


def format_quantization_errors(
    errors: Mapping[weights.Path, Mapping[str, float]],
) -> Iterator[str]:
    """Yields a line per weight: its quantization error, RMS over the layers and maximum."""
    by_weight: dict[str, list[Mapping[str, float]]] = {}
    for path, layer_errors in errors.items():
        name = "/".join(part for part in path if not part.isdigit())
        by_weight.setdefault(name, []).append(layer_errors)
    for name, layers in by_weight.items():
        rms, worst = _rms([x["rms"] for x in layers]), max(x["rms"] for x in layers)
        q4_0 = [x["q4_0"] for x in layers if "q4_0" in x]
        baseline = f"; by the rule of Q4_0 in the same groups {_rms(q4_0):.5f}" if q4_0 else ""
        yield f"{name}: relative RMS error {rms:.5f}, at most {worst:.5f}{baseline}"


def _rms(values: list[float]) -> float:
    return math.sqrt(sum(x * x for x in values) / len(values))


def weights_digest(sha256: Mapping[str, str]) -> str:
    """Returns one hash for all tensors, equal for equal weights in every format.

    It is the SHA-256 over lines "NAME SHA256", sorted by Hugging Face name, and so depends on
    names, dtypes and values only.

    Args:
      sha256: Hugging Face name -> SHA-256 of the tensor's bytes, in hexadecimal.
    """
    lines = "".join(f"{name} {value}\n" for name, value in sorted(sha256.items()))
    return hashlib.sha256(lines.encode()).hexdigest()
