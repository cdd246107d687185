"""Writes the table of modules into ARCHITECTURE.md: `python docs/modules.py`."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "ARCHITECTURE.md"
BEGIN, END = "<!-- modules -->\n", "<!-- end of modules -->"


def module_table() -> str:
    """Returns the table: folder, module and the first sentence of its docstring."""
    rows = ["| Folder | Module | |", "|---|---|---|"]
    for top in ("btlm_jax", "convert", "train"):
        paths = [p for p in (ROOT / top).rglob("*.py") if not p.stem.startswith("__")]
        for path in sorted(paths, key=lambda p: (p.parent, p.name)):
            docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
            sentence = " ".join(docstring.split("\n\n")[0].split())
            folder = path.parent.relative_to(ROOT)
            rows.append(f"| `{folder}` | `{path.stem}` | {sentence} |")
    return "\n".join(rows) + "\n"


def with_table(page: str) -> str:
    """Returns the page with the table between its markers."""
    head, rest = page.split(BEGIN)
    return head + BEGIN + module_table() + END + rest.split(END)[1]


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text()))
