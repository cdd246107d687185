"""Every option that names a file or directory, of every command, reads it in the same way.

The options come from the commands themselves, so a new one is tested, or must be listed here.
"""

from __future__ import annotations

import dataclasses
import inspect
import os
import re
import time
import typing
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import pytest
from tyro.conf import Positional

from btlm_jax import cli
from btlm_jax.cli import bench_commands, path_arguments
from btlm_jax.cli.path_arguments import PathRule, check_output, path_rule, resolve_path

# Texts that name no file; a new option of type `str` is either listed here or has a `PathRule`.
NOT_PATHS = {
    "api_key", "bad_words", "coordinator", "eos", "field", "form", "host", "name", "only", "preset",
    "profile", "prompt",
    "quantize", "revision", "scheme", "set", "stop_strings", "topology", "weights",
}  # fmt: skip


class Option(NamedTuple):
    """An option of a command that names files."""

    words: tuple[str, ...]  # of the command, such as ("eval", "perplexity")
    field: str
    annotation: Any
    others: tuple[tuple[str, Any], ...]  # (field, type) of all arguments that the command needs

    @property
    def name(self) -> str:
        return path_arguments.option_name(self.field, self.annotation)

    @property
    def rule(self) -> PathRule:
        rule = path_rule(self.annotation)
        assert rule is not None
        return rule

    def argv(self, value: str) -> list[str]:
        """Returns a command line with a value of this option, and all else as it should be."""
        values = {}
        for field, annotation in self.others:
            rule = path_rule(annotation)
            values[field, annotation] = "new.png" if rule is not None and rule.file else "."
        values[self.field, self.annotation] = value
        named = {path_arguments.option_name(*option): text for option, text in values.items()}
        positional = [text for name, text in named.items() if not name.startswith("--")]
        options = [f"{name}={text}" for name, text in named.items() if name.startswith("--")]
        return [*self.words, *positional, *options]


def fields_of(command: Any) -> list[tuple[str, Any, bool]]:
    """Returns (name, type, required) of the options of a command or a benchmark."""
    if not dataclasses.is_dataclass(command):
        parameters = inspect.signature(command).parameters.values()
        return [(p.name, p.annotation, p.default is p.empty) for p in parameters]
    hints, found = typing.get_type_hints(command, include_extras=True), []
    for f in dataclasses.fields(command):
        required = f.default is f.default_factory is dataclasses.MISSING
        kind = typing.get_args(hints[f.name])[:1]
        if kind and dataclasses.is_dataclass(kind[0]):
            found += fields_of(kind[0])
        else:
            found.append((f.name, hints[f.name], required))
    return found


def commands() -> list[tuple[tuple[str, ...], Any]]:
    """Returns every command and subcommand with the class or function that has its options."""
    found: list[tuple[tuple[str, ...], Any]] = []
    for name, home in (pair for group in cli.COMMANDS.values() for pair in group.items()):
        command = cli._command_class(home)
        if name == "bench":
            for benchmark, (place, _) in bench_commands.BENCHMARKS.items():
                module, _, function = place.partition(":")
                function = getattr(
                    __import__(f"btlm_jax.train.bench.{module}", fromlist=["x"]), function
                )
                found.append(((name, benchmark), bench_commands._deferred(function)))
        elif name == "eval":
            kinds = typing.get_type_hints(command, include_extras=True)["command"]
            for kind in typing.get_args(typing.get_args(kinds)[0]):
                member, about = typing.get_args(kind)[:2]
                found.append(((name, about.name), member))
        else:
            found.append(((name,), command))
    return found


def path_options() -> list[Option]:
    options = []
    for words, command in commands():
        fields = fields_of(command)
        needed = tuple(
            (field, annotation)
            for field, annotation, required in fields
            if required or not path_arguments.option_name(field, annotation).startswith("--")
        )
        options += [
            Option(words, field, annotation, needed)
            for field, annotation, _ in fields
            if path_rule(annotation) is not None
        ]
    return options


OPTIONS = path_options()


@pytest.fixture
def parse(tmp_path, monkeypatch, capsys):
    """Parses a command line in an empty home; returns (error or command, standard error)."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)

    class Ran(Exception):
        """The command has begun: its paths were accepted."""

    def run_nothing(command):
        raise Ran

    for _, home in (pair for group in cli.COMMANDS.values() for pair in group.items()):
        monkeypatch.setattr(cli._command_class(home), "run", run_nothing)
    monkeypatch.setattr(cli.compile_cache, "enable_persistent_cache", lambda: None)

    def parse(argv: list[str]) -> tuple[int | None, str]:
        try:
            code = cli.main(argv)
        except Ran:
            code = None
        except SystemExit as e:
            code = e.code
        return code, capsys.readouterr().err

    return parse


def test_every_option_of_text_is_a_path_or_is_listed_here():
    for words, command in commands():
        for field, annotation, _ in fields_of(command):
            if path_rule(annotation) is None and str in path_arguments._types(annotation):
                assert field in NOT_PATHS, f"{' '.join(words)} {field}: a path? Give it a PathRule"


def test_there_are_options_of_every_kind():
    assert len(OPTIONS) > 45
    rules = {option.rule for option in OPTIONS}
    for name in ("file", "directory", "written", "remote", "suffix", "separator"):
        assert any(getattr(rule, name) for rule in rules), name


def resolve(option: Option, value: str) -> Any:
    """Returns the value as the command gets it, without the parser."""
    found = (
        (value,) if tuple in map(typing.get_origin, typing.get_args(option.annotation)) else value
    )
    resolved = resolve_path(option.field, option.annotation, found)
    return resolved[0] if isinstance(resolved, tuple) else resolved


def test_every_command_refuses_a_url_in_every_option_at_once(parse, tmp_path):
    for option in OPTIONS:
        began = time.monotonic()
        code, err = parse(option.argv("s3://bucket/x.png"))
        assert code == 2, (option, err)
        assert err.startswith(
            f"btlm: error: {option.name}: found 's3://bucket/x.png', expected a local path"
        ), err
        assert "aws s3 cp" in err and err.count("\n") == 1 and len(err) < 300, err
        assert time.monotonic() - began < 5
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "value, said",
    [
        ("hf://org/name", "found 'hf://org/name', expected a local path"),
        ("https://host/x.png", "found 'https://host/x.png', expected a local path"),
        ("s3:/bucket/x", "found 's3:/bucket/x', which looks like a s3:// URL"),
        ("file://host/x.png", "found 'file://host/x.png', expected file:///absolute/path"),
        ("caf\udce9.png", r"found 'caf\xe9.png', whose bytes are not UTF-8"),
        ("a\nb.png", r"found 'a\nb.png', with a line break"),
        ("~nobody-here/x.png", "found '~nobody-here/x.png', but there is no user 'nobody-here'"),
        ("", "found an empty path"),
    ],
)
def test_every_option_refuses_what_is_no_local_path(value, said, parse, tmp_path):
    for option in OPTIONS:
        if option.rule.separator and not value:
            continue
        with pytest.raises(ValueError) as error:
            resolve(option, value)
        message = str(error.value)
        assert message.startswith(f"{option.name}: {said}"), option
        assert "\n" not in message and len(message.encode()) < 300
    code, err = parse(OPTIONS[0].argv(value))
    assert code == 2 and said in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", ["~/a b%20.png", "file://{home}/a%20b%2520.png", "a b%20.png"])
def test_every_option_takes_home_directories_file_urls_spaces_and_percent(value, parse, tmp_path):
    file, value = tmp_path / "a b%20.png", value.format(home=tmp_path)
    for option in OPTIONS:
        is_directory = option.rule.directory or (option.rule.written and not option.rule.file)
        file.mkdir() if is_directory else file.write_text("")
        assert Path(resolve(option, value)).resolve() == file, option
        if value.startswith("~"):
            code, err = parse(option.argv(value))
            assert code is None, (option, err)
        file.rmdir() if is_directory else file.unlink()


def test_files_directories_and_links_are_told_apart(parse, tmp_path):
    (tmp_path / "directory.png").mkdir()
    (tmp_path / "file.png").write_text("")
    (tmp_path / "link.png").symlink_to("missing")
    for option in OPTIONS:
        rule = option.rule
        wrong = ["link.png"] if rule.written or rule.file or rule.directory else []
        if rule.file or rule.directory:
            wrong += ["directory.png" if rule.file else "file.png"]
        if wrong:
            wrong += ["file.png/x.png"] if rule.written else ["missing.png"]
        for value in wrong:
            with pytest.raises(OSError, match=re.escape(value)) as error:
                resolve(option, value)
            message = str(error.value)
            assert message.startswith(f"{option.name}: ") and "\n" not in message, option
    code, err = parse(["coord-check", "file.png"])
    assert (
        code == 2
        and err == "btlm: error: DIR: file.png is a file, expected a directory: choose another\n"
    )
    assert len(list(tmp_path.iterdir())) == 3


def test_files_that_may_not_be_read_or_written_are_refused(parse, tmp_path, monkeypatch):
    (tmp_path / "file.png").write_text("")
    (tmp_path / "directory.png").mkdir()
    monkeypatch.setattr(os, "access", lambda place, mode: False)  # root may do everything
    for option in OPTIONS:
        if option.rule.file or option.rule.directory:
            with pytest.raises(PermissionError, match="may not be ") as error:
                resolve(option, "file.png" if option.rule.file else "directory.png")
            assert str(error.value).startswith(f"{option.name}: ")


def test_an_output_is_checked_and_nothing_is_created(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.write_text("")
    for good in (None, file, tmp_path / "a.json", tmp_path / "deep" / "er" / "a.json"):
        check_output(good)
    check_output(tmp_path / "a.PNG", ".png")
    assert list(tmp_path.iterdir()) == [file]
    with pytest.raises(ValueError, match=r"a\.pdf: found the suffix '\.pdf', expected '\.png'"):
        check_output(tmp_path / "a.pdf", ".png")
    with pytest.raises(FileExistsError, match="is a directory: choose another name"):
        check_output(tmp_path)
    with pytest.raises(FileExistsError, match="file is a file, expected a folder"):
        check_output(file / "deep" / "a.json")
    monkeypatch.chdir(tmp_path)
    check_output(Path("a.json"))
    accessed = []
    # Root may write anywhere.
    monkeypatch.setattr(os, "access", lambda place, _: bool(accessed.append(place)))
    with pytest.raises(PermissionError, match="may not be written to"):
        check_output(tmp_path / "deep" / "a.json")
    assert accessed == [tmp_path]


def test_a_current_directory_that_is_gone_is_named(tmp_path, monkeypatch):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with pytest.raises(FileNotFoundError, match=r"--json: .*current directory has been removed"):
        resolve_path("json", path_arguments.OutputFile, "a.json")


def test_the_outer_rule_of_a_type_counts():
    inner = Annotated[Positional[str], PathRule(remote=True)]
    assert path_rule(Annotated[inner, PathRule(separator=",")]).separator == ","
    assert path_rule(Annotated[Path | None, "text"]) == PathRule() and path_rule(str) is None
    assert resolve_path("x", Annotated[str, PathRule(separator=",")], "a, ~root/b,") == (
        f"a,{os.path.expanduser('~root/b')}"
    )
