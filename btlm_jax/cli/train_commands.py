"""Subcommands that make models: quickstart, tokenize, train."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, UseAppendAction, arg


@dataclasses.dataclass(frozen=True)
class Quickstart:
    """Train a small BTLM on the Python manual, save, export, convert back and generate.

    With --hf, convert that checkpoint and generate from it instead.
    """

    directory: Positional[Path] = Path("btlm-quickstart")
    """Where everything is written; must not exist."""
    hf: str | None = None
    """A Hugging Face directory or Hub id to convert and generate from instead of training."""
    steps: int | None = None
    """Training steps; default the recipe's."""
    seed: int = 0
    """Of the initial weights and the order of the data."""

    def run(self) -> None:
        from btlm_jax.train.demo import quickstart

        if self.hf is not None:
            quickstart.from_hf(self.directory, self.hf)
        else:
            quickstart.train(self.directory, steps=self.steps, seed=self.seed)


@dataclasses.dataclass(frozen=True)
class Train:
    """Train by a recipe, or go on with a run that was stopped.

    The run directory holds the recipe as resolved, metrics, the loss curve and the checkpoints. The
    same command goes on from the newest checkpoint; SIGTERM and Ctrl-C save first.
    """

    recipe: Positional[str]
    """The name of a recipe that comes with btlm, or a TOML file."""
    directory: Positional[Path]
    """Of the run; made, or gone on with."""
    set: Annotated[tuple[str, ...], UseAppendAction] = ()
    """A value of the recipe to override, as section.key=value. May be repeated."""
    profile: str | None = None
    """Steps to trace for a profiler, as first:last (10:15), into profile/ of the run."""
    coordinator: str | None = None
    """For several processes: host:port of process 0. The same command, with another --process, runs
    on every host. Not needed on TPU pods, in SLURM, Open MPI and Kubernetes (see README)."""
    processes: int | None = None
    """How many processes; 1 looks for no others."""
    process: int | None = None
    """Which of them this is, from 0."""
    join_timeout: int = 300
    """Seconds within which all processes must have come."""
    lost_timeout: int = 100
    """Seconds without a sign of life after which a process counts as lost and the others end."""

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
    """Turn text into the token files that training reads: .jsonl, .txt (also .gz, .zst), .parquet.

    A document is an object (a line) of .jsonl, a row of .parquet, or a whole .txt file. Killed or
    failed, the same command continues it.
    """

    inputs: Positional[tuple[str, ...]]
    """Files or globs; - is standard input."""
    target: Annotated[str, arg(aliases=["-o"])]
    """The directory to write."""
    tokenizer: str | None = None
    """A directory with a tokenizer's files, or a checkpoint that carries one."""
    new_tokenizer: Annotated[int | None, arg(metavar="SIZE")] = None
    """Instead: train a byte-level BPE with a vocabulary of this size on the text that is not held
    out, on 64 Mi characters of it at most, from the beginning of every file."""
    held_out: Annotated[float | None, arg(metavar="FRACTION")] = None
    """Write this fraction of the documents to TARGET/held_out and the rest to TARGET/train. A hash
    of its text decides about a document, so it is always the same; a single .txt file is cut, and
    its end held out."""
    field: str = "text"
    """Of JSON objects, or the parquet column, that holds the text."""
    shard_tokens: int = 100_000_000
    """Tokens per file."""
    eos: str | None = None
    """The token that ends a document; default the tokenizer's own."""
    on_error: Literal["raise", "skip"] = "raise"
    """About a record that cannot be used: stop, or skip and count it."""
    stdin_format: Literal["jsonl", "txt"] = "jsonl"
    """What comes on standard input."""
    threads: int | None = None
    """Default one per core; the result does not depend on it."""
    overwrite: bool = False
    """Replace an existing directory of tokens."""

    def run(self) -> None:
        from btlm_jax.data.prepare import prepare_tokens

        options = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        made = prepare_tokens(options.pop("inputs"), options.pop("target"), **options)
        for directory, report in made.items():
            print(f"{directory}: {report}")
        names = {directory.name: shlex.quote(str(directory)) for directory in made}
        if self.held_out is not None:
            data = f"--set data.train={names['train']} --set data.held_out={names['held_out']}"
        else:
            data = f"--set data.train={shlex.quote(self.target)}"
        print(f"next: btlm train RECIPE RUN {data}")
