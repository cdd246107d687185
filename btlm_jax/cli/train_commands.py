"""Commands that train: quickstart, tokenize, train."""

from __future__ import annotations

import dataclasses
import logging
import shlex
import sys
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from btlm_jax.cli.arguments import Number, Overrides
from btlm_jax.cli.path_arguments import (
    NEW_DIRECTORY,
    Directory,
    LocalNames,
    OptionalName,
    PathRule,
    RecipeName,
    RunDirectory,
)

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Quickstart:
    """Run every step end to end on real text.

    The quickstart trains a tokenizer and a small BTLM on Python's language reference, saves,
    exports and converts back, and generates. With --hf, it converts that checkpoint and generates.
    """

    directory: Directory = Path("btlm-quickstart")
    """Directory for everything that is written; must not exist."""
    hf: OptionalName = None
    """A Hugging Face directory or Hub id to convert and generate from instead of training."""
    steps: Number = None
    """Training steps; by default those of the recipe."""
    seed: int = 0
    """Seed of the initial weights and the order of the data."""

    def run(self) -> None:
        from btlm_jax.train.demo import quickstart

        if self.hf is not None:
            for name, default in (("steps", None), ("seed", 0)):
                if getattr(self, name) != default:
                    raise ValueError(f"--{name}: found it with --hf, which trains nothing: omit it")
            quickstart.run_quickstart_from_hf(self.directory, self.hf)
        else:
            quickstart.run_quickstart(self.directory, steps=self.steps, seed=self.seed)


@dataclasses.dataclass(frozen=True)
class Train:
    """Train from a recipe, or resume a run.

    The run directory holds the resolved recipe, metrics, the loss curve and checkpoints. The same
    command resumes from the newest checkpoint; SIGTERM and Ctrl-C save one before they stop.
    """

    recipe: RecipeName
    """The name of a recipe of the package, or a TOML file."""
    directory: RunDirectory
    """Run directory; created, or resumed if it exists."""
    set: Overrides = ()
    """Override a value of the recipe. May be repeated."""
    profile: Annotated[str | None, arg(metavar="FIRST:LAST")] = None
    """Steps to trace for a profiler (10:15), into profile/ of the run directory."""
    coordinator: Annotated[str | None, arg(metavar="HOST:PORT")] = None
    """Address of process 0, for several processes. The same command, with another --process, runs
    on every host. Not needed on TPU pods, in SLURM, Open MPI and Kubernetes: docs/multi-host.md."""
    processes: Number = None
    """Number of processes; 1 looks for no others."""
    process: Number = None
    """Index of this process, from 0."""
    join_timeout: Annotated[int, arg(metavar="SECONDS")] = 300
    """Time within which all processes must have joined."""
    lost_timeout: Annotated[int, arg(metavar="SECONDS")] = 100
    """Time without a heartbeat after which a process counts as lost and the others stop."""

    def run(self) -> None:
        import jax

        from btlm_jax.train import distributed, recipe_file

        resolved = recipe_file.load_recipe(self.recipe, self.set)
        profile = _steps(self.profile) if self.profile is not None else None
        distributed.initialize(
            self.coordinator,
            self.processes,
            self.process,
            join_timeout=self.join_timeout,
            lost_timeout=self.lost_timeout,
        )
        from btlm_jax.train.loop import train

        done = train(resolved, self.directory, profile)
        first = jax.process_index() == 0
        if first:
            held = f", held out {done.held_out:.3f}" if done.held_out == done.held_out else ""
            print(f"step {done.step}: loss {done.loss:.3f} nats per token{held}")
        if not done.finished:
            print(f"resume with: btlm {shlex.join(sys.argv[1:])}")
        elif first:
            print(f"next: btlm generate {self.directory} --prompt TEXT --sample")


def _steps(text: str) -> tuple[int, int]:
    first, colon, last = text.partition(":")
    if not (colon and first.isdigit() and last.isdigit()):
        raise ValueError(f"--profile: found {text!r}, expected first:last, such as 10:15")
    return int(first), int(last)


@dataclasses.dataclass(frozen=True)
class Tokenize:
    """Tokenize text files for training.

    Reads .jsonl, .txt (also .gz, .zst, .xz, .bz2) and .parquet. A document is a line of
    .jsonl, a row of .parquet, or a .txt file. Tokenization that was interrupted resumes when the
    same command is run again.
    """

    inputs: Annotated[Positional[LocalNames], arg(metavar="TEXT...")]
    """Files or globs; - is standard input."""
    target: Annotated[str, arg(aliases=["-o"], metavar="DIR"), NEW_DIRECTORY]
    """The directory to write."""
    tokenizer: Annotated[str | None, arg(metavar="DIR"), PathRule(remote=True)] = None
    """A directory with the files of a tokenizer, or a checkpoint that has one."""
    new_tokenizer: Annotated[int | None, arg(metavar="SIZE")] = None
    """Instead, train a byte-level BPE with a vocabulary of this size on the text that is not held
    out, on at most 64 Mi characters from the beginnings of the files."""
    held_out: Annotated[float | None, arg(metavar="FRACTION")] = None
    """Write this fraction of the documents to DIR/held_out and the rest to DIR/train. A hash of its
    text decides for each document, so the split is always the same; a single .txt file is cut, and
    its end is held out."""
    field: Annotated[str, arg(metavar="NAME")] = "text"
    """Field of JSON objects, or parquet column, that holds the text."""
    shard_tokens: Annotated[int, arg(metavar="N")] = 100_000_000
    """Tokens per file."""
    eos: Annotated[str | None, arg(metavar="TOKEN")] = None
    """Token that ends a document; by default that of the tokenizer."""
    on_error: Literal["raise", "skip"] = "raise"
    """Whether to stop at a record that cannot be used, or to skip and count it."""
    stdin_format: Literal["jsonl", "txt"] = "jsonl"
    """Format of standard input."""
    threads: Number = None
    """Number of threads, by default one per core; the result does not depend on it."""
    overwrite: bool = False
    """Replace an existing directory of tokens."""

    def run(self) -> None:
        from btlm_jax.checkpoint import metadata
        from btlm_jax.checkpoint.assets import warn_of_changed_assets
        from btlm_jax.data.prepare import prepare_tokens
        from btlm_jax.data.text_files import kind_and_compression

        if self.stdin_format != "jsonl" and "-" not in self.inputs:
            logger.warning("--stdin-format does nothing without - (standard input)")
        stdin_kind = f".{self.stdin_format}"
        kinds = [stdin_kind if n == "-" else kind_and_compression(n)[0] for n in self.inputs]
        if self.field != "text" and {*kinds} == {".txt"}:
            logger.warning("--field does nothing with .txt files")
        if self.tokenizer is not None and metadata.is_btlm_checkpoint(self.tokenizer):
            warn_of_changed_assets(metadata.read_metadata(self.tokenizer))
        options = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        made = prepare_tokens(options.pop("inputs"), options.pop("target"), **options)
        for directory, report in made.items():
            print(f"{directory}: {report}")
        names = {directory.name: shlex.quote(str(directory)) for directory in made}
        if self.held_out is not None:
            data = f"--set data.train={names['train']} --set data.held_out={names['held_out']}"
        else:
            data = f"--set data.train={shlex.quote(self.target)}"
        print(f"next: btlm train RECIPE RUN_DIR {data}")
