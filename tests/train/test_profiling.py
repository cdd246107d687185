"""The requested steps are traced, and no others."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from btlm_jax.train.profiling import StepProfiler


@pytest.fixture
def calls(monkeypatch):
    calls = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: calls.append(folder))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
    return calls


def run(profile, steps):
    for step in steps:
        profile.before_step(step)
        yield step
        profile.after_step(step, jnp.zeros(()))
    profile.close()


def test_the_first_to_the_last_step_are_traced(tmp_path, calls):
    seen = {}
    for step in run(StepProfiler(tmp_path, (3, 4), 0), range(1, 7)):
        seen[step] = len(calls)
    assert seen == {1: 0, 2: 0, 3: 1, 4: 1, 5: 2, 6: 2}
    assert calls == [str(tmp_path / "profile"), "stop"]


def test_a_run_that_ends_early_writes_its_trace(tmp_path, calls):
    list(run(StepProfiler(tmp_path, (3, 9), 2), range(3, 5)))
    assert calls[1:] == ["stop"]


def test_nothing_is_traced_by_default(tmp_path, calls):
    list(run(StepProfiler(tmp_path, None, 0), range(1, 4)))
    assert calls == []


@pytest.mark.parametrize("steps, done", [((5, 4), 0), ((0, 4), 0), ((5, 9), 5)])
def test_steps_that_cannot_be_traced_are_refused(tmp_path, steps, done):
    with pytest.raises(ValueError, match=rf"profile: found .*expected FIRST:LAST from {done + 1}"):
        StepProfiler(tmp_path, steps, done)
