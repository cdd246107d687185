"""Recipes as TOML files, read into the dataclasses of `recipe`.

A recipe's sections are the fields of `Recipe`. Unknown keys and wrong types are errors that name
the key and the nearest valid one; `--set section.key=value` overrides single values.
"""

from __future__ import annotations

import dataclasses
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from btlm_jax.train.recipe import Recipe, nearest

RECIPES_FOLDER = Path(__file__).parent / "recipes"


def load_recipe(source: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Reads a recipe.

    Args:
      source: the name of one of ours (`names`), or the path of a TOML file.
      overrides: "section.key=value" each, the value as in TOML (strings may lack their quotes);
        phases are numbered: "phases.0.steps=10".

    Raises:
      FileNotFoundError: no such recipe; the message lists ours.
      ValueError: not TOML, unknown keys, values of the wrong type, a recipe that cannot be run.
    """
    path = Path(source)
    if path.suffix != ".toml" and str(source) in recipe_names():
        path = RECIPES_FOLDER / f"{source}.toml"
    if not path.is_file():
        raise FileNotFoundError(
            f"{source}: no such recipe; ours are {', '.join(recipe_names())}, others end in .toml"
        )
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise ValueError(f"{path}: not valid TOML: {e}") from None
    for override in overrides:
        _override(raw, override)
    try:
        return parse_recipe(raw)
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from None


def parse_recipe(raw: Mapping[str, Any]) -> Recipe:
    """A recipe from parsed TOML; see `load`."""
    return _dataclass(Recipe, raw, "")


def recipe_names() -> list[str]:
    """The recipes that come with the package."""
    return sorted(p.stem for p in RECIPES_FOLDER.glob("*.toml"))


def recipe_to_dict(recipe: Recipe) -> dict[str, Any]:
    """What `parse` reads back, as JSON and TOML can hold it."""

    def clean(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {k: clean(v) for k, v in value.items() if v is not None}
        return [clean(v) for v in value] if isinstance(value, list | tuple) else value

    return clean(dataclasses.asdict(recipe))


def _dataclass(cls: type, raw: Any, where: str) -> Any:
    if not isinstance(raw, Mapping):
        raise ValueError(f"{where or 'recipe'}: found {raw!r}, expected a table")
    hints, values = typing.get_type_hints(cls), {}
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key, value in raw.items():
        if key not in fields:
            raise ValueError(f"{where}{key}: unknown key{nearest(key, fields)}")
        values[key] = _value(hints[key], value, where + key)
    missing = [
        name
        for name, f in fields.items()
        if name not in values
        and f.default is dataclasses.MISSING
        and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ValueError(f"{where}{missing[0]}: missing")
    return cls(**values)


def _value(hint: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return _dataclass(typing.cast(type, hint), value, f"{where}.")
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple:
        if not isinstance(value, list):
            raise ValueError(f"{where}: found {value!r}, expected a list of tables")
        return tuple(_dataclass(args[0], v, f"{where}.{i}.") for i, v in enumerate(value))
    if origin is Literal:
        if value not in args:
            raise ValueError(f"{where}: found {value!r}, expected one of {', '.join(args)}")
        return value
    options = args if origin is types.UnionType else (origin or hint,)
    if float in options and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    kinds = [Mapping if o is Mapping or o is typing.get_origin(hint) else o for o in options]
    if isinstance(value, bool) and bool not in kinds:
        kinds = []
    if not any(isinstance(value, k) for k in kinds if isinstance(k, type)):
        expected = " or ".join(k.__name__ for k in options if k is not types.NoneType)
        raise ValueError(f"{where}: found {value!r}, expected {expected}")
    return value


def _override(raw: dict[str, Any], text: str) -> None:
    key, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"--set {text}: expected section.key=value")
    try:
        parsed = tomllib.loads(f"x = {value}")["x"]
    except tomllib.TOMLDecodeError:
        parsed = value
    node: Any = raw
    *path, last = key.strip().split(".")
    for part in path:
        if isinstance(node, list):
            if not part.isdigit() or int(part) >= len(node):
                raise ValueError(f"--set {text}: there are phases 0 to {len(node) - 1}")
            node = node[int(part)]
        else:
            node = node.setdefault(part, {})
    if not isinstance(node, dict):
        raise ValueError(f"--set {text}: {key} is not a key of a table")
    node[last] = parsed
