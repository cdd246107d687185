"""Export: the weights and nothing else, in files that others read, in the source's own words."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import random
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from orbax.checkpoint import v1 as ocp
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import btlm_jax as btlm
from btlm_jax import AlibiScaling, BTLMConfig
from btlm_jax.checkpoint import metadata
from btlm_jax.convert import convert, export, verify
from btlm_jax.convert.hf.safetensors_writer import SafetensorsFile, TensorSpec, plan_shards
from btlm_jax.convert.hf.source import open_hf
from btlm_jax.model import alibi, weights
from btlm_jax.model.params import unflatten_tree
from support import golden

BF16, UNTIED = golden.load("g_bf16"), golden.load("i_untied")
INDEX = "model.safetensors.index.json"
NAME = "transformer.h.1.attn.c_proj.weight"


@pytest.fixture
def notices(caplog):
    """What we log; a test of the command line may have turned our logger away from the root."""
    ours = logging.getLogger("btlm_jax")
    before = ours.propagate
    ours.propagate = True
    with caplog.at_level("INFO", "btlm_jax"):
        yield caplog
    ours.propagate = before


def json_of(path: Path):
    return json.loads(path.read_text())


def header(file: Path) -> tuple[dict, int]:
    """The header of a safetensors file, and where its data begin."""
    raw = file.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    return json.loads(raw[8:start]), start


def assert_same_bits(a: dict, b: dict) -> None:
    assert set(a) == set(b)
    for name in a:
        assert a[name].dtype == b[name].dtype and a[name].shape == b[name].shape, name
        assert a[name].tobytes() == b[name].tobytes(), name


# What is written -------------------------------------------------------------------------------


def test_names_shapes_and_dtypes_are_the_originals(case, tmp_path):
    """Those of the snapshot that the original PyTorch code gave, bit for bit."""
    convert(golden.write_hf(tmp_path / "hf", case), tmp_path / "c")
    report = export(tmp_path / "c", tmp_path / "back")
    written = load_file(tmp_path / "back/model.safetensors")
    prefix = "weights/"
    keys = {k.removeprefix(prefix) for k in case.arrays if k.startswith(prefix)}
    assert set(written) == keys
    assert_same_bits(written, case.weights)
    assert ("lm_head.weight" in written) == (not case.config.tie_word_embeddings)
    assert (golden.SLOPES in written) == case.config.alibi
    assert report.files == ("model.safetensors",) and report.tensors == len(keys)
    assert report.nbytes == sum(x.nbytes for x in written.values())
    assert sorted(os.listdir(tmp_path / "back")) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]


def test_of_a_training_checkpoint_the_weights(tmp_path):
    """Written by Orbax itself in one database, with the optimizer beside the weights."""
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
    # A model that never had a config.json gets the released flavor.
    raw = json_of(tmp_path / "hf/config.json")
    plain = dataclasses.replace(UNTIED.config, alibi_slopes=None)
    assert raw == plain.to_hf() | {"torch_dtype": "float32"}
    assert verify(tmp_path / "hf") and verify(tmp_path / "t", tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "c")
    export(tmp_path / "c", tmp_path / "again")
    assert_same_bits(
        load_file(tmp_path / "again/model.safetensors"), written | {golden.SLOPES: slopes}
    )


def test_completep_is_refused_and_exported_once_folded(tmp_path):
    """The original code has no factor on branches; folded in, it computes the same logits."""
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
    found = dict(verify(tmp_path / "c", tmp_path / "hf").differences)
    assert found["config completep_base_layers"] == "1 and None"


@pytest.mark.parametrize(
    "stored, dtype",
    [(None, "bfloat16"), ("bfloat16", "bfloat16"), ("float16", "float16"), ("float32", "float32")],
)
def test_slopes_come_back_in_their_dtype(tmp_path, stored, dtype):
    """The noted one; else the narrowest that holds them."""
    origin = {"slopes_dtype": stored} if stored else {}
    config = dataclasses.replace(UNTIED.config, alibi_slopes=(0.5, 0.25, 0.125, 0.0625))
    btlm.save(tmp_path / "c", config, UNTIED.params, origin=origin)
    export(tmp_path / "c", tmp_path / "hf")
    slopes = load_file(tmp_path / "hf/model.safetensors")[golden.SLOPES]
    assert slopes.dtype == dtype and slopes.shape == (4, 1)
    assert tuple(slopes.astype(np.float64).ravel()) == config.alibi_slopes


def test_slopes_that_their_dtype_cannot_hold(tmp_path):
    """Changed since they were read: wider rather than rounded."""
    slopes = tuple(float(np.float32(x)) for x in (0.1, 0.2, 0.3, 0.4))
    config = dataclasses.replace(UNTIED.config, alibi_slopes=slopes)
    btlm.save(tmp_path / "c", config, UNTIED.params, origin={"slopes_dtype": "bfloat16"})
    export(tmp_path / "c", tmp_path / "hf")
    written = load_file(tmp_path / "hf/model.safetensors")[golden.SLOPES]
    assert written.dtype == np.float32 and tuple(map(float, written.ravel())) == slopes
    assert verify(tmp_path / "c", tmp_path / "hf")


# config.json in the source's own flavor -------------------------------------------------------

FLAVOURS = {k: v for k, v in json_of(golden.GOLDEN / "legacy_configs.json").items() if k[0] != "_"}
SIZES = dict(n_embd=32, n_head=2, n_inner=40, n_layer=1, n_positions=64, vocab_size=61)


def flavor(name: str) -> dict:
    """A tiny config.json with the keys of a model of the family, and more that only torch reads."""
    common = dict(
        architectures=["BTLMLMHeadModel"],
        model_type="jais" if name.startswith("jais") else "btlm",
        activation_function="swiglu",
        position_embedding_type="alibi",
        layer_norm_epsilon=1e-05,
        initializer_range=0.073,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=60,
        eos_token_id=60,
        torch_dtype="float32",
        transformers_version="4.30.0",
        use_cache=True,
        reorder_and_upcast_attn=False,
    )
    return common | FLAVOURS[name]["raw"] | SIZES


def write_flavor(path: Path, raw: dict) -> dict[str, np.ndarray]:
    """A random model of a config.json. Returns its tensors."""
    config, rng = BTLMConfig.from_hf(raw), np.random.default_rng(0)
    tensors = {
        leaf.hf_name: rng.standard_normal(leaf.weight.hf_shape, np.float32)
        for leaf in weights.disk_leaves(config)
    }
    if config.alibi:
        tensors[golden.SLOPES] = alibi.slopes(config.n_head).astype(np.float32)[:, None]
    path.mkdir()
    (path / "config.json").write_text(json.dumps(raw))
    save_file(tensors, path / "model.safetensors")
    return tensors


def saved_again(checkpoint: Path, target: Path, **changes) -> BTLMConfig:
    """Saves a checkpoint with a changed configuration, as training would; returns that."""
    meta = metadata.read_metadata(checkpoint)
    config = dataclasses.replace(meta.config, **changes)
    leaves = {
        leaf.weight.path: np.concatenate(list(meta.blocks(leaf))).reshape(leaf.weight.shape)
        for leaf in weights.disk_leaves(meta.config)
    }
    stacked = {p: x[None] if p[0] == "blocks" else x for p, x in leaves.items()}
    btlm.save(target, config, unflatten_tree(stacked), origin=meta.origin)
    return config


def is_old(raw: dict) -> bool:
    return "width_scale" in raw


@pytest.mark.parametrize("name", FLAVOURS)
def test_flavors_come_back_verbatim(name, tmp_path, notices):
    raw = flavor(name)
    tensors = write_flavor(tmp_path / "hf", raw)
    convert(tmp_path / "hf", tmp_path / "c")
    export(tmp_path / "c", tmp_path / "back")
    written = json_of(tmp_path / "back/config.json")
    assert written == raw and list(written) == list(raw)  # in its order too
    assert_same_bits(load_file(tmp_path / "back/model.safetensors"), tensors)
    assert "cannot express" not in notices.text
    # Saved again without a change, it is still the same.
    saved_again(tmp_path / "c", tmp_path / "c2")
    export(tmp_path / "c2", tmp_path / "back2")
    assert json_of(tmp_path / "back2/config.json") == raw


CHANGES = [
    {"alibi_scaling": AlibiScaling(factor=4.0)},
    {"alibi_scaling": AlibiScaling(train_seq_len=32)},
    {"mup_embeddings_scale": 12.5},
    {"mup_scale_qk_dot_by_d": False, "layer_norm_epsilon": 1e-6},
    {"mup_output_alpha": 1.75},
]


@pytest.mark.parametrize(
    "name, changes",
    [
        (name, changes)
        for name in FLAVOURS
        for changes in CHANGES
        if flavor(name)["position_embedding_type"] == "alibi" or "alibi_scaling" not in changes
    ],
    ids=lambda x: x if isinstance(x, str) else "-".join(x),
)
def test_changes_are_told_in_the_same_flavor(name, changes, tmp_path, notices):
    raw = flavor(name)
    write_flavor(tmp_path / "hf", raw)
    convert(tmp_path / "hf", tmp_path / "c")
    config = saved_again(tmp_path / "c", tmp_path / "c2", **changes)
    export(tmp_path / "c2", tmp_path / "back")
    written = json_of(tmp_path / "back/config.json")
    assert BTLMConfig.from_hf(written) == dataclasses.replace(config, alibi_slopes=None)
    assert "cannot express" not in notices.text
    assert not any(key.startswith("mup_") for key in written) or not is_old(raw)
    assert is_old(written) == is_old(raw)
    assert ("output_logits_scale" in written) == ("output_logits_scale" in raw)
    # What has not changed is as it was, torch's own keys included.
    told = {"embeddings_scale", "output_logits_scale", "width_scale", "scale_qk_dot_by_d"}
    assert {k for k in raw if written[k] != raw[k]} <= {*changes, *told}
    assert set(written) - set(raw) <= {"alibi_scaling"}
    convert(tmp_path / "back", tmp_path / "c3")
    assert metadata.read_metadata(tmp_path / "c3").config == config


def test_what_jais_13b_cannot_express(tmp_path, notices):
    """Its width scale follows from n_embd: the released keys, and a warning."""
    raw = flavor("jais_13b")
    write_flavor(tmp_path / "hf", raw)
    convert(tmp_path / "hf", tmp_path / "c")
    config = saved_again(tmp_path / "c", tmp_path / "c2", mup_width_scale=0.125)
    export(tmp_path / "c2", tmp_path / "back")
    (warning,) = [r for r in notices.records if "cannot express" in r.getMessage()]
    assert warning.levelname == "WARNING" and "keys of the released BTLM" in warning.getMessage()
    written, plain = (
        json_of(tmp_path / "back/config.json"),
        dataclasses.replace(config, alibi_slopes=None),
    )
    assert written == plain.to_hf() | {"torch_dtype": "float32"}
    assert "width_scale" not in written and BTLMConfig.from_hf(written) == plain
    convert(tmp_path / "back", tmp_path / "c3")
    assert metadata.read_metadata(tmp_path / "c3").config == config


def test_old_keys_without_a_width_scale(tmp_path):
    """`embeddings_scale` alone is read, so a change of it must be told so too, or in new keys."""
    raw = flavor("jais_13b")
    del raw["width_scale"]
    write_flavor(tmp_path / "hf", raw)
    convert(tmp_path / "hf", tmp_path / "c")
    config = saved_again(tmp_path / "c", tmp_path / "c2", mup_embeddings_scale=12.5)
    export(tmp_path / "c2", tmp_path / "back")
    written = BTLMConfig.from_hf(json_of(tmp_path / "back/config.json"))
    assert written == dataclasses.replace(config, alibi_slopes=None)


def test_torch_dtype_of_weights_that_were_widened(tmp_path):
    """A bf16 model trained on in fp32; transformers 5 loads in the dtype that config.json names."""
    convert(golden.write_hf(tmp_path / "hf", BF16), tmp_path / "c")
    meta = metadata.read_metadata(tmp_path / "c")
    assert BF16.hf_config["torch_dtype"] == "bfloat16" and BF16.params["wte"].dtype == np.float32
    btlm.save(tmp_path / "c2", meta.config, BF16.params, origin=meta.origin)
    export(tmp_path / "c2", tmp_path / "back")
    assert json_of(tmp_path / "back/config.json")["torch_dtype"] == "float32"


# The small files -------------------------------------------------------------------------------


def test_generation_config_of_ones_own(tmp_path):
    """Verbatim, down to its white space."""
    source = golden.write_hf(tmp_path / "hf", BF16, tokenizer=True)
    text = '{"temperature":  0.7,\n\t"eos_token_id": 5, "note": "é"}'
    (source / "generation_config.json").write_text(text, encoding="utf-8")
    convert(source, tmp_path / "c")
    export(tmp_path / "c", tmp_path / "back")
    own = (source / "generation_config.json").read_bytes()
    assert (tmp_path / "back/generation_config.json").read_bytes() == own
    assert (tmp_path / "back/tokenizer.json").read_bytes() == (
        source / "tokenizer.json"
    ).read_bytes()
    assert verify(source, tmp_path / "back")


@pytest.mark.parametrize("tokens", [dict(bos_token_id=1, pad_token_id=None), dict(pad_token_id=0)])
def test_generation_config_that_is_made(tmp_path, tokens):
    config = dataclasses.replace(UNTIED.config, **tokens)
    btlm.save(tmp_path / "c", config, UNTIED.params)
    export(tmp_path / "c", tmp_path / "back")
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    expected = {n: getattr(config, n) for n in names if getattr(config, n) is not None}
    made = json_of(tmp_path / "back/generation_config.json")
    assert made == {"_from_model_config": True} | expected


# Damage ----------------------------------------------------------------------------------------


def flip(file: Path, bit: int) -> bytes:
    whole = file.read_bytes()
    damaged = bytearray(whole)
    damaged[bit // 8] ^= 1 << (bit % 8)
    file.write_bytes(damaged)
    return whole


def test_flipped_bits_are_named(tmp_path):
    """In values or in the index of the shard; nothing is exported, and the repaired source is."""
    convert(golden.write_hf(tmp_path / "hf", UNTIED), tmp_path / "c")
    rng = random.Random(0)
    for n, leaf in enumerate(rng.sample(list(weights.disk_leaves(UNTIED.config)), 6)):
        folder = tmp_path / "c/state" / ".".join(leaf.path) / "c"
        (file,) = (p for p in folder.rglob("*") if p.is_file())
        size, target = 8 * file.stat().st_size, tmp_path / f"back{n}"
        for bit in (rng.randrange(size - 160), size - 1 - rng.randrange(160)):
            whole = flip(file, bit)
            with pytest.raises(ValueError, match="damaged checkpoint") as error:
                export(tmp_path / "c", target)
            said = str(error.value)
            assert leaf.hf_name in said or "/".join(leaf.path) in said
            assert not target.exists()
            file.write_bytes(whole)
    report = export(tmp_path / "c", target)  # which continues what had been begun
    assert 0 < report.resumed < report.tensors
    assert_same_bits(load_file(target / "model.safetensors"), UNTIED.weights)
    assert not (tmp_path / f".{target.name}.partial").exists() and verify(target)


def test_flipped_bit_in_a_carried_file(tmp_path):
    convert(golden.write_hf(tmp_path / "hf", UNTIED, tokenizer=True), tmp_path / "c")
    whole = flip(tmp_path / "c/tokenizer/tokenizer.json", 999)
    with pytest.raises(ValueError, match=r"tokenizer\.json does not match the recorded SHA-256"):
        export(tmp_path / "c", tmp_path / "back")
    assert not (tmp_path / "back").exists()
    (tmp_path / "c/tokenizer/tokenizer.json").write_bytes(whole)
    export(tmp_path / "c", tmp_path / "back")
    assert verify(tmp_path / "back", tmp_path / "hf")


# Safetensors -----------------------------------------------------------------------------------


def mixed() -> dict[str, np.ndarray]:
    """The untied model in three dtypes, with an odd number of narrow elements first."""
    tensors = UNTIED.weights
    for i, name in enumerate(sorted(tensors)):
        dtype = (np.float32, ml_dtypes.bfloat16, np.float16)[i % 3]
        tensors[name] = tensors[name].astype(dtype)
    return tensors


@pytest.mark.parametrize("most", [1, 3000, 70_000, 10**9])
def test_mixed_dtypes_are_aligned(tmp_path, most):
    source = golden.write_hf(tmp_path / "hf", UNTIED)
    tensors = mixed()
    save_file(tensors, source / "model.safetensors")
    convert(source, tmp_path / "c")
    report = export(tmp_path / "c", tmp_path / "back", max_shard_bytes=most)
    together: dict[str, np.ndarray] = {}
    for name in report.files:
        file = tmp_path / "back" / name
        entries, start = header(file)
        assert start % 8 == 0 and entries.pop("__metadata__")["format"] == "pt"
        end = 0
        for tensor, info in entries.items():
            begin, after = info["data_offsets"]
            assert begin == end and (start + begin) % tensors[tensor].dtype.itemsize == 0
            end = after
        assert file.stat().st_size == start + end
        loaded = load_file(file)
        size = sum(x.nbytes for x in loaded.values())
        assert size <= most or len(loaded) == 1
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


@pytest.mark.parametrize("most, count", [(1, 33), (10**9, 1), (322_440, 1), (322_439, 2)])
def test_sizes_of_files(tmp_path, most, count):
    """From a file per tensor to all in one, which is exactly that large; and an index that fits."""
    convert(golden.write_hf(tmp_path / "hf", UNTIED), tmp_path / "c")
    total = sum(x.nbytes for x in UNTIED.weights.values())
    if count < 3:
        most += total - 322_440
    report = export(tmp_path / "c", tmp_path / "back", max_shard_bytes=most)
    on_disk = sorted(p.name for p in (tmp_path / "back").glob("*.safetensors"))
    assert list(report.files) == on_disk and len(on_disk) == count
    if count == 1:
        assert on_disk == ["model.safetensors"] and not (tmp_path / "back" / INDEX).exists()
        return
    assert on_disk[0] == f"model-00001-of-{count:05d}.safetensors"
    index = json_of(tmp_path / "back" / INDEX)
    assert index["metadata"] == {"total_size": total} and report.nbytes == total
    held = {n: f for f in on_disk for n in header(tmp_path / "back" / f)[0] if n[0] != "_"}
    assert index["weight_map"] == held and list(held) != [] and set(held) == set(UNTIED.weights)
    assert list(index["weight_map"]) == sorted(index["weight_map"])
    assert set(open_hf(tmp_path / "back").tensors) == set(UNTIED.weights)
    assert verify(tmp_path / "back")


@pytest.mark.parametrize("most", [0, -1])
def test_sizes_that_make_no_sense(tmp_path, most):
    with pytest.raises(ValueError, match="max_shard_bytes"):
        export(tmp_path / "c", tmp_path / "back", max_shard_bytes=most)


DTYPES = [np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)]
TENSORS = st.lists(
    st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(1, 9), max_size=3)), min_size=1
)


@given(TENSORS, st.integers(1, 3000))
def test_plan(drawn, most):
    """Every tensor once, in order but for its width, and no file that could have been smaller."""
    tensors = [TensorSpec(f"t{i}", dtype, tuple(shape)) for i, (dtype, shape) in enumerate(drawn)]
    shards = plan_shards(tensors, most)
    position = {t.name: i for i, t in enumerate(tensors)}
    assert [t for s in shards for t in sorted(s, key=lambda t: position[t.name])] == tensors
    sizes = [sum(t.nbytes for t in shard) for shard in shards]
    for i, shard in enumerate(shards):
        assert sizes[i] <= most or len(shard) == 1
        widths = [t.dtype.itemsize for t in shard]
        assert widths == sorted(widths, reverse=True)
        if i + 1 < len(shards):
            first = min(shards[i + 1], key=lambda t: position[t.name])
            assert sizes[i] + first.nbytes > most


def test_a_file_in_any_order(tmp_path):
    """Valid only once it is finished; what an interrupted run wrote is kept."""
    arrays = {"a": np.arange(5, dtype=np.float32), "b": np.array([[1.5, -0.0]], np.float16)}
    tensors = [TensorSpec(n, x.dtype, x.shape) for n, x in arrays.items()]
    path = tmp_path / "x.safetensors"
    file = SafetensorsFile(path, tensors, "1")
    blocks = [arrays["b"].reshape(-1)]
    sha256 = {"b": file.write("b", blocks).sha256}
    file = SafetensorsFile(path, tensors, "1")  # another run
    a = arrays["a"]
    sha256["a"] = file.write("a", [a[:2], a[2:]]).sha256
    with pytest.raises(Exception, match=r"(?i)header"):
        load_file(path)
    file.finish(sha256)
    assert_same_bits(load_file(path), arrays)
    assert json.loads(header(path)[0]["__metadata__"]["sha256"]) == sha256
