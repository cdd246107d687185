"""`verify` finds every flipped bit and every missing file of a checkpoint."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
from orbax.checkpoint import v1 as ocp
from safetensors.numpy import load_file

from btlm_jax.checkpoint import metadata
from btlm_jax.convert import convert, export, verify
from btlm_jax.model import weights
from btlm_jax.model.params import flatten_tree
from support import golden
from support.checkpoint_forms import (
    BF16,
    custom_metadata_span,
    flipped_bit,
)

STRUCTURE = "zarr.json, _METADATA"


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("verify")
    convert(golden.write_hf(folder / "hf", BF16, tokenizer=True), folder / "c")
    export(folder / "c", folder / "back")
    assert verify(folder / "c") and verify(folder / "back")
    return folder / "c"


def damaged_names(path: Path) -> list[str]:
    """Returns the names of the differences that `verify` finds, or its error message."""
    try:
        return [name for name, _ in verify(path).differences]
    except ValueError as e:
        return [str(e)]


def test_flipped_bits_in_arrays_are_found(converted):
    """In the first and last byte, in the index of the shard, and anywhere."""
    rng, count = random.Random(0), 0
    leaves = {".".join(x.path): x.hf_name for x in weights.disk_leaves(BF16.config)}
    assert {p.name for p in (converted / "state").iterdir()} == {*leaves, "_METADATA", ".zarr3"}
    for leaf, name in leaves.items():
        files = [p for p in (converted / "state" / leaf / "c").rglob("*") if p.is_file()]
        assert len(files) == 1
        size = 8 * files[0].stat().st_size
        bits = [rng.randrange(8), size - 1 - rng.randrange(8)]
        bits += [size - 8 * 20 + rng.randrange(8 * 20)]  # 16 bytes of index, 4 of CRC-32C
        bits += [rng.randrange(size - 8 * 20) for _ in range(2)]
        for bit in bits:
            with flipped_bit(files[0], bit):
                assert damaged_names(converted) == [name], (leaf, bit)
            count += 1
    assert count >= 150 and verify(converted)


def test_flipped_bits_in_zarr_json_are_found(converted):
    rng, count = random.Random(1), 0
    files = sorted((converted / "state").glob("*/zarr.json"))
    for file in files:
        size = 8 * file.stat().st_size
        for bit in (rng.randrange(size), rng.choice([0, size - 1, rng.randrange(size)])):
            with flipped_bit(file, bit):
                names = damaged_names(converted)
            assert STRUCTURE in names or "damaged" in names[0] or "match" in names[0], (file, bit)
            count += 1
    assert count >= 60 and verify(converted)


def test_flipped_bits_in_the_list_of_arrays_are_found(converted):
    rng, file = random.Random(2), converted / "state/_METADATA"
    whole = file.read_bytes()
    key = whole.index(b'"use_ocdbt"')
    bits = [0, -1, *(rng.randrange(8 * len(whole)) for _ in range(25))]
    bits += [rng.randrange(8 * (key - 40), 8 * len(whole)) for _ in range(15)]  # the options
    for bit in bits:
        with flipped_bit(file, bit):
            names = damaged_names(converted)
        # Messages about bytes that are not UTF-8 or JSON are Python's, with the path.
        assert names == [STRUCTURE] or str(converted) in names[0], (bit, names)
    assert len(bits) >= 35 and verify(converted)


def test_flipped_bits_in_the_tokenizer_are_found(converted):
    rng = random.Random(3)
    (file,) = (converted / "tokenizer").iterdir()
    for bit in [0, -1, *(rng.randrange(8 * file.stat().st_size) for _ in range(8))]:
        with flipped_bit(file, bit):
            assert damaged_names(converted) == [file.name], bit
    verify(converted)


def test_flipped_bits_in_our_metadata_are_refused(converted):
    """Unless JSON has the same value: "1e-05" and "1E-05"."""
    rng, file = random.Random(4), converted / metadata.MARKER_FILE
    start, stop = custom_metadata_span(file)
    exponent = 8 * (file.read_bytes().index(b"1e-05") + 1) + 5
    bits = [8 * start, 8 * stop - 1, *(rng.randrange(8 * start, 8 * stop) for _ in range(80))]
    for bit in bits:
        with flipped_bit(file, bit), pytest.raises(ValueError, match=str(converted)):
            verify(converted)
    before = metadata.read_metadata(converted)
    with flipped_bit(file, exponent):
        assert b"1E-05" in file.read_bytes()
        assert metadata.read_metadata(converted) == before and verify(converted)


def test_flipped_bits_in_orbax_metadata_are_refused_or_harmless(converted):
    """They have no checksum; a flip that is not refused does not change the loaded weights."""
    rng, file = random.Random(5), converted / metadata.MARKER_FILE
    start, stop = custom_metadata_span(file)
    before, expected = metadata.read_metadata(converted), flatten_tree(ocp.load(converted))
    unseen = 0
    bits = [*range(8 * stop, 8 * file.stat().st_size)]
    for bit in bits + [rng.randrange(8 * start) for _ in range(60)]:
        with flipped_bit(file, bit):
            if (
                "damaged" in (names := " ".join(damaged_names(converted)))
                or str(converted) in names
            ):
                continue
            assert not names
            unseen += 1
            assert metadata.read_metadata(converted) == before
            got = flatten_tree(ocp.load(converted))
            assert got.keys() == expected.keys()
            assert all(got[p].tobytes() == expected[p].tobytes() for p in got)
    assert 0 < unseen < 50


def test_missing_files_are_found(converted, tmp_path):
    place = tmp_path / "c"
    shutil.copytree(converted, place)
    for name in ("state/wte/c/0/0", "state/ln_f.bias/zarr.json", "tokenizer/tokenizer.json"):
        file = place / name
        whole = file.read_bytes()
        file.unlink()
        names = damaged_names(place)
        assert names, name
        named = {"transformer.wte.weight", "tokenizer.json"}
        assert names[0] in named or "damaged checkpoint" in names[0], name
        file.write_bytes(whole)
    assert verify(place)


def test_flipped_bits_in_an_export_are_found(converted):
    """An export records the hash of every tensor; the slopes have a separate test."""
    rng, file = random.Random(6), converted.parent / "back/model.safetensors"
    whole = file.read_bytes()
    data = 8 + int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8:data])
    assert set(json.loads(header.pop("__metadata__")["sha256"])) == set(BF16.weights)
    for name, info in header.items():
        begin, end = (8 * (data + n) for n in info["data_offsets"])
        for bit in (begin, end - 1, rng.randrange(begin, end)):
            if name != golden.SLOPES:
                with flipped_bit(file, bit):
                    assert damaged_names(file.parent) == [name]
    for bit in (rng.randrange(8 * data) for _ in range(40)):
        before = load_file(file)
        with flipped_bit(file, bit):
            names = damaged_names(file.parent)
            if not names:  # in the version, the format or the padding of the header
                after = load_file(file)
                assert all(after[n].tobytes() == x.tobytes() for n, x in before.items())


def test_flipped_bits_in_the_slopes_of_an_export_are_found(converted):
    file = converted.parent / "back/model.safetensors"
    data = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    header = json.loads(file.read_bytes()[8:data])
    with flipped_bit(file, 8 * (data + header[golden.SLOPES]["data_offsets"][0])):
        assert damaged_names(file.parent) == [golden.SLOPES]


def test_a_truncated_ocdbt_database_is_reported(forms, tmp_path):
    shutil.copytree(forms["ocdbt"], tmp_path / "t")
    data = [p for p in (tmp_path / "t/state").rglob("*") if p.parent.name == "d"]
    for file in data:
        file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match="damaged checkpoint"):
        verify(tmp_path / "t", forms["orbax"])


def test_the_command_reports_damage(run_verify, converted):
    file = next((converted / "state/ln_f.bias/c").glob("*"))
    with flipped_bit(file, 3):
        code, out, _ = run_verify(converted)
        assert code == 1 and "1 difference in 31 tensors" in out
        assert "transformer.ln_f.bias  sha256 " in out and ", recorded " in out
    with flipped_bit(file, -1):
        code, out, _ = run_verify(converted)
        assert code == 1 and "transformer.ln_f.bias" in out and "damaged checkpoint" in out
    marker = converted / metadata.MARKER_FILE
    with flipped_bit(marker, 8 * custom_metadata_span(marker)[0] + 8 * 4):
        code, out, err = run_verify(converted)
        assert code == 2 and not out and "btlm: error: " in err
    assert run_verify(converted)[0] == 0
