"""Packed weights: products, rows and sharding against float64."""

from __future__ import annotations

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from btlm_jax import BTLMConfig, make_mesh
from btlm_jax.checkpoint import quantization
from btlm_jax.checkpoint.quantization import Quantization
from btlm_jax.model import packed, weights
from btlm_jax.model.einsum import einsum
from btlm_jax.model.packed import PackedWeight
from btlm_jax.model.params import flatten_tree, init_params

# 171 inputs are padded to 256; c_attn has outputs [3, H, K], attn/c_proj inputs [H, K].
CONFIG = dataclasses.replace(BTLMConfig.preset("tiny"), n_inner=171)
NAMES = ["attn/c_attn", "attn/c_proj", "mlp/c_proj"]
KINDS = ["float32", "bfloat16", "int8", "int4", "int4:128", "jnp.int4"]


@pytest.fixture(scope="module")
def params():
    return init_params(jax.random.key(0), CONFIG)


def packed_weight(params, name: str, kind: str) -> PackedWeight:
    """Returns the weight of layer 0."""
    path = ("blocks", *name.split("/"), "kernel")
    if kind in ("float32", "bfloat16"):
        x = flatten_tree(params)[path][0].astype(kind)
        return packed.transposed(x, weights.weights_by_path(CONFIG)[path].inputs)
    scheme = Quantization.parse("int4" if kind == "jnp.int4" else kind)
    w = flatten_tree(quantization.quantize_params(params, CONFIG, scheme))["blocks", "0", *path[1:]]
    if kind == "jnp.int4":
        values = packed.unpack(w.values).astype(jnp.int4)
        w = dataclasses.replace(w, values=values)
    return w


def exact(w: PackedWeight) -> np.ndarray:
    """Returns the weights by their definition, float64 [*O, I]."""
    values = w.values
    values = np.asarray(packed.unpack(values) if w.packed else values).astype(np.float64)
    if w.scales is not None:
        scales = np.asarray(w.scales).astype(np.float64)
        values = values * np.repeat(scales, values.shape[-1] // scales.shape[-1], -1)
    return values[..., : w.inputs]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_dequantize_rounds_once(params, name, kind):
    w = packed_weight(params, name, kind)
    outputs = {"attn/c_attn": (3, 4, 16)}.get(name, (64,))
    inputs = {"mlp/c_proj": 171}.get(name, 64)
    assert w.shape == (*outputs, inputs) and w.packed == kind.startswith("int4")
    # fp32 rounds value times scale by half an ulp, bf16 that again, once.
    for dtype, half_ulp in ((jnp.float32, 2.0**-24), (jnp.bfloat16, 2.0**-8)):
        got = np.asarray(packed.dequantize(w, dtype)).astype(np.float64)
        assert got.shape == w.shape
        np.testing.assert_allclose(got, exact(w), rtol=half_ulp * 1.01 + 2.0**-24)


@pytest.mark.parametrize("rows", [(1,), (2, 3), ()], ids=str)
@pytest.mark.parametrize("on_cpu", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_matmul_equals_float64_within_rounding(params, kind, dtype, on_cpu, rows):
    """One program for all weights: compiling them dwarfs everything else."""

    @jax.jit
    def multiply(xs, ws):
        matmul = functools.partial(
            packed.packed_matmul, on_cpu=on_cpu, precision=jax.lax.Precision.HIGHEST
        )
        return list(map(matmul, xs, ws))

    ws = [packed_weight(params, name, kind) for name in NAMES]
    xs = [jax.random.normal(jax.random.key(1), (*rows, w.inputs)).astype(dtype) for w in ws]
    for name, x, w, y in zip(NAMES, xs, ws, multiply(xs, ws), strict=True):
        assert y.dtype == jnp.float32 and y.shape == (*rows, *w.shape[:-1])
        bound = error_bound(np.asarray(x).astype(np.float64), w, dtype, on_cpu)
        expected = np.tensordot(np.asarray(x).astype(np.float64), exact(w), ((-1,), (-1,)))
        assert (np.abs(np.asarray(y) - expected) <= bound).all(), name


def error_bound(x: np.ndarray, w: PackedWeight, dtype: str, on_cpu: bool) -> np.ndarray:
    """Returns what the errors of all inputs and weights can add up to."""
    w_abs = np.abs(exact(w))
    relative = 171 * 2.0**-23  # fp32 sums of 171 terms
    if dtype == "bfloat16" and w.dtype not in (jnp.bfloat16, jnp.int8):
        relative += 2.0**-8  # weights become bf16
    bound = relative * np.tensordot(np.abs(x), w_abs, ((-1,), (-1,)))
    if w.dtype == jnp.int8 and on_cpu:  # inputs are rounded by half a step of their row's int8
        half_step = np.abs(x).max(-1) / 254
        half_step = half_step.reshape(*half_step.shape, *(1,) * (w_abs.ndim - 1))
        bound = bound + half_step * w_abs.sum(-1) * 1.01
    return bound


@pytest.mark.parametrize("axes", [{}, dict(fsdp=2, tensor=4)], ids=["one device", "mesh"])
def test_one_einsum_takes_arrays_and_packed_weights(params, axes):
    """Its equation names the dimensions of the table, whatever the layout of the weight."""
    sizes, split = dict(b=2, t=3, d=64, h=4, k=16), dict(b="fsdp", h="tensor")
    equations = {
        "attn/c_attn": "btd,dchk->btchk",
        "attn/c_proj": "bthk,hkd->btd",
        "mlp/c_fc": "btd,df->btf",
    }
    for name, equation in equations.items():
        terms, result = equation.split("->")
        x_dims, w_dims = terms.split(",")
        array = flatten_tree(params)["blocks", *name.split("/"), "kernel"][0]
        w = packed_weight(params, name, "float32")
        x = jax.random.normal(jax.random.key(1), [sizes[dim] for dim in x_dims])
        expected = einsum(equation, x, array)
        mesh, shardings = contextlib.nullcontext(), {}
        if axes:
            mesh = jax.set_mesh(make_mesh(**axes))
            x_spec, w_spec, out = (jax.P(*map(split.get, d)) for d in (x_dims, w_dims, result))
            shardings = dict(out_sharding=out, w_gathered=w_spec)
        with mesh:
            x = jax.reshard(x, x_spec) if axes else x
            got = jax.jit(functools.partial(einsum, equation, **shardings))(x, w)
        np.testing.assert_allclose(got, expected, atol=2e-6)  # fp32 sums of 64 terms of size 0.1


def test_int8_on_cpus_rounds_each_row_of_inputs_by_its_own_scale(params):
    """With one scale for both rows, the small one would be lost."""
    w = packed_weight(params, "mlp/c_proj", "int8")
    x = jax.random.normal(jax.random.key(1), (2, 171)) * jnp.array([[1.0], [1e-6]])
    y = np.asarray(packed.packed_matmul(x, w, on_cpu=True))
    expected = np.asarray(x, np.float64) @ exact(w).T
    error = np.linalg.norm(y - expected, axis=1) / np.linalg.norm(expected, axis=1)
    assert (error < 0.02).all()  # 8 bits of inputs: 0.7 % measured
    zero = packed.packed_matmul(jnp.zeros((1, 171)), w, on_cpu=True)
    assert not zero.any()


@pytest.mark.parametrize("embedding", ["int8", "float32"])
def test_embedding_rows_are_dequantized_and_clipped(params, embedding):
    wte: PackedWeight = PackedWeight(params["wte"], None, 64)
    if embedding == "int8":
        wte = quantization.quantize_params(params, CONFIG, Quantization(8))["wte"]
    index = jnp.array([[0, 5], [CONFIG.vocab_size - 1, CONFIG.vocab_size + 7]])
    rows = packed.embedding_rows(wte, index)
    assert rows.dtype == jnp.float32 and rows.shape == (2, 2, 64)
    clipped = np.minimum(index, CONFIG.vocab_size - 1)
    np.testing.assert_allclose(rows, exact(wte)[clipped], rtol=2.0**-23)


@pytest.mark.parametrize("kind", ["int8", "jnp.int4"])
def test_shard_splits_groups_like_inputs(params, kind):
    """The single scale of int8 rows is not split."""
    mesh = make_mesh(fsdp=2, tensor=4)
    w = packed_weight(params, "attn/c_proj", kind)
    w = dataclasses.replace(w, values=w.values[..., :64])  # without padding
    if kind == "jnp.int4":
        finer = jnp.repeat(w.scales[..., :1], 4, -1)  # 64 = 4 * 16
        w = dataclasses.replace(w, scales=finer)
    expected = np.asarray(packed.dequantize(w, jnp.float32))
    replicated = NamedSharding(mesh, PartitionSpec())
    with jax.set_mesh(mesh):
        sharded = packed.shard(jax.device_put(w, replicated), PartitionSpec("fsdp", "tensor"))
        got = packed.dequantize(sharded, jnp.float32)
    assert sharded.values.sharding.spec == PartitionSpec("fsdp", "tensor")
    groups = "tensor" if kind == "jnp.int4" else None
    assert sharded.scales.sharding.spec == PartitionSpec("fsdp", groups)
    np.testing.assert_array_equal(got, expected)
