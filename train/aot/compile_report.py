"""Reports of `compile` as text for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from btlm_jax.utils.format import format_bytes

CompileReport = Mapping[str, Any]


def format_compile_report(r: CompileReport) -> list[str]:
    """A report, a line each."""
    if r["what"] == "decoding":
        job = f"decoding {r['batch_size']} sequences against {r['capacity']} slots"
        job += f", weights {r['weights']}, cache {r['cache']}"
    else:
        job = f"{r['what']}: {r['batch_size']} sequences of {r['length']}"
        if r["microbatch"] != r["batch_size"]:
            job += f" in microbatches of {r['microbatch']}"
        job += f", remat {r['remat']}"
    axes = " x ".join(f"{name} {n}" for name, n in r["mesh"].items() if n > 1) or "one device"
    return [
        f"{r['topology']}, {r['devices']} devices ({axes}): {job}, {r['dtype']}",
        f"  compiled in {r['seconds']['compile']:.1f} s (lowered in {r['seconds']['lower']:.1f} s)",
        *_memory(r["memory"], "cache, tokens" if r["what"] == "decoding" else "batch"),
        *_collectives(r),
        *_bound(r),
    ]


def _memory(m: Mapping[str, float], inputs: str) -> list[str]:
    show = format_bytes
    rows = [("parameters", m["parameters"])]
    rows += [("optimizer state", m["optimizer"])] * bool(m["optimizer"])
    rows += [(inputs, m["inputs"]), ("activations, gradients, temporaries", m["rest"])]
    used = m["peak"] / m["available"]
    return [
        f"  memory per device: peak {show(m['peak'])} of {show(m['available'])} ({used:.0%})",
        *(f"    {name:<36}{show(n):>12}" for name, n in rows),
    ]


def _collectives(r: CompileReport) -> list[str]:
    if not r["collectives"]:
        return ["  collectives: none"]
    show = format_bytes
    out = ["  collectives per device and step:        count       arrays     received"]
    for c in r["collectives"]:
        name = f"{c['kind']} ({c['network'].upper()})"
        out.append(f"    {name:<36}{c['count']:>7}{show(c['bytes']):>13}{show(c['received']):>13}")
    if r["unknown_loops"]:
        out.append(f"    {r['unknown_loops']} loops of unknown length are counted once: too few")
    return out


def _bound(r: CompileReport) -> list[str]:
    b, f = r["bound"], r["flops"]
    rows = [("compute", b["compute"]), ("HBM", b["hbm"]), ("ICI", b["ici"])]
    rows += [("DCN", b["dcn"])] * bool(b["dcn"])
    parts = ", ".join(f"{name} {_time(s)}" for name, s in rows)
    rate = r["tokens_per_second_per_device"]
    out = [
        f"  at best (roofline): {parts}",
        f"    a step takes {_time(b['seconds'])} if all overlap ({b['limit'].upper()} limits),"
        f" {_time(b['in_turn'])} if nothing does",
    ]
    if "mfu" in r:
        again = f" + {f['recomputed']:.3g} recomputed" if f["recomputed"] else ""
        out.append(
            f"    {f['model_causal']:.4g} FLOPs per device and step, causal "
            f"({f['model_full']:.4g} counting full attention){again}"
        )
        out.append(
            f"    at most {rate:,.0f} tokens/s/device, MFU {r['mfu']:.1%} "
            f"(causal {r['mfu_causal']:.1%})"
        )
    else:
        out.append(
            f"    at most {rate:,.0f} tokens/s/device, {1e3 * b['seconds']:.3g} ms per token and "
            "sequence"
        )
    return out


def _time(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def format_fit_table(reports: Sequence[CompileReport], names: Sequence[str]) -> list[str]:
    """Reports of training steps as a Markdown table; `names` are those of the topologies."""
    out = [
        "| topology | length | mesh | microbatch | remat | peak memory | step at best | limit "
        "| tokens/s/device at best | MFU at best |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, r in zip(names, reports, strict=True):
        axes = " x ".join(f"{n} {k}" for n, k in r["mesh"].items() if k > 1) or "1"
        m, b = r["memory"], r["bound"]
        out.append(
            f"| {name} | {r['length']} | {axes} | {r['microbatch']} | {r['remat']} "
            f"| {m['peak'] / 2**30:.2f} of {m['available'] / 2**30:.2f} GiB "
            f"| {_time(b['seconds'])} | {b['limit'].upper()} "
            f"| {r['tokens_per_second_per_device']:,.0f} | {r['mfu']:.0%} |"
        )
    return out
