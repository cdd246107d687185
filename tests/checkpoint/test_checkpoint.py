"""Checkpoints: bit-equal on every mesh, written atomically, and damage raises errors."""

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
from btlm_jax.checkpoint import metadata, orbax_metadata
from btlm_jax.checkpoint.assets import asset_files
from btlm_jax.model import weights
from btlm_jax.model.params import check_params, flatten_tree, is_unstacked, unflatten_tree
from btlm_jax.utils import atomic
from support.checkpoint_metadata import edit_metadata
from support.compare import same_bits

# These sizes need padding on a tensor axis of 4: V 509 -> 512, F 170 -> 172.
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


def test_saved_weights_and_configuration_are_loaded_unchanged(saved, params):
    model, loaded = btlm.load(saved)
    assert model.config == CONFIG  # including the slopes
    assert same_bits(params, loaded)
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(loaded))
    assert not list(saved.parent.glob("*.partial"))


def test_the_old_name_of_unstacked_works_with_a_warning(saved):
    with pytest.warns(DeprecationWarning, match="renamed to unstacked"):
        _, loaded = btlm.load(saved, by_layer=True)
    assert is_unstacked(loaded)


@pytest.mark.parametrize(
    "sizes", [dict(fsdp=8), dict(fsdp=4, tensor=2), dict(data=2, fsdp=1, tensor=4)]
)
def test_weights_are_padded_on_a_mesh_and_stripped_on_save(saved, params, sizes, tmp_path):
    mesh = make_mesh(**sizes)
    model, loaded = btlm.load(saved, mesh=mesh)
    padding = check_params(loaded, CONFIG)
    assert padding == ({"vocab": 512} if sizes.get("tensor") != 4 else {"vocab": 512, "mlp": 172})
    expected = btlm.BTLM(CONFIG).init(jax.random.key(0), mesh=mesh)
    for x, y in zip(jax.tree.leaves(loaded), jax.tree.leaves(expected), strict=True):
        assert x.sharding == y.sharding
        np.testing.assert_array_equal(x, y)
    assert "tensor" not in sizes or not loaded["wte"].is_fully_replicated
    # Saving from the mesh strips the padding: the same bits as the original.
    btlm.save(tmp_path / "again", model.config, loaded)
    assert metadata.read_metadata(tmp_path / "again").leaves == metadata.read_metadata(saved).leaves
    assert same_bits(params, btlm.load(tmp_path / "again")[1])


def test_weights_are_converted_to_the_requested_dtype(saved, params):
    _, half = btlm.load(saved, dtype=jnp.bfloat16, mesh=make_mesh(fsdp=8))
    for x, y in zip(jax.tree.leaves(params), jax.tree.leaves(half), strict=True):
        assert y.dtype == jnp.bfloat16
        inner = tuple(slice(n) for n in x.shape)
        np.testing.assert_array_equal(np.asarray(y)[inner], x.astype(jnp.bfloat16))


def test_orbax_alone_reads_a_checkpoint(saved, params):
    tree = ocp.load(saved)
    np.testing.assert_array_equal(tree["wte"], params["wte"])
    kernel = params["blocks"]["mlp"]["c_fc"]["kernel"]
    for i in range(CONFIG.n_layer):
        np.testing.assert_array_equal(tree["blocks"][str(i)]["mlp"]["c_fc"]["kernel"], kernel[i])


def test_numpy_weights_assets_and_origin_are_saved(tmp_path, params):
    file = tmp_path / "tokenizer.json"
    file.write_text("{}")
    host = jax.tree.map(np.asarray, params)
    btlm.save(tmp_path / "c", CONFIG, host, assets=[file], origin={"note": "x"})
    assert [p.name for p in asset_files(tmp_path / "c")] == ["tokenizer.json"]
    meta = metadata.read_metadata(tmp_path / "c")
    assert meta.origin == {"note": "x"}
    assert meta.nbytes == 4 * weights.count_parameters(CONFIG)
    assert same_bits(params, btlm.load(tmp_path / "c")[1])


def test_an_existing_checkpoint_is_replaced_only_with_overwrite(saved, params):
    before = {p: p.stat().st_mtime_ns for p in saved.rglob("*")}
    with pytest.raises(FileExistsError, match="pass overwrite=True"):
        btlm.save(saved, CONFIG, params)
    assert before == {p: p.stat().st_mtime_ns for p in saved.rglob("*")}
    changed = jax.tree.map(lambda x: x + 1, params)
    btlm.save(saved, CONFIG, changed, overwrite=True)
    assert same_bits(changed, btlm.load(saved)[1])
    assert sorted(os.listdir(saved.parent)) == ["c"]


def test_overwrite_never_replaces_a_foreign_directory(tmp_path, params):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("precious")
    with pytest.raises(FileExistsError, match="was not written by this command"):
        btlm.save(tmp_path / "home", CONFIG, params, overwrite=True)
    assert (tmp_path / "home" / "thesis.tex").read_text() == "precious"


def test_a_failed_save_leaves_nothing(tmp_path, saved, params, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(orbax_metadata, "commit_marker", fail)
    for target, overwrite in ((tmp_path / "new", False), (saved, True)):
        with pytest.raises(OSError, match=f"no space left while writing {target}; nothing"):
            btlm.save(target, CONFIG, params, overwrite=overwrite)
    assert sorted(os.listdir(tmp_path)) == ["c"]
    assert same_bits(params, btlm.load(saved)[1])


def test_a_failed_replacement_keeps_the_old_checkpoint(tmp_path, saved, params, monkeypatch):
    rename = os.rename

    def fail_on_commit(source, target):
        if str(target) == str(saved) and "partial" in str(source):
            raise OSError("disk gone")
        rename(source, target)

    monkeypatch.setattr(atomic.os, "rename", fail_on_commit)
    with pytest.raises(OSError, match="disk gone"):
        btlm.save(saved, CONFIG, jax.tree.map(lambda x: x + 1, params), overwrite=True)
    assert os.listdir(tmp_path) == ["c"]
    assert same_bits(params, btlm.load(saved)[1])


def test_leftovers_of_an_interrupted_run_are_named_and_removed(tmp_path, params):
    (tmp_path / ".c.partial").mkdir()
    with pytest.raises(FileNotFoundError, match=r"an interrupted run left .*/\.c\.partial"):
        btlm.load(tmp_path / "c")
    (tmp_path / "c.partial").mkdir()  # of another program
    btlm.save(tmp_path / "c", CONFIG, params)
    assert sorted(os.listdir(tmp_path)) == ["c", "c.partial"]


def test_a_symbolic_link_is_kept_when_its_target_is_replaced(tmp_path, saved, params):
    (tmp_path / "link").symlink_to(saved)
    btlm.save(tmp_path / "link", CONFIG, jax.tree.map(lambda x: x + 1, params), overwrite=True)
    assert (tmp_path / "link").is_symlink() and sorted(os.listdir(tmp_path)) == ["c", "link"]
    assert not same_bits(params, btlm.load(saved)[1])


def test_dtypes_that_cannot_be_stored_are_refused(tmp_path, params):
    doubles = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    with pytest.raises(ValueError, match="found float64, expected float32, bfloat16"):
        btlm.save(tmp_path / "c", CONFIG, doubles)
    with pytest.raises(ValueError, match="found dtype int8, expected a float"):
        btlm.save(tmp_path / "c", CONFIG, jax.tree.map(lambda x: x.astype(jnp.int8), params))


@pytest.mark.parametrize("file", ["state/wte/zarr.json", "state/_METADATA"])
def test_empty_metadata_files_are_damage(saved, file):
    (saved / file).write_bytes(b"")
    with pytest.raises(ValueError, match="damaged checkpoint"):
        btlm.load(saved)


def test_running_out_of_memory_is_not_reported_as_damage(saved, monkeypatch):
    def fail(*args, **kwargs):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    monkeypatch.setattr(ocp, "load_checkpointables", fail)
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
        btlm.load(saved)


def test_other_directories_are_refused_with_a_hint(tmp_path):
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


def test_an_unknown_format_is_refused(saved):
    edit_metadata(saved, lambda custom: custom.update(format=99))
    with pytest.raises(ValueError, match="format 99, this version reads 2"):
        btlm.load(saved)


def test_arrays_that_do_not_match_the_configuration_are_listed(saved):
    edit_metadata(saved, lambda custom: custom["config"].update(n_layer=3, n_inner=171))
    with pytest.raises(ValueError) as error:
        btlm.load(saved)
    assert "missing: blocks/2/" in str(error.value) and "and 11 more" in str(error.value)
    assert "blocks/0/mlp/c_fc/kernel: found shape (64, 170), expected (64, 171)" in str(error.value)


def test_truncated_arrays_are_damage(saved):
    files = sorted((saved / "state").glob("*/c/**/[0-9]*"), key=lambda p: p.stat().st_size)
    largest = files[-1]
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    with pytest.raises(ValueError, match="damaged checkpoint"):
        btlm.load(saved)


def test_a_missing_array_is_never_replaced_by_a_placeholder(saved, tmp_path):
    incomplete = flatten_tree(ocp.load(saved))
    incomplete.pop(("blocks", "1", "ln_1", "scale"))
    custom = ocp.metadata(saved).custom_metadata
    ocp.save(tmp_path / "incomplete", unflatten_tree(incomplete), custom_metadata=custom)
    with pytest.raises(ValueError, match="missing: blocks/1/ln_1/scale"):
        btlm.load(tmp_path / "incomplete")


def test_weights_of_another_configuration_are_refused(tmp_path, params):
    with pytest.raises(ValueError, match="do not match"):
        btlm.save(tmp_path / "c", dataclasses.replace(CONFIG, n_layer=3), params)
    assert not os.listdir(tmp_path)


def test_weights_that_are_not_finite_are_saved_with_a_warning_and_loaded_on_demand(
    tmp_path, params, caplog
):
    bad = jax.tree.map(lambda x: x, params)
    bad["wte"] = bad["wte"].at[3, 4].set(jnp.nan)
    btlm.save(tmp_path / "bad", CONFIG, bad)
    assert "bad was saved with NaN or Inf in 1 array (wte: 1)" in caplog.text
    for options in ({}, {"unstacked": True}):
        with pytest.raises(ValueError, match=r"holds NaN or Inf in 1 array \(wte: 1\), from which"):
            btlm.load(tmp_path / "bad", **options)
    _, loaded = btlm.load(tmp_path / "bad", allow_nonfinite=True)
    assert np.isnan(loaded["wte"][3, 4])
