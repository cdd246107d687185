"""The arguments of a call of `generate`, with defaults from the model's `generation_config.json`.

An argument of the call wins over the field of its `generation_config`, which wins over the model's
file, which wins over the defaults of this package, as in transformers. All functions that generate
text come through here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import numpy as np

from btlm_jax.config import BTLMConfig, Positions
from btlm_jax.generation.options import BEAMS_ONLY, SAMPLING_ONLY, GenerationOptions
from btlm_jax.generation.transformers_arguments import (
    REFUSED,
    WITHOUT_EFFECT,
    is_refused,
    known_arguments,
)
from btlm_jax.hf_config_values import as_integer
from btlm_jax.model.btlm import BTLM
from btlm_jax.utils.notices import warn_once

Function = TypeVar("Function", bound=Callable[..., Any])

_LENGTHS = {
    "max_new_tokens": "max_length", "max_length": "max_new_tokens",
    "min_new_tokens": "min_length", "min_length": "min_new_tokens",
}  # fmt: skip
_OPTION_DEFAULTS = {f.name: f.default for f in dataclasses.fields(GenerationOptions)}
_FROM_FILES = {*_OPTION_DEFAULTS, *_LENGTHS, "eos_token_id", "pad_token_id", "stop_strings"}
_INTEGERS = {*_LENGTHS, "top_k", "num_beams", "num_return_sequences", "no_repeat_ngram_size"}
# Fields that describe a file.
_METADATA = ("_from_model_config", "_commit_hash", "transformers_version")
# The caller decides about the form of the result.
_RESULT_FORM = ("return_dict_in_generate", "output_scores", "output_logits")


@dataclasses.dataclass(frozen=True)
class CallArguments:
    """The arguments of a call.

    Attributes:
      arguments: those of `generate`, by name.
      sources: the origin of those that the call does not give, by name.
    """

    arguments: dict[str, Any]
    sources: dict[str, str]

    @contextlib.contextmanager
    def explain_errors(self) -> Iterator[None]:
        """Names the origin of a value in errors about it, if the call does not give it."""
        try:
            yield
        except ValueError as e:
            name = re.search(r"(?:^|: )(\w+): found", str(e))
            source = self.sources.get(name[1]) if name else None
            if source is None:
                raise
            raise ValueError(f"{e} (this value is from {source}; an explicit one wins)") from e


def takes_model_defaults(function: Function) -> Function:
    """Decorates a function of (model, params, input_ids) and arguments of `generate`."""

    @functools.wraps(function)
    def wrapper(model: BTLM, params: Any, input_ids: Any, **given: Any) -> Any:
        call = resolve_arguments(model, given)
        with call.explain_errors():
            return function(model, params, input_ids, **call.arguments)

    return wrapper  # pyrefly: ignore


def with_special_tokens_only(model: BTLM) -> BTLM:
    """Returns the model with no defaults but the special tokens of its `generation_config.json`.

    Raises:
      ValueError: a damaged file.
    """
    file = model.generation_config
    if file is None:
        return model
    return dataclasses.replace(model, generation_config=file.special_tokens_only())


def resolve_arguments(model: BTLM, given: Mapping[str, Any]) -> CallArguments:
    """Returns the arguments of a call with the defaults of the model.

    Args:
      model: its `generation_config` holds the defaults.
      given: the arguments of the call, `generation_config` included. None stands for the default,
        but for `eos_token_id`, where it means no EOS, and for `top_k`, where it means all tokens.

    Raises:
      ValueError: an argument that is not supported, or a damaged file.
    """
    given = known_arguments(given, alibi=model.config.positions is Positions.ALIBI)
    overlay = known_arguments(
        _config_fields(given.pop("generation_config", None)),
        alibi=model.config.positions is Positions.ALIBI,
    )
    explicit = {n: v for n, v in given.items() if v is not None or n in ("eos_token_id", "top_k")}
    inherited, sources, unsupported = {}, {}, []
    if (file := model.generation_config) is not None:
        inherited, unsupported = _file_defaults(file.fields(), model.config)
        sources = dict.fromkeys(inherited, file.path)
    for layer, origin in ((overlay, "generation_config"), (explicit, None)):
        replaced = {*layer, *(_LENGTHS[name] for name in layer if name in _LENGTHS)}
        inherited = {n: v for n, v in inherited.items() if n not in replaced} | layer
        sources = {n: s for n, s in sources.items() if n not in replaced}
        sources |= dict.fromkeys(layer, origin) if origin else {}
    idle = () if inherited.get("do_sample") else SAMPLING_ONLY
    idle += () if _has_beams(inherited.get("num_beams")) else BEAMS_ONLY
    for name in idle:
        if file is not None and sources.get(name) == file.path:
            del inherited[name], sources[name]
    if "top_k" in explicit and inherited["top_k"] is None:
        inherited["top_k"] = 0 if inherited.get("do_sample") else None
    if inherited.get("stop_strings") in ((), []):
        del inherited["stop_strings"]
    if file is not None:
        applied = {n: inherited[n] for n, source in sources.items() if source == file.path}
        _notice(file.path, _changes(applied, model.config), unsupported)
    return CallArguments(inherited, sources)


def _has_beams(num_beams: Any) -> bool:
    return isinstance(num_beams, int) and num_beams > 1


def _config_fields(value: Any) -> dict[str, Any]:
    """Returns the fields that the argument `generation_config` sets."""
    if value is None:
        return {}
    if hasattr(value, "to_diff_dict"):  # transformers' GenerationConfig
        value = value.to_diff_dict()
    if not isinstance(value, Mapping):
        raise ValueError(
            f"generation_config: found {value!r}, expected a dict, or a GenerationConfig of "
            "transformers"
        )
    return {name: x for name, x in value.items() if x is not None and name not in _METADATA}


def _file_defaults(
    fields: Mapping[str, Any], config: BTLMConfig
) -> tuple[dict[str, Any], list[str]]:
    """Returns the arguments that a file sets, and a description of each field without support."""
    defaults: dict[str, Any] = {}
    unsupported = []
    for name, value in fields.items():
        if value is None or name in (*_METADATA, *_RESULT_FORM, *WITHOUT_EFFECT):
            continue
        if name in ("eos_token_id", "pad_token_id"):
            ids = value if isinstance(value, list) else [value]
            usable = [t for t in map(as_integer, ids) if _is_token(t, config.vocab_size)]
            if len(usable) < len(ids) and ids != [-1]:  # -1 stands for none
                unsupported.append(
                    f"{name}={value!r} (expected integers from 0 to {config.vocab_size - 1})"
                )
            if usable:
                defaults[name] = usable if name == "eos_token_id" else usable[0]
        elif name in _FROM_FILES:
            defaults[name] = as_integer(value) if name in _INTEGERS else value
        elif is_refused(name, value) or name not in REFUSED:
            unsupported.append(f"{name}={_shortened(value)}")
    return defaults, unsupported


def _is_token(value: Any, vocab_size: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < vocab_size


def _changes(applied: Mapping[str, Any], config: BTLMConfig) -> list[str]:
    """Returns name=value for the values that are not those of a model without a file."""
    usual = {
        **_OPTION_DEFAULTS,
        "eos_token_id": list(config.eos_token_ids),
        "pad_token_id": config.pad_token_id,
        "min_length": 0,
    }
    return [f"{n}={_shortened(v)}" for n, v in applied.items() if n not in usual or usual[n] != v]


def _notice(path: str, changes: list[str], unsupported: list[str]) -> None:
    parts = [f"sets {', '.join(changes)} (explicit values win)"] if changes else []
    parts += (
        [f"not applied, because not supported: {', '.join(unsupported)}"] if unsupported else []
    )
    if parts:
        warn_once(f"{path}: {'; '.join(parts)}")


def _shortened(value: Any) -> str:
    text = repr(value.tolist() if isinstance(value, np.ndarray) else value)
    return text if len(text) <= 60 else f"{text[:57]}..."
