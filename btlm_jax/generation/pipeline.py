"""`pipeline`: text in, text out, like transformers' pipeline("text-generation")."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Sequence
from typing import Any

from jax.sharding import Mesh
from jax.typing import DTypeLike
from tokenizers import Tokenizer

from btlm_jax.checkpoint import checkpoint, metadata
from btlm_jax.checkpoint.assets import load_checkpoint_tokenizer
from btlm_jax.data.tokenizer import encode_prompt
from btlm_jax.generation.continuous_batching import generate_batch
from btlm_jax.generation.detokenize import detokenize_continuation
from btlm_jax.model.btlm import BTLM
from btlm_jax.model.params import Params

TASK = "text-generation"


@dataclasses.dataclass(frozen=True, eq=False)
class TextGeneration:
    """A model, its weights and its tokenizer. Call it with a prompt, or a list of prompts."""

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
          return_full_text: return the prompt with its continuation, not the continuation alone.
          batch_size: rows that run together.
          **arguments: those of `generate_batch`: `max_new_tokens` (default 20), `max_length`,
            `do_sample` (default False), `num_beams`, `stop_strings`, ...

        Returns:
          [{"generated_text": str}, ...] with `num_return_sequences` entries; for several prompts, a
          list of such lists.

        Raises:
          ValueError: an empty prompt, an unknown argument or a value out of range.
        """
        is_single = isinstance(text_inputs, str)
        if not is_single and not isinstance(text_inputs, Iterable):
            raise ValueError(f"text_inputs: found {text_inputs!r}, expected text, or texts")
        texts: list[str] = [text_inputs] if is_single else list(text_inputs)
        try:
            ids = [encode_prompt(self.tokenizer, text) for text in texts]
        except ValueError as e:
            raise ValueError(f"text_inputs: {e}") from None
        arguments["tokenizer"] = self.tokenizer
        results = generate_batch(self.model, self.params, ids, batch_size=batch_size, **arguments)
        num_return_sequences = len(results) // max(len(texts), 1)

        def answer(i: int, j: int) -> dict[str, str]:
            tokens = results[i * num_return_sequences + j].tokens.tolist()
            continuation = detokenize_continuation(self.tokenizer, ids[i], tokens)
            return {"generated_text": texts[i] * return_full_text + continuation}

        answers = [[answer(i, j) for j in range(num_return_sequences)] for i in range(len(texts))]
        return answers[0] if is_single else answers


def pipeline(
    path: str | os.PathLike[str],
    *,
    task: str = TASK,
    dtype: DTypeLike | None = None,
    mesh: Mesh | None = None,
) -> TextGeneration:
    """Loads a checkpoint that contains a tokenizer, and returns a callable for text.

    For weights that are already in memory, such as those of `btlm.convert.load_hf`, use
    `TextGeneration(model, params, tokenizer)`.

    Args:
      path: an Orbax checkpoint, from `btlm convert`, training or `save`; Hugging Face directories
        must be converted first.
      task: "text-generation".
      dtype: dtype of the weights and of the computation; by default the weights keep theirs, and
        the platform decides about the computation.
      mesh: mesh to shard the weights over.

    Raises:
      FileNotFoundError: there is no checkpoint, or it has no tokenizer.
      ValueError: another task, a damaged checkpoint, or another model's tokenizer.
    """
    if task != TASK:
        raise ValueError(f"task: found {task!r}, expected {TASK!r}")
    tokenizer = load_checkpoint_tokenizer(metadata.read_metadata(path))
    model, params = checkpoint.load(path, dtype=dtype, mesh=mesh, unstacked=True)
    if dtype is not None:
        model = dataclasses.replace(model, compute_dtype=dtype)
    return TextGeneration(model, params, tokenizer)
