"""Runs of two processes with four devices each, over the loopback, are like runs of one process.

Sums are computed in another order than in one process, so losses agree to fp32 rounding, which
training amplifies; among runs of two processes they agree exactly.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from btlm_jax.train import recipe_file
from btlm_jax.train.loop import train
from btlm_jax.train.metrics import read_metrics
from support import compiling
from support.processes import free_port
from support.runs import (
    TINY_MODEL,
    assert_close_losses,
    final_weights,
    losses,
    predictable_tokens,
    write_recipe,
)
from support.tokens import write_tokens

RECIPE = (
    TINY_MODEL
    + """
[[phases]]
steps = 24
batch_size = 16
length = 16
microbatch = 8
[optimizer]
peak_lr = 1e-2
final_lr = 1e-3
warmup_tokens = 512
[data]
train = "{train}"
held_out = "{held}"
held_out_tokens = 1024
[run]
log_every = 1
checkpoint_every = 6
keep_last = 9
eval_every = 12
prompt = "3"
"""
)
# An evaluation of 24 batches after every step: slow enough to be interrupted.
SLOWLY = ("run.eval_every=1", "data.held_out_tokens=3072")

BTLM = """
import sys
from jax._src import cache_key
# On CPUs the process is part of the key, and every process would compile for itself.
cache_key._hash_accelerator_config = cache_key._hash_devices
from btlm_jax import cli
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("data"), RECIPE, predictable_tokens(20000), 16000)


class Pair:
    """Two processes and their output."""

    def __init__(self, logs: Path, code: str, arguments: list[str]) -> None:
        logs.mkdir(parents=True, exist_ok=True)
        env = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": "4",
            "XLA_FLAGS": compiling.QUICK_TO_COMPILE,
        }
        self.logs = [logs / "0.log", logs / "1.log"]
        self.processes: list[subprocess.Popen] = []
        where = ["--coordinator", f"127.0.0.1:{free_port()}", "--processes", "2"]
        for number, log in enumerate(self.logs):
            command = [sys.executable, "-c", code, *arguments, *where, "--process", str(number)]
            with log.open("w") as file:
                self.processes.append(
                    subprocess.Popen(command, env=env, stdout=file, stderr=subprocess.STDOUT)
                )

    def until(self, reached: Callable[[], bool]) -> None:
        """Waits until `reached` returns True."""
        deadline = time.monotonic() + 240
        while not reached():
            assert all(p.poll() is None for p in self.processes), self.output()
            assert time.monotonic() < deadline, self.output()
            time.sleep(0.02)

    def codes(self) -> list[int]:
        """Returns the exit codes, once both processes have ended."""
        return [p.wait(timeout=240) for p in self.processes]

    def output(self) -> str:
        return "\n=====\n".join(log.read_text()[-5000:] for log in self.logs)


@pytest.fixture
def two(recipe, tmp_path):
    """Starts `btlm train` in two processes; kills those that still run at the end."""
    with starting(recipe, tmp_path) as start:
        yield start


@contextlib.contextmanager
def starting(recipe: Path, logs: Path) -> Iterator[Callable[..., Pair]]:
    pairs: list[Pair] = []

    def start(run: Path, *overrides: str, code: str = BTLM) -> Pair:
        sets = [x for o in overrides for x in ("--set", o)]
        arguments = ["train", str(recipe), str(run), *sets, "--lost-timeout", "10"]
        pairs.append(Pair(logs / f"logs-{len(pairs)}", code, arguments))
        return pairs[-1]

    try:
        yield start
    finally:
        for process in [p for pair in pairs for p in pair.processes]:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def one(recipe, tmp_path_factory) -> Path:
    """An uninterrupted run of one process with eight devices."""
    run = tmp_path_factory.mktemp("one") / "run"
    assert train(recipe_file.load_recipe(recipe), run).finished
    return run


@pytest.fixture(scope="module")
def both(recipe, tmp_path_factory) -> tuple[Path, Pair]:
    """The same run by two processes with four devices each."""
    root = tmp_path_factory.mktemp("both")
    with starting(recipe, root) as start:
        pair = start(root / "run", "run.sample_every=24")
        assert pair.codes() == [0, 0], pair.output()
    return root / "run", pair


def copy_until(run: Path, step: int, target: Path) -> Path:
    """Copies a run as it was soon after it saved a step."""
    shutil.copytree(run, target)
    for path in (target / "checkpoints").iterdir():
        if int(path.name) > step:
            shutil.rmtree(path)
    return target


def assert_equivalent(run: Path, reference: Path) -> None:
    """Asserts that all 24 steps have the same losses, and the weights the same end."""
    assert list(losses(run)) == list(range(1, 25))
    assert_close_losses(run, reference, 1e-5)
    a, b = final_weights(run), final_weights(reference)
    assert max(np.abs(a[k] - b[k]).max() for k in a) < 1e-3


def test_two_processes_train_like_one(one, both):
    run, _ = both
    assert_equivalent(run, one)
    lines = [read_metrics(r / "metrics.jsonl") for r in (run, one)]
    held = [
        {x["step"]: x["held_out_loss"] for x in of_run if "held_out_loss" in x} for of_run in lines
    ]
    assert held[0] == pytest.approx(held[1], abs=1e-5) and set(held[0]) == {12, 24}


def test_only_process_0_reports(both):
    run, pair = both
    steps = [(x["step"], len(x)) for x in read_metrics(run / "metrics.jsonl")]
    assert len(steps) == len(set(steps)) == 26  # 24 steps, 2 evaluations
    assert len(list((run / "tensorboard").iterdir())) == 1
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    first, second = (log.read_text() for log in pair.logs)
    for said in ("train: 24 step/24 step", "held-out loss", "btlm: step 24: 3", "next: btlm gen"):
        assert said in first
    joining = "btlm: process 1 waits for the others"
    assert [x for x in second.splitlines() if "btlm" in x and not x.startswith(joining)] == []


def test_two_processes_resume_after_a_signal_and_one_after_a_kill(
    recipe, one, two, tmp_path, caplog
):
    """Two resume a run of one; one of them gets SIGTERM, then one is killed; one resumes that."""
    run = copy_until(one, 6, tmp_path / "run")
    pair = two(run, *SLOWLY)
    pair.until(lambda: 8 <= last_step(run) < 24)
    pair.processes[1].send_signal(signal.SIGTERM)
    stopped = both_stopped(pair, run)
    assert "btlm: resuming from step 6\n" in pair.logs[0].read_text()

    pair = two(run, *SLOWLY, f"run.checkpoint_every={stopped + 2}")
    pair.until((run / f"checkpoints/{stopped + 2}").exists)
    pair.processes[1].kill()
    assert pair.codes()[0] != 0, pair.output()
    assert f"btlm: resuming from step {stopped}\n" in pair.logs[0].read_text()

    until = {s: x for s, x in losses(run).items() if s <= stopped + 2}
    caplog.set_level("INFO", "btlm_jax")
    assert train(recipe_file.load_recipe(recipe), run).finished
    assert f"resuming from step {stopped + 2}\n" in caplog.text
    assert losses(run).items() >= until.items()
    assert_equivalent(run, one)


def last_step(run: Path) -> int:
    return max(losses(run), default=0)


def both_stopped(pair: Pair, run: Path) -> int:
    """Returns the step after which both processes stopped, saved, and printed how to resume."""
    assert pair.codes() == [0, 0], pair.output()
    for number, log in enumerate(pair.logs):
        (line,) = [x for x in log.read_text().splitlines() if x.startswith("resume with: btlm tr")]
        assert f" {run} " in line and line.endswith(f"--process {number}")
    stopped = max(int(p.name) for p in (run / "checkpoints").iterdir())
    assert last_step(run) == stopped < 24
    return stopped


@pytest.mark.slow
@pytest.mark.parametrize("signals", [{0: signal.SIGTERM, 1: signal.SIGTERM}, {0: signal.SIGINT}])
def test_signals_stop_both_processes_after_the_same_step(one, two, tmp_path, signals):
    """A scheduler signals every process; a user presses Ctrl-C at one of them."""
    run = copy_until(one, 6, tmp_path / "run")
    pair = two(run, *SLOWLY)
    pair.until(lambda: 8 <= last_step(run) < 24)
    for process, number in signals.items():
        pair.processes[process].send_signal(number)
    both_stopped(pair, run)
    assert two(run).codes() == [0, 0]
    assert_equivalent(run, one)


@pytest.mark.slow
def test_the_run_resumes_after_process_0_was_killed(one, two, tmp_path):
    run = copy_until(one, 6, tmp_path / "run")
    pair = two(run, *SLOWLY)
    pair.until(lambda: 8 <= last_step(run) < 24)
    pair.processes[0].kill()
    assert pair.codes()[1] != 0, pair.output()
    assert two(run).codes() == [0, 0]
    assert_equivalent(run, one)


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh", [dict(data=2, fsdp=4), dict(fsdp=4, tensor=2), dict(fsdp=1, tensor=8)]
)
def test_two_processes_train_on_other_meshes(one, two, tmp_path, mesh):
    pair = two(tmp_path / "run", *(f"mesh.{k}={v}" for k, v in mesh.items()))
    assert pair.codes() == [0, 0], pair.output()
    assert_equivalent(tmp_path / "run", one)


# Errors -----------------------------------------------------------------------------------------

REFUSED = """
import json, sys
from pathlib import Path
from btlm_jax.train import distributed, recipe_file, run_directory
from btlm_jax.train.loop import train
_, file, cases, _, coordinator, _, processes, _, process = sys.argv
distributed.initialize(coordinator, int(processes), int(process), lost_timeout=10)
run_directory._VISIBLE_WITHIN = 1.0
said = {}
for name, runs, overrides in json.loads(cases):
    try:
        train(recipe_file.load_recipe(Path(file), overrides[int(process)]), runs[int(process)])
    except (ValueError, OSError) as e:
        said[name] = f"{type(e).__name__}: {e}"
try:
    with distributed.raise_together():
        if process == "1":
            raise OSError("disk full")
except (ValueError, OSError) as e:
    said["agreed"] = f"{type(e).__name__}: {e}"
print("said", json.dumps(said))
"""


def test_all_processes_refuse_what_one_refuses(recipe, tmp_path):
    """Every process raises an error that names the cause; none waits for another."""
    other = tmp_path / "other"
    write_tokens(other, np.arange(16000) % 61, vocab_size=61, eos_id=0)
    run = str(tmp_path / "run")
    refused = [
        ("recipe", [run, run], [[], ["optimizer.peak_lr=0.02", "run.eval_every=7"]]),
        ("data", [run, run], [[], [f"data.held_out={other}"]]),
        ("hidden", [run, run], [[], ["data.train=nowhere"]]),
        ("mesh", [run, run], [["mesh.fsdp=3"], ["mesh.fsdp=3"]]),
        ("directory", [run, str(tmp_path / "elsewhere")], [[], []]),
    ]
    pair = Pair(tmp_path, REFUSED, [str(recipe), json.dumps(refused)])
    try:
        assert pair.codes() == [0, 0], pair.output()
    finally:
        for process in pair.processes:
            process.kill()
    lines = [log.read_text().split("said ")[1].splitlines()[0] for log in pair.logs]
    first, second = map(json.loads, lines)
    assert first.keys() == second.keys() == {*(name for name, *_ in refused), "agreed"}
    for name in ("recipe", "data", "mesh"):
        assert first[name] == second[name]
    assert first["recipe"].startswith(
        "ValueError: process 1 was started differently from process 0: "
        "recipe.optimizer.peak_lr (0.01 -> 0.02), recipe.run.eval_every (12 -> 7); start"
    )
    assert "process 0: held_out (" in first["data"]
    assert "found 8" in first["mesh"]
    assert second["hidden"].startswith("FileNotFoundError: nowhere")
    assert first["hidden"] == f"ValueError: process 1: {second['hidden']}"
    assert second["directory"].startswith(f"ValueError: {tmp_path}/elsewhere is not the directory")
    assert first["directory"] == f"ValueError: process 1: {second['directory']}"
    assert first["agreed"] == "ValueError: process 1: OSError: disk full"
    assert second["agreed"] == "OSError: disk full"
    assert not (tmp_path / "run/metrics.jsonl").exists()


def test_process_0_stops_when_the_others_do_not_join(recipe, tmp_path):
    """JAX ends the process; the line before names what it waited for."""
    where = ["--coordinator", f"127.0.0.1:{free_port()}", "--processes", "2", "--process", "0"]
    done = subprocess.run(
        [sys.executable, "-m", "btlm_jax.cli", "train", str(recipe), str(tmp_path / "run"), *where,
         "--join-timeout", "1"],
        env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode != 0
    assert "btlm: process 0 waits for the others at 127.0.0.1:" in done.stderr
    assert "up to 1 s (--join-timeout)" in done.stderr
    assert not (tmp_path / "run").exists()
