"""Checkpoints: bit-equal on every mesh, atomic, and loud about damage."""

from __future__ import annotations

import dataclasses
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

import btlm_jax as btlm
from btlm_jax import AlibiScaling, BTLMConfig, make_mesh
from btlm_jax.checkpoint import metadata, unstacked
from btlm_jax.checkpoint.assets import asset_files
from btlm_jax.model import weights
from btlm_jax.model.params import check_params, flatten_tree, unflatten_tree
from btlm_jax.utils import atomic
from support.checkpoint_metadata import edit_metadata

# Sizes that force padding on a tensor axis of 4: V 509 -> 512, F 170 -> 172.
CONFIG = dataclasses.replace(
    BTLMConfig.preset("tiny"),
    vocab_size=509,
    alibi_slopes=(0.83984375, 0.1, 1 / 3, 2.0**-40),
    alibi_scaling=AlibiScaling(train_seq_len=64),
)


@pytest.fixture(scope="module")
def params():
    return btlm.BTLM(CONFIG).init(jax.random.key(0))


@pytest.fixture
def saved(tmp_path, params):
    btlm.save(tmp_path / "c", CONFIG, params)
    return tmp_path / "c"


def same_bits(a, b) -> bool:
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(x.dtype == y.dtype and np.array_equal(x, y) for x, y in pairs)


def test_round_trip(saved, params):
    model, loaded = btlm.load(saved)
    assert model.config == CONFIG  # slopes and all
    assert same_bits(params, loaded)
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(loaded))
    assert not list(saved.parent.glob("*.partial"))


@pytest.mark.parametrize(
    "sizes", [dict(fsdp=8), dict(fsdp=4, tensor=2), dict(data=2, fsdp=1, tensor=4)]
)
def test_onto_a_mesh_and_back(saved, params, sizes, tmp_path):
    mesh = make_mesh(**sizes)
    model, loaded = btlm.load(saved, mesh=mesh)
    pad = check_params(loaded, CONFIG)
    assert pad == ({"vocab": 512} if sizes.get("tensor") != 4 else {"vocab": 512, "mlp": 172})
    expected = btlm.BTLM(CONFIG).init(jax.random.key(0), mesh=mesh)
    for got, want in zip(jax.tree.leaves(loaded), jax.tree.leaves(expected), strict=True):
        assert got.sharding == want.sharding
        np.testing.assert_array_equal(got, want)
    assert "tensor" not in sizes or not loaded["wte"].is_fully_replicated
    # Saving from the mesh strips the padding: the same bits as the original.
    btlm.save(tmp_path / "again", model.config, loaded)
    assert metadata.read_metadata(tmp_path / "again").leaves == metadata.read_metadata(saved).leaves
    assert same_bits(params, btlm.load(tmp_path / "again")[1])


def test_dtype_on_load(saved, params):
    _, half = btlm.load(saved, dtype=jnp.bfloat16, mesh=make_mesh(fsdp=8))
    for x, y in zip(jax.tree.leaves(params), jax.tree.leaves(half), strict=True):
        assert y.dtype == jnp.bfloat16
        inner = tuple(slice(n) for n in x.shape)
        np.testing.assert_array_equal(np.asarray(y)[inner], x.astype(jnp.bfloat16))


def test_orbax_reads_it_without_us(saved, params):
    tree = ocp.load(saved)
    np.testing.assert_array_equal(tree["wte"], params["wte"])
    kernel = params["blocks"]["mlp"]["c_fc"]["kernel"]
    for i in range(CONFIG.n_layer):
        np.testing.assert_array_equal(tree["blocks"][str(i)]["mlp"]["c_fc"]["kernel"], kernel[i])


def test_numpy_weights_and_assets(tmp_path, params):
    file = tmp_path / "tokenizer.json"
    file.write_text("{}")
    host = jax.tree.map(np.asarray, params)
    btlm.save(tmp_path / "c", CONFIG, host, assets=[file], origin={"note": "x"})
    assert [p.name for p in asset_files(tmp_path / "c")] == ["tokenizer.json"]
    meta = metadata.read_metadata(tmp_path / "c")
    assert meta.origin == {"note": "x"}
    assert meta.nbytes == 4 * weights.count_parameters(CONFIG)
    assert same_bits(params, btlm.load(tmp_path / "c")[1])


def test_refuses_to_overwrite(saved, params):
    before = {p: p.stat().st_mtime_ns for p in saved.rglob("*")}
    with pytest.raises(FileExistsError, match="pass --overwrite"):
        btlm.save(saved, CONFIG, params)
    assert before == {p: p.stat().st_mtime_ns for p in saved.rglob("*")}
    changed = jax.tree.map(lambda x: x + 1, params)
    btlm.save(saved, CONFIG, changed, overwrite=True)
    assert same_bits(changed, btlm.load(saved)[1])
    assert sorted(os.listdir(saved.parent)) == ["c"]


def test_overwrite_spares_what_is_not_ours(tmp_path, params):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("precious")
    with pytest.raises(FileExistsError, match="was not written by this command"):
        btlm.save(tmp_path / "home", CONFIG, params, overwrite=True)
    assert (tmp_path / "home" / "thesis.tex").read_text() == "precious"


def test_nothing_is_left_of_a_failed_save(tmp_path, saved, params, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(metadata, "mark", fail)
    for target, overwrite in ((tmp_path / "new", False), (saved, True)):
        with pytest.raises(OSError, match=f"no space left while writing {target}; nothing"):
            btlm.save(target, CONFIG, params, overwrite=overwrite)
    assert sorted(os.listdir(tmp_path)) == ["c"]
    assert same_bits(params, btlm.load(saved)[1])


def test_failed_replacement_keeps_the_old(tmp_path, saved, params, monkeypatch):
    rename = os.rename

    def fail_at_the_end(a, b):
        if str(b) == str(saved) and "partial" in str(a):
            raise OSError("disk gone")
        rename(a, b)

    monkeypatch.setattr(atomic.os, "rename", fail_at_the_end)
    with pytest.raises(OSError, match="disk gone"):
        btlm.save(saved, CONFIG, jax.tree.map(lambda x: x + 1, params), overwrite=True)
    assert os.listdir(tmp_path) == ["c"]
    assert same_bits(params, btlm.load(saved)[1])


def test_leftovers_of_an_interrupted_run(tmp_path, params):
    (tmp_path / ".c.partial").mkdir()
    with pytest.raises(FileNotFoundError, match=r"an interrupted run left .*/\.c\.partial"):
        btlm.load(tmp_path / "c")
    (tmp_path / "c.partial").mkdir()  # somebody else's
    btlm.save(tmp_path / "c", CONFIG, params)
    assert sorted(os.listdir(tmp_path)) == ["c", "c.partial"]


def test_a_link_stays_a_link(tmp_path, saved, params):
    (tmp_path / "link").symlink_to(saved)
    btlm.save(tmp_path / "link", CONFIG, jax.tree.map(lambda x: x + 1, params), overwrite=True)
    assert (tmp_path / "link").is_symlink() and sorted(os.listdir(tmp_path)) == ["c", "link"]
    assert not same_bits(params, btlm.load(saved)[1])


@pytest.mark.parametrize("sizes", [None, dict(fsdp=2, tensor=4)])
def test_only_zeros_are_stripped(tmp_path, params, sizes):
    """Weights under a smaller configuration look padded; nothing of them may be lost."""
    mesh = make_mesh(**sizes) if sizes else None
    whole = btlm.BTLM(CONFIG).init(jax.random.key(0), mesh=mesh)
    smaller = dataclasses.replace(CONFIG, vocab_size=500)
    with pytest.raises(ValueError, match=r"wte: found values beyond its shape \(500, 64\)"):
        btlm.save(tmp_path / "c", smaller, whole)
    assert not os.listdir(tmp_path)


def test_what_weights_by_layer_are_computed_in(tmp_path, params, monkeypatch):
    """On a CPU, what they are in, which is known before they are read."""
    for dtype in ("float32", "bfloat16", "float16"):
        half = jax.tree.map(lambda x, dtype=dtype: x.astype(dtype), params)
        btlm.save(tmp_path / dtype, CONFIG, half)
    for stored, asked in (("float32", None), ("bfloat16", None), ("float16", "bfloat16")):
        model, found = btlm.load(tmp_path / stored, dtype=asked, unstacked=True)
        assert model.compute_dtype == model.runtime(found).dtype == jnp.dtype(asked or stored)
    monkeypatch.setattr(unstacked, "load", lambda *_, **__: pytest.fail("the weights were read"))
    with pytest.raises(ValueError, match="weights in float16: CPUs decode in bfloat16 or float32"):
        btlm.load(tmp_path / "float16", unstacked=True)


def test_dtypes_that_are_not_stored(tmp_path, params):
    doubles = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    with pytest.raises(ValueError, match=r"found .*float64.*expected one of float32, bfloat16"):
        btlm.save(tmp_path / "c", CONFIG, doubles)
    with pytest.raises(ValueError, match="found dtype int8, expected a float"):
        btlm.save(tmp_path / "c", CONFIG, jax.tree.map(lambda x: x.astype(jnp.int8), params))


@pytest.mark.parametrize("victim", ["state/wte/zarr.json", "state/_METADATA"])
def test_damaged_metadata(saved, victim):
    (saved / victim).write_bytes(b"")
    with pytest.raises(ValueError, match="damaged checkpoint"):
        btlm.load(saved)


def test_out_of_memory_is_not_damage(saved, monkeypatch):
    def fail(*args, **kwargs):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    monkeypatch.setattr(ocp, "load_checkpointables", fail)
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
        btlm.load(saved)


def test_what_is_not_a_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such checkpoint"):
        btlm.load(tmp_path / "nothing")
    with pytest.raises(ValueError, match="not an Orbax checkpoint"):
        btlm.load(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="btlm convert"):
        btlm.load(tmp_path)
    ocp.save(tmp_path / "foreign", {"x": np.zeros(3)})
    with pytest.raises(ValueError, match="without BTLM metadata"):
        btlm.load(tmp_path / "foreign")


def test_unknown_format(saved):
    edit_metadata(saved, lambda m: m.update(format=99))
    with pytest.raises(ValueError, match="format 99, this version reads 2"):
        btlm.load(saved)


def test_arrays_that_do_not_match_the_configuration(saved):
    edit_metadata(saved, lambda m: m["config"].update(n_layer=3, n_inner=171))
    with pytest.raises(ValueError) as error:
        btlm.load(saved)
    assert "missing: blocks/2/attn/c_attn/kernel" in str(error.value)
    assert "blocks/0/mlp/c_fc/kernel: found shape (64, 170), expected (64, 171)" in str(error.value)


def test_truncated_data(saved):
    files = sorted((saved / "state").glob("*/c/**/[0-9]*"), key=lambda p: p.stat().st_size)
    largest = files[-1]
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    with pytest.raises(ValueError, match="damaged checkpoint"):
        btlm.load(saved)


def test_missing_array_is_never_a_placeholder(saved, params, tmp_path):
    half = flatten_tree(ocp.load(saved))
    half.pop(("blocks", "1", "ln_1", "scale"))
    notes = ocp.metadata(saved).custom_metadata
    ocp.save(tmp_path / "half", unflatten_tree(half), custom_metadata=notes)
    with pytest.raises(ValueError, match="missing: blocks/1/ln_1/scale"):
        btlm.load(tmp_path / "half")


def test_weights_must_match(tmp_path, params):
    with pytest.raises(ValueError, match="do not match"):
        btlm.save(tmp_path / "c", dataclasses.replace(CONFIG, n_layer=3), params)
    assert not os.listdir(tmp_path)
