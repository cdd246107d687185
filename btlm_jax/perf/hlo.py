"""Counts of the collectives in optimized HLO.

XLA's text names every operation once, but operations in a loop run once per iteration, so the
computations are walked from the entry and multiplied by the loops' trip counts. TPU and GPU
programs split a collective into a start and a done, TPU programs also into steps inside the fusions
it overlaps with: only the start counts.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Literal, NamedTuple

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
Network = Literal["ici", "dcn"]


class Collective(NamedTuple):
    """The collectives of one kind over one network, per device and call of the program.

    Attributes:
      kind: one of `KINDS`.
      network: "ici" within a slice (or node), "dcn" between slices.
      count: number of executions.
      bytes: total size of the full arrays (after a gather, before a scatter).
      received: bytes that a device must receive on a ring: over g devices (g - 1) / g of an array,
        twice that for all-reduce.
    """

    kind: str
    network: Network
    count: int
    bytes: float
    received: float


class CollectiveCounts(NamedTuple):
    """The collectives of a program.

    Attributes:
      collectives: one entry for every kind and network.
      unknown_loops: loops without a trip count in the text, which count as one iteration.
    """

    collectives: tuple[Collective, ...]
    unknown_loops: int


_OPCODE = re.compile(rf"\s({'|'.join(KINDS)}|send|while|fusion|call|conditional|async-start)"
                     r"(-start)?\(")  # fmt: skip
_CALLED = re.compile(r"(?:calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"(?:branch_computations|called_computations)=\{([^}]*)\}")
_SHAPE = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")
_TRIPS = re.compile(r'known_trip_count"?:\s*\{"?n"?:\s*"?(\d+)')
_CONSTANT = re.compile(r"= [su]\d+\[\]\S* constant\((\d+)\)")


@dataclasses.dataclass(frozen=True)
class _Module:
    computations: Mapping[str, list[str]]
    entry: str
    partitions: int


def count_collectives(text: str) -> CollectiveCounts:
    """Counts the collectives of a compiled program, from `jax.stages.Compiled.as_text()`.

    Raises:
      ValueError: not the text of an HLO module.
    """
    module = _parse_module(text)
    totals: dict[tuple[str, Network], Collective] = {}
    unknown = 0
    for item in _walk(module, module.entry, 1):
        if item is None:
            unknown += 1
            continue
        kind, network, times, nbytes, received = item
        total = totals.get((kind, network), Collective(kind, network, 0, 0.0, 0.0))
        totals[kind, network] = total._replace(
            count=total.count + times,
            bytes=total.bytes + times * nbytes,
            received=total.received + times * received,
        )
    return CollectiveCounts(tuple(sorted(totals.values())), unknown)


def _parse_module(text: str) -> _Module:
    computations: dict[str, list[str]] = {}
    entry, lines = "", []
    for line in text.splitlines():
        if line.endswith("{") and not line.startswith((" ", "HloModule")):
            name = line.removeprefix("ENTRY ").split(" ", 1)[0].lstrip("%")
            lines = computations[name] = []
            if line.startswith("ENTRY"):
                entry = name
        elif line.startswith("  "):
            lines.append(line)
    if not entry:
        raise ValueError(f"not the text of an HLO module: found {text[:60]!r}")
    head = text[text.index("HloModule") :].split("\n", 1)[0]
    counts = [int(n) for n in re.findall(r"(?:num_partitions|replica_count)=(\d+)", head)]
    return _Module(computations, entry, max(counts, default=1))


def _walk(module: _Module, name: str, times: int) -> Iterator[tuple | None]:
    """Yields every collective that a computation executes; None for a loop of unknown length."""
    lines = module.computations.get(name, [])
    starts = any('"AsyncCollectiveStart"' in line for line in lines)
    for line in lines:
        op = _OPCODE.search(line)
        if op is None:
            continue
        kind, result = op[1], line[: op.start()].split("=", 1)[-1]
        if kind == "while":
            trips = _trip_count(module, line)
            if trips is None:
                yield None
            body = re.search(r"body=%?([\w.\-]+)", line)
            if body:
                yield from _walk(module, body[1], times * (1 if trips is None else trips))
        elif kind in ("fusion", "call", "conditional", "async-start"):
            called = _CALLED.findall(line)
            for names in _BRANCHES.findall(line):
                called += [n.strip().lstrip("%") for n in names.split(",")]
            for callee in called:
                yield from _walk(module, callee, times)
        elif kind == "send":
            if transfer := re.search(r'_xla_megascale_transfer_type="(\w+)"', line):
                yield _collective_between_slices(transfer[1], line, result, times)
        elif "async_collective_fusion_config" in line and not starts:
            continue  # a step or the done of a collective whose start has been counted
        else:
            # XLA:TPU writes a fused reduce-scatter as an all-reduce in a fusion that slices it.
            scatter = kind == "all-reduce" and name.startswith("all-reduce-scatter")
            yield _collective_within_slice(
                module, "reduce-scatter" if scatter else kind, line, result, times,
                full=kind != "reduce-scatter", started=op[2] is not None,
            )  # fmt: skip


def _collective_within_slice(
    module: _Module, kind: str, line: str, result: str, times: int, *, full: bool, started: bool
) -> tuple[str, Network, int, float, float]:
    g = _group_size(line, module.partitions)
    sizes = _sizes(result)
    if started and kind == "all-gather":
        nbytes = sum(sizes) * g / (g + 1)  # operands and results
    elif started and kind in ("collective-permute", "all-to-all", "reduce-scatter"):
        nbytes = max(sizes, default=0.0)
    else:
        nbytes = sum(sizes) * (1 if full else g)
    return kind, "ici", times, nbytes, nbytes * _received_fraction(kind, g)


def _collective_between_slices(transfer: str, line: str, result: str, times: int):
    kind = {"ONE_TO_ONE": "collective-permute"}.get(transfer, transfer.lower().replace("_", "-"))
    target = re.search(r'_xla_megascale_target="\{([\d,]*)\}', line)
    g = len(target[1].split(",")) if target else 2
    sent = next(iter(_sizes(result)), 0.0)
    nbytes = sent * g if kind == "all-gather" else sent
    return kind, "dcn", times, nbytes, nbytes * _received_fraction(kind, g)


def _received_fraction(kind: str, g: int) -> float:
    """Returns the fraction of an array that a device receives in a ring of g."""
    if kind.startswith("collective"):
        return 1.0
    return (2 if kind == "all-reduce" else 1) * (g - 1) / g


def _group_size(line: str, partitions: int) -> int:
    """Returns the number of devices in the first replica group; `partitions` if none is given.

    XLA has three notations: {{0,1},{2,3}}, [2,4]<=[8], mesh['x'=2,'y'=4] {'y'}.
    """
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", line):
        sizes = {n: int(s) for n, s in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
        g = 1
        for name, part in re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", mesh[2]):
            g *= int(part) if part else sizes[name]
        return g
    if iota := re.search(r"replica_groups=\[\d+,(\d+)\]<=", line):
        return int(iota[1])
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
        return listed[1].count(",") + 1
    return partitions


def _trip_count(module: _Module, line: str) -> int | None:
    """Returns the trip count that XLA annotates, or that of a condition i < constant; or None."""
    if known := _TRIPS.search(line):
        return int(known[1])
    condition = re.search(r"condition=%?([\w.\-]+)", line)
    lines = list(module.computations.get(condition[1], [])) if condition else []
    for text in tuple(lines):  # the comparison may be in a fusion
        for callee in _CALLED.findall(text):
            lines += module.computations.get(callee, [])
    constants = {int(n) for text in lines for n in _CONSTANT.findall(text)}
    less = any("direction=LT" in text for text in lines)
    return constants.pop() if less and len(constants) == 1 else None


def _sizes(result: str) -> list[float]:
    """Returns the bytes of every array in the type of an operation."""
    sizes = []
    for dtype, dims in _SHAPE.findall(result):
        bits = re.search(r"\d+", dtype)
        nbytes = 1.0 if dtype == "pred" else int(bits[0]) / 8 if bits else 0.0
        for n in dims.split(",") if dims else ():
            nbytes *= int(n)
        sizes.append(nbytes)
    return sizes
