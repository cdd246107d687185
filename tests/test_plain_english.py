"""Code, docs and messages use plain English: a few phrases that readers stumble over stay out."""

from __future__ import annotations

import ast
import functools
import io
import json
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BANNED = {
    "a sentence that begins with 'Of'": r"(?:^|[.!?:] |\n\n)Of (?!course)[a-z]",
    "a free relative": r"\b(?:[Tt]hat which|(?:[Ss]ays|is) what (?:is|has|it|a|the)\b)",
    "as it rests, lies, stands": r"\bas (?:it|they) (?:rests?|lies?|stands?)\b",
    "at rest, anew, one's own": r"\b(?:at rest|anew|one's own)\b",
    "go on for continue": r"\b(?:go|goes|going|gone|went) on\b",
    "found out, meant, told": r"\b(?:be found out|(?:is|are) meant\b(?! to)|(?:is|are) told)\b",
    "British spelling": r"\b\w*(?:quanti|parametri|initiali|normali|optimi)s(?:e|ed|ing|ation)\b",
    "what is of something": r"\b[Ww]hat is of\b|\bis of (?:a|the) (?:run|model|checkpoint)\b",
    "so many, in turn of": r", so many\b",
    "our, ours, theirs as nouns": r"\b(?:of ours|of yours|of theirs)\b",
}


def python_prose(path: Path) -> str:
    """Returns comments and strings of a module, each as a paragraph."""
    source = path.read_text()
    comments: list[str] = []
    previous = None
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            text = token.string.lstrip("# ")
            if previous == token.start[0] - 1:
                comments[-1] += " " + text
            else:
                comments.append(text)
            previous = token.start[0]
    strings = [
        node.value
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    return "\n\n".join(comments + strings)


def markdown_prose(text: str) -> str:
    """Returns Markdown without code."""
    return re.sub(r"```.*?```|`[^`]*`", "", text, flags=re.DOTALL)


@functools.cache
def prose(path: Path) -> str:
    """Returns the text of a file that people read, with line breaks inside paragraphs removed."""
    if path.suffix == ".py":
        text = python_prose(path)
    elif path.suffix == ".ipynb":
        cells = json.loads(path.read_text())["cells"]
        markdown = ["".join(c["source"]) for c in cells if c["cell_type"] == "markdown"]
        text = markdown_prose("\n\n".join(markdown))
    else:
        text = markdown_prose(path.read_text())
    return re.sub(r"(?<!\n)\n(?!\n)\s*", " ", text)


def files() -> list[Path]:
    folders = ("btlm_jax", "convert", "train", "tests", "docs", "notebooks")
    found = [path for folder in folders for path in (ROOT / folder).rglob("*")]
    found += [ROOT / name for name in ("README.md", "ARCHITECTURE.md", "CHANGELOG.md")]
    return [
        path
        for path in sorted(found)
        if path.suffix in (".py", ".md", ".ipynb") and path != Path(__file__).resolve()
    ]


@pytest.mark.parametrize("rule", BANNED)
def test_a_phrase_is_absent(rule):
    pattern = re.compile(BANNED[rule], re.MULTILINE)
    hits = []
    for path in files():
        text = prose(path)
        for match in pattern.finditer(text):
            context = text[max(match.start() - 30, 0) : match.end() + 30].replace("\n", " ")
            hits.append(f"{path.relative_to(ROOT)}: …{context}…")
    assert not hits, f"{rule}: {len(hits)} places\n" + "\n".join(hits)
