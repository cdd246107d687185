"""Recipes as TOML files, parsed into the dataclasses of `recipe`.

The sections of a file are the fields of `Recipe`. Unknown keys and wrong types are errors that name
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

from btlm_jax.train.recipe import Recipe, nearest_name_hint
from btlm_jax.utils.local_paths import AnyPath, local_path

RECIPES_FOLDER = Path(__file__).parent / "recipes"


def load_recipe(source: AnyPath, overrides: Iterable[str] = ()) -> Recipe:
    """Loads a recipe.

    Args:
      source: name of a recipe of the package (`recipe_names`), or path of a TOML file.
      overrides: "section.key=value" each, with values as in TOML (strings need no quotes); phases
        are numbered: "phases.0.steps=10".

    Raises:
      FileNotFoundError: there is no such recipe; the message lists those of the package.
      ValueError: the file is not TOML, has unknown keys or values of the wrong type, or the recipe
        is invalid.
    """
    path = local_path(source, "source")
    if path.suffix != ".toml" and str(source) in recipe_names():
        path = RECIPES_FOLDER / f"{source}.toml"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such recipe; expected one of {', '.join(recipe_names())}, or the path "
            "of a .toml file"
        )
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise ValueError(f"{path}: not valid TOML: {e}") from None
    for override in overrides:
        _apply_override(raw, override)
    try:
        return parse_recipe(raw)
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from None


def parse_recipe(raw: Mapping[str, Any]) -> Recipe:
    """Returns the recipe of parsed TOML.

    Raises:
      ValueError: as `load_recipe`.
    """
    return _parse_dataclass(Recipe, raw, "")


def recipe_names() -> list[str]:
    """Returns the names of the recipes that the package contains."""
    return sorted(p.stem for p in RECIPES_FOLDER.glob("*.toml"))


def recipe_to_dict(recipe: Recipe) -> dict[str, Any]:
    """Returns the recipe as JSON and TOML can hold it; inverse of `parse_recipe`."""

    def to_plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {k: to_plain(v) for k, v in value.items() if v is not None}
        return [to_plain(v) for v in value] if isinstance(value, list | tuple) else value

    return to_plain(dataclasses.asdict(recipe))


def _parse_dataclass(cls: type, raw: Any, prefix: str) -> Any:
    if not isinstance(raw, Mapping):
        raise ValueError(f"{prefix or 'recipe'}: found {raw!r}, expected a table")
    hints, values = typing.get_type_hints(cls), {}
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key, value in raw.items():
        if key not in fields:
            raise ValueError(f"{prefix}{key}: unknown key{nearest_name_hint(key, fields)}")
        values[key] = _parse_value(hints[key], value, prefix + key)
    missing = [
        name
        for name, f in fields.items()
        if name not in values
        and f.default is dataclasses.MISSING
        and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ValueError(f"{prefix}{missing[0]}: missing")
    return cls(**values)


def _parse_value(hint: Any, value: Any, key: str) -> Any:
    """Returns the value of a key, converted to its type hint."""
    if dataclasses.is_dataclass(hint):
        return _parse_dataclass(typing.cast(type, hint), value, f"{key}.")
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple:
        if not isinstance(value, list):
            raise ValueError(f"{key}: found {value!r}, expected a list of tables")
        return tuple(_parse_dataclass(args[0], v, f"{key}.{i}.") for i, v in enumerate(value))
    if origin is Literal:
        if value not in args:
            raise ValueError(f"{key}: found {value!r}, expected one of {', '.join(args)}")
        return value
    options = args if origin is types.UnionType else (origin or hint,)
    if float in options and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    valid = [t for t in options if isinstance(t, type)]
    # A bool is an int to Python, but not to a recipe.
    is_valid = isinstance(value, tuple(valid)) and (not isinstance(value, bool) or bool in valid)
    if not is_valid:
        expected = " or ".join(t.__name__ for t in options if t is not types.NoneType)
        raise ValueError(f"{key}: found {value!r}, expected {expected}")
    return value


def _apply_override(raw: dict[str, Any], text: str) -> None:
    key, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"--set {text}: expected section.key=value")
    try:
        parsed = tomllib.loads(f"x = {value}")["x"]
    except tomllib.TOMLDecodeError:
        parsed = value
    node: Any = raw
    *path, last = key.strip().split(".")
    for name in path:
        if isinstance(node, list):
            if not name.isdigit() or int(name) >= len(node):
                raise ValueError(f"--set {text}: there are phases 0 to {len(node) - 1}")
            node = node[int(name)]
        else:
            node = node.setdefault(name, {})
    if not isinstance(node, dict):
        raise ValueError(f"--set {text}: {key} is not a key of a table")
    node[last] = parsed
