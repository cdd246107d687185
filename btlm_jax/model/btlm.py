"""The BTLM language model as functions of its weights: init, apply, hidden, logits, caches.

On a mesh the model reads the mesh off the weights' types, so callers need not set one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import ArrayLike, DTypeLike

from btlm_jax.config import BTLMConfig
from btlm_jax.model import attention, sharding
from btlm_jax.model.kv_cache import KVArray, KVCache, LayerKV, fork
from btlm_jax.model.layers import Transformer, project_logits
from btlm_jax.model.params import Params, check_params, init_params, unstack_params
from btlm_jax.model.remat import SAVED_NAMES, Remat
from btlm_jax.model.runtime import Runtime


class Intermediates(NamedTuple):
    """What `BTLM.intermediates` returns."""

    logits: jax.Array  # fp32 [B, T, V]
    hidden_states: jax.Array  # [L + 1, B, T, D]: scaled embeddings, blocks; the last after ln_f
    attentions: jax.Array  # fp32 [L, B, H, T, T]
    queries: jax.Array  # [L, B, H, T, K], scaled: attention logits are queries · keys + ALiBi
    keys: jax.Array  # [L, B, H, T, K]
    attention_outputs: jax.Array  # [L, B, T, D], added to the residual stream
    mlp_outputs: jax.Array  # [L, B, T, D], likewise


@dataclasses.dataclass(frozen=True)
class BTLM:
    """A BTLM language model: a configuration and how to compute it. It holds no weights.

    Attributes:
      config: what is computed.
      compute_dtype: of activations and matrix products; None is bfloat16 on TPU and GPU, float32 on
        CPU. float32 means full precision on every platform.
      rules: logical axis -> mesh axis, used when the weights live on a mesh.
      attention_implementation: see `attention.attention`.
      remat: what the forward pass keeps for the backward pass (`remat.SAVED_NAMES`): "none" forgets
        nothing, "dots" keeps matrix products and attention, "attention" only the latter, "full"
        nothing but the input of every block.
    """

    config: BTLMConfig
    compute_dtype: DTypeLike | None = None
    rules: sharding.Rules = sharding.RULES
    attention_implementation: attention.Implementation | None = None
    remat: Remat = "dots"

    def __post_init__(self) -> None:
        if self.remat not in SAVED_NAMES:
            raise ValueError(
                f"remat: found {self.remat!r}, expected one of {', '.join(SAVED_NAMES)}"
            )
        # A mapping is welcome too; the model must be hashable to be static under jit.
        object.__setattr__(self, "rules", tuple(dict(self.rules).items()))

    def init(
        self,
        key: jax.Array,
        *,
        dtype: DTypeLike = jnp.float32,
        mesh: Mesh | None = None,
        truncation: float | None = None,
    ) -> Params:
        """Draws fresh weights, sharded over `mesh` if one is given; see `init_params`.

        Returns:
          A nested dict of arrays; the same values on every mesh, up to zero padding.
        """
        if mesh is None:
            return init_params(key, self.config, dtype, truncation=truncation)
        pad = sharding.param_padding(self.config, mesh, self.rules)
        placed = sharding.param_shardings(self.config, mesh, self.rules, pad)
        return init_params(key, self.config, dtype, pad, placed, truncation)

    def init_cache(
        self,
        params: Params,
        batch_size: int,
        capacity: int,
        *,
        dtype: DTypeLike | None = None,
    ) -> KVCache:
        """Makes an empty cache of `capacity` slots, sharded like the activations of `params`.

        Args:
          dtype: "int8" halves a bf16 cache, with a scale for every slot and head; None is the
            compute dtype.
        """
        runtime = self.runtime(params)
        runtime.check_batch(batch_size)
        dtype = _cache_dtype(runtime, dtype)

        def empty():
            with sharding.on_mesh(runtime.mesh):
                layers, ids = _empty(runtime, batch_size, capacity, dtype)
                zero = runtime.zeros((batch_size,), jnp.int32, "batch")
                length = jnp.zeros(batch_size, jnp.int32)
                return KVCache(layers, ids, zero, length, jnp.int32(0), fresh=True)

        return _on_devices(params, empty)

    def fork(self, params: Params, cache: KVCache, copies: int, capacity: int) -> KVCache:
        """An empty cache of `copies` rows for each of `cache`, which they all read and continue.

        Of the same dtype. Under jit nothing is copied.
        """
        runtime = self.runtime(params)

        def empty(cache):
            with sharding.on_mesh(runtime.mesh):
                layers, ids = _empty(runtime, cache.rows * copies, capacity, cache.dtype)
                return fork(cache, copies, layers, ids)

        return _on_devices(params, empty, cache)

    def apply(
        self,
        params: Params,
        input_ids: ArrayLike,
        *,
        attention_mask: ArrayLike | None = None,
        segment_ids: ArrayLike | None = None,
        positions: ArrayLike | None = None,
        token_type_ids: ArrayLike | None = None,
        cache: KVCache | None = None,
        length: ArrayLike | None = None,
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
          length: int scalar, if only that many of the T tokens are meant and the others fill up a
            static shape: the cache grows by it (later tokens overwrite the filling), and dynamic
            ALiBi scaling counts no others. Logits of the filling have no meaning.

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
            length=length,
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
        length=None,
    ) -> tuple[jax.Array, KVCache | None]:
        """The final hidden states, after ln_f, [B, T, D] in the compute dtype, and the cache.

        Arguments and errors as in `apply`.
        """
        runtime, inputs = self._inputs(
            params, input_ids, attention_mask, segment_ids, positions, token_type_ids, cache
        )
        if length is not None:
            length = jnp.asarray(length, jnp.int32)
        h, cache, _ = _forward(runtime, params, inputs, cache, length, capture=False)
        return h, cache

    def logits(self, params: Params, hidden: jax.Array) -> jax.Array:
        """The fp32 logits [..., V] of final hidden states [..., D]."""
        return _logits(self.runtime(params), params, hidden)

    def intermediates(self, params, input_ids, *, attention_mask=None, segment_ids=None,
                      positions=None, token_type_ids=None) -> Intermediates:  # fmt: skip
        """All inside: Hugging Face's `output_hidden_states` and `output_attentions`, and more.

        For study and tests: unlike `apply` it holds [L, B, H, T, T] attention probabilities.
        Arguments as in `apply`.
        """
        runtime, inputs = self._inputs(
            params, input_ids, attention_mask, segment_ids, positions, token_type_ids, None
        )
        runtime = dataclasses.replace(runtime, rules=sharding.unshard_sequences(runtime.rules))
        h, _, seen = _forward(runtime, params, inputs, None, None, capture=True)
        seen["hidden_states"] = jnp.concatenate([seen["hidden_states"], h[None]])
        return Intermediates(logits=_logits(runtime, params, h), **seen)

    def runtime(self, params: Params) -> Runtime:
        """What is static in a forward pass with these weights, read off their shapes and types."""
        padding = check_params(params, self.config)
        mesh = sharding.mesh_of(params["wte"])
        if mesh is not None:
            sharding.check_params_fit(self.config, mesh, self.rules, tuple(padding.items()))
        elif padding:
            raise ValueError(
                f"the weights are larger than the configuration off any mesh: found {padding}, "
                f"expected vocab {self.config.vocab_size} and mlp {self.config.n_inner}; padding "
                "belongs to a mesh (save and load strip it)"
            )
        return Runtime(
            self.config,
            self.dtype_on(mesh),
            self.rules,
            tuple(sorted(padding.items())),
            mesh,
            self.attention_implementation,
            self.remat,
        )

    def dtype_on(self, mesh: jax.sharding.AbstractMesh | None) -> np.dtype:
        """What is computed in on a mesh, or with None off any: see `compute_dtype`."""
        if self.compute_dtype is not None:
            return jnp.dtype(self.compute_dtype)
        return jnp.dtype(jnp.float32 if sharding.mesh_platform(mesh) == "cpu" else jnp.bfloat16)

    def _inputs(self, params, ids, mask, segments, positions, types, cache) -> tuple[Runtime, dict]:
        """Checks and normalizes the arguments of the forward pass."""
        c, runtime = self.config, self.runtime(params)
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
        if cache is not None:  # a step of decoding has nothing to split
            runtime = dataclasses.replace(runtime, rules=sharding.unshard_sequences(runtime.rules))
        runtime.check_batch(*shape)
        if not c.alibi and segments is not None and positions is None:
            raise ValueError(
                "segment_ids with learned positions: pass positions, counted within each segment"
            )
        if cache is not None:
            runtime.check_cache(cache, shape[0])
        start = 0 if cache is None else _fill(cache)
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
        return runtime, {k: x.astype(jnp.int32) for k, x in arrays.items()}


@functools.partial(jax.jit, static_argnames=("runtime", "capture"))
def _forward(
    runtime: Runtime, params, inputs: Mapping[str, jax.Array], cache, length, capture: bool
):
    with sharding.on_mesh(runtime.mesh):
        inputs = {k: runtime.shard(x, "batch", "sequence") for k, x in inputs.items()}
        if cache is not None:
            params = unstack_params(runtime.config, params)
        return Transformer(runtime).apply({"params": params}, inputs, cache, length, capture)


@functools.partial(jax.jit, static_argnames="runtime")
def _logits(runtime: Runtime, params, hidden):
    with sharding.on_mesh(runtime.mesh):
        return project_logits(runtime, params, hidden)[..., : runtime.config.vocab_size]


def _on_devices(params: Params, make: Callable[..., Any], *args: Any) -> Any:
    """What `make` makes, compiled, where the weights live."""
    mesh = sharding.concrete_mesh_of(params["wte"])
    with jax.set_mesh(mesh) if mesh is not None else contextlib.nullcontext():
        return jax.jit(make)(*args)


def _as_array(x: ArrayLike) -> jax.Array:
    """As a JAX array. Large 64-bit ids must not wrap into the vocabulary: they saturate."""
    if isinstance(x, np.ndarray) and np.issubdtype(x.dtype, np.integer) and x.itemsize >= 4:
        x = np.clip(x, max(-1, np.iinfo(x.dtype).min), np.iinfo(np.int32).max)
    return jnp.asarray(x)


def _fill(cache: KVCache) -> int | None:
    """The greatest number of filled slots, or None while tracing."""
    return None if isinstance(cache.length, jax.core.Tracer) else int(cache.length.max())


def _cache_dtype(runtime: Runtime, dtype: DTypeLike | None) -> np.dtype:
    found = runtime.dtype if dtype is None else jnp.dtype(dtype)
    if found != jnp.int8 and not jnp.issubdtype(found, jnp.floating):
        raise ValueError(f"dtype of the cache: found {found}, expected int8 or a float")
    return found


def _empty(
    runtime: Runtime, rows: int, capacity: int, dtype
) -> tuple[tuple[LayerKV, ...], jax.Array]:
    """Empty slots of every layer, and their segments."""
    c = runtime.config
    shape = (rows, c.n_head, capacity, c.head_dim)

    def slots():
        data = runtime.zeros(shape, dtype, "batch", "heads", None, None)
        if dtype != jnp.int8:
            return KVArray(data, None)
        return KVArray(data, runtime.zeros(shape[:3], jnp.float32, "batch", "heads", None))

    layers = tuple(LayerKV(slots(), slots()) for _ in range(c.n_layer))
    return layers, runtime.zeros((rows, capacity), jnp.int32, "batch", None)
