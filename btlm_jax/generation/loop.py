"""The decoding loop: prefill, then one token at a time from the KV cache, wholly inside jit."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from btlm_jax import sharding
from btlm_jax.config import BTLMConfig
from btlm_jax.generation.sampling import Sampling, choose
from btlm_jax.model import BTLM
from btlm_jax.weights import Params

logger = logging.getLogger(__name__)


def generate(
    model: BTLM,
    params: Params,
    input_ids: ArrayLike,
    *,
    attention_mask: ArrayLike | None = None,
    max_new_tokens: int = 20,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int = 50,
    top_p: float = 1.0,
    eos_token_id: int | Sequence[int] | Literal["config"] | None = "config",
    pad_token_id: int | None = None,
    seed: int = 0,
    cache_length: int | None = None,
) -> np.ndarray:
    """Continues prompts, with the argument names and semantics of transformers' `generate`.

    Args:
      model, params: the model and its weights, on a device or a mesh.
      input_ids: int [B, T]; shorter prompts are padded on the left.
      attention_mask: [B, T], nonzero for real tokens; required where prompts are padded.
      max_new_tokens: an upper bound; generation ends once every row has produced an EOS.
      do_sample, temperature, top_k, top_p: see `Sampling`.
      eos_token_id: one or several ids that end a row; "config" takes the model's, None never ends.
      pad_token_id: fills rows that have ended; default the model's pad token, else the first EOS.
      seed: of the random draws; row i of a batch draws from a key of its own.
      cache_length: slots of the KV cache; default T + max_new_tokens.

    Returns:
      int32 [B, T + n], prompts included, as long as the longest row.

    Raises:
      ValueError: an empty prompt, tokens outside the vocabulary, right padding, or more tokens than
        the cache or the learned positions hold.
    """
    c = model.config
    sampling = Sampling(do_sample, temperature, top_k, top_p)
    ids = np.asarray(input_ids)
    mask = np.ones(ids.shape) if attention_mask is None else np.asarray(attention_mask)
    mask = (mask != 0).astype(np.int32)
    _check_prompt(ids, mask, c.vocab_size)
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens: found {max_new_tokens}, expected >= 1")
    eos = _end_tokens(eos_token_id, c)
    if pad_token_id is None:
        pad_token_id = c.pad_token_id if c.pad_token_id is not None else eos[0] if eos else 0

    total = ids.shape[1] + max_new_tokens
    capacity = total if cache_length is None else cache_length
    if total > capacity:
        raise ValueError(
            f"a prompt of {ids.shape[1]} tokens and {max_new_tokens} new ones need {total} cache "
            f"slots, found cache_length={capacity}: raise it, or shorten the prompt"
        )
    if total > c.n_positions:
        if not c.alibi:
            raise ValueError(
                f"a prompt of {ids.shape[1]} tokens and {max_new_tokens} new ones exceed the "
                f"{c.n_positions} learned positions: shorten the prompt or max_new_tokens"
            )
        if c.alibi_scaling is None:
            logger.warning(
                "%d tokens exceed the trained context of %d and alibi_scaling is not set: quality "
                "falls off beyond it",
                total,
                c.n_positions,
            )
    rows = ids.shape[0]
    mesh = sharding.mesh_of(params["wte"])
    extra = -rows % sharding.ways(mesh, model.rules, "batch") if mesh is not None else 0
    if extra:  # copies of the last row, dropped again, so that the batch divides over the mesh
        ids, mask = (np.concatenate([x, np.repeat(x[-1:], extra, 0)]) for x in (ids, mask))
    tokens, length = _decode(
        model,
        params,
        jnp.asarray(ids, jnp.int32),
        jnp.asarray(mask),
        jnp.int32(rows),
        jax.random.key(seed),
        jnp.int32(pad_token_id),
        capacity=capacity,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        eos=eos,
    )
    return np.asarray(tokens)[:rows, : int(length)]


@functools.partial(
    jax.jit, static_argnames=("model", "capacity", "max_new_tokens", "sampling", "eos")
)
def _decode(model, params, ids, mask, rows, key, pad, *, capacity, max_new_tokens, sampling, eos):
    spec = model.spec(params)
    B, T = ids.shape

    # Learned positions count the real tokens of a row, as transformers does; ALiBi counts slots.
    real = mask.sum(1, keepdims=True)

    def positions(counted):
        return None if model.config.alibi else jnp.maximum(counted, 0)

    def next_token(h, step, done):
        """The token after hidden states [B, 1, D]; `pad` in rows that are done."""
        # Choosing is cheap and done everywhere at once: the logits of all rows are replicated.
        logits = spec.place(model.logits(params, h), None, None, None)[:, 0]
        keys = jax.vmap(lambda row: jax.random.fold_in(jax.random.fold_in(key, row), step))
        token = jnp.where(done, pad, choose(logits, sampling, keys(jnp.arange(B))))
        return token, done | jnp.isin(token, jnp.asarray(eos, jnp.int32)) if eos else done

    def unfinished(state):
        step, _, _, _, done = state
        return (step < max_new_tokens) & ~done.all()

    def advance(state):
        step, tokens, token, cache, done = state
        at = positions(real + step - 1)
        h, cache = model.hidden(params, token[:, None], cache=cache, positions=at)
        token, done = next_token(h, step, done)
        tokens = jax.lax.dynamic_update_slice(tokens, token[:, None], (0, T + step))
        return step + 1, tokens, token, cache, done

    with sharding.on_mesh(spec.mesh):
        # Made here: an argument would be held beside the loop's own copy.
        cache = model.init_cache(params, B, capacity)
        at = positions(jnp.cumsum(mask, 1) - 1)
        h, cache = model.hidden(params, ids, attention_mask=mask, cache=cache, positions=at)
        token, done = next_token(h[:, -1:], 0, jnp.arange(B) >= rows)
        tokens = jnp.concatenate([ids, jnp.full((B, max_new_tokens), pad)], 1)
        tokens = tokens.at[:, T].set(token)
        state = (jnp.int32(1), tokens, token, cache, done)
        step, tokens, *_ = jax.lax.while_loop(unfinished, advance, state)
    return tokens, T + step


def _end_tokens(eos_token_id, config: BTLMConfig) -> tuple[int, ...]:
    """The ids that end a row."""
    from_config = isinstance(eos_token_id, str)
    if from_config and eos_token_id != "config":
        raise ValueError(f"eos_token_id: found {eos_token_id!r}, expected ids, None or 'config'")
    given = config.eos_token_id if from_config else eos_token_id
    ids = () if given is None else tuple(int(t) for t in np.atleast_1d(given))
    unknown = [t for t in ids if not 0 <= t < config.vocab_size]
    if unknown and not from_config:
        raise ValueError(
            f"eos_token_id: found {unknown}, expected ids from 0 to {config.vocab_size - 1}"
        )
    if unknown:
        logger.warning(
            "the configuration's eos_token_id %s is outside its vocabulary of %d: no row will end "
            "early; pass eos_token_id",
            unknown[0],
            config.vocab_size,
        )
        return ()
    return ids


def _check_prompt(ids: np.ndarray, mask: np.ndarray, vocab_size: int) -> None:
    if ids.ndim != 2 or ids.shape[1] == 0 or ids.shape[0] == 0:
        raise ValueError(f"input_ids: found shape {ids.shape}, expected [B, T] with T >= 1 (no "
                         "empty prompt; a lone EOS token can stand for one)")  # fmt: skip
    if not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"input_ids: found dtype {ids.dtype}, expected integers")
    if ids.min() < 0 or ids.max() >= vocab_size:
        raise ValueError(
            f"input_ids: found ids from {ids.min()} to {ids.max()}, expected 0 to "
            f"{vocab_size - 1}; was the prompt encoded with this model's tokenizer?"
        )
    if mask.shape != ids.shape:
        raise ValueError(f"attention_mask: found shape {mask.shape}, expected {ids.shape}")
    if not (mask[:, -1] != 0).all():
        raise ValueError(
            "attention_mask: the last token of a row is padding; pad prompts on the left"
        )
