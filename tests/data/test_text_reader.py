"""A reader of several files can start after any document."""

from __future__ import annotations

from btlm_jax.data.text_files import expand_inputs
from btlm_jax.data.text_reader import TextReader
from support.texts import DOCUMENTS, write_all_kinds


def test_reading_can_begin_after_any_document(tmp_path):
    for kind in write_all_kinds(tmp_path):
        files = expand_inputs(str(tmp_path / kind))
        documents = list(TextReader(files, "text").documents())
        assert [d.text for d in documents] == DOCUMENTS
        for i in range(0, len(documents), 4):
            before = [documents[j].counts for j in range(i + 1) if kind == "*.txt"]
            reader = TextReader(
                files, "text", begin=documents[i].next, counts=before or [documents[i].counts]
            )
            assert list(reader.documents()) == documents[i + 1 :]
            assert reader.total.documents == 30
