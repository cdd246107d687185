"""A checkpoint's `generation_config.json`: found with the weights, parsed when text is generated.

A damaged file must not prevent training or conversion, so `btlm.load` keeps its bytes only.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from etils import epath

FILE_NAME = "generation_config.json"


@dataclasses.dataclass(frozen=True)
class GenerationConfigFile:
    """The content of a `generation_config.json`.

    Attributes:
      path: where it was read from, for messages.
      data: its bytes.
    """

    path: str
    data: bytes

    def fields(self) -> dict[str, Any]:
        """Returns the fields of the file.

        Raises:
          ValueError: not a JSON object; the message names the file.
        """
        try:
            fields = json.loads(self.data.decode("utf-8-sig"))
        except ValueError as e:
            raise ValueError(
                f"{self.path}: not valid JSON ({e}); copy it again, or remove it"
            ) from e
        if not isinstance(fields, dict):
            raise ValueError(
                f"{self.path}: found a JSON {type(fields).__name__}, expected an object"
            )
        return fields

    def special_tokens_only(self) -> GenerationConfigFile:
        """Returns the file without anything but its EOS and pad tokens.

        Raises:
          ValueError: as `fields`.
        """
        tokens = {k: v for k, v in self.fields().items() if k in ("eos_token_id", "pad_token_id")}
        return GenerationConfigFile(self.path, json.dumps(tokens).encode())


def read_generation_config(directory: Path | epath.Path) -> GenerationConfigFile | None:
    """Returns the file of a directory, None if there is none.

    Raises:
      OSError: it cannot be read.
    """
    file = epath.Path(directory) / FILE_NAME
    try:
        return GenerationConfigFile(str(file), file.read_bytes())
    except FileNotFoundError:
        return None
