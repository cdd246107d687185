"""`stream`: the tokens of one continuation, or its text, as they are generated."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from jax.typing import ArrayLike

from btlm_jax.generation import prompts
from btlm_jax.generation.detokenize import detokenize_stream
from btlm_jax.generation.engine import Engine
from btlm_jax.generation.request import GenerationRequest, make_request, warn_if_stacked
from btlm_jax.model.btlm import BTLM
from btlm_jax.model.params import Params

_PROMPT_CHUNK = 2048  # tokens of the prompt that are read at a time


def stream(
    model: BTLM,
    params: Params,
    input_ids: ArrayLike,
    *,
    tokenizer: Any = None,
    chunk: int = 1,
    **arguments: Any,
) -> Iterator[Any]:
    """Continues a prompt and yields the new tokens as they are generated.

    The device computes the next tokens while the previous ones are fetched and used. Closing the
    iterator, at any time, ends the work.

    Args:
      model: the model.
      params: its weights, on a device or a mesh.
      input_ids: int [T] or [1, T], the prompt, which is not repeated.
      tokenizer: yield text instead of ids, in pieces of whole characters, without special tokens.
        Together they are the text of all tokens.
      chunk: number of tokens between two fetches; a larger one costs the host less and yields
        tokens in groups.
      **arguments: those of `generate` (`help(btlm.generate)`) except `attention_mask`,
        `cache_length`, `prompt_cache` and those about the form of the result.

    Returns:
      An iterator over int ids, the same as `generate`'s, including the EOS; or over str.

    Raises:
      ValueError: as `generate`, before the first token; beams, whose result is only known at the
        end; several rows.
    """
    ids = prompts.as_id_array(input_ids)
    if ids.ndim == 2 and len(ids) == 1:
        ids = ids[0]
    if ids.ndim != 1:
        raise ValueError(
            f"input_ids: found shape {ids.shape}, expected one prompt, [T] or [1, T]: "
            "generate_batch continues several"
        )
    if chunk < 1:
        raise ValueError(f"chunk: found {chunk}, expected >= 1")
    request = make_request(model, [ids], tokenizer=tokenizer, **arguments)
    options = request.options
    if options.num_beams > 1:
        raise ValueError(
            f"num_beams: found {options.num_beams}, expected 1: the best beam is "
            "known only at the end; use generate, or no beams"
        )
    if options.num_return_sequences > 1:
        raise ValueError(
            f"num_return_sequences: found {options.num_return_sequences}, expected 1: a stream "
            "has one row; use generate"
        )
    warn_if_stacked(params)
    engine = Engine(
        request.spec.model,
        params,
        rows=1,
        max_length=request.rows[0].max_length,
        # Chunks would read an int8 cache of earlier ones.
        chunk=_PROMPT_CHUNK if request.cache_dtype is None else request.rows[0].max_length,
        steps=chunk,
        cache_dtype=request.cache_dtype,
        prefix_cache_bytes=0,
        logits_processor=request.spec.processors,
        stop_table=request.stop_table,
    )
    groups = _token_groups(engine, request)
    if tokenizer is not None:
        return detokenize_stream(tokenizer, ids.tolist(), groups)
    return (token for group in groups for token in group)


def _token_groups(engine: Engine, request: GenerationRequest) -> Iterator[list[int]]:
    """Yields the tokens of a request as they are fetched."""
    handle, position = engine.submit_request(request), 0
    while not handle.finished:
        engine.step()
        if len(handle.tokens) > position:
            yield handle.tokens[position:]
            position = len(handle.tokens)
    handle.result()
