"""muTransfer in small: does the best learning rate of a narrow model serve a wide one?

For every width, models are trained at learning rates a factor of two apart, from the best one of
the width before, outwards until the best lies between two worse ones. Under muP the optimum should
stay where it is; in the standard parametrization (SP) it moves. A directory keeps every run that
has ended, so that a sweep that was stopped goes on.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import jax
import numpy as np
from etils import epath

from btlm_jax.model.btlm import BTLM
from btlm_jax.mup_study.corpus import Corpus
from btlm_jax.mup_study.parametrization import Family, loss, start, step
from btlm_jax.utils import atomic, plots
from btlm_jax.utils.format import finite_json
from btlm_jax.utils.progress import Progress

logger = logging.getLogger(__name__)

COMPARED = ("muP", "SP")
# What is asked of muP, at most, and of SP, at least: otherwise the sweep could not tell them apart.
MUP_OCTAVES, MUP_REGRET = 0.35, 0.03
SP_OCTAVES, SP_REGRET = 0.7, 0.2
_FAR = 4  # times the base width, where SP is judged
_SETTINGS, _RUNS = "settings.json", "runs.jsonl"
_HELD_OUT_BATCHES = 32
# The range in which learning rates are looked for.
_LOWEST, _HIGHEST = -16, 0


class Run(NamedTuple):
    """One training run; the learning rate is 2**exponent."""

    parametrization: str
    width: int
    exponent: int
    seed: int
    loss: float  # held-out, nats per token; inf where it diverged


@dataclasses.dataclass(frozen=True)
class Transfer:
    """A sweep that is complete.

    Attributes:
      widths: ascending, the first muP's base.
      runs: all of them.
    """

    widths: tuple[int, ...]
    runs: tuple[Run, ...]

    def curve(self, parametrization: str, width: int) -> dict[int, float]:
        """Exponent of the learning rate -> loss, mean over seeds. At the base all are one."""
        name = _name(parametrization, width, self.widths)
        losses = defaultdict(list)
        for run in self.runs:
            if (run.parametrization, run.width) == (name, width):
                losses[run.exponent].append(run.loss)
        return {e: float(np.mean(losses[e])) for e in sorted(losses)}

    def optimum(self, parametrization: str, width: int) -> tuple[float, float]:
        """log2 of the best learning rate, and the loss there: of the parabola through the best."""
        curve = self.curve(parametrization, width)
        best = min(curve, key=curve.__getitem__)
        left, middle, right = (curve.get(best + i, math.inf) for i in (-1, 0, 1))
        bend = left - 2 * middle + right
        if not 0 < bend < math.inf:
            return float(best), middle
        return best + 0.5 * (left - right) / bend, middle - (left - right) ** 2 / (8 * bend)

    def octaves(self, parametrization: str) -> float:
        """By how much log2 of the optimum moves when the width doubles (fitted)."""
        optima = [self.optimum(parametrization, w)[0] for w in self.widths]
        return float(np.polyfit(np.log2(self.widths), optima, 1)[0])

    def regret(self, parametrization: str, width: int) -> float:
        """What the best learning rate of the base costs: its loss, at the base's best exponent that
        was tried, above that of the optimum; nats per token."""
        base = self.curve(parametrization, self.widths[0])
        at = self.curve(parametrization, width)[min(base, key=base.__getitem__)]
        return at - self.optimum(parametrization, width)[1]


def transfer(
    directory: Path,
    family: Family,
    corpus: Corpus,
    *,
    steps: int = 150,
    seeds: int = 2,
    batch_size: int = 8,
    length: int = 64,
    first: int = -6,
) -> Transfer:
    """Sweeps, or goes on with a sweep, and writes `transfer.json` and `transfer.png` too.

    Args:
      directory: of the sweep; made, or gone on with.
      family, corpus: what is trained in which widths, and on what.
      steps: of a run; the learning rate rises for a tenth of them, then falls linearly to zero.
      seeds: of weights and batches; losses are means over them.
      batch_size, length: sequences and tokens of every batch.
      first: where the search begins, log2 of a learning rate.

    Raises:
      ValueError: the directory is of a sweep with other settings; no optimum between 2**-16 and 1.
      FileExistsError: it is something else, or another process is at it.
    """
    plots.require_matplotlib()
    settings = {
        "shape": dataclasses.asdict(family.shape), "widths": list(family.widths), "steps": steps,
        "seeds": seeds, "batch_size": batch_size, "length": length, "first": first,
        "corpus": corpus.fingerprint, "backend": jax.default_backend(),
    }  # fmt: skip
    _claim(directory, settings)
    held = corpus.windows(_HELD_OUT_BATCHES, batch_size, length)

    def train(run: Run) -> Run:
        model, rules = BTLM(family.at(run.width)), family.rules(run.parametrization, run.width)
        trial = start(model, np.int32(run.seed), rules)
        batches = corpus.batches(steps, batch_size, length, seed=run.seed)
        for tokens, factor in zip(batches, schedule(steps), strict=True):
            rate = np.float32(2.0**run.exponent * factor)
            trial, _ = step(model, trial, tokens, rate, rules)
        found = float(loss(model, trial.params, held, rules))
        return run._replace(loss=found if math.isfinite(found) else math.inf)

    # Three learning rates for each; more are found on the way.
    points = {(_name(p, w, family.widths), w) for p in COMPARED for w in family.widths}
    expected = sum(3 * seeds * steps * family.cost(w) for _, w in points)
    with (directory / _RUNS).open("a+", encoding="utf-8") as log:
        atomic.lock_file(log, directory)
        done = {run[:4]: run for run in _ended(log)}
        if done:
            logger.info("%s: going on after %d runs", directory, len(done))
        ended = sum(steps * family.cost(run.width) for run in done.values())
        with Progress(expected, "base step", "transfer", done=ended) as progress:

            def measured(name: str, width: int, exponent: int, more: bool = False) -> float:
                cost, losses = steps * family.cost(width), []
                progress.extend(seeds * cost if more else 0)
                for seed in range(seeds):
                    key = (name, width, exponent, seed)
                    if key not in done:
                        run = done[key] = train(Run(*key, math.nan))
                        log.write(json.dumps(finite_json(run._asdict())) + "\n")
                        log.flush()
                        note = f"{name}, width {width}, rate 2^{exponent}: loss {run.loss:.3f}"
                        progress.update(cost, note)
                    losses.append(done[key].loss)
                return float(np.mean(losses))

            _search(family.widths, first, measured)
    found = Transfer(family.widths, tuple(done.values()))
    report = finite_json({"settings": settings, **to_json(found)})
    atomic.write_text(epath.Path(directory / "transfer.json"), json.dumps(report, indent=2) + "\n")
    draw(directory / "transfer.png", found)
    return found


def _search(widths: tuple[int, ...], first: int, measured: Callable[..., float]) -> None:
    """Measures what `Transfer` needs to know of every parametrization and width.

    Args:
      measured: the loss of a parametrization, width and exponent; `more` if it is one beyond three.
    """
    base = first
    for name in COMPARED:
        center = base
        for width in widths:
            if name != _name(name, width, widths):  # muP's, and known
                continue
            curve = {e: measured(name, width, e) for e in (center - 1, center, center + 1)}
            while (best := min(curve, key=curve.__getitem__)) in (min(curve), max(curve)):
                further = best - 1 if best == min(curve) else best + 1
                if not _LOWEST <= further <= _HIGHEST:
                    raise ValueError(
                        f"{name}, width {width}: the loss still falls at a learning rate of "
                        f"2^{best}: no optimum. Is the data text, and are there enough steps?"
                    )
                curve[further] = measured(name, width, further, more=True)
            center = best
            if width == widths[0]:
                base = best
            elif base not in curve:
                measured(name, width, base, more=True)


def _name(parametrization: str, width: int, widths: tuple[int, ...]) -> str:
    """Under which name a run is kept: at the base width, where all are the same model, muP's."""
    return "muP" if width == widths[0] else parametrization


def _claim(directory: Path, settings: dict[str, Any]) -> None:
    file = directory / _SETTINGS
    if file.exists():
        before, now = json.loads(file.read_text()), json.loads(json.dumps(settings))
        if changed := [k for k in {**before, **now} if before.get(k) != now.get(k)]:
            raise ValueError(
                f"{directory} is of a sweep that differs in {', '.join(changed)} "
                f"(found {before.get(changed[0])!r}, asked for {now.get(changed[0])!r}): name "
                "another directory, or the same settings to go on with it"
            )
    elif directory.exists() and any(directory.iterdir()):
        raise FileExistsError(f"{directory} exists and is not a sweep: name another directory")
    else:
        directory.mkdir(parents=True, exist_ok=True)
        atomic.write_text(epath.Path(directory / _SETTINGS), json.dumps(settings, indent=2) + "\n")


def _ended(log: IO[str]) -> list[Run]:
    """The runs that have ended; a line that was cut short by a kill is cut off."""
    log.seek(0)
    lines = log.read().splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        log.truncate(sum(len(line.encode()) for line in lines[:-1]))
        del lines[-1]
    runs = []
    for number, line in enumerate(lines, start=1):
        try:
            run = Run(**json.loads(line))
        except (json.JSONDecodeError, TypeError):
            raise ValueError(
                f"{log.name}, line {number}: found {line.strip()[:60]!r}, expected a run; delete "
                "the line, and the run is done again"
            ) from None
        runs.append(run._replace(loss=math.inf) if run.loss is None else run)
    return runs


def schedule(steps: int, warmup: float = 0.1) -> Sequence[float]:
    """Factors on the learning rate: linear up within a tenth of the steps, then linear to zero."""
    up = max(1, round(warmup * steps))
    return [min((i + 1) / up, (steps - i) / (steps - up + 1)) for i in range(steps)]


def table(found: Transfer) -> Iterator[str]:
    """Optima, best losses and regrets, and the verdicts, as lines of text."""
    yield f"{'':<16}" + "".join(f"{w:>10}" for w in found.widths)
    for name in COMPARED:
        optima, best = zip(*(found.optimum(name, w) for w in found.widths), strict=True)
        regrets = [found.regret(name, w) for w in found.widths]
        yield f"{name + ': log2 rate':<16}" + "".join(f"{x:>10.2f}" for x in optima)
        yield f"{'  best loss':<16}" + "".join(f"{x:>10.3f}" for x in best)
        yield f"{'  regret':<16}" + "".join(f"{x:>10.3f}" for x in regrets)
    yield ""
    yield from (line for _, line in verdicts(found))


def verdicts(found: Transfer) -> Iterator[tuple[bool, str]]:
    """Whether muP transfers, and whether SP, as it must, does not; and that in words."""
    wide = found.widths[1:]
    octaves, regret = found.octaves("muP"), max(found.regret("muP", w) for w in wide)
    good = abs(octaves) <= MUP_OCTAVES and regret <= MUP_REGRET
    says = "transfers" if good else "DOES NOT TRANSFER"
    line = (
        f"muP {says}: the optimum moves by {octaves:+.2f} octaves per doubling (at most "
        f"{MUP_OCTAVES}), the base's costs {regret:.3f} nats (at most {MUP_REGRET})"
    )
    yield good, line
    octaves, base = found.octaves("SP"), found.widths[0]
    far = next((w for w in wide if w >= _FAR * base), None)
    if far is None:
        yield True, f"SP: not judged, which takes {_FAR} times the base width ({_FAR * base})"
        return
    regret = found.regret("SP", far)
    good = octaves <= -SP_OCTAVES and regret >= SP_REGRET
    says = "does not transfer, as expected" if good else "IS TOO CLOSE TO MUP to tell"
    line = (
        f"SP {says}: {octaves:+.2f} octaves per doubling (at least {SP_OCTAVES} downwards), "
        f"{regret:.3f} nats at {far / base:.3g} times the width (at least {SP_REGRET})"
    )
    yield good, line


def to_json(found: Transfer) -> dict[str, Any]:
    """Everything, as plain values."""
    return {
        name: {
            "octaves_per_doubling": found.octaves(name),
            "widths": {
                str(w): {
                    "log2_optimum": found.optimum(name, w)[0],
                    "best_loss": found.optimum(name, w)[1],
                    "regret": found.regret(name, w),
                    "loss": {str(e): x for e, x in found.curve(name, w).items()},
                }
                for w in found.widths
            },
        }
        for name in COMPARED
    }


def draw(path: Path, found: Transfer) -> None:
    """Loss against learning rate, a line per width, for both; and the optimum against width."""
    from matplotlib import colormaps

    made, panels = plots.new_figure(3, 1, size=(4.6, 3.8))
    count = len(found.widths)
    for axes, name in zip(panels[0], COMPARED, strict=False):
        for i, width in enumerate(found.widths):
            curve, color = found.curve(name, width), colormaps["viridis"](i / count)
            rates = [2.0**e for e in curve]
            axes.plot(rates, [*curve.values()], "o-", color=color, markersize=3, label=f"{width}")
            axes.axvline(2.0 ** found.optimum(name, width)[0], color=color, alpha=0.5, linewidth=1)
        axes.set_xscale("log", base=2)
        axes.set(xlabel="learning rate", ylabel="held-out loss (nats per token)", title=name)
        axes.grid(alpha=0.3)
        axes.legend(title="width", fontsize=8)
    for limits in ("xlim", "ylim"):
        both = [getattr(axes, f"get_{limits}")() for axes in panels[0][:2]]
        for axes in panels[0][:2]:
            getattr(axes, f"set_{limits}")(min(x[0] for x in both), max(x[1] for x in both))
    axes = panels[0][2]
    for name in COMPARED:
        optima = [2.0 ** found.optimum(name, w)[0] for w in found.widths]
        label = f"{name}: {found.octaves(name):+.2f} octaves per doubling"
        axes.plot(found.widths, optima, "o-", label=label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks(found.widths, [str(w) for w in found.widths])
    axes.set(xlabel="width", ylabel="best learning rate", title="where the optimum goes")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    plots.save_png(path, made)
