"""Reports of `compile` as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from btlm_jax.utils.format import format_bytes

CompileReport = Mapping[str, Any]


def format_compile_report(report: CompileReport) -> list[str]:
    """Returns the lines of a report."""
    decoding = report["what"] == "decoding"
    axes = " x ".join(f"{name} {n}" for name, n in report["mesh"].items() if n > 1)
    seconds = report["seconds"]
    return [
        f"{report['topology']}, {report['devices']} devices ({axes or 'one device'}): "
        f"{_workload(report)}, {report['dtype']}",
        f"  compiled in {seconds['compile']:.1f} s (lowered in {seconds['lower']:.1f} s)",
        *_memory_lines(report["memory"], "cache, tokens" if decoding else "batch"),
        *_collective_lines(report),
        *_bound_lines(report),
    ]


def format_fit_table(reports: Sequence[CompileReport], names: Sequence[str]) -> list[str]:
    """Returns the lines of a Markdown table, one row per report of a training step.

    Args:
      reports: the reports.
      names: the name of the topology of each.
    """
    lines = [
        "| topology | length | mesh | microbatch | remat | peak memory | step at best | limit "
        "| tokens/s/device at best | MFU at best |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, report in zip(names, reports, strict=True):
        axes = " x ".join(f"{axis} {n}" for axis, n in report["mesh"].items() if n > 1) or "1"
        memory, bound = report["memory"], report["bound"]
        lines.append(
            f"| {name} | {report['length']} | {axes} | {report['microbatch']} | {report['remat']} "
            f"| {memory['peak'] / 2**30:.2f} of {memory['available'] / 2**30:.2f} GiB "
            f"| {_format_seconds(bound['seconds'])} | {bound['limit'].upper()} "
            f"| {report['tokens_per_second_per_device']:,.0f} | {report['mfu']:.0%} |"
        )
    return lines


def _workload(report: CompileReport) -> str:
    if report["what"] == "decoding":
        return (
            f"decoding {report['batch_size']} sequences against {report['capacity']} slots, "
            f"weights {report['weights']}, cache {report['cache']}"
        )
    text = f"{report['what']}: {report['batch_size']} sequences of {report['length']}"
    if report["microbatch"] != report["batch_size"]:
        text += f" in microbatches of {report['microbatch']}"
    return f"{text}, remat {report['remat']}"


def _memory_lines(memory: Mapping[str, float], inputs: str) -> list[str]:
    rows = [("parameters", memory["parameters"])]
    rows += [("optimizer state", memory["optimizer"])] * bool(memory["optimizer"])
    rows += [(inputs, memory["inputs"]), ("activations, gradients, temporaries", memory["rest"])]
    peak, available = memory["peak"], memory["available"]
    return [
        f"  memory per device: peak {format_bytes(peak)} of {format_bytes(available)} "
        f"({peak / available:.0%})",
        *(f"    {name:<36}{format_bytes(nbytes):>12}" for name, nbytes in rows),
    ]


def _collective_lines(report: CompileReport) -> list[str]:
    if not report["collectives"]:
        return ["  collectives: none"]
    lines = ["  collectives per device and step:        count       arrays     received"]
    for collective in report["collectives"]:
        name = f"{collective['kind']} ({collective['network'].upper()})"
        lines.append(
            f"    {name:<36}{collective['count']:>7}{format_bytes(collective['bytes']):>13}"
            f"{format_bytes(collective['received']):>13}"
        )
    if report["unknown_loops"]:
        lines.append(
            f"    too low: {report['unknown_loops']} loops of unknown length are counted once"
        )
    return lines


def _bound_lines(report: CompileReport) -> list[str]:
    bound, flops = report["bound"], report["flops"]
    rows = [("compute", bound["compute"]), ("HBM", bound["hbm"]), ("ICI", bound["ici"])]
    rows += [("DCN", bound["dcn"])] * bool(bound["dcn"])
    rate = report["tokens_per_second_per_device"]
    lines = [
        "  at best (roofline): "
        + ", ".join(f"{name} {_format_seconds(seconds)}" for name, seconds in rows),
        f"    a step takes {_format_seconds(bound['seconds'])} if all overlap "
        f"({bound['limit'].upper()} limits), {_format_seconds(bound['in_turn'])} if nothing does",
    ]
    if "mfu" not in report:
        milliseconds = 1e3 * bound["seconds"]
        return [
            *lines,
            f"    at most {rate:,.0f} tokens/s/device, {milliseconds:.3g} ms per token and "
            "sequence",
        ]
    recomputed = f" + {flops['recomputed']:.3g} recomputed" if flops["recomputed"] else ""
    return [
        *lines,
        f"    {flops['model_causal']:.4g} FLOPs per device and step, causal "
        f"({flops['model_full']:.4g} counting full attention){recomputed}",
        f"    at most {rate:,.0f} tokens/s/device, MFU {report['mfu']:.1%} "
        f"(causal {report['mfu_causal']:.1%})",
    ]


def _format_seconds(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"
