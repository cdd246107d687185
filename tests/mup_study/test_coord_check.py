"""The coordinate check: muP passes, and every broken rule is found out."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest

from btlm_jax.cli import main
from btlm_jax.mup_study import coord_check, coord_check_report, parametrization
from btlm_jax.mup_study import corpus as corpus_lib
from btlm_jax.mup_study.coord_check import ALL, AT_START, CURVES, FAULTS, CoordCheck
from btlm_jax.mup_study.parametrization import WidthFamily

WIDTHS = (64, 256)


@pytest.fixture(scope="module")
def corpus():
    return corpus_lib.read_corpus(None, 64)


@pytest.fixture(scope="module")
def found(corpus) -> CoordCheck:
    family = WidthFamily(parametrization.family_shape(256), WIDTHS)
    return coord_check.coord_check(family, corpus, seeds=6)


def not_passing(check, name):
    return {key: check.fit(name, *key) for key, v in check.verdicts(name).items() if v != "passes"}


def test_mup_passes(found):
    assert not_passing(found, "muP") == {}
    assert found.verdict("muP") == found.outcome() == "passes"


@pytest.mark.parametrize("fault", FAULTS)
def test_every_broken_rule_is_detected(found, fault):
    assert found.verdict(fault) == "fails"


def test_broken_rules_show_where_theory_says(found):
    """By the power of m that the rule is wrong by: 1/2 or 1."""
    for fault, curve, step, slope in [
        ("attention by sqrt(d)", "attention logits", 0, 0.0),
        ("logits unscaled", "logits", 0, 0.5),
        ("init unscaled", "MLP", 0, 1.5),  # three matrices, each by 1/2
        ("embedding rate scaled", "embedding", -1, -1.0),
    ]:
        assert found.fit(fault, curve, step).slope == pytest.approx(slope, abs=0.2), fault
    assert found.fit("hidden rate unscaled", "MLP").slope > 0.75


def test_a_wrong_scale_of_attention_shows_there_only(found):
    assert {curve for curve, _ in not_passing(found, "attention by sqrt(d)")} <= {
        "attention logits", "attention", "MLP"
    }  # fmt: skip


def test_models_that_do_not_know_their_width_fail(corpus, monkeypatch):
    """Not by factors put in from outside: by their own configuration."""
    config_of_width = WidthFamily.config

    def blind(self, width):
        return dataclasses.replace(config_of_width(self, width), mup_width_scale=1.0)

    monkeypatch.setattr(WidthFamily, "config", blind)
    family = WidthFamily(parametrization.family_shape(256), WIDTHS)
    found = coord_check.coord_check(family, corpus, parametrizations=["muP"], seeds=3)
    assert found.outcome() == "fails"
    assert found.fit("muP", "MLP").slope > 1


def test_tables_json_and_plot_hold_all_results(found, tmp_path):
    lines = "\n".join(coord_check_report.coord_check_table(found))
    assert "muP: passes" in lines and lines.count("fails, as it should") == len(FAULTS)
    plain = json.loads(json.dumps(coord_check_report.coord_check_numbers(found), allow_nan=False))
    assert plain["verdicts"] == {p: "passes" if p == "muP" else "fails" for p in ALL}
    assert plain["outcome"] == "passes"
    assert np.shape(plain["sizes"]["muP"]["MLP"]) == (6, 5, 2)
    coord_check_report.draw_coord_check(tmp_path / "c.png", found)
    assert (tmp_path / "c.png").stat().st_size > 10_000


def measured(noise=0.0, seeds=8, widths=(64, 128, 256), **powers) -> CoordCheck:
    """Returns made-up measurements: muP as theory predicts, but for the changes in `powers`."""
    random = np.random.default_rng(0)

    def sizes(powers):
        made = {}
        for curve in CURVES:
            change = powers.get(curve.replace(" ", "_"), 0.0)
            power = np.array([AT_START[curve].low, change])[:, None]
            log2 = power * np.log2(widths) + noise * random.standard_normal((seeds, 2, len(widths)))
            made[curve] = 2.0**log2
        return made

    return CoordCheck(widths, {"muP": sizes(powers), "SP": sizes({"MLP": 2.0})}, {})


def said(check) -> str:
    return "\n".join(coord_check_report.coord_check_verdicts(check))


def test_exact_power_laws_are_decided():
    assert measured().fit("muP", "logits", 0).slope == pytest.approx(-0.5)
    assert measured().outcome() == "passes"
    assert measured(MLP=0.5).outcome() == "fails"
    assert "muP: FAILS (change of MLP +0.50 ± 0.00, allowed -0.25 to +0.25)" in said(
        measured(MLP=0.5)
    )
    assert measured(embedding=-0.5).outcome() == "fails"


def test_a_change_of_logits_may_fall_like_a_random_walk():
    """Until training has lined up the weights; on some texts that takes many steps."""
    assert measured(attention_logits=-0.5, logits=-0.4).outcome() == "passes"
    assert measured(attention_logits=0.5).outcome() == "fails"
    assert measured(logits=-1.0).outcome() == "fails"


def test_noise_is_undecided_and_not_wrong():
    noisy = measured(noise=1.0, seeds=4)
    assert noisy.outcome() == "undecided"
    assert "muP: UNDECIDED" in said(noisy) and "--seeds 8 or more" in said(noisy)
    assert measured(noise=1.0, seeds=4, MLP=0.5).outcome() == "undecided"
    assert measured(noise=0.1).outcome() == "passes"
    assert measured(noise=0.1, MLP=0.5).outcome() == "fails"


def test_one_seed_and_two_widths_decide_nothing():
    few = measured(seeds=1, widths=(64, 128), MLP=3.0)
    assert few.outcome() == "undecided" and "from one measurement" in said(few)


def test_a_broken_rule_that_does_not_show_leaves_the_check_undecided():
    made = measured()
    blind = dataclasses.replace(made, sizes={**made.sizes, "SP": made.sizes["muP"]})
    assert blind.verdict("muP") == "passes" and blind.outcome() == "undecided"
    assert "SP: is NOT DETECTED" in said(blind)


@pytest.mark.parametrize(
    "width, size, outcome, why",
    [
        (2, math.nan, "fails", "a wider model diverged"),
        (2, math.inf, "fails", "a wider model diverged"),
        (0, math.nan, "undecided", "it did not change, or diverged at the base width"),
        (1, 0.0, "undecided", "it did not change, or diverged at the base width"),
    ],
)
def test_divergence_fails_in_wider_models_only(width, size, outcome, why):
    """At the base width it is the learning rate, and what never changes has no slope."""
    made = measured()
    made.sizes["muP"]["MLP"][0, -1, width] = size
    assert made.outcome() == outcome and f"change of MLP: {why}" in said(made)


def test_verdicts_are_wrong_in_at_most_one_of_a_hundred_checks():
    """With slopes at the limit, where it is hardest, and away from it."""
    from btlm_jax.mup_study.slope_test import Interval, fit_slope, judge_slope

    random, counts = np.random.default_rng(0), {}
    for slope in (0.25, 0.0, 0.5):
        for _ in range(2000):
            values = slope * np.arange(3) + 0.1 * random.standard_normal((8, 3))
            verdict = judge_slope(fit_slope((64, 128, 256), values), Interval(-0.25, 0.25))
            counts[slope, verdict] = counts.get((slope, verdict), 0) + 1
    assert counts[0.25, "passes"] < 35 and counts[0.25, "fails"] < 35  # 1 %, and its noise
    assert counts[0.0, "passes"] == counts[0.5, "fails"] == 2000


@pytest.mark.parametrize(
    "outcome, code", [(dict(), 0), (dict(MLP=0.5), 1), (dict(noise=1.0, seeds=2), 3)]
)
def test_the_command_writes_numbers_and_a_plot(outcome, code, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(coord_check, "coord_check", lambda *_, **__: measured(**outcome))
    target = tmp_path / "out"
    assert main(["coord-check", str(target), "--no-faults"]) == code
    assert "muP: " in capsys.readouterr().out
    assert sorted(p.name for p in target.iterdir()) == ["coord_check.json", "coord_check.png"]


def test_outputs_are_checked_before_training(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(coord_check, "coord_check", lambda *_, **__: pytest.fail("the work began"))
    (tmp_path / "file").write_text("")
    (tmp_path / "out" / "coord_check.png").mkdir(parents=True)
    for place, said in {"file": "file is a file", "out": "png is a directory"}.items():
        assert main(["coord-check", str(tmp_path / place)]) == 2
        assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--widths", "16", "30"], "--widths: found 30, which does not divide into 4 heads"),
        (["--widths", "64"], "--widths: found 64, expected two or more"),
        (["--length", "100000"], "--data: bytes of Python's language reference has"),
        (["--data", "/nonexistent"], "/nonexistent: no such directory"),
        (["--steps", "0"], "--steps: found 0"),
        (["--seeds", "0"], "--seeds: found 0"),
        (["--learning-rate", "0"], "--learning-rate: found 0"),
        (["--model", "/nonexistent"], "/nonexistent: no such file"),
    ],
)
def test_bad_input_is_refused(arguments, said, tmp_path, capsys):
    assert main(["coord-check", str(tmp_path / "out"), *arguments]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
