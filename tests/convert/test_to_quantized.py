"""Checkpoints in int8 and int4 are made from both formats, resumed, and loaded on any mesh."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from orbax.checkpoint import v1 as ocp
from safetensors.numpy import load_file, save_file

import btlm_jax as btlm
from btlm_jax import BTLMConfig, cli
from btlm_jax.checkpoint import metadata, quantization
from btlm_jax.checkpoint.quantization import Quantization
from btlm_jax.convert import auto, convert, export, quantize, verify
from btlm_jax.model import packed, weights
from btlm_jax.model.packed import PackedWeight
from btlm_jax.model.params import check_params, flatten_tree, init_params, is_unstacked
from btlm_jax.train import recipe_build, recipe_file
from support import golden
from support.checkpoint_metadata import edit_metadata
from support.conversion_runs import failing_after, read_tree
from support.fork_server import fork_server

INT4 = Quantization(4, 64)
KINDS = [Quantization(8), INT4, Quantization(4, 128, "bfloat16")]
# A tensor axis of 4 pads V 509 to 512 and F 171 to 172; int4 pads 171 inputs to 256.
CONFIG = dataclasses.replace(
    BTLMConfig.preset("tiny"), vocab_size=509, n_inner=171, tie_word_embeddings=False
)


def equal_bits(a, b) -> bool:
    equal = jax.tree.map(lambda x, y: x.dtype == y.dtype and bool((x == y).all()), a, b)
    return jax.tree.all(equal)


def dequantized(params) -> dict[weights.Path, np.ndarray]:
    """Returns float32 arrays by path; packed weights come with their inputs last."""

    def one(x):
        return np.asarray(packed.dequantize(x, jnp.float32) if isinstance(x, PackedWeight) else x)

    return {path: one(x) for path, x in flatten_tree(params).items()}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> Path:
    """A checkpoint of floats and its quantizations."""
    folder = tmp_path_factory.mktemp("checkpoints")
    params = init_params(jax.random.key(0), CONFIG)
    btlm.save(folder / "floats", CONFIG, params)
    for to in KINDS:
        quantize(folder / "floats", folder / str(to.bits) / str(to.group), to)
    return folder


def quantized_path(checkpoints: Path, to: Quantization) -> Path:
    return checkpoints / str(to.bits) / str(to.group)


# Every kind of model, on disk in fp32 and bf16, and every scheme; an untied head in both widths.
@pytest.mark.parametrize(
    "name, to",
    [
        ("b_sp_alibi", KINDS[1]),
        ("f_learned_gelu_mup", KINDS[0]),
        ("g_bf16", KINDS[1]),
        ("g_bf16", KINDS[2]),
        ("i_untied", KINDS[0]),
        ("i_untied", KINDS[2]),
    ],
    ids=str,
)
def test_quantized_checkpoints_equal_weights_quantized_in_memory(name, to, tmp_path):
    """From Hugging Face files and from Orbax checkpoints, bit for bit."""
    case = golden.load(name)
    golden.write_hf(tmp_path / "hf", case, tokenizer=True)
    report = quantize(tmp_path / "hf", tmp_path / "q", to)
    assert report.resumed == 0 and report.files == ("tokenizer.json",)
    model, params = btlm.load(tmp_path / "q")
    assert model.config == case.config
    dtype = jnp.bfloat16 if case.bf16 else jnp.float32
    source = jax.tree.map(lambda x: x.astype(dtype), case.params)
    expected = quantization.quantize_params(source, case.config, to)
    assert equal_bits(params, expected) and check_params(params, model.config) == {}
    convert(tmp_path / "hf", tmp_path / "c")
    quantize(tmp_path / "c", tmp_path / "again", to)
    assert verify(tmp_path / "q") and verify(tmp_path / "q", tmp_path / "again")
    meta = metadata.read_metadata(tmp_path / "q")
    assert meta.quantization == to and report.nbytes == meta.nbytes
    layers = 5 if case.config.gated else 4
    heads = {"int8": 1 + (not case.config.tie_word_embeddings), "bfloat16": 0}[to.embedding]
    assert len(meta.errors) == layers * case.config.n_layer + heads
    for path, errors in meta.errors.items():
        assert errors["rms"] < (0.12 if to.bits == 4 and "blocks" in path else 0.012)
        assert "q4_0" not in errors or errors["rms"] <= errors["q4_0"]


MESHES = [dict(fsdp=8), dict(fsdp=4, tensor=2), dict(fsdp=2, tensor=4), dict(fsdp=2, context=4)]


@pytest.mark.parametrize(
    "to, sizes",
    [*((INT4, sizes) for sizes in MESHES), (KINDS[0], MESHES[2]), (KINDS[2], MESHES[1])],
    ids=str,
)
def test_quantized_checkpoints_load_onto_meshes(checkpoints, to, sizes, caplog):
    mesh = btlm.make_mesh(**sizes)
    _, unsharded = btlm.load(quantized_path(checkpoints, to))
    params = btlm.load(quantized_path(checkpoints, to), mesh=mesh)[1]
    pad = check_params(params, CONFIG)
    assert pad.get("mlp") == {2: 172, 4: 172}.get(sizes.get("tensor", 1))
    got, expected = dequantized(params), dequantized(unsharded)
    for path, x in expected.items():
        stored = got[path][tuple(slice(n) for n in x.shape)]
        np.testing.assert_array_equal(stored, x, err_msg="/".join(path))
        assert np.count_nonzero(got[path]) == np.count_nonzero(x)  # padding is zero
    rows = ("fsdp", "context")
    for path, spec in (
        (("attn", "c_attn"), P(None, "tensor", None, rows)),
        (("attn", "c_proj"), P(rows, "tensor")),
        (("mlp", "c_fc"), P("tensor", rows)),
        (("mlp", "c_proj"), P(rows, "tensor")),
    ):
        kernel = flatten_tree(params)["blocks", "0", *path, "kernel"]
        assert kernel.values.sharding.spec == spec
        assert kernel.values.dtype == (jnp.int4 if to.bits == 4 else jnp.int8)
        split = spec if kernel.scales.shape[-1] > 1 else P(*spec[:-1], None)
        assert kernel.scales.sharding.spec == split
    # 64 inputs over 8 devices have groups of 8; 43 inputs on one of 4 have groups of 1: a warning.
    coarse = [r.getMessage() for r in caplog.records if "no whole groups" in r.getMessage()]
    assert len(coarse) == (to.bits == 4 and "tensor" in sizes)
    assert all("blocks/mlp/c_proj/kernel" in message for message in coarse)


def test_rules_that_scatter_the_inputs_are_refused(checkpoints):
    """Heads are the outermost of the flattened inputs, and only they can be sharded."""
    scattered = tuple(
        {"heads": ("heads", None), "head_dim": ("head_dim", "tensor")}.get(name, (name, axis))
        for name, axis in btlm.BTLM(CONFIG).rules
    )
    mesh = btlm.make_mesh(fsdp=4, tensor=2)
    with pytest.raises(ValueError, match=r"attn/c_proj/kernel: .*'head_dim'.*at 'heads' only"):
        btlm.load(quantized_path(checkpoints, INT4), mesh=mesh, rules=scattered)


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
def test_the_dtype_applies_to_floats_only(checkpoints, dtype):
    _, params = btlm.load(quantized_path(checkpoints, INT4), dtype=dtype)
    kernel = params["blocks"]["1"]["mlp"]["c_fc"]["kernel"]
    assert kernel.packed and kernel.scales.dtype == jnp.bfloat16
    assert params["wte"].values.dtype == jnp.int8 and params["wte"].scales.dtype == jnp.float32
    assert params["ln_f"]["scale"].dtype == (dtype or jnp.float32)


@pytest.mark.parametrize("sizes", [None, *MESHES[1:3]], ids=str)
@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
def test_floats_load_unstacked(checkpoints, sizes, dtype):
    """With inputs last on a CPU, and in the order of the table on a mesh."""
    mesh = btlm.make_mesh(**sizes) if sizes else None
    model, unstacked = btlm.load(checkpoints / "floats", unstacked=True, mesh=mesh, dtype=dtype)
    _, stacked = btlm.load(checkpoints / "floats", mesh=mesh, dtype=dtype)
    assert check_params(unstacked, CONFIG) == check_params(stacked, CONFIG)
    expected = flatten_tree(stacked)
    for leaf in weights.disk_leaves(model.config):
        x, got = expected[leaf.weight.path], flatten_tree(unstacked)[leaf.path]
        if leaf.layer is not None:
            with jax.set_mesh(mesh) if mesh else jax.numpy_dtype_promotion("standard"):
                x = jax.jit(lambda x, i=leaf.layer: x[i])(x)
        if mesh is None and leaf.weight.inputs:
            x = packed.transposed(x, leaf.weight.inputs)
        else:
            assert got.sharding.is_equivalent_to(x.sharding, x.ndim)
        assert equal_bits(got, x)


@pytest.mark.parametrize("sizes", [None, MESHES[1]], ids=str)
def test_hugging_face_files_load_unstacked(sizes, tmp_path):
    mesh = btlm.make_mesh(**sizes) if sizes else None
    golden.write_hf(tmp_path / "hf", golden.load("i_untied"))
    convert(tmp_path / "hf", tmp_path / "c")
    _, loaded = auto.load_any_checkpoint(tmp_path / "hf", mesh=mesh, unstacked=True)
    _, expected = auto.load_any_checkpoint(tmp_path / "c", mesh=mesh, unstacked=True)
    assert is_unstacked(loaded) and equal_bits(loaded, expected)


def test_orbax_alone_reads_quantized_checkpoints(checkpoints):
    tree = ocp.load(quantized_path(checkpoints, INT4))
    _, params = btlm.load(quantized_path(checkpoints, INT4))
    kernel = params["blocks"]["0"]["attn"]["c_attn"]["kernel"]
    stored = tree["blocks"]["0"]["attn"]["c_attn"]["kernel"]
    np.testing.assert_array_equal(stored["int4"], kernel.values)
    np.testing.assert_array_equal(stored["scales"], kernel.scales)
    np.testing.assert_array_equal(tree["wte"]["int8"], params["wte"].values)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    if not os.path.isdir("/proc/self/task"):
        pytest.skip("needs Linux")
    with fork_server("support.conversion_runs", tmp_path_factory.mktemp("forks")) as server:
        yield server


def test_a_killed_quantization_resumes_to_the_same_bytes(checkpoints, server, tmp_path):
    """Also between values and scales of a weight, which are then both written again."""
    source, expected = checkpoints / "floats", read_tree(quantized_path(checkpoints, INT4))
    uninterrupted = server.run("quantize", source, tmp_path / "uninterrupted", at=-1)
    assert read_tree(tmp_path / "uninterrupted") == expected
    written = [path if event == "open" else "" for event, path in uninterrupted["changes"]]
    records = [i for i, path in enumerate(written) if re.search(r"finished/.*\.json\.new$", path)]
    between = next(i for i in records if written[i].endswith(".scales.json.new"))
    resumed = set()
    points = [records[0], between, records[len(records) // 2], records[-1]]
    for _, target in server.kill_at("quantize", source, tmp_path, points):
        assert not target.exists()
        report = quantize(source, target, INT4)
        resumed.add(report.resumed)
        assert read_tree(target) == expected
        assert os.listdir(target.parent) == ["c"]
    assert len(resumed) == 4 and {0, len(records) - 1} <= resumed


def test_a_quantization_that_failed_at_any_array_resumes(checkpoints, tmp_path):
    expected = read_tree(quantized_path(checkpoints, INT4))
    for arrays in (1, 2, 5, 8):
        with failing_after(arrays, OSError("failed")), pytest.raises(OSError, match="failed"):
            quantize(checkpoints / "floats", tmp_path / "q", INT4)
        if arrays == 2:  # work of another kind starts over
            assert quantize(checkpoints / "floats", tmp_path / "q", Quantization(8)).resumed == 0
            shutil.rmtree(tmp_path / "q")
    assert quantize(checkpoints / "floats", tmp_path / "q", INT4).resumed > 0
    assert read_tree(tmp_path / "q") == expected


def test_a_budget_below_one_weight_is_refused(checkpoints, tmp_path):
    with pytest.raises(ValueError, match=r"max_memory: found 1000 B, expected at least .* MiB"):
        quantize(checkpoints / "floats", tmp_path / "q", INT4, max_memory=1000)
    assert not os.listdir(tmp_path)


def test_unsupported_uses_of_quantized_checkpoints_are_refused(checkpoints, tmp_path):
    quantized = quantized_path(checkpoints, INT4)
    with pytest.raises(ValueError, match=r"is quantized \(int4 in groups of 64.*export the check"):
        export(quantized, tmp_path / "hf")
    with pytest.raises(ValueError, match="is quantized already"):
        quantize(quantized, tmp_path / "again", INT4)
    with pytest.raises(ValueError, match="hold int4 in groups of 64, embedding int8 and floats"):
        verify(quantized, checkpoints / "floats")
    with pytest.raises(ValueError, match=r"hold int4 .* and int8, embedding int8: only"):
        verify(quantized, quantized_path(checkpoints, KINDS[0]))
    with pytest.raises(ValueError, match="atol: quantized"):
        verify(quantized, quantized, atol=0.1)
    with pytest.raises(ValueError, match="found unstacked ones, expected stacked ones"):
        btlm.save(tmp_path / "c", *reversed([btlm.load(quantized)[1], CONFIG]))
    with pytest.raises(ValueError, match="which has none"):
        quantize(checkpoints / "floats", tmp_path / "again", INT4, revision="main")
    with pytest.raises(ValueError, match="quantize: found 'int5'"):
        quantize(checkpoints / "floats", tmp_path / "again", "int5")
    assert not os.listdir(tmp_path)


def test_training_from_a_quantized_checkpoint_is_refused(checkpoints):
    mesh = btlm.make_mesh()
    recipe = recipe_file.load_recipe(
        "finetune", [f"model.checkpoint={quantized_path(checkpoints, INT4)}"]
    )
    with pytest.raises(ValueError, match=r"model.checkpoint: .* is quantized, and only floats"):
        recipe_build.build_params(recipe, btlm.BTLM(CONFIG), mesh)


@pytest.mark.parametrize("name", ["h.1.mlp.c_fc.weight", "wte.weight", "ln_f.bias"])
def test_nan_is_refused(name, tmp_path):
    case = golden.load("b_sp_alibi")
    source = golden.write_hf(tmp_path / "hf", case)
    tensors = load_file(source / "model.safetensors")
    tensors[f"transformer.{name}"].flat[7] = np.nan
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(ValueError, match="holds NaN or Inf"):
        quantize(source, tmp_path / "q", INT4)
    assert not (tmp_path / "q").exists()


def test_damage_is_found_by_verify_and_quantize(checkpoints, tmp_path):
    for folder, source in (("q", quantized_path(checkpoints, INT4)), ("c", checkpoints / "floats")):
        shutil.copytree(source, tmp_path / folder)
    for file in (
        tmp_path / "q/state/blocks.1.mlp.c_fc.kernel.int4/c/0/0",
        tmp_path / "c/state/blocks.1.mlp.c_fc.kernel/c/0/0",
    ):
        data = bytearray(file.read_bytes())
        data[100] ^= 1
        file.write_bytes(data)
    for other in ((), (quantized_path(checkpoints, INT4),)):
        differences = verify(tmp_path / "q", *other).differences
        assert [name for name, _ in differences] == ["transformer.h.1.mlp.c_fc.weight.int4"]
    assert differences[0][1].startswith("1 of 10,944 elements differ")  # 171 x 128 / 2 bytes
    with pytest.raises(ValueError, match="c_fc/kernel: its bytes do not match the recorded SHA"):
        quantize(tmp_path / "c", tmp_path / "again", INT4)


def test_arrays_of_another_quantization_are_refused(checkpoints, tmp_path):
    """The metadata state another quantization than that of the arrays."""
    shutil.copytree(quantized_path(checkpoints, INT4), tmp_path / "q")
    edit_metadata(tmp_path / "q", lambda notes: notes["quantization"].update(bits=8, group=None))
    with pytest.raises(ValueError) as error:
        btlm.load(tmp_path / "q")
    assert "missing: blocks/0/attn/c_attn/kernel/int8" in str(error.value)
    assert "blocks/0/attn/c_proj/kernel/scales: found shape (64, 2), expected (64, 1)" in str(
        error.value
    )
    assert "found dtype bfloat16, expected float32" in str(error.value)


def test_the_command_quantizes(checkpoints, tmp_path, capsys):
    argv = ["convert", str(checkpoints / "floats"), str(tmp_path / "q"), "--quantize", "int4:128"]
    assert cli.main([*argv, "--quantize-embedding", "bfloat16"]) == 0
    out = capsys.readouterr().out
    assert "blocks/mlp/c_fc/kernel: relative RMS error 0.0" in out and "Q4_0" in out
    assert verify(tmp_path / "q", quantized_path(checkpoints, KINDS[2]))
    assert cli.main(["info", str(tmp_path / "q")]) == 0
    out = capsys.readouterr().out
    assert "int4 in groups of 128, embedding bfloat16" in out and "bits a parameter" in out
    assert "blocks/attn/c_proj/kernel: relative RMS error" in out
    assert cli.main([*argv, "--allow-nonfinite", "--overwrite"]) == 2
    assert "NaN and Inf cannot be quantized" in capsys.readouterr().err
