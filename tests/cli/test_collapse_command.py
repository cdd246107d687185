"""`btlm collapse` on run directories of `btlm train`."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest

from btlm_jax import BTLMConfig, cli
from btlm_jax.model import weights
from btlm_jax.train import curves, recipe_file
from btlm_jax.train.recipe_build import build_schedule
from support.loss_curves import SHAPE


def run_directory(path, *, seed=0, final=3.0, until=1.0, drift=None, steps=2000, overrides=()):
    """Writes a run with 1 % of noise and two phases; the second has half the tokens per step."""
    recipe = recipe_file.parse_recipe({
        "model": {"preset": "tiny"},
        "phases": [
            {"steps": steps // 2, "batch_size": 8, "length": 128},
            {"steps": steps // 2, "batch_size": 4, "length": 128},
        ],
        "optimizer": {"peak_lr": 6e-3, "final_lr": 0.0, "warmup_tokens": 10_240},
        "data": {"train": "tokens"},
    })  # fmt: skip
    if overrides:
        recipe = dataclasses.replace(
            recipe, optimizer=dataclasses.replace(recipe.optimizer, **dict(overrides))
        )
    tokens = np.repeat([8 * 128.0, 4 * 128.0], steps // 2).cumsum()
    t = tokens / tokens[-1]
    loss = final * SHAPE(t, 1 - t, 1, 1)
    loss *= 1 + 0.01 * np.random.default_rng(seed).standard_normal(steps)
    if drift:
        loss *= 1 + drift * np.clip((t - 0.6) / 0.4, 0, None)
    rate = np.asarray(build_schedule(recipe)(np.arange(steps)))
    lines = [
        json.dumps({"step": i + 1, "loss": loss[i], "learning_rate": float(rate[i])})
        for i in range(steps)
        if t[i] <= until
    ]
    path.mkdir()
    (path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (path / "recipe.json").write_text(
        json.dumps({"recipe": recipe_file.recipe_to_dict(recipe), "data": ""})
    )
    return path


def run(capsys, *argv):
    code = cli.main([str(a) for a in argv])
    out = capsys.readouterr()
    return code, out.out, out.err


@pytest.fixture
def runs(tmp_path):
    made = [run_directory(tmp_path / n, seed=i, final=2.6 + 0.2 * i) for i, n in enumerate("abc")]
    made.append(run_directory(tmp_path / "now", seed=9, final=2.3, until=0.5))
    return made


def test_a_run_directory_gives_curve_and_timescale(runs):
    found = curves.read_training_run(runs[-1])
    n = weights.count_parameters(BTLMConfig.preset("tiny"))
    tokens = 1000 * 8 * 128 + 1000 * 4 * 128
    assert found.parameters == n and found.tokens_per_parameter == pytest.approx(tokens / n)
    # Half the tokens are seen after three quarters of the first phase, whose steps have twice as
    # many; tiny is twice its muP base.
    assert (found.step, found.steps, found.finished) == (750, 2000, False)
    assert found.curve.done[-1] == pytest.approx(0.5)
    assert found.timescale == pytest.approx(1 / (6e-3 * 0.5 * 0.1 * 2000))
    assert curves.read_training_run(runs[0]).finished


def test_collapse_reports_predictions_and_faults(capsys, tmp_path, runs):
    out, png, numbers = (tmp_path / n for n in ("out", "c.png", "c.json"))
    leaving = run_directory(tmp_path / "leaving", seed=5, until=0.95, drift=0.03)
    code, out, err = run(capsys, "collapse", *runs, leaving, "--png", png, "--json", numbers)
    assert code == 0, err
    assert "warning" not in out and out.count("in family") == 4
    assert "family: 3 finished runs" in out and "predicted" in out and "left at" in out
    assert png.stat().st_size > 10_000
    found = json.loads(numbers.read_text())["runs"]
    predicted = found[str(runs[-1])]
    assert predicted["final"]["loss"] == pytest.approx(2.3, abs=3 * predicted["final"]["std"])
    assert not predicted["finished"] and predicted["steps"] == 2000
    assert found[str(leaving)]["verdict"]["left_at"] == pytest.approx(0.6, abs=0.1)


def test_one_other_run_does_not_show_which_is_at_fault(capsys, tmp_path, runs):
    leaving = run_directory(tmp_path / "leaving", seed=5, until=0.95, drift=0.03)
    drifted = run_directory(tmp_path / "drifted", seed=6, drift=0.03)
    for other, note in (
        (leaving, "one finished run does not show how much runs of this family differ"),
        (drifted, "two finished runs that differ do not show which one is at fault"),
    ):
        _, out, _ = run(capsys, "collapse", runs[0], other, "--png", tmp_path / "c.png")
        assert out.count("undecided: differs from the only ") == (1 if other == leaving else 2)
        assert f"note: {note}" in out and "left at" not in out


@pytest.mark.parametrize(
    "overrides, said",
    [
        ({"weight_decay": 0.2}, "timescale 0.833, "),
        ({"weight_decay": 0.0}, "timescale none, "),
        ({"schedule": "cosine"}, "learning rate up to 1"),
        ({"schedule": "constant"}, "learning rate up to 99% of its peak"),
    ],
)
def test_runs_that_may_not_collapse_are_named(capsys, tmp_path, runs, overrides, said):
    other = run_directory(tmp_path / "other", seed=5, overrides=overrides)
    _, out, _ = run(capsys, "collapse", *runs, other, "--png", tmp_path / "c.png")
    (warning,) = [line for line in out.splitlines() if line.startswith("warning")]
    assert f"{other}: {said}" in warning


def test_tokens_per_parameter_are_compared(capsys, tmp_path, runs):
    """A run with half the steps, and the weight decay that keeps the timescale."""
    half = run_directory(
        tmp_path / "half", seed=4, steps=1000, overrides={"weight_decay": 0.2,
        "warmup_tokens": 5120}
    )  # fmt: skip
    _, out, _ = run(capsys, "collapse", *runs, half, "--png", tmp_path / "c.png")
    (warning,) = [line for line in out.splitlines() if line.startswith("warning")]
    assert "tokens per parameter" in warning


def test_losses_that_are_not_finite_are_left_out(caplog, tmp_path):
    path = run_directory(tmp_path / "a")
    lines = (path / "metrics.jsonl").read_text().splitlines()
    lines[7] = json.dumps(json.loads(lines[7]) | {"loss": float("nan")})
    (path / "metrics.jsonl").write_text("\n".join(lines))
    with caplog.at_level("WARNING", logger="btlm_jax.train.curves"):
        assert len(curves.read_training_run(path).curve.loss) == 1999
    assert "1 losses that are not finite" in caplog.text


def test_directories_that_cannot_be_compared_are_refused(capsys, tmp_path, runs):
    png = tmp_path / "c.png"
    code, _, err = run(capsys, "collapse", tmp_path, "--png", png)
    assert code == 2 and "no recipe.json: expected a directory of `btlm train`" in err
    code, _, err = run(capsys, "collapse", runs[-1], "--png", png)
    assert code == 2 and "found no finished one" in err
    empty = run_directory(tmp_path / "empty")
    (empty / "metrics.jsonl").unlink()
    code, _, err = run(capsys, "collapse", empty, "--png", png)
    assert code == 2 and "found 0 losses in metrics.jsonl" in err
    assert not png.exists()


def test_outputs_are_checked_before_runs_are_read(capsys, tmp_path, runs, monkeypatch):
    from btlm_jax.scaling import collapse_report

    def fails(*_):
        raise OSError("the disk is full")

    monkeypatch.setattr(collapse_report, "draw_collapse", fails)
    numbers, png = tmp_path / "c.json", tmp_path / "c.png"
    code, _, err = run(capsys, "collapse", *runs, "--png", png, "--json", numbers)
    assert code == 2 and "disk is full" in err and numbers.exists()  # the numbers come first
    monkeypatch.setattr(curves, "read_training_run", lambda _: pytest.fail("runs were read"))
    for options, said in {
        ("--png", tmp_path / "c.jpg"): "found the suffix '.jpg', expected '.png'",
        ("--png", png, "--json", runs[0]): "is a directory",
    }.items():
        code, _, err = run(capsys, "collapse", *runs, *options)
        assert code == 2 and said in err


def test_no_device_is_initialized(runs, tmp_path):
    """The accelerator of this machine may be busy training the run."""
    code = f"""
import jax
from btlm_jax import cli
assert cli.main({["collapse", *map(str, runs), "--png", str(tmp_path / "c.png")]!r}) == 0
assert not jax._src.xla_bridge._backends
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_scaling_needs_no_jax():
    names = ("laws", "surrogate", "collapse_report")
    code = "import sys, " + ", ".join(f"btlm_jax.scaling.{name}" for name in names)
    code += "\nassert not {'jax', 'matplotlib'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
