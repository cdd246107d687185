"""Baselines: programs in subprocesses that benchmarks measure in turn with ours."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from typing import Any


class Baseline:
    """A subprocess that runs a module of this folder, and answers each line with a line of JSON.

    Attributes:
      metadata: the first answer of the process, such as its versions.

    Raises:
      ValueError: the process failed. The message has the end of its standard error.
    """

    def __init__(self, module: str, argument: str, name: str) -> None:
        """Starts the process.

        Args:
          module: the module's name, without the folder.
          argument: its command-line argument.
          name: the baseline's name for error messages.
        """
        self._name = name
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115, closed with the process
        self._process = subprocess.Popen(
            [sys.executable, "-m", f"btlm_jax.train.bench.{module}", argument],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            # Threads that wait must not keep the cores busy while ours runs.
            env=os.environ | {"OMP_WAIT_POLICY": "PASSIVE"},
        )
        self.metadata = self._read_answer()

    def run(self, **work: Any) -> dict[str, Any]:
        """Sends the work as JSON, and returns the answer."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # the missing answer raises the error
            self._process.stdin.write(json.dumps(work) + "\n")
            self._process.stdin.flush()
        return self._read_answer()

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.communicate()
        self._errors.close()

    def _read_answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line:
            return json.loads(line)
        self._process.wait()
        self._errors.seek(0)
        message = self._errors.read()[-2000:]
        self.close()
        raise ValueError(f"{self._name} failed:\n{message}")
