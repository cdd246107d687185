"""Arguments that name files: what every command checks about them before it starts."""

from __future__ import annotations

import dataclasses
import os
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

from btlm_jax.cli.arguments import option_of
from btlm_jax.utils.local_paths import local_name, quoted, split_url


@dataclasses.dataclass(frozen=True)
class PathRule:
    """What an argument names, as metadata of its type; a `Path` without a rule is any local path.

    Attributes:
      file: a file that must exist, or be writable if `written`.
      directory: as `file`, a directory.
      written: it is created or replaced.
      remote: a gs:// URL will do.
      suffix: the required end of the name.
      separator: divides several names in one text.
    """

    file: bool = False
    directory: bool = False
    written: bool = False
    remote: bool = False
    suffix: str = ""
    separator: str = ""


_ANY, _REMOTE = PathRule(), PathRule(remote=True)
NEW_DIRECTORY = PathRule(directory=True, written=True)

Source = Annotated[Positional[str], arg(metavar="SOURCE"), _REMOTE]
OptionalSource = Annotated[Positional[str | None], arg(metavar="SOURCE"), _REMOTE]
Target = Annotated[Positional[str], arg(metavar="TARGET"), PathRule(written=True, remote=True)]
LocalTarget = Annotated[Positional[str], arg(metavar="TARGET"), PathRule(written=True)]
Checkpoint = Annotated[Positional[str], arg(metavar="CHECKPOINT"), _REMOTE]
RecipeName = Annotated[Positional[str], arg(metavar="RECIPE"), _ANY]
RunDirectory = Annotated[Positional[Path], arg(metavar="RUN_DIR"), NEW_DIRECTORY]
Directory = Annotated[Positional[Path], arg(metavar="DIR"), NEW_DIRECTORY]
WorkDirectory = Annotated[Path | None, arg(metavar="DIR"), NEW_DIRECTORY]
InputDirectory = Annotated[Path | None, arg(metavar="DIR"), PathRule(directory=True)]
InputFile = Annotated[Path | None, arg(metavar="FILE"), PathRule(file=True)]
OutputFile = Annotated[Path | None, arg(metavar="FILE"), PathRule(file=True, written=True)]
Picture = Annotated[
    Path | None, arg(metavar="FILE.png"), PathRule(file=True, written=True, suffix=".png")
]
# Names of files, or of something else: models on the Hub, presets, patterns, tasks.
OptionalName = Annotated[str | None, _ANY]
LocalNames = Annotated[tuple[str, ...], _ANY]
CommaSeparatedNames = Annotated[str, PathRule(separator=",")]


def resolve_paths(command: Any) -> Any:
    """Returns a parsed command with its local paths as they are written to be opened.

    ~ is expanded, `file://` is removed, and a `Path` is a Path.

    Args:
      command: an instance of a command's dataclass.

    Raises:
      ValueError: a URL that the command cannot open, or what `local_paths.split_url` refuses; the
        message names the option.
      FileNotFoundError, FileExistsError, NotADirectoryError, PermissionError: a file or directory
        is missing, something else, or may not be read or written.
    """
    hints = typing.get_type_hints(type(command), include_extras=True)
    changed: dict[str, Any] = {}
    for field in dataclasses.fields(command):
        value = getattr(command, field.name)
        if dataclasses.is_dataclass(value):
            changed[field.name] = resolve_paths(value)
        else:
            changed[field.name] = resolve_path(field.name, hints[field.name], value)
    return dataclasses.replace(command, **changed)


def resolve_path(field: str, annotation: Any, value: Any) -> Any:
    """Returns the value of one argument, resolved if its type says that it is a path.

    Args:
      field: the name of the argument.
      annotation: its type, with metadata.
      value: its value: a text, a tuple of texts, or anything that is no path.

    Raises:
      ValueError, OSError: as `resolve_paths`.
    """
    rule = path_rule(annotation)
    if rule is None or value is None:
        return value
    name, is_path = option_name(field, annotation), Path in _types(annotation)
    if isinstance(value, tuple):
        return tuple(_resolve(name, rule, one, is_path) for one in value)
    if rule.separator:
        parts = [part.strip() for part in value.split(rule.separator)]
        return rule.separator.join(str(_resolve(name, rule, p, is_path)) for p in parts if p)
    return _resolve(name, rule, value, is_path)


def path_rule(annotation: Any) -> PathRule | None:
    """Returns the rule of an argument's type; None if it is no path."""
    for rule in _metadata(annotation):
        if isinstance(rule, PathRule):
            return rule
    return _ANY if Path in _types(annotation) else None


def option_name(field: str, annotation: Any) -> str:
    """Returns the name that users know an argument by: --option, or the placeholder of the help."""
    found = list(_metadata(annotation))
    if not any(x is typing.get_args(Positional[str])[1] for x in found):
        return option_of(field)
    names = [name for x in found if (name := getattr(x, "metavar", None))]
    return names[0].strip("[].") if names else field.upper()


def check_output(file: Path | None, suffix: str = "", name: str = "") -> None:
    """Checks, before the work, that its result can be written; creates nothing.

    Args:
      file: the file to write or replace, in folders that may be created; None is no file.
      suffix: the required end of its name, such as ".png".
      name: the option, for messages.

    Raises:
      ValueError: another suffix.
      FileExistsError: the file is a directory, or one of its folders is a file.
      PermissionError: the file may not be written there.
    """
    if file is None:
        return
    prefix = f"{name}: " if name else ""
    if suffix and file.suffix.lower() != suffix:
        raise ValueError(f"{prefix}{file}: found the suffix {file.suffix!r}, expected {suffix!r}")
    if file.is_dir():
        raise FileExistsError(f"{prefix}{file} is a directory: choose another name")
    _check_writable(file, prefix)


def _resolve(name: str, rule: PathRule, value: str | Path, is_path: bool) -> str | Path:
    if rule.remote and split_url(value, name)[0] is not None:
        from btlm_jax.utils import paths

        paths.location(value, name)
        return value
    local = local_name(value, name)
    path, prefix = Path(local), f"{name}: "
    if rule.written and rule.file:
        check_output(path, rule.suffix, name)
    elif rule.written:
        if path.exists() and not path.is_dir():
            raise FileExistsError(f"{prefix}{path} is a file, expected a directory: choose another")
        _check_writable(path, prefix)
    elif rule.file or rule.directory:
        _check_readable(path, rule, prefix)
    return path if is_path else local


def _check_readable(path: Path, rule: PathRule, prefix: str) -> None:
    expected = "file" if rule.file else "directory"
    if not path.exists():
        where = f"a link to {os.readlink(path)}, which is missing" if path.is_symlink() else ""
        raise FileNotFoundError(f"{prefix}{quoted(str(path))} is {where}" if where else
                                f"{prefix}{path}: no such {expected}")  # fmt: skip
    if path.is_dir() != rule.directory:
        found = "directory" if path.is_dir() else "file"
        raise (IsADirectoryError if path.is_dir() else NotADirectoryError)(
            f"{prefix}{path} is a {found}, expected a {expected}"
        )
    if not os.access(path, os.R_OK):
        raise PermissionError(f"{prefix}{path} may not be read: change its permissions")


def _check_writable(path: Path, prefix: str) -> None:
    if path.is_symlink() and not path.exists():
        raise FileNotFoundError(
            f"{prefix}{path} is a link to {os.readlink(path)}, which is missing: remove the link, "
            "or choose another name"
        )
    nearest = next(p for p in (path, *path.absolute().parents) if p.exists())
    if nearest != path and not nearest.is_dir():
        raise FileExistsError(
            f"{prefix}{path}: {nearest} is a file, expected a folder: choose another"
        )
    if not os.access(nearest, os.W_OK):
        raise PermissionError(
            f"{prefix}{path}: {nearest} may not be written to: choose another place"
        )


def _metadata(annotation: Any) -> Iterator[Any]:
    """Yields the metadata of a type, from the outside in."""
    while typing.get_origin(annotation) is Annotated:
        annotation, *metadata = typing.get_args(annotation)
        yield from reversed(metadata)


def _types(annotation: Any) -> set[Any]:
    """Returns the types that an annotation is made of: {Path, None} of `Path | None`."""
    while typing.get_origin(annotation) is Annotated:
        annotation = typing.get_args(annotation)[0]
    if typing.get_origin(annotation) in (tuple, types.UnionType, typing.Union):
        return set().union(*map(_types, typing.get_args(annotation)))
    return {annotation}


def resolve_options(annotations: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the options of a function by name, resolved as `resolve_paths` does."""
    return {name: resolve_path(name, annotations[name], x) for name, x in options.items()}
