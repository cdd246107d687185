"""Sets the repository's address everywhere: `python docs/repository.py OWNER/NAME`.

The address is `project.urls.Repository` in pyproject.toml. The notebooks, the badges of the README
and mkdocs.yml repeat it; tests/test_docs.py compares them.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
FILES = ("pyproject.toml", "README.md", "mkdocs.yml", "notebooks/*.ipynb")


def repository() -> str:
    """Returns OWNER/NAME as pyproject.toml has it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return project["urls"]["Repository"].removeprefix("https://github.com/")


def main(address: str) -> None:
    """Replaces the old address with OWNER/NAME in every file that repeats it."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", address):
        raise SystemExit(f"repository: found {address!r}, expected OWNER/NAME")
    before = repository()
    for pattern in FILES:
        for path in sorted(ROOT.glob(pattern)):
            path.write_text(path.read_text().replace(before, address))


if __name__ == "__main__":
    main(*sys.argv[1:])
