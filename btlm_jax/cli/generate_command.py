"""Subcommands that generate text."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import arg

from btlm_jax.cli.arguments import Checkpoint, Overrides, mesh_from_overrides

# Fields that say where and how fast, not what is generated.
_AROUND = (
    "checkpoint", "prompt", "input", "output", "batch_size", "overwrite", "stream", "set"
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Generate:
    """Continue a prompt, or a file of them. Options are those of transformers' `generate`.

    Of a file, every line {"prompt": TEXT, ...} or {"input_ids": [ID, ...], ...} comes out with
    "text" (the continuation), "tokens" (how many), "finish_reason" (eos, stop or length),
    "token_ids" where ids came in, and "logprobs" if asked for; with --num-return-sequences, as so
    many lines with an "index". Each is what its prompt would give alone. Results are kept in
    OUTPUT.partial while others are still to come; killed, the same command goes on.
    """

    checkpoint: Checkpoint
    """An Orbax checkpoint that carries a tokenizer: a directory, or a gs:// URL."""
    prompt: str | None = None
    """The text to continue."""
    input: Annotated[Path | None, arg(metavar="FILE.jsonl")] = None
    """Instead: prompts to continue, a line each."""
    output: Annotated[Path | None, arg(metavar="FILE.jsonl")] = None
    """With --input: the file to write."""
    batch_size: int | None = None
    """With --input: how many rows run at once; default 8. With beams, of prompts of one length."""
    overwrite: bool = False
    """With --input: replace the output, and what a run with other options left unfinished."""
    stream: bool = False
    """Print the text while it is generated; not with beams."""
    set: Overrides = ()
    """Split over devices: mesh.data=N, mesh.fsdp=N, mesh.tensor=N; -1 takes those left."""
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
    """Of the draws. Each line of --input takes a stream of its own, by its number; the first, that
    of --prompt."""
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
    cache_dtype: Literal["int8"] | None = None
    """Of the KV cache: int8 takes half of bfloat16; default the compute dtype."""
    cache_length: int | None = None
    """Slots of the KV cache; default as many as are needed."""
    dtype: Literal["bfloat16", "float32"] | None = None
    """Of weights and computation; default as stored, computing in the platform's."""

    def run(self) -> None:
        import btlm_jax as btlm
        from btlm_jax.checkpoint import metadata
        from btlm_jax.data.tokenizer import check_vocabulary

        self._check()
        # The tokenizer first: the weights may be large.
        meta = metadata.read_metadata(self.checkpoint)
        tokenizer = btlm.load_tokenizer(self.checkpoint)
        check_vocabulary(tokenizer, meta.config.vocab_size)
        if self.input is not None:
            self._file(meta, tokenizer)
        else:
            self._text(tokenizer)

    def _check(self) -> None:
        """Raises ValueError where arguments exclude or need each other."""
        if (self.prompt is None) == (self.input is None):
            found = "neither" if self.prompt is None else "both"
            raise ValueError(f"--prompt and --input: found {found}, expected one: a text to "
                             "continue, or a file of JSON lines (with --output)")  # fmt: skip
        if self.input is None:
            for name in ("output", "batch_size", "overwrite"):
                if getattr(self, name) not in (None, False):
                    flag = name.replace("_", "-")
                    raise ValueError(f"--{flag}: it needs --input, a file of prompts")
        elif self.output is None:
            raise ValueError("--input: found no --output, expected a file to write")
        elif self.stream:
            raise ValueError("--stream: found it with --input, expected it with --prompt only")
        if self.stream and self.num_beams > 1:
            raise ValueError("--stream: found it with --num-beams, expected one of them: which "
                             "beam is the best is known at the end only")  # fmt: skip
        if self.stream and self.logprobs:
            raise ValueError("--stream: found it with --logprobs, expected one of them")

    def _load(self) -> tuple[Any, Any]:
        import btlm_jax as btlm

        model, params = btlm.load(
            self.checkpoint, dtype=self.dtype, mesh=mesh_from_overrides(self.set), unstacked=True
        )
        if self.dtype:
            model = dataclasses.replace(model, compute_dtype=self.dtype)
        return model, params

    def _text(self, tokenizer: Any) -> None:
        """Continues --prompt."""
        import numpy as np

        import btlm_jax as btlm

        ids = tokenizer.encode(self.prompt).ids
        if not ids:
            raise ValueError("--prompt is empty: give at least one character")
        options = self._options(tokenizer)
        if self.stream:
            model, params = self._load()
            pieces = btlm.stream(model, params, ids, **options | {"tokenizer": tokenizer})
            print(tokenizer.decode(ids), end="", flush=True)
            try:
                for piece in pieces:
                    print(piece, end="", flush=True)
            finally:
                print(flush=True)
            return
        model, params = self._load()
        out = btlm.generate(model, params, np.array([ids]), return_dict_in_generate=True, **options)
        for i, (row, logprobs) in enumerate(zip(out.sequences, out.logprobs, strict=True)):
            new = int((~np.isnan(logprobs)).sum())  # after its end, a row is filled up
            if len(out.sequences) > 1:
                print(f"{'' if i == 0 else chr(10)}[{i + 1}]")
            print(tokenizer.decode(row[: len(ids) + new].tolist()), flush=True)
            if self.logprobs:
                _show(tokenizer, row[len(ids) :][:new], logprobs)

    def _file(self, meta: Any, tokenizer: Any) -> None:
        """Continues the prompts of --input."""
        import time

        import btlm_jax as btlm
        from btlm_jax.generation import continuous_batching, jsonl, result_journal
        from btlm_jax.generation.request import make_request
        from btlm_jax.utils.progress import Progress

        assert self.input is not None and self.output is not None
        copies = self.num_return_sequences
        added = jsonl.result_field_names(logprobs=self.logprobs, num_return_sequences=copies)
        lines = jsonl.read_prompt_lines(self.input, tokenizer, meta.config.vocab_size, added)
        model = btlm.BTLM(meta.config, compute_dtype=self.dtype)
        asked = make_request(model, lines.ids, lines.names, **self._options(tokenizer))
        same = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        key = {"input": lines.sha256, "checkpoint": result_journal.checkpoint_fingerprint(meta)}
        key |= {name: value for name, value in same.items() if name not in _AROUND}
        with result_journal.open_journal(self.output, key, overwrite=self.overwrite) as journal:
            _, params = self._load()
            known, start, tokens = frozenset(journal.results), time.monotonic(), 0
            size = 8 if self.batch_size is None else self.batch_size
            found = continuous_batching.iterate_results(asked, params, size, known)
            total = len(asked.rows)
            with Progress(total, "text", "generating", done=len(known)) as progress:
                for i, result in found:
                    line, ids = lines.objects[i // copies], lines.ids[i // copies]
                    journal.add(i, jsonl.result_fields(line, ids, result, tokenizer, self.logprobs))
                    tokens += len(result.tokens)
                    rate = tokens / (time.monotonic() - start)
                    progress.update(1, f"{rate:.0f} tokens/s")
            jsonl.write_results(self.output, lines, journal.results, copies)
        print(f"{self.output}: {total} continuations")

    def _options(self, tokenizer: Any) -> dict[str, Any]:
        """The arguments of `generate`."""
        same = (
            "max_length", "min_new_tokens", "min_length", "temperature", "top_k", "top_p", "min_p",
            "typical_p", "seed", "num_beams", "num_return_sequences", "length_penalty",
            "repetition_penalty", "no_repeat_ngram_size", "forced_eos_token_id", "suppress_tokens",
            "begin_suppress_tokens", "logit_bias",
        )  # fmt: skip
        options: dict[str, Any] = {name: getattr(self, name) for name in same}
        if self.max_new_tokens is not None or self.max_length is None:
            options["max_new_tokens"] = 50 if self.max_new_tokens is None else self.max_new_tokens
        if self.cache_dtype is not None:
            options["cache_dtype"] = self.cache_dtype
        if self.cache_length is not None:
            options["cache_length"] = self.cache_length
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
