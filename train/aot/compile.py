"""Compile a recipe's step ahead of time, and say what it needs and how fast it could be.

The program is the one that training would run; it is compiled for devices that need not be here.
`compile_phase` and `compile_decoding` return a report as JSON can hold it; `compile_report` prints.
"""

from __future__ import annotations

import logging
import re
import time
from pathlib import Path
from typing import Any

import jax

from btlm_jax.checkpoint.quantization import Quantization
from btlm_jax.model.remat import Remat
from btlm_jax.perf import accounting, hlo, roofline
from btlm_jax.perf.chips import Rates
from btlm_jax.train.aot.executables import save_executable
from btlm_jax.train.aot.lowering import Lowered, decode_step, mesh_of, train_step
from btlm_jax.train.aot.topologies import Topology, topology_devices
from btlm_jax.train.recipe import Phase, Recipe
from btlm_jax.train.recipe_build import build_config, with_microbatches
from btlm_jax.train.recipe_file import recipe_to_dict
from btlm_jax.utils.format import format_bytes

logger = logging.getLogger(__name__)

# XLA's wordings of a program that does not fit, on TPUs.
_NO_ROOM = (
    re.compile(r"required for \D*\(([\d.]+)([KMGT])\) exceeds available HBM \(([\d.]+)([KMGT])\)"),
    re.compile(r"Used ([\d.]+)([KMGT]) of ([\d.]+)([KMGT]) hbm"),
)
_POWER = {"K": 10, "M": 20, "G": 30, "T": 40}


class DoesNotFit(ValueError):
    """A program needs more memory than a device has; `needed` and `available` in bytes."""

    def __init__(self, message: str, needed: float, available: float) -> None:
        super().__init__(message)
        self.needed, self.available = needed, available


def compile_phase(
    recipe: Recipe, index: int, topology: Topology, save: Path | None = None
) -> dict[str, Any]:
    """Compiles the training step of a phase.

    Args:
      recipe: its mesh must fit the topology's devices.
      index: of the phase, from 0.
      topology: what to compile for.
      save: a file for the executable (`executables.save`).

    Returns:
      The report. Bytes and FLOPs are per device and step. "memory" splits the compiler's peak into
      the arguments and "rest" (activations, gradients, temporaries); "collectives" are those of
      the optimized program; "bound" is `roofline.TimeBound`, whose network seconds come from them
      and whose compute and HBM seconds from the formulas of `roofline.training_work`.

    Raises:
      DoesNotFit: with what is missing and what would help.
      ValueError: something does not fit the mesh, or libtpu is not installed.
    """
    if not 0 <= index < len(recipe.phases):
        last = len(recipe.phases) - 1
        raise ValueError(f"--phase: found {index}, the recipe has phases 0 to {last}")
    mesh = mesh_of(recipe, topology_devices(topology))
    recipe = with_microbatches(recipe, mesh)
    phase = recipe.phases[index]
    rates = topology.chip.per_device(topology.shape)
    began = time.monotonic()
    lowered = train_step(recipe, phase, mesh)
    shape, remat = dict(mesh.shape), recipe.run.remat
    micro = phase.microbatch or phase.batch_size
    facts: dict[str, Any] = {
        "what": f"phase {index}",
        "topology": topology.name,
        "devices": mesh.size,
        "mesh": shape,
        "length": phase.length,
        "batch_size": phase.batch_size,
        "microbatch": micro,
        "remat": remat,
        "dtype": str(lowered.dtype),
    }
    try:
        compiled, measured = _compile(lowered, rates, began)
    except DoesNotFit as e:
        advice = _advice(recipe, index, phase, shape, rates, e.needed)
        raise DoesNotFit(f"{topology.name}, phase {index}: {e}; {advice}",
                         e.needed, e.available) from None  # fmt: skip
    config, tokens = lowered.model.config, phase.tokens_per_step
    work = roofline.training_work(
        config,
        shape,
        length=phase.length,
        tokens=tokens,
        microbatches=phase.batch_size // micro,
        remat=remat,
    )
    flops = accounting.flops_per_token(config, phase.length)
    again = roofline.recomputed_flops_per_token(config, phase.length, remat)
    report = facts | measured | _bounds(work, measured, rates)
    seconds = report["bound"]["seconds"]
    share = tokens / mesh.size
    report |= {
        "flops": {
            "model_full": share * flops.training_full,
            "model_causal": share * flops.training_causal,
            "recomputed": share * again,
        },
        "tokens_per_second_per_device": share / seconds,
        "mfu": share * flops.training_full / seconds / rates.flops,
        "mfu_causal": share * flops.training_causal / seconds / rates.flops,
    }
    if save is not None:
        _save(save, compiled, recipe, report)
    return report


def compile_decoding(
    recipe: Recipe,
    topology: Topology,
    *,
    batch_size: int,
    capacity: int,
    quantize: Quantization | None = None,
    cache_dtype: str | None = None,
    save: Path | None = None,
) -> dict[str, Any]:
    """Compiles one step of decoding; as `compile_phase`, with the cache among the inputs.

    Args:
      batch_size: sequences, over all devices.
      capacity: slots of the cache.
      quantize: what the weights are quantized to; None is bf16.
      cache_dtype: "int8", or None for bf16.
    """
    for name, value in (("--batch-size", batch_size), ("--capacity", capacity)):
        if value < 1:
            raise ValueError(f"{name}: found {value}, expected a positive int")
    mesh = mesh_of(recipe, topology_devices(topology))
    rates = topology.chip.per_device(topology.shape)
    began = time.monotonic()
    lowered = decode_step(recipe, mesh, batch_size, capacity, quantize, cache_dtype)
    try:
        compiled, measured = _compile(lowered, rates, began)
    except DoesNotFit as e:
        raise DoesNotFit(
            f"{topology.name}, decoding: {e}; use a smaller --batch-size or --capacity, or more "
            "chips with --set mesh.tensor", e.needed, e.available
        ) from None  # fmt: skip
    shape, c = dict(mesh.shape), lowered.model.config
    # int8 has a scale in fp32 for every head of every slot.
    slot = accounting.kv_bytes_per_token(c, 1) * (1 + 4 / c.head_dim) if cache_dtype else None
    work = roofline.decoding_work(
        c,
        shape,
        batch_size=batch_size,
        capacity=capacity,
        weight_bytes=lowered.parts.parameters * shape["tensor"] * shape["fsdp"] * shape["context"],
        slot_bytes=slot,
    )
    report: dict[str, Any] = {
        "what": "decoding",
        "topology": topology.name,
        "devices": mesh.size,
        "mesh": shape,
        "batch_size": batch_size,
        "capacity": capacity,
        "dtype": str(lowered.dtype),
        "weights": str(quantize or lowered.dtype),
        "cache": cache_dtype or str(lowered.dtype),
    }
    report |= measured | _bounds(work, measured, rates)
    report["flops"] = {"model_causal": work.flops}
    report["tokens_per_second_per_device"] = batch_size / mesh.size / report["bound"]["seconds"]
    if save is not None:
        _save(save, compiled, recipe, report)
    return report


def _compile(lowered: Lowered, rates: Rates, began: float) -> tuple[Any, dict[str, Any]]:
    """The executable, and what can be read off it."""
    ready = time.monotonic()
    logger.info("lowered in %.1f s; compiling (a minute or two for 3B) ...", ready - began)
    try:
        compiled = lowered.program.compile()
    except jax.errors.JaxRuntimeError as e:
        raise _explained(e) from None
    done = time.monotonic()
    memory: Any = compiled.memory_analysis()
    program = hlo.count_collectives(compiled.as_text() or "")
    # The compiler's peak counts what rests in the host's memory too.
    parts, peak = lowered.parts, memory.peak_memory_in_bytes - memory.host_argument_size_in_bytes
    if peak > rates.memory:  # XLA refuses on TPUs only
        raise _does_not_fit(peak, rates.memory)
    return compiled, {
        "seconds": {"lower": ready - began, "compile": done - ready},
        "memory": {
            "available": rates.memory,
            "peak": peak,
            **parts._asdict(),
            "rest": peak - sum(parts),
        },
        "collectives": [c._asdict() for c in program.collectives],
        "unknown_loops": program.unknown_loops,
    }


def _bounds(work: roofline.DeviceWork, measured: dict[str, Any], rates: Rates) -> dict[str, Any]:
    received = {"ici": 0.0, "dcn": 0.0}
    for c in measured["collectives"]:
        received[c["network"]] += c["received"]
    work = work._replace(**received)
    bound = roofline.time_bound(work, rates)
    return {
        "work": work._asdict(),
        "bound": bound._asdict()
        | {"seconds": bound.seconds, "in_turn": bound.in_turn, "limit": bound.limit},
    }


def _explained(error: Exception) -> ValueError:
    text = str(error)
    for wording in _NO_ROOM:
        if found := wording.search(text):
            needed, available = (float(found[i]) * 2.0 ** _POWER[found[i + 1]] for i in (1, 3))
            return _does_not_fit(needed, available)
    return ValueError(f"XLA cannot compile this: {text.splitlines()[0]}")


def _does_not_fit(needed: float, available: float) -> DoesNotFit:
    show = format_bytes
    return DoesNotFit(
        f"does not fit: {show(needed)} per device are needed, {show(available)} are there, "
        f"{show(needed - available)} are missing",
        needed,
        available,
    )


def _advice(
    recipe: Recipe, index: int, phase: Phase, shape: dict[str, int], rates: Rates, needed: float
) -> str:
    """What should fit, by the formula, corrected by how far it is off for what did not."""
    config = build_config(recipe)

    def estimate(micro: int, remat: Remat) -> float:
        return roofline.training_memory(
            config,
            shape,
            length=phase.length,
            microbatch=micro,
            microbatches=phase.batch_size // micro,
            remat=remat,
        )

    micro, remat = phase.microbatch or phase.batch_size, recipe.run.remat
    off = max(1.0, needed / estimate(micro, remat))
    ways = shape["data"] * shape["fsdp"]
    smaller = [m for m in range(micro, 0, -ways) if phase.batch_size % m == 0 and m % ways == 0]
    policies: tuple[Remat, ...] = (remat,) if remat == "full" else (remat, "full")
    for policy in policies:
        for m in smaller:
            if (m, policy) != (micro, remat) and off * estimate(m, policy) <= rates.memory:
                changed = [f"--set phases.{index}.microbatch={m}"] * (m != micro)
                changed += [f"--set run.remat={policy}"] * (policy != remat)
                return f"by estimate it fits with {' '.join(changed)}; --fit searches and compiles"
    return "by estimate no microbatch fits on this mesh: use more chips, or --fit for other meshes"


def _save(path: Path, compiled: Any, recipe: Recipe, report: dict[str, Any]) -> None:
    save_executable(path, compiled, {"recipe": recipe_to_dict(recipe), "report": report})
    logger.info("saved %s", path)
