"""What a checkpoint says about itself: sealed, complete, and the same every time."""

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
from btlm_jax.checkpoint import metadata, orbax_metadata, zarr
from btlm_jax.convert import convert
from btlm_jax.model import weights
from support import golden

CASE = golden.load("g_bf16")


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("manifest")
    convert(golden.write_hf(folder / "hf", CASE, tokenizer=True), folder / "c")
    return folder / "c"


@contextlib.contextmanager
def changed(file: Path) -> Iterator[Path]:
    """The file is as it was afterwards."""
    whole = file.read_bytes()
    try:
        yield file
    finally:
        file.write_bytes(whole)


@contextlib.contextmanager
def edited(checkpoint: Path, *, seal: bool) -> Iterator[Callable]:
    """A function that applies a change to our notes, and seals them again or not."""
    with changed(checkpoint / metadata.MARKER_FILE) as file:
        values = json.loads(file.read_text())
        notes = values["custom_metadata"]["btlm_jax"]

        def apply(change) -> None:
            change(notes)
            if seal:
                notes.pop("seal", None)
                text = json.dumps(notes, sort_keys=True)
                notes["seal"] = hashlib.sha256(text.encode()).hexdigest()
            file.write_text(json.dumps(values))

        yield apply


def notes_of(checkpoint: Path) -> dict:
    return json.loads((checkpoint / metadata.MARKER_FILE).read_text())["custom_metadata"][
        "btlm_jax"
    ]


def files(folder: Path) -> dict[str, bytes]:
    found = (p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): p.read_bytes() for p in found}


def test_what_is_read_back(converted):
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


def test_largest_block_of_large_arrays(converted):
    """A block of ours; in Orbax's own layout, the whole array."""
    large = {("x",): jax.ShapeDtypeStruct((1 << 20, 9), np.float32)}
    meta = dataclasses.replace(metadata.read_metadata(converted), leaves=large)
    assert meta.largest_block == zarr.BLOCK_BYTES
    assert dataclasses.replace(meta, ocdbt=True).largest_block == 36 << 20


def test_completep_comes_back(tmp_path):
    config = dataclasses.replace(CASE.config, completep_base_layers=1, completep_alpha=0.75)
    btlm.save(tmp_path / "c", config, CASE.params)
    assert metadata.read_metadata(tmp_path / "c").config == config
    assert btlm.load(tmp_path / "c")[0].config == config


def test_a_checkpoint_from_before_completep(converted):
    with edited(converted, seal=True) as apply:
        apply(lambda n: [n["config"].pop(f"completep_{x}") for x in ("base_layers", "alpha")])
        assert metadata.read_metadata(converted).config == CASE.config


# The seal --------------------------------------------------------------------------------------

EDITS = {
    "a value of the configuration": lambda n: n["config"].update(mup_output_alpha=2.23),
    "a slope in its last place": lambda n: n["config"]["alibi_slopes"].__setitem__(
        3, float(np.nextafter(n["config"]["alibi_slopes"][3], 1))
    ),
    "a hash": lambda n: n["sha256"].update(wte="0" * 64),
    "a hash that is gone": lambda n: n["sha256"].pop("wte"),
    "all hashes gone": lambda n: n["sha256"].clear(),
    "the hash of a file": lambda n: n["asset_sha256"].clear(),
    "the structure": lambda n: n.update(structure_sha256=None),
    "the origin": lambda n: n["origin"].update(source="elsewhere"),
    "the original config": lambda n: n["origin"]["hf_config"].update(vocab_size=98),
    "the writer": lambda n: n.update(created_by="somebody"),
    "something more": lambda n: n.update(more=1),
    "the seal": lambda n: n.update(seal="0" * 64),
    "no seal": lambda n: n.pop("seal"),
}


@pytest.mark.parametrize("change", EDITS.values(), ids=EDITS.keys())
def test_an_edit_breaks_the_seal(converted, change):
    with edited(converted, seal=False) as apply:
        apply(change)
        with pytest.raises(ValueError, match="its metadata does not match its checksum"):
            metadata.read_metadata(converted)
    metadata.read_metadata(converted)


def test_an_edit_that_is_sealed_is_believed(converted):
    with edited(converted, seal=True) as apply:
        apply(lambda n: n["config"].update(mup_output_alpha=2.23))
        assert metadata.read_metadata(converted).config.mup_output_alpha == 2.23


def test_the_order_of_keys_does_not_matter(converted):
    """Another JSON library may write the same notes in another order."""
    with changed(converted / metadata.MARKER_FILE) as file:
        file.write_text(json.dumps(json.loads(file.read_text()), sort_keys=True, indent=1))
        assert metadata.read_metadata(converted).config == CASE.config


def test_unknown_and_invalid_configuration(converted):
    with edited(converted, seal=True) as apply:
        apply(lambda n: n["config"].update(experts=8))
        with pytest.raises(ValueError, match=r"unknown config fields \['experts'\]"):
            metadata.read_metadata(converted)
        apply(lambda n: (n["config"].pop("experts"), n["config"].update(n_head=7)))
        with pytest.raises(ValueError, match="n_embd: found 96, expected a multiple of n_head = 7"):
            metadata.read_metadata(converted)


KEYS = ["format", "config", "origin", "sha256", "asset_sha256", "structure_sha256"]


@pytest.mark.parametrize("key", KEYS)
def test_missing_keys(converted, key):
    with edited(converted, seal=False) as apply:
        apply(lambda n: n.pop(key))
        said = "checkpoint format None" if key == "format" else "does not match its checksum"
        with pytest.raises(ValueError, match=said):
            metadata.read_metadata(converted)


@pytest.mark.parametrize("key", KEYS[1:])
def test_missing_keys_under_a_valid_seal(converted, key):
    """Another writer of this format that leaves one out: refused by name, not by a traceback."""
    with edited(converted, seal=True) as apply:
        apply(lambda n: n.pop(key))
        with pytest.raises(ValueError, match=key):
            metadata.read_metadata(converted)


def test_damaged_key_of_the_list_of_arrays(converted):
    with changed(converted / "state/_METADATA") as file:
        file.write_bytes(file.read_bytes().replace(b'"use_ocdbt"', b'"use_ocdbv"'))
        with pytest.raises(ValueError, match="damaged checkpoint"):
            metadata.read_metadata(converted)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"{}", b"\xff\xfe", b'"x"'])
@pytest.mark.parametrize("name", [metadata.MARKER_FILE, "state/_METADATA"])
def test_metadata_that_is_not_there(converted, name, content):
    with changed(converted / name) as file:
        file.write_bytes(content)
        with pytest.raises(ValueError, match=str(converted)):
            metadata.read_metadata(converted)


# is_ours ---------------------------------------------------------------------------------------


def test_is_ours(converted, tmp_path):
    assert metadata.is_btlm_checkpoint(converted) and metadata.is_btlm_checkpoint(
        converted.as_uri()
    )
    assert not metadata.is_btlm_checkpoint(converted.parent / "hf")
    assert not metadata.is_btlm_checkpoint(tmp_path) and not metadata.is_btlm_checkpoint(
        tmp_path / "nothing"
    )
    assert not metadata.is_btlm_checkpoint(converted / metadata.MARKER_FILE)
    ocp.save(tmp_path / "foreign", {"x": np.zeros(3)})
    assert not metadata.is_btlm_checkpoint(tmp_path / "foreign")
    ocp.save(tmp_path / "noted", {"x": np.zeros(3)}, custom_metadata={"mine": 1})
    assert not metadata.is_btlm_checkpoint(tmp_path / "noted")


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"3", b"null", b"{}", b"\xff"]
    + [b'{"custom_metadata": %s}' % x for x in (b"null", b"{}", b"[]", b"7")],
)
def test_broken_marks_are_not_ours(tmp_path, content):
    """Nothing that might be somebody else's is ever replaced."""
    (tmp_path / metadata.MARKER_FILE).write_bytes(content)
    assert not metadata.is_btlm_checkpoint(tmp_path)


# structure_sha256 ------------------------------------------------------------------------------


def test_structure_sha256(converted, tmp_path):
    place, leaves = tmp_path / "c", list(metadata.read_metadata(converted).leaves)
    shutil.copytree(converted, place)
    whole = metadata.structure_sha256(place, leaves)
    assert whole == notes_of(converted)["structure_sha256"] and len(whole) == 64
    assert whole == metadata.structure_sha256(place, reversed(leaves))
    described = [place / "state/_METADATA", *(place / "state").glob("*/zarr.json")]
    assert len(described) == 1 + len(leaves)
    seen = {whole}
    for file in described:  # every one counts, also a change that means the same to JSON
        with changed(file):
            file.write_bytes(file.read_bytes() + b" ")
            seen.add(metadata.structure_sha256(place, leaves))
            file.unlink()
            assert metadata.structure_sha256(place, leaves) is None
            file.touch()
    assert len(seen) == 1 + len(described)
    # Two arrays that change places are seen too.
    one, two = (place / "state" / name / "zarr.json" for name in ("wte", "ln_f.bias"))
    with changed(one), changed(two):
        a, b = one.read_bytes(), two.read_bytes()
        one.write_bytes(b), two.write_bytes(a)
        assert metadata.structure_sha256(place, leaves) not in seen
    # The bytes of the arrays have hashes of their own.
    chunk = next((place / "state/wte/c").rglob("0/0"))
    chunk.write_bytes(b"")
    assert metadata.structure_sha256(place, leaves) == whole


# The same every time ---------------------------------------------------------------------------


def test_two_conversions_are_the_same_bytes(converted, tmp_path):
    """However many threads worked, and wherever it was written."""
    source = converted.parent / "hf"
    convert(source, tmp_path / "somewhere/else", max_memory=80 << 20)  # one thread
    assert files(tmp_path / "somewhere/else") == files(converted)
    convert(source, tmp_path / "somewhere/else", overwrite=True)
    assert files(tmp_path / "somewhere/else") == files(converted)


def test_another_source_changes_one_note(converted, tmp_path):
    copy = shutil.copytree(converted.parent / "hf", tmp_path / "copy")
    convert(copy, tmp_path / "c")
    ours, theirs = files(tmp_path / "c"), files(converted)
    assert {n for n in theirs if ours[n] != theirs[n]} == {metadata.MARKER_FILE}
    ours, theirs = notes_of(tmp_path / "c"), notes_of(converted)
    assert ours["origin"].pop("source") == str(copy) != theirs["origin"].pop("source")
    assert ours.pop("seal") != theirs.pop("seal") and ours == theirs


def test_two_saves_are_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        btlm.save(tmp_path / name, CASE.config, CASE.params, origin={"run": 1})
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert b'nsecs": 1' not in (tmp_path / "a" / metadata.MARKER_FILE).read_bytes()  # no clock


def test_mark_and_notes_are_deterministic():
    config = dataclasses.replace(CASE.config, alibi_scaling=AlibiScaling(train_seq_len=64))
    sha256 = {("wte",): "a" * 64, ("blocks", "0", "ln_1", "bias"): "b" * 64}
    made = [
        metadata.custom_metadata(config, {"x": 1}, sha256, {"f": "c" * 64}, "d" * 64)
        for _ in range(2)
    ]
    assert made[0] == made[1] and orbax_metadata.commit_marker(
        made[0]
    ) == orbax_metadata.commit_marker(made[1])
    inner = made[0]["btlm_jax"]
    assert inner["sha256"] == {"wte": "a" * 64, "blocks.0.ln_1.bias": "b" * 64}
    assert inner["format"] == metadata.FORMAT and inner["config"]["alibi_scaling"] == {
        "factor": None,
        "train_seq_len": 64,
    }
    values = json.loads(orbax_metadata.commit_marker(made[0]))
    assert values["custom_metadata"] == json.loads(json.dumps(made[0]))
    assert values["init_timestamp_nsecs"] is values["commit_timestamp_nsecs"] is None
    paths = [("a",), ("b", "c")]
    assert orbax_metadata.array_list(paths) == orbax_metadata.array_list(paths)
    listed = json.loads(orbax_metadata.array_list(paths))
    assert set(listed["tree_metadata"]) == {"('a',)", "('b', 'c')"}
    assert listed["use_ocdbt"] is False and listed["use_zarr3"] is True


def test_slopes_keep_every_bit_in_json(tmp_path):
    slopes = tuple(float(x) for x in np.random.default_rng(0).uniform(0, 1, CASE.config.n_head))
    config = dataclasses.replace(CASE.config, alibi_slopes=slopes)
    btlm.save(tmp_path / "c", config, CASE.params)
    assert metadata.read_metadata(tmp_path / "c").config.alibi_slopes == slopes
