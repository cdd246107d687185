"""The `btlm` command: one dataclass per subcommand, whose fields are the options.

Modules that a command needs are imported when it runs, so that `btlm --help` is quick.
"""

from __future__ import annotations

import difflib
import errno
import importlib
import inspect
import io
import logging
import os
import sys
from pathlib import Path
from typing import Any

import tyro

from btlm_jax.cli.arguments import text_and_path_rules, translate_old_mesh_options
from btlm_jax.cli.flag_messages import notices_with_options, option_names, with_options
from btlm_jax.cli.out_of_memory import out_of_memory
from btlm_jax.cli.path_arguments import resolve_paths
from btlm_jax.utils import compile_cache
from btlm_jax.utils.side_output import SideOutput, attempt, set_exit_code

# Group -> command -> the dataclass behind it, as module:class.
COMMANDS = {
    "Start": {"quickstart": "train_commands:Quickstart"},
    "Checkpoints": {
        "convert": "checkpoint_commands:Convert",
        "export": "checkpoint_commands:Export",
        "verify": "checkpoint_commands:Verify",
        "info": "checkpoint_commands:Info",
    },
    "Generation": {
        "generate": "generate_command:Generate",
        "serve": "serve_command:Serve",
    },
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
# What to do about an error of the operating system.
_ADVICE = {
    errno.EACCES: ": change its permissions, or run as its owner",
    errno.EPERM: ": change its permissions, or run as its owner",
    errno.EROFS: ": choose a place that can be written",
    errno.ENOSPC: ": free space, or choose another disk",
    errno.EDQUOT: ": free space, or choose another disk",
    errno.EMFILE: ": allow more open files with `ulimit -n`",
    errno.ENFILE: ": the whole machine has too many open files; close some programs",
    errno.ENAMETOOLONG: ": choose a shorter name",
    errno.EISDIR: ", where a file was expected: rename or remove it, or choose another name",
    errno.ENOTDIR: ": one of its folders is a file; choose another name",
    errno.ELOOP: ": its links lead in a circle; remove them",
    errno.EIO: ": the disk fails; copy the files to another one",
    errno.ESTALE: ": the network file system lost it; mount it again",
    errno.EFBIG: ": choose a disk that can hold larger files",
}
_EVERYWHERE = ("--debug", "--no-compilation-cache")
_CLOSE_SECONDS = 5.0  # within which standard error must take the last notices


def main(argv: list[str] | None = None) -> int:
    """Runs `btlm`.

    Returns:
      The exit code: 0; 1 if a check fails (`verify`, `coord-check`, `transfer`); 2 on a bad
      argument or input; 3 if `coord-check` or `transfer` cannot tell; 130 on Ctrl-C; 141 when the
      reader of the output has closed it.
    """
    code = _run(sys.argv[1:] if argv is None else argv)
    set_exit_code(code)
    return code


def _run(argv: list[str]) -> int:
    debug, caching = "--debug" in argv, "--no-compilation-cache" not in argv
    argv = [a for a in argv if a not in _EVERYWHERE]
    _replace_closed_streams()
    _escape_what_terminals_cannot_show()
    log, options = None, dict[str, str]()
    try:
        if not argv or argv[0] in ("-h", "--help"):
            print(help_text())
            return 0 if argv else 2
        command = parse_command(argv)
        options = option_names(command)
        if caching:
            compile_cache.enable_persistent_cache()
        log = _log_to_stderr()
        with notices_with_options(options):
            code = command.run()
        sys.stdout.flush()
        return code or 0
    except BrokenPipeError:  # the reader of our output (head, less) has gone
        _discard_stdout()
        return 141
    except (ValueError, OSError, FloatingPointError) as e:
        if debug:
            raise
        message = _stdout_failure(e) or with_options(_describe(e), options)
        _print_last(log, f"btlm: error: {message}")
        return 2
    except (MemoryError, RuntimeError) as e:
        message = out_of_memory(e, argv[:1])
        if debug or message is None:
            raise
        _print_last(log, f"btlm: error: {message}")
        return 2
    except KeyboardInterrupt:
        _print_last(log, "btlm: interrupted")
        return 130
    finally:
        if log is not None:
            log.finish()


def _replace_closed_streams() -> None:
    """Gives a process that was started with closed streams (`>&-`) ones that discard."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115 (until the process ends)


def _stdout_failure(error: Exception) -> str | None:
    """Returns what is wrong with standard output, if that is the cause of an error."""
    if not isinstance(error, OSError) or error.filename is not None or error.errno is None:
        return None
    try:
        print(flush=True)  # it fails again
    except OSError as e:
        _discard_stdout()
        return f"standard output cannot be written: {e.strerror}"
    return None


def _discard_stdout() -> None:
    """Discards what is left of standard output, which Python would try to write at its exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _print_last(log: _ToStderr | None, text: str) -> None:
    """Prints to standard error, after the notices that still wait, if it can be written."""
    if log is not None:
        log.finish()
    attempt(
        "standard error",
        "a message is missing",
        lambda: print(text, file=sys.stderr),
        _CLOSE_SECONDS,
    )


def parse_command(argv: list[str]) -> Any:
    """Returns the command that the arguments describe; prints its help and exits where asked.

    Raises:
      ValueError: there is no such command (the message names the nearest one), or a bad path.
      OSError: a file or directory cannot be read or written.
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
    rules = text_and_path_rules()
    return resolve_paths(tyro.cli(command, prog=f"btlm {name}", args=arguments, registry=rules))


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


def _describe(error: BaseException) -> str:
    """Returns the message of an error; one of the operating system begins with the file."""
    if isinstance(error, OSError) and str(error).startswith("[Errno"):
        code, text, name = error.errno or 0, error.strerror or "", error.filename
        if name:
            text = f"{os.fsdecode(name) if isinstance(name, bytes) else name}: {text}"
        # Only the system's own text lacks advice.
        return text + (_ADVICE.get(code, "") if error.strerror == os.strerror(code) else "")
    return str(error)


def _escape_what_terminals_cannot_show() -> None:
    """Makes output in ASCII or Latin-1 escape other characters instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


class _ToStderr(logging.StreamHandler):
    """Writes to the current standard error, which callers of `main` may replace.

    While `main` runs, a thread writes, so that a pipe that nobody reads does not stop the work.
    """

    def __init__(self) -> None:
        super().__init__()
        self._output: SideOutput | None = SideOutput("standard error", "notices are missing there")

    def emit(self, record: logging.LogRecord) -> None:
        if self._output is None:
            self._write(sys.stderr, self.format(record))
        elif not self._output.given_up:
            self._output.put(self._write, sys.stderr, self.format(record))

    def finish(self) -> None:
        """Writes the notices that wait; those that follow are written at once.

        If standard error takes no more, they are dropped: this process is about to end.
        """
        if self._output is not None:
            self._output.close(_CLOSE_SECONDS)
            if not self._output.given_up:
                self._output = None

    @staticmethod
    def _write(stream: Any, line: str) -> None:
        stream.write(line + "\n")
        stream.flush()


def _report_exception(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """Prints the traceback of an exception that nothing has caught.

    TensorStore's threads raise one when a write fails after Orbax has given up and reported it.
    """
    if not (isinstance(error, RuntimeError) and str(error) == "Event loop is closed"):
        sys.__excepthook__(kind, error, trace)


def _log_to_stderr() -> _ToStderr:
    """Sends this package's notices to standard error, and of libraries only warnings."""
    handler = _ToStderr()
    handler.setFormatter(logging.Formatter("btlm: %(message)s"))
    logging.getLogger().addHandler(logging.NullHandler())  # or a library would print them twice
    package = logging.getLogger("btlm_jax")
    package.handlers = list[logging.Handler]([handler])
    package.propagate = False
    package.setLevel(logging.INFO)
    sys.excepthook = _report_exception
    for noisy in ("absl", "asyncio"):  # Orbax logs at length, and tracebacks of what it raises
        logging.getLogger(noisy).setLevel(logging.CRITICAL)
    return handler
