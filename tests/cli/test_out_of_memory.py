"""Messages about running out of memory."""

from __future__ import annotations

import jax
import pytest

from btlm_jax import cli
from btlm_jax.cli.checkpoint_commands import Info
from btlm_jax.cli.out_of_memory import out_of_memory

XLA = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 17179869184 bytes."
TPU = (
    "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. "
    "Used 21.45G of 15.75G hbm. Exceeded hbm capacity by 5.70G."
)
NUMPY = "Unable to allocate 7.45 GiB for an array with shape (1000000000,) and data type float64"


@pytest.mark.parametrize(
    "error, command, expected",
    [
        (RuntimeError(XLA), "train", ["a device (it needed 16.0 GiB more)", "phases.N.microbatch"]),
        (RuntimeError(TPU), "generate", ["it needed 21.45 GiB", "--cache-dtype"]),
        (MemoryError(NUMPY), "convert", ["the host (it needed 7.45 GiB", "--max-memory"]),
        (MemoryError(), "tokenize", ["out of memory on the host: fewer --threads"]),
        (RuntimeError("CUDA_ERROR_OUT_OF_MEMORY: out of memory"), "x", ["a smaller batch"]),
    ],
)
def test_the_message_says_how_much_was_needed_and_which_options_need_less(error, command, expected):
    message = out_of_memory(error, [command])
    assert message is not None and "\n" not in message and len(message) < 330
    for text in expected:
        assert text in message


def test_other_errors_are_not_about_memory():
    assert out_of_memory(RuntimeError("INTERNAL: something else"), ["train"]) is None


@pytest.mark.parametrize("error", [jax.errors.JaxRuntimeError(XLA), MemoryError(NUMPY)])
def test_the_command_ends_with_one_line_instead_of_a_traceback(error, monkeypatch, capsys):
    def fail(self):
        raise error

    monkeypatch.setattr(Info, "run", fail)
    assert cli.main(["info", "tiny"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("btlm: error: out of memory on") and err.count("\n") == 1
    with pytest.raises(type(error)):
        cli.main(["info", "tiny", "--debug"])
