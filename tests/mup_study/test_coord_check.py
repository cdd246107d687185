"""The coordinate check: muP passes, and every broken rule is found out."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from btlm_jax.cli import main
from btlm_jax.mup_study import coord_check, coord_check_report, parametrization
from btlm_jax.mup_study import corpus as corpus_lib
from btlm_jax.mup_study.coord_check import ALL, FAULTS, LIMITS, CoordCheck
from btlm_jax.mup_study.parametrization import WidthFamily

WIDTHS = (64, 128, 256)


@pytest.fixture(scope="module")
def corpus():
    return corpus_lib.read_corpus(None, 64)


@pytest.fixture(scope="module")
def found(corpus) -> CoordCheck:
    return coord_check.coord_check(WidthFamily(parametrization.family_shape(256), WIDTHS), corpus)


def test_mup_passes(found):
    assert {c: round(found.slope("muP", c), 2) for c in LIMITS if not flat(found, c)} == {}
    assert found.passes("muP")


def flat(found, curve):
    return abs(found.slope("muP", curve)) <= LIMITS[curve]


def test_initial_activations_of_mup_keep_their_size(found):
    """Attention logits and logits fall as 1 / sqrt(width), a random walk; nothing else changes."""
    for curve in LIMITS:
        slope = found.slope("muP", curve, step=0)
        falls = curve in ("attention logits", "logits")
        assert -0.6 <= slope <= -0.3 if falls else abs(slope) <= 0.1


@pytest.mark.parametrize("fault", FAULTS)
def test_every_broken_rule_is_detected(found, fault):
    least, curves = FAULTS[fault]
    assert {c: found.effect(fault, c) for c in curves if abs(found.effect(fault, c)) < least} == {}
    assert found.detects(fault) and not found.passes(fault)


def test_a_wrong_scale_of_attention_shows_there_only(found):
    for curve in set(LIMITS) - {"attention logits"}:
        assert abs(found.slope("attention by sqrt(d)", curve)) <= LIMITS[curve]


def test_models_that_do_not_know_their_width_fail(corpus, monkeypatch):
    """Not by factors put in from outside: by their own configuration."""
    config_of_width = WidthFamily.config

    def blind(self, width):
        return dataclasses.replace(config_of_width(self, width), mup_width_scale=1.0)

    monkeypatch.setattr(WidthFamily, "config", blind)
    family = WidthFamily(parametrization.family_shape(256), (64, 128))
    found = coord_check.coord_check(family, corpus, parametrizations=["muP"], seeds=1)
    assert not found.passes("muP")
    assert found.slope("muP", "MLP") > 1


def test_tables_json_and_plot_hold_all_results(found, tmp_path):
    lines = "\n".join(coord_check_report.coord_check_table(found))
    assert "muP: passes" in lines and lines.count("fails, as it should") == len(FAULTS)
    plain = json.loads(json.dumps(coord_check_report.coord_check_numbers(found)))
    assert plain["as_it_must"] == dict.fromkeys(ALL, True)
    assert np.shape(plain["sizes"]["muP"]["MLP"]) == (2, 25, 3)
    coord_check_report.draw_coord_check(tmp_path / "c.png", found)
    assert (tmp_path / "c.png").stat().st_size > 10_000


def test_slopes_of_power_laws_are_exact():
    """Sizes that are powers of the width have their exponents as slopes."""
    powers = dict(zip(LIMITS, (0.0, -0.5, 1.0, 0.25, -1.0, 2.0), strict=True))
    sizes = {c: np.array(WIDTHS, float) ** p * np.ones((2, 3, 1)) for c, p in powers.items()}
    made = CoordCheck(WIDTHS, {"muP": sizes, "SP": sizes}, {})
    for curve, power in powers.items():
        assert made.slope("muP", curve) == pytest.approx(power, abs=1e-12)
    assert not made.passes("muP") and not made.detects("SP")
    verdicts = dict.fromkeys(good for good, _ in coord_check_report.coord_check_verdicts(made))
    assert list(verdicts) == [False]


def test_divergence_is_an_infinite_slope():
    """muP fails with it, and a broken rule is detected by it."""
    sizes = {c: np.ones((1, 2, 3)) for c in LIMITS}
    sizes["MLP"] = np.full((1, 2, 3), np.nan)
    made = CoordCheck(WIDTHS, {"muP": sizes, "init unscaled": sizes}, {})
    assert not made.passes("muP") and made.detects("init unscaled")


def test_the_command_writes_numbers_and_a_plot(tmp_path, capsys):
    target = tmp_path / "out"
    small = ["--widths", "16", "32", "--steps", "1", "--seeds", "1", "--no-faults"]
    assert main(["coord-check", str(target), *small]) == 1  # so small a model proves nothing
    assert "NOT DETECTED" in capsys.readouterr().out
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
        (["--widths", "16", "30"], "widths: found 30, which does not divide into 4 heads"),
        (["--widths", "64"], "widths: found 64, expected two or more"),
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
