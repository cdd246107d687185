"""The layers, as Flax Linen modules whose parameters are declared from the table of weights.

Shapes: B batch, T query length, S key length, D n_embd, H heads, K head_dim, F n_inner, V vocab,
L layers. LayerNorm statistics, softmax, the ALiBi bias and the logits are fp32 in every compute
dtype. Matrix products accumulate in and return fp32; their bias is added before the one rounding.

On a mesh, weights are stored split over "fsdp" and gathered, in the compute dtype, where they are
used; activations are split over batch, sequence and, inside a block, over heads or MLP units.

Only this module imports flax. `Transformer(runtime)` is an ordinary Linen module: its `init` gives
the tree of `BTLM.init`, with draws of its own, and the collection "intermediates" captures
activations if it is mutable.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from btlm_jax.config import Positions
from btlm_jax.model import attention, attention_cached, attention_xla, packed, remat
from btlm_jax.model.attention_context import AttentionContext, attention_context
from btlm_jax.model.kv_cache import KVCache, LayerCache, LayerKV
from btlm_jax.model.packed import PackedWeight
from btlm_jax.model.params import is_unstacked, weight_initializer
from btlm_jax.model.positions import add_default_positions
from btlm_jax.model.runtime import Runtime, StoredWeight
from btlm_jax.model.weights import weights_by_name


class Layer(nn.Module):
    """A module of the model."""

    runtime: Runtime

    def weight(self, name: str) -> StoredWeight:
        """Declares a parameter of this module from its row of the table, and returns it.

        Args:
          name: the name in the table, such as "blocks/ln_1/scale".
        """
        rt, entry = self.runtime, weights_by_name(self.runtime.config)[name]
        leaf, shape = entry.path[-1], entry.padded(dict(rt.padding))
        stored = self.get_variable("params", leaf)
        if isinstance(stored, PackedWeight):  # Flax would expect the shape of its initializer
            return StoredWeight(entry, stored)

        def init(key, shape, dtype):
            return rt.shard(weight_initializer(entry)(key, shape, dtype), *entry.axes)

        return StoredWeight(entry, self.param(leaf, init, shape, jnp.float32))

    def capture(self, name: str, x: jax.Array) -> None:
        """Records an activation if the collection "intermediates" is mutable."""
        self.sow("intermediates", name, x, init_fn=lambda: None, reduce_fn=_newer)


def _newer(_: Any, x: Any) -> Any:
    """Returns the new value of an activation, where Flax would collect all of them."""
    return x


class LayerNorm(Layer):
    """Normalizes by biased statistics, then scales and shifts, all in fp32.

    Attributes:
      table_path: the path of its weights in the table.
    """

    table_path: str

    @nn.compact
    def __call__(self, h_BTD: jax.Array) -> jax.Array:
        rt = self.runtime
        x_BTD = h_BTD.astype(jnp.float32)
        x_BTD = x_BTD - x_BTD.mean(-1, keepdims=True)
        variance_BT1 = jnp.square(x_BTD).mean(-1, keepdims=True)
        x_BTD = x_BTD * jax.lax.rsqrt(variance_BT1 + rt.config.layer_norm_epsilon)
        scale_D = rt.gathered(self.weight(f"{self.table_path}/scale"), jnp.float32)
        bias_D = rt.gathered(self.weight(f"{self.table_path}/bias"), jnp.float32)
        return (x_BTD * scale_D + bias_D).astype(rt.dtype)


class Linear(Layer):
    """A projection with bias, times `scale`.

    Attributes:
      table_path: the path of its weights in the table.
      equation: the einsum of input and weight.
      axes: the logical axes of the result.
      scale: a factor; or a tuple with one factor for each entry of the third axis.
    """

    table_path: str
    equation: str
    axes: tuple[str | None, ...]
    scale: float | tuple[float, ...] = 1.0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        rt = self.runtime
        y = rt.einsum(self.equation, x, self.weight(f"{self.table_path}/kernel"), *self.axes)
        y = y + rt.gathered(self.weight(f"{self.table_path}/bias"), jnp.float32)
        # In fp32, before the one rounding. Without CompleteP the program has no trace of it.
        if isinstance(self.scale, tuple):
            y = y * np.asarray(self.scale, np.float32).reshape(-1, *(1,) * (y.ndim - 3))
        elif self.scale != 1.0:
            y = y * self.scale
        return checkpoint_name(y.astype(rt.dtype), remat.PRODUCT)


class Attention(Layer):
    """Multi-head causal attention over the new tokens and, if given, a cache.

    Returns (output [B, T, D], the layer's cache with the new tokens).
    """

    @nn.compact
    def __call__(self, x_BTD, context: AttentionContext, kv: LayerCache | None):
        c, rt = self.runtime.config, self.runtime
        # In the layout of the product: XLA would otherwise multiply into [qkv, H, K, B, T], and
        # every chunk of attention would transpose its part.
        axes, scales = ("batch", "sequence", None, "heads", None), (c.attention_scale, 1.0, 1.0)
        c_attn = Linear(rt, "blocks/attn/c_attn", "btd,dchk->btchk", axes, scales, name="c_attn")
        qkv_BT3HK = jnp.split(c_attn(x_BTD), 3, axis=2)
        q_BHTK, k_BHTK, v_BHTK = (x[:, :, 0].swapaxes(1, 2) for x in qkv_BT3HK)
        out_BHTK, new_kv = _attend(rt, q_BHTK, k_BHTK, v_BHTK, context, kv)
        if self.is_mutable_collection("intermediates"):
            self._capture_attention(q_BHTK, k_BHTK, context)
        axes, scale = ("batch", "sequence", None), c.residual_scale
        c_proj = Linear(rt, "blocks/attn/c_proj", "bthk,hkd->btd", axes, scale, name="c_proj")
        return c_proj(out_BHTK.swapaxes(1, 2)), new_kv

    def _capture_attention(self, q_BHTK, k_BHTK, context: AttentionContext) -> None:
        """Records queries, keys and attention probabilities."""
        rt = self.runtime
        q_BHTK, k_BHTK = (rt.shard(x, "batch", "heads", None, None) for x in (q_BHTK, k_BHTK))
        scores_BHTS = attention_xla.masked_scores(
            q_BHTK,
            k_BHTK,
            slopes_H=context.slopes,
            segments=context.segment_pair,
            positions_T=jnp.arange(q_BHTK.shape[2], dtype=jnp.int32),
            precision=rt.precision,
        )
        self.capture("queries", q_BHTK)
        self.capture("keys", k_BHTK)
        self.capture("attentions", jax.nn.softmax(scores_BHTS, axis=-1))


def _attend(
    runtime: Runtime, q_BHTK, k_BHTK, v_BHTK, context: AttentionContext, kv: LayerCache | None
) -> tuple[jax.Array, LayerKV | None]:
    """Returns attention [B, H, T, K], and the layer's cache with the new tokens."""
    arrays = q_BHTK, k_BHTK, v_BHTK
    options: Any = dict(precision=runtime.precision, shard=runtime.attention_shard)
    if context.slots is not None:
        assert kv is not None
        return attention_cached.cached_attention(*arrays, kv, context, **options)
    out_BHTK = attention.attention(
        *arrays,
        slopes_H=context.slopes,
        segments=context.segment_pair,
        implementation=runtime.implementation,
        **options,
    )
    return out_BHTK, None if kv is None else kv[0].filled(k_BHTK, v_BHTK)


class MLP(Layer):
    """SwiGLU, c_proj(c_fc(x) * silu(c_fc2(x))), or a GELU: exact ("gelu") or tanh ("gelu_new")."""

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        c, rt, axes = self.runtime.config, self.runtime, ("batch", "sequence", "mlp")
        y_BTF = Linear(rt, "blocks/mlp/c_fc", "btd,df->btf", axes, name="c_fc")(x_BTD)
        if c.gated:
            gate = Linear(rt, "blocks/mlp/c_fc2", "btd,df->btf", axes, name="c_fc2")
            y_BTF = y_BTF * nn.silu(gate(x_BTD))
        else:
            y_BTF = nn.gelu(y_BTF, approximate=c.activation_function == "gelu_new")
        axes, scale = ("batch", "sequence", None), c.residual_scale
        return Linear(rt, "blocks/mlp/c_proj", "btf,fd->btd", axes, scale, name="c_proj")(y_BTF)


class Block(Layer):
    """h += Attn(ln_1(h)); h += MLP(ln_2(h)). The body of the scan over layers.

    Both branches end in a c_proj, which multiplies by CompleteP's `residual_scale`.
    Returns (h, the layer's cache).
    """

    @nn.compact
    def __call__(self, h_BTD, context: AttentionContext, kv: LayerCache | None = None):
        rt = self.runtime
        self.capture("hidden_states", h_BTD)
        x_BTD = LayerNorm(rt, "blocks/ln_1", name="ln_1")(h_BTD)
        x_BTD, new_kv = Attention(rt, name="attn")(x_BTD, context, kv)
        self.capture("attention_outputs", x_BTD)
        h_BTD = h_BTD + x_BTD
        y_BTD = MLP(rt, name="mlp")(LayerNorm(rt, "blocks/ln_2", name="ln_2")(h_BTD))
        self.capture("mlp_outputs", y_BTD)
        return h_BTD + y_BTD, new_kv


class UnrolledBlocks(Layer):
    """Unrolled blocks with unstacked weights; used for decoding."""

    @nn.compact
    def __call__(self, h_BTD, context: AttentionContext, cache: KVCache | None):
        layers = []
        for i in range(self.runtime.config.n_layer):
            kv = None if cache is None else cache.layer(i)
            h_BTD, new_kv = Block(self.runtime, name=str(i))(h_BTD, context, kv)
            layers.append(new_kv)
        return h_BTD, tuple(layers)


def scanned_blocks(runtime: Runtime) -> Any:
    """Returns the module of all blocks with stacked weights, compiled once."""
    policy = remat.checkpoint_policy(runtime.remat)
    block: Any = Block
    if policy is not None:
        block = nn.remat(Block, prevent_cse=False, policy=policy)
    return nn.scan(
        block,
        variable_axes={"params": 0, "intermediates": 0},
        split_rngs={"params": True},
        in_axes=nn.broadcast,
        length=runtime.config.n_layer,
    )(runtime, name="blocks")


class Transformer(Layer):
    """Embedding, L blocks, ln_f.

    Stacked weights are scanned over; unstacked ones are used one after another, as a cache needs
    them.
    """

    @nn.compact
    def __call__(
        self,
        inputs: Mapping[str, jax.Array],
        cache: KVCache | None = None,
        num_valid: jax.Array | None = None,
    ) -> tuple[jax.Array, KVCache | None]:
        """Computes the final hidden states.

        Args:
          inputs: int32 arrays [B, T] by name: input_ids, and optionally others (`BTLM.apply`).
          cache: of earlier tokens.
          num_valid: int32, the number of new tokens without padding at the end; None is T.

        Returns:
          (h [B, T, D], the cache with the new tokens or None).
        """
        rt, T = self.runtime, inputs["input_ids"].shape[1]
        num_new: Any = T if num_valid is None else num_valid
        inputs = add_default_positions(rt, inputs, cache, num_new)
        inputs = jax.tree.map(rt.to_balanced_order, dict(inputs))
        h_BTD = self._embed(inputs)
        context = attention_context(rt, inputs, cache, num_new)
        h_BTD, layers = self._run_blocks(h_BTD, context, cache)
        h_BTD = LayerNorm(rt, "ln_f", name="ln_f")(h_BTD)
        h_BTD = rt.to_natural_order(h_BTD)
        if cache is None:
            return h_BTD, None
        cache_after = cache.advanced(rt, layers, context.segments, T, num_new)
        return cache.overflow_to_nan(rt, h_BTD), cache_after

    def _embed(self, inputs: Mapping[str, jax.Array]) -> jax.Array:
        """Returns the scaled embeddings [B, T, D]."""
        c, rt = self.runtime.config, self.runtime
        if self.is_initializing() and not c.tie_word_embeddings:
            self.weight("lm_head")  # a parameter of this module that `head.project_logits` uses
        wte_VD = rt.gathered(self.weight("wte"))
        h_BTD = _look_up(rt, wte_VD, inputs["input_ids"], c.vocab_size)
        if c.positions is Positions.LEARNED:
            wpe_PD = rt.gathered(self.weight("wpe"))
            h_BTD = h_BTD + _look_up(rt, wpe_PD, inputs["positions"], c.n_positions)
        h_BTD = h_BTD * c.mup_embeddings_scale
        if "token_type_ids" in inputs:
            h_BTD = h_BTD + _look_up(rt, wte_VD, inputs["token_type_ids"], c.vocab_size)
        return h_BTD.astype(rt.dtype)

    def _run_blocks(self, h_BTD, context: AttentionContext, cache: KVCache | None) -> Any:
        """Returns h, and the layers' caches if there is a cache."""
        if is_unstacked(self.variables.get("params", {})):
            return UnrolledBlocks(self.runtime, name="blocks")(h_BTD, context, cache)
        if cache is not None:
            raise ValueError(
                "cache: found stacked weights, expected unstacked ones (params.unstack_params)"
            )
        return scanned_blocks(self.runtime)(h_BTD, context)


def _look_up(
    runtime: Runtime, table_VD: jax.Array | PackedWeight, index_BT: jax.Array, size: int
) -> jax.Array:
    """Returns rows of an embedding, fp32 [B, T, D]; NaN where the index is out of range."""
    spec = runtime.axes("batch", "sequence", None)
    rows_BTD = packed.embedding_rows(table_VD, index_BT, spec)
    in_range_BT = (index_BT >= 0) & (index_BT < size)
    return jnp.where(in_range_BT[..., None], rows_BTD, jnp.nan)
