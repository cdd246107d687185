"""Arguments of transformers' `generate` that this package does not have.

Those that change no token are accepted with a notice, the others are refused with the name of what
to use instead. Values that turn a feature off are accepted without a word.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from btlm_jax.utils.notices import warn_once

_SPECULATION = "there is no speculative decoding, which changes the speed only"
_COMPILATION = "decoding is always compiled"
_CACHE = "the KV cache grows as needed; see cache_length and cache_dtype"
# Name -> why it has no effect.
WITHOUT_EFFECT = {
    "use_cache": "decoding always uses a KV cache",
    "cache_implementation": _CACHE,
    "cache_config": _CACHE,
    "max_cache_len": _CACHE,
    "low_memory": _CACHE,
    "prefill_chunk_size": _CACHE,
    "synced_gpus": "all devices of a mesh run one program",
    "compile_config": _COMPILATION,
    "disable_compile": _COMPILATION,
    "bos_token_id": "a prompt begins with the tokens that are given",
    "decoder_start_token_id": "a prompt begins with the tokens that are given",
    "return_dict": "see return_dict_in_generate",
    "trust_remote_code": "no code of a checkpoint is run",
    "continuous_batching_config": "generate_batch batches continuously, see its batch_size",
    "assistant_model": _SPECULATION,
    "prompt_lookup_num_tokens": _SPECULATION,
    "max_matching_ngram_size": _SPECULATION,
    "num_assistant_tokens": _SPECULATION,
    "num_assistant_tokens_schedule": _SPECULATION,
    "assistant_confidence_threshold": _SPECULATION,
    "assistant_early_exit": _SPECULATION,
    "assistant_lookbehind": _SPECULATION,
    "target_lookbehind": _SPECULATION,
    "speculation_type": _SPECULATION,
    "is_assistant": _SPECULATION,
    "use_mtp": _SPECULATION,
}
_CONSTRAINTS = "forced words are not supported; logits_processor can restrict the tokens"
_ENCODER = "there is no encoder: leave it out"
_GUIDANCE = "guidance is not supported: leave it out"
_GROUPS = "diverse beam groups are not supported: leave it out, or sample"
_INTERMEDIATES = "BTLM.intermediates returns them: leave it out"
# Name -> what to do instead.
REFUSED = {
    "inputs": "pass the token ids as input_ids",
    "inputs_embeds": "pass token ids as input_ids",
    "token_type_ids": "their embeddings would be added to those of the tokens, even for 0: leave "
    "it out (BTLM.apply takes them)",
    "past_key_values": "pass prompt_cache=btlm.PromptCache.of(model, params, ids)",
    "streamer": "use btlm.stream",
    "stopping_criteria": "use stop_strings, eos_token_id or max_new_tokens",
    "prefix_allowed_tokens_fn": "use logits_processor",
    "logits_warper": "use logits_processor",
    "max_time": "use max_new_tokens, or close the iterator of btlm.stream",
    "custom_generate": "call the function itself",
    "output_attentions": _INTERMEDIATES,
    "output_hidden_states": _INTERMEDIATES,
    "negative_prompt_ids": _GUIDANCE,
    "negative_prompt_attention_mask": _GUIDANCE,
    "guidance_scale": _GUIDANCE,
    "watermarking_config": "watermarks are not supported: leave it out",
    "token_healing": "it is not supported: shorten the prompt by its last token",
    "top_h": "it is not supported: use top_p, min_p or typical_p",
    "penalty_alpha": "contrastive search is not supported: use repetition_penalty",
    "dola_layers": "it is not supported: leave it out",
    "num_beam_groups": _GROUPS,
    "diversity_penalty": _GROUPS,
    "constraints": _CONSTRAINTS,
    "force_words_ids": _CONSTRAINTS,
    "encoder_repetition_penalty": _ENCODER,
    "encoder_no_repeat_ngram_size": _ENCODER,
    "assistant_ensemble_weight": "there is no speculative decoding: leave it out",
}
# Values, besides None, False and empty lists, that leave a feature off or are always the case.
_OFF = {
    "guidance_scale": 1,
    "num_beam_groups": 1,
    "encoder_repetition_penalty": 1,
    "encoder_no_repeat_ngram_size": 0,
    "diversity_penalty": 0,
    "penalty_alpha": 0,
    "num_assistant_tokens": 20,
    "num_assistant_tokens_schedule": "constant",
    "assistant_confidence_threshold": 0.4,
    "assistant_lookbehind": 10,
    "target_lookbehind": 10,
}


def is_refused(name: str, value: Any) -> bool:
    """Returns whether `known_arguments` refuses a value."""
    return name in REFUSED and not _is_off(name, value)


def known_arguments(arguments: Mapping[str, Any], *, alibi: bool) -> dict[str, Any]:
    """Returns the arguments without those that only transformers has; notices name what is dropped.

    Args:
      arguments: those of `generate` and others.
      alibi: whether positions enter through ALiBi, which makes `position_ids` harmless.

    Raises:
      ValueError: an argument that would change the result and is not supported.
    """
    kept = {}
    for name, value in arguments.items():
        if is_refused(name, value):
            raise ValueError(f"{name}: not supported by generate: {REFUSED[name]}")
        if name == "position_ids" and value is not None:
            if not alibi:
                raise ValueError(
                    "position_ids: not supported by generate: positions follow from "
                    "attention_mask: leave it out"
                )
            warn_once("position_ids has no effect: ALiBi depends on distances only")
        elif name in WITHOUT_EFFECT and not _is_off(name, value):
            warn_once(f"{name} has no effect: {WITHOUT_EFFECT[name]}")
        elif name not in ("position_ids", *WITHOUT_EFFECT, *REFUSED):
            kept[name] = value
    return kept


def _is_off(name: str, value: Any) -> bool:
    if name == "use_cache":
        return value is not False
    if value is None or value is False or (isinstance(value, list | tuple) and not value):
        return True
    return name in _OFF and isinstance(value, bool | int | float | str) and value == _OFF[name]
