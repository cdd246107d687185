"""The docs, the README and the notebooks agree with each other and with the package."""

from __future__ import annotations

import ast
import importlib.util
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PAGES = [ROOT / name for name in ("README.md", "ARCHITECTURE.md", "CHANGELOG.md")]
PAGES += sorted((ROOT / "docs").glob("*.md"))


def anchors(page: Path) -> set[str]:
    """Returns the anchors of a page's headings, as GitHub and the site make them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", h).strip().lower().replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_lead_to_files_and_headings(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        path = page if not name else page.parent / name
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), target


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_the_repository_is_the_same_everywhere():
    address = PROJECT["urls"]["Repository"].removeprefix("https://github.com/")
    files = [ROOT / "README.md", ROOT / "mkdocs.yml", *(ROOT / "notebooks").glob("*.ipynb")]
    for path in files:
        named = re.findall(r"(?<![\w.])github(?:\.com)?/([\w.-]+/[\w-]+)", path.read_text())
        assert named and set(named) == {address}, path


def test_extras_that_the_docs_name_exist():
    extras = PROJECT["optional-dependencies"]
    for page in PAGES:
        for names in re.findall(r"'(?:\.|btlm-jax)\[([\w,]+)\]'", page.read_text()):
            assert set(names.split(",")) <= set(extras), (page.name, names)


def test_every_public_name_is_on_the_api_page():
    page = (ROOT / "docs/api.md").read_text()
    documented = {name.split(".")[-1] for name in re.findall(r"^::: ([\w.]+)$", page, re.MULTILINE)}
    tree = ast.parse((ROOT / "btlm_jax/__init__.py").read_text())
    names = {
        key.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict)
        for key in node.value.keys
        if isinstance(key, ast.Constant)
    }
    assert names - documented == set()


def test_the_table_of_modules_is_current():
    spec = importlib.util.spec_from_file_location("modules", ROOT / "docs/modules.py")
    assert spec is not None and spec.loader is not None
    modules = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(modules)
    page = modules.PAGE.read_text()
    assert page == modules.with_table(page), "run `python docs/modules.py`"
