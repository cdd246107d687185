"""Searches microbatch, remat policy and mesh for the fastest settings that fit in memory.

Candidates are ordered by the roofline bound of their step. Those whose estimated memory is far too
large are dropped; the others are compiled in parallel, best first, until enough of them fit. The
memory of every compiled program corrects the estimates of the remaining candidates.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import logging
import math
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, NamedTuple

from btlm_jax.config import BTLMConfig
from btlm_jax.model.remat import SAVED_NAMES, Remat
from btlm_jax.model.sharding import AXES, num_chunks
from btlm_jax.perf import roofline
from btlm_jax.perf.chips import Rates
from btlm_jax.train.aot.compile import DoesNotFit, compile_phase
from btlm_jax.train.aot.topologies import Topology, prepare_compiler, topology_devices
from btlm_jax.train.recipe import MeshSettings, Phase, Recipe
from btlm_jax.train.recipe_build import build_config
from btlm_jax.utils.format import format_bytes
from btlm_jax.utils.progress import Progress

logger = logging.getLogger(__name__)

# The memory estimate is rough: candidates up to this factor above the available memory are kept.
_SLACK = 1.25


class Candidate(NamedTuple):
    """Settings for a phase."""

    mesh: tuple[int, ...]  # sizes of AXES
    microbatch: int
    remat: Remat
    bound: roofline.TimeBound  # by formula
    memory: float  # estimated bytes per device

    def settings(self, index: int) -> list[str]:
        """Returns the `--set` values for phase `index`."""
        sizes = zip(AXES, self.mesh, strict=True)
        return [
            *(f"mesh.{name}={n}" for name, n in sizes),
            f"phases.{index}.microbatch={self.microbatch}",
            f"run.remat={self.remat}",
        ]


class SearchResult(NamedTuple):
    """Compiled candidates."""

    fits: list[tuple[Candidate, dict[str, Any]]]  # with their reports
    misses: list[tuple[Candidate, float]]  # with the bytes per device that they need


def fit_phase(
    recipe: Recipe, index: int, topology: Topology, *, keep: int, attempts: int, jobs: int
) -> list[dict[str, Any]]:
    """Searches the fastest settings of a phase that fit a topology.

    Args:
      recipe: the recipe; its mesh, microbatch and remat policy are ignored.
      index: the phase, from 0.
      topology: the devices to compile for.
      keep: stop after this many that fit.
      attempts: compile at most this many.
      jobs: worker processes.

    Returns:
      Reports of `compile_phase`, the lowest bound first, each with "settings", the values for
      `--set`.

    Raises:
      ValueError: nothing fits (the message names the nearest miss), or an argument is not positive.
    """
    for name, value in (("--keep", keep), ("--attempts", attempts), ("--jobs", jobs)):
        if value < 1:
            raise ValueError(f"{name}: found {value}, expected a positive int")
    phase = recipe.phases[index]
    config = build_config(recipe)
    num_devices = len(topology_devices(topology))
    rates = topology.chip.per_device(topology.shape)
    candidates = list_candidates(config, phase, num_devices, topology.slices, rates)
    if not candidates:
        raise ValueError(
            f"phases.{index}: no mesh of {num_devices} devices divides batch_size = "
            f"{phase.batch_size}, length = {phase.length} and {config.n_head} heads"
        )
    logger.info("%d candidates; up to %d are compiled", len(candidates), attempts)
    evaluate = functools.partial(_compile_candidate, recipe, index, topology)
    context = multiprocessing.get_context("spawn")  # JAX does not survive a fork
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=_silence_logs) as pool:
        try:
            result = search_candidates(
                candidates, evaluate, pool,
                available=rates.memory, keep=keep, attempts=attempts, jobs=jobs,
            )  # fmt: skip
        except BrokenProcessPool:
            raise ValueError(
                "a compiling process was killed, perhaps for lack of memory: try a lower --jobs"
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    if not result.fits:
        nearest = ""
        if result.misses:
            candidate, needed = min(result.misses, key=lambda miss: miss[1])
            settings = " ".join(candidate.settings(index))
            nearest = f"; the nearest, {settings}, needs {format_bytes(needed)}"
        raise ValueError(
            f"{topology.name}: no compiled candidate fits {format_bytes(rates.memory)} per "
            f"device{nearest}: use more chips, or raise --attempts"
        )
    reports = [report | {"settings": c.settings(index)} for c, report in result.fits]
    return sorted(reports, key=lambda r: (r["bound"]["seconds"], r["bound"]["in_turn"]))


def list_candidates(
    config: BTLMConfig, phase: Phase, num_devices: int, slices: int, rates: Rates
) -> list[Candidate]:
    """Returns every mesh, microbatch and policy that divides the phase, the lowest bound first.

    Candidates with equal bounds are ordered by the time without any overlap, and then by memory.
    """
    candidates = []
    for mesh in _meshes(config, phase, num_devices, slices):
        axes = dict(zip(AXES, mesh, strict=True))
        num_shards = axes["data"] * axes["fsdp"]
        for microbatch in _divisors(phase.batch_size):
            if microbatch % num_shards:
                continue
            microbatches = phase.batch_size // microbatch
            for remat in SAVED_NAMES:
                work = roofline.training_work(
                    config,
                    axes,
                    length=phase.length,
                    tokens=phase.tokens_per_step,
                    microbatches=microbatches,
                    remat=remat,
                )
                if slices > 1:  # the formula does not distinguish the networks
                    work = work._replace(dcn=_bytes_between_slices(config, axes, microbatches))
                memory = roofline.training_memory(
                    config,
                    axes,
                    length=phase.length,
                    microbatch=microbatch,
                    microbatches=microbatches,
                    remat=remat,
                )
                if memory <= _SLACK * rates.memory:
                    bound = roofline.time_bound(work, rates)
                    candidates.append(Candidate(mesh, microbatch, remat, bound, memory))
    return sorted(candidates, key=lambda c: (c.bound.seconds, c.bound.in_turn, c.memory))


def _bytes_between_slices(config: BTLMConfig, axes: dict[str, int], microbatches: int) -> float:
    """Returns the bytes per device and step that cross the network between slices.

    If the data axis spans the slices, they sum the gradients of their shards. If fsdp spans them,
    all its gathers cross in the worst case.
    """
    others = dict.fromkeys(AXES, 1)
    spanning = {"data": axes["data"]} if axes["data"] > 1 else {"fsdp": axes["fsdp"]}
    nbytes = roofline.network_bytes(
        config, others | spanning, tokens=0, microbatches=microbatches, remat="dots"
    )
    shards = axes["fsdp"] * axes["context"] * axes["tensor"] if "data" in spanning else 1
    return nbytes / shards


def _meshes(
    config: BTLMConfig, phase: Phase, num_devices: int, slices: int
) -> Iterator[tuple[int, ...]]:
    """Yields the sizes of AXES of every mesh that divides the phase and the model."""
    for tensor, context in itertools.product(_divisors(num_devices), repeat=2):
        if num_devices % (tensor * context) or config.n_head % tensor:
            continue
        num_shards = num_devices // (tensor * context)
        if phase.batch_size % num_shards or phase.length % num_chunks(context):
            continue
        if config.n_embd % context:
            continue
        for data in _divisors(num_shards):
            slices_of_fsdp = slices // math.gcd(data, slices)
            fsdp = num_shards // data
            if fsdp % slices_of_fsdp == 0 and config.n_embd % (fsdp * context) == 0:
                yield (data, fsdp, context, tensor)


def _divisors(n: int) -> list[int]:
    return [k for k in range(1, n + 1) if n % k == 0]


def search_candidates(
    candidates: Sequence[Candidate],
    evaluate: Callable[[Candidate], dict[str, Any]],
    pool: Executor,
    *,
    available: float,
    keep: int,
    attempts: int,
    jobs: int,
) -> SearchResult:
    """Evaluates candidates in order, `jobs` at a time, until `keep` fit or `attempts` are used up.

    Args:
      candidates: the candidates, the best first.
      evaluate: returns a report, {"needed": bytes} for a program that does not fit, or {"failed":
        text} for a candidate that cannot be compiled for another reason, which is logged.
      pool: runs `evaluate`.
      available: bytes per device. A candidate is skipped if its estimate, corrected by the last
        compiled candidate of the same policy, is larger.
      keep: stop after this many that fit.
      attempts: evaluate at most this many.
      jobs: evaluations at a time.
    """
    result = SearchResult([], [])
    corrections: dict[str, float] = {}  # remat policy -> needed bytes over estimated ones
    waiting, running = list(candidates), dict[Future, Candidate]()
    submitted = 0

    def next_candidate() -> Candidate | None:
        for i, candidate in enumerate(waiting):
            if candidate.memory * corrections.get(candidate.remat, 1 / _SLACK) <= available:
                return waiting.pop(i)
        return None

    total = min(attempts, len(candidates))
    with Progress(total, "compile", "fit", every=0.0) as progress:
        while True:
            while len(running) < jobs and submitted < attempts and len(result.fits) < keep:
                candidate = next_candidate()
                if candidate is None:
                    break
                running[pool.submit(evaluate, candidate)] = candidate
                submitted += 1
            if not running:
                return result
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                candidate, report = running.pop(future), future.result()
                progress.update(1, f"{len(result.fits)} fit")
                if "failed" in report:
                    logger.warning(
                        "mesh %s, microbatch %d, remat %s: %s",
                        " x ".join(map(str, candidate.mesh)),
                        candidate.microbatch,
                        candidate.remat,
                        report["failed"],
                    )
                    continue
                needed = report["needed"] if "needed" in report else report["memory"]["peak"]
                corrections[candidate.remat] = needed / candidate.memory
                if "needed" in report:
                    result.misses.append((candidate, needed))
                else:
                    result.fits.append((candidate, report))


def _silence_logs() -> None:
    """Runs in a worker process, whose log lines would not say which candidate they belong to."""
    logging.getLogger("btlm_jax").setLevel(logging.ERROR)


def _compile_candidate(
    recipe: Recipe, index: int, topology: Topology, candidate: Candidate
) -> dict[str, Any]:
    """Runs in a worker process; see `evaluate` of `search_candidates`."""
    prepare_compiler()
    try:
        return compile_phase(_with_candidate(recipe, index, candidate), index, topology)
    except DoesNotFit as e:
        return {"needed": e.needed}
    except ValueError as e:  # for example a shape that is too large for a kernel
        return {"failed": str(e)}


def _with_candidate(recipe: Recipe, index: int, candidate: Candidate) -> Recipe:
    phases = list(recipe.phases)
    phases[index] = dataclasses.replace(phases[index], microbatch=candidate.microbatch)
    return dataclasses.replace(
        recipe,
        mesh=MeshSettings(*candidate.mesh),
        phases=tuple(phases),
        run=dataclasses.replace(recipe.run, remat=candidate.remat),
    )
