"""The command that generates text."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import arg

from btlm_jax.cli.arguments import Checkpoint, Overrides, mesh_from_overrides

# Fields that do not change what is generated, only where and how fast.
_NOT_IN_KEY = (
    "checkpoint", "prompt", "input", "output", "batch_size", "overwrite", "stream", "set"
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Generate:
    """Continue a prompt, or a file of prompts.

    The options are those of transformers' `generate`. With --input, each line {"prompt": TEXT, ...}
    or {"input_ids": [ID, ...], ...} is written to the output with "text" (the continuation),
    "tokens" (their number) and "finish_reason" (eos, stop or length) added; also "token_ids" for
    lines with input_ids, "logprobs" with --logprobs, and an "index" with --num-return-sequences,
    which writes one line per continuation. Each prompt gets the same continuation as alone.
    Finished results are kept in OUTPUT.partial; after an interruption, the same command resumes.
    """

    checkpoint: Checkpoint
    """An Orbax checkpoint that contains a tokenizer: a directory, or a gs:// URL."""
    prompt: str | None = None
    """The text to continue."""
    input: Annotated[Path | None, arg(metavar="FILE.jsonl")] = None
    """Continue the prompts of this file instead, one per line."""
    output: Annotated[Path | None, arg(metavar="FILE.jsonl")] = None
    """With --input: the file to write."""
    batch_size: int | None = None
    """With --input: rows that run together; default 8. With beams, a batch has prompts of equal
    length."""
    overwrite: bool = False
    """With --input: replace the output, and the unfinished results of a run with other options."""
    stream: bool = False
    """Print the text while it is generated; not with beams."""
    set: Overrides = ()
    """Split over devices: mesh.data=N, mesh.fsdp=N, mesh.tensor=N; -1 takes those left."""
    max_new_tokens: int | None = None
    """Maximum number of new tokens; default 50."""
    max_length: int | None = None
    """Maximum number of tokens, prompt included."""
    min_new_tokens: int | None = None
    """Do not end before this many new tokens."""
    min_length: int | None = None
    """Do not end before this many tokens, prompt included."""
    sample: Annotated[bool, arg(aliases=["--do-sample"])] = False
    """Sample from the distribution instead of taking the most likely token."""
    temperature: float = 1.0
    """Divide the logits by this before sampling."""
    top_k: int = 50
    """Sample from the k most likely tokens; 0 for all."""
    top_p: float = 1.0
    """Sample from the most likely tokens that together have this probability."""
    min_p: float | None = None
    """Sample from tokens at least this fraction as likely as the most likely one."""
    typical_p: float = 1.0
    """Sample from the most typical tokens that together have this probability."""
    seed: int = 0
    """Random seed. Each line of --input has its own stream, by its number; --prompt has that of the
    first line."""
    num_beams: int = 1
    """Beam search with this many beams; with --sample, beam sampling."""
    num_return_sequences: int = 1
    """Continuations per prompt: at most --num-beams, or any number with --sample."""
    early_stopping: Literal["true", "false", "never"] = "false"
    """End the search once --num-beams have ended (true), or when a better one is unlikely (false)
    or impossible (never)."""
    length_penalty: float = 1.0
    """Compare finished beams by log-probability / length ** this."""
    repetition_penalty: float = 1.0
    """Above 1, tokens that occurred before become less likely."""
    no_repeat_ngram_size: int = 0
    """No n tokens in a row occur twice, prompt included; 0 is off."""
    bad_words: tuple[str, ...] = ()
    """Texts that must not occur, as the tokenizer splits them (mind the leading space)."""
    stop_strings: tuple[str, ...] = ()
    """End once one of these texts occurs."""
    eos_token_id: tuple[int, ...] = ()
    """Ids that end the text; default the model's."""
    forced_eos_token_id: int | None = None
    """The last token of a text that reaches its maximum length."""
    suppress_tokens: tuple[int, ...] = ()
    """Ids that never occur."""
    begin_suppress_tokens: tuple[int, ...] = ()
    """Ids that are not the first new token."""
    logit_bias: dict[int, float] = dataclasses.field(default_factory=dict)
    """Pairs of a token id and a number added to its logit."""
    logprobs: bool = False
    """Print the log-probability of every new token, one per line, to standard error."""
    cache_dtype: Literal["int8"] | None = None
    """Type of the KV cache: int8 takes half the memory of bfloat16; default the compute dtype."""
    cache_length: int | None = None
    """Slots of the KV cache; default as many as are needed."""
    dtype: Literal["bfloat16", "float32"] | None = None
    """Type of weights and computation; default as stored, with the platform's compute dtype."""

    def run(self) -> None:
        import btlm_jax as btlm
        from btlm_jax.checkpoint import metadata
        from btlm_jax.data.tokenizer import check_vocabulary

        self._check()
        # The tokenizer is checked before the weights are loaded, which may be large.
        meta = metadata.read_metadata(self.checkpoint)
        tokenizer = btlm.load_tokenizer(self.checkpoint)
        check_vocabulary(tokenizer, meta.config.vocab_size)
        if self.input is not None:
            self._continue_file(meta, tokenizer)
        elif self.stream:
            self._stream_prompt(tokenizer)
        else:
            self._continue_prompt(tokenizer)

    def _check(self) -> None:
        """Raises ValueError where arguments exclude or need each other."""
        if (self.prompt is None) == (self.input is None):
            count = "neither" if self.prompt is None else "both"
            raise ValueError(f"--prompt and --input: found {count}, expected one: a text to "
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
            raise ValueError("--stream: found it with --num-beams, expected one of them: the best "
                             "beam is known only at the end")  # fmt: skip
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

    def _encode_prompt(self, tokenizer: Any) -> list[int]:
        ids = tokenizer.encode(self.prompt).ids
        if not ids:
            raise ValueError("--prompt is empty: give at least one character")
        return ids

    def _stream_prompt(self, tokenizer: Any) -> None:
        """Continues --prompt and prints the text while it is generated."""
        import numpy as np

        import btlm_jax as btlm

        ids = self._encode_prompt(tokenizer)
        arguments = self._generate_arguments(tokenizer) | {"tokenizer": tokenizer}
        model, params = self._load()
        pieces = btlm.stream(model, params, np.asarray(ids), **arguments)
        print(tokenizer.decode(ids), end="", flush=True)
        try:
            for piece in pieces:
                print(piece, end="", flush=True)
        finally:
            print(flush=True)

    def _continue_prompt(self, tokenizer: Any) -> None:
        """Continues --prompt."""
        import numpy as np

        import btlm_jax as btlm

        ids = self._encode_prompt(tokenizer)
        arguments = self._generate_arguments(tokenizer) | {"return_dict_in_generate": True}
        model, params = self._load()
        output = btlm.generate(model, params, np.array([ids]), **arguments)
        for i, (row, logprobs) in enumerate(zip(output.sequences, output.logprobs, strict=True)):
            num_new = int((~np.isnan(logprobs)).sum())  # the rest of the row is padding
            if len(output.sequences) > 1:
                print(f"{'' if i == 0 else chr(10)}[{i + 1}]")
            print(tokenizer.decode(row[: len(ids) + num_new].tolist()), flush=True)
            if self.logprobs:
                _print_logprobs(tokenizer, row[len(ids) :][:num_new], logprobs)

    def _continue_file(self, meta: Any, tokenizer: Any) -> None:
        """Continues the prompts of --input."""
        import time

        import btlm_jax as btlm
        from btlm_jax.generation import continuous_batching, jsonl, result_journal
        from btlm_jax.generation.request import make_request
        from btlm_jax.utils.progress import Progress

        assert self.input is not None and self.output is not None
        n = self.num_return_sequences
        names = jsonl.result_field_names(logprobs=self.logprobs, num_return_sequences=n)
        lines = jsonl.read_prompt_lines(self.input, tokenizer, meta.config.vocab_size, names)
        model = btlm.BTLM(meta.config, compute_dtype=self.dtype)
        arguments = self._generate_arguments(tokenizer)
        request = make_request(model, lines.ids, lines.names, **arguments)
        options = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        key = {"input": lines.sha256, "checkpoint": result_journal.checkpoint_fingerprint(meta)}
        key |= {name: value for name, value in options.items() if name not in _NOT_IN_KEY}
        with result_journal.open_journal(self.output, key, overwrite=self.overwrite) as journal:
            _, params = self._load()
            finished, start, num_tokens = frozenset(journal.results), time.monotonic(), 0
            rows = 8 if self.batch_size is None else self.batch_size
            results = continuous_batching.iterate_results(request, params, rows, finished)
            total = len(request.rows)
            with Progress(total, "text", "generating", done=len(finished)) as progress:
                for i, result in results:
                    line, ids = lines.objects[i // n], lines.ids[i // n]
                    journal.add(i, jsonl.result_fields(line, ids, result, tokenizer, self.logprobs))
                    num_tokens += len(result.tokens)
                    rate = num_tokens / (time.monotonic() - start)
                    progress.update(1, f"{rate:.0f} tokens/s")
            jsonl.write_results(self.output, lines, journal.results, n)
        print(f"{self.output}: {total} continuations")

    def _generate_arguments(self, tokenizer: Any) -> dict[str, Any]:
        """Returns the arguments of `generate`."""
        unchanged = (
            "max_length", "min_new_tokens", "min_length", "temperature", "top_k", "top_p", "min_p",
            "typical_p", "seed", "num_beams", "num_return_sequences", "length_penalty",
            "repetition_penalty", "no_repeat_ngram_size", "forced_eos_token_id", "suppress_tokens",
            "begin_suppress_tokens", "logit_bias", "cache_dtype",
        )  # fmt: skip
        arguments: dict[str, Any] = {name: getattr(self, name) for name in unchanged}
        if self.max_new_tokens is not None or self.max_length is None:
            arguments["max_new_tokens"] = 50 if self.max_new_tokens is None else self.max_new_tokens
        # Streams and batches refuse `cache_length`, even None.
        if self.cache_length is not None:
            arguments["cache_length"] = self.cache_length
        if self.eos_token_id:
            arguments["eos_token_id"] = self.eos_token_id
        if self.stop_strings:
            arguments |= {"stop_strings": self.stop_strings, "tokenizer": tokenizer}
        early_stopping: dict[str, Any] = {"true": True, "false": False, "never": "never"}
        return arguments | {
            "do_sample": self.sample,
            "early_stopping": early_stopping[self.early_stopping],
            "bad_words_ids": [tokenizer.encode(word).ids for word in self.bad_words],
        }


def _print_logprobs(tokenizer: Any, tokens: Any, logprobs: Any) -> None:
    import sys

    for token, value in zip(tokens.tolist(), logprobs.tolist(), strict=False):
        print(f"{value:9.4f} {tokenizer.decode([token])!r}", file=sys.stderr)
