"""The layers: Flax Linen modules whose weights come from the table, used as pure functions.

Shapes: B batch, T query length, S key length, D n_embd, H heads, K head_dim, F n_inner, V vocab,
L layers. LayerNorm statistics, softmax, the ALiBi bias and the logits are fp32 in every compute
dtype. Matrix products accumulate and return fp32; their bias is added before the one rounding.

On a mesh, weights are stored split over "fsdp" and gathered, in the compute dtype, where they are
used; activations are split over batch, sequence and, inside a block, over heads or MLP units.

Only this module imports flax.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from btlm_jax.model import (
    alibi,
    attention,
    attention_xla,
    context_parallel,
    einsum,
    kv_cache,
    packed,
    remat,
)
from btlm_jax.model.kv_cache import KVCache, LayerKV
from btlm_jax.model.packed import PackedWeight
from btlm_jax.model.params import is_unstacked
from btlm_jax.model.runtime import Runtime
from btlm_jax.model.weights import Weight, weights_by_path


class AttentionContext(NamedTuple):
    """What every layer's attention shares where whole sequences are read."""

    slopes: jax.Array | None  # fp32 [H], divided by the ALiBi scale
    segments: tuple[jax.Array, jax.Array] | None  # of queries [B, T] and keys [B, S]


AnyContext = AttentionContext | kv_cache.CacheContext
# Keys and values of a layer: its own slots, and those of a prefix.
LayerCache = tuple[LayerKV, LayerKV | None]


class Layer(nn.Module):
    """A module whose weights are looked up in the table by their path in the tree."""

    runtime: Runtime

    def weight(self, name: str, dtype: DTypeLike | None = None) -> jax.Array:
        """A weight in the given dtype (the compute dtype), gathered from its fsdp shards."""
        _, value, used = self._stored(name)
        return self.runtime.shard(value.astype(dtype or self.runtime.dtype), *used)

    def product(self, equation: str, x: jax.Array, name: str, *axes: str | None) -> jax.Array:
        """`einsum.einsum` of x and a weight, fp32, sharded by the logical axes of the result."""
        runtime = self.runtime
        w, value, used = self._stored(name)
        if not isinstance(value, PackedWeight):
            y = value.astype(runtime.dtype)
            return einsum.einsum(
                equation, x, y, runtime.precision, runtime.axes(*axes), runtime.axes(*used)
            )
        n = len(w.inputs)  # the last dimensions of x, in order; of several, the first is sharded
        if n > 1:
            of_input = runtime.axes("batch", "sequence", used[w.inputs[0]])
            x = jnp.reshape(x, (*x.shape[:-n], -1), out_sharding=of_input)
        return packed_projection(runtime, w, x, value, *axes)

    def _stored(self, name: str) -> tuple[Weight, Any, tuple[str | None, ...]]:
        """Its entry in the table, the weight as it rests, and the logical axes of its use."""
        path = tuple(part for part in self.path if not part.isdigit())  # without the layer
        w = weights_by_path(self.runtime.config)[(*path, name)]
        value = self.get_variable("params", name)  # never drawn here: `init_params`
        return w, value, _used(w)


def _used(w: Weight) -> tuple[str | None, ...]:
    """The logical axes in which a weight is used: gathered from its fsdp shards."""
    return tuple(None if a == "embed" else a for a in w.axes)


def packed_projection(
    runtime: Runtime, w: Weight, x: jax.Array, kernel: PackedWeight, *axes: str | None
) -> jax.Array:
    """`packed.packed_matmul`, fp32, sharded by the logical axes of the result."""
    if runtime.mesh is not None:
        used = _used(w)
        outputs = (a for i, a in enumerate(used) if i not in w.inputs)
        own = runtime.axes(*outputs, used[w.inputs[0]])
        assert own is not None
        kernel = packed.shard(kernel, own)
    return packed.packed_matmul(
        x,
        kernel,
        on_cpu=runtime.on_cpu,
        precision=runtime.precision,
        out_sharding=runtime.axes(*axes),
    )


class LayerNorm(Layer):
    """Scale and bias after normalizing by biased statistics, all in fp32."""

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
    """A projection with bias, times `scale`; `axes` are the logical axes of the result.

    A tuple of scales has one for each entry of the third axis.
    """

    equation: str
    axes: tuple[str | None, ...]
    scale: float | tuple[float, ...] = 1.0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.product(self.equation, x, "kernel", *self.axes)
        y = y + self.weight("bias", jnp.float32)
        # In fp32, before the one rounding. Without CompleteP the program has no trace of it.
        if isinstance(self.scale, tuple):
            y = y * np.asarray(self.scale, np.float32).reshape(-1, *(1,) * (y.ndim - 3))
        elif self.scale != 1.0:
            y = y * self.scale
        return checkpoint_name(y.astype(self.runtime.dtype), remat.PRODUCT)


class Attention(Layer):
    """Multi-head causal attention over the new tokens and, if given, a cache."""

    @nn.compact
    def __call__(self, x_BTD, shared: AnyContext, kv: LayerCache | None, capture: bool):
        c, runtime = self.runtime.config, self.runtime
        # As it comes out of the product: XLA would otherwise multiply into [qkv, H, K, B, T], and
        # every chunk of attention would turn its part round.
        qkv_axes = ("batch", "sequence", None, "heads", None)
        scales = (c.attention_scale, 1.0, 1.0)
        qkv = Linear(runtime, "btd,dchk->btchk", qkv_axes, scales, name="c_attn")(x_BTD)
        q, k, v = (x[:, :, 0].swapaxes(1, 2) for x in jnp.split(qkv, 3, axis=2))
        own = None
        common: dict[str, Any] = dict(precision=runtime.precision, shard=runtime.attention_shard)
        if isinstance(shared, kv_cache.CacheContext):
            assert kv is not None
            out, own = kv_cache.extend(q, k, v, *kv, shared, on_cpu=runtime.on_cpu, **common)
        else:
            common |= dict(slopes=shared.slopes, segments=shared.segments)
            out = attention.attention(q, k, v, implementation=runtime.implementation, **common)
            if kv is not None:
                own = kv_cache.filled(kv[0], k, v)
        axes = ("batch", "sequence", None)
        out = out.swapaxes(1, 2)
        h = Linear(runtime, "bthk,hkd->btd", axes, c.residual_scale, name="c_proj")(out)
        if not capture:
            return h, own, None
        q, k = (runtime.shard(x, "batch", "heads", None, None) for x in (q, k))
        at = jnp.arange(q.shape[2], dtype=jnp.int32)
        del common["shard"]
        probabilities = attention_xla.attention_probabilities(q, k, positions=at, **common)
        return h, own, {"queries": q, "keys": k, "attentions": probabilities}


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
    """

    capture: bool

    @nn.compact
    def __call__(self, h, shared: AnyContext, kv: LayerCache | None = None):
        before = h
        x = LayerNorm(self.runtime, name="ln_1")(h)
        x, own, seen = Attention(self.runtime, name="attn")(x, shared, kv, self.capture)
        h = h + x
        y = MLP(self.runtime, name="mlp")(LayerNorm(self.runtime, name="ln_2")(h))
        h = h + y
        if seen is None:
            return h, own
        return h, {"hidden_states": before, "attention_outputs": x, "mlp_outputs": y, **seen}


class Blocks(Layer):
    """All blocks, one after the other, whose weights are apart: the way of decoding."""

    capture: bool

    @nn.compact
    def __call__(self, h, shared: AnyContext, cache: KVCache | None):
        results = []
        for i in range(self.runtime.config.n_layer):
            kv = None
            if cache is not None:
                prefix = None if cache.prefix is None else cache.prefix.layers[i]
                kv = cache.layers[i], prefix
            h, result = Block(self.runtime, self.capture, name=str(i))(h, shared, kv)
            results.append(result)
        if self.capture:
            return h, jax.tree.map(lambda *x: jnp.stack(x), *results)
        return h, tuple(results)


class Transformer(Layer):
    """Embedding, L blocks, ln_f. Returns (h [B, T, D], cache, captured).

    Stacked weights are scanned over; weights by layer are used one after the other.
    """

    @nn.compact
    def __call__(
        self,
        inputs: Mapping[str, jax.Array],
        cache: KVCache | None,
        length: jax.Array | None,
        capture: bool,
    ):
        c, runtime = self.runtime.config, self.runtime
        B, T = inputs["input_ids"].shape
        whole = cache is None or cache.fresh
        meant: Any = T if length is None else length
        # Of the first new token, an int32 for every row where they may differ.
        start: Any = 0 if cache is None or cache.fresh else cache.end
        if not c.alibi and "positions" not in inputs:
            slots = jnp.broadcast_to(jnp.atleast_1d(start)[:, None] + jnp.arange(T), (B, T))
            inputs = {**inputs, "positions": runtime.shard(slots, "batch", "sequence")}
        inputs = {
            k: runtime.reorder_sequence(x, context_parallel.to_balanced_order)
            for k, x in inputs.items()
        }

        h = self._embed(inputs)
        slopes = None
        if c.alibi:
            scale: Any = alibi.scale(c.alibi_scaling, start + meant)
            slopes = jnp.asarray(alibi.model_slopes(c), jnp.float32)
            slopes = slopes / (scale[:, None] if jnp.ndim(scale) else scale)
            slopes = runtime.shard(slopes, *("batch", "heads")[-slopes.ndim :])
        segments = self._segments(inputs, cache)
        if whole:
            shared: Any = AttentionContext(
                slopes, None if segments is None else (segments, segments)
            )
        else:
            assert cache is not None
            shared, segments = self._continued(cache, slopes, segments)

        if is_unstacked(self.variables["params"]):
            run: Any = Blocks(runtime, capture, name="blocks")
            h, result = run(h, shared, cache)
        else:
            assert cache is None  # `model` takes the layers apart
            h, result = _scanned(runtime, capture)(h, shared)
        h = runtime.reorder_sequence(
            LayerNorm(runtime, name="ln_f")(h), context_parallel.to_natural_order
        )
        if cache is None:
            return h, None, result
        if segments is None:
            segments = runtime.shard(jnp.ones((B, T), jnp.int32), "batch", None)
        if whole:
            ids = jnp.pad(segments, ((0, 0), (0, cache.capacity - T)))
        else:
            ids = shared.ids
            # A row that ran over would have overwritten its own slots: make that visible. One
            # token at a time may go round the ring.
            fits = cache.length + T <= cache.capacity
            fits = fits & ((T == 1) | (cache.cursor + T <= cache.capacity))
            h = jnp.where(runtime.shard(fits, "batch")[:, None, None], h, jnp.nan)
        last = jax.lax.dynamic_index_in_dim(segments, meant - 1, 1, keepdims=False)
        last = runtime.shard(last, "batch")  # forgotten of a batch of one
        length, at = cache.length + meant, cache.cursor + meant
        return h, KVCache(result, ids, last, length, at, cache.prefix), None

    def _embed(self, inputs) -> jax.Array:
        """The scaled embeddings [B, T, D]."""
        c, runtime = self.runtime.config, self.runtime
        _, wte, _ = self._stored("wte")
        if not isinstance(wte, PackedWeight):
            wte = self.weight("wte")
        h = _look_up(runtime, wte, inputs["input_ids"], c.vocab_size)
        if not c.alibi:
            h = h + _look_up(runtime, self.weight("wpe"), inputs["positions"], c.n_positions)
        h = h * c.mup_embeddings_scale
        if "token_type_ids" in inputs:
            h = h + _look_up(runtime, wte, inputs["token_type_ids"], c.vocab_size)
        return h.astype(runtime.dtype)

    def _segments(self, inputs, cache: KVCache | None) -> jax.Array | None:
        """The segment of every new token, 0 for padding; None if all are one segment."""
        segments, mask = inputs.get("segment_ids"), inputs.get("attention_mask")
        if segments is None and cache is not None and not cache.fresh:
            last = jnp.where(cache.segment > 0, cache.segment, 1)
            segments = jnp.broadcast_to(last[:, None], inputs["input_ids"].shape)
            # Broadcasting forgets the sharding of a batch of one.
            segments = self.runtime.shard(segments, "batch", "sequence")
        if mask is None:
            return segments
        return mask if segments is None else jnp.where(mask != 0, segments, 0)

    def _continued(
        self, cache: KVCache, slopes, segments
    ) -> tuple[kv_cache.CacheContext, jax.Array]:
        """What the layers share where a cache is continued, and the new tokens' segments."""
        runtime = self.runtime
        length, at = runtime.shard(cache.length, "batch"), cache.cursor % cache.capacity
        ids = jax.lax.dynamic_update_slice_in_dim(cache.segment_ids, segments, at, 1)
        before: Any = (None, None)
        if cache.prefix is not None:
            before = runtime.shard(cache.prefix.length, "batch"), cache.prefix.segment_ids
        return kv_cache.CacheContext(slopes, length, at, segments, ids, *before), segments


def _scanned(runtime: Runtime, capture: bool) -> Callable[..., Any]:
    """The blocks of stacked weights, compiled once."""
    policy = remat.policy(runtime.remat)
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


def _look_up(
    runtime: Runtime, table: jax.Array | PackedWeight, index: jax.Array, size: int
) -> jax.Array:
    """Rows of an embedding, fp32 [B, T, D]; NaN where the index is out of range."""
    out = runtime.axes("batch", "sequence", None)
    if isinstance(table, PackedWeight):
        rows = packed.embedding_rows(table, index, out)
    else:
        rows = table.at[index].get(mode="clip", out_sharding=out)
    inside = (index >= 0) & (index < size)
    return jnp.where(inside[..., None], rows.astype(jnp.float32), jnp.nan)


def head_weight(runtime: Runtime, params) -> jax.Array:
    """The weight of the head, [Vp, D], as it rests."""
    return params["wte" if runtime.config.tie_word_embeddings else "lm_head"]


def head_logits(runtime: Runtime, product: jax.Array, vocab: jax.Array) -> jax.Array:
    """Logits from the product of states and head, fp32 [..., v], for the ids `vocab`.

    Ids of padding get the lowest fp32, so that a softmax gives them zero.
    """
    logits = product * runtime.config.logits_scale
    if "vocab" in dict(runtime.padding):
        logits = jnp.where(vocab < runtime.config.vocab_size, logits, jnp.finfo(jnp.float32).min)
    return logits


def project_logits(runtime: Runtime, params, hidden: jax.Array) -> jax.Array:
    """Logits with the vocabulary as padded as the weights are, fp32 [..., Vp]."""
    w = head_weight(runtime, params)
    # Decoding leaves sequences whole: the states say whether theirs are split.
    own = jax.typeof(hidden).sharding.spec
    lead = ("batch", *("sequence" if axis else None for axis in own[1:-1]))
    if isinstance(w, PackedWeight):
        of_head = weights_by_path(runtime.config)[("wte",)]
        product = packed_projection(runtime, of_head, hidden, w, *lead, "vocab")
    else:
        w = runtime.shard(w.astype(runtime.dtype), "vocab", None)
        rows = "bts"[: hidden.ndim - 1]
        product = runtime.einsum(f"{rows}d,vd->{rows}v", hidden, w, *lead, "vocab")
    logits = head_logits(runtime, product, runtime.shard(jnp.arange(w.shape[0]), "vocab"))
    return runtime.shard(logits, *lead, None)
