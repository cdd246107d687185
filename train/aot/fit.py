"""Search what fits: microbatch x remat x mesh, by formula first and then by compiling.

Candidates are ordered by the roofline's formula and those that by estimate do not fit are left out;
the best are compiled, in parallel, until enough of them fit. What a compile says of memory corrects
the estimates of the candidates that are left.
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

# The estimate of memory is rough: candidates up to this factor above what there is are compiled.
_SLACK = 1.25


class Candidate(NamedTuple):
    """A way to run a phase."""

    mesh: tuple[int, ...]  # sizes of AXES
    microbatch: int
    remat: Remat
    bound: roofline.TimeBound  # by formula
    memory: float  # by estimate, bytes

    def settings(self, index: int) -> list[str]:
        """The `--set` values of it, for phase `index`."""
        sizes = zip(AXES, self.mesh, strict=True)
        return [
            *(f"mesh.{name}={n}" for name, n in sizes),
            f"phases.{index}.microbatch={self.microbatch}",
            f"run.remat={self.remat}",
        ]


def fit(
    recipe: Recipe, index: int, topology: Topology, *, keep: int, attempts: int, jobs: int
) -> list[dict[str, Any]]:
    """The best ways to run a phase on a topology that are found, each compiled.

    Args:
      recipe: its mesh, microbatch and remat are not used.
      index: of the phase.
      topology: whose devices are arranged.
      keep: how many that fit are enough.
      attempts: how many are compiled at most.
      jobs: worker processes.

    Returns:
      Reports of `compile_phase`, the best bound first, each with "settings", the values to `--set`.

    Raises:
      ValueError: nothing fits, with the nearest miss; or an argument is not positive.
    """
    for name, value in (("--keep", keep), ("--attempts", attempts), ("--jobs", jobs)):
        if value < 1:
            raise ValueError(f"{name}: found {value}, expected a positive int")
    phase = recipe.phases[index]
    config = build_config(recipe)
    n = len(topology_devices(topology))
    rates = topology.chip.per_device(topology.shape)
    ordered = candidates(config, phase, n, topology.slices, rates)
    if not ordered:
        raise ValueError(
            f"phases.{index}: no mesh of {n} devices divides batch_size = {phase.batch_size}, "
            f"length = {phase.length} and {config.n_head} heads"
        )
    logger.info("%d candidates; up to %d are compiled", len(ordered), attempts)
    run = functools.partial(_compiled, recipe, index, topology)
    context = multiprocessing.get_context("spawn")  # JAX does not survive a fork
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=_quiet) as pool:
        try:
            found, misses = search(
                ordered, run, pool, available=rates.memory, keep=keep, attempts=attempts, jobs=jobs
            )
        except BrokenProcessPool:
            raise ValueError(
                "a process that compiled was killed: is memory short? Try a lower --jobs"
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    if not found:
        least = min(misses, key=lambda m: m[1], default=None)
        near = f"; the nearest, {' '.join(least[0].settings(index))}, needs " \
               f"{format_bytes(least[1])}" if least else ""  # fmt: skip
        raise ValueError(
            f"{topology.name}: nothing that was tried fits {format_bytes(rates.memory)} per "
            f"device{near}: use more chips, or raise --attempts"
        )
    for candidate, report in found:
        report["settings"] = candidate.settings(index)
    return sorted((r for _, r in found), key=lambda r: (r["bound"]["seconds"],
                                                        r["bound"]["in_turn"]))  # fmt: skip


def candidates(
    config: BTLMConfig, phase: Phase, n_devices: int, slices: int, rates: Rates
) -> list[Candidate]:
    """Every mesh, microbatch and policy that divides, the best bound by formula first.

    Candidates as fast when all overlaps are ordered by the time when nothing does, and then by
    memory.
    """
    found = []
    for mesh in _meshes(config, phase, n_devices, slices):
        sizes = dict(zip(AXES, mesh, strict=True))
        ways = mesh[0] * mesh[1]
        for micro in _divisors(phase.batch_size):
            if micro % ways:
                continue
            n = phase.batch_size // micro
            for remat in SAVED_NAMES:
                work = roofline.training_work(
                    config,
                    sizes,
                    length=phase.length,
                    tokens=phase.tokens_per_step,
                    microbatches=n,
                    remat=remat,
                )
                needed = roofline.training_memory(
                    config,
                    sizes,
                    length=phase.length,
                    microbatch=micro,
                    microbatches=n,
                    remat=remat,
                )
                if slices > 1:  # the formula does not tell the networks apart
                    work = work._replace(dcn=_across(config, sizes, n))
                found.append(
                    Candidate(mesh, micro, remat, roofline.time_bound(work, rates), needed)
                )
    found = [c for c in found if c.memory <= _SLACK * rates.memory]
    return sorted(found, key=lambda c: (c.bound.seconds, c.bound.in_turn, c.memory))


def _across(config: BTLMConfig, mesh: dict[str, int], microbatches: int) -> float:
    """Bytes per device and step between slices: data's sums, or fsdp's gathering where it spans.

    Data that spans slices sums what its shards hold; fsdp that spans gathers all in the worst case.
    """
    alone = dict.fromkeys(AXES, 1)
    span = {"data": mesh["data"]} if mesh["data"] > 1 else {"fsdp": mesh["fsdp"]}
    nbytes = roofline.network_bytes(
        config, alone | span, tokens=0, microbatches=microbatches, remat="dots"
    )
    return nbytes / (mesh["fsdp"] * mesh["context"] * mesh["tensor"] if "data" in span else 1)


def _meshes(
    config: BTLMConfig, phase: Phase, n_devices: int, slices: int
) -> Iterator[tuple[int, ...]]:
    for tensor, context in itertools.product(_divisors(n_devices), repeat=2):
        if n_devices % (tensor * context) or config.n_head % tensor:
            continue
        ways = n_devices // (tensor * context)
        if phase.batch_size % ways or phase.length % num_chunks(context) or config.n_embd % context:
            continue
        for data in _divisors(ways):
            over_fsdp = slices // math.gcd(data, slices)
            fsdp = ways // data
            if fsdp % over_fsdp == 0 and config.n_embd % (fsdp * context) == 0:
                yield (data, fsdp, context, tensor)


def _divisors(n: int) -> list[int]:
    return [k for k in range(1, n + 1) if n % k == 0]


def search(
    ordered: Sequence[Candidate],
    run: Callable[[Candidate], dict[str, Any]],
    pool: Executor,
    *,
    available: float,
    keep: int,
    attempts: int,
    jobs: int,
) -> tuple[list[tuple[Candidate, dict[str, Any]]], list[tuple[Candidate, float]]]:
    """Runs candidates in order, `jobs` at a time, until `keep` fit or `attempts` were made.

    Args:
      ordered: the best first.
      run: returns a report, or {"needed": bytes} of one that does not fit, or {"failed": text} of
        one that cannot be compiled for another reason, which is shown.
      pool: where it runs.
      available: bytes; a candidate whose estimate, corrected by what candidates of its policy have
        needed, is above is passed over.

    Returns:
      Those that fit with their reports, and those that do not with the bytes they need.
    """
    found: list[tuple[Candidate, dict[str, Any]]] = []
    misses: list[tuple[Candidate, float]] = []
    factors: dict[str, float] = {}
    waiting = list(ordered)
    running: dict[Future, Candidate] = {}
    made = 0
    total = min(attempts, len(ordered))
    with Progress(total, "compile", "fit", every=0.0) as progress:
        while True:
            while len(running) < jobs and made < attempts and len(found) < keep:
                i = next((i for i, c in enumerate(waiting)
                          if c.memory * factors.get(c.remat, 1 / _SLACK) <= available),
                         None)  # fmt: skip
                if i is None:
                    break
                candidate = waiting.pop(i)
                running[pool.submit(run, candidate)] = candidate
                made += 1
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                candidate = running.pop(future)
                report = future.result()
                progress.update(1, f"{len(found)} fit")
                if "failed" in report:
                    sizes = " x ".join(map(str, candidate.mesh))
                    logger.warning(
                        "mesh %s, microbatch %d, remat %s: %s",
                        sizes,
                        candidate.microbatch,
                        candidate.remat,
                        report["failed"],
                    )
                    continue
                needed = report["needed"] if "needed" in report else report["memory"]["peak"]
                factors[candidate.remat] = needed / candidate.memory
                if "needed" in report:
                    misses.append((candidate, needed))
                else:
                    found.append((candidate, report))
    return found, misses


def _quiet() -> None:
    """In a worker process: notices would be those of every candidate, and none's in particular."""
    logging.getLogger("btlm_jax").setLevel(logging.ERROR)


def _compiled(
    recipe: Recipe, index: int, topology: Topology, candidate: Candidate
) -> dict[str, Any]:
    """In a worker process: the report, or what is needed."""
    prepare_compiler()
    try:
        return compile_phase(_changed(recipe, index, candidate), index, topology)
    except DoesNotFit as e:
        return {"needed": e.needed}
    except ValueError as e:  # such as a kernel that this shape is too large for
        return {"failed": str(e)}


def _changed(recipe: Recipe, index: int, candidate: Candidate) -> Recipe:
    phases = list(recipe.phases)
    phases[index] = dataclasses.replace(phases[index], microbatch=candidate.microbatch)
    return dataclasses.replace(
        recipe,
        mesh=MeshSettings(*candidate.mesh),
        phases=tuple(phases),
        run=dataclasses.replace(recipe.run, remat=candidate.remat),
    )
