"""The einsum under every layer: fp32 sums, gradients against float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from btlm_jax.train.step import init_state, make_step

from btlm_jax import BTLM, BTLMConfig, make_mesh, mup
from btlm_jax.products import einsum

SHAPES = {"b": 2, "t": 5, "s": 6, "d": 8, "f": 12, "h": 4, "k": 3, "c": 3, "v": 9}


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-6), ("bfloat16", 2e-2)])
@pytest.mark.parametrize(
    "equation",
    ["btd,df->btf", "btd,dchk->btchk", "bhtk,hkd->btd", "bhtk,bhsk->bhts", "bhts,bhsk->bhtk",
     "btd,vd->btv"],
)  # fmt: skip
def test_product_and_gradients(equation, dtype, tolerance):
    """bf16 rounds the incoming gradient and the results: 2**-8 of the size, some of them added."""
    terms, result = equation.split("->")
    rng = np.random.default_rng(0)
    x, y, g = (
        rng.standard_normal([SHAPES[c] for c in term]) for term in (*terms.split(","), result)
    )
    x, y = (np.asarray(jnp.asarray(z, dtype), np.float64) for z in (x, y))
    out, pull = jax.vjp(
        lambda a, b: einsum(equation, a, b), *(jnp.asarray(z, dtype) for z in (x, y))
    )
    assert out.dtype == jnp.float32
    a, b = terms.split(",")
    expected = (
        np.einsum(equation, x, y),
        np.einsum(f"{result},{b}->{a}", g, y),
        np.einsum(f"{a},{result}->{b}", x, g),
    )
    found = (out, *pull(jnp.asarray(g, jnp.float32)))
    assert [z.dtype for z in found[1:]] == [dtype, dtype]
    for got, want in zip(found, expected, strict=True):
        assert np.abs(np.asarray(got, np.float64) - want).max() < tolerance * np.abs(want).max()


@pytest.mark.parametrize("length", [24, 256])
@pytest.mark.parametrize("mesh", [None, dict(fsdp=2, context=2, tensor=2)])
def test_a_bf16_step(length, mesh):
    """Runs on every backend, and learns what fp32 learns, to bf16's rounding of the loss."""
    config = BTLMConfig.preset("tiny")
    tokens = np.random.default_rng(0).integers(0, 512, (1, 4, length + 1)).astype(np.int32)
    losses = {}
    for dtype in ("float32", "bfloat16"):
        model, tx = BTLM(config, compute_dtype=dtype), mup.adamw(1e-3, config)
        params = model.init(jax.random.key(0), mesh=mesh and make_mesh(**mesh))
        state, step = init_state(params, tx), make_step(model, tx)
        losses[dtype] = []
        for _ in range(3):
            state, metrics = step(state, tokens)
            losses[dtype].append(float(metrics.loss))
    np.testing.assert_allclose(losses["bfloat16"], losses["float32"], atol=0.02)
    assert losses["bfloat16"][2] < losses["bfloat16"][0]
