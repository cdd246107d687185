"""Weights that another dtype cannot hold: refused or warned about when they are loaded."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import btlm_jax as btlm
from btlm_jax.convert import export, load_hf
from btlm_jax.model import sharding


@pytest.fixture(scope="module")
def checkpoints(tiny, tmp_path_factory):
    """One model in both formats: too large for float16, and with a kernel too small for it."""
    model, params = tiny
    folder, forms = tmp_path_factory.mktemp("narrowing"), {}
    for name in ("large", "small"):
        changed = jax.tree.map(np.array, params)
        if name == "large":
            changed["wte"][3, 4:6] = 1e6, -7e4
            changed["blocks"]["ln_1"]["bias"][1, 0] = 65_504  # float16 holds it
        else:
            changed["blocks"]["mlp"]["c_fc"]["kernel"][1] *= 1e-9
        changed = jax.tree.map(jnp.asarray, changed)
        btlm.save(folder / name, model.config, changed)
        export(folder / name, folder / f"{name}-hf")
        forms |= {(name, btlm.load): folder / name, (name, load_hf): folder / f"{name}-hf"}
    return forms


@pytest.mark.parametrize("load", [btlm.load, load_hf])
@pytest.mark.parametrize("on_mesh, unstacked", [(False, False), (True, False), (True, True)])
def test_weights_that_would_become_infinite_are_counted_and_refused(
    checkpoints, load, on_mesh, unstacked
):
    options = dict(mesh=sharding.make_mesh() if on_mesh else None, unstacked=unstacked)
    said = (
        r"^dtype: found float16, in which weights beyond 65,504 would be infinite \(wte: 2\), "
        r"expected bfloat16 or float32$"
    )
    with pytest.raises(ValueError, match=said):
        load(checkpoints["large", load], dtype="float16", **options)


def test_weights_on_a_cpu_that_would_become_infinite_are_refused_by_layer_too(checkpoints):
    with pytest.raises(ValueError, match=r"float16, .* infinite \(wte: 2\)"):
        load_hf(checkpoints["large", load_hf], dtype="float16", unstacked=True)


@pytest.mark.parametrize("load", [btlm.load, load_hf])
def test_weights_that_vanish_are_named_in_a_warning(checkpoints, load, caplog):
    _, params = load(checkpoints["small", load], dtype=np.float16)
    assert params["wte"].dtype == np.float16
    (warning,) = [r.getMessage() for r in caplog.records if "too small" in r.getMessage()]
    assert "blocks/1/mlp/c_fc/kernel" in warning and "bfloat16 or float32" in warning
    assert "blocks/0" not in warning


@pytest.mark.parametrize("name", ["large", "small"])
def test_bfloat16_holds_them_all(checkpoints, name, caplog):
    _, params = btlm.load(checkpoints[name, btlm.load], dtype=jnp.bfloat16)
    assert np.isfinite(np.asarray(params["wte"], np.float32)).all()
    assert not [r for r in caplog.records if "too small" in r.getMessage()]
