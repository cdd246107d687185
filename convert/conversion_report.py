"""What a conversion did, for people and for scripts."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Iterator, Mapping

from btlm_jax.model import weights
from btlm_jax.utils.format import format_bytes


@dataclasses.dataclass(frozen=True)
class ConversionReport:
    """What a conversion or an export did.

    Attributes:
      tensors: how many were written, those of an interrupted run included.
      resumed: how many of them an interrupted run had written.
      nbytes: bytes of all of them.
      dtypes: dtype -> number of tensors.
      seconds: of wall clock, of this run.
      peak_rss: the most memory this process has held, in bytes.
      digest: `weights_digest` of the weights' SHA-256.
      files: names of the files carried along (conversion) or of the weights (export).
      errors: of every quantized weight, by path (`metadata.Metadata.errors`).
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


def format_quantization_errors(errors: Mapping[weights.Path, Mapping[str, float]]) -> Iterator[str]:
    """Errors of quantization for people: of each weight, the RMS over its layers and the worst."""
    layers: dict[str, list[Mapping[str, float]]] = {}
    for path, found in errors.items():
        layers.setdefault("/".join(x for x in path if not x.isdigit()), []).append(found)
    for name, all_found in layers.items():
        rms, worst = _rms([x["rms"] for x in all_found]), max(x["rms"] for x in all_found)
        rule = [x["q4_0"] for x in all_found if "q4_0" in x]
        beside = f"; by the rule of Q4_0 in the same groups {_rms(rule):.5f}" if rule else ""
        yield f"{name}: relative RMS error {rms:.5f}, at most {worst:.5f}{beside}"


def _rms(values: list[float]) -> float:
    return math.sqrt(sum(x * x for x in values) / len(values))


def weights_digest(sha256: Mapping[str, str]) -> str:
    """One hash for all weights: SHA-256 over lines "Hugging Face name, SHA-256", sorted by name.

    It depends on names, dtypes and values alone, so a checkpoint has the same one in every format.
    """
    lines = "".join(f"{name} {value}\n" for name, value in sorted(sha256.items()))
    return hashlib.sha256(lines.encode()).hexdigest()
