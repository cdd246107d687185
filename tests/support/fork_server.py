"""Forks of a process that has everything imported, killed at any change of the file system.

A killed run then costs no start-up, so that a test can kill one before every single change. Run as
a program, this file is the server: `python fork_server.py MODULE`, whose function
`run_job(job: dict) -> dict` does the work in the forked process.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any


class ForkServer:
    """Runs jobs in forks of one process, in the order in which they are asked for.

    Args:
      module: its `run_job(job)` does the work of a job and returns a dictionary for JSON.
      folder: for temporary files.
    """

    def __init__(self, module: str, folder: Path) -> None:
        one = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}  # threads do not survive a fork
        paths = {"TMPDIR": str(folder), "PYTHONPATH": str(Path(__file__).parents[1])}
        env = os.environ | one | paths | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
        self._process = subprocess.Popen(
            [sys.executable, __file__, module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=env,
        )

    def run(self, work: str, source: Path, target: Path, **job: Any) -> dict[str, Any]:
        """Runs a job in a process of its own.

        Args:
          work, source, target: what `run_job` does, from where, and to where; changes of the file
            system are counted in the folder of the target.
          job: more for `run_job`; and `at`: send the process `signal` (default SIGKILL) before its
            change number `at`; or `after`: kill it after so many seconds.

        Returns:
          `ended`: "killed", "stopped" or "exited"; `pid`; and if it exited, `changes`, the list of
          (event, path) of its changes; `seconds`; and what `run_job` returned, or `error`.
        """
        self._send(job | {"work": work, "source": str(source), "target": str(target)})
        return self._receive()

    def kill_at(
        self, work: str, source: Path, folder: Path, points: Iterable[int], **job: Any
    ) -> Iterator[tuple[int, Path]]:
        """Kills a run before each change in `points`; yields the point and the target, in `folder`.

        While the caller looks at the remains of one, the next is running.
        """
        targets = {at: folder / str(at) / "c" for at in points}
        for at, target in targets.items():
            target.parent.mkdir(exist_ok=True)
            self._send(job | {"work": work, "source": str(source), "target": str(target), "at": at})
        answers = (self._receive() for _ in targets)
        try:
            for (at, target), answer in zip(targets.items(), answers, strict=True):
                assert answer["ended"] == "killed"
                yield at, target
        finally:
            list(answers)

    def wait(self, pid: int) -> dict[str, Any]:
        """Waits for a process that was stopped and continued; returns the answer of `run`."""
        self._send({"wait": pid})
        return self._receive()

    def close(self) -> None:
        """Ends the server."""
        self._process.stdin.close()
        assert self._process.wait(10) == 0

    def _send(self, job: dict) -> None:
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()

    def _receive(self) -> dict:
        return json.loads(self._process.stdout.readline())


@contextlib.contextmanager
def fork_server(module: str, folder: Path) -> Iterator[ForkServer]:
    """A `ForkServer` for the length of a block."""
    server = ForkServer(module, folder)
    try:
        yield server
    finally:
        server.close()


def _serve(module: str) -> None:
    run_job = importlib.import_module(module).run_job
    pipes: dict[int, int] = {}
    for line in sys.stdin:
        job = json.loads(line)
        pid = job.get("wait") or _fork(job, run_job, pipes)
        if "after" in job:
            time.sleep(job["after"])
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, os.WUNTRACED)
        answer = {"pid": pid, "ended": "killed" if os.WIFSIGNALED(status) else "exited"}
        if os.WIFSTOPPED(status):
            answer["ended"] = "stopped"
        else:
            with open(pipes.pop(pid)) as pipe:
                answer |= json.loads(pipe.read() or "{}")
        print(json.dumps(answer), flush=True)


def _fork(job: dict, run_job, pipes: dict[int, int]) -> int:
    assert len(os.listdir("/proc/self/task")) == 1, "a fork of several threads can hang"
    reader, writer = os.pipe()
    if pid := os.fork():
        os.close(writer)
        pipes[pid] = reader
        return pid
    os.dup2(2, 1)
    # A shell starts its background jobs deaf to Ctrl-C, and the child would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.write(writer, json.dumps(_run_and_record(job, run_job)).encode())
    os._exit(0)


def _run_and_record(job: dict, run_job) -> dict:
    """Runs a job in the forked process, and records its changes of the file system."""
    changes: list[tuple[str, str]] = []
    folder = os.path.dirname(job["target"])

    def hook(event: str, args) -> None:
        if event == "open":
            if not isinstance(args[0], str) or not args[2] & (os.O_WRONLY | os.O_RDWR):
                return
        elif event not in ("os.mkdir", "os.rename", "os.remove", "os.rmdir"):
            return
        path = os.fspath(args[0])
        if not os.path.isabs(path):  # relative to an open folder, in rmtree
            path = os.path.join(os.readlink(f"/proc/self/fd/{args[-1]}"), path)
        if path.startswith(f"{folder}/"):
            changes.append((event, os.path.relpath(path, folder)))
            if len(changes) - 1 == job.get("at"):
                os.kill(os.getpid(), job.get("signal", signal.SIGKILL))

    sys.addaudithook(hook)
    began, answer = time.monotonic(), {}
    try:
        answer |= run_job(job)
    except BaseException as error:
        answer["error"] = repr(error)
    return answer | {"changes": changes, "seconds": time.monotonic() - began}


if __name__ == "__main__":
    _serve(sys.argv[1])
