"""The command that generates text."""

from __future__ import annotations

import dataclasses
import logging
from typing import Annotated, Any, Literal

from tyro.conf import FlagCreatePairsOff, arg

from btlm_jax.cli.arguments import Overrides, mesh_from_overrides
from btlm_jax.cli.option_flags import given_options, with_option_flags
from btlm_jax.cli.path_arguments import Checkpoint, InputFile, OutputFile

logger = logging.getLogger(__name__)

# Fields that do not change what is generated, only where and how fast.
_NOT_IN_KEY = (
    "checkpoint", "prompt", "input", "output", "batch_size", "overwrite", "stream", "set"
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
@with_option_flags
class Generate:
    """Continue a prompt, or a file of prompts.

    The options are those of transformers' `generate`. One that is not given has the value in the
    checkpoint's generation_config.json, if there is one.

    With --input, each line {"prompt": TEXT, ...} or {"input_ids": [ID, ...], ...} is written to the
    output with "text" (the continuation), "tokens" (their number) and "finish_reason" (eos, stop or
    length) added; also "token_ids" for lines with input_ids, "logprobs" with --logprobs, and an
    "index" with --num-return-sequences, which writes one line per continuation. Each prompt gets
    the same continuation as alone. Finished results are kept in OUTPUT.partial; after an
    interruption, the same command resumes.
    """

    OTHER_NAMES = (("do_sample", "sample"), ("bad_words_ids", "bad_words"))
    # A line of --input, and the record of an interrupted run, have fields of these names.
    NOT_ARGUMENTS = ("prompt", "logprobs", "input")

    checkpoint: Checkpoint
    """An Orbax checkpoint that contains a tokenizer: a directory, or a gs:// URL."""
    prompt: str | None = None
    """The text to continue."""
    input: Annotated[InputFile, arg(metavar="FILE.jsonl")] = None
    """Continue the prompts of this file instead, one per line."""
    output: Annotated[OutputFile, arg(metavar="FILE.jsonl")] = None
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
    model_defaults: bool = True
    """Take options that are not given from the checkpoint's generation_config.json."""
    max_new_tokens: int | None = None
    """Maximum number of new tokens; default 50."""
    max_length: int | None = None
    """Maximum number of tokens, prompt included."""
    min_new_tokens: int | None = None
    """Do not end before this many new tokens."""
    min_length: int | None = None
    """Do not end before this many tokens, prompt included."""
    sample: Annotated[FlagCreatePairsOff[bool], arg(aliases=["--do-sample"])] = False
    """Sample from the distribution instead of taking the most likely token."""
    greedy: FlagCreatePairsOff[bool] = False
    """Take the most likely token, even if the checkpoint's generation_config.json samples."""
    seed: int | None = None
    """Random seed. Each line of --input has its own stream, by its number; --prompt has that of the
    first line."""
    bad_words: tuple[str, ...] = ()
    """Texts that must not occur, as the tokenizer splits them: " word" and "word" differ, and the
    first is the form after a space."""
    stop_strings: tuple[str, ...] = ()
    """End once one of these texts occurs."""
    eos_token_id: tuple[int, ...] = ()
    """Ids that end the text; default the model's."""
    logprobs: bool = False
    """Print the log-probability of every new token, one per line, to standard error."""
    cache_dtype: Literal["int8"] | None = None
    """Type of the KV cache: int8 takes half the memory of bfloat16; default the compute dtype."""
    cache_length: int | None = None
    """Slots of the KV cache; default as many as are needed."""
    dtype: Literal["bfloat16", "float32"] | None = None
    """Type of weights and computation; default as stored, with the platform's compute dtype."""

    def run(self) -> None:
        from btlm_jax.checkpoint import metadata
        from btlm_jax.checkpoint.assets import load_checkpoint_tokenizer
        from btlm_jax.data.tokenizer import tokenizer_directory
        from btlm_jax.hf_generation_config import read_generation_config

        self._check()
        # All that is small is checked before the weights are loaded.
        meta = metadata.read_metadata(self.checkpoint)
        tokenizer = load_checkpoint_tokenizer(meta)
        defaults = None
        if self.model_defaults:
            defaults = read_generation_config(tokenizer_directory(meta.path))
        arguments = self._generate_arguments(tokenizer, defaults)
        if self.input is not None:
            self._continue_file(meta, tokenizer, arguments, defaults)
        elif self.stream:
            self._stream_prompt(tokenizer, arguments)
        else:
            self._continue_prompt(tokenizer, arguments)

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
        if self.sample and self.greedy:
            raise ValueError("--sample: found it with --greedy, expected one of them")
        if self.stream and given_options(self).get("num_beams", 1) > 1:
            raise ValueError("--stream: found it with --num-beams, expected one of them: the best "
                             "beam is known only at the end")  # fmt: skip
        if self.stream and self.logprobs:
            raise ValueError("--stream: found it with --logprobs, expected one of them")

    def _load(self) -> tuple[Any, Any]:
        import btlm_jax as btlm

        model, params = btlm.load(
            self.checkpoint, dtype=self.dtype, mesh=mesh_from_overrides(self.set), unstacked=True
        )
        if not self.model_defaults:
            model = dataclasses.replace(model, generation_config=None)
        if self.dtype:
            model = dataclasses.replace(model, compute_dtype=self.dtype)
        return model, params

    def _encode_prompt(self, tokenizer: Any) -> list[int]:
        from btlm_jax.data.tokenizer import encode_prompt

        assert self.prompt is not None
        try:
            return encode_prompt(tokenizer, self.prompt)
        except ValueError as e:
            raise ValueError(f"--prompt: {e}") from None

    def _stream_prompt(self, tokenizer: Any, arguments: dict[str, Any]) -> None:
        """Continues --prompt and prints the text while it is generated."""
        import numpy as np

        import btlm_jax as btlm

        ids = self._encode_prompt(tokenizer)
        model, params = self._load()
        pieces = btlm.stream(model, params, np.asarray(ids), **arguments)
        print(tokenizer.decode(ids), end="", flush=True)
        try:
            for piece in pieces:
                print(piece, end="", flush=True)
        finally:
            print(flush=True)

    def _continue_prompt(self, tokenizer: Any, arguments: dict[str, Any]) -> None:
        """Continues --prompt."""
        import numpy as np

        import btlm_jax as btlm

        ids = self._encode_prompt(tokenizer)
        model, params = self._load()
        output = btlm.generate(
            model, params, np.array([ids]), return_dict_in_generate=True, **arguments
        )
        for i, (row, logprobs) in enumerate(zip(output.sequences, output.logprobs, strict=True)):
            num_new = int((~np.isnan(logprobs)).sum())  # the rest of the row is padding
            if len(output.sequences) > 1:
                print(f"{'' if i == 0 else chr(10)}[{i + 1}]")
            print(tokenizer.decode(row[: len(ids) + num_new].tolist()), flush=True)
            if self.logprobs:
                _print_logprobs(tokenizer, row[len(ids) :][:num_new], logprobs)

    def _continue_file(
        self, meta: Any, tokenizer: Any, arguments: dict[str, Any], defaults: Any
    ) -> None:
        """Continues the prompts of --input."""
        import time

        import btlm_jax as btlm
        from btlm_jax.generation import continuous_batching, jsonl, result_journal
        from btlm_jax.generation.call_arguments import resolve_arguments
        from btlm_jax.generation.request import make_request
        from btlm_jax.utils.progress import Progress

        assert self.input is not None and self.output is not None
        model = btlm.BTLM(meta.config, compute_dtype=self.dtype, generation_config=defaults)
        n = resolve_arguments(model, arguments).arguments.get("num_return_sequences", 1)
        names = jsonl.result_field_names(logprobs=self.logprobs, num_return_sequences=n)
        lines = jsonl.read_prompt_lines(self.input, tokenizer, meta.config.vocab_size, names)
        request = make_request(model, lines.ids, lines.names, **arguments)
        options = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        key = {"input": lines.sha256, "checkpoint": result_journal.checkpoint_fingerprint(meta)}
        key |= {name: value for name, value in options.items() if name not in _NOT_IN_KEY}
        with result_journal.open_journal(self.output, key, overwrite=self.overwrite) as journal:
            _, params = self._load()
            finished, start, num_tokens = frozenset(journal.results), time.monotonic(), 0
            rows = 8 if self.batch_size is None else self.batch_size
            results = continuous_batching.iterate_results(request, params, rows, finished)
            total = request.num_results
            with Progress(total, "text", "generating", done=len(finished)) as progress:
                for i, result in results:
                    line, ids = lines.objects[i // n], lines.ids[i // n]
                    journal.add(i, jsonl.result_fields(line, ids, result, tokenizer, self.logprobs))
                    num_tokens += len(result.tokens)
                    rate = num_tokens / (time.monotonic() - start)
                    progress.update(1, f"{rate:.0f} tokens/s")
            jsonl.write_results(self.output, lines, journal.results, n)
        print(f"{self.output}: {total} continuations")

    def _generate_arguments(self, tokenizer: Any, defaults: Any) -> dict[str, Any]:
        """Returns the arguments of `generate` that are given.

        Args:
          tokenizer: the tokenizer.
          defaults: the checkpoint's `GenerationConfigFile`, or None.
        """
        names = (
            "max_new_tokens", "max_length", "min_new_tokens", "min_length", "seed", "stop_strings",
            "eos_token_id", "cache_dtype", "cache_length",
        )  # fmt: skip
        values = {name: getattr(self, name) for name in names}
        arguments = {name: x for name, x in values.items() if x is not None and x != ()}
        arguments |= given_options(self)
        if self.sample or self.greedy:
            arguments["do_sample"] = self.sample
        fields = {} if defaults is None else defaults.fields()
        named = {name for name, x in fields.items() if x is not None} | arguments.keys()
        if not {"max_new_tokens", "max_length"} & named:
            arguments["max_new_tokens"] = 50
        if self.bad_words:
            arguments["bad_words_ids"] = [_encode_bad_word(tokenizer, x) for x in self.bad_words]
        if self.seed is not None and not (self.sample or fields.get("do_sample")):
            logger.warning("--seed %d does nothing without --sample", self.seed)
        return arguments | {"tokenizer": tokenizer}


def _encode_bad_word(tokenizer: Any, word: str) -> list[int]:
    from btlm_jax.data.tokenizer import encode_fragment

    try:
        return encode_fragment(tokenizer, word)
    except ValueError as e:
        raise ValueError(f"--bad-words: {e}") from None


def _print_logprobs(tokenizer: Any, tokens: Any, logprobs: Any) -> None:
    import sys

    for token, value in zip(tokens.tolist(), logprobs.tolist(), strict=False):
        print(f"{value:9.4f} {tokenizer.decode([token])!r}", file=sys.stderr)
