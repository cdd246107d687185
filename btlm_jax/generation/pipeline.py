"""`pipeline`: text in, text out, as transformers' pipeline("text-generation")."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

from jax.sharding import Mesh
from jax.typing import DTypeLike
from tokenizers import Tokenizer

from btlm_jax.checkpoint import checkpoint, metadata
from btlm_jax.data.tokenizer import check_vocabulary, load_tokenizer
from btlm_jax.generation import continuous_batching, detokenize
from btlm_jax.model.btlm import BTLM
from btlm_jax.model.params import Params

TASK = "text-generation"


@dataclasses.dataclass(frozen=True, eq=False)
class TextGeneration:
    """A model, its weights and its tokenizer. Call it with a prompt, or a list of them."""

    model: BTLM
    params: Params
    tokenizer: Tokenizer

    def __call__(
        self,
        text_inputs: str | Sequence[str],
        *,
        return_full_text: bool = True,
        batch_size: int = 8,
        **arguments: Any,
    ) -> list[Any]:
        """Continues text.

        Args:
          text_inputs: a prompt, or several.
          return_full_text: with the prompt, or the continuation alone.
          batch_size: rows that run at once.
          **arguments: those of `generate_batch`: `max_new_tokens` (default 20), `max_length`,
            `do_sample` (default False), `num_beams`, `stop_strings`, ...

        Returns:
          [{"generated_text": str}, ...], `num_return_sequences` of them; of several prompts, a list
          of such lists.

        Raises:
          ValueError: an empty prompt, an unknown argument or a value out of range.
        """
        several = not isinstance(text_inputs, str)
        given: list[str] = list(text_inputs) if several else [text_inputs]
        if odd := [x for x in given if not isinstance(x, str) or not x]:
            raise ValueError(f"text_inputs: found {odd[0]!r}, expected text that is not empty")
        ids = [self.tokenizer.encode(prompt).ids for prompt in given]
        arguments["tokenizer"] = self.tokenizer
        found = continuous_batching.generate_batch(
            self.model, self.params, ids, batch_size=batch_size, **arguments
        )
        copies = len(found) // max(len(given), 1)
        answers = [
            [
                {
                    "generated_text": prompt * return_full_text
                    + detokenize.detokenize_continuation(
                        self.tokenizer, before, result.tokens.tolist()
                    )
                }
                for result in found[i * copies : (i + 1) * copies]
            ]
            for i, (prompt, before) in enumerate(zip(given, ids, strict=True))
        ]
        return answers if several else answers[0]


def pipeline(
    path: str | os.PathLike[str],
    *,
    task: str = TASK,
    dtype: DTypeLike | None = None,
    mesh: Mesh | None = None,
) -> TextGeneration:
    """Loads a checkpoint that carries a tokenizer, to be called with text.

    `TextGeneration(model, params, tokenizer)` is the same of weights that are in memory already,
    such as those of `btlm.convert.load_hf`.

    Args:
      path: an Orbax checkpoint, from `btlm convert`, training or `save`; Hugging Face directories
        must be converted first.
      task: "text-generation".
      dtype: of weights and computation; default as stored, computing in the platform's.
      mesh: shard the weights over it.

    Raises:
      FileNotFoundError: no checkpoint there, or no tokenizer in it.
      ValueError: another task, a damaged checkpoint, a tokenizer of another model.
    """
    if task != TASK:
        raise ValueError(f"task: found {task!r}, expected {TASK!r}")
    config = metadata.read_metadata(path).config
    tokenizer = load_tokenizer(path)
    check_vocabulary(tokenizer, config.vocab_size)
    model, params = checkpoint.load(path, dtype=dtype, mesh=mesh, unstacked=True)
    if dtype is not None:
        model = dataclasses.replace(model, compute_dtype=dtype)
    return TextGeneration(model, params, tokenizer)
