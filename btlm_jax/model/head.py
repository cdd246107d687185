"""The head: logits from final hidden states."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from btlm_jax.model.params import Params
from btlm_jax.model.runtime import Runtime, StoredWeight
from btlm_jax.model.weights import weights_by_name


def head_weight(runtime: Runtime, params: Params) -> StoredWeight:
    """Returns the weight of the head, [Vp, D], where Vp is the padded vocabulary."""
    name = "wte" if runtime.config.tie_word_embeddings else "lm_head"
    return StoredWeight(weights_by_name(runtime.config)[name], params[name])


def head_logits(runtime: Runtime, product: jax.Array, ids_V: jax.Array) -> jax.Array:
    """Computes logits from the product of states and head weight, fp32 [..., V].

    Ids of padding get the lowest fp32 number, so that a softmax gives them zero.

    Args:
      ids_V: the token ids of the last dimension, which may be a shard of the vocabulary.
    """
    logits = product * runtime.config.logits_scale
    if "vocab" in dict(runtime.padding):
        is_token_V = ids_V < runtime.config.vocab_size
        logits = jnp.where(is_token_V, logits, jnp.finfo(jnp.float32).min)
    return logits


def project_logits(runtime: Runtime, params: Params, hidden: jax.Array) -> jax.Array:
    """Computes logits, fp32 [..., Vp], from final hidden states [..., D]."""
    w_VD = head_weight(runtime, params)
    # Decoding does not split sequences, so whether they are is read from the states.
    state_spec = jax.typeof(hidden).sharding.spec
    lead = ("batch", *("sequence" if axis else None for axis in state_spec[1:-1]))
    dims = "bts"[: hidden.ndim - 1]
    product = runtime.einsum(f"{dims}d,vd->{dims}v", hidden, w_VD, *lead, "vocab")
    ids_V = runtime.shard(jnp.arange(product.shape[-1]), "vocab")
    return runtime.shard(head_logits(runtime, product, ids_V), *lead, None)
