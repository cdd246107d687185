"""Signals request a stop; where processes have joined, JAX's runtime receives them."""

from __future__ import annotations

import signal

import jax
import pytest

from btlm_jax.train.preemption import StopSignal


@pytest.fixture
def handlers():
    """Handlers installed by someone else, and the signals that they receive."""
    received: list[int] = []
    before = {s: signal.signal(s, lambda n, _: received.append(n)) for s in (2, 15)}
    yield received
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_requests_a_stop_and_the_second_acts(handlers, number, caplog):
    with StopSignal() as stop:
        assert not stop.requested(1)
        signal.raise_signal(number)
        assert stop.requested(2) and handlers == []
        assert f"{number.name}: saving after this step" in caplog.text
        signal.raise_signal(number)
        assert handlers == [number]
    signal.raise_signal(number)
    assert handlers == [number] * 2


def test_joined_processes_leave_sigterm_to_jax(handlers, monkeypatch):
    """Ctrl-C is forwarded as SIGTERM, so that all processes stop."""
    from jax.experimental import multihost_utils

    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", lambda step: step == 7)
    with StopSignal() as stop:
        signal.raise_signal(signal.SIGTERM)
        assert handlers == [signal.SIGTERM]
        signal.raise_signal(signal.SIGINT)
        assert handlers == [signal.SIGTERM] * 2
        assert [s for s in range(10) if stop.requested(s)] == [7]
        signal.raise_signal(signal.SIGINT)
        assert handlers[-1] == signal.SIGINT
