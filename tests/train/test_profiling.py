"""Traces of the steps that were asked for, and of no others."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from btlm_jax.train.profiling import Profile


@pytest.fixture
def calls(monkeypatch):
    found = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: found.append(folder))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: found.append("stop"))
    return found


def run(profile, steps):
    for step in steps:
        profile.before(step)
        yield step
        profile.after(step, jnp.zeros(()))
    profile.close()


def test_first_to_last(tmp_path, calls):
    seen = {}
    for step in run(Profile(tmp_path, (3, 4), 0), range(1, 7)):
        seen[step] = len(calls)
    assert seen == {1: 0, 2: 0, 3: 1, 4: 1, 5: 2, 6: 2}
    assert calls == [str(tmp_path / "profile"), "stop"]


def test_a_run_that_ends_before_writes_what_it_has(tmp_path, calls):
    list(run(Profile(tmp_path, (3, 9), 2), range(3, 5)))
    assert calls[1:] == ["stop"]


def test_none(tmp_path, calls):
    list(run(Profile(tmp_path, None, 0), range(1, 4)))
    assert calls == []


@pytest.mark.parametrize("steps, done", [((5, 4), 0), ((0, 4), 0), ((5, 9), 5)])
def test_steps_that_cannot_be_traced(tmp_path, steps, done):
    with pytest.raises(ValueError, match=rf"profile: found .*expected FIRST:LAST from {done + 1}"):
        Profile(tmp_path, steps, done)
