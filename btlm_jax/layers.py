"""The layers: Flax Linen modules whose weights come from the table, used as pure functions.

Shapes: B batch, T query length, S key length, D n_embd, H heads, K head_dim, F n_inner, V vocab,
L layers. LayerNorm statistics, softmax, the ALiBi bias and the logits are fp32 in every compute
dtype. Matrix products accumulate and return fp32; their bias is added before the one rounding.

On a mesh, weights are stored split over "fsdp" and gathered, in the compute dtype, where they are
used; activations are split over batch, sequence and, inside a block, over heads or MLP units.

Only this module imports flax.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec, reshard
from jax.typing import DTypeLike

from btlm_jax import (
    alibi,
    attention,
    attention_xla,
    context,
    products,
    remat,
    sharding,
    weights,
)
from btlm_jax.config import BTLMConfig
from btlm_jax.remat import Remat


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of the tokens seen so far; an argument and a result of `BTLM.apply`.

    Attributes:
      key, value: [L, B, H, S, K], S slots of which the first `length` are filled.
      segment_ids: int32 [B, S]; 0 is padding.
      length: int32 scalar, the same for every row (shorter rows are padded on the left).
    """

    key: jax.Array
    value: jax.Array
    segment_ids: jax.Array
    length: jax.Array

    @property
    def capacity(self) -> int:
        """S, the number of slots."""
        return self.key.shape[3]


@dataclasses.dataclass(frozen=True)
class Spec:
    """What is static in one forward pass: the configuration, dtype, padding and mesh."""

    config: BTLMConfig
    dtype: np.dtype
    rules: sharding.Rules
    padding: tuple[tuple[str, int], ...]
    mesh: jax.sharding.AbstractMesh | None
    implementation: attention.Implementation | None
    remat: Remat

    @property
    def precision(self) -> jax.lax.Precision | None:
        """float32 means float32: TPUs and GPUs would otherwise use bf16 or TF32 products."""
        return jax.lax.Precision.HIGHEST if self.dtype == jnp.float32 else None

    def axes(self, *axes: str | None) -> PartitionSpec | None:
        """The PartitionSpec of an activation with these logical axes; None off any mesh."""
        return sharding.spec(self.rules, *axes) if self.mesh is not None else None

    def place(self, x: jax.Array, *axes: str | None) -> jax.Array:
        """Shards an array by logical axes; the identity off any mesh."""
        if self.mesh is None:
            return x
        return reshard(x, jax.sharding.NamedSharding(self.mesh, sharding.spec(self.rules, *axes)))

    def reordered(self, x: jax.Array, order: Callable[[jax.Array, str], jax.Array]) -> jax.Array:
        """x [B, T, ...] by `context.balanced` or `.natural`, where sequences are split."""
        if self.mesh is None or sharding.ways(self.mesh, self.rules, "sequence") == 1:
            return x
        shards = self.axes("batch", "sequence", *(None,) * (x.ndim - 2))
        assert shards is not None
        axis = shards[1]
        return jax.shard_map(lambda x: order(x, axis), in_specs=shards, out_specs=shards)(x)

    @property
    def attention_shard(self) -> PartitionSpec | None:
        """How attention is split, along batch, heads and queries; None off any mesh."""
        return self.axes("batch", "heads", "sequence")

    def zeros(self, shape, dtype, *axes: str | None) -> jax.Array:
        """A sharded array of zeros."""
        return jnp.zeros(shape, dtype, out_sharding=self.axes(*axes))

    def einsum(self, equation: str, x: jax.Array, y: jax.Array, *axes: str | None) -> jax.Array:
        """`products.einsum`, fp32, sharded by the logical axes of the result."""
        return products.einsum(equation, x, y, self.precision, self.axes(*axes))

    def check_batch(self, batch_size: int, length: int | None = None) -> None:
        """Raises ValueError if a batch, or its sequences, do not divide over the mesh."""
        if self.mesh is not None:
            sharding.check_batch(batch_size, self.mesh, self.rules, length)

    def check_cache(self, cache: KVCache, batch_size: int) -> None:
        """Raises ValueError if a cache was made for another model, batch, dtype or mesh."""
        c = self.config
        expected = (c.n_layer, batch_size, c.n_head, cache.capacity, c.head_dim)
        if cache.key.shape != expected or cache.key.dtype != self.dtype:
            raise ValueError(
                f"cache: found {cache.key.dtype}{list(cache.key.shape)}, expected "
                f"{self.dtype}{list(expected)} for this model and batch: make it with init_cache"
            )
        if sharding.mesh_of(cache.key) != self.mesh:
            raise ValueError("cache: not on the mesh of the weights: make it with init_cache")


class Layer(nn.Module):
    """A module whose weights are looked up in the table by their path in the tree."""

    spec: Spec

    def weight(self, name: str, dtype: DTypeLike | None = None) -> jax.Array:
        """A weight in the given dtype (the compute dtype), gathered from its fsdp shards."""
        value, used = self._stored(name)
        return self.spec.place(value.astype(dtype or self.spec.dtype), *used)

    def product(self, equation: str, x: jax.Array, name: str, *axes: str | None) -> jax.Array:
        """`products.einsum` of x and a weight, fp32, sharded by the logical axes of the result."""
        spec = self.spec
        value, used = self._stored(name)
        w = value.astype(spec.dtype)
        return products.einsum(equation, x, w, spec.precision, spec.axes(*axes), spec.axes(*used))

    def _stored(self, name: str) -> tuple[jax.Array, tuple[str | None, ...]]:
        """A weight as it rests, and the logical axes of its use."""
        w = weights.by_path(self.spec.config)[(*self.path, name)]
        shape = w.padded(dict(self.spec.padding))
        value = self.param(name, nn.initializers.zeros, shape)  # never drawn here: `weights.init`
        return value, tuple(None if a == "embed" else a for a in w.axes)


class LayerNorm(Layer):
    """Scale and bias after normalising by biased statistics, all in fp32."""

    @nn.compact
    def __call__(self, h_BTD: jax.Array) -> jax.Array:
        x = h_BTD.astype(jnp.float32)
        x = x - x.mean(-1, keepdims=True)
        x = x * jax.lax.rsqrt(
            jnp.square(x).mean(-1, keepdims=True) + self.spec.config.layer_norm_epsilon
        )
        scale, bias = self.weight("scale", jnp.float32), self.weight("bias", jnp.float32)
        return (x * scale + bias).astype(self.spec.dtype)


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
        return checkpoint_name(y.astype(self.spec.dtype), remat.PRODUCT)


class Attention(Layer):
    """Multi-head causal attention over the new tokens and, if given, a cache."""

    @nn.compact
    def __call__(self, x_BTD, layer, shared: Shared, kv, capture: bool):
        c, spec = self.spec.config, self.spec
        # As it comes out of the product: XLA would otherwise multiply into [qkv, H, K, B, T], and
        # every chunk of attention would turn its part round.
        qkv_axes = ("batch", "sequence", None, "heads", None)
        scales = (c.attention_scale, 1.0, 1.0)
        qkv = Linear(spec, "btd,dchk->btchk", qkv_axes, scales, name="c_attn")(x_BTD)
        q, k, v = (x[:, :, 0].swapaxes(1, 2) for x in jnp.split(qkv, 3, axis=2))
        offset = shared.offset
        if kv is not None:
            # In place on the stacked cache: only the T new slots of this layer are written.
            assert offset is not None  # known wherever there is a cache
            zero = jnp.zeros_like(layer)
            at = (layer, zero, zero, offset, zero)
            kv = tuple(
                jax.lax.dynamic_update_slice(stack, x[None].astype(stack.dtype), at)
                for stack, x in zip(kv, (k, v), strict=True)
            )
            k, v = (jax.lax.dynamic_index_in_dim(x, layer, 0, keepdims=False) for x in kv)
        common = dict(slopes=shared.slopes, segments=shared.segments, precision=spec.precision)
        out = attention.attention(
            q,
            k,
            v,
            **common,
            offset=offset,
            implementation=spec.implementation,
            shard=spec.attention_shard,
        )
        axes = ("batch", "sequence", None)
        out = out.swapaxes(1, 2)
        h = Linear(spec, "bthk,hkd->btd", axes, c.residual_scale, name="c_proj")(out)
        if not capture:
            return h, kv, None
        q, k = (spec.place(x, "batch", "heads", None, None) for x in (q, k))
        at = jnp.arange(q.shape[2], dtype=jnp.int32) + (0 if offset is None else offset)
        return h, kv, attention_xla.probabilities(q, k, **common, positions=at)


class MLP(Layer):
    """SwiGLU, c_proj(c_fc(x) * silu(c_fc2(x))), or a GELU: exact ("gelu") or tanh ("gelu_new")."""

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        c, spec, axes = self.spec.config, self.spec, ("batch", "sequence", "mlp")
        y_BTF = Linear(spec, "btd,df->btf", axes, name="c_fc")(x_BTD)
        if c.gated:
            y_BTF = y_BTF * nn.silu(Linear(spec, "btd,df->btf", axes, name="c_fc2")(x_BTD))
        else:
            y_BTF = nn.gelu(y_BTF, approximate=c.activation_function == "gelu_new")
        axes = ("batch", "sequence", None)
        return Linear(spec, "btf,fd->btd", axes, c.residual_scale, name="c_proj")(y_BTF)


class Block(Layer):
    """h += Attn(ln_1(h)); h += MLP(ln_2(h)). The body of the scan over layers.

    Both branches end in a c_proj, which multiplies by CompleteP's `residual_scale`.
    """

    capture: bool

    @nn.compact
    def __call__(self, carry, layer, shared: Shared):
        h, kv = carry
        before = h
        x = LayerNorm(self.spec, name="ln_1")(h)
        x, kv, probs = Attention(self.spec, name="attn")(x, layer, shared, kv, self.capture)
        h = h + x
        h = h + MLP(self.spec, name="mlp")(LayerNorm(self.spec, name="ln_2")(h))
        return (h, kv), (before, probs) if self.capture else None


class Shared(NamedTuple):
    """What every layer's attention shares."""

    slopes: jax.Array | None  # fp32 [H], divided by the ALiBi scale
    segments: tuple[jax.Array, jax.Array] | None  # of queries [B, T] and keys [B, S]
    offset: jax.Array | None  # int32, the slot of the first query; None without a cache: 0


class Transformer(Layer):
    """Embedding, L scanned blocks, ln_f. Returns (h [B, T, D], cache, captured)."""

    @nn.compact
    def __call__(
        self,
        inputs: Mapping[str, jax.Array],
        cache: KVCache | None,
        length: jax.Array | None,
        capture: bool,
    ):
        c, spec = self.spec.config, self.spec
        shape = inputs["input_ids"].shape
        T = shape[1]
        offset = jnp.zeros((), jnp.int32) if cache is None else cache.length
        meant: Any = T if length is None else length
        key_length = meant if cache is None else offset + meant
        if not c.alibi and "positions" not in inputs:
            slots = jnp.broadcast_to(offset + jnp.arange(T), shape)
            inputs = {**inputs, "positions": spec.place(slots, "batch", "sequence")}
        inputs = {k: spec.reordered(x, context.balanced) for k, x in inputs.items()}

        wte = self.weight("wte")
        h = _look_up(spec, wte, inputs["input_ids"], c.vocab_size)
        if not c.alibi:
            h = h + _look_up(spec, self.weight("wpe"), inputs["positions"], c.n_positions)
        h = h * c.mup_embeddings_scale
        if "token_type_ids" in inputs:
            h = h + _look_up(spec, wte, inputs["token_type_ids"], c.vocab_size)
        h = h.astype(spec.dtype)

        segments: Any = self._segments(inputs, cache, offset)
        pair: Any = None if segments is None else (segments, segments)
        if cache is not None:
            at = (jnp.zeros_like(offset), offset)
            pair = (segments, jax.lax.dynamic_update_slice(cache.segment_ids, segments, at))
        slopes = None
        if c.alibi:
            scaled = jnp.asarray(alibi.model_slopes(c), jnp.float32)
            slopes = spec.place(scaled / alibi.scale(c.alibi_scaling, key_length), "heads")

        policy = remat.policy(spec.remat)
        block: Any = Block
        if policy is not None:
            block = nn.remat(Block, prevent_cse=False, policy=policy)
        blocks = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast),
            length=c.n_layer,
        )(spec, capture, name="blocks")
        kv = None if cache is None else (cache.key, cache.value)
        shared = Shared(slopes, pair, None if cache is None else offset)
        out: Any = blocks((h, kv), jnp.arange(c.n_layer, dtype=jnp.int32), shared)
        (h, filled), captured = out
        h = spec.reordered(LayerNorm(spec, name="ln_f")(h), context.natural)
        if cache is not None:
            # A cache that ran over would have overwritten its last slots: make that visible.
            h = jnp.where(offset + T <= cache.capacity, h, jnp.nan)
            cache = KVCache(filled[0], filled[1], pair[1], offset + meant)
        return h, cache, captured

    def _segments(self, inputs, cache: KVCache | None, offset) -> jax.Array | None:
        """The segment of every new token, 0 for padding; None if all are one segment."""
        segments, mask = inputs.get("segment_ids"), inputs.get("attention_mask")
        if segments is None and cache is not None:
            last = jax.lax.dynamic_index_in_dim(cache.segment_ids, jnp.maximum(offset - 1, 0), 1)
            started = (offset > 0) & (last > 0)
            segments = jnp.broadcast_to(jnp.where(started, last, 1), inputs["input_ids"].shape)
            # Broadcasting forgets the sharding of a batch of one.
            segments = self.spec.place(segments, "batch", "sequence")
        if mask is None:
            return segments
        return mask if segments is None else jnp.where(mask != 0, segments, 0)


def _look_up(spec: Spec, table: jax.Array, index: jax.Array, size: int) -> jax.Array:
    """Rows of an embedding, fp32 [B, T, D]; NaN where the index is out of range."""
    rows = table.at[index].get(mode="clip", out_sharding=spec.axes("batch", "sequence", None))
    inside = (index >= 0) & (index < size)
    return jnp.where(inside[..., None], rows.astype(jnp.float32), jnp.nan)


def head_weight(spec: Spec, params) -> jax.Array:
    """The weight of the head, [Vp, D], as it rests."""
    return params["wte" if spec.config.tie_word_embeddings else "lm_head"]


def head_logits(spec: Spec, product: jax.Array, vocab: jax.Array) -> jax.Array:
    """Logits from the product of states and head, fp32 [..., v], for the ids `vocab`.

    Ids of padding get the lowest fp32, so that a softmax gives them zero.
    """
    logits = product * spec.config.logits_scale
    if "vocab" in dict(spec.padding):
        logits = jnp.where(vocab < spec.config.vocab_size, logits, jnp.finfo(jnp.float32).min)
    return logits


def project_logits(spec: Spec, params, hidden: jax.Array) -> jax.Array:
    """Logits with the vocabulary as padded as the weights are, fp32 [..., Vp]."""
    w = head_weight(spec, params)
    w = spec.place(w.astype(spec.dtype), "vocab", None)
    # Decoding leaves sequences whole: the states say whether theirs are split.
    own = jax.typeof(hidden).sharding.spec
    lead = ("batch", *("sequence" if axis else None for axis in own[1:-1]))
    rows = "bts"[: hidden.ndim - 1]
    product = spec.einsum(f"{rows}d,vd->{rows}v", hidden, w, *lead, "vocab")
    logits = head_logits(spec, product, spec.place(jnp.arange(w.shape[0]), "vocab"))
    return spec.place(logits, *lead, None)
