"""The BTLM language model as functions of its weights: init, apply, hidden, logits, caches.

On a mesh the model reads the mesh from the types of the weights, so callers need not set one.
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
from btlm_jax.hf_generation_config import GenerationConfigFile
from btlm_jax.model import attention, sharding
from btlm_jax.model.head import project_logits
from btlm_jax.model.inputs import checked_inputs
from btlm_jax.model.kv_cache import CACHE_DTYPES, KVArray, KVCache, LayerKV, fork
from btlm_jax.model.layers import Transformer
from btlm_jax.model.params import Params, check_params, init_params, unstack_params
from btlm_jax.model.remat import SAVED_NAMES, Remat
from btlm_jax.model.runtime import Runtime
from btlm_jax.utils.dtypes import optional_dtype


class Intermediates(NamedTuple):
    """All intermediate activations of a forward pass, from `BTLM.intermediates`.

    Attributes:
      logits: fp32 [B, T, V].
      hidden_states: [L + 1, B, T, D]: scaled embeddings, then the output of every block; the last
        one after ln_f.
      attentions: fp32 [L, B, H, T, T], probabilities.
      queries: [L, B, H, T, K], scaled: attention logits are queries · keys + ALiBi.
      keys: [L, B, H, T, K].
      attention_outputs: [L, B, T, D], what attention adds to the residual stream.
      mlp_outputs: [L, B, T, D], what the MLP adds to it.
    """

    logits: jax.Array
    hidden_states: jax.Array
    attentions: jax.Array
    queries: jax.Array
    keys: jax.Array
    attention_outputs: jax.Array
    mlp_outputs: jax.Array


@dataclasses.dataclass(frozen=True)
class BTLM:
    """A BTLM language model: a configuration and how to compute it. It holds no weights.

    Attributes:
      config: the architecture.
      compute_dtype: the dtype of activations and matrix products; None is bfloat16 on TPU and GPU,
        float32 on CPU. float32 means full precision on every platform.
      rules: logical axis -> mesh axis, used if the weights are on a mesh.
      attention_implementation: see `attention.attention`.
      remat: what the forward pass saves for the backward pass (`remat.SAVED_NAMES`): "none"
        recomputes nothing, "dots" saves matrix products and attention, "attention" only the
        latter, "full" only the input of every block.
      generation_config: defaults of `generate`, which `load` reads from the checkpoint. Models that
        differ in them only are equal, and share compiled programs.
    """

    config: BTLMConfig
    compute_dtype: DTypeLike | None = None
    rules: sharding.Rules = sharding.RULES
    attention_implementation: attention.Implementation | None = None
    remat: Remat = "dots"
    generation_config: GenerationConfigFile | None = dataclasses.field(
        default=None, compare=False, repr=False
    )

    def __post_init__(self) -> None:
        if self.remat not in SAVED_NAMES:
            expected = ", ".join(SAVED_NAMES)
            raise ValueError(f"remat: found {self.remat!r}, expected one of {expected}")
        compute_dtype = optional_dtype(self.compute_dtype, "compute_dtype")
        object.__setattr__(self, "compute_dtype", compute_dtype)
        # Rules may be a mapping, but the model must be hashable to be a static argument of jit.
        object.__setattr__(self, "rules", tuple(dict(self.rules).items()))

    def init(
        self,
        key: jax.Array,
        *,
        dtype: DTypeLike = jnp.float32,
        mesh: Mesh | None = None,
        truncation: float | None = None,
    ) -> Params:
        """Draws fresh weights, sharded over `mesh` if one is given; see `params.init_params`.

        Returns:
          A nested dict of arrays; the same values on every mesh, up to zero padding.

        Raises:
          ValueError: the dtype is not a float that weights can have.
        """
        if mesh is None:
            return init_params(key, self.config, dtype, truncation=truncation)
        padding = sharding.param_padding(self.config, mesh, self.rules)
        shardings = sharding.param_shardings(self.config, mesh, self.rules, padding)
        return init_params(key, self.config, dtype, padding, shardings, truncation)

    def init_cache(
        self,
        params: Params,
        batch_size: int,
        capacity: int,
        *,
        dtype: DTypeLike | None = None,
    ) -> KVCache:
        """Returns an empty cache of `capacity` slots, sharded like the activations of `params`.

        Args:
          params: the weights it will be used with.
          batch_size: the number of rows.
          capacity: the number of slots, for one token each.
          dtype: "int8" halves a bf16 cache, with a scale for every slot and head; None is the
            compute dtype.

        Raises:
          ValueError: the batch does not divide over the mesh, or the dtype is none of a cache.
        """
        runtime = self.runtime(params)
        runtime.check_batch(batch_size)
        dtype = optional_dtype(dtype, "dtype", CACHE_DTYPES) or runtime.dtype

        def empty_cache():
            with sharding.on_mesh(runtime.mesh):
                layers, ids = _empty_slots(runtime, batch_size, capacity, dtype)
                segment = runtime.zeros((batch_size,), jnp.int32, "batch")
                length = jnp.zeros(batch_size, jnp.int32)
                return KVCache(layers, ids, segment, length, jnp.int32(0), fresh=True)

        return _compile_on_mesh(params, empty_cache)

    def fork(self, params: Params, cache: KVCache, copies: int, capacity: int) -> KVCache:
        """Returns an empty cache in which `copies` rows continue each row of `cache`.

        They share the keys and values of `cache`, in its dtype; under jit nothing is copied.
        """
        runtime = self.runtime(params)

        def empty_fork(cache):
            with sharding.on_mesh(runtime.mesh):
                layers, ids = _empty_slots(runtime, cache.rows * copies, capacity, cache.dtype)
                return fork(cache, copies, layers, ids)

        return _compile_on_mesh(params, empty_fork, cache)

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
          input_ids: int [B, T]; an id outside the vocabulary turns the logits of its row into NaN.
          attention_mask: [B, T], nonzero for valid tokens; with a cache it covers the T new tokens.
            The logits of padding tokens are finite but have no meaning.
          segment_ids: int [B, T], >= 1; attention stays within equal ids (packed documents). With
            a cache the default continues the last segment of each row.
          positions: int [B, T] for learned positions, by default the slots; ALiBi counts slots and
            ignores them, like the original.
          token_type_ids: int [B, T]; their embeddings are added unscaled, like in the original.
          cache: of earlier tokens; see `init_cache`.
          length: int scalar, the number of valid tokens; the rest of T are padding at the end. The
            cache advances by it (later tokens overwrite the padding), and dynamic ALiBi scaling
            does not count the padding. The logits of padding have no meaning.

        Returns:
          fp32 logits [B, T, V], or with a cache the pair (logits, extended cache).

        Raises:
          ValueError: shapes that do not agree, weights that do not match the configuration, or
            more tokens than the cache holds (inside `jax.jit`, where the length of the cache is
            unknown, the logits are NaN instead).
        """
        h, new_cache = self.hidden(
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
        return logits if cache is None else (logits, new_cache)

    def hidden(
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
    ) -> tuple[jax.Array, KVCache | None]:
        """Computes the final hidden states, after ln_f: [B, T, D] in the compute dtype.

        Arguments and errors as in `apply`.

        Returns:
          (hidden states, extended cache or None).
        """
        arguments = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "segment_ids": segment_ids,
            "positions": positions,
            "token_type_ids": token_type_ids,
        }
        runtime = self.runtime(params)
        if cache is not None:  # a step of decoding is too short to split
            runtime = _without_context_parallel(runtime)
        inputs = checked_inputs(runtime, arguments, cache, length)
        if length is not None:
            length = jnp.asarray(length, jnp.int32)
        h, cache, _ = _forward(runtime, params, inputs, cache, length, capture=False)
        return h, cache

    def logits(self, params: Params, hidden: jax.Array) -> jax.Array:
        """Computes fp32 logits [..., V] from final hidden states [..., D]."""
        return _logits(self.runtime(params), params, hidden)

    def intermediates(
        self,
        params: Params,
        input_ids: ArrayLike,
        *,
        attention_mask: ArrayLike | None = None,
        segment_ids: ArrayLike | None = None,
        positions: ArrayLike | None = None,
        token_type_ids: ArrayLike | None = None,
    ) -> Intermediates:
        """Returns all intermediate activations.

        They include Hugging Face's `output_hidden_states` and `output_attentions`. This is for
        study and tests: unlike `apply` it holds [L, B, H, T, T] attention probabilities. Arguments
        as in `apply`.
        """
        arguments = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "segment_ids": segment_ids,
            "positions": positions,
            "token_type_ids": token_type_ids,
        }
        runtime = self.runtime(params)
        inputs = checked_inputs(runtime, arguments, None)
        runtime = _without_context_parallel(runtime)
        h, _, captured = _forward(runtime, params, inputs, None, None, capture=True)
        captured["hidden_states"] = jnp.concatenate([captured["hidden_states"], h[None]])
        return Intermediates(logits=_logits(runtime, params, h), **captured)

    def runtime(self, params: Params) -> Runtime:
        """Returns the static arguments of a forward pass, from shapes and types of the weights."""
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
            config=self.config,
            dtype=self.dtype_on(mesh),
            rules=self.rules,
            padding=tuple(sorted(padding.items())),
            mesh=mesh,
            implementation=self.attention_implementation,
            remat=self.remat,
        )

    def dtype_on(self, mesh: jax.sharding.AbstractMesh | None) -> np.dtype:
        """Returns the compute dtype on a mesh, or without one; see `compute_dtype`."""
        if self.compute_dtype is not None:
            return jnp.dtype(self.compute_dtype)
        return jnp.dtype(jnp.float32 if sharding.mesh_platform(mesh) == "cpu" else jnp.bfloat16)


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


def _without_context_parallel(runtime: Runtime) -> Runtime:
    """Returns a runtime that does not split sequences."""
    return dataclasses.replace(runtime, rules=sharding.unshard_sequences(runtime.rules))


def _compile_on_mesh(params: Params, fn: Callable[..., Any], *args: Any) -> Any:
    """Compiles and calls `fn` on the mesh of the weights."""
    mesh = sharding.concrete_mesh_of(params["wte"])
    with jax.set_mesh(mesh) if mesh is not None else contextlib.nullcontext():
        return jax.jit(fn)(*args)


def _empty_slots(
    runtime: Runtime, rows: int, capacity: int, dtype
) -> tuple[tuple[LayerKV, ...], jax.Array]:
    """Returns empty slots of every layer, and their segments int32 [rows, capacity]."""
    c = runtime.config
    shape = (rows, c.n_head, capacity, c.head_dim)

    def empty_array():
        data = runtime.zeros(shape, dtype, "batch", "heads", None, None)
        if dtype != jnp.int8:
            return KVArray(data, None)
        return KVArray(data, runtime.zeros(shape[:3], jnp.float32, "batch", "heads", None))

    layers = tuple(LayerKV(empty_array(), empty_array()) for _ in range(c.n_layer))
    return layers, runtime.zeros((rows, capacity), jnp.int32, "batch", None)
