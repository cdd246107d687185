"""Everything the benches measure that this machine can hold, as a section of Markdown."""

from __future__ import annotations

import datetime
import functools
import importlib.util
import logging
import os
from collections.abc import Callable, Iterator
from typing import Any

from etils import epath

from btlm_jax import sharding, staging
from btlm_jax.config import BTLMConfig

from . import measure
from .attention_bench import bench_attention
from .bench import bench_train
from .generation_bench import bench_decode, bench_prefill
from .loss_bench import bench_loss
from .metrics import utilisation

logger = logging.getLogger(__name__)

Bench = Callable[..., dict[str, Any]]

# MPT-3B, a model of the same shape, in llm-foundry on 8 H100 80GB, bf16:
# github.com/mosaicml/llm-foundry, scripts/train/benchmarking: length -> (tokens/s/GPU, MFU in %).
MPT_3B = {2048: (24_100, 43.7), 8192: (16_600, 40.3)}


def bench_all(file: str | os.PathLike[str], *, rounds: int) -> None:
    """Runs generation, attention, loss and training step; writes what they print, with conditions.

    A bench that fails is written down with its error, and the rest goes on.

    Args:
      file: Markdown; replaced when all is done.
      rounds: how often everything is measured.

    Raises:
      FileNotFoundError: the directory of `file` does not exist.
      ValueError: a bench failed; all that was found is written.
    """
    file = epath.Path(file)
    if not file.parent.is_dir():
        raise FileNotFoundError(f"{file.parent}: no such directory; make it first")
    parts, failed = [_heading()], []
    for title, bench in _benches():
        logger.info("%s", title)
        lines: list[str] = []
        try:
            found = bench(rounds=rounds, show=lambda line, lines=lines: lines.append(str(line)))
        except Exception as e:  # whatever a device or a library raises: the others still count
            logger.error("%s failed: %s", title, e)
            lines.append(f"FAILED: {type(e).__name__}: {e}")
            failed.append(title)
        else:
            lines += _beside_mpt(title, found)
        for line in lines:
            print(line)
        parts.append(f"### {title}\n\n```\n" + "\n".join(lines) + "\n```\n")
    staging.write_text(file, "\n".join(parts))
    if failed:
        raise ValueError(f"failed: {', '.join(failed)}; the errors, and the rest, are in {file}")


def _benches() -> Iterator[tuple[str, Bench]]:
    attention = functools.partial(bench_attention, preset="btlm-3b-8k", batch_size=1, dtype=None)
    loss = functools.partial(bench_loss, preset=None, rows=None, dtype=None)
    train = functools.partial(bench_train, dtype=None)
    yield from _of_generation()
    if sharding.platform(None) == "cpu":
        yield "Attention", functools.partial(attention, length=None)
        yield "Loss", loss
        yield "btlm-40m", functools.partial(train, preset="btlm-40m", length=512, batch_size=4)
        return
    for length in (2048, 8192):
        yield f"Attention at {length}", functools.partial(attention, length=length)
    yield "Loss", loss
    yield "btlm-450m", functools.partial(train, preset="btlm-450m", length=2048, batch_size=8)
    for length, batch_size in ((2048, 4), (8192, 1)):
        title = f"btlm-3b-8k at {length}"
        yield (
            title,
            functools.partial(
                train,
                preset="btlm-3b-8k",
                length=length,
                batch_size=batch_size,
                remat="attention",
                torch=False,  # two models of this size and their optimizers do not share a GPU
            ),
        )


def _of_generation() -> Iterator[tuple[str, Bench]]:
    """Decoding and prefill of the 3B, with the layers that a CPU reads in a reasonable time."""
    on_cpu = sharding.platform(None) == "cpu"
    model: Any = dict(preset="btlm-3b-8k", layers=8 if on_cpu else None, torch=None)
    decode = functools.partial(bench_decode, **model, cache_dtype=None)
    for kind in ("bfloat16", "int8", "int4"):
        how = dict(weights=kind, context=512, steps=4 if on_cpu else 64)
        sizes = (1, 4) if on_cpu else (1, 4, 16, 64)
        yield f"Decoding, {kind}", functools.partial(decode, **how, batch_sizes=sizes)
    lengths = (512,) if on_cpu else (512, 2048, 8192)
    prefill = functools.partial(bench_prefill, **model, weights="bfloat16", lengths=lengths)
    yield "Prefill", prefill


def _heading() -> str:
    c = measure.conditions()
    torch = importlib.util.find_spec("torch") is not None
    return (
        f"## {c['devices']} x {c['device']}, {datetime.date.today().isoformat()}\n\n"
        f"`btlm bench all`: {c['cores']} CPU cores, Python {c['python']}, jax {c['jax']}, "
        f"PyTorch {'installed' if torch else 'not installed'}.\n"
    )


def _beside_mpt(title: str, found: dict[str, Any]) -> list[str]:
    if not title.startswith("btlm-3b-8k"):
        return []
    rate, mfu = MPT_3B[found["length"]]
    here = found["rates"]["step"]
    used = utilisation(BTLMConfig.preset("btlm-3b-8k"), found["length"], here)
    return [
        f"published for MPT-3B in llm-foundry on H100: {rate:,} tokens/s/GPU, MFU {mfu} % of the "
        f"data sheet's peak; here {here / rate:.2f} x its tokens/s"
        + (f", MFU {used['mfu']:.1%}" if used else "")
    ]
