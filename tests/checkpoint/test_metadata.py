"""Metadata of checkpoints: complete, deterministic, and protected by a checksum."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

import btlm_jax as btlm
from btlm_jax import AlibiScaling
from btlm_jax.checkpoint import metadata, zarr
from btlm_jax.convert import convert
from btlm_jax.model import weights
from support import golden
from support.checkpoint_metadata import edit_metadata, read_custom_metadata, restored
from support.compare import read_directory

CASE = golden.load("g_bf16")


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("metadata")
    convert(golden.write_hf(folder / "hf", CASE, tokenizer=True), folder / "c")
    return folder / "c"


@contextlib.contextmanager
def edited(checkpoint: Path, *, update_checksum: bool) -> Iterator[Callable]:
    """Yields a function that applies a change to the custom metadata; restores it at the end."""
    with restored(checkpoint / metadata.MARKER_FILE):
        yield lambda change: edit_metadata(checkpoint, change, update_checksum=update_checksum)


def test_metadata_of_a_converted_checkpoint_is_read_back(converted):
    meta = metadata.read_metadata(converted)
    assert meta.config == CASE.config and len(meta.config.alibi_slopes) == CASE.config.n_head
    leaves = {leaf.path: leaf for leaf in weights.disk_leaves(CASE.config)}
    assert set(meta.leaves) == set(meta.sha256) == set(leaves)
    for path, leaf in leaves.items():
        array = CASE.weights[leaf.hf_name]
        assert meta.leaves[path].shape == leaf.weight.shape
        assert meta.leaves[path].dtype == array.dtype
        assert meta.sha256[path] == hashlib.sha256(array.tobytes()).hexdigest()
    tokenizer = (converted / "tokenizer/tokenizer.json").read_bytes()
    assert meta.asset_sha256 == {"tokenizer.json": hashlib.sha256(tokenizer).hexdigest()}
    assert meta.origin["hf_config"] == CASE.hf_config
    assert meta.origin["slopes_dtype"] == "bfloat16" and meta.origin["revision"] is None
    assert meta.structure_sha256 == metadata.structure_sha256(converted, meta.leaves)
    assert not meta.ocdbt and meta.path == converted
    slopes = CASE.weights[golden.SLOPES].nbytes
    assert meta.nbytes == sum(x.nbytes for x in CASE.weights.values()) - slopes
    largest = max(x.nbytes for x in CASE.weights.values())
    assert meta.largest_block == dataclasses.replace(meta, ocdbt=True).largest_block == largest


def test_largest_block_is_a_block_of_our_layout_or_an_array_of_orbax_layout(converted):
    large = {("x",): jax.ShapeDtypeStruct((1 << 20, 9), np.float32)}
    meta = dataclasses.replace(metadata.read_metadata(converted), leaves=large)
    assert meta.largest_block == zarr.BLOCK_BYTES
    assert dataclasses.replace(meta, ocdbt=True).largest_block == 36 << 20


def test_completep_fields_are_stored(tmp_path):
    config = dataclasses.replace(CASE.config, completep_base_layers=1, completep_alpha=0.75)
    btlm.save(tmp_path / "c", config, CASE.params)
    assert metadata.read_metadata(tmp_path / "c").config == config
    assert btlm.load(tmp_path / "c")[0].config == config


def test_a_checkpoint_without_completep_fields_is_read(converted):
    with edited(converted, update_checksum=True) as apply:
        apply(
            lambda custom: [
                custom["config"].pop(f"completep_{x}") for x in ("base_layers", "alpha")
            ]
        )
        assert metadata.read_metadata(converted).config == CASE.config


# Checksum ----------------------------------------------------------------------------------------

EDITS = {
    "a value of the configuration": lambda custom: custom["config"].update(mup_output_alpha=2.23),
    "a slope in its last place": lambda custom: custom["config"]["alibi_slopes"].__setitem__(
        3, float(np.nextafter(custom["config"]["alibi_slopes"][3], 1))
    ),
    "a hash": lambda custom: custom["sha256"].update(wte="0" * 64),
    "a missing hash": lambda custom: custom["sha256"].pop("wte"),
    "no hashes": lambda custom: custom["sha256"].clear(),
    "the hash of a file": lambda custom: custom["asset_sha256"].clear(),
    "the structure": lambda custom: custom.update(structure_sha256=None),
    "the origin": lambda custom: custom["origin"].update(source="elsewhere"),
    "the original config": lambda custom: custom["origin"]["hf_config"].update(vocab_size=98),
    "the writer": lambda custom: custom.update(created_by="somebody"),
    "an additional key": lambda custom: custom.update(more=1),
    "the checksum": lambda custom: custom.update(seal="0" * 64),
    "no checksum": lambda custom: custom.pop("seal"),
}


@pytest.mark.parametrize("change", EDITS.values(), ids=EDITS.keys())
def test_an_edit_is_detected_by_the_checksum(converted, change):
    with edited(converted, update_checksum=False) as apply:
        apply(change)
        with pytest.raises(ValueError, match="_CHECKPOINT_METADATA does not match its checksum"):
            metadata.read_metadata(converted)
    metadata.read_metadata(converted)


def test_an_edit_with_a_new_checksum_is_accepted(converted):
    with edited(converted, update_checksum=True) as apply:
        apply(lambda custom: custom["config"].update(mup_output_alpha=2.23))
        assert metadata.read_metadata(converted).config.mup_output_alpha == 2.23


def test_the_order_of_keys_does_not_change_the_checksum(converted):
    """Another JSON library may write the same values in another order."""
    with restored(converted / metadata.MARKER_FILE) as file:
        file.write_text(json.dumps(json.loads(file.read_text()), sort_keys=True, indent=1))
        assert metadata.read_metadata(converted).config == CASE.config


def test_unknown_and_invalid_configurations_are_refused(converted):
    with edited(converted, update_checksum=True) as apply:
        apply(lambda custom: custom["config"].update(experts=8))
        with pytest.raises(ValueError, match=r"unknown config fields \['experts'\]"):
            metadata.read_metadata(converted)
        apply(lambda custom: (custom["config"].pop("experts"), custom["config"].update(n_head=7)))
        with pytest.raises(ValueError, match="n_embd: found 96, expected a multiple of n_head = 7"):
            metadata.read_metadata(converted)


KEYS = ["format", "config", "origin", "sha256", "asset_sha256", "structure_sha256"]


@pytest.mark.parametrize("key", KEYS)
def test_missing_keys_are_refused(converted, key):
    with edited(converted, update_checksum=False) as apply:
        apply(lambda custom: custom.pop(key))
        message = "checkpoint format None" if key == "format" else "does not match its checksum"
        with pytest.raises(ValueError, match=message):
            metadata.read_metadata(converted)


@pytest.mark.parametrize("key", KEYS[1:])
def test_missing_keys_under_a_valid_checksum_are_named(converted, key):
    """Another writer of this format may omit one: the error names it instead of a KeyError."""
    with edited(converted, update_checksum=True) as apply:
        apply(lambda custom: custom.pop(key))
        with pytest.raises(ValueError, match=key):
            metadata.read_metadata(converted)


def test_a_damaged_key_in_the_list_of_arrays_is_damage(converted):
    with restored(converted / "state/_METADATA") as file:
        file.write_bytes(file.read_bytes().replace(b'"use_ocdbt"', b'"use_ocdbv"'))
        with pytest.raises(ValueError, match="damaged checkpoint"):
            metadata.read_metadata(converted)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"{}", b"\xff\xfe", b'"x"'])
@pytest.mark.parametrize("name", [metadata.MARKER_FILE, "state/_METADATA"])
def test_empty_and_invalid_metadata_files_are_refused(converted, name, content):
    with restored(converted / name) as file:
        file.write_bytes(content)
        with pytest.raises(ValueError, match=str(converted)):
            metadata.read_metadata(converted)


# is_btlm_checkpoint ------------------------------------------------------------------------------


def test_only_checkpoints_of_this_package_are_recognized(converted, tmp_path):
    assert metadata.is_btlm_checkpoint(converted)
    assert metadata.is_btlm_checkpoint(converted.as_uri())
    assert not metadata.is_btlm_checkpoint(converted.parent / "hf")
    assert not metadata.is_btlm_checkpoint(tmp_path)
    assert not metadata.is_btlm_checkpoint(tmp_path / "nothing")
    assert not metadata.is_btlm_checkpoint(converted / metadata.MARKER_FILE)
    ocp.save(tmp_path / "foreign", {"x": np.zeros(3)})
    assert not metadata.is_btlm_checkpoint(tmp_path / "foreign")
    ocp.save(tmp_path / "custom", {"x": np.zeros(3)}, custom_metadata={"mine": 1})
    assert not metadata.is_btlm_checkpoint(tmp_path / "custom")


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"3", b"null", b"{}", b"\xff"]
    + [b'{"custom_metadata": %s}' % x for x in (b"null", b"{}", b"[]", b"7")],
)
def test_damaged_markers_are_not_recognized(tmp_path, content):
    """A directory that may belong to another program is never replaced."""
    (tmp_path / metadata.MARKER_FILE).write_bytes(content)
    assert not metadata.is_btlm_checkpoint(tmp_path)


# structure_sha256 ------------------------------------------------------------------------------


def test_structure_sha256_covers_every_description_of_an_array(converted, tmp_path):
    copy, leaves = tmp_path / "c", list(metadata.read_metadata(converted).leaves)
    shutil.copytree(converted, copy)
    expected = metadata.structure_sha256(copy, leaves)
    assert expected == read_custom_metadata(converted)["structure_sha256"]
    assert len(expected) == 64
    assert expected == metadata.structure_sha256(copy, reversed(leaves))
    described = [copy / "state/_METADATA", *(copy / "state").glob("*/zarr.json")]
    assert len(described) == 1 + len(leaves)
    seen = {expected}
    for file in described:  # even a change that JSON ignores
        with restored(file):
            file.write_bytes(file.read_bytes() + b" ")
            seen.add(metadata.structure_sha256(copy, leaves))
            file.unlink()
            assert metadata.structure_sha256(copy, leaves) is None
            file.touch()
    assert len(seen) == 1 + len(described)
    # Two descriptions that are swapped are detected too.
    one, two = (copy / "state" / name / "zarr.json" for name in ("wte", "ln_f.bias"))
    with restored(one), restored(two):
        a, b = one.read_bytes(), two.read_bytes()
        one.write_bytes(b), two.write_bytes(a)
        assert metadata.structure_sha256(copy, leaves) not in seen
    # The bytes of the arrays are not covered: they have their own hashes.
    chunk = next((copy / "state/wte/c").rglob("0/0"))
    chunk.write_bytes(b"")
    assert metadata.structure_sha256(copy, leaves) == expected


# Determinism -------------------------------------------------------------------------------------


def test_conversions_are_byte_identical_for_any_threads_and_target(converted, tmp_path):
    source = converted.parent / "hf"
    convert(source, tmp_path / "somewhere/else", max_memory=80 << 20)  # one thread
    assert read_directory(tmp_path / "somewhere/else") == read_directory(converted)
    convert(source, tmp_path / "somewhere/else", overwrite=True)
    assert read_directory(tmp_path / "somewhere/else") == read_directory(converted)


def test_another_source_changes_only_its_entry_in_the_metadata(converted, tmp_path):
    copy = shutil.copytree(converted.parent / "hf", tmp_path / "copy")
    convert(copy, tmp_path / "c")
    ours, theirs = read_directory(tmp_path / "c"), read_directory(converted)
    assert {n for n in theirs if ours[n] != theirs[n]} == {metadata.MARKER_FILE}
    ours, theirs = read_custom_metadata(tmp_path / "c"), read_custom_metadata(converted)
    assert ours["origin"].pop("source") == str(copy) != theirs["origin"].pop("source")
    assert ours.pop("seal") != theirs.pop("seal") and ours == theirs


def test_saves_are_byte_identical(tmp_path):
    for name in ("a", "b"):
        btlm.save(tmp_path / name, CASE.config, CASE.params, origin={"run": 1})
    assert read_directory(tmp_path / "a") == read_directory(tmp_path / "b")
    assert b'nsecs": 1' not in (tmp_path / "a" / metadata.MARKER_FILE).read_bytes()


def test_custom_metadata_is_deterministic():
    config = dataclasses.replace(CASE.config, alibi_scaling=AlibiScaling(train_seq_len=64))
    sha256 = {("wte",): "a" * 64, ("blocks", "0", "ln_1", "bias"): "b" * 64}
    arguments = config, {"x": 1}, sha256, {"f": "c" * 64}, "d" * 64
    custom = metadata.custom_metadata(*arguments)
    assert custom == metadata.custom_metadata(*arguments)
    values = custom["btlm_jax"]
    assert values["sha256"] == {"wte": "a" * 64, "blocks.0.ln_1.bias": "b" * 64}
    assert values["format"] == metadata.FORMAT
    assert values["config"]["alibi_scaling"] == {"factor": None, "train_seq_len": 64}


def test_slopes_keep_every_bit_in_json(tmp_path):
    slopes = tuple(float(x) for x in np.random.default_rng(0).uniform(0, 1, CASE.config.n_head))
    config = dataclasses.replace(CASE.config, alibi_slopes=slopes)
    btlm.save(tmp_path / "c", config, CASE.params)
    assert metadata.read_metadata(tmp_path / "c").config.alibi_slopes == slopes
