"""A checkpoint's `generation_config.json`: found with the weights, parsed when text is generated.

A damaged file must not prevent training or conversion, so `btlm.load` keeps its bytes only.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from etils import epath

from btlm_jax.utils import json_files

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
        return json_files.parse_object(self.data, self.path, "copy it again, or remove it")

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
