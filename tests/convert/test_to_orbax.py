"""Conversion from Hugging Face to Orbax and back is exact, and bad sources are refused."""

from __future__ import annotations

import dataclasses
import json
import os

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import btlm_jax as btlm
from btlm_jax import make_mesh
from btlm_jax.checkpoint import metadata
from btlm_jax.checkpoint.quantization import Quantization
from btlm_jax.convert import convert, export, load_hf, quantize, verify
from btlm_jax.convert.hf.safetensors_writer import TensorSpec
from btlm_jax.convert.hf.source import open_hf
from btlm_jax.model import alibi
from btlm_jax.train.bench.random_checkpoint import write_bin
from support import golden
from support.conversion_runs import assert_complete, write_one_layer_model

BF16, UNTIED = golden.load("g_bf16"), golden.load("i_untied")


def read_tensors(path) -> dict[str, np.ndarray]:
    source = open_hf(path)
    return {name: source.read_tensor(name) for name in source.tensors}


def assert_same_bits(a: dict, b: dict) -> None:
    assert set(a) == set(b)
    for name in a:
        assert a[name].dtype == b[name].dtype and a[name].shape == b[name].shape, name
        assert a[name].tobytes() == b[name].tobytes(), name


def test_conversion_and_export_restore_every_bit(case, tmp_path):
    golden.write_hf(tmp_path / "hf", case, tokenizer=True)
    report = convert(tmp_path / "hf", tmp_path / "c")
    assert (
        metadata.read_metadata(tmp_path / "c").config == case.config
    )  # with the exact stored slopes
    assert report.dtypes == {"bfloat16" if case.bf16 else "float32": report.tensors}
    export(tmp_path / "c", tmp_path / "back")
    assert_same_bits(read_tensors(tmp_path / "hf"), read_tensors(tmp_path / "back"))
    assert json.loads((tmp_path / "back/config.json").read_text()) == case.hf_config
    tokenizer = "tokenizer.json"
    assert (tmp_path / "back" / tokenizer).read_bytes() == (
        tmp_path / "hf" / tokenizer
    ).read_bytes()
    assert not list(tmp_path.glob("*.partial"))
    # The converted model computes the logits of the original.
    model, params = btlm.load(tmp_path / "c", dtype=jnp.float32)
    model = dataclasses.replace(model, compute_dtype=jnp.float32)
    got = model.apply(params, case["plain/input_ids"])
    assert golden.max_error(got, case.exact_logits) < 5e-5


def test_a_sharded_export_converts_back_to_the_same_bits(tmp_path):
    golden.write_hf(tmp_path / "hf", UNTIED)
    convert(tmp_path / "hf", tmp_path / "c")
    report = export(tmp_path / "c", tmp_path / "back", max_shard_bytes=60_000)
    assert len(report.files) > 3
    index = json.loads((tmp_path / "back/model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(report.files)
    total = sum(x.nbytes for x in UNTIED.weights.values())
    assert index["metadata"]["total_size"] == report.nbytes == total
    for name in report.files:
        size = sum(x.nbytes for x in load_file(tmp_path / "back" / name).values())
        assert size <= 60_000
    convert(tmp_path / "back", tmp_path / "c2")
    export(tmp_path / "c2", tmp_path / "again")
    assert_same_bits(read_tensors(tmp_path / "hf"), read_tensors(tmp_path / "again"))


@pytest.mark.parametrize("form", ["safetensors-sharded", "bin", "bin-sharded"])
def test_every_form_of_weights_round_trips(case, form, tmp_path):
    """Sharded safetensors and .bin files, which also store the tied head."""
    source, count = golden.write_hf(tmp_path / "hf", case), 3 if "sharded" in form else 1
    (source / "model.safetensors").unlink()
    names = list(case.weights)
    suffix = ".bin" if form.startswith("bin") else ".safetensors"
    stem = "pytorch_model" if suffix == ".bin" else "model"
    weight_map = {}
    for i in range(count):
        shard = names[i::count]
        file = f"{stem}{suffix}" if count == 1 else f"{stem}-{i + 1:05d}-of-{count:05d}{suffix}"
        weight_map |= dict.fromkeys(shard, file)
        if suffix == ".bin":
            tensors = [TensorSpec(n, case.weights[n].dtype, case.weights[n].shape) for n in shard]
            tied = case.config.tie_word_embeddings
            write_bin(
                source / file, tensors, lambda t: [case.weights[t.name].reshape(-1)], tied=tied
            )
            if tied and "transformer.wte.weight" in shard:
                weight_map["lm_head.weight"] = file
        else:
            save_file({n: case.weights[n] for n in shard}, source / file)
    if count > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        (source / f"{stem}{suffix}.index.json").write_text(json.dumps(index))
    convert(source, tmp_path / "c")
    export(tmp_path / "c", tmp_path / "back", max_shard_bytes=60_000)
    assert_same_bits(case.weights, read_tensors(tmp_path / "back"))
    assert verify(source, tmp_path / "back")


@pytest.mark.parametrize("form", ["single", "sharded"])
def test_bin_files_written_by_torch_round_trip(form, tmp_path):
    """The released model is published in this form."""
    folder = golden.GOLDEN / "btlm_bin"
    convert(folder / form, tmp_path / "c")
    report = export(tmp_path / "c", tmp_path / "back")
    with np.load(folder / "weights.npz") as z:
        expected = {name: z[name].view(ml_dtypes.bfloat16) for name in z.files}
    assert_same_bits(expected, read_tensors(tmp_path / "back"))
    assert report.tensors == len(expected) == 32
    model, params = btlm.load(tmp_path / "c")
    assert model.config.alibi_slopes == (0.83984375, 0.0625)
    assert np.isfinite(model.apply(params, np.arange(8)[None])).all()


def test_every_tensor_keeps_its_dtype(tmp_path):
    """Loading such a checkpoint without a dtype fails and says what to do."""
    source = golden.write_hf(tmp_path / "hf", UNTIED)
    mixed = UNTIED.weights
    name = "transformer.h.1.mlp.c_fc.weight"
    mixed[name] = mixed[name].astype(ml_dtypes.bfloat16)
    mixed[golden.SLOPES] = mixed[golden.SLOPES].astype(np.float16)
    save_file(mixed, source / "model.safetensors")
    convert(source, tmp_path / "c")
    export(tmp_path / "c", tmp_path / "back")
    assert_same_bits(mixed, read_tensors(tmp_path / "back"))
    with pytest.raises(ValueError, match=r"stored as bfloat16, float32.*pass dtype="):
        btlm.load(tmp_path / "c")
    btlm.load(tmp_path / "c", dtype=jnp.float32)


def test_a_stored_tied_head_is_checked_and_left_out(tmp_path):
    source = golden.write_hf(tmp_path / "hf", BF16)
    tensors = BF16.weights
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"].copy()
    save_file(tensors, source / "model.safetensors")
    convert(source, tmp_path / "c")
    export(tmp_path / "c", tmp_path / "back")
    assert_same_bits(BF16.weights, read_tensors(tmp_path / "back"))
    tensors["lm_head.weight"][0, 0] += 1
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(ValueError, match="differs from transformer"):
        convert(source, tmp_path / "c2")


def test_mask_buffers_are_ignored_by_name(tmp_path, caplog):
    source = golden.write_hf(tmp_path / "hf", BF16)
    old = BF16.weights
    old["transformer.h.0.attn.bias"] = np.ones((1, 1, 8, 8), np.uint8)
    old["transformer.h.1.attn.masked_bias"] = np.array(-1e4, np.float32)
    save_file(old, source / "model.safetensors")
    with caplog.at_level("INFO"):
        convert(source, tmp_path / "c")
    assert "transformer.h.0.attn.bias, transformer.h.1.attn.masked_bias" in caplog.text


def test_a_fresh_model_exports_exact_slopes(tmp_path):
    config = btlm.BTLMConfig.preset("tiny")
    model = btlm.BTLM(config)
    params = model.init(jax.random.key(0), mesh=make_mesh(fsdp=2, tensor=4))
    btlm.save(tmp_path / "c", config, params)
    export(tmp_path / "c", tmp_path / "hf")
    written = read_tensors(tmp_path / "hf")
    assert written[golden.SLOPES].shape == (4, 1)
    np.testing.assert_array_equal(written[golden.SLOPES].ravel(), alibi.slopes(4))
    assert written["transformer.h.0.mlp.c_fc.weight"].shape == (64, 170)  # no padding
    raw = json.loads((tmp_path / "hf/config.json").read_text())
    assert raw["torch_dtype"] == "float32" and btlm.BTLMConfig.from_hf(raw) == config
    convert(tmp_path / "hf", tmp_path / "back")
    ids = np.arange(12)[None]
    again = btlm.load(tmp_path / "back")
    np.testing.assert_array_equal(
        model.apply(btlm.load(tmp_path / "c")[1], ids), again[0].apply(again[1], ids)
    )


def test_a_changed_model_gets_a_new_config(tmp_path):
    """The original config.json no longer describes the model."""
    golden.write_hf(tmp_path / "hf", BF16)
    convert(tmp_path / "hf", tmp_path / "c")
    meta = metadata.read_metadata(tmp_path / "c")
    scaled = dataclasses.replace(meta.config, alibi_scaling=btlm.AlibiScaling(factor=4.0))
    _, params = btlm.load(tmp_path / "c")
    btlm.save(tmp_path / "c4", scaled, params, origin=meta.origin)
    export(tmp_path / "c4", tmp_path / "hf4")
    raw = json.loads((tmp_path / "hf4/config.json").read_text())
    assert raw["alibi_scaling"] == {"type": "linear", "factor": 4.0}
    assert raw["torch_dtype"] == "bfloat16"


def conversion_error(tmp_path, change) -> list[str]:
    """Converts a model after `change(tensors)`. Returns the lines of the error."""
    source = golden.write_hf(tmp_path / "hf", UNTIED)
    w = UNTIED.weights
    change(w)
    save_file(w, source / "model.safetensors")
    with pytest.raises(ValueError) as error:
        convert(source, tmp_path / "c")
    assert sorted(os.listdir(tmp_path)) == ["hf"]  # nothing half-written
    return str(error.value).splitlines()


def test_missing_and_unexpected_keys_are_all_listed(tmp_path):
    def change(w):
        w["transformer.extra"] = w.pop("transformer.ln_f.bias")
        del w["lm_head.weight"]
        w["transformer.h.0.attn.c_attn.bias"] = np.zeros(7, np.float32)
        w["transformer.ln_f.weight"] = w["transformer.ln_f.weight"].astype(np.int32)

    lines = conversion_error(tmp_path, change)
    assert sorted(x.strip() for x in lines[1:]) == [
        "Fix: use the model in float32, bfloat16 or float16 (cast or dequantize it).",
        "missing: lm_head.weight",
        "missing: transformer.ln_f.bias",
        "transformer.h.0.attn.c_attn.bias: found shape (7,), expected (192,)",
        "transformer.ln_f.weight: found dtype int32, expected float32 or bfloat16 or float16",
        "unexpected: transformer.extra",
    ]


def test_truncated_safetensors_are_refused(tmp_path):
    source = golden.write_hf(tmp_path / "hf", UNTIED)
    file = source / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        convert(source, tmp_path / "c")
    assert sorted(os.listdir(tmp_path)) == ["hf"]


def test_a_tokenizer_beyond_the_vocabulary_is_refused(tmp_path):
    source = golden.write_hf(tmp_path / "hf", UNTIED)
    golden.write_tokenizer(source, 80)
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["🙂"] = 500
    (source / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match="ids up to 500, the model's vocab_size is 97"):
        convert(source, tmp_path / "c")


def test_existing_targets_are_replaced_only_on_request(tmp_path):
    source = golden.write_hf(tmp_path / "hf", UNTIED)
    convert(source, tmp_path / "c")
    with pytest.raises(FileExistsError):
        convert(source, tmp_path / "c")
    convert(source, tmp_path / "c", overwrite=True)
    export(tmp_path / "c", tmp_path / "back")
    with pytest.raises(FileExistsError):
        export(tmp_path / "c", tmp_path / "back")
    export(tmp_path / "c", tmp_path / "back", overwrite=True)
    with pytest.raises(FileExistsError, match="was not written by this command"):
        export(tmp_path / "c", tmp_path / "c", overwrite=True)
    assert_same_bits(read_tensors(source), read_tensors(tmp_path / "back"))


def test_overwrite_never_replaces_a_downloaded_original(tmp_path):
    original = golden.write_hf(tmp_path / "hf", UNTIED)
    convert(original, tmp_path / "c")
    with pytest.raises(FileExistsError, match="was not written by this command"):
        export(tmp_path / "c", original, overwrite=True)
    assert_same_bits(UNTIED.weights, read_tensors(original))


def test_modelling_code_is_copied(tmp_path, caplog):
    source = golden.write_hf(tmp_path / "hf", UNTIED)
    convert(source, tmp_path / "c")
    with caplog.at_level("INFO"):
        export(tmp_path / "c", tmp_path / "back")
    assert "names configuration_btlm.py and modeling_btlm.py: copy them" in caplog.text
    for name in ("configuration_btlm.py", "modeling_btlm.py"):
        (source / name).write_text("raise SystemExit('never run')")
    caplog.clear()
    convert(source, tmp_path / "c", overwrite=True)
    with caplog.at_level("INFO"):
        export(tmp_path / "c", tmp_path / "back", overwrite=True)
    assert (tmp_path / "back/modeling_btlm.py").is_file() and "copy them" not in caplog.text


def test_missing_sources_are_reported(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        convert(tmp_path / "nowhere", tmp_path / "c")
    with pytest.raises(FileNotFoundError, match="no such checkpoint"):
        export(tmp_path / "nowhere", tmp_path / "c")


@pytest.mark.parametrize(
    "dtype, nan, inf",
    [
        (np.dtype(np.float32), 0xFFC00123, 0xFF800000),
        (np.dtype(ml_dtypes.bfloat16), 0xFFC1, 0xFF80),
        (np.dtype(np.float16), 0xFE23, 0xFC00),
    ],
    ids=str,
)
def test_nan_and_inf_are_refused_or_kept_bit_for_bit(dtype, nan, inf, tmp_path, caplog):
    """A refusal lists all tensors; if allowed, a NaN keeps its sign and payload."""
    bits = {2: np.uint16, 4: np.uint32}[dtype.itemsize]
    counts = {"transformer.h.0.mlp.c_fc.weight": (nan, 3), "transformer.ln_f.bias": (inf, 1)}

    def change(tensors):
        for name, (value, count) in counts.items():
            tensors[name].reshape(-1).view(bits)[-count:] = value

    source = write_one_layer_model(tmp_path / "hf", dtype=dtype, change=change)
    named = [f"{name}: {count}" for name, (_, count) in counts.items()]
    with pytest.raises(ValueError, match="NaN or Inf in 2 arrays") as error:
        convert(source, tmp_path / "c")
    assert all(text in str(error.value) for text in named)
    assert "pass allow_nonfinite=True to convert them unchanged" in str(error.value)
    assert not (tmp_path / "c").exists()
    caplog.clear()
    report = convert(source, tmp_path / "c", allow_nonfinite=True)
    assert report.resumed == report.tensors and report.dtypes == {dtype.name: report.tensors}
    warned = "".join(r.getMessage() for r in caplog.records if r.levelname == "WARNING")
    assert all(text in warned for text in named)
    convert(source, tmp_path / "uninterrupted", allow_nonfinite=True)
    assert_complete(tmp_path / "c", tmp_path / "uninterrupted")
    with pytest.raises(ValueError, match=r"pass allow_nonfinite=True to export them unchanged"):
        export(tmp_path / "c", tmp_path / "back")
    assert not list(tmp_path.glob("*back*"))
    with pytest.raises(ValueError, match=r"NaN or Inf in 2 arrays .* take an earlier checkpoint"):
        btlm.load(tmp_path / "c")
    with pytest.raises(ValueError, match="NaN or Inf in 2 arrays"):
        load_hf(source)
    with pytest.raises(ValueError, match="cannot be used to quantize: take an earlier checkpoint"):
        quantize(tmp_path / "c", tmp_path / "q", Quantization.parse("int8"))
    export(tmp_path / "c", tmp_path / "back", allow_nonfinite=True)
    original, back = open_hf(source), open_hf(tmp_path / "back")
    assert set(original.tensors) == set(back.tensors)
    for name in original.tensors:
        assert original.read_tensor(name).tobytes() == back.read_tensor(name).tobytes(), name
