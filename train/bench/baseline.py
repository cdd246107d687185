"""A peer of a bench, in a process of its own: what is measured beside ours."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from typing import Any


class Baseline:
    """A module of this folder that says what it is, and answers each line with one of JSON.

    Attributes:
      about: what it is, in its own words.

    Raises:
      ValueError: it failed; with the end of what it wrote to standard error.
    """

    def __init__(self, module: str, argument: str, what: str) -> None:
        self._what = what
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115, closed with the process
        self._process = subprocess.Popen(
            [sys.executable, "-m", f"btlm_jax.train.bench.{module}", argument],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            # Threads that wait must not take the cores from ours.
            env=os.environ | {"OMP_WAIT_POLICY": "PASSIVE"},
        )
        self.about = self._answer()

    def ask(self, **question: Any) -> dict[str, Any]:
        """Its answer to a question, both JSON objects."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # the answer that does not come says why
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.communicate()
        self._errors.close()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line:
            return json.loads(line)
        self._process.wait()
        self._errors.seek(0)
        said = self._errors.read()[-2000:]
        self.close()
        raise ValueError(f"{self._what} failed:\n{said}")
