"""Flags of a command for the options of `generate`, made from `GenerationOptions`."""

from __future__ import annotations

import dataclasses
import inspect
import re
import typing
from typing import Annotated, Any, Literal, TypeVar

from tyro.conf import FlagCreatePairsOff, arg

from btlm_jax.cli.flag_messages import with_options
from btlm_jax.generation.options import GenerationOptions

Command = TypeVar("Command", bound=type)

# Options that a command offers in another form, or not at all.
_OTHER_FORM = ("do_sample", "bad_words_ids", "sequence_bias")
# Types on the command line, where they differ from those of the option.
_TYPES: dict[str, Any] = {
    "early_stopping": Literal["true", "false", "never"],
    "logit_bias": dict[int, float],
    "forced_eos_token_id": tuple[int, ...],
    "suppress_tokens": tuple[int, ...],
    "begin_suppress_tokens": tuple[int, ...],
    "exponential_decay_length_penalty": tuple[int, float],
}
_SWITCHES: dict[str, Any] = {"true": True, "false": False, "never": "never"}


def with_option_flags(command: Command) -> Command:
    """Decorates the class of a command before it becomes a dataclass; adds a field per option.

    Their help is that of the option.
    """
    types, docs = typing.get_type_hints(GenerationOptions), _option_docs()
    flags = {name: name for name in flag_names()} | {"do_sample": "sample"}
    for name in flag_names():
        kind = _TYPES.get(name, types[name])
        value: Any = None
        if kind is bool:
            kind, value = FlagCreatePairsOff[bool], False
        elif typing.get_origin(kind) is dict:
            value = dataclasses.field(default_factory=dict)
        elif Ellipsis in typing.get_args(kind):
            value = ()
        else:
            kind = kind | None
        command.__annotations__[name] = Annotated[kind, arg(help=with_options(docs[name], flags))]
        setattr(command, name, value)
    return command


def flag_names() -> list[str]:
    """Returns the names of the options that are flags."""
    return [f.name for f in dataclasses.fields(GenerationOptions) if f.name not in _OTHER_FORM]


def given_options(command: Any) -> dict[str, Any]:
    """Returns the options that the flags of a command give."""
    values = {name: getattr(command, name) for name in flag_names()}
    given = {name: x for name, x in values.items() if x is not None and x is not False}
    given = {name: x for name, x in given.items() if x not in ((), {})}
    if "early_stopping" in given:
        given["early_stopping"] = _SWITCHES[given["early_stopping"]]
    return given


def _option_docs() -> dict[str, str]:
    """Returns the description of every option, from the docstring of `GenerationOptions`."""
    text = inspect.cleandoc(GenerationOptions.__doc__ or "")
    attributes = text.partition("Attributes:\n")[2].partition("\n\nRaises:")[0]
    docs = {}
    for entry in re.split(r"\n  (?=\w)", "\n" + attributes)[1:]:
        names, _, description = entry.strip().partition(": ")
        description = " ".join(description.split()).replace("`", "")
        for name in names.split(", "):
            docs[name] = description[:1].upper() + description[1:]
    return docs
