"""Exports hold the weights bit for bit, in files that other libraries read."""

from __future__ import annotations

import dataclasses
import os
import random
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import btlm_jax as btlm
from btlm_jax.checkpoint import metadata
from btlm_jax.config import Positions
from btlm_jax.convert import convert, export, verify
from btlm_jax.convert.hf.source import open_hf
from btlm_jax.model import weights
from btlm_jax.model.params import unflatten_tree
from support import golden
from support.safetensors_files import assert_same_bits, read_json, read_safetensors_header

BF16, UNTIED = golden.load("g_bf16"), golden.load("i_untied")
INDEX = "model.safetensors.index.json"
NAME = "transformer.h.1.attn.c_proj.weight"


def test_exports_have_the_names_shapes_dtypes_and_bits_of_the_original(case, tmp_path):
    convert(golden.write_hf(tmp_path / "hf", case), tmp_path / "c")
    report = export(tmp_path / "c", tmp_path / "back")
    written = load_file(tmp_path / "back/model.safetensors")
    prefix = "weights/"
    keys = {k.removeprefix(prefix) for k in case.arrays if k.startswith(prefix)}
    assert set(written) == keys
    assert_same_bits(written, case.weights)
    assert ("lm_head.weight" in written) == (not case.config.tie_word_embeddings)
    assert (golden.SLOPES in written) == (case.config.positions is Positions.ALIBI)
    assert report.files == ("model.safetensors",) and report.tensors == len(keys)
    assert report.nbytes == sum(x.nbytes for x in written.values())
    assert sorted(os.listdir(tmp_path / "back")) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]


def test_a_training_checkpoint_is_exported_without_its_optimizer(tmp_path):
    """Orbax itself wrote the weights and the optimizer into one database."""
    leaves = list(weights.disk_leaves(UNTIED.config))
    tensors = UNTIED.weights
    state = {x.path: tensors[x.hf_name].reshape(x.weight.shape) for x in leaves}
    tree = unflatten_tree(state)
    items = {"state": tree, "optimizer": {"mu": tree, "count": np.array(7)}}
    notes = metadata.custom_metadata(UNTIED.config, {}, {}, {}, None)
    ocp.save_checkpointables(tmp_path / "t", items, custom_metadata=notes)
    assert metadata.read_metadata(tmp_path / "t").ocdbt
    report = export(tmp_path / "t", tmp_path / "hf")
    written = load_file(tmp_path / "hf/model.safetensors")
    slopes = written.pop(golden.SLOPES)
    np.testing.assert_array_equal(slopes.astype(np.float64).ravel(), UNTIED.config.alibi_slopes)
    del tensors[golden.SLOPES]
    assert_same_bits(written, tensors)
    assert report.tensors == len(tensors) + 1
    # A model without an original config.json gets the released flavor.
    raw = read_json(tmp_path / "hf/config.json")
    plain = dataclasses.replace(UNTIED.config, alibi_slopes=None)
    assert raw == plain.to_hf() | {"torch_dtype": "float32"}
    assert verify(tmp_path / "hf") and verify(tmp_path / "t", tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "c")
    export(tmp_path / "c", tmp_path / "again")
    assert_same_bits(
        load_file(tmp_path / "again/model.safetensors"), written | {golden.SLOPES: slopes}
    )


def test_completep_is_refused_until_it_is_folded(tmp_path):
    """The original code has no residual multiplier; the folded model has the same logits."""
    config = dataclasses.replace(UNTIED.config, completep_base_layers=1)
    btlm.save(tmp_path / "c", config, UNTIED.params, origin={"hf_config": UNTIED.hf_config})
    with pytest.raises(ValueError, match=r"completep_base_layers: found 1; neither config\.json"):
        export(tmp_path / "c", tmp_path / "hf")
    assert os.listdir(tmp_path) == ["c"]
    model, params = btlm.load(tmp_path / "c")
    btlm.save(tmp_path / "folded", *btlm.fold_completep(model.config, params))
    export(tmp_path / "folded", tmp_path / "hf")
    ids = UNTIED["plain/input_ids"]
    theirs, exported = btlm.convert.load_hf(tmp_path / "hf")
    np.testing.assert_array_equal(theirs.apply(exported, ids), model.apply(params, ids))
    assert not np.allclose(model.apply(params, ids), UNTIED.model.apply(params, ids), atol=0.1)
    differences = dict(verify(tmp_path / "c", tmp_path / "hf").differences)
    assert differences["config completep_base_layers"] == "1 and None"


@pytest.mark.parametrize(
    "stored, dtype",
    [(None, "bfloat16"), ("bfloat16", "bfloat16"), ("float16", "float16"), ("float32", "float32")],
)
def test_slopes_keep_their_dtype(tmp_path, stored, dtype):
    """The recorded dtype, or else the narrowest that holds them."""
    origin = {"slopes_dtype": stored} if stored else {}
    config = dataclasses.replace(UNTIED.config, alibi_slopes=(0.5, 0.25, 0.125, 0.0625))
    btlm.save(tmp_path / "c", config, UNTIED.params, origin=origin)
    export(tmp_path / "c", tmp_path / "hf")
    slopes = load_file(tmp_path / "hf/model.safetensors")[golden.SLOPES]
    assert slopes.dtype == dtype and slopes.shape == (4, 1)
    assert tuple(slopes.astype(np.float64).ravel()) == config.alibi_slopes


def test_slopes_that_the_recorded_dtype_cannot_hold_are_written_wider(tmp_path):
    """Slopes that changed since they were read are written wider rather than rounded."""
    slopes = tuple(float(np.float32(x)) for x in (0.1, 0.2, 0.3, 0.4))
    config = dataclasses.replace(UNTIED.config, alibi_slopes=slopes)
    btlm.save(tmp_path / "c", config, UNTIED.params, origin={"slopes_dtype": "bfloat16"})
    export(tmp_path / "c", tmp_path / "hf")
    written = load_file(tmp_path / "hf/model.safetensors")[golden.SLOPES]
    assert written.dtype == np.float32 and tuple(map(float, written.ravel())) == slopes
    assert verify(tmp_path / "c", tmp_path / "hf")


def test_an_existing_generation_config_is_copied_verbatim(tmp_path):
    """White space included."""
    source = golden.write_hf(tmp_path / "hf", BF16, tokenizer=True)
    text = '{"temperature":  0.7,\n\t"eos_token_id": 5, "note": "é"}'
    (source / "generation_config.json").write_text(text, encoding="utf-8")
    convert(source, tmp_path / "c")
    export(tmp_path / "c", tmp_path / "back")
    original = (source / "generation_config.json").read_bytes()
    assert (tmp_path / "back/generation_config.json").read_bytes() == original
    assert (tmp_path / "back/tokenizer.json").read_bytes() == (
        source / "tokenizer.json"
    ).read_bytes()
    assert verify(source, tmp_path / "back")


@pytest.mark.parametrize("tokens", [dict(bos_token_id=1, pad_token_id=None), dict(pad_token_id=0)])
def test_a_missing_generation_config_is_written_with_the_special_tokens(tmp_path, tokens):
    config = dataclasses.replace(UNTIED.config, **tokens)
    btlm.save(tmp_path / "c", config, UNTIED.params)
    export(tmp_path / "c", tmp_path / "back")
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    expected = {n: getattr(config, n) for n in names if getattr(config, n) is not None}
    written = read_json(tmp_path / "back/generation_config.json")
    assert written == {"_from_model_config": True} | expected


def flip_bit(file: Path, bit: int) -> bytes:
    original = file.read_bytes()
    damaged = bytearray(original)
    damaged[bit // 8] ^= 1 << (bit % 8)
    file.write_bytes(damaged)
    return original


def test_an_export_stops_at_flipped_bits_and_resumes_after_repair(tmp_path):
    """In the values or in the index of the shard."""
    convert(golden.write_hf(tmp_path / "hf", UNTIED), tmp_path / "c")
    rng = random.Random(0)
    for n, leaf in enumerate(rng.sample(list(weights.disk_leaves(UNTIED.config)), 6)):
        folder = tmp_path / "c/state" / ".".join(leaf.path) / "c"
        (file,) = (p for p in folder.rglob("*") if p.is_file())
        size, target = 8 * file.stat().st_size, tmp_path / f"back{n}"
        for bit in (rng.randrange(size - 160), size - 1 - rng.randrange(160)):
            original = flip_bit(file, bit)
            with pytest.raises(ValueError, match="damaged checkpoint") as error:
                export(tmp_path / "c", target)
            message = str(error.value)
            assert leaf.hf_name in message or "/".join(leaf.path) in message
            assert not target.exists()
            file.write_bytes(original)
    report = export(tmp_path / "c", target)  # resumes
    assert 0 < report.resumed < report.tensors
    assert_same_bits(load_file(target / "model.safetensors"), UNTIED.weights)
    assert not (tmp_path / f".{target.name}.partial").exists() and verify(target)


def test_a_flipped_bit_in_the_tokenizer_stops_the_export(tmp_path):
    convert(golden.write_hf(tmp_path / "hf", UNTIED, tokenizer=True), tmp_path / "c")
    original = flip_bit(tmp_path / "c/tokenizer/tokenizer.json", 999)
    with pytest.raises(ValueError, match=r"tokenizer\.json does not match the recorded SHA-256"):
        export(tmp_path / "c", tmp_path / "back")
    assert not (tmp_path / "back").exists()
    (tmp_path / "c/tokenizer/tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"tokenizer/tokenizer\.json is missing, which the"):
        export(tmp_path / "c", tmp_path / "back")
    assert not (tmp_path / ".back.partial").exists()
    (tmp_path / "c/tokenizer/tokenizer.json").write_bytes(original)
    export(tmp_path / "c", tmp_path / "back")
    assert verify(tmp_path / "back", tmp_path / "hf")


def mixed() -> dict[str, np.ndarray]:
    """Returns the untied model in three dtypes, with an odd number of narrow elements first."""
    tensors = UNTIED.weights
    for i, name in enumerate(sorted(tensors)):
        dtype = (np.float32, ml_dtypes.bfloat16, np.float16)[i % 3]
        tensors[name] = tensors[name].astype(dtype)
    return tensors


@pytest.mark.parametrize("max_bytes", [1, 3000, 70_000, 10**9])
def test_tensors_of_mixed_dtypes_are_aligned(tmp_path, max_bytes):
    source = golden.write_hf(tmp_path / "hf", UNTIED)
    tensors = mixed()
    save_file(tensors, source / "model.safetensors")
    convert(source, tmp_path / "c")
    report = export(tmp_path / "c", tmp_path / "back", max_shard_bytes=max_bytes)
    together: dict[str, np.ndarray] = {}
    for name in report.files:
        file = tmp_path / "back" / name
        entries, start = read_safetensors_header(file)
        assert start % 8 == 0 and entries.pop("__metadata__")["format"] == "pt"
        end = 0
        for tensor, info in entries.items():
            begin, after = info["data_offsets"]
            assert begin == end and (start + begin) % tensors[tensor].dtype.itemsize == 0
            end = after
        assert file.stat().st_size == start + end
        loaded = load_file(file)
        size = sum(x.nbytes for x in loaded.values())
        assert size <= max_bytes or len(loaded) == 1
        assert not together.keys() & loaded.keys()
        together |= loaded
        with safe_open(file, "numpy") as opened:  # a slice at a time, as torch reads shards
            for tensor in loaded:
                part = opened.get_slice(tensor)[:1]
                assert part.tobytes() == tensors[tensor][:1].tobytes()
    assert_same_bits(together, tensors)
    dtypes = {str(x.dtype) for x in tensors.values()}
    assert set(report.dtypes) == dtypes and sum(report.dtypes.values()) == len(tensors)
    assert verify(tmp_path / "back") and verify(tmp_path / "back", source)


@pytest.mark.parametrize("max_bytes, count", [(1, 33), (10**9, 1), (322_440, 1), (322_439, 2)])
def test_the_number_of_files_follows_their_largest_size(tmp_path, max_bytes, count):
    """From a file per tensor to one file, with an index that matches the files."""
    convert(golden.write_hf(tmp_path / "hf", UNTIED), tmp_path / "c")
    total = sum(x.nbytes for x in UNTIED.weights.values())
    if count < 3:
        max_bytes += total - 322_440
    report = export(tmp_path / "c", tmp_path / "back", max_shard_bytes=max_bytes)
    on_disk = sorted(p.name for p in (tmp_path / "back").glob("*.safetensors"))
    assert list(report.files) == on_disk and len(on_disk) == count
    if count == 1:
        assert on_disk == ["model.safetensors"] and not (tmp_path / "back" / INDEX).exists()
        return
    assert on_disk[0] == f"model-00001-of-{count:05d}.safetensors"
    index = read_json(tmp_path / "back" / INDEX)
    assert index["metadata"] == {"total_size": total} and report.nbytes == total
    headers = {f: read_safetensors_header(tmp_path / "back" / f)[0] for f in on_disk}
    held = {n: f for f, header in headers.items() for n in header if n != "__metadata__"}
    assert index["weight_map"] == held and list(held) != [] and set(held) == set(UNTIED.weights)
    assert list(index["weight_map"]) == sorted(index["weight_map"])
    assert set(open_hf(tmp_path / "back").tensors) == set(UNTIED.weights)
    assert verify(tmp_path / "back")


@pytest.mark.parametrize("max_bytes", [0, -1])
def test_a_size_that_is_not_positive_is_refused(tmp_path, max_bytes):
    with pytest.raises(ValueError, match="max_shard_bytes"):
        export(tmp_path / "c", tmp_path / "back", max_shard_bytes=max_bytes)
