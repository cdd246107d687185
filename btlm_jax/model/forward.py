"""The forward pass as functions of a runtime and weights: hidden states, logits, caches.

`BTLM` has a method for each of them. Code that calls several binds the runtime once, with
`BTLM.runtime(params)`, and passes it on. On a mesh the runtime knows the mesh from the types of the
weights, so callers need not set one.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from btlm_jax.model import kv_cache, sharding
from btlm_jax.model.head import project_logits
from btlm_jax.model.inputs import checked_inputs
from btlm_jax.model.kv_cache import KVCache
from btlm_jax.model.layers import Transformer
from btlm_jax.model.params import Params, is_unstacked, unstack_params
from btlm_jax.model.runtime import Runtime


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


def hidden(
    runtime: Runtime,
    params: Params,
    input_ids: ArrayLike,
    *,
    cache: KVCache | None = None,
    length: ArrayLike | None = None,
    **arguments: ArrayLike | None,
) -> tuple[jax.Array, KVCache | None]:
    """Computes the final hidden states, after ln_f; see `BTLM.hidden`.

    Args:
      runtime: from `BTLM.runtime(params)`.
      params, input_ids, cache, length: as in `BTLM.apply`.
      **arguments: attention_mask, segment_ids, positions and token_type_ids of `BTLM.apply`.

    Returns:
      ([B, T, D] in the compute dtype, extended cache or None).
    """
    if cache is not None:
        runtime = runtime.without_context_parallel()
    inputs = checked_inputs(runtime, input_ids, cache, length, **arguments)
    if length is not None:
        length = jnp.asarray(length, jnp.int32)
    return _hidden(runtime, params, inputs, cache, length)


@functools.partial(jax.jit, static_argnames="runtime")
def _hidden(runtime: Runtime, params, inputs: Mapping[str, jax.Array], cache, length):
    with sharding.on_mesh(runtime.mesh):
        inputs = {k: runtime.shard(x, "batch", "sequence") for k, x in inputs.items()}
        if cache is not None:
            params = unstack_params(runtime.config, params)
        return Transformer(runtime).apply({"params": params}, inputs, cache, length)


@functools.partial(jax.jit, static_argnames="runtime")
def logits(runtime: Runtime, params: Params, hidden: jax.Array) -> jax.Array:
    """Computes fp32 logits [..., V] from final hidden states [..., D]."""
    with sharding.on_mesh(runtime.mesh):
        return project_logits(runtime, params, hidden)[..., : runtime.config.vocab_size]


def intermediates(
    runtime: Runtime, params: Params, input_ids: ArrayLike, **arguments: Any
) -> Intermediates:
    """Returns all intermediate activations; see `BTLM.intermediates`."""
    inputs = checked_inputs(runtime, input_ids, **arguments)
    return _intermediates(runtime.without_context_parallel(), params, inputs)


@functools.partial(jax.jit, static_argnames="runtime")
def _intermediates(runtime: Runtime, params, inputs: Mapping[str, jax.Array]) -> Intermediates:
    with sharding.on_mesh(runtime.mesh):
        inputs = {k: runtime.shard(x, "batch", "sequence") for k, x in inputs.items()}
        variables: Any = {"params": params}
        outputs, state = Transformer(runtime).apply(variables, inputs, mutable=["intermediates"])
        (h_BTD, _), blocks = outputs, dict[str, Any](state["intermediates"]["blocks"])
        if is_unstacked(params):
            layers = (blocks[str(i)] for i in range(runtime.config.n_layer))
            blocks = jax.tree.map(lambda *x: jnp.stack(x), *layers)
        return Intermediates(
            logits=logits(runtime, params, h_BTD),
            hidden_states=jnp.concatenate([blocks["hidden_states"], h_BTD[None]]),
            attention_outputs=blocks["attention_outputs"],
            mlp_outputs=blocks["mlp_outputs"],
            **blocks["attn"],
        )


def init_cache(
    runtime: Runtime,
    params: Params,
    batch_size: int,
    capacity: int,
    *,
    dtype: DTypeLike | None = None,
) -> KVCache:
    """Returns an empty cache of `capacity` slots; see `BTLM.init_cache`."""
    runtime.check_batch(batch_size)
    empty = functools.partial(kv_cache.empty_cache, runtime, batch_size, capacity, dtype)
    return _compile_on_mesh(params, empty)


def fork_cache(
    runtime: Runtime, params: Params, cache: KVCache, copies: int, capacity: int
) -> KVCache:
    """Returns an empty cache in which `copies` rows continue each row; see `BTLM.fork`."""

    def fork(cache: KVCache) -> KVCache:
        return kv_cache.fork(runtime, cache, copies, capacity)

    return _compile_on_mesh(params, fork, cache)


def _compile_on_mesh(params: Params, fn: Callable[..., Any], *args: Any) -> Any:
    """Compiles and calls `fn` on the mesh of the weights."""
    mesh = sharding.concrete_mesh_of(params["wte"])
    with jax.set_mesh(mesh) if mesh is not None else contextlib.nullcontext():
        return jax.jit(fn)(*args)
