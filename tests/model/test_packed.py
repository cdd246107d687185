"""Kernels with inputs last: products, rows and placement against float64."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from btlm_jax import BTLMConfig, make_mesh
from btlm_jax.checkpoint import quantization
from btlm_jax.checkpoint.quantization import Quantization
from btlm_jax.model import packed, weights
from btlm_jax.model.packed import PackedWeight
from btlm_jax.model.params import flatten_tree, init_params

# 171 inputs are filled up to 256; c_attn has outputs [3, H, K], attn/c_proj inputs [H, K].
CONFIG = dataclasses.replace(BTLMConfig.preset("tiny"), n_inner=171)
NAMES = ["attn/c_attn", "attn/c_proj", "mlp/c_proj"]
KINDS = ["float32", "bfloat16", "int8", "int4", "int4:128", "jnp.int4"]


@pytest.fixture(scope="module")
def params():
    return init_params(jax.random.key(0), CONFIG)


def kernel_of(params, name: str, kind: str) -> PackedWeight:
    """The kernel of layer 0."""
    path = ("blocks", *name.split("/"), "kernel")
    if kind in ("float32", "bfloat16"):
        x = flatten_tree(params)[path][0].astype(kind)
        return packed.transposed(x, weights.weights_by_path(CONFIG)[path].inputs)
    to = Quantization.parse("int4" if kind == "jnp.int4" else kind)
    kernel = flatten_tree(quantization.quantize_params(params, CONFIG, to))[
        "blocks", "0", *path[1:]
    ]
    if kind == "jnp.int4":
        values = packed.unpack(kernel.values).astype(jnp.int4)
        kernel = dataclasses.replace(kernel, values=values)
    return kernel


def exact(kernel: PackedWeight) -> np.ndarray:
    """float64 [*O, I], by the definition."""
    values = kernel.values
    values = np.asarray(packed.unpack(values) if kernel.packed else values).astype(np.float64)
    if kernel.scales is not None:
        scales = np.asarray(kernel.scales).astype(np.float64)
        values = values * np.repeat(scales, values.shape[-1] // scales.shape[-1], -1)
    return values[..., : kernel.inputs]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_dequantized(params, name, kind):
    kernel = kernel_of(params, name, kind)
    outputs = {"attn/c_attn": (3, 4, 16)}.get(name, (64,))
    inputs = {"mlp/c_proj": 171}.get(name, 64)
    assert kernel.shape == (*outputs, inputs) and kernel.packed == kind.startswith("int4")
    # fp32 rounds value times scale by half an ulp, bf16 that again, once.
    for dtype, half_ulp in ((jnp.float32, 2.0**-24), (jnp.bfloat16, 2.0**-8)):
        got = np.asarray(packed.dequantize(kernel, dtype)).astype(np.float64)
        assert got.shape == kernel.shape
        np.testing.assert_allclose(got, exact(kernel), rtol=half_ulp * 1.01 + 2.0**-24)


@pytest.mark.parametrize("rows", [(1,), (2, 3), ()], ids=str)
@pytest.mark.parametrize("on_cpu", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_product(params, kind, dtype, on_cpu, rows):
    for name in NAMES:
        kernel = kernel_of(params, name, kind)
        x = jax.random.normal(jax.random.key(1), (*rows, kernel.inputs)).astype(dtype)
        y = jax.jit(
            lambda x, kernel: packed.packed_matmul(
                x, kernel, on_cpu=on_cpu, precision=jax.lax.Precision.HIGHEST
            )
        )(x, kernel)
        assert y.dtype == jnp.float32 and y.shape == (*rows, *kernel.shape[:-1])
        w, given = exact(kernel), np.asarray(x).astype(np.float64)
        expected = np.tensordot(given, w, ((-1,), (-1,)))
        # What the error of each input and weight can add up to. fp32: sums of 171 terms.
        each = 171 * 2.0**-23
        if dtype == "bfloat16" and kind not in ("bfloat16", "int8"):
            each += 2.0**-8  # weights become bf16
        bound = each * np.tensordot(np.abs(given), np.abs(w), ((-1,), (-1,)))
        if kind == "int8" and on_cpu:  # inputs are rounded by half a step of their row's int8
            half_step = np.abs(given).max(-1, keepdims=True) / 254
            steps = half_step.reshape(*rows, *(1,) * (w.ndim - 1)) if rows else half_step[0]
            bound = bound + steps * np.abs(w).sum(-1) * 1.01
        assert (np.abs(np.asarray(y) - expected) <= bound).all(), name


def test_products_with_int8_on_cpus_round_the_inputs_of_each_row(params):
    """Rows of very different size: one scale for all would lose the small one."""
    kernel = kernel_of(params, "mlp/c_proj", "int8")
    x = jax.random.normal(jax.random.key(1), (2, 171)) * jnp.array([[1.0], [1e-6]])
    y = np.asarray(packed.packed_matmul(x, kernel, on_cpu=True))
    expected = np.asarray(x, np.float64) @ exact(kernel).T
    error = np.linalg.norm(y - expected, axis=1) / np.linalg.norm(expected, axis=1)
    assert (error < 0.02).all()  # 8 bits of inputs: 0.7 % measured
    zero = packed.packed_matmul(jnp.zeros((1, 171)), kernel, on_cpu=True)
    assert not zero.any()


@pytest.mark.parametrize("embedding", ["int8", "float32"])
def test_rows(params, embedding):
    wte: PackedWeight = PackedWeight(params["wte"], None, 64)
    if embedding == "int8":
        wte = quantization.quantize_params(params, CONFIG, Quantization(8))["wte"]
    index = jnp.array([[0, 5], [CONFIG.vocab_size - 1, CONFIG.vocab_size + 7]])
    found = packed.embedding_rows(wte, index)
    assert found.dtype == jnp.float32 and found.shape == (2, 2, 64)
    clipped = np.minimum(index, CONFIG.vocab_size - 1)
    np.testing.assert_allclose(found, exact(wte)[clipped], rtol=2.0**-23)


@pytest.mark.parametrize("kind", ["int8", "jnp.int4"])
def test_place(params, kind):
    """Groups are split as inputs are; the one scale of int8 rows is not."""
    mesh = make_mesh(fsdp=2, tensor=4)
    kernel = kernel_of(params, "attn/c_proj", kind)
    kernel = dataclasses.replace(kernel, values=kernel.values[..., :64])  # without filling
    if kind == "jnp.int4":
        finer = jnp.repeat(kernel.scales[..., :1], 4, -1)  # 64 = 4 * 16
        kernel = dataclasses.replace(kernel, scales=finer)
    expected = np.asarray(packed.dequantize(kernel, jnp.float32))
    everywhere = NamedSharding(mesh, PartitionSpec())
    with jax.set_mesh(mesh):
        placed = packed.shard(jax.device_put(kernel, everywhere), PartitionSpec("fsdp", "tensor"))
        got = packed.dequantize(placed, jnp.float32)
    assert placed.values.sharding.spec == PartitionSpec("fsdp", "tensor")
    groups = "tensor" if kind == "jnp.int4" else None
    assert placed.scales.sharding.spec == PartitionSpec("fsdp", groups)
    np.testing.assert_array_equal(got, expected)
