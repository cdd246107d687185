"""Fixtures of the data tests."""

from __future__ import annotations

import pytest

from support import golden


@pytest.fixture(scope="session")
def ascii_bpe(tmp_path_factory):
    """A folder with a tokenizer of printable ASCII: a token per character, and EOS."""
    folder = tmp_path_factory.mktemp("tokenizer")
    golden.write_tokenizer(folder, 96)
    return folder
