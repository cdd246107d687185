"""Options that several commands take, and the outputs that they share."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import sys
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import UseAppendAction, arg
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from btlm_jax.utils.format import format_bytes, parse_bytes

Bytes = Annotated[
    int,
    PrimitiveConstructorSpec(
        nargs=1,
        metavar="BYTES",
        instance_from_str=lambda args: parse_bytes(args[0]),
        is_instance=lambda x: isinstance(x, int),
        str_from_instance=lambda n: [format_bytes(n).replace(" ", "")],
    ),
]

Lengths = Annotated[
    tuple[int, ...],
    PrimitiveConstructorSpec(
        nargs=1,
        metavar="INT,INT",
        instance_from_str=lambda args: tuple(int(n) for n in args[0].split(",")),
        is_instance=lambda x: isinstance(x, tuple),
        str_from_instance=lambda x: [",".join(map(str, x))],
    ),
]

Text = Annotated[str | None, arg(metavar="TEXT")]
Number = Annotated[int | None, arg(metavar="N")]
Scheme = Annotated[str | None, arg(metavar="SCHEME")]
# The only way to override a value of a recipe or of a mesh, on every command.
Overrides = Annotated[tuple[str, ...], UseAppendAction, arg(metavar="SECTION.KEY=VALUE")]

_MESH_AXES = ("data", "fsdp", "tensor", "context")


def text_and_path_rules() -> ConstructorRegistry:
    """Returns rules for tyro on texts and paths.

    A path stays a text, because a Path of a URL would have lost a slash: `resolve_paths` checks it.
    The value None of an optional text or path is the word.
    """
    registry = ConstructorRegistry()

    @registry.primitive_rule
    def text_or_path(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
        types = [t for t in typing.get_args(info.type) if t is not type(None)]
        is_optional = len(types) == 1 and len(typing.get_args(info.type)) == 2
        kind = types[0] if is_optional else info.type
        if kind is not Path and not (kind is str and is_optional):
            return None
        return PrimitiveConstructorSpec(
            nargs=1,
            metavar="TEXT" if kind is str else "PATH",
            instance_from_str=lambda args: args[0],
            is_instance=lambda x: (x is None and is_optional) or isinstance(x, kind),
            str_from_instance=lambda x: [str(x)],
        )

    return registry


def translate_old_mesh_options(argv: Sequence[str]) -> list[str]:
    """Returns the arguments with `--mesh.data 4` as `--set mesh.data=4`.

    The old form is accepted with a note for one version.
    """
    arguments, result = list(argv), []
    while arguments:
        option = arguments.pop(0)
        name, equals, value = option.partition("=")
        if not (name.startswith("--mesh.") and name[len("--mesh.") :] in _MESH_AXES):
            result.append(option)
            continue
        if not equals and arguments:
            value = arguments.pop(0)
        override = f"mesh.{name[len('--mesh.') :]}={value}"
        print(f"btlm: note: write --set {override} for {name}", file=sys.stderr)
        result += ["--set", override]
    return result


def mesh_from_overrides(overrides: Sequence[str], axes: Sequence[str] = _MESH_AXES[:3]) -> Any:
    """Returns the mesh that `--set mesh.AXIS=N` describes, or None for a single device.

    Args:
      overrides: KEY=N. An axis without an override has size 1; -1 takes the devices that are left.
      axes: those that the command can split over.

    Raises:
      ValueError: a key that is no axis of the mesh, or a value that is no integer.
    """
    sizes = dict.fromkeys(axes, 1)
    for override in overrides:
        key, equals, value = override.partition("=")
        axis = key.removeprefix("mesh.")
        if not equals or not key.startswith("mesh.") or axis not in sizes:
            names = [f"mesh.{name}" for name in axes]
            near = difflib.get_close_matches(key, names, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"--set: found {override!r}, expected KEY=N with KEY one of "
                             f"{', '.join(names)}{hint}")  # fmt: skip
        try:
            sizes[axis] = int(value)
        except ValueError:
            raise ValueError(f"--set {key}: found {value!r}, expected an integer") from None
    if all(n == 1 for n in sizes.values()):
        return None
    import jax

    from btlm_jax.model import sharding

    wanted = None if -1 in sizes.values() else max(1, math.prod(sizes.values()))
    return sharding.make_mesh(**sizes, devices=jax.devices()[:wanted])


def refuse_ignored_options(command: Any, needs: Mapping[str, Sequence[str]]) -> None:
    """Refuses options that do nothing because those that they belong to were not given.

    Args:
      command: an instance of a command's dataclass.
      needs: the fields of such options, each with the fields of which it needs one.

    Raises:
      ValueError: an option differs from its default, and none of those that it needs does.
    """
    for name, others in needs.items():
        if is_given(command, name) and not any(is_given(command, other) for other in others):
            options = " or ".join(map(option_of, others))
            raise ValueError(
                f"{option_of(name)} needs {options}: add it, or omit {option_of(name)}"
            )


def is_given(command: Any, name: str) -> bool:
    """Returns whether the field of a command's dataclass differs from its default."""
    default = next(f.default for f in dataclasses.fields(command) if f.name == name)
    return getattr(command, name) != default


def option_of(name: str) -> str:
    """Returns the option of a field: "--batch-size" for "batch_size"."""
    return f"--{name.replace('_', '-')}"


def write_json(file: Path | None, result: Any) -> None:
    """Writes the result of a command to the file of its `--json`, if one was given.

    JSON has no NaN and no infinity: null stands for them.
    """
    if file is not None:
        from btlm_jax.utils.format import finite_json

        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(finite_json(result), indent=2, allow_nan=False) + "\n")
