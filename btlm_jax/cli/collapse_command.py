"""The command that lays training curves over each other."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, arg

from btlm_jax.cli.arguments import write_json
from btlm_jax.cli.path_arguments import OutputFile, Picture
from btlm_jax.utils.format import align_columns

if TYPE_CHECKING:
    from btlm_jax.scaling.collapse_report import CollapseReport, JudgedRun
    from btlm_jax.train.curves import TrainingRun


@dataclasses.dataclass(frozen=True)
class Collapse:
    """Predict final losses from other runs' curves.

    Runs of different sizes with equal schedule, tokens per parameter and AdamW timescale have one
    curve (arXiv 2509.25087). Finished runs are the family; a running one is scaled to it by its
    losses between 25 and 50 % of training, and reported if it leaves the curve of the family.
    """

    runs: Annotated[Positional[tuple[Path, ...]], arg(metavar="RUN_DIR...")]
    """Run directories of `btlm train`, finished or running."""
    png: Picture = Path("collapse.png")
    """The picture to write."""
    json: OutputFile = None
    """A file for the numbers."""

    def run(self) -> None:
        from btlm_jax.scaling import collapse_report
        from btlm_jax.train import curves
        from btlm_jax.utils import plots

        plots.require_matplotlib()
        assert self.png is not None  # its default
        if not self.runs:
            raise ValueError("runs: found none, expected directories of `btlm train`")
        for i, directory in enumerate(self.runs):
            if directory.resolve() in {other.resolve() for other in self.runs[:i]}:
                raise ValueError(f"{directory} is given twice, and would count twice: name it once")
        runs = {run.name: run for run in map(curves.read_training_run, self.runs)}
        finished = {name: run.curve for name, run in runs.items() if run.finished}
        running = {name: run.curve for name, run in runs.items() if not run.finished}
        found = collapse_report.judge_runs(finished, running)
        ordered = [runs[name] for name in found.runs]
        print("\n".join(_table(ordered, found)))
        for line in _summary(found):
            print(line)
        for line in curves.run_differences(ordered):
            print(f"warning: {line}: curves collapse only if these are equal")
        write_json(self.json, _numbers(ordered, found))
        collapse_report.draw_collapse(
            self.png, found, {name: run.curve for name, run in runs.items()}
        )
        print(f"picture: {self.png}")


def _table(runs: list[TrainingRun], found: CollapseReport) -> list[str]:
    rows = [(
        "run", "parameters", "TPP", "tau", "learning rate", "done", "final loss",
        "from its first half", "verdict",
    )]  # fmt: skip
    for run in runs:
        judged = found.runs[run.name]
        rows.append((
            run.name, f"{run.parameters:,}", f"{run.tokens_per_parameter:.3g}",
            "none" if run.timescale is None else f"{run.timescale:.3g}", run.schedule,
            f"{run.curve.done[-1]:.0%}", _final(judged), _first_half(judged),
            _verdict(judged, found.family.runs),
        ))  # fmt: skip
    return align_columns(rows, "<")


def _final(judged: JudgedRun) -> str:
    if judged.final is None:
        return "-"
    said = f"{judged.final.loss:.4f} ± {judged.final.std:.4f}"
    return said if judged.finished else f"{said} predicted"


def _first_half(judged: JudgedRun) -> str:
    if judged.predicted is None or judged.final is None or not judged.finished:
        return "-"
    off = judged.predicted.loss / judged.final.loss - 1
    return f"{judged.predicted.loss:.4f} ({off:+.2%})"


def _verdict(judged: JudgedRun, family_runs: int) -> str:
    """Returns the verdict in words; a run against one other run is not at fault, but differs."""
    v = judged.verdict
    others = family_runs - (judged.finished and judged.member)
    if v is None:
        return "the only finished run" if judged.finished else "too early to say"
    if v.left_at is None:
        return "in family"
    where = f"at {v.left_at:.0%}, noticed at {v.noticed_at:.0%}, now {v.excess:+.1%}"
    if others == 1:
        other = "other finished" if judged.finished else "finished"
        return f"undecided: differs from the only {other} run {where}"
    out = "left" if judged.member or not judged.finished else "not of the family: left"
    return f"{out} {where}"


def _summary(found: CollapseReport) -> list[str]:
    lines = [
        f"family: {found.family.runs} finished runs, noise {found.family.noise:.2%} in each of "
        f"{len(found.family.shape)} parts of training"
    ]
    if found.backtest is not None:
        lines.append(
            f"predictions of finished runs from their first halves were off by {found.backtest:.2%}"
            " (root mean square); ± of a predicted loss is that, or its noise if more"
        )
    left = [j for j in found.runs.values() if j.finished and j.verdict and j.verdict.left_at]
    if left and found.family.runs == 2 and all(j.member for j in left):
        lines.append("note: two finished runs that differ do not show which one is at fault")
    running = [j for j in found.runs.values() if not j.finished and j.verdict]
    if found.family.runs == 1 and any(j.verdict and j.verdict.left_at for j in running):
        lines.append("note: one finished run does not show how much runs of this family differ")
    return lines


def _numbers(runs: list[TrainingRun], found: CollapseReport) -> dict[str, Any]:
    from btlm_jax.scaling.collapse_report import collapse_numbers

    numbers = collapse_numbers(found)
    for run in runs:
        numbers["runs"][run.name] |= {
            "parameters": run.parameters,
            "tokens_per_parameter": run.tokens_per_parameter,
            "timescale": run.timescale,
            "schedule": run.schedule,
            "step": run.step,
            "steps": run.steps,
        }
    return numbers
