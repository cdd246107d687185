"""The einsum of every layer: fp32 sums, and gradients against float64."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from btlm_jax import BTLM, BTLMConfig, make_mesh
from btlm_jax.model import mup
from btlm_jax.model.einsum import einsum
from btlm_jax.train.step import init_state, make_step

SHAPES = {"b": 2, "t": 5, "s": 6, "d": 8, "f": 12, "h": 4, "k": 3, "c": 3, "v": 9}


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-6), ("bfloat16", 2e-2)])
@pytest.mark.parametrize(
    "equation",
    ["btd,df->btf", "btd,dchk->btchk", "bhtk,hkd->btd", "bhtk,bhsk->bhts", "bhts,bhsk->bhtk",
     "btd,vd->btv"],
)  # fmt: skip
def test_product_and_gradients_equal_float64(equation, dtype, tolerance):
    """bf16 rounds the incoming gradient and the results, each by 2**-8 of its size."""
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
    results = (out, *pull(jnp.asarray(g, jnp.float32)))
    assert [z.dtype for z in results[1:]] == [dtype, dtype]
    for got, want in zip(results, expected, strict=True):
        assert np.abs(np.asarray(got, np.float64) - want).max() < tolerance * np.abs(want).max()


def product_and_gradients(x, y, g, out_sharding=None):
    """Returns a product and its two gradients."""
    z, pull = jax.vjp(lambda x, y: einsum("btd,df->btf", x, y, None, out_sharding), x, y)
    return z, *pull(g)


def operands(dtype):
    rng = np.random.default_rng(0)
    x, y, g = (rng.standard_normal(n) for n in ((4, 6, 8), (8, 12), (4, 6, 12)))
    return jnp.asarray(x, dtype), jnp.asarray(y, dtype), jnp.asarray(g, jnp.float32)


def test_accelerators_multiply_bf16_gradients_in_bf16():
    """JAX's own rule, fp32 times bf16, would run in fp32 on a GPU."""
    traced = jax.jit(product_and_gradients).trace(*operands("bfloat16"))
    for platform, in_bf16 in (("cuda", 3), ("tpu", 3), ("cpu", 1)):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        products = [line for line in text.splitlines() if "dot_general" in line]
        dtypes = [
            re.findall(r"x(bf16|f32)>", line.split(" : ")[-1].split("->")[0]) for line in products
        ]
        assert len(dtypes) == 3 and dtypes.count(["bf16", "bf16"]) == in_bf16
        assert dtypes.count(["f32", "f32"]) == 3 - in_bf16


@pytest.mark.parametrize("sequence", [None, "context"])
def test_gradients_are_sharded_like_the_operands(sequence):
    mesh = make_mesh(fsdp=2, context=2, tensor=2)
    whole = operands("float32")
    split = P("fsdp", sequence, None), P(None, "tensor"), P("fsdp", sequence, "tensor")
    sharded = [jax.device_put(z, NamedSharding(mesh, s)) for z, s in zip(whole, split, strict=True)]
    with jax.set_mesh(mesh):
        results = jax.jit(product_and_gradients, static_argnums=3)(*sharded, split[2])
    assert tuple(z.sharding.spec for z in results[1:]) == split[:2]
    for got, expected in zip(results, product_and_gradients(*whole), strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-5)  # fp32 sums of up to 24 products


SHARDED = dict(fsdp=2, context=2, tensor=2)


@pytest.mark.parametrize("length, mesh", [(24, None), (256, SHARDED)])
def test_bf16_steps_learn_like_fp32_steps(length, mesh):
    """Losses agree up to bf16 rounding."""
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
            losses[dtype].append(float(metrics["loss"]))
    np.testing.assert_allclose(losses["bfloat16"], losses["float32"], atol=0.02)
    assert losses["bfloat16"][2] < losses["bfloat16"][0]
