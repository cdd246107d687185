"""The command that runs benchmarks. Its options are the parameters of the benchmark functions."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro
from tyro.conf import Positional, UseAppendAction, arg

from btlm_jax.cli.arguments import (
    Bytes,
    text_and_path_rules,
    write_json,
)
from btlm_jax.cli.path_arguments import (
    Directory,
    OutputFile,
    PathRule,
    WorkDirectory,
    resolve_options,
    resolve_path,
)

# Name -> (module:function, summary). A module, and with it JAX, is imported only to run its
# benchmark or to show its options.
BENCHMARKS = {
    "convert": ("convert_bench:bench_convert", "Converting a checkpoint, beside a copy of it."),
    "load": ("convert_bench:bench_load", "Loading a checkpoint, beside reading its files."),
    "train": ("step_bench:bench_train", "The train step, beside PyTorch's and the data loader."),
    "loss": ("loss_bench:bench_loss", "The loss and output head, beside one of full logits."),
    "attention": (
        "attention_bench:bench_attention",
        "Attention, beside XLA and a full bias.",
    ),
    "decode": ("generation_bench:bench_decode", "Decoding steps, beside PyTorch's."),
    "prefill": ("generation_bench:bench_prefill", "Prefilling a prompt, beside PyTorch."),
    "serve": ("serve_bench:bench_serve", "Several streams at a time, beside one after another."),
    "all": ("bench_all:bench_all", "All benchmarks of this machine, written as Markdown."),
}
# Parameters that the command line reads in another way than their types say.
_TYPES = {
    "directory": Directory,
    "file": Annotated[Positional[Path], arg(metavar="FILE"), PathRule(file=True, written=True)],
    "max_memory": Bytes,
    "only": Annotated[tuple[str, ...], UseAppendAction, arg(metavar="TITLE")],
    "work": WorkDirectory,
}
_JSON = Annotated[OutputFile, arg(help="A file for the measurements and their conditions.")]


@dataclasses.dataclass(frozen=True)
class Bench:
    """Measure speed and memory, each beside a baseline or a limit measured in the same run."""

    benchmark: Callable[[], dict[str, Any] | None]
    json: Path | None = None

    @classmethod
    def parse_arguments(cls, argv: Sequence[str]) -> Bench:
        """Returns the benchmark that the arguments describe; prints help and exits if requested.

        Raises:
          ValueError: the benchmark is unknown or missing.
        """
        if argv and argv[0] in ("-h", "--help"):
            print(_help_text())
            raise SystemExit(0)
        name = argv[0] if argv else ""
        if name not in BENCHMARKS:
            raise ValueError(
                f"bench: found {name!r}, expected one of {', '.join(BENCHMARKS)}; "
                "`btlm bench --help` describes them"
            )
        module, _, function = BENCHMARKS[name][0].partition(":")
        benchmark = getattr(importlib.import_module(f"btlm_jax.train.bench.{module}"), function)
        return tyro.cli(
            _deferred(benchmark),
            prog=f"btlm bench {name}",
            args=list(argv[1:]),
            registry=text_and_path_rules(),
        )

    def run(self) -> None:
        # PyTorch shares the GPU; by default JAX would reserve three quarters of it at the start.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        write_json(self.json, self.benchmark())


def _deferred(function: Callable[..., dict[str, Any] | None]) -> Callable[..., Bench]:
    """Returns a function with the parameters of a benchmark, and `json`, that returns a Bench."""
    signature = inspect.signature(function, eval_str=True)
    parameters = [
        parameter.replace(annotation=_TYPES.get(name, parameter.annotation))
        for name, parameter in signature.parameters.items()
    ]
    if signature.return_annotation is not None:
        kind = inspect.Parameter.KEYWORD_ONLY
        parameters.append(inspect.Parameter("json", kind, default=None, annotation=_JSON))

    def bind(json: Path | None = None, **options: Any) -> Bench:
        paths = resolve_options(bind.__annotations__, options)
        return Bench(functools.partial(function, **paths), resolve_path("json", _JSON, json))

    docstring = re.sub(r"\n {4}(?=\S)", " ", inspect.getdoc(function) or "")  # one line per entry
    bind.__doc__ = re.sub(
        r"(?m)^  \w+: \w", lambda entry: entry[0][:-1] + entry[0][-1].upper(), docstring
    )
    bind.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    bind.__dict__["__signature__"] = inspect.Signature(parameters)
    return bind


def _help_text() -> str:
    head = f"usage: btlm bench BENCHMARK [OPTIONS]\n\n{inspect.getdoc(Bench)}\n"
    lines = [f"  {name:<12} {summary}" for name, (_, summary) in BENCHMARKS.items()]
    return "\n".join([head, *lines, "", "`btlm bench BENCHMARK --help` lists the options."])
