"""The commands and the Python of the README work as printed."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path
from random import Random

import pytest

from btlm_jax import cli
from btlm_jax.data import sample_text
from btlm_jax.train.metrics import read_metrics
from support import compiling

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
TRAINING = (ROOT / "docs/training.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)


def commands() -> list[str]:
    texts = [text for lang, text in BLOCKS if lang == "bash"]
    return [part.strip() for text in texts for part in re.split(r"&&|\n", text) if part.strip()]


def test_the_python_snippet_runs(tmp_path):
    (snippet,) = [text for lang, text in BLOCKS if lang == "python"]
    env = compiling.one_device()
    done = subprocess.run(
        [sys.executable, "-c", snippet], capture_output=True, text=True, cwd=tmp_path, env=env
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("(1, 3, 512) ") and done.stdout.endswith("(1, 8)\n")


def test_every_command_that_is_named_exists(capsys):
    named = {c.split()[1] for c in commands() if c.split()[0] in ("btlm", ".venv/bin/btlm")}
    named |= set(re.findall(r"`btlm (\w[\w-]*)", README)) - {"COMMAND"}
    assert {"quickstart", "convert", "export", "info", "generate"} <= named
    for name in sorted(named):
        with pytest.raises(SystemExit) as exit:
            cli.main([name, "--help"])
        assert exit.value.code == 0, name


@pytest.mark.slow
def test_training_on_own_text_reaches_the_stated_loss_despite_kills(tmp_path):
    (block,) = [text for lang, text in BLOCKS if "--new-tokenizer" in text]
    tokenize, train, generate = (shlex.split(line) for line in block.splitlines())
    (stated,) = re.findall(r"held-out loss of ([\d.]+) ± ([\d.]+) nats", TRAINING)
    (tmp_path / "text.txt").write_text(sample_text.read_sample_text())

    def start(command: list[str]) -> subprocess.Popen:
        module = [sys.executable, "-m", "btlm_jax.cli", *command[1:]]
        env = os.environ | {"XLA_FLAGS": ""}
        return subprocess.Popen(module, stdout=-1, stderr=-2, text=True, cwd=tmp_path, env=env)

    def finish(command: list[str]) -> str:
        process = start(command)
        out, _ = process.communicate()
        assert process.returncode == 0, out
        return out

    finish(tokenize)
    checkpoints, metrics, rng = (
        tmp_path / "run/checkpoints",
        tmp_path / "run/metrics.jsonl",
        Random(0),
    )
    for first, last in ((210, 380), (410, 580)):  # checkpoints are at 200, 400 and 600
        process, goal = start(train), rng.randint(first, last)
        while not any(x["step"] >= goal for x in read_metrics(metrics)):
            assert process.poll() is None
            time.sleep(0.1)
        time.sleep(rng.random())
        assert any(p.name.isdigit() for p in checkpoints.iterdir())
        process.kill()
        process.communicate()
    out = finish(train)
    steps = [x["step"] for x in read_metrics(metrics) if "loss" in x]
    assert steps == [1, *range(10, 801, 10)]  # as if it had not been killed
    (found,) = re.findall(r"^step 800: .* held out ([\d.]+)$", out, re.MULTILINE)
    assert abs(float(found) - float(stated[0])) <= float(stated[1])
    assert finish(generate).startswith("The statement")


def test_ci_runs_the_test_command():
    """`.ci/run` installs and tests with the README's commands."""
    assert ".venv/bin/pip install -e '.[test]'" in commands()
    assert ".venv/bin/pytest -n 2" in commands()
    script = (ROOT / ".ci/run").read_text()
    assert '"$bin/pytest" -n 2' in script and '-e ".[$3]"' in script
