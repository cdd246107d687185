"""The report and figure of runs compared with their family."""

from __future__ import annotations

import pytest

from btlm_jax.scaling.collapse_report import collapse_numbers, draw_collapse, judge_runs
from support.loss_curves import family_of_curves, loss_curve


def test_report_separates_members_from_faulty_runs(tmp_path):
    finished = dict(zip("abcd", family_of_curves(0, 2000), strict=True))
    finished["e"] = loss_curve(50, 2.5, 2000, drift=(0.6, 0.03))
    running = {
        "fine": loss_curve(60, 2.3, 2000, until=0.7),
        "leaving": loss_curve(61, 2.2, 2000, until=0.9, drift=(0.6, 0.03)),
        "young": loss_curve(62, 2.1, 2000, until=0.1),
    }
    judged = judge_runs(finished, running)
    assert judged.family.runs == 4
    assert [name for name, r in judged.runs.items() if r.member] == list("abcd")
    left = {name for name, r in judged.runs.items() if r.verdict and r.verdict.left_at}
    assert left == {"e", "leaving"}
    fine = judged.runs["fine"].final
    assert abs(fine.loss - 2.3) < 3 * fine.std and fine.std / fine.loss >= judged.backtest
    assert judged.runs["young"].final is None
    numbers = collapse_numbers(judged)["runs"]
    assert numbers["leaving"]["verdict"]["left_at"] == pytest.approx(0.6, abs=0.1)
    assert numbers["fine"]["residuals"][-1] is None  # the run has not reached the end
    draw_collapse(tmp_path / "c.png", judged, finished | running)
    assert (tmp_path / "c.png").stat().st_size > 10_000


def test_a_report_needs_a_finished_run():
    with pytest.raises(ValueError, match="found no finished one"):
        judge_runs({}, {"a": loss_curve(0, 2, 500)})
