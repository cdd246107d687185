"""The same command resumes a conversion or export that failed, unless its source has changed."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from btlm_jax.convert import convert, export
from support import golden
from support.conversion_runs import (
    LAST_FILE,
    SHARD_BYTES,
    assert_complete,
    disk_full_for,
    failing_after,
    finished_pieces,
    hidden_sibling,
    interrupt_after,
    run,
    write_one_layer_model,
)

WORKS = pytest.mark.parametrize("work", ["convert", "export"])


@WORKS
def test_only_unfinished_tensors_are_written(work, conversions, tmp_path, caplog):
    source, expected = conversions.source_and_result(work)
    interrupt_after(5, work, source, tmp_path / "c")
    assert "unfinished: 5 finished pieces are kept" in caplog.text
    assert "the same command continues" in caplog.text
    total = run(work, source, tmp_path / "uninterrupted").tensors
    with failing_after(total - 5, AssertionError("one too many")):
        report = run(work, source, tmp_path / "c")
    assert report.resumed == 5 and "5 of them by an interrupted run" in str(report)
    assert_complete(tmp_path / "c", expected)


@WORKS
def test_an_interrupt_in_a_thread_ends_the_run_which_resumes(work, conversions, tmp_path):
    source, expected = conversions.source_and_result(work)
    with failing_after(5, KeyboardInterrupt()), pytest.raises(KeyboardInterrupt):
        run(work, source, tmp_path / "c")
    pieces = len(finished_pieces(tmp_path / "c"))
    assert run(work, source, tmp_path / "c").resumed == pieces >= 5
    assert_complete(tmp_path / "c", expected)


def change_weights(source: Path) -> None:
    write_one_layer_model(source, negated=True)


def change_time(source: Path) -> None:
    """Leaves the bytes the same, which could only be known by reading all of them."""
    os.utime(source / "model.safetensors", ns=(0, 0))


def change_config(source: Path) -> None:
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"initializer_range": 0.5}))


@pytest.mark.parametrize("change", [change_weights, change_time, change_config])
def test_a_changed_source_starts_over(change, tmp_path, caplog):
    source, target = write_one_layer_model(tmp_path / "hf"), tmp_path / "c"
    interrupt_after(5, "convert", source, target)
    change(source)
    assert convert(source, target).resumed == 0
    assert "unfinished work of another kind: starting over" in caplog.text
    convert(source, tmp_path / "expected")
    assert_complete(target, tmp_path / "expected")


def test_another_checkpoint_or_shard_size_starts_over(conversions, tmp_path, caplog):
    other = conversions.negated_checkpoint
    interrupt_after(5, "export", conversions.checkpoint, tmp_path / "c")
    with failing_after(5, RuntimeError("stop")), pytest.raises(RuntimeError):
        export(other, tmp_path / "c", max_shard_bytes=SHARD_BYTES)
    assert caplog.text.count("starting over") == 1
    assert export(other, tmp_path / "c").resumed == 0
    assert caplog.text.count("starting over") == 2
    assert [p.name for p in (tmp_path / "c").glob("*.safetensors")] == ["model.safetensors"]


def test_a_changed_tokenizer_is_copied(tmp_path):
    """The small files are not part of the facts that must be unchanged."""
    source, target = write_one_layer_model(tmp_path / "hf"), tmp_path / "c"
    interrupt_after(5, "convert", source, target)
    golden.write_tokenizer(source, 50)
    (source / "merges.txt").write_text("new")
    assert convert(source, target).resumed == 5
    convert(source, tmp_path / "expected")
    assert_complete(target, tmp_path / "expected")


def test_a_removed_tokenizer_file_does_not_stay(tmp_path):
    source, target = write_one_layer_model(tmp_path / "hf"), tmp_path / "c"
    convert(source, tmp_path / "expected")
    (source / "merges.txt").write_text("to be removed")
    with disk_full_for(LAST_FILE["convert"]), pytest.raises(OSError):
        convert(source, target)
    (source / "merges.txt").unlink()
    convert(source, target)
    assert_complete(target, tmp_path / "expected")


@pytest.mark.parametrize("cut", ["", '{"sha256": "1f', "\0" * 40], ids=["empty", "half", "zeros"])
@WORKS
def test_a_truncated_record_counts_as_none(work, cut, conversions, tmp_path):
    source, expected = conversions.source_and_result(work)
    interrupt_after(5, work, source, tmp_path / "c")
    name = finished_pieces(tmp_path / "c")[2]
    (hidden_sibling(tmp_path / "c") / "finished" / f"{name}.json").write_text(cut)
    assert run(work, source, tmp_path / "c").resumed == 4
    assert_complete(tmp_path / "c", expected)


def test_a_truncated_key_starts_over(conversions, tmp_path):
    interrupt_after(5, "convert", conversions.hf, tmp_path / "c")
    (hidden_sibling(tmp_path / "c") / "key.json").write_text('{"by": "conv')
    assert convert(conversions.hf, tmp_path / "c").resumed == 0
    assert_complete(tmp_path / "c", conversions.checkpoint)
