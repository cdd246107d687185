"""Compiles a recipe's step ahead of time, and reports its memory, collectives and speed limit.

The program is the one that training runs, compiled for devices that need not be attached.
`compile_phase` and `compile_decoding` return reports that JSON can hold; `compile_report` formats
them as text.
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
from btlm_jax.train.aot.lowering import LoweredProgram, lower_decode_step, lower_train_step
from btlm_jax.train.aot.topologies import Topology, topology_devices
from btlm_jax.train.recipe import Phase, Recipe
from btlm_jax.train.recipe_build import build_config, build_mesh, with_microbatches
from btlm_jax.train.recipe_file import recipe_to_dict
from btlm_jax.utils.format import format_bytes

logger = logging.getLogger(__name__)

# XLA's messages for TPU programs that need too much memory: (needed, available), with units.
_OUT_OF_MEMORY = (
    re.compile(r"required for \D*\(([\d.]+)([KMGT])\) exceeds available HBM \(([\d.]+)([KMGT])\)"),
    re.compile(r"Used ([\d.]+)([KMGT]) of ([\d.]+)([KMGT]) hbm"),
)
_POWER = {"K": 10, "M": 20, "G": 30, "T": 40}


class DoesNotFit(ValueError):
    """A program needs more memory than a device has.

    Attributes:
      needed: bytes per device that the program needs.
      available: bytes that a device has.
    """

    def __init__(self, message: str, needed: float, available: float) -> None:
        super().__init__(message)
        self.needed, self.available = needed, available


def compile_phase(
    recipe: Recipe, index: int, topology: Topology, save: Path | None = None
) -> dict[str, Any]:
    """Compiles the training step of a phase.

    Args:
      recipe: the recipe, whose mesh must fit the topology's devices.
      index: the phase, from 0.
      topology: the devices to compile for.
      save: a file for the executable (`executables.save_executable`).

    Returns:
      The report. Bytes and FLOPs are per device and step. "memory" splits the compiler's peak into
      the arguments and "rest" (activations, gradients, temporaries); "collectives" are those of
      the optimized program; "bound" is `roofline.TimeBound`, whose network seconds come from the
      collectives and whose compute and HBM seconds come from the formulas of
      `roofline.training_work`.

    Raises:
      DoesNotFit: the program needs more memory than a device has. The message says how much is
        missing and which settings should fit.
      ValueError: the recipe does not fit the mesh, or libtpu is not installed.
    """
    if not 0 <= index < len(recipe.phases):
        last = len(recipe.phases) - 1
        raise ValueError(f"--phase: found {index}, the recipe has phases 0 to {last}")
    mesh = build_mesh(recipe, topology_devices(topology))
    recipe = with_microbatches(recipe, mesh)
    phase = recipe.phases[index]
    rates = topology.chip.per_device(topology.shape)
    start = time.monotonic()
    lowered = lower_train_step(recipe, phase, mesh)
    axes, remat = dict(mesh.shape), recipe.run.remat
    microbatch = phase.microbatch_size
    try:
        compiled, measurements = _compile(lowered, rates, start)
    except DoesNotFit as e:
        advice = _suggest_settings(recipe, index, axes, rates, e.needed)
        raise DoesNotFit(f"{topology.name}, phase {index}: {e}; {advice}",
                         e.needed, e.available) from None  # fmt: skip
    config, tokens = lowered.model.config, phase.tokens_per_step
    work = roofline.training_work(
        config,
        axes,
        length=phase.length,
        tokens=tokens,
        microbatches=phase.batch_size // microbatch,
        remat=remat,
    )
    report: dict[str, Any] = {
        "what": f"phase {index}",
        "topology": topology.name,
        "devices": mesh.size,
        "mesh": axes,
        "length": phase.length,
        "batch_size": phase.batch_size,
        "microbatch": microbatch,
        "remat": remat,
        "dtype": str(lowered.dtype),
    }
    report |= measurements | _time_bound(work, measurements, rates)
    flops = accounting.flops_per_token(config, phase.length)
    recomputed = roofline.recomputed_flops_per_token(config, phase.length, remat)
    seconds = report["bound"]["seconds"]
    device_tokens = tokens / mesh.size
    report |= {
        "flops": {
            "model_full": device_tokens * flops.training_full,
            "model_causal": device_tokens * flops.training_causal,
            "recomputed": device_tokens * recomputed,
        },
        "tokens_per_second_per_device": device_tokens / seconds,
        "mfu": device_tokens * flops.training_full / seconds / rates.flops,
        "mfu_causal": device_tokens * flops.training_causal / seconds / rates.flops,
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
    """Compiles one decoding step.

    Args:
      recipe: the recipe, for its model and mesh.
      topology: the devices to compile for.
      batch_size: sequences over all devices.
      capacity: slots of the KV cache.
      quantize: the scheme of the weights; None is bf16.
      cache_dtype: "int8", or None for bf16.
      save: a file for the executable (`executables.save_executable`).

    Returns:
      A report as from `compile_phase`, with the cache among the inputs.

    Raises:
      DoesNotFit, ValueError: as `compile_phase`.
    """
    for name, value in (("--batch-size", batch_size), ("--capacity", capacity)):
        if value < 1:
            raise ValueError(f"{name}: found {value}, expected a positive int")
    mesh = build_mesh(recipe, topology_devices(topology))
    rates = topology.chip.per_device(topology.shape)
    start = time.monotonic()
    lowered = lower_decode_step(recipe, mesh, batch_size, capacity, quantize, cache_dtype)
    try:
        compiled, measurements = _compile(lowered, rates, start)
    except DoesNotFit as e:
        raise DoesNotFit(
            f"{topology.name}, decoding: {e}; use a smaller --batch-size or --capacity, or more "
            "chips with --set mesh.tensor", e.needed, e.available
        ) from None  # fmt: skip
    axes, config = dict(mesh.shape), lowered.model.config
    slot_bytes = None
    if cache_dtype is not None:  # int8, and a scale in fp32 for every head of every slot
        slot_bytes = accounting.kv_bytes_per_token(config, 1) * (1 + 4 / config.head_dim)
    work = roofline.decoding_work(
        config,
        axes,
        batch_size=batch_size,
        capacity=capacity,
        weight_bytes=lowered.arguments.parameters
        * (axes["tensor"] * axes["fsdp"] * axes["context"]),
        slot_bytes=slot_bytes,
    )
    report: dict[str, Any] = {
        "what": "decoding",
        "topology": topology.name,
        "devices": mesh.size,
        "mesh": axes,
        "batch_size": batch_size,
        "capacity": capacity,
        "dtype": str(lowered.dtype),
        "weights": str(quantize or lowered.dtype),
        "cache": str(cache_dtype or lowered.dtype),
    }
    report |= measurements | _time_bound(work, measurements, rates)
    report["flops"] = {"model_causal": work.flops}
    report["tokens_per_second_per_device"] = batch_size / mesh.size / report["bound"]["seconds"]
    if save is not None:
        _save(save, compiled, recipe, report)
    return report


def _compile(lowered: LoweredProgram, rates: Rates, start: float) -> tuple[Any, dict[str, Any]]:
    """Returns the executable, with its compile times, memory and collectives.

    Args:
      start: `time.monotonic()` before lowering.
    """
    lowered_at = time.monotonic()
    logger.info("lowered in %.1f s; compiling (a minute or two for 3B) ...", lowered_at - start)
    try:
        compiled = lowered.program.compile()
    except jax.errors.JaxRuntimeError as e:
        raise _compile_error(e) from None
    end = time.monotonic()
    memory: Any = compiled.memory_analysis()
    collectives = hlo.count_collectives(compiled.as_text() or "")
    # The compiler's peak includes arguments in the host's memory.
    peak = memory.peak_memory_in_bytes - memory.host_argument_size_in_bytes
    if peak > rates.memory:  # XLA itself refuses only on TPUs
        raise _does_not_fit(peak, rates.memory)
    return compiled, {
        "seconds": {"lower": lowered_at - start, "compile": end - lowered_at},
        "memory": {
            "available": rates.memory,
            "peak": peak,
            **lowered.arguments._asdict(),
            "rest": peak - sum(lowered.arguments),
        },
        "collectives": [c._asdict() for c in collectives.collectives],
        "unknown_loops": collectives.unknown_loops,
    }


def _time_bound(
    work: roofline.DeviceWork, measurements: dict[str, Any], rates: Rates
) -> dict[str, Any]:
    """Returns the work, with the network bytes of the program's collectives, and its time bound."""
    received = {"ici": 0.0, "dcn": 0.0}
    for collective in measurements["collectives"]:
        received[collective["network"]] += collective["received"]
    work = work._replace(**received)
    bound = roofline.time_bound(work, rates)
    derived = {"seconds": bound.seconds, "in_turn": bound.in_turn, "limit": bound.limit}
    return {"work": work._asdict(), "bound": bound._asdict() | derived}


def _compile_error(error: Exception) -> ValueError:
    """Returns XLA's error as DoesNotFit where it reports sizes, otherwise as ValueError."""
    text = str(error)
    for pattern in _OUT_OF_MEMORY:
        if match := pattern.search(text):
            needed, available = (float(match[i]) * 2.0 ** _POWER[match[i + 1]] for i in (1, 3))
            return _does_not_fit(needed, available)
    return ValueError(f"XLA cannot compile this: {text.splitlines()[0]}")


def _does_not_fit(needed: float, available: float) -> DoesNotFit:
    return DoesNotFit(
        f"does not fit: the program needs {format_bytes(needed)} per device, "
        f"{format_bytes(available)} are available, {format_bytes(needed - available)} are missing",
        needed,
        available,
    )


def _suggest_settings(
    recipe: Recipe, index: int, axes: dict[str, int], rates: Rates, needed: float
) -> str:
    """Returns settings that fit by `roofline.training_memory`.

    The estimates are scaled by the ratio of `needed` to the estimate for the recipe's settings.
    """
    config, phase = build_config(recipe), recipe.phases[index]

    def estimate(microbatch: int, remat: Remat) -> float:
        return roofline.training_memory(
            config,
            axes,
            length=phase.length,
            microbatch=microbatch,
            microbatches=phase.batch_size // microbatch,
            remat=remat,
        )

    current = phase.microbatch_size, recipe.run.remat
    correction = max(1.0, needed / estimate(*current))
    policies: tuple[Remat, ...] = (current[1],) if current[1] == "full" else (current[1], "full")
    for remat in policies:
        for microbatch in _smaller_microbatches(phase, axes["data"] * axes["fsdp"]):
            fits = correction * estimate(microbatch, remat) <= rates.memory
            if fits and (microbatch, remat) != current:
                settings = []
                if microbatch != current[0]:
                    settings.append(f"--set phases.{index}.microbatch={microbatch}")
                if remat != current[1]:
                    settings.append(f"--set run.remat={remat}")
                return f"by estimate it fits with {' '.join(settings)}; --fit searches and compiles"
    return "by estimate no microbatch fits on this mesh: use more chips, or --fit for other meshes"


def _smaller_microbatches(phase: Phase, num_shards: int) -> list[int]:
    """Returns the microbatches up to the phase's that divide its batch and split over the mesh."""
    sizes = range(phase.microbatch_size, 0, -num_shards)
    return [m for m in sizes if phase.batch_size % m == 0 and m % num_shards == 0]


def _save(path: Path, compiled: Any, recipe: Recipe, report: dict[str, Any]) -> None:
    save_executable(path, compiled, {"recipe": recipe_to_dict(recipe), "report": report})
    logger.info("saved %s", path)
