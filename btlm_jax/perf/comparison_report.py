"""Tables and a figure of `comparison`."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from btlm_jax.perf import comparison
from btlm_jax.perf.comparison import CONTEXTS, DecoderShape, SequenceMemory
from btlm_jax.utils import plots
from btlm_jax.utils.format import align_columns


def comparison_lines(ours: DecoderShape, contexts: tuple[int, ...] = CONTEXTS) -> list[str]:
    """Returns the lines of `btlm info --compare`: formulas, compute, memory, claims."""
    llama = comparison.load_peers()[0]
    out = ["formulas", *(f"  {f}" for f in comparison.FORMULAS), "", "compute"]
    out += ["  " + line for line in align_columns(_compute_rows(ours, contexts))]
    if not comparison.is_released(ours):
        tokens = f"{ours.tokens / 1e9:,.1f}B"
        out.append(f"  {ours.name} is counted as if trained on BTLM-3B-8K's {tokens} tokens")
    out += ["", f"memory with one sequence: {ours.name} and {llama.name} (saving)"]
    out += ["  " + line for line in align_columns(_memory_rows(ours, llama, contexts))]
    out += ["", "claims of the model card"]
    if comparison.is_released(ours):
        for claim in comparison.check_claims(ours):
            out.append(f"  {claim.claim}: {claim.verdict}")
            out += [f"    {line}" for line in claim.found]
    else:
        out.append(f"  they are about BTLM-3B-8K, whose shape {ours.name} does not have")
    return out


def _compute_rows(ours: DecoderShape, contexts: tuple[int, ...]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [(
        "model", "parameters", "tokens", "training FLOPs", "6 N D", "saved", "of 6 N D",
        *(f"inference at {s:,}" for s in contexts),
    )]  # fmt: skip
    for shape in (ours, *comparison.load_peers()):
        is_ours = shape is ours
        saved = [
            "" if is_ours else f"{comparison.saving(a, b):.1%}"
            for a, b in (
                (ours.training_flops, shape.training_flops), (ours.six_n_d, shape.six_n_d)
            )
        ]  # fmt: skip
        inference = [
            f"{shape.forward_flops(s) / 1e9:.3g} GFLOP" if is_ours
            else f"{shape.forward_flops(s) / ours.forward_flops(s):.2f}x"
            for s in contexts
        ]  # fmt: skip
        rows.append((
            shape.name, f"{shape.parameters:,}", f"{shape.tokens / 1e9:,.1f}B",
            f"{shape.training_flops:.3e}", f"{shape.six_n_d:.3e}", *saved, *inference,
        ))  # fmt: skip
    return rows


def _memory_rows(
    ours: DecoderShape, peer: DecoderShape, contexts: tuple[int, ...]
) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [
        ("weights", "cache", *(f"{s:,} tokens" if s else "no cache" for s in contexts))
    ]
    for precision in comparison.PRECISIONS:
        for cache in comparison.CACHES:
            cells = []
            for context in contexts:
                a = comparison.sequence_memory(ours, precision, context, cache)
                b = comparison.sequence_memory(peer, precision, context, cache)
                saved = comparison.saving(a.bytes, b.bytes)
                cells.append(f"{_format_memory(a)} and {_format_memory(b)} ({saved:.1%})")
            rows.append((precision, cache, *cells))
    return rows


def _format_memory(memory: SequenceMemory) -> str:
    small = memory.bytes < 5e7
    return f"{memory.bytes / 1e6:.2f} MB" if small else f"{memory.bytes / 1e9:.2f} GB"


def draw_comparison(path: Path, ours: DecoderShape) -> None:
    """Draws training FLOPs, and inference FLOPs and memory against context, as a PNG file."""
    shapes, llama = (ours, *comparison.load_peers()), comparison.load_peers()[0]
    figure, panels = plots.new_figure(columns=3, size=(6, 4.4))
    bars, inference, memory = panels[0]

    names = [s.name for s in shapes]
    flops = [s.training_flops / 1e22 for s in shapes]
    rectangles = bars.barh(names, flops, color=["C0"] + ["0.75"] * len(comparison.load_peers()))
    labels = [f"{f:.2f}" for f in flops[:1]]
    labels += [f"{f:.2f}  (saves {comparison.saving(flops[0], f):.1%})" for f in flops[1:]]
    bars.bar_label(rectangles, labels, padding=3, fontsize="small")
    bars.invert_yaxis()
    bars.set(
        title="Training", xlabel="10²² FLOPs, attention and head included",
        xlim=(0, 1.4 * max(flops)),
    )  # fmt: skip

    contexts = np.linspace(0, 8192, 65)
    by_flops: dict[float, list[DecoderShape]] = {}  # models of one shape share a line
    for shape in shapes:
        by_flops.setdefault(shape.forward_flops(1), []).append(shape)
    for group in by_flops.values():
        y = [group[0].forward_flops(float(s)) / 1e9 for s in contexts]
        label = ", ".join(s.name for s in group)
        inference.plot(contexts, y, label=label, linewidth=3 if ours in group else 1.2)
    for s in (0, 2048, 8192):
        ratio = llama.forward_flops(s) / ours.forward_flops(s)
        inference.annotate(
            f"{ratio:.2f}x", (s, (llama.forward_flops(s) + ours.forward_flops(s)) / 2e9),
            (-4 if s == 8192 else 4, 0), textcoords="offset points",
            ha="right" if s == 8192 else "left", color="0.35",
        )  # fmt: skip
        inference.vlines(
            s, ours.forward_flops(s) / 1e9, llama.forward_flops(s) / 1e9, color="0.7",
            linestyle=":",
        )  # fmt: skip
    inference.set(title="Inference (beside LLaMA-7B)", xlabel="tokens of context",
                  ylabel="GFLOPs per token")  # fmt: skip
    inference.set_ylim(bottom=0)
    inference.legend(fontsize="small", loc="lower right")

    for i, precision in enumerate(comparison.PRECISIONS):
        for shape, style in ((ours, "-"), (llama, ":")):
            for cache, width in (("bf16", 2.0), ("int8", 1.0)):
                y = [
                    comparison.sequence_memory(shape, precision, int(s), cache).bytes / 1e9
                    for s in contexts
                ]
                memory.plot(contexts, y, style, color=f"C{i}", linewidth=width)
    for i, precision in enumerate(comparison.PRECISIONS):
        memory.plot([], [], color=f"C{i}", linewidth=2, label=f"{precision} weights")
    memory.plot([], [], "-", color="0.3", linewidth=2, label=f"{ours.name}, bf16 cache")
    memory.plot([], [], "-", color="0.3", linewidth=1, label=f"{ours.name}, int8 cache")
    memory.plot([], [], ":", color="0.3", linewidth=2, label=f"{llama.name}, the same")
    if comparison.is_released(ours):
        memory.axhline(3, color="0.5", linestyle="--", linewidth=1)
        memory.annotate("3 GB", (8192, 3), (-2, 3), textcoords="offset points", ha="right",
                        color="0.35")  # fmt: skip
    memory.set(title="Weights and the cache of one sequence", xlabel="tokens of context",
               ylabel="GB")  # fmt: skip
    memory.set_yscale("log")
    memory.yaxis.set_major_formatter("{x:g}")
    ticks = [t for t in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 3, 5, 7, 10, 15, 20)]
    low, high = memory.get_ylim()
    memory.set_yticks([t for t in ticks if low <= t <= high])
    memory.minorticks_off()
    memory.set_ylim(low, high)
    memory.legend(fontsize="x-small", ncols=2, loc="upper left")
    memory.set_ylim(low, high * (high / low) ** 0.35)
    for axes in (inference, memory):
        axes.grid(alpha=0.3)
    plots.save_png(path, figure)
