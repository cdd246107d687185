"""Values of a `config.json` as transformers and other tools write them, in one normal form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# transformers accepts the names on the right for those on the left (`attribute_map` of GPT-2).
ALIASES = {
    "n_embd": "hidden_size",
    "n_positions": "max_position_embeddings",
    "n_head": "num_attention_heads",
    "n_layer": "num_hidden_layers",
}
_INTEGERS = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner")
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_SWITCHES = ("scale_attn_weights", "tie_word_embeddings", "mup_scale_qk_dot_by_d")
# The same functions under other names of transformers; all of the first three are the tanh formula.
_ACTIVATIONS = {
    "gelu_pytorch_tanh": "gelu_new",
    "gelu_fast": "gelu_new",
    "gelu_accurate": "gelu_new",
    "gelu_python": "gelu",
}


def language_model_config(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns the configuration of the language model: `text_config` if it is nested there."""
    nested = raw.get("text_config")
    if isinstance(nested, Mapping) and not {"n_embd", ALIASES["n_embd"]} & set(raw):
        return nested
    return raw


def normalize_values(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a `config.json` in the form in which the rest of this package reads it.

    A null means the same as an absent key. Sizes and token ids may be written as 64.0, switches as
    "true", the id of a token that does not exist as -1, and several EOS ids as a list. Values that
    no tool writes are left as they are, for the checks of `BTLMConfig` to name.

    Raises:
      ValueError: a field and its other name have different values.
    """
    # A token id is the exception: null means that there is none, and an absent one has a default.
    values = {
        k: v for k, v in language_model_config(raw).items() if v is not None or k in _TOKEN_IDS
    }
    for name, alias in ALIASES.items():
        if alias in values and values.setdefault(name, values[alias]) != values[alias]:
            raise ValueError(
                f"config.json has {name} = {values[name]!r} and {alias} = {values[alias]!r}, which "
                "mean the same: remove one of them"
            )
    for name in _INTEGERS:
        if name in values:
            values[name] = as_integer(values[name])
    for name in _TOKEN_IDS:
        if name in values:
            values[name] = _token_ids(values[name])
    for name in _SWITCHES:
        if str(values.get(name)).lower() in ("true", "false"):
            values[name] = str(values[name]).lower() == "true"
    activation = values.get("activation_function")
    if isinstance(activation, str):
        values["activation_function"] = _ACTIVATIONS.get(activation, activation)
    return values


def as_integer(value: Any) -> Any:
    """Returns 64 for 64.0, as some tools write integers, and any other value unchanged."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _token_ids(value: Any) -> Any:
    """Returns an id, a tuple of several ids, or None if there is none."""
    if not isinstance(value, list | tuple):
        value = as_integer(value)
        return None if value == -1 and not isinstance(value, bool) else value
    ids = tuple(dict.fromkeys(as_integer(x) for x in value if x is not None and x != -1))
    return ids if len(ids) > 1 else ids[0] if ids else None
