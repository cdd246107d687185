"""The layers: Flax Linen modules whose weights come from the table, used as pure functions.

Shapes: B batch, T query length, S key length, D n_embd, H heads, K head_dim, F n_inner, V vocab,
L layers. LayerNorm statistics, softmax, the ALiBi bias and the logits are fp32 in every compute
dtype. Matrix products accumulate in and return fp32; their bias is added before the one rounding.

On a mesh, weights are stored split over "fsdp" and gathered, in the compute dtype, where they are
used; activations are split over batch, sequence and, inside a block, over heads or MLP units.

Only this module imports flax.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from btlm_jax.config import Positions
from btlm_jax.model import attention, attention_xla, context_parallel, kv_cache, packed, remat
from btlm_jax.model.attention_context import (
    AnyContext,
    AttentionContext,
    advanced_cache,
    attention_context,
    overflow_to_nan,
)
from btlm_jax.model.einsum import einsum
from btlm_jax.model.kv_cache import CacheContext, KVCache, LayerKV
from btlm_jax.model.packed import PackedWeight
from btlm_jax.model.params import is_unstacked
from btlm_jax.model.positions import add_default_positions
from btlm_jax.model.runtime import Runtime
from btlm_jax.model.weights import Weight, weights_by_path

# Keys and values of one layer: its own slots, and those of a prefix.
LayerCache = tuple[LayerKV, LayerKV | None]


# Weights ----------------------------------------------------------------------------------------


class Layer(nn.Module):
    """A module whose weights are looked up in the table by their path in the tree."""

    runtime: Runtime

    def weight(self, name: str, dtype: DTypeLike | None = None) -> jax.Array:
        """Returns a weight, gathered from its fsdp shards, in `dtype` or the compute dtype."""
        _, stored, axes = self._stored(name)
        return self.runtime.shard(stored.astype(dtype or self.runtime.dtype), *axes)

    def weight_einsum(self, equation: str, x: jax.Array, name: str, *axes: str | None) -> jax.Array:
        """Computes the einsum of x and a weight, fp32, with logical axes `axes`."""
        runtime = self.runtime
        entry, stored, weight_axes = self._stored(name)
        if not isinstance(stored, PackedWeight):
            w = stored.astype(runtime.dtype)
            out, gathered = runtime.axes(*axes), runtime.axes(*weight_axes)
            return einsum(equation, x, w, runtime.precision, out, gathered)
        # The inputs are the last dimensions of x, in order; only the first is sharded.
        num_dims = len(entry.inputs)
        if num_dims > 1:
            x_spec = runtime.axes("batch", "sequence", weight_axes[entry.inputs[0]])
            x = jnp.reshape(x, (*x.shape[:-num_dims], -1), out_sharding=x_spec)
        return packed_projection(runtime, entry, x, stored, *axes)

    def _stored(self, name: str) -> tuple[Weight, Any, tuple[str | None, ...]]:
        """Returns (table entry, stored array, logical axes after the fsdp gather)."""
        path = tuple(part for part in self.path if not part.isdigit())  # without the layer
        entry = weights_by_path(self.runtime.config)[(*path, name)]
        stored = self.get_variable("params", name)  # never initialized here: see `init_params`
        return entry, stored, _gathered_axes(entry)


def _gathered_axes(entry: Weight) -> tuple[str | None, ...]:
    """Returns the logical axes of a weight after the gather of its fsdp shards."""
    return tuple(None if axis == "embed" else axis for axis in entry.axes)


def packed_projection(
    runtime: Runtime, entry: Weight, x: jax.Array, w: PackedWeight, *axes: str | None
) -> jax.Array:
    """Computes `packed.packed_matmul`, fp32, with logical axes `axes`.

    Args:
      entry: the table entry of the weight.
    """
    if runtime.mesh is not None:
        gathered = _gathered_axes(entry)
        outputs = (axis for i, axis in enumerate(gathered) if i not in entry.inputs)
        spec = runtime.axes(*outputs, gathered[entry.inputs[0]])
        assert spec is not None
        w = packed.shard(w, spec)
    return packed.packed_matmul(
        x,
        w,
        on_cpu=runtime.on_cpu,
        precision=runtime.precision,
        out_sharding=runtime.axes(*axes),
    )


# Modules ----------------------------------------------------------------------------------------


class LayerNorm(Layer):
    """Normalizes by biased statistics, then scales and shifts, all in fp32."""

    @nn.compact
    def __call__(self, h_BTD: jax.Array) -> jax.Array:
        x = h_BTD.astype(jnp.float32)
        x = x - x.mean(-1, keepdims=True)
        x = x * jax.lax.rsqrt(
            jnp.square(x).mean(-1, keepdims=True) + self.runtime.config.layer_norm_epsilon
        )
        scale, bias = self.weight("scale", jnp.float32), self.weight("bias", jnp.float32)
        return (x * scale + bias).astype(self.runtime.dtype)


class Linear(Layer):
    """A projection with bias, times `scale`.

    Attributes:
      equation: the einsum of input and weight.
      axes: the logical axes of the result.
      scale: a factor; or a tuple with one factor for each entry of the third axis.
    """

    equation: str
    axes: tuple[str | None, ...]
    scale: float | tuple[float, ...] = 1.0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.weight_einsum(self.equation, x, "kernel", *self.axes)
        y = y + self.weight("bias", jnp.float32)
        # In fp32, before the one rounding. Without CompleteP the program has no trace of it.
        if isinstance(self.scale, tuple):
            y = y * np.asarray(self.scale, np.float32).reshape(-1, *(1,) * (y.ndim - 3))
        elif self.scale != 1.0:
            y = y * self.scale
        return checkpoint_name(y.astype(self.runtime.dtype), remat.PRODUCT)


class Attention(Layer):
    """Multi-head causal attention over the new tokens and, if given, a cache.

    Returns (output [B, T, D], the layer's cache with the new tokens, captured activations).
    """

    @nn.compact
    def __call__(self, x_BTD, context: AnyContext, kv: LayerCache | None, capture: bool):
        c, runtime = self.runtime.config, self.runtime
        # In the layout of the product: XLA would otherwise multiply into [qkv, H, K, B, T], and
        # every chunk of attention would transpose its part.
        qkv_axes = ("batch", "sequence", None, "heads", None)
        scales = (c.attention_scale, 1.0, 1.0)
        qkv_BT3HK = Linear(runtime, "btd,dchk->btchk", qkv_axes, scales, name="c_attn")(x_BTD)
        q, k, v = (x[:, :, 0].swapaxes(1, 2) for x in jnp.split(qkv_BT3HK, 3, axis=2))
        out_BHTK, new_kv = _attend(runtime, q, k, v, context, kv)
        axes, out_BTHK = ("batch", "sequence", None), out_BHTK.swapaxes(1, 2)
        c_proj = Linear(runtime, "bthk,hkd->btd", axes, c.residual_scale, name="c_proj")
        y_BTD = c_proj(out_BTHK)
        captured = _capture_attention(runtime, q, k, context) if capture else None
        return y_BTD, new_kv, captured


def _attend(
    runtime: Runtime, q, k, v, context: AnyContext, kv: LayerCache | None
) -> tuple[jax.Array, LayerKV | None]:
    """Returns attention [B, H, T, K], and the layer's cache with the new tokens."""
    precision, shard = runtime.precision, runtime.attention_shard
    if isinstance(context, CacheContext):
        assert kv is not None
        return kv_cache.cached_attention(
            q, k, v, *kv, context, on_cpu=runtime.on_cpu, precision=precision, shard=shard
        )
    out = attention.attention(
        q,
        k,
        v,
        slopes=context.slopes,
        segments=context.segments,
        implementation=runtime.implementation,
        precision=precision,
        shard=shard,
    )
    return out, None if kv is None else kv_cache.filled_layer(kv[0], k, v)


def _capture_attention(runtime: Runtime, q, k, context: AnyContext) -> dict[str, jax.Array]:
    """Returns queries, keys and attention probabilities."""
    assert isinstance(context, AttentionContext)
    q, k = (runtime.shard(x, "batch", "heads", None, None) for x in (q, k))
    probabilities = attention_xla.attention_probabilities(
        q,
        k,
        slopes=context.slopes,
        segments=context.segments,
        positions=jnp.arange(q.shape[2], dtype=jnp.int32),
        precision=runtime.precision,
    )
    return {"queries": q, "keys": k, "attentions": probabilities}


class MLP(Layer):
    """SwiGLU, c_proj(c_fc(x) * silu(c_fc2(x))), or a GELU: exact ("gelu") or tanh ("gelu_new")."""

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        c, runtime, axes = self.runtime.config, self.runtime, ("batch", "sequence", "mlp")
        y_BTF = Linear(runtime, "btd,df->btf", axes, name="c_fc")(x_BTD)
        if c.gated:
            y_BTF = y_BTF * nn.silu(Linear(runtime, "btd,df->btf", axes, name="c_fc2")(x_BTD))
        else:
            y_BTF = nn.gelu(y_BTF, approximate=c.activation_function == "gelu_new")
        axes = ("batch", "sequence", None)
        return Linear(runtime, "btf,fd->btd", axes, c.residual_scale, name="c_proj")(y_BTF)


class Block(Layer):
    """h += Attn(ln_1(h)); h += MLP(ln_2(h)). The body of the scan over layers.

    Both branches end in a c_proj, which multiplies by CompleteP's `residual_scale`.
    Returns (h, the layer's cache), or with `capture` (h, captured activations).
    """

    capture: bool

    @nn.compact
    def __call__(self, h_BTD, context: AnyContext, kv: LayerCache | None = None):
        block_input = h_BTD
        x_BTD = LayerNorm(self.runtime, name="ln_1")(h_BTD)
        x_BTD, new_kv, captured = Attention(self.runtime, name="attn")(
            x_BTD, context, kv, self.capture
        )
        h_BTD = h_BTD + x_BTD
        y_BTD = MLP(self.runtime, name="mlp")(LayerNorm(self.runtime, name="ln_2")(h_BTD))
        h_BTD = h_BTD + y_BTD
        if captured is None:
            return h_BTD, new_kv
        residual = {"hidden_states": block_input, "attention_outputs": x_BTD, "mlp_outputs": y_BTD}
        return h_BTD, residual | captured


class UnrolledBlocks(Layer):
    """Unrolled blocks with unstacked weights; used for decoding."""

    capture: bool

    @nn.compact
    def __call__(self, h_BTD, context: AnyContext, cache: KVCache | None):
        results = []
        for i in range(self.runtime.config.n_layer):
            kv = None
            if cache is not None:
                prefix = None if cache.prefix is None else cache.prefix.layers[i]
                kv = cache.layers[i], prefix
            h_BTD, result = Block(self.runtime, self.capture, name=str(i))(h_BTD, context, kv)
            results.append(result)
        if self.capture:
            return h_BTD, jax.tree.map(lambda *x: jnp.stack(x), *results)
        return h_BTD, tuple(results)


def _scanned_blocks(runtime: Runtime, capture: bool) -> Callable[..., Any]:
    """Returns the module of all blocks with stacked weights, compiled once."""
    policy = remat.checkpoint_policy(runtime.remat)
    block: Any = Block
    if policy is not None:
        block = nn.remat(Block, prevent_cse=False, policy=policy)
    return nn.scan(
        block,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=nn.broadcast,
        length=runtime.config.n_layer,
    )(runtime, capture, name="blocks")


class Transformer(Layer):
    """Embedding, L blocks, ln_f. Returns (h [B, T, D], cache, captured activations).

    Stacked weights are scanned over; unstacked ones are used one after another.
    """

    @nn.compact
    def __call__(
        self,
        inputs: Mapping[str, jax.Array],
        cache: KVCache | None,
        length: jax.Array | None,
        capture: bool,
    ):
        runtime = self.runtime
        T = inputs["input_ids"].shape[1]
        num_valid: Any = T if length is None else length
        inputs = add_default_positions(runtime, inputs, cache, num_valid)
        inputs = {
            name: runtime.reorder_sequence(x, context_parallel.to_balanced_order)
            for name, x in inputs.items()
        }
        h_BTD = self._embed(inputs)
        context = attention_context(runtime, inputs, cache, num_valid)
        h_BTD, result = self._run_blocks(h_BTD, context, cache, capture)
        h_BTD = LayerNorm(runtime, name="ln_f")(h_BTD)
        h_BTD = runtime.reorder_sequence(h_BTD, context_parallel.to_natural_order)
        if cache is None:
            return h_BTD, None, result
        if not cache.fresh:
            h_BTD = overflow_to_nan(runtime, cache, h_BTD)
        return h_BTD, advanced_cache(runtime, cache, result, context, T, num_valid), None

    def _embed(self, inputs: Mapping[str, jax.Array]) -> jax.Array:
        """Returns the scaled embeddings [B, T, D]."""
        c, runtime = self.runtime.config, self.runtime
        _, wte, _ = self._stored("wte")
        if not isinstance(wte, PackedWeight):
            wte = self.weight("wte")
        h_BTD = _look_up(runtime, wte, inputs["input_ids"], c.vocab_size)
        if c.positions is Positions.LEARNED:
            wpe = self.weight("wpe")
            h_BTD = h_BTD + _look_up(runtime, wpe, inputs["positions"], c.n_positions)
        h_BTD = h_BTD * c.mup_embeddings_scale
        if "token_type_ids" in inputs:
            h_BTD = h_BTD + _look_up(runtime, wte, inputs["token_type_ids"], c.vocab_size)
        return h_BTD.astype(runtime.dtype)

    def _run_blocks(self, h_BTD, context: AnyContext, cache: KVCache | None, capture: bool):
        """Returns h, and the layers' caches or captured activations."""
        if is_unstacked(self.variables["params"]):
            blocks: Any = UnrolledBlocks(self.runtime, capture, name="blocks")
            return blocks(h_BTD, context, cache)
        assert cache is None  # `btlm._forward` unstacks the weights for a cache
        return _scanned_blocks(self.runtime, capture)(h_BTD, context)


def _look_up(
    runtime: Runtime, table_VD: jax.Array | PackedWeight, index_BT: jax.Array, size: int
) -> jax.Array:
    """Returns rows of an embedding, fp32 [B, T, D]; NaN where the index is out of range."""
    spec = runtime.axes("batch", "sequence", None)
    if isinstance(table_VD, PackedWeight):
        rows_BTD = packed.embedding_rows(table_VD, index_BT, spec)
    else:
        rows_BTD = table_VD.at[index_BT].get(mode="clip", out_sharding=spec)
    in_range = (index_BT >= 0) & (index_BT < size)
    return jnp.where(in_range[..., None], rows_BTD.astype(jnp.float32), jnp.nan)
