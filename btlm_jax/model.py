"""The BTLM decoder: Flax Linen modules whose weights come from the table, used as pure functions.

Shapes: B batch, T query length, S key length, D n_embd, H heads, K head_dim, F n_inner, V vocab,
L layers. LayerNorm statistics, softmax, the ALiBi bias and the logits are fp32 in every compute
dtype. Matrix products accumulate and return fp32; their bias is added before the one rounding.

On a mesh the model reads the mesh off the weights' types. Weights are stored split over "fsdp" and
gathered, in the compute dtype, where they are used; activations are split over batch and, inside a
block, over heads or MLP units.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec, reshard
from jax.typing import ArrayLike, DTypeLike

from btlm_jax import alibi, attention, sharding, weights
from btlm_jax.config import BTLMConfig

logger = logging.getLogger(__name__)


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


class Intermediates(NamedTuple):
    """What `BTLM.intermediates` returns."""

    logits: jax.Array  # fp32 [B, T, V]
    hidden_states: jax.Array  # [L + 1, B, T, D]: scaled embeddings, blocks; the last after ln_f
    attentions: jax.Array  # fp32 [L, B, H, T, T]


@dataclasses.dataclass(frozen=True)
class BTLM:
    """A BTLM language model: a configuration and how to compute it. It holds no weights.

    Attributes:
      config: what is computed.
      compute_dtype: of activations and matrix products; None is bfloat16 on TPU and GPU, float32 on
        CPU. float32 means full precision on every platform.
      rules: logical axis -> mesh axis, used when the weights live on a mesh.
      attention_implementation: see `attention.attention`.
    """

    config: BTLMConfig
    compute_dtype: DTypeLike | None = None
    rules: sharding.Rules = sharding.RULES
    attention_implementation: attention.Implementation | None = None

    def __post_init__(self) -> None:
        # A mapping is welcome too; the model must be hashable to be static under jit.
        object.__setattr__(self, "rules", tuple(dict(self.rules).items()))

    def init(
        self, key: jax.Array, *, dtype: DTypeLike = jnp.float32, mesh: Mesh | None = None
    ) -> weights.Params:
        """Draws fresh weights (`weights.init`), sharded over `mesh` if one is given.

        Returns:
          A nested dict of arrays; the same values on every mesh, up to zero padding.
        """
        if mesh is None:
            return weights.init(key, self.config, dtype)
        pad = sharding.padding(self.config, mesh, self.rules)
        placed = sharding.param_shardings(self.config, mesh, self.rules, pad)
        return weights.init(key, self.config, dtype, pad, placed)

    def init_cache(self, params: weights.Params, batch_size: int, capacity: int) -> KVCache:
        """Makes an empty cache of `capacity` slots, sharded like the activations of `params`."""
        c, spec = self.config, self.spec(params)
        spec.check_batch(batch_size)
        shape = (c.n_layer, batch_size, c.n_head, capacity, c.head_dim)

        def empty():
            with sharding.on_mesh(spec.mesh):
                kv = spec.zeros(shape, spec.dtype, None, "batch", "heads", None, None)
                segments = spec.zeros((batch_size, capacity), jnp.int32, "batch", None)
                return KVCache(kv, kv, segments, jnp.zeros((), jnp.int32))

        mesh = sharding.concrete_mesh_of(params["wte"])
        if mesh is None:
            return jax.jit(empty)()
        with jax.set_mesh(mesh):
            return jax.jit(empty)()

    def apply(
        self,
        params: weights.Params,
        input_ids: ArrayLike,
        *,
        attention_mask: ArrayLike | None = None,
        segment_ids: ArrayLike | None = None,
        positions: ArrayLike | None = None,
        token_type_ids: ArrayLike | None = None,
        cache: KVCache | None = None,
    ) -> Any:
        """Computes the logits.

        Args:
          params: as from `init` or `load`.
          input_ids: int [B, T]; an id outside the vocabulary turns its row's logits into NaN.
          attention_mask: [B, T], nonzero for real tokens; with a cache it covers the T new tokens.
            Rows of padding tokens hold finite values without meaning.
          segment_ids: int [B, T], >= 1; attention stays within equal ids (packed documents). With
            a cache the default continues each row's last segment.
          positions: int [B, T] for learned positions, which default to slots; ALiBi counts slots
            and ignores them, as the original does.
          token_type_ids: int [B, T]; their embeddings are added as the original does (unscaled).
          cache: of earlier tokens; see `init_cache`.

        Returns:
          fp32 logits [B, T, V], or with a cache the pair (logits, extended cache).

        Raises:
          ValueError: shapes that do not agree, weights that do not match the configuration, or
            more tokens than the cache holds (inside `jax.jit`, where the fill of the cache is not
            known, the logits are NaN instead).
        """
        h, cache_out = self.hidden(
            params,
            input_ids,
            attention_mask=attention_mask,
            segment_ids=segment_ids,
            positions=positions,
            token_type_ids=token_type_ids,
            cache=cache,
        )
        logits = self.logits(params, h)
        return logits if cache is None else (logits, cache_out)

    def hidden(
        self,
        params,
        input_ids,
        *,
        attention_mask=None,
        segment_ids=None,
        positions=None,
        token_type_ids=None,
        cache=None,
    ) -> tuple[jax.Array, KVCache | None]:
        """The final hidden states, after ln_f, [B, T, D] in the compute dtype, and the cache.

        Arguments and errors as in `apply`.
        """
        spec, inputs = self._inputs(
            params, input_ids, attention_mask, segment_ids, positions, token_type_ids, cache
        )
        h, cache, _ = _forward(spec, params, inputs, cache, capture=False)
        return h, cache

    def logits(self, params: weights.Params, hidden: jax.Array) -> jax.Array:
        """The fp32 logits [..., V] of final hidden states [..., D]."""
        return _logits(self.spec(params), params, hidden)

    def intermediates(self, params, input_ids, *, attention_mask=None, segment_ids=None,
                      positions=None, token_type_ids=None) -> Intermediates:  # fmt: skip
        """Everything inside, as Hugging Face's `output_hidden_states` and `output_attentions`.

        For study and tests: unlike `apply` it holds [L, B, H, T, T] attention probabilities.
        Arguments as in `apply`.
        """
        spec, inputs = self._inputs(
            params, input_ids, attention_mask, segment_ids, positions, token_type_ids, None
        )
        h, _, (states, attentions) = _forward(spec, params, inputs, None, capture=True)
        states = jnp.concatenate([states, h[None]])
        return Intermediates(_logits(spec, params, h), states, attentions)

    def spec(self, params: weights.Params) -> Spec:
        """What is static in a forward pass with these weights, read off their shapes and types."""
        padding = weights.check(params, self.config)
        mesh = sharding.mesh_of(params["wte"])
        if mesh is not None:
            sharding.check_fit(self.config, mesh, self.rules, tuple(padding.items()))
        elif padding:
            raise ValueError(
                f"the weights are larger than the configuration off any mesh: found {padding}, "
                f"expected vocab {self.config.vocab_size} and mlp {self.config.n_inner}; padding "
                "belongs to a mesh (save and load strip it)"
            )
        dtype = self.compute_dtype
        if dtype is None:
            dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
        return Spec(
            self.config,
            jnp.dtype(dtype),
            self.rules,
            tuple(sorted(padding.items())),
            mesh,
            self.attention_implementation,
        )

    def _inputs(self, params, ids, mask, segments, positions, types, cache) -> tuple[Spec, dict]:
        """Checks and normalises the arguments of the forward pass."""
        c, spec = self.config, self.spec(params)
        named = {
            "input_ids": ids,
            "attention_mask": mask,
            "segment_ids": segments,
            "positions": positions,
            "token_type_ids": types,
        }
        arrays = {name: _as_array(x) for name, x in named.items() if x is not None}
        shape = arrays["input_ids"].shape
        if len(shape) != 2 or not shape[1]:
            raise ValueError(f"input_ids: found shape {shape}, expected [B, T] with T >= 1")
        for name, x in arrays.items():
            if x.shape != shape:
                raise ValueError(
                    f"{name}: found shape {x.shape}, expected that of input_ids {shape}"
                )
            if name != "attention_mask" and not jnp.issubdtype(x.dtype, jnp.integer):
                raise ValueError(f"{name}: found dtype {x.dtype}, expected integers")
        spec.check_batch(shape[0])
        if not c.alibi and segments is not None and positions is None:
            raise ValueError(
                "segment_ids with learned positions: pass positions, counted within each segment"
            )
        if cache is not None:
            spec.check_cache(cache, shape[0])
        start = 0 if cache is None else _concrete(cache.length)
        end = None if start is None else start + shape[1]
        if cache is not None and (end or shape[1]) > cache.capacity:
            raise ValueError(
                f"the cache holds {cache.capacity} tokens, of which {start or 0} are used, and "
                f"{shape[1]} more do not fit: make it larger (init_cache) or shorten the input"
            )
        if not c.alibi and positions is None and (end or shape[1]) > c.n_positions:
            raise ValueError(
                f"{end or shape[1]} tokens exceed n_positions = {c.n_positions}, the number of "
                "learned positions: shorten the input"
            )
        if mask is not None:
            arrays["attention_mask"] = arrays["attention_mask"] != 0
        return spec, {k: x.astype(jnp.int32) for k, x in arrays.items()}


@dataclasses.dataclass(frozen=True)
class Spec:
    """What is static in one forward pass: the configuration, dtype, padding and mesh."""

    config: BTLMConfig
    dtype: np.dtype
    rules: sharding.Rules
    padding: tuple[tuple[str, int], ...]
    mesh: jax.sharding.AbstractMesh | None
    implementation: attention.Implementation | None

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

    @property
    def attention_shard(self) -> tuple[PartitionSpec, PartitionSpec] | None:
        """How attention is split: the PartitionSpecs of batch and heads; None off any mesh."""
        if self.mesh is None:
            return None
        return sharding.spec(self.rules, "batch"), sharding.spec(self.rules, "heads")

    def zeros(self, shape, dtype, *axes: str | None) -> jax.Array:
        """A sharded array of zeros."""
        return jnp.zeros(shape, dtype, out_sharding=self.axes(*axes))

    def einsum(self, equation: str, x: jax.Array, y: jax.Array, *axes: str | None) -> jax.Array:
        """jnp.einsum accumulated and returned in fp32, sharded by the logical axes of the result.

        fp32 results are also what keeps XLA on its fast CPU path for bf16 operands.
        """
        return jnp.einsum(
            equation,
            x,
            y,
            precision=self.precision,
            preferred_element_type=jnp.float32,
            out_sharding=self.axes(*axes),
        )

    def check_batch(self, batch_size: int) -> None:
        """Raises ValueError if the batch does not divide over the mesh."""
        if self.mesh is not None:
            sharding.check_batch(batch_size, self.mesh, self.rules)

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


@functools.partial(jax.jit, static_argnames=("spec", "capture"))
def _forward(spec: Spec, params, inputs: Mapping[str, jax.Array], cache, capture: bool):
    with sharding.on_mesh(spec.mesh):
        inputs = {k: spec.place(x, "batch", None) for k, x in inputs.items()}
        return Transformer(spec).apply({"params": params}, inputs, cache, capture)


@functools.partial(jax.jit, static_argnames="spec")
def _logits(spec: Spec, params, hidden):
    with sharding.on_mesh(spec.mesh):
        return project_logits(spec, params, hidden)[..., : spec.config.vocab_size]


def project_logits(spec: Spec, params, hidden: jax.Array, *, sharded: bool = False) -> jax.Array:
    """Logits with the vocabulary as padded as the weights are, fp32 [..., Vp].

    Padded entries are the lowest fp32, so that a softmax gives them zero.

    Args:
      sharded: leave the vocabulary split over its mesh axis instead of gathering it.
    """
    c = spec.config
    w = params["wte" if c.tie_word_embeddings else "lm_head"]
    w = spec.place(w.astype(spec.dtype), "vocab", None)
    lead = ("batch",) + (None,) * (hidden.ndim - 2)
    logits = spec.einsum("...d,vd->...v", hidden, w, *lead, "vocab") * c.logits_scale
    if w.shape[0] > c.vocab_size:
        real = spec.place(jnp.arange(w.shape[0]) < c.vocab_size, "vocab")
        logits = jnp.where(real, logits, jnp.finfo(jnp.float32).min)
    return logits if sharded else spec.place(logits, *lead, None)


class Layer(nn.Module):
    """A module whose weights are looked up in the table by their path in the tree."""

    spec: Spec

    def weight(self, name: str, dtype: DTypeLike | None = None) -> jax.Array:
        """A weight in the given dtype (the compute dtype), gathered from its fsdp shards."""
        spec = self.spec
        w = weights.by_path(spec.config)[(*self.path, name)]
        shape = w.padded(dict(spec.padding))
        value = self.param(name, nn.initializers.zeros, shape)  # never drawn here: `weights.init`
        used = tuple(None if a == "embed" else a for a in w.axes)
        return spec.place(value.astype(dtype or spec.dtype), *used)


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
    """A projection with bias; `axes` are the logical axes of the result."""

    equation: str
    axes: tuple[str | None, ...]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.spec.einsum(self.equation, x, self.weight("kernel"), *self.axes)
        bias = self.weight("bias", jnp.float32)
        if self.equation.endswith("->cbhtk"):
            bias = bias[:, None, :, None, :]
        return (y + bias).astype(self.spec.dtype)


class Attention(Layer):
    """Multi-head causal attention over the new tokens and, if given, a cache."""

    @nn.compact
    def __call__(self, x_BTD, layer, context: Context, kv, capture: bool):
        c, spec = self.spec.config, self.spec
        qkv_axes = (None, "batch", "heads", None, None)
        qkv = Linear(spec, "btd,dchk->cbhtk", qkv_axes, name="c_attn")(x_BTD)
        q, k, v = qkv[0], qkv[1], qkv[2]
        if kv is not None:
            # In place on the stacked cache: only the T new slots of this layer are written.
            zero = jnp.zeros_like(layer)
            at = (layer, zero, zero, context.offset, zero)
            kv = tuple(
                jax.lax.dynamic_update_slice(stack, x[None].astype(stack.dtype), at)
                for stack, x in zip(kv, (k, v), strict=True)
            )
            k, v = (jax.lax.dynamic_index_in_dim(x, layer, 0, keepdims=False) for x in kv)
        shared = dict(
            slopes=context.slopes,
            scale=c.attention_scale,
            segments=context.segments,
            offset=context.offset,
            precision=spec.precision,
        )
        out = attention.attention(
            q,
            k,
            v,
            **shared,
            implementation=spec.implementation,
            shard=spec.attention_shard,
        )
        h = Linear(spec, "bhtk,hkd->btd", ("batch", None, None), name="c_proj")(out)
        return h, kv, attention.probabilities(q, k, **shared) if capture else None


class MLP(Layer):
    """SwiGLU, c_proj(c_fc(x) * silu(c_fc2(x))), or a GELU: exact ("gelu") or tanh ("gelu_new")."""

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        c, spec, axes = self.spec.config, self.spec, ("batch", None, "mlp")
        y_BTF = Linear(spec, "btd,df->btf", axes, name="c_fc")(x_BTD)
        if c.gated:
            y_BTF = y_BTF * nn.silu(Linear(spec, "btd,df->btf", axes, name="c_fc2")(x_BTD))
        else:
            y_BTF = nn.gelu(y_BTF, approximate=c.activation_function == "gelu_new")
        return Linear(spec, "btf,fd->btd", ("batch", None, None), name="c_proj")(y_BTF)


class Block(Layer):
    """h += Attn(ln_1(h)); h += MLP(ln_2(h)). The body of the scan over layers."""

    capture: bool

    @nn.compact
    def __call__(self, carry, layer, context: Context):
        h, kv = carry
        before = h
        x = LayerNorm(self.spec, name="ln_1")(h)
        x, kv, probs = Attention(self.spec, name="attn")(x, layer, context, kv, self.capture)
        h = h + x
        h = h + MLP(self.spec, name="mlp")(LayerNorm(self.spec, name="ln_2")(h))
        return (h, kv), (before, probs) if self.capture else None


class Context(NamedTuple):
    """What every layer's attention shares."""

    slopes: jax.Array | None  # fp32 [H], divided by the ALiBi scale
    segments: tuple[jax.Array, jax.Array] | None  # of queries [B, T] and keys [B, S]
    offset: jax.Array  # int32, the slot of the first query


class Transformer(Layer):
    """Embedding, L scanned blocks, ln_f. Returns (h [B, T, D], cache, captured)."""

    @nn.compact
    def __call__(self, inputs: Mapping[str, jax.Array], cache: KVCache | None, capture: bool):
        c, spec = self.spec.config, self.spec
        ids = inputs["input_ids"]
        T = ids.shape[1]
        offset = jnp.zeros((), jnp.int32) if cache is None else cache.length
        key_length = T if cache is None else offset + T

        wte = self.weight("wte")
        h = _look_up(spec, wte, ids, c.vocab_size)
        if not c.alibi:
            slots = spec.place(jnp.broadcast_to(offset + jnp.arange(T), ids.shape), "batch", None)
            at = inputs.get("positions", slots)
            h = h + _look_up(spec, self.weight("wpe"), at, c.n_positions)
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

        blocks = nn.scan(
            Block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast),
            length=c.n_layer,
        )(spec, capture, name="blocks")
        kv = None if cache is None else (cache.key, cache.value)
        context = Context(slopes, pair, offset)
        out: Any = blocks((h, kv), jnp.arange(c.n_layer, dtype=jnp.int32), context)
        (h, filled), captured = out
        h = LayerNorm(spec, name="ln_f")(h)
        if cache is not None:
            # A cache that ran over would have overwritten its last slots: make that visible.
            h = jnp.where(offset + T <= cache.capacity, h, jnp.nan)
            cache = KVCache(filled[0], filled[1], pair[1], offset + T)
        return h, cache, captured

    def _segments(self, inputs, cache: KVCache | None, offset) -> jax.Array | None:
        """The segment of every new token, 0 for padding; None if all are one segment."""
        segments, mask = inputs.get("segment_ids"), inputs.get("attention_mask")
        if segments is None and cache is not None:
            last = jax.lax.dynamic_index_in_dim(cache.segment_ids, jnp.maximum(offset - 1, 0), 1)
            started = (offset > 0) & (last > 0)
            segments = jnp.broadcast_to(jnp.where(started, last, 1), inputs["input_ids"].shape)
        if mask is None:
            return segments
        return mask if segments is None else jnp.where(mask != 0, segments, 0)


def _look_up(spec: Spec, table: jax.Array, index: jax.Array, size: int) -> jax.Array:
    """Rows of an embedding, fp32 [B, T, D]; NaN where the index is out of range."""
    rows = table.at[index].get(mode="clip", out_sharding=spec.axes("batch", None, None))
    inside = (index >= 0) & (index < size)
    return jnp.where(inside[..., None], rows.astype(jnp.float32), jnp.nan)


def _as_array(x: ArrayLike) -> jax.Array:
    """As a JAX array. Large 64-bit ids must not wrap into the vocabulary: they saturate."""
    if isinstance(x, np.ndarray) and np.issubdtype(x.dtype, np.integer) and x.itemsize >= 4:
        x = np.clip(x, max(-1, np.iinfo(x.dtype).min), np.iinfo(np.int32).max)
    return jnp.asarray(x)


def _concrete(x: jax.Array) -> int | None:
    """The value of an int scalar, or None while tracing."""
    return None if isinstance(x, jax.core.Tracer) else int(x)
