"""The notebooks run from top to bottom and are committed with their outputs.

`python tests/test_notebooks.py [NAME…]` executes them and writes their outputs.
"""

from __future__ import annotations

import base64
import os
import re
import shutil
import sys
import tempfile
import tomllib
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
from nbclient import NotebookClient

from btlm_jax.train import recipe_file

ROOT = Path(__file__).parent.parent
NAMES = ("01_convert_generate_stream", "02_finetune", "03_mup", "04_long_context")
PICTURES = dict(zip(NAMES, (1, 1, 2, 3), strict=True))
MOST_BYTES = 700_000


def read_notebook(name: str) -> nbformat.NotebookNode:
    return nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)


def outputs(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [out for cell in notebook.cells if cell.cell_type == "code" for out in cell.outputs]


def pictures(notebook: nbformat.NotebookNode) -> list[bytes]:
    found = [out.get("data", {}).get("image/png") for out in outputs(notebook)]
    return [base64.b64decode(png) for png in found if png]


def execute(name: str, directory: str | os.PathLike[str], small: bool = True):
    """Executes a notebook without network on one CPU device, by default with the small model."""
    env = os.environ | {
        "BTLM_SMALL": "1" if small else "", "HF_HUB_OFFLINE": "1", "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "",  # training is most of the work, so optimized programs are faster
    }  # fmt: skip
    notebook = read_notebook(name)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    client = NotebookClient(
        notebook, timeout=None, record_timing=False, coalesce_streams=True,
        resources={"metadata": {"path": str(directory)}},
    )  # fmt: skip
    client.execute(env=env)
    return notebook


@pytest.fixture(scope="module")
def small_checkpoint(tmp_path_factory) -> Path:
    """Where the first notebook that trains the small model leaves it for the others."""
    return tmp_path_factory.mktemp("trained") / "small"


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs_and_its_assertions_hold(name, tmp_path, small_checkpoint):
    own = tmp_path / f"btlm-{name[:2]}" / "small"
    if small_checkpoint.exists():
        shutil.copytree(small_checkpoint, own)
    assert len(pictures(execute(name, tmp_path))) == PICTURES[name]
    if own.exists() and not small_checkpoint.exists():
        shutil.move(own, small_checkpoint)


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_committed_with_its_outputs(name):
    path = ROOT / "notebooks" / f"{name}.ipynb"
    notebook = read_notebook(name)
    nbformat.validate(notebook)
    assert path.stat().st_size <= MOST_BYTES
    assert len(found := pictures(notebook)) == PICTURES[name]
    assert all(png.startswith(b"\x89PNG") for png in found)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    # Executed once, in order, in a fresh kernel.
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    kinds = {(out.output_type, out.get("name", "")) for out in outputs(notebook)}
    assert kinds <= {("stream", "stdout"), ("display_data", ""), ("execute_result", "")}
    assert not re.search(r"/(home|root|tmp|Users|work)/|Warning", str(outputs(notebook)))


def test_all_notebooks_are_tested():
    assert {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_opens_in_colab_and_installs_existing_extras(name):
    """The badge, the install cell and the README name the same repository."""
    notebook = read_notebook(name)
    url = r"https://colab\.research\.google\.com/github/([\w-]+/[\w-]+)/blob/main/(notebooks/\w+\.ipynb)"
    place, path = re.findall(url, notebook.cells[0].source)[0]
    assert path == f"notebooks/{name}.ipynb"
    readme = (ROOT / "README.md").read_text()
    assert (place, path) in re.findall(url, readme)
    (install,) = [cell.source for cell in notebook.cells if "%pip install" in cell.source]
    assert f'"git+https://github.com/{place}"' in install
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = re.findall(r'"(train[\w,]*)"', install)
    assert len(named) == 3
    assert {extra for text in named for extra in text.split(",")} <= set(
        project["optional-dependencies"]
    )


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("large", [False, True])
def test_fine_tuning_warms_up_and_can_be_interrupted(large, devices):
    """Warmup is a tenth of the steps on any number of devices; a checkpoint precedes the end."""
    (source,) = (
        c.source
        for c in read_notebook("02_finetune").cells
        if "recipe_file.load_recipe" in c.source
    )
    jax = SimpleNamespace(device_count=lambda: devices)
    names = dict(large=large, jax=jax, recipe_file=recipe_file, WORK=Path("w"))
    exec(source, names)
    recipe = names["recipe"]
    (phase,) = recipe.phases
    assert recipe.optimizer.warmup_tokens * 10 == phase.steps * phase.batch_size * phase.length
    assert 0 < recipe.run.checkpoint_every < phase.steps


if __name__ == "__main__":
    for name in sys.argv[1:] or NAMES:
        with tempfile.TemporaryDirectory() as directory:
            # Two widths are enough to test 03_mup, but not for its pictures.
            notebook = execute(name, directory, small=name != "03_mup")
            nbformat.write(notebook, ROOT / "notebooks" / f"{name}.ipynb")
