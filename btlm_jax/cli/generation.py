"""Subcommands that generate text."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg


@dataclasses.dataclass(frozen=True)
class Generate:
    """Continue a prompt. Options mean what they mean in transformers' `generate`."""

    checkpoint: Positional[str]
    """An Orbax checkpoint that carries a tokenizer: a directory, or a gs:// URL."""
    prompt: str
    """The text to continue."""
    max_new_tokens: int | None = None
    """How many tokens to add at most; default 50."""
    max_length: int | None = None
    """The same with the prompt's tokens counted."""
    min_new_tokens: int | None = None
    """No end before this many new tokens."""
    min_length: int | None = None
    """The same with the prompt's tokens counted."""
    sample: Annotated[bool, arg(aliases=["--do-sample"])] = False
    """Draw from the distribution instead of taking the most likely token."""
    temperature: float = 1.0
    """Divides the logits before drawing."""
    top_k: int = 50
    """Draw from the k most likely tokens; 0 for all."""
    top_p: float = 1.0
    """Draw from the most likely tokens that together have this probability."""
    min_p: float | None = None
    """Draw from tokens at least this fraction as likely as the most likely one."""
    typical_p: float = 1.0
    """Draw from the tokens nearest to typical that together have this probability."""
    seed: int = 0
    """Of the draws."""
    num_beams: int = 1
    """Search with this many beams; with --sample, draw them."""
    num_return_sequences: int = 1
    """How many continuations to print: at most --num-beams, or any number with --sample."""
    early_stopping: Literal["true", "false", "never"] = "false"
    """End the search once --num-beams have ended; when a better one is unlikely; or impossible."""
    length_penalty: float = 1.0
    """Ended beams are compared by log-probability / length ** this."""
    repetition_penalty: float = 1.0
    """Above 1, tokens that were there already become less likely."""
    no_repeat_ngram_size: int = 0
    """No n tokens in a row appear twice, prompt included; 0 is off."""
    bad_words: tuple[str, ...] = ()
    """Texts that may not appear, as the tokenizer splits them (mind the leading space)."""
    stop_strings: tuple[str, ...] = ()
    """End once one of these texts appears."""
    eos_token_id: tuple[int, ...] = ()
    """Ids that end the text; default the model's own."""
    forced_eos_token_id: int | None = None
    """The last token where the greatest length is reached."""
    suppress_tokens: tuple[int, ...] = ()
    """Ids that never appear."""
    begin_suppress_tokens: tuple[int, ...] = ()
    """Ids that are not the first new token."""
    logit_bias: dict[int, float] = dataclasses.field(default_factory=dict)
    """Pairs of a token id and a number added to its logit."""
    logprobs: bool = False
    """Print the log-probability of every new token, one a line, on standard error."""
    cache_length: int | None = None
    """Slots of the KV cache; default as many as are needed."""
    dtype: Literal["bfloat16", "float32"] | None = None
    """Of weights and computation; default as stored, computing in the platform's."""

    def run(self) -> None:
        import numpy as np

        import btlm_jax as btlm
        from btlm_jax import manifest
        from btlm_jax.tokenizer import check_vocabulary

        # The tokenizer first: the weights may be large.
        config = manifest.read(self.checkpoint).config
        tokenizer = btlm.load_tokenizer(self.checkpoint)
        check_vocabulary(tokenizer, config.vocab_size)
        ids = tokenizer.encode(self.prompt).ids
        if not ids:
            raise ValueError("--prompt is empty: give at least one character")
        options = self._options(tokenizer)
        model, params = btlm.load(self.checkpoint, dtype=self.dtype, by_layer=True)
        if self.dtype:
            model = dataclasses.replace(model, compute_dtype=self.dtype)
        out = btlm.generate(model, params, np.array([ids]), return_dict_in_generate=True, **options)
        for i, (row, logprobs) in enumerate(zip(out.sequences, out.logprobs, strict=True)):
            new = int((~np.isnan(logprobs)).sum())  # after its end, a row is filled up
            if len(out.sequences) > 1:
                print(f"{'' if i == 0 else chr(10)}[{i + 1}]")
            print(tokenizer.decode(row[: len(ids) + new].tolist()), flush=True)
            if self.logprobs:
                _show(tokenizer, row[len(ids) :][:new], logprobs)

    def _options(self, tokenizer: Any) -> dict[str, Any]:
        """The arguments of `generate`."""
        same = (
            "max_length", "min_new_tokens", "min_length", "temperature", "top_k", "top_p", "min_p",
            "typical_p", "seed", "num_beams", "num_return_sequences", "length_penalty",
            "repetition_penalty", "no_repeat_ngram_size", "forced_eos_token_id", "suppress_tokens",
            "begin_suppress_tokens", "logit_bias", "cache_length",
        )  # fmt: skip
        options: dict[str, Any] = {name: getattr(self, name) for name in same}
        if self.max_new_tokens is not None or self.max_length is None:
            options["max_new_tokens"] = 50 if self.max_new_tokens is None else self.max_new_tokens
        if self.eos_token_id:
            options["eos_token_id"] = self.eos_token_id
        if self.stop_strings:
            options |= {"stop_strings": self.stop_strings, "tokenizer": tokenizer}
        words = [tokenizer.encode(word).ids for word in self.bad_words]
        stopping: dict[str, Any] = {"true": True, "false": False, "never": "never"}
        return options | {
            "do_sample": self.sample,
            "early_stopping": stopping[self.early_stopping],
            "bad_words_ids": words,
        }


def _show(tokenizer: Any, tokens: Any, logprobs: Any) -> None:
    import sys

    for token, value in zip(tokens.tolist(), logprobs.tolist(), strict=False):
        print(f"{value:9.4f} {tokenizer.decode([token])!r}", file=sys.stderr)
