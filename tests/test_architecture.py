"""The map of the house is kept: who may import whom, and how heavy an import is."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# A module imports only from those before it; `cli` may import anything when a command runs.
ORDER = [
    "byte_size",
    "columns",
    "chips",
    "hlo",
    "compilation",
    "paths",
    "progress",
    "plots",
    "scaling",
    "staging",
    "array_files",
    "presets",
    "config",
    "alibi",
    "kernels",
    "weights",
    "quantization",
    "tokenizer",
    "mup",
    "sharding",
    "layerwise",
    "products",
    "context",
    "remat",
    "attention_xla",
    "attention_fused",
    "attention",
    "kv_cache",
    "spec",
    "layers",
    "model",
    "loss",
    "manifest",
    "checkpoint",
    "generation",
    "evaluation",
    "accounting",
    "comparison",
    "comparison_report",
    "roofline",
    "convert",
    "train",
]
HEAVY = {"torch", "transformers", "datasets", "lm_eval", "matplotlib", "huggingface_hub"}


def modules():
    for path in sorted((ROOT / "btlm_jax").rglob("*.py")):
        name = path.relative_to(ROOT / "btlm_jax").parts[0].removesuffix(".py")
        if name not in ("__init__", "cli"):
            yield name, path
    for folder in ("convert", "train"):
        yield from ((folder, path) for path in sorted((ROOT / folder).glob("*.py")))


def imported(path: Path, top_level_only: bool = False) -> set[str]:
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            base = node.module or ""
            names |= {
                f"{base}.{alias.name}" if base == "btlm_jax" else base for alias in node.names
            }
    return names


@pytest.mark.parametrize("name, path", list(modules()), ids=lambda x: str(x).split("/")[-1])
def test_imports_point_upwards(name, path):
    ours = {n.split(".")[1] for n in imported(path) if n.startswith("btlm_jax.")} - {"__version__"}
    later = ORDER[ORDER.index(name) + 1 :]
    assert not ours & set(later), f"{path} imports from below itself"
    assert ours <= set(ORDER), f"{path} imports a module the map does not know"


@pytest.mark.parametrize("name, path", list(modules()), ids=lambda x: str(x).split("/")[-1])
def test_heavy_packages_are_imported_lazily(name, path):
    assert not {n.split(".")[0] for n in imported(path, top_level_only=True)} & HEAVY


def test_only_layers_imports_flax():
    users = {p.stem for _, p in modules() if any(n.split(".")[0] == "flax" for n in imported(p))}
    assert users == {"layers"}


def test_nothing_heavy_is_loaded_to_convert():
    code = f"""
import sys
from btlm_jax.convert import convert, export
import btlm_jax; btlm_jax.generate, btlm_jax.BTLM, btlm_jax.save
assert not set(sys.modules) & {HEAVY - {"huggingface_hub"}}, set(sys.modules) & {HEAVY}
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def undocumented(node: ast.AST, name: str):
    """What is public within, and has no docstring."""
    if not ast.get_docstring(node):
        yield name
    for child in node.body if isinstance(node, ast.Module | ast.ClassDef) else ():
        if isinstance(child, ast.ClassDef | ast.FunctionDef) and not child.name.startswith("_"):
            yield from undocumented(child, f"{name}.{child.name}")


def test_everything_public_has_a_docstring():
    """But for `run` of the command line's classes: what a command does, its class says."""
    for folder in ("btlm_jax", "convert", "train"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            found = undocumented(ast.parse(path.read_text()), path.stem)
            if path.parent.name == "cli":
                found = (name for name in found if not name.endswith(".run"))
            assert not (names := list(found)), f"{path}: no docstring: {', '.join(names)}"


def test_modules_stay_small():
    for _, path in modules():
        lines = len(path.read_text().splitlines())
        assert lines <= 420, f"{path} has {lines} lines: does it hold one idea?"
