"""The `btlm` command: one dataclass per subcommand, whose fields are the options.

Modules that a command needs are imported when it runs, so that `btlm --help` is quick.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import logging
import os
import sys
from typing import Any

import tyro

from btlm_jax.cli.arguments import literal_text, translate_old_mesh_options
from btlm_jax.utils import compile_cache

# Group -> command -> the dataclass behind it, as module:class.
COMMANDS = {
    "Start": {"quickstart": "train_commands:Quickstart"},
    "Checkpoints": {
        "convert": "checkpoint_commands:Convert",
        "export": "checkpoint_commands:Export",
        "verify": "checkpoint_commands:Verify",
        "info": "checkpoint_commands:Info",
    },
    "Generation": {"generate": "generate_command:Generate"},
    "Training": {
        "tokenize": "train_commands:Tokenize",
        "train": "train_commands:Train",
    },
    "Evaluation": {"eval": "eval_commands:Eval"},
    "Planning": {
        "compile": "compile_command:Compile",
        "bench": "bench_commands:Bench",
    },
    "Research": {
        "coord-check": "mup_commands:CoordCheck",
        "transfer": "mup_commands:Transfer",
        "collapse": "collapse_command:Collapse",
    },
}
_EVERYWHERE = ("--debug", "--no-compilation-cache")


def main(argv: list[str] | None = None) -> int:
    """Runs `btlm`.

    Returns:
      The exit code: 0; 1 if a check fails (`verify`, `coord-check`, `transfer`); 2 on a bad
      argument or input; 3 if `coord-check` or `transfer` cannot tell; 130 on Ctrl-C; 141 when the
      reader of the output has closed it.
    """
    argv = sys.argv[1:] if argv is None else argv
    debug, caching = "--debug" in argv, "--no-compilation-cache" not in argv
    argv = [a for a in argv if a not in _EVERYWHERE]
    try:
        if not argv or argv[0] in ("-h", "--help"):
            print(help_text())
            return 0 if argv else 2
        command = parse_command(argv)
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


def parse_command(argv: list[str]) -> Any:
    """Returns the command that the arguments describe; prints its help and exits where asked.

    Raises:
      ValueError: there is no such command; the message names the nearest one.
    """
    name, *rest = argv
    commands = {name: home for group in COMMANDS.values() for name, home in group.items()}
    if name not in commands:
        near = difflib.get_close_matches(name, commands, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown command {name!r}{hint} `btlm --help` lists the commands")
    command = _command_class(commands[name])
    if hasattr(command, "parse_arguments"):  # it parses its own arguments
        return command.parse_arguments(rest)
    arguments = translate_old_mesh_options(rest)
    return tyro.cli(command, prog=f"btlm {name}", args=arguments, registry=literal_text())


def help_text() -> str:
    """Returns `btlm --help`: every command with the first sentence of its description, by group."""
    lines = [
        "usage: btlm COMMAND [OPTIONS]",
        "",
        "BTLM in JAX. `btlm COMMAND --help` lists the options.",
    ]
    for group, commands in COMMANDS.items():
        lines += ["", group]
        for name, home in commands.items():
            description = inspect.getdoc(_command_class(home)) or ""
            lines.append(f"  {name:<12} {' '.join(description.split(chr(10) * 2)[0].split())}")
    lines += [
        "",
        "Every command takes --debug (show tracebacks) and --no-compilation-cache (compile again).",
    ]
    return "\n".join(lines)


def _command_class(home: str) -> type:
    module, _, name = home.partition(":")
    return getattr(importlib.import_module(f"btlm_jax.cli.{module}"), name)


class _ToStderr(logging.StreamHandler):
    """Writes to the current standard error, which callers of `main` may replace."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def _log_to_stderr() -> None:
    """Sends this package's notices to standard error, and of libraries only warnings."""
    handler: logging.Handler = _ToStderr()
    handler.setFormatter(logging.Formatter("btlm: %(message)s"))
    logging.getLogger().addHandler(logging.NullHandler())  # or a library would print them twice
    package = logging.getLogger("btlm_jax")
    package.handlers, package.propagate = [handler], False
    package.setLevel(logging.INFO)
    for noisy in ("absl", "asyncio"):  # Orbax logs at length, and tracebacks of what it raises
        logging.getLogger(noisy).setLevel(logging.CRITICAL)
