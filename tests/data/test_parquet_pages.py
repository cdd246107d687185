"""Parquet rows are read at once, so that one that is too large is refused before it is read."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from btlm_jax.data import text_records
from btlm_jax.data.parquet_pages import largest_page
from btlm_jax.data.text_files import expand_inputs


@pytest.mark.parametrize("dictionary", [True, False])
@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("compression", ["none", "snappy", "zstd"])
def test_the_largest_page_is_that_of_the_longest_text(tmp_path, dictionary, version, compression):
    texts = [f"a small row {i}" for i in range(5000)]
    texts[2500] = "x" * 3_000_000
    path = tmp_path / "a.parquet"
    pq.write_table(
        pa.table({"n": range(5000), "text": texts}), path, compression=compression,
        use_dictionary=dictionary, data_page_version=version, data_page_size=1000,
        write_page_index=True,
    )  # fmt: skip
    column = pq.ParquetFile(path).metadata.row_group(0).column(1)
    with open(path, "rb") as file:
        assert 3_000_000 < largest_page(file, column) < 3_200_000


def test_a_row_that_is_too_large_is_refused_before_it_is_read(tmp_path, monkeypatch):
    """Small rows of a large row group are no reason to refuse it."""
    monkeypatch.setattr(text_records, "_PARQUET_BATCH_BYTES", 100_000)
    monkeypatch.setattr(text_records, "_PARQUET_PAGE_BYTES", 1 << 20)
    path = tmp_path / "a.parquet"
    texts = [f"row {i} " + "y" * 1000 for i in range(4000)]
    pages = dict(use_dictionary=False, write_batch_size=10, data_page_size=10_000)
    pq.write_table(pa.table({"text": texts}), path, **pages)
    (file,) = expand_inputs(path)
    assert sum(1 for _ in text_records.read_records(file, "text", 0, 0)) == 4000
    texts[3000] = "x" * 3_000_000
    pq.write_table(pa.table({"text": texts}), path, row_group_size=2500, **pages)
    (file,) = expand_inputs(path)
    records = text_records.read_records(file, "text", 0, 0)
    message = (
        r"a\.parquet: of rows 2,501 to 4,000 \(row group 1\) .* are read at once, expected at most "
        r"1\.0 MiB: divide .*\.jsonl"
    )
    with pytest.raises(ValueError, match=message):
        list(records)
