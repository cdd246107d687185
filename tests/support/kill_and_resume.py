"""Commands that are killed at random moments and resumed, as a user would, by running them again.

`fork_server` kills at every single change of the file system instead, where a run can be forked.
"""

from __future__ import annotations

import dataclasses
import random
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence


@dataclasses.dataclass(frozen=True)
class KillAndResume:
    """A command to kill at random moments and to run again until it finishes.

    Attributes:
      command: the argument list.
      progress: returns the number of finished pieces of work, as the files of the run show it.
      pieces: fewest and most pieces that a run finishes before it is killed.
      kills: number of runs to kill; later runs are left alone.
      kill_signal: with SIGTERM, a run may also exit with code 0 before it has finished.
      finished: whether the work is complete, given what a run with exit code 0 printed.
      environment: of the processes; None inherits that of the tests.
      delay: most seconds between the moment when progress is seen and the signal.
      timeout: seconds that one run may take.
      seed: of the random moments.
    """

    command: Sequence[str]
    progress: Callable[[], int]
    pieces: tuple[int, int]
    kills: int
    kill_signal: int = signal.SIGKILL
    finished: Callable[[str], bool] = lambda output: True
    environment: Mapping[str, str] | None = None
    delay: float = 0.03
    timeout: float = 240.0
    seed: int = 0

    def run(self, after_kill: Callable[[str], None] = lambda output: None) -> tuple[str, int]:
        """Runs the command until the work is complete.

        Args:
          after_kill: called with what a run printed, after each that was sent the signal.

        Returns:
          What the last run printed, and the number of runs that ended by the signal.
        """
        rng, sent, ended_by_signal = random.Random(self.seed), 0, 0
        while True:
            goal = self.progress() + rng.randint(*self.pieces) if sent < self.kills else None
            code, output, signaled = self._run_once(goal, rng.uniform(0, self.delay))
            sent += signaled
            ended_by_signal += code == -self.kill_signal
            assert code == 0 or (signaled and code == -self.kill_signal), output
            if signaled:
                after_kill(output)
            if code == 0 and self.finished(output):
                return output, ended_by_signal
            assert signaled, f"the run ended early:\n{output}"

    def _run_once(self, goal: int | None, delay: float) -> tuple[int, str, bool]:
        """Returns the exit code, what was printed, and whether the signal was sent."""
        # A file, not a pipe: nobody reads while the process runs, and a full pipe would block it.
        with tempfile.TemporaryFile("w+") as log:
            process = subprocess.Popen(
                self.command, stdout=log, stderr=subprocess.STDOUT, env=self.environment
            )
            try:
                signaled = self._wait(process, goal)
                if signaled:
                    time.sleep(delay)
                    process.send_signal(self.kill_signal)
                code = process.wait(self.timeout)
            finally:
                process.kill()
                process.wait()
            log.seek(0)
            return code, log.read(), signaled

    def _wait(self, process: subprocess.Popen, goal: int | None) -> bool:
        """Waits until `goal` pieces are finished or the process ends. Returns whether it runs."""
        deadline = time.monotonic() + self.timeout
        while process.poll() is None:
            if goal is not None and self.progress() >= goal:
                return True
            assert time.monotonic() < deadline, f"{self.command} hangs"
            time.sleep(0.005)
        return False
