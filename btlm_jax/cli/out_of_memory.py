"""Messages about running out of memory: how much was needed, and the options that need less."""

from __future__ import annotations

import re
from collections.abc import Sequence

# What needs less memory, by command; the last is for all others.
_ADVICE = {
    "train": "--set phases.N.microbatch=M (fewer sequences at a time), phases.N.length, "
    "run.remat=full or run.offload_optimizer=true need less; --set mesh.fsdp=-1 splits it over "
    "all devices; `btlm compile` searches what fits",
    "generate": "a smaller --batch-size, fewer --num-beams, a shorter --max-length, --cache-dtype "
    "int8, a checkpoint of `btlm convert --quantize int8`, or --set mesh.tensor=N need less",
    "eval": "a smaller --batch-size or length, --dtype bfloat16, or --set mesh.fsdp=N need less",
    "bench": "a smaller size, such as --batch-size, --length or --layers, needs less",
    "coord-check": "a smaller --batch-size or --length, or narrower --widths need less",
    "transfer": "a smaller --batch-size or --length, or narrower --widths need less",
    "convert": "a smaller --max-memory needs less",
    "export": "a smaller --max-memory needs less",
    "verify": "a smaller --max-memory needs less",
    "tokenize": "fewer --threads need less",
}
_ALLOCATION = re.compile(
    r"(?:allocat\w*|hbm|required for|requested|need\w*|requires)\D{0,40}?"
    r"(\d[\d.,]*) ?(bytes|[KMGT]i?B\b|[KMGT]\b)",
    re.IGNORECASE,
)
_NUMPY = re.compile(r"Unable to allocate ([\d.]+ \w+) for an array with shape (\([^)]*\))")


def out_of_memory(error: BaseException, command: Sequence[str]) -> str | None:
    """Returns the message for an error that says that memory ran out; None for any other.

    Args:
      error: what was raised: MemoryError, or XLA's error.
      command: the name of the command, or nothing.
    """
    text = str(error)
    if isinstance(error, MemoryError):
        where = "the host"
    elif "RESOURCE_EXHAUSTED" in text or re.search(r"out of memory", text, re.IGNORECASE):
        where = "a device"
    else:
        return None
    needed = ""
    if found := _NUMPY.search(text):
        needed = f" (it needed {found[1]} for an array of shape {found[2]})"
    elif found := _ALLOCATION.search(text):
        needed = f" (it needed {_with_unit(found[1], found[2])} more)"
    advice = _ADVICE.get(command[0] if command else "", "a smaller batch or length needs less")
    return f"out of memory on {where}{needed}: {advice}"


def _with_unit(number: str, unit: str) -> str:
    """Returns an amount of bytes in readable form, from one in XLA's."""
    from btlm_jax.utils.format import format_bytes

    if unit != "bytes":
        return f"{number} {unit if unit.endswith('B') else unit + 'iB'}"
    return format_bytes(int(number.replace(",", "").split(".")[0]))
