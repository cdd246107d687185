"""Outputs that fail or stall cost one warning, and neither end nor hang the work."""

from __future__ import annotations

import os
import threading
import time

import pytest

from btlm_jax.utils import side_output
from btlm_jax.utils.side_output import SideOutput, attempt, close_all

BOUND_EXIT = side_output.bound_exit


@pytest.fixture(autouse=True)
def at_exit(monkeypatch):
    """Keeps an output that stalls from bounding the exit of the tests."""
    calls = []
    monkeypatch.setattr(side_output, "bound_exit", lambda: calls.append(None))
    return calls


@pytest.fixture
def stalled():
    """A call that does not return before the test has ended."""
    event = threading.Event()
    yield lambda: event.wait(60)
    event.set()


def test_calls_run_in_order_and_the_output_is_released_last(caplog):
    seen = []
    output = SideOutput("numbers", "none", lambda: seen.append("released"))
    for number in range(100):
        output.put(seen.append, number)
    output.close()
    assert seen == [*range(100), "released"] and not output.given_up and not caplog.records


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), RuntimeError("broken"), SystemExit(3)]
)
def test_a_failure_is_one_warning_with_its_cost(caplog, error):
    def fail(*_):
        raise error

    seen = []
    output = SideOutput("curves in run/board", "the curves end here", fail)
    output.put(fail)
    for number in range(5):
        output.put(seen.append, number)
    output.close()
    assert output.given_up and seen == []
    (message,) = [r.getMessage() for r in caplog.records]
    assert message.startswith("curves in run/board: ") and message.endswith("; the curves end here")
    assert str(error) in message


def test_an_output_that_never_returns_delays_the_work_by_its_patience(caplog, stalled, at_exit):
    output = SideOutput("curves", "they end", patience=0.1, capacity=3)
    began = time.monotonic()
    for _ in range(50):
        output.put(stalled)
    close_all([output], 0.1)
    assert time.monotonic() - began < 5 and output.given_up
    assert [r.getMessage() for r in caplog.records] == ["curves: it takes no more; they end"]
    assert len(at_exit) == 1


def test_closing_waits_for_a_stalled_output_no_longer_than_it_was_told(caplog, stalled):
    outputs = [SideOutput(name, "lost") for name in ("a", "b")]
    for output in outputs:
        output.put(stalled)
    began = time.monotonic()
    close_all(outputs, 0.1)
    assert time.monotonic() - began < 5
    assert caplog.text.count("was not finished within") == 2


def test_an_attempt_returns_whether_it_succeeded(caplog, stalled):
    assert attempt("picture", "missing", lambda: None)
    assert not attempt("picture", "missing", lambda: 1 / 0)
    assert not attempt("picture", "missing", stalled, 0.05)
    assert "picture: ZeroDivisionError: division by zero; missing" in caplog.text


def test_a_stalled_thread_cannot_keep_the_process_nor_change_its_exit_code(monkeypatch):
    """Once the process begins to exit, whatever still waits for the thread is given 20 s."""
    codes, waits, hooks = [], [], []
    ended = threading.Event()
    monkeypatch.setattr(threading, "_register_atexit", hooks.append)
    monkeypatch.setattr(time, "sleep", waits.append)
    monkeypatch.setattr(os, "_exit", lambda code: (codes.append(code), ended.set()))
    monkeypatch.setattr(side_output, "_exit_code", 1)
    BOUND_EXIT.__wrapped__()
    side_output.set_exit_code(0)
    assert not codes
    (begin_exit,) = hooks
    begin_exit()
    assert ended.wait(10) and codes == [0] and waits == [20.0]
