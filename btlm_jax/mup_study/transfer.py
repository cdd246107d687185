"""Learning-rate transfer: does the best learning rate of a narrow model serve a wide one?

For every width, models are trained at learning rates a factor of two apart, starting at the optimum
of the previous width, until the best lies between two worse ones. Under muP the optimum should not
move; in the standard parametrization (SP) it does. A directory holds every run that has ended, so
that an interrupted sweep resumes.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

import jax
import numpy as np
from etils import epath

from btlm_jax.model.btlm import BTLM
from btlm_jax.mup_study.corpus import Corpus
from btlm_jax.mup_study.parametrization import (
    WidthFamily,
    initial_trial,
    trial_step,
    window_loss,
)
from btlm_jax.mup_study.transfer_report import write_transfer
from btlm_jax.mup_study.transfer_result import COMPARED, SweepRun, Transfer, stored_name
from btlm_jax.utils import atomic, json_files, plots
from btlm_jax.utils.format import finite_json
from btlm_jax.utils.local_paths import local_path
from btlm_jax.utils.progress import Progress

logger = logging.getLogger(__name__)

_SETTINGS, _RUNS = "settings.json", "runs.jsonl"
_HELD_OUT_BATCHES = 32
# The range of log2 learning rates that is searched.
_LOWEST, _HIGHEST = -16, 0


def transfer(
    directory: Path,
    family: WidthFamily,
    corpus: Corpus,
    *,
    steps: int = 150,
    seeds: int = 2,
    batch_size: int = 8,
    length: int = 64,
    first: int = -6,
) -> Transfer:
    """Runs or resumes a sweep, and writes `transfer.json` and `transfer.png` into its directory.

    Args:
      directory: directory of the sweep; created, or resumed if it exists.
      family: the model and its widths.
      corpus: the tokens to train on.
      steps: steps of a run; the learning rate rises for a tenth of them, then falls to zero.
      seeds: number of seeds of weights and batches; losses are means over them.
      batch_size: sequences per batch.
      length: tokens per sequence.
      first: log2 of the learning rate at which the search begins.

    Raises:
      ValueError: the directory holds a sweep with other settings, or there is no optimum between
        2**-16 and 1.
      FileExistsError: the directory holds something else, or another process uses it.
    """
    plots.require_matplotlib()
    directory = local_path(directory, "directory")
    settings = {
        "shape": dataclasses.asdict(family.shape), "widths": list(family.widths), "steps": steps,
        "seeds": seeds, "batch_size": batch_size, "length": length, "first": first,
        "corpus": corpus.fingerprint, "backend": jax.default_backend(),
    }  # fmt: skip
    _claim_directory(directory, settings)
    held_out = corpus.windows(_HELD_OUT_BATCHES, batch_size, length)

    def train(run: SweepRun) -> SweepRun:
        model, rules = BTLM(family.config(run.width)), family.rules(run.parametrization, run.width)
        trial = initial_trial(model, np.int32(run.seed), rules)
        batches = corpus.batches(steps, batch_size, length, seed=run.seed)
        for tokens, factor in zip(batches, warmup_and_decay(steps), strict=True):
            rate = np.float32(2.0**run.exponent * factor)
            trial, _ = trial_step(model, trial, tokens, rate, rules)
        loss = float(window_loss(model, trial.params, held_out, rules))
        return run._replace(loss=loss if math.isfinite(loss) else math.inf)

    # Three learning rates for each; the search extends this estimate.
    points = {(stored_name(p, w, family.widths), w) for p in COMPARED for w in family.widths}
    expected = sum(3 * seeds * steps * family.cost(w) for _, w in points)
    # Damaged bytes must reach the error about their line.
    with (directory / _RUNS).open("a+", encoding="utf-8", errors="surrogateescape") as log:
        atomic.lock_file(log, directory)
        done = {run[:4]: run for run in _read_runs(log)}
        if done:
            logger.info("%s: resuming after %d runs", directory, len(done))
        work_done = sum(steps * family.cost(run.width) for run in done.values())
        with Progress(expected, "base step", "transfer", done=work_done) as progress:

            def measure(name: str, width: int, exponent: int, more: bool = False) -> float:
                cost, losses = steps * family.cost(width), []
                progress.extend(seeds * cost if more else 0)
                for seed in range(seeds):
                    key = (name, width, exponent, seed)
                    if key not in done:
                        run = done[key] = train(SweepRun(*key, math.nan))
                        log.write(json.dumps(finite_json(run._asdict())) + "\n")
                        log.flush()
                        note = f"{name}, width {width}, rate 2^{exponent}: loss {run.loss:.3f}"
                        progress.update(cost, note)
                    losses.append(done[key].loss)
                return float(np.mean(losses))

            _search(family.widths, first, measure)
    sweep = Transfer(family.widths, tuple(done.values()))
    write_transfer(directory, settings, sweep)
    return sweep


def _search(widths: tuple[int, ...], first: int, measure: Callable[..., float]) -> None:
    """Measures the points that `Transfer` needs for every parametrization and width.

    Args:
      widths: the widths, ascending.
      first: log2 of the learning rate at which the search begins.
      measure: returns the loss of a parametrization, width and exponent; `more` marks points beyond
        the three that progress expects.
    """
    base = first
    for name in COMPARED:
        center = base
        for width in widths:
            if name != stored_name(name, width, widths):  # already measured as muP
                continue
            curve = {e: measure(name, width, e) for e in (center - 1, center, center + 1)}
            while (best := min(curve, key=curve.__getitem__)) in (min(curve), max(curve)):
                next_exponent = best - 1 if best == min(curve) else best + 1
                if not _LOWEST <= next_exponent <= _HIGHEST:
                    raise ValueError(
                        f"{name}, width {width}: the loss still falls at a learning rate of "
                        f"2^{best}, so there is no optimum: check that the data is "
                        "text, or add steps"
                    )
                curve[next_exponent] = measure(name, width, next_exponent, more=True)
            center = best
            if width == widths[0]:
                base = best
            elif base not in curve:
                measure(name, width, base, more=True)


def _claim_directory(directory: Path, settings: dict[str, Any]) -> None:
    """Records the settings in a new directory, or compares them with those of an old one."""
    file = directory / _SETTINGS
    if file.exists():
        before = json_files.read_object(file, "choose another directory")
        now = json.loads(json.dumps(settings))
        if missing := [name for name in now if name not in before]:
            raise ValueError(
                f"{file} does not hold {', '.join(missing)}, so it is not known which sweep this "
                "is: choose another directory"
            )
        if changed := [k for k in {**before, **now} if before.get(k) != now.get(k)]:
            raise ValueError(
                f"{directory} holds a sweep that differs in {', '.join(changed)} (found "
                f"{before.get(changed[0])!r}, expected {now.get(changed[0])!r}): choose another "
                "directory, or use the settings of that sweep to resume it"
            )
    elif directory.exists() and any(directory.iterdir()):
        raise FileExistsError(f"{directory} exists and is not a sweep: choose another directory")
    else:
        directory.mkdir(parents=True, exist_ok=True)
        atomic.write_text(epath.Path(directory / _SETTINGS), json.dumps(settings, indent=2) + "\n")


def _read_runs(log: IO[str]) -> list[SweepRun]:
    """Returns the runs that have ended, and removes a last line that a kill cut short."""
    log.seek(0)
    lines = log.read().splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        log.truncate(sum(len(line.encode(errors="surrogateescape")) for line in lines[:-1]))
        del lines[-1]
    runs = []
    for number, line in enumerate(lines, start=1):
        try:
            runs.append(_parse_run(line))
        except (ValueError, TypeError, RecursionError):
            raise ValueError(
                f"{log.name}, line {number}: found {line.strip()[:60]!r}, expected a run; delete "
                "the line to repeat that run"
            ) from None
    return runs


def _parse_run(line: str) -> SweepRun:
    """Returns the run in a line; a loss of null stands for one that diverged.

    Raises:
      ValueError, TypeError: the line holds something else.
    """
    run = SweepRun(**json.loads(line))
    integers = (run.width, run.exponent, run.seed)
    if run.parametrization not in COMPARED or any(type(x) is not int for x in integers):
        raise ValueError("a run names a parametrization, a width, an exponent and a seed")
    if run.loss is None:
        return run._replace(loss=math.inf)
    if type(run.loss) not in (int, float) or not math.isfinite(run.loss):
        raise ValueError("a loss is finite or null")
    return run


def warmup_and_decay(steps: int, warmup: float = 0.1) -> Sequence[float]:
    """Returns factors on the learning rate: linear warmup, then linear decay to zero."""
    warmup_steps = max(1, round(warmup * steps))
    return [
        min((i + 1) / warmup_steps, (steps - i) / (steps - warmup_steps + 1)) for i in range(steps)
    ]
