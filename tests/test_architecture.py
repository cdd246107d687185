"""The map of the house is kept: who may import whom, and how heavy an import is."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
# A folder imports only from itself and from folders before it; `cli` may import anything when a
# command runs. `config` stands for the modules that lie directly in `btlm_jax`.
FOLDERS = [
    "utils",
    "config",
    "scaling",
    "model",
    "data",
    "checkpoint",
    "generation",
    "evaluation",
    "serving",
    "perf",
    "mup_study",
    "convert",
    "train",
    "cli",
]
# Methods of tokenizers that add special tokens by default.
ENCODERS = ("encode", "encode_batch", "encode_batch_fast")
HEAVY = {"torch", "transformers", "datasets", "lm_eval", "matplotlib", "huggingface_hub"}


def modules() -> list[tuple[str, Path]]:
    """Returns (folder, path) of every module of the package but its `__init__`."""
    found = []
    for path in sorted((ROOT / "btlm_jax").rglob("*.py")):
        parts = path.relative_to(ROOT / "btlm_jax").parts
        if parts != ("__init__.py",):
            found.append((parts[0] if len(parts) > 1 else "config", path))
    for folder in ("convert", "train"):
        found += [(folder, path) for path in sorted((ROOT / folder).rglob("*.py"))]
    return found


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


def folder_of(name: str) -> str | None:
    """Returns the folder of an imported module; None for other packages and public names."""
    parts = name.split(".")
    if parts[0] != "btlm_jax" or len(parts) < 2:
        return None
    if (ROOT / "btlm_jax" / f"{parts[1]}.py").exists():
        return "config"
    return parts[1] if parts[1] in FOLDERS else None


def test_folders_import_only_from_folders_below_them():
    for folder, path in modules():
        if folder != "cli":
            allowed = FOLDERS[: FOLDERS.index(folder) + 1]
            used = {found for name in imported(path) if (found := folder_of(name))}
            assert used <= set(allowed), f"{path} imports from {used - set(allowed)}"


def test_imports_are_absolute():
    for _, path in modules():
        for node in ast.walk(ast.parse(path.read_text())):
            assert not (isinstance(node, ast.ImportFrom) and node.level), f"{path}:{node.lineno}"


def test_no_two_modules_share_a_base_name():
    stems = [path.stem for _, path in modules() if not path.stem.startswith("__")]
    assert len(stems) == len(set(stems)), sorted({s for s in stems if stems.count(s) > 1})


def test_heavy_packages_are_imported_lazily():
    for _, path in modules():
        heavy = {n.split(".")[0] for n in imported(path, top_level_only=True)} & HEAVY
        assert not heavy, f"{path} imports {heavy} at the top"


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


def encodes_bare(call: ast.Call) -> bool:
    """Returns whether a call may encode text without a decision about special tokens.

    `"text".encode()` and the like have no argument, or a constant or named one.
    """
    if not isinstance(call.func, ast.Attribute) or call.func.attr not in ENCODERS:
        return False
    is_text = all(isinstance(argument, ast.Constant) for argument in call.args)
    return not is_text and "add_special_tokens" not in {k.arg for k in call.keywords}


def test_special_tokens_are_decided_about_wherever_text_is_encoded():
    """`encode_prompt` and `encode_fragment` decide; other code must name `add_special_tokens`."""
    sources = {str(path): path.read_text() for _, path in modules()}
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        cells = json.loads(path.read_text())["cells"]
        code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
        sources[str(path)] = "\n".join(
            re.sub(r"(?m)^([ \t]*)[%!].*$", r"\1pass", text) for text in code
        )
    for path, source in sources.items():
        calls = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call))
        assert not (lines := [call.lineno for call in calls if encodes_bare(call)]), (path, lines)
    assert encodes_bare(ast.parse("tokenizer.encode(text)", mode="eval").body)


def undocumented(node: ast.AST, name: str):
    """Yields the names of public definitions without a docstring."""
    if not ast.get_docstring(node):
        yield name
    for child in node.body if isinstance(node, ast.Module | ast.ClassDef) else ():
        if isinstance(child, ast.ClassDef | ast.FunctionDef) and not child.name.startswith("_"):
            yield from undocumented(child, f"{name}.{child.name}")


def test_everything_public_has_a_docstring():
    """Only `run` of a command has none: its class describes it."""
    for folder in ("btlm_jax", "convert", "train"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            found = undocumented(ast.parse(path.read_text()), path.stem)
            if path.parent.name == "cli":
                found = (name for name in found if not name.endswith(".run"))
            assert not (names := list(found)), f"{path}: no docstring: {', '.join(names)}"


def test_modules_stay_small():
    for _, path in modules():
        lines = len(path.read_text().splitlines())
        assert lines <= 400, f"{path} has {lines} lines: does it hold one idea?"
