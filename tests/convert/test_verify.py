"""`verify`: equal checkpoints are equal in every format, and no damage or difference is missed."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import random
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp
from safetensors.numpy import load_file, save_file

import btlm_jax as btlm
from btlm_jax import BTLMConfig, cli
from btlm_jax.checkpoint import metadata, zarr
from btlm_jax.convert import convert, export, verify
from btlm_jax.convert.hf import source as hf_source
from btlm_jax.convert.tensor_difference import block_difference
from btlm_jax.model import alibi, weights
from btlm_jax.model.params import flatten_tree, unflatten_tree
from support import golden

BF16, UNTIED = golden.load("g_bf16"), golden.load("i_untied")
BIN = golden.GOLDEN / "btlm_bin"
STRUCTURE = "zarr.json, _METADATA"
NAME = "transformer.h.1.mlp.c_fc.weight"


def rows(a, b=None, **options) -> dict[str, str]:
    """What `verify` finds, by tensor, file or field."""
    result = verify(a, b, **options)
    assert bool(result) == (not result.differences)
    found = dict(result.differences)
    assert len(found) == len(result.differences)
    return found


def write_hf(path: Path, case: golden.Case, tensors: dict, **changes) -> Path:
    """A Hugging Face directory of these tensors, and of the case's config.json with changes."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps(case.hf_config | changes))
    save_file(tensors, path / "model.safetensors")
    return path


def write_by_orbax(path: Path, config: BTLMConfig, tensors: dict, sha256=None, **saving) -> Path:
    """A checkpoint as training code may write one: by Orbax itself, with more than the weights."""
    leaves = list(weights.disk_leaves(config))
    state = {x.path: np.asarray(tensors[x.hf_name]).reshape(x.weight.shape) for x in leaves}
    notes = metadata.custom_metadata(config, {}, sha256 or {}, {}, None)
    context = ocp.Context()
    for option, value in saving.items():
        setattr(context.array_options.saving, option, value)
    optimizer = {"mu": np.ones(7, np.float32), "count": np.array(4)}
    items = {"state": unflatten_tree(state), "optimizer": optimizer}
    with context:
        ocp.save_checkpointables(path, items, custom_metadata=notes)
    return path


# (a) No flipped bit goes unseen ----------------------------------------------------------------


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("verify")
    convert(golden.write_hf(folder / "hf", BF16, tokenizer=True), folder / "c")
    export(folder / "c", folder / "back")
    assert verify(folder / "c") and verify(folder / "back")
    return folder / "c"


@contextlib.contextmanager
def flipped(file: Path, bit: int) -> Iterator[None]:
    """The file with one bit flipped; bits count from the start, or with minus from the end."""
    whole = file.read_bytes()
    damaged = bytearray(whole)
    bit %= 8 * len(whole)
    damaged[bit // 8] ^= 1 << (bit % 8)
    file.write_bytes(damaged)
    try:
        yield
    finally:
        file.write_bytes(whole)


def found_in(path: Path) -> list[str]:
    """The names of what `verify` says is damaged, or its error; empty if it finds nothing."""
    try:
        return [what for what, _ in verify(path).differences]
    except ValueError as e:
        return [str(e)]


def test_flips_in_chunk_files(converted):
    """The first and last byte, the index of the shard before its checksum, and anywhere."""
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
            with flipped(files[0], bit):
                assert found_in(converted) == [name], (leaf, bit)
            count += 1
    assert count >= 150 and verify(converted)


def test_flips_in_the_descriptions_of_arrays(converted):
    rng, count = random.Random(1), 0
    files = sorted((converted / "state").glob("*/zarr.json"))
    for file in files:
        size = 8 * file.stat().st_size
        for bit in (rng.randrange(size), rng.choice([0, size - 1, rng.randrange(size)])):
            with flipped(file, bit):
                found = found_in(converted)
            assert STRUCTURE in found or "damaged" in found[0] or "match" in found[0], (file, bit)
            count += 1
    assert count >= 60 and verify(converted)


def test_flips_in_the_list_of_arrays(converted):
    rng, file = random.Random(2), converted / "state/_METADATA"
    whole = file.read_bytes()
    key = whole.index(b'"use_ocdbt"')
    bits = [0, -1, *(rng.randrange(8 * len(whole)) for _ in range(25))]
    bits += [rng.randrange(8 * (key - 40), 8 * len(whole)) for _ in range(15)]  # the options
    for bit in bits:
        with flipped(file, bit):
            found = found_in(converted)
        # Python's own message for bytes that are no UTF-8 or JSON is passed on, with the path.
        assert found == [STRUCTURE] or str(converted) in found[0], (bit, found)
    assert len(bits) >= 35 and verify(converted)


def test_flips_in_carried_files(converted):
    rng = random.Random(3)
    (file,) = (converted / "tokenizer").iterdir()
    for bit in [0, -1, *(rng.randrange(8 * file.stat().st_size) for _ in range(8))]:
        with flipped(file, bit):
            assert found_in(converted) == [file.name], bit
    verify(converted)


def notes_at(file: Path) -> tuple[int, int]:
    """Where our notes begin and end in Orbax's file, in bytes."""
    text = file.read_text()
    notes = json.dumps(json.loads(text)["custom_metadata"]["btlm_jax"])
    return text.index(notes), text.index(notes) + len(notes)


def test_flips_in_our_notes(converted):
    """Every one is refused, unless JSON reads the same value: "1e-05" and "1E-05"."""
    rng, file = random.Random(4), converted / metadata.MARKER_FILE
    start, stop = notes_at(file)
    exponent = 8 * (file.read_bytes().index(b"1e-05") + 1) + 5
    bits = [8 * start, 8 * stop - 1, *(rng.randrange(8 * start, 8 * stop) for _ in range(80))]
    for bit in bits:
        with flipped(file, bit), pytest.raises(ValueError, match=str(converted)):
            verify(converted)
    before = metadata.read_metadata(converted)
    with flipped(file, exponent):
        assert b"1E-05" in file.read_bytes()
        assert metadata.read_metadata(converted) == before and verify(converted)


def test_flips_beside_our_notes_do_no_harm(converted):
    """Orbax's own entries are sealed by nobody: refused, or without effect on what is loaded."""
    rng, file = random.Random(5), converted / metadata.MARKER_FILE
    start, stop = notes_at(file)
    before, expected = metadata.read_metadata(converted), flatten_tree(ocp.load(converted))
    unseen = 0
    bits = [*range(8 * stop, 8 * file.stat().st_size)]
    for bit in bits + [rng.randrange(8 * start) for _ in range(60)]:
        with flipped(file, bit):
            if "damaged" in (found := " ".join(found_in(converted))) or str(converted) in found:
                continue
            assert not found
            unseen += 1
            assert metadata.read_metadata(converted) == before
            got = flatten_tree(ocp.load(converted))
            assert got.keys() == expected.keys()
            assert all(got[p].tobytes() == expected[p].tobytes() for p in got)
    assert 0 < unseen < 50


def test_a_file_that_is_gone(converted, tmp_path):
    place = tmp_path / "c"
    shutil.copytree(converted, place)
    for name in ("state/wte/c/0/0", "state/ln_f.bias/zarr.json", "tokenizer/tokenizer.json"):
        file = place / name
        whole = file.read_bytes()
        file.unlink()
        found = found_in(place)
        assert found, name
        named = {"transformer.wte.weight", "tokenizer.json"}
        assert found[0] in named or "damaged checkpoint" in found[0], name
        file.write_bytes(whole)
    assert verify(place)


def test_flips_in_an_export(converted):
    """It records the hash of every tensor too; the slopes have a test of their own."""
    rng, file = random.Random(6), converted.parent / "back/model.safetensors"
    whole = file.read_bytes()
    data = 8 + int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8:data])
    assert set(json.loads(header.pop("__metadata__")["sha256"])) == set(BF16.weights)
    for name, info in header.items():
        begin, end = (8 * (data + n) for n in info["data_offsets"])
        for bit in (begin, end - 1, rng.randrange(begin, end)):
            if name != golden.SLOPES:
                with flipped(file, bit):
                    assert found_in(file.parent) == [name]
    for bit in (rng.randrange(8 * data) for _ in range(40)):
        before = load_file(file)
        with flipped(file, bit):
            found = found_in(file.parent)
            if not found:  # our version or torch's mark, or the padding of the header
                after = load_file(file)
                assert all(after[n].tobytes() == x.tobytes() for n, x in before.items())


def test_flips_in_the_slopes_of_an_export(converted):
    file = converted.parent / "back/model.safetensors"
    data = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    header = json.loads(file.read_bytes()[8:data])
    with flipped(file, 8 * (data + header[golden.SLOPES]["data_offsets"][0])):
        assert found_in(file.parent) == [golden.SLOPES]


# (b) Two checkpoints ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def forms(tmp_path_factory) -> dict[str, Path]:
    """The same weights in every format, from the .bin files that torch wrote."""
    folder = tmp_path_factory.mktemp("forms")
    with np.load(BIN / "weights.npz") as z:
        tensors = {name: z[name].view(ml_dtypes.bfloat16) for name in z.files}
    made = {name: folder / name for name in ("safetensors", "orbax", "export", "sharded export")}
    made |= {"bin": BIN / "single", "sharded bin": BIN / "sharded"}
    made["safetensors"].mkdir()
    shutil.copy(BIN / "single/config.json", made["safetensors"])
    save_file(tensors, made["safetensors"] / "model.safetensors")
    convert(made["bin"], made["orbax"])
    export(made["orbax"], made["export"])
    export(made["orbax"], made["sharded export"], max_shard_bytes=20_000)
    config = metadata.read_metadata(made["orbax"]).config
    made["ocdbt"] = write_by_orbax(folder / "ocdbt", config, tensors)
    made["orbax's own"] = write_by_orbax(folder / "own", config, tensors, use_ocdbt=False)
    return made


FORMS = ["safetensors", "bin", "sharded bin", "orbax", "export", "sharded export", "ocdbt"]
FORMS += ["orbax's own"]


def test_every_pairing_of_equal_ones(forms):
    """Nothing differs, and the digest is that of the weights, not of the format."""
    assert set(forms) == set(FORMS)
    assert (
        metadata.read_metadata(forms["ocdbt"]).ocdbt
        and not metadata.read_metadata(forms["orbax's own"]).ocdbt
    )
    digests = set()
    for a in FORMS:
        for b in FORMS:
            result = verify(forms[a], forms[b])
            assert result, (a, b, str(result))
            assert result.tensors == 31
            digests.add((result.digest, result.nbytes))
    assert len(digests) == 1


def test_digest_is_that_of_the_reports(forms, tmp_path):
    reports = [convert(forms["sharded bin"], tmp_path / "c")]
    reports += [convert(forms["safetensors"], tmp_path / "d")]
    reports += [export(tmp_path / "c", tmp_path / "e", max_shard_bytes=9000)]
    reports += [export(forms["ocdbt"], tmp_path / "f")]
    results = [verify(x) for x in (tmp_path / "c", tmp_path / "e", tmp_path / "f")]
    results += [verify(forms["bin"], forms["orbax"])]
    assert len({x.digest for x in (*reports, *results)}) == 1
    assert {x.nbytes for x in results} == {reports[0].nbytes}
    assert results[0].digest in str(results[0])


def test_every_pairing_of_unequal_ones(forms, tmp_path):
    """One bit of one element, whichever side is which format."""
    tensors = load_file(forms["safetensors"] / "model.safetensors")
    changed = tensors[NAME].copy()
    changed.view(np.uint16)[2, 3] ^= 1
    difference = abs(np.subtract(changed[2, 3], tensors[NAME][2, 3], dtype=np.float64))
    hf = tmp_path / "hf"
    hf.mkdir()
    shutil.copy(BIN / "single/config.json", hf)
    save_file(tensors | {NAME: changed}, hf / "model.safetensors")
    convert(hf, tmp_path / "c")
    export(tmp_path / "c", tmp_path / "e")
    config = metadata.read_metadata(tmp_path / "c").config
    write_by_orbax(tmp_path / "t", config, load_file(hf / "model.safetensors"))
    said = f"1 of {changed.size:,} elements differ, max |difference| {difference:.6g}"
    for b in (hf, tmp_path / "c", tmp_path / "e", tmp_path / "t"):
        for a in FORMS:
            assert rows(forms[a], b) == {NAME: said} == rows(b, forms[a]), (a, b)
        assert verify(forms["orbax"], b, atol=float(difference))
        assert not verify(forms["orbax"], b, atol=float(difference) * 0.999)
    assert verify(hf, tmp_path / "c").digest != verify(forms["bin"], forms["bin"]).digest


def test_without_hashes(forms):
    for name in ("safetensors", "bin", "sharded bin", "ocdbt", "orbax's own"):
        with pytest.raises(ValueError, match=r"records no SHA-256.*compare it with another") as e:
            verify(forms[name])
        assert f"`btlm verify {forms[name]} OTHER`" in str(e.value)


def test_hashes_of_a_checkpoint_that_orbax_wrote(forms, tmp_path):
    """Training may record them; then they are checked, and exported from."""
    meta = metadata.read_metadata(forms["orbax"])
    tensors = load_file(forms["safetensors"] / "model.safetensors")
    path = write_by_orbax(tmp_path / "t", meta.config, tensors, dict(meta.sha256))
    assert verify(path).digest == verify(forms["orbax"]).digest
    tensors[NAME] = tensors[NAME] + tensors[NAME]
    path = write_by_orbax(tmp_path / "u", meta.config, tensors, dict(meta.sha256))
    assert list(rows(path)) == [NAME] and "recorded" in rows(path)[NAME]
    with pytest.raises(ValueError, match=f"{NAME}: its bytes do not match the recorded SHA-256"):
        export(path, tmp_path / "e")


def test_damaged_database(forms, tmp_path):
    shutil.copytree(forms["ocdbt"], tmp_path / "t")
    data = [p for p in (tmp_path / "t/state").rglob("*") if p.parent.name == "d"]
    for file in data:
        file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match="damaged checkpoint"):
        verify(tmp_path / "t", forms["orbax"])


def pair(tmp_path, change, **changes) -> tuple[Path, Path]:
    """The untied golden model, and one with changed tensors and configuration."""
    tensors = UNTIED.weights
    one = write_hf(tmp_path / "one", UNTIED, tensors)
    change(tensors)
    return one, write_hf(tmp_path / "two", UNTIED, tensors, **changes)


def both(a: Path, b: Path) -> list[tuple[Path, Path]]:
    """The pair as it is, and as Orbax checkpoints."""
    for x in (a, b):
        convert(x, x.with_name(f"{x.name}.c"), allow_nonfinite=True)
    orbax = [x.with_name(f"{x.name}.c") for x in (a, b)]
    return [(a, b), (orbax[0], orbax[1]), (a, orbax[1]), (orbax[0], b)]


def test_signed_zeros(tmp_path):
    tensors = UNTIED.weights
    tensors[NAME][:2, :3] = 0.0
    a = write_hf(tmp_path / "a", UNTIED, tensors)
    tensors[NAME][:2, :3] = -0.0
    b = write_hf(tmp_path / "b", UNTIED, tensors)
    for x, y in both(a, b):
        said = f"6 of {tensors[NAME].size:,} elements differ, max |difference| 0"
        assert rows(x, y) == {NAME: said}
        assert verify(x, y, atol=0.0)  # as values they are equal
    assert verify(a, a)


def test_nan_and_inf(tmp_path):
    """Equal bits are equal; NaN beside a number is as far away as can be."""
    tensors = UNTIED.weights
    tensors[NAME][0, :4] = [np.nan, np.nan, np.nan, np.inf]
    a = write_hf(tmp_path / "a", UNTIED, tensors)
    same = write_hf(tmp_path / "same", UNTIED, tensors)
    tensors[NAME].view(np.uint32)[0, 0] ^= 1  # another payload
    payload = write_hf(tmp_path / "payload", UNTIED, tensors)
    tensors[NAME][0, 2:4] = 0.5, -np.inf
    b = write_hf(tmp_path / "b", UNTIED, tensors)
    assert verify(a, same) and verify(a, same, atol=0.0)
    for x, y in both(a, b):
        found = rows(x, y)[NAME]
        assert found == f"3 of {tensors[NAME].size:,} elements differ, max |difference| inf"
        assert not verify(x, y, atol=1e30)
        assert rows(y, x)[NAME] == found
    tensors[NAME][0, :4] = [np.nan, 0.5, np.nan, np.inf]  # a number where there was NaN
    number = write_hf(tmp_path / "number", UNTIED, tensors)
    for x, y in ((payload, number), (number, payload)):
        assert rows(x, y, atol=1e30)[NAME].endswith("max |difference| inf")
    # As values, NaN are alike, and so are infinities of one sign.
    assert rows(a, payload)[NAME].startswith("1 of ") and verify(a, payload, atol=0.0)


def test_every_difference_is_counted(tmp_path):
    """In several tensors, in the order of the model; the largest difference is the largest."""
    rng, expected = np.random.default_rng(0), {}

    def change(tensors):
        for name in ("transformer.wte.weight", NAME, "lm_head.weight", "transformer.ln_f.bias"):
            noise = rng.standard_normal(tensors[name].shape, np.float32)
            noise[rng.random(noise.shape) < 0.5] = 0
            changed = tensors[name] + noise
            differ = int((changed != tensors[name]).sum())
            largest = np.abs(changed.astype(np.float64) - tensors[name]).max()
            expected[name] = (
                f"{differ:,} of {noise.size:,} elements differ, max |difference| {largest:.6g}"
            )
            tensors[name] = changed

    a, b = pair(tmp_path, change)
    for x, y in both(a, b):
        assert rows(x, y) == expected
    names = [leaf.hf_name for leaf in weights.disk_leaves(UNTIED.config)]
    order = [what for what, _ in verify(a, b).differences]
    assert order == [n for n in names if n in expected]
    table = str(verify(a, b)).splitlines()
    assert table[0] == f"4 differences in {len(names)} tensors:"
    assert table[1:] == [f"{n:<{max(map(len, order))}}  {expected[n]}" for n in order]


@pytest.mark.parametrize("limit", [500, 7000])
def test_differences_in_several_blocks(tmp_path, monkeypatch, limit):
    """Read in many small blocks, the counts add up and the largest difference of all is kept."""
    name = "transformer.wte.weight"  # whose rows, a prime number of them, do not divide

    def change(tensors):
        x = tensors[name]
        x[0, 0], x[40, 3], x[-1, -1] = x[0, 0] + 2, x[40, 3] - 7, x[-1, -1] + 3
        narrow = np.dtype(ml_dtypes.bfloat16)
        tensors[NAME] = tensors[NAME].astype(narrow).astype(np.float32)

    a, b = pair(tmp_path, change)
    narrow = load_file(b / "model.safetensors")
    narrow[NAME] = narrow[NAME].astype(ml_dtypes.bfloat16)
    c = write_hf(tmp_path / "three", UNTIED, narrow)
    size = UNTIED.weights[name].size
    expected = {name: f"3 of {size:,} elements differ, max |difference| 7"}
    monkeypatch.setattr(zarr, "BLOCK_BYTES", limit)
    monkeypatch.setattr(zarr.block_rows, "__defaults__", (limit,))
    for x, y in [*both(a, b), (a, c), (tmp_path / "one.c", c)]:
        found = rows(x, y)
        assert found.pop(NAME, None) == ("float32 and bfloat16, values equal" if y == c else None)
        assert found == expected, (x, y)
    files = [p for p in (tmp_path / "one.c/state/wte/c").rglob("*") if p.is_file()]
    assert len(files) > 3
    # Blocks of another height than those that were written.
    monkeypatch.setattr(zarr.block_rows, "__defaults__", (limit * 3,))
    assert rows(tmp_path / "one.c", b) == expected and verify(tmp_path / "one.c", a)


def test_differences_within_a_large_block():
    """A block is compared in parts too."""
    x = np.zeros((1 << 19) + 5, np.float32)
    y = x.copy()
    y[[3, 1 << 18, -1]] = 4.0, -9.0, 2.0
    assert block_difference(x, y) == block_difference(y, x) == (3, 9.0)
    narrow = y.astype(ml_dtypes.bfloat16)
    assert block_difference(narrow, y) == (0, 0.0) == block_difference(y, narrow)
    assert block_difference(x, narrow) == (3, 9.0)
    narrow[7] = np.nan
    assert block_difference(narrow, y) == (1, np.inf) == block_difference(y, narrow)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16], ids=["bfloat16", "float16"])
def test_dtypes(tmp_path, dtype):
    """fp32 beside a narrower type: of the same values, and rounded."""
    whole = {k: v * np.float32(1.0007) for k, v in UNTIED.weights.items()}
    slopes = {golden.SLOPES: whole.pop(golden.SLOPES)}
    rounded = {k: v.astype(dtype) for k, v in whole.items()}
    exact = {k: v.astype(np.float32) for k, v in rounded.items()}
    narrow = write_hf(tmp_path / "narrow", UNTIED, rounded | slopes)
    wide = write_hf(tmp_path / "wide", UNTIED, exact | slopes)
    full = write_hf(tmp_path / "full", UNTIED, whole | slopes)
    name = np.dtype(dtype).name
    for a, b in both(narrow, wide):
        assert rows(a, b) == dict.fromkeys(rounded, f"{name} and float32, values equal")
        assert verify(a, b, atol=0.0)
    assert verify(wide, narrow).digest == verify(wide, wide).digest != verify(narrow, wide).digest
    worst, expected = 0.0, {}
    for tensor, x in whole.items():
        difference = np.abs(x.astype(np.float64) - rounded[tensor].astype(np.float64))
        worst, count = max(worst, difference.max()), int((difference > 0).sum())
        expected[tensor] = f"float32 and {name}, values equal"
        if count:
            expected[tensor] = (
                f"float32 and {name}, {count:,} of {x.size:,} elements differ, "
                f"max |difference| {difference.max():.6g}"
            )
    assert rows(full, narrow) == expected and worst > 1e-5
    assert verify(full, narrow, atol=worst) and not verify(full, narrow, atol=0.99 * worst)
    convert(full, tmp_path / "full.c")
    assert rows(tmp_path / "full.c", tmp_path / "narrow.c") == expected


def test_mixed_dtypes_beside_themselves(tmp_path):
    tensors = UNTIED.weights
    tensors[NAME] = tensors[NAME].astype(ml_dtypes.bfloat16)
    tensors["transformer.ln_f.bias"] = tensors["transformer.ln_f.bias"].astype(np.float16)
    a = write_hf(tmp_path / "a", UNTIED, tensors)
    convert(a, tmp_path / "c")
    export(tmp_path / "c", tmp_path / "e")
    for x in (a, tmp_path / "c", tmp_path / "e"):
        for y in (a, tmp_path / "c", tmp_path / "e"):
            assert verify(x, y), (x, y)
    assert verify(a, tmp_path / "c", logits=True)  # in fp32, as such layers cannot be stacked
    assert verify(tmp_path / "e").digest == verify(a, a).digest


@pytest.mark.parametrize(
    "field, value",
    [
        ("layer_norm_epsilon", 1e-6),
        ("mup_embeddings_scale", 3.0),
        ("mup_output_alpha", 2.0),
        ("mup_scale_qk_dot_by_d", False),
        ("eos_token_id", 3),
        ("n_positions", 64),
    ],
)
def test_configurations(tmp_path, field, value):
    """Of equal weights: one row that says which field, and nothing hides it, not even `atol`."""
    a, b = pair(tmp_path, lambda tensors: None, **{field: value})
    was = getattr(BTLMConfig.from_hf(UNTIED.hf_config), field)
    assert was != value
    assert rows(a, b) == {f"config {field}": f"{was} and {value}"}
    convert(b, tmp_path / "c")
    assert rows(a, tmp_path / "c", atol=1e9) == {f"config {field}": f"{was} and {value}"}


def test_alibi_scaling(tmp_path):
    scaling = {"type": "linear", "factor": 4.0}
    a, b = pair(tmp_path, lambda tensors: None, alibi_scaling=scaling)
    assert list(rows(a, b)) == ["config alibi_scaling"]


def test_slopes(tmp_path):
    def change(tensors):
        tensors[golden.SLOPES][1] *= 1 + 2**-8  # an ulp of bf16

    a, b = pair(tmp_path, change)
    for x, y in both(a, b):
        assert list(rows(x, y)) == ["config alibi_slopes"]
    # The exact ones are the same, stored or not.
    exact = UNTIED.weights
    exact[golden.SLOPES] = alibi.slopes(UNTIED.config.n_head).astype(np.float32)[:, None]
    stored = write_hf(tmp_path / "stored", UNTIED, exact)
    del exact[golden.SLOPES]
    implied = write_hf(tmp_path / "implied", UNTIED, exact)
    for x, y in both(stored, implied):
        assert verify(x, y) and verify(y, x)


def test_tensors_and_shapes(tmp_path):
    """Another depth and another vocabulary: every tensor that has no match is named."""
    a = write_hf(tmp_path / "a", UNTIED, UNTIED.weights)
    fewer = {k: v for k, v in UNTIED.weights.items() if ".h.1." not in k}
    missing = {k for k in UNTIED.weights if ".h.1." in k}
    wide = UNTIED.config.vocab_size
    for name in ("transformer.wte.weight", "lm_head.weight"):
        fewer[name] = np.concatenate([fewer[name], fewer[name][:1]])
    b = write_hf(tmp_path / "b", UNTIED, fewer, n_layer=1, vocab_size=wide + 1)
    columns = UNTIED.config.n_embd
    for x, y in both(a, b):
        found = rows(x, y)
        assert found.pop("config n_layer") == "2 and 1"
        assert found.pop("config vocab_size") == f"{wide} and {wide + 1}"
        for name in ("transformer.wte.weight", "lm_head.weight"):
            said = f"shape ({wide}, {columns}) and ({wide + 1}, {columns})"
            assert found.pop(name) == said
        assert len(missing) > 10 and found == dict.fromkeys(missing, f"only in {x}")
        back = rows(y, x)
        assert {k: back[k] for k in missing} == dict.fromkeys(missing, f"only in {x}")


def test_a_learned_beside_an_alibi_model(tmp_path):
    learned = golden.load("f_learned_gelu_mup")
    a = golden.write_hf(tmp_path / "a", learned)
    b = golden.write_hf(tmp_path / "b", UNTIED)
    found = rows(a, b)
    assert found["transformer.wpe.weight"] == f"only in {a}"
    assert found["transformer.h.0.mlp.c_fc2.weight"] == f"only in {b}"
    assert found["config position_embedding_type"] == "learned and alibi"


def test_carried_files(tmp_path):
    a, b = (golden.write_hf(tmp_path / n, BF16, tokenizer=True) for n in "ab")
    convert(a, tmp_path / "c")
    assert verify(a, b) and verify(b, tmp_path / "c")
    (b / "tokenizer.json").write_text((b / "tokenizer.json").read_text() + " ")
    assert rows(a, b) == rows(b, tmp_path / "c") == {"tokenizer.json": "the files differ"}
    (b / "tokenizer.json").unlink()  # what only one has is no difference of the model
    assert verify(a, b)


def test_what_is_not_there(tmp_path, monkeypatch, forms):
    """A path, and a name that could be one or a Hub id."""
    for first, second in ((tmp_path / "x", forms["bin"]), (forms["bin"], str(tmp_path / "x"))):
        with pytest.raises(FileNotFoundError, match=str(tmp_path / "x")):
            verify(first, second)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        verify("file:///nowhere/at/all")
    asked = []

    def fetch(repo_id, *args):
        asked.append(repo_id)
        raise FileNotFoundError(f"no directory and no model on the Hub is named {repo_id!r}")

    monkeypatch.setattr(hf_source, "fetch_from_hub", fetch)
    for a, b in (("runs/checkpoint", None), (forms["orbax"], "runs/checkpoint")):
        with pytest.raises(
            FileNotFoundError, match="no model on the Hub is named 'runs/checkpoint'"
        ):
            verify(a, b)
    assert asked == ["runs/checkpoint"] * 2


def test_the_structure_is_read_where_it_is_compared(forms, monkeypatch):
    def read(*_):
        raise AssertionError("read")

    monkeypatch.setattr(metadata, "structure_sha256", read)
    assert verify(forms["orbax"], forms["export"])
    with pytest.raises(AssertionError, match="read"):
        verify(forms["orbax"])


def test_what_is_no_checkpoint(tmp_path, forms):
    with pytest.raises(ValueError, match="not an Orbax checkpoint"):
        verify(tmp_path)
    ocp.save(tmp_path / "foreign", {"x": np.zeros(3)})
    with pytest.raises(ValueError, match="without BTLM metadata"):
        verify(forms["bin"], tmp_path / "foreign")


def test_budget(forms):
    with pytest.raises(ValueError, match="max_memory: found 1000 B, expected at least"):
        verify(forms["orbax"], forms["bin"], max_memory=1000)
    assert verify(forms["orbax"], forms["bin"], max_memory=(10 * 16) << 20)  # one thread
    assert verify(forms["orbax"], max_memory=80 << 20)


def test_relative_paths(forms, monkeypatch):
    monkeypatch.chdir(forms["orbax"].parent)
    assert verify("orbax") and verify("export", "./orbax") and verify(Path("safetensors"), "ocdbt")


# Logits ----------------------------------------------------------------------------------------


def test_logits(tmp_path):
    a, b = pair(tmp_path, lambda tensors: tensors[NAME].__setitem__((0, 0), 0.75))
    convert(a, tmp_path / "c")
    assert verify(a, tmp_path / "c", logits=True)
    found = rows(a, b, logits=True)
    assert set(found) == {NAME, "logits"}
    assert "max |difference| 0 of" not in found["logits"] and "of positions" in found["logits"]
    assert verify(tmp_path / "c", b, logits=True, atol=10.0)
    assert not rows(a, b).keys() & {"logits"}


def test_logits_catch_what_weights_do_not(tmp_path):
    """A tolerance that every weight meets may still be too large for the model's output."""

    def change(tensors):
        for name, x in tensors.items():
            if name != golden.SLOPES:
                tensors[name] = x + np.float32(1e-3)

    a, b = pair(tmp_path, change)
    assert verify(a, b, atol=1.1e-3)
    assert list(rows(a, b, atol=1.1e-3, logits=True)) == ["logits"]


@pytest.fixture
def logits_calls(monkeypatch) -> list:
    """The sources that were run through the model."""
    module, calls = sys.modules["btlm_jax.convert.verify"], []

    def logits(source, tokens):
        calls.append(source)
        return np.zeros((2, 3, 5))

    monkeypatch.setattr(module, "compute_logits", logits)
    return calls


def test_logits_of_different_configurations_are_not_compared(tmp_path, logits_calls):
    a, b = pair(tmp_path, lambda tensors: None, n_positions=64)
    assert list(rows(a, b, logits=True)) == ["config n_positions"] and not logits_calls
    assert verify(a, a, logits=True) and logits_calls == [a, a]


def test_logits_of_a_fresh_model_and_its_export(tmp_path, logits_calls):
    config = BTLMConfig.preset("tiny")
    shapes = {w.path: weights.stacked_shape(w, config) for w in weights.weight_table(config)}
    flat = {path: np.ones(shape, np.float32) for path, shape in shapes.items()}
    btlm.save(tmp_path / "c", config, unflatten_tree(flat))
    export(tmp_path / "c", tmp_path / "e")
    assert verify(tmp_path / "c", tmp_path / "e", logits=True)
    assert len(logits_calls) == 2


def test_nan_logits_of_one_model_are_a_difference(forms, monkeypatch):
    module, answers = sys.modules["btlm_jax.convert.verify"], [np.zeros((1, 2, 3)) for _ in "ab"]
    answers[1][0, 1, 2] = np.nan
    monkeypatch.setattr(module, "compute_logits", lambda source, tokens: answers.pop())
    assert not verify(forms["orbax"], forms["bin"], logits=True, atol=1.0)


# (c) The command -------------------------------------------------------------------------------


@pytest.fixture
def run(capsys):
    """Runs `btlm verify`: (exit code, standard output, standard error)."""
    ours = logging.getLogger("btlm_jax")
    before = ours.handlers, ours.propagate, ours.level

    def call(*argv):
        try:
            code = cli.main(["verify", *map(str, argv)])
        except SystemExit as e:  # from the argument parser
            code = e.code
        out = capsys.readouterr()
        assert "Traceback" not in out.out + out.err
        return code, out.out, out.err

    yield call
    ours.handlers, ours.propagate, ours.level = before


def test_command_equal(run, forms):
    digest = verify(forms["bin"], forms["bin"]).digest
    nbytes = metadata.read_metadata(forms["orbax"]).nbytes
    expected = f"31 tensors, {nbytes:,} bytes: no difference\nsha256 of the tensors' sha256: "
    for argv in (["orbax"], ["export"], ["bin", "orbax"], ["ocdbt", "sharded export"]):
        code, out, _ = run(*(forms[name] for name in argv))
        assert code == 0 and out == f"{expected}{digest}\n"
    assert run(forms["bin"], forms["orbax"], "--logits", "--max-memory", "160MiB")[0] == 0


def test_command_different(run, tmp_path):
    tensors = UNTIED.weights
    a = write_hf(tmp_path / "a", UNTIED, tensors)
    tensors[NAME][0, 0] += 1
    b = write_hf(tmp_path / "b", UNTIED, tensors, eos_token_id=3)
    code, out, _ = run(a, b)
    lines = out.splitlines()
    assert code == 1 and lines[0] == "2 differences in 32 tensors:" and len(lines) == 3
    width = len(NAME)
    assert lines[1].startswith("config eos_token_id".ljust(width) + "  ") and " and 3" in lines[1]
    assert lines[2].startswith(f"{NAME}  1 of {tensors[NAME].size:,} elements differ, max")
    code, out, _ = run(a, b, "--atol", "2")
    assert code == 1 and out.splitlines()[0] == "1 difference in 32 tensors:"


def test_command_damage(run, converted):
    file = next((converted / "state/ln_f.bias/c").glob("*"))
    with flipped(file, 3):
        code, out, _ = run(converted)
        assert code == 1 and "1 difference in 31 tensors" in out
        assert "transformer.ln_f.bias  sha256 " in out and ", recorded " in out
    with flipped(file, -1):
        code, out, _ = run(converted)
        assert code == 1 and "transformer.ln_f.bias" in out and "damaged checkpoint" in out
    with flipped(
        converted / metadata.MARKER_FILE, 8 * notes_at(converted / metadata.MARKER_FILE)[0] + 8 * 4
    ):
        code, out, err = run(converted)
        assert code == 2 and not out and "btlm: error: " in err
    assert run(converted)[0] == 0


def test_command_errors(run, forms, tmp_path):
    wrong = {
        "records no SHA-256": [forms["bin"]],
        "no directory": [tmp_path / "x"],
        "not an Orbax checkpoint": [tmp_path],
        "max_memory": [forms["orbax"], "--max-memory", "1kB"],
    }
    for said, argv in wrong.items():
        code, out, err = run(*argv)
        assert code == 2 and said in err and not out, said
    code, out, err = run()
    assert code == 2 and "required" in (out + err).lower()
    assert os.listdir(tmp_path) == []


def test_verifying_writes_nothing(forms):
    before = {p: p.stat().st_mtime_ns for f in forms.values() for p in [f, *f.rglob("*")]}
    verify(forms["orbax"])
    verify(forms["ocdbt"], forms["export"])
    verify(forms["bin"], forms["orbax's own"])
    assert before == {p: p.stat().st_mtime_ns for f in forms.values() for p in [f, *f.rglob("*")]}


def test_the_same_model_on_a_mesh_is_the_same_checkpoint(forms, tmp_path):
    """Loaded onto devices and saved again, every bit is where it was."""
    model, params = btlm.load(
        forms["orbax"], mesh=btlm.make_mesh(fsdp=2, devices=jax.devices()[:2])
    )
    btlm.save(tmp_path / "c", model.config, params)
    assert verify(tmp_path / "c", forms["bin"])
    assert verify(tmp_path / "c").digest == verify(forms["orbax"]).digest
    assert dataclasses.replace(model.config, alibi_slopes=None) == BTLMConfig.from_hf(
        json.loads((BIN / "single/config.json").read_text())
    )
