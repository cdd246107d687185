"""What README says works as printed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from btlm_jax import cli

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)


def commands() -> list[str]:
    texts = [text for lang, text in BLOCKS if lang == "bash"]
    return [part.strip() for text in texts for part in re.split(r"&&|\n", text) if part.strip()]


def test_python_snippet(tmp_path):
    (snippet,) = [text for lang, text in BLOCKS if lang == "python"]
    env = os.environ | {"XLA_FLAGS": ""}
    done = subprocess.run(
        [sys.executable, "-c", snippet], capture_output=True, text=True, cwd=tmp_path, env=env
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("(1, 3, 512) ") and done.stdout.endswith("(1, 8)\n")


def test_every_command_exists(capsys):
    named = {c.split()[1] for c in commands() if c.split()[0] in ("btlm", ".venv/bin/btlm")}
    named |= set(re.findall(r"`btlm (\w[\w-]*)", README)) - {"COMMAND"}
    assert {"quickstart", "convert", "export", "info", "generate"} <= named
    for name in sorted(named):
        with pytest.raises(SystemExit) as exit:
            cli.main([name, "--help"])
        assert exit.value.code == 0, name


def test_ci_runs_the_test_command():
    """The README's install and test commands, and .ci/run's, are the same."""
    assert ".venv/bin/pip install -e '.[test]'" in commands()
    assert ".venv/bin/pytest -n 2" in commands()
    script = (ROOT / ".ci/run").read_text()
    assert '"$bin/pytest" -n 2' in script and '-e ".[$3]"' in script


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_extras_exist():
    project = (ROOT / "pyproject.toml").read_text()
    for extras in re.findall(r"'\.\[([\w,]+)\]'", README):
        for extra in extras.split(","):
            assert re.search(rf"^{extra} = \[", project, re.MULTILINE), extra
