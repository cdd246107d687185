"""Work with a deadline: its result or error, warnings while it lasts, and an end to the wait."""

from __future__ import annotations

import threading
import time

import pytest

from btlm_jax.utils import deadline
from btlm_jax.utils.deadline import Deadline, StalledError, run_with_deadline


@pytest.fixture
def exits(monkeypatch):
    """The calls that bound the exit of the process."""
    calls: list[None] = []
    monkeypatch.setattr(deadline, "bound_exit", lambda: calls.append(None))
    return calls


def test_results_and_errors_are_those_of_the_work(exits):
    patient = Deadline(60, 60, lambda: False)
    assert run_with_deadline(lambda: 7, "counting", patient) == 7
    with pytest.raises(TimeoutError, match="its own"):
        run_with_deadline(lambda: (_ for _ in ()).throw(TimeoutError("its own")), "x", patient)
    assert not exits


def test_work_that_hangs_is_a_warning_and_then_an_error(exits, caplog, monkeypatch):
    monkeypatch.setattr(deadline, "_WARN_EVERY_SECONDS", 0.2)
    event = threading.Event()
    with pytest.raises(StalledError, match=r"still writing run/4 after 1 s"):
        run_with_deadline(lambda: event.wait(60), "writing run/4", Deadline(1, 60, lambda: False))
    event.set()
    assert "still writing run/4 after 0 s: its file system is slow or hangs" in caplog.text
    assert len(exits) == 1


def test_a_request_to_stop_shortens_the_wait(exits, caplog):
    event, began = threading.Event(), time.monotonic()
    with pytest.raises(StalledError):
        run_with_deadline(lambda: event.wait(60), "writing", Deadline(60, 0.6, lambda: True))
    event.set()
    assert time.monotonic() - began < 10
    assert caplog.text.count("waiting at most") == 1


def test_an_interrupted_wait_leaves_the_work_behind(exits):
    event = threading.Event()

    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_with_deadline(lambda: event.wait(60), "writing", Deadline(60, 60, interrupt))
    event.set()
    assert len(exits) == 1
