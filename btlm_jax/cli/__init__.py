"""The `btlm` command: one dataclass per subcommand, its fields the arguments.

What a subcommand needs is imported when it runs, so that `btlm --help` is quick.
"""

from __future__ import annotations

import logging
import os
import sys
from typing import Annotated

import tyro
from tyro.conf import subcommand

from btlm_jax.cli.bench_commands import Bench
from btlm_jax.cli.checkpoint_commands import Convert, Export, Info, Verify
from btlm_jax.cli.collapse_command import Collapse
from btlm_jax.cli.compile_command import Compile
from btlm_jax.cli.eval_commands import Eval
from btlm_jax.cli.generate_command import Generate
from btlm_jax.cli.mup_commands import CoordCheck, Transfer
from btlm_jax.cli.train_commands import Quickstart, Tokenize, Train
from btlm_jax.utils import compile_cache

Command = (
    Annotated[Quickstart, subcommand("quickstart")]
    | Annotated[Convert, subcommand("convert")]
    | Annotated[Export, subcommand("export")]
    | Annotated[Verify, subcommand("verify")]
    | Annotated[Eval, subcommand("eval")]
    | Annotated[Bench, subcommand("bench")]
    | Annotated[Info, subcommand("info")]
    | Annotated[Tokenize, subcommand("tokenize")]
    | Annotated[Train, subcommand("train")]
    | Annotated[Compile, subcommand("compile")]
    | Annotated[Generate, subcommand("generate")]
    | Annotated[CoordCheck, subcommand("coord-check")]
    | Annotated[Transfer, subcommand("transfer")]
    | Annotated[Collapse, subcommand("collapse")]
)


def main(argv: list[str] | None = None) -> int:
    """Runs `btlm`.

    Returns:
      The exit code: 0, 1 if `verify` finds a difference, 2 on a bad argument or input, 130 on
      Ctrl-C, 141 when the output is not wanted any more.
    """
    argv = sys.argv[1:] if argv is None else argv
    debug, caching = "--debug" in argv, "--no-compilation-cache" not in argv
    try:
        command = tyro.cli(
            Command,
            prog="btlm",
            description="BTLM in JAX: train, convert, evaluate, inspect and generate. "
            "Anywhere: --debug shows tracebacks, --no-compilation-cache compiles everything anew.",
            args=[a for a in argv if a not in ("--debug", "--no-compilation-cache")],
        )
        if caching:
            compile_cache.enable_persistent_cache()
        _log_to_stderr()
        code = command.run()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of our output (head, less) has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ValueError, OSError, FloatingPointError) as e:
        if debug:
            raise
        print(f"btlm: error: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("btlm: interrupted", file=sys.stderr)
        return 130
    return code or 0


class _ToStderr(logging.StreamHandler):
    """To whatever is standard error at the time; callers of `main` may exchange it."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def _log_to_stderr() -> None:
    """Our own notices on standard error; of libraries, warnings only."""
    handler: logging.Handler = _ToStderr()
    handler.setFormatter(logging.Formatter("btlm: %(message)s"))
    logging.getLogger().addHandler(logging.NullHandler())  # or a library would print them twice
    ours = logging.getLogger("btlm_jax")
    ours.handlers, ours.propagate = [handler], False
    ours.setLevel(logging.INFO)
    for noisy in ("absl", "asyncio"):  # Orbax logs at length, and tracebacks of what it raises
        logging.getLogger(noisy).setLevel(logging.CRITICAL)
