"""Chat templates of Hugging Face tokenizers: messages to the text of a prompt."""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from etils import epath
from jinja2.sandbox import ImmutableSandboxedEnvironment

from btlm_jax.serving.protocol import ApiError
from btlm_jax.utils import json_files


class ChatTemplate:
    """A template, in a sandbox.

    Raises:
      ValueError: the template is not valid.
    """

    def __init__(self, text: str, special_tokens: Mapping[str, str]):
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        names: dict[str, Any] = environment.globals
        names["raise_exception"] = _refuse
        names["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
        environment.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
        try:
            self._template = environment.from_string(text)
        except jinja2.TemplateSyntaxError as e:
            raise ValueError(f"chat template: line {e.lineno}: {e.message}") from None
        self._special_tokens = dict(special_tokens)

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """Returns the text of the prompt that asks for the assistant's answer.

        Raises:
          ApiError: the template refuses the messages.
        """
        try:
            return self._template.render(
                messages=messages, add_generation_prompt=True, **self._special_tokens
            )
        except jinja2.TemplateError as e:
            raise ApiError(
                400, f"messages: the chat template refuses them: {e}", "messages"
            ) from None


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def read_chat_template(directory: epath.Path, file: Any = None) -> ChatTemplate | None:
    """Reads the chat template of a tokenizer.

    Args:
      directory: that of the tokenizer, with `tokenizer_config.json` or `chat_template.jinja`.
      file: a template to use instead.

    Returns:
      The template; None if there is none.

    Raises:
      ValueError: a damaged file, or a template that is not valid.
    """
    config: dict[str, Any] = {}
    config_file = directory / "tokenizer_config.json"
    if config_file.exists():
        config = json_files.parse_object(config_file.read_bytes(), str(config_file))
    text = config.get("chat_template")
    if isinstance(text, list):  # several, by name
        text = {x.get("name"): x.get("template") for x in text}.get("default")
    if (directory / "chat_template.jinja").exists():
        text = (directory / "chat_template.jinja").read_text()
    if file is not None:
        text = epath.Path(file).read_text()
    if not isinstance(text, str):
        return None
    tokens = {}
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        value = config.get(name)
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str):
            tokens[name] = value
    return ChatTemplate(text, tokens)
