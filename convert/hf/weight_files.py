"""The weight files of a Hugging Face directory, chosen among several as transformers does.

`model.safetensors` comes before its index, and safetensors before `pytorch_model.bin`. Whatever is
not read is named, because it may be the file that its owner meant.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from btlm_jax.convert.hf.advice import REDOWNLOAD
from btlm_jax.convert.hf.foreign_files import describe_content, describe_foreign_files
from btlm_jax.convert.hf.json_objects import read_json_object
from btlm_jax.utils.format import join_first

logger = logging.getLogger(__name__)

_KEY = "transformers_weights"  # the key of config.json that names another main file


class WeightForm(NamedTuple):
    """A file layout of the weights, recognized by the name of its main file."""

    main: str
    sharded: bool
    kind: str


# In transformers' order of preference.
WEIGHT_FORMS = (
    WeightForm("model.safetensors", False, "safetensors"),
    WeightForm("model.safetensors.index.json", True, "safetensors"),
    WeightForm("pytorch_model.bin", False, "torch .bin"),
    WeightForm("pytorch_model.bin.index.json", True, "torch .bin"),
)
_SHARD = re.compile(r"(model|pytorch_model)-(\d+)-of-(\d+)\.(safetensors|bin)")
# As `save_pretrained(variant="fp16")` names files.
_VARIANT = re.compile(
    r"(?:model|pytorch_model)(?:\.index)?\.[\w-]+\.(?:safetensors|bin)|"
    r"(?:model\.safetensors|pytorch_model\.bin)\.index\.[\w-]+\.json"
)


class WeightFiles(NamedTuple):
    """The weight files to read.

    Attributes:
      form: their layout.
      main: the file with all tensors, or the index over the shards.
      files: the files with tensors.
      weight_map: tensor name -> file name, from the index; None without an index.
    """

    form: WeightForm
    main: Path
    files: list[Path]
    weight_map: dict[str, str] | None


def find_weight_files(directory: Path, config: Mapping[str, Any]) -> WeightFiles:
    """Chooses the weight files of a directory, and warns of those that are not read.

    Args:
      directory: a directory with config.json.
      config: its content; `transformers_weights` names another main file.

    Raises:
      FileNotFoundError: there are none, or an index names shards that are missing, or a link leads
        nowhere.
      ValueError: the index is damaged, or names files outside the directory.
    """
    forms = _named_form(config) or WEIGHT_FORMS
    names = {p.name for p in directory.iterdir()}
    form = next((f for f in forms if f.main in names), None)
    if form is None:
        raise FileNotFoundError(_explain_absence(directory, names, forms))
    main = directory / form.main
    check_file(main)
    weight_map = _read_weight_map(main) if form.sharded else None
    shards = sorted(set(weight_map.values())) if weight_map is not None else [form.main]
    missing = [n for n in shards if n not in names]
    if missing:
        raise FileNotFoundError(_explain_missing_shards(main, missing, names))
    files = [directory / n for n in shards]
    for file in files:
        check_file(file)
    mains = {f.main for f in WEIGHT_FORMS}
    ignored = sorted(n for n in names - {form.main, *shards} if n in mains or _SHARD.fullmatch(n))
    if ignored:
        logger.warning(
            "%s: reads %s, as transformers does, and ignores %s",
            directory,
            form.main,
            join_first(ignored),
        )
    return WeightFiles(form, main, files, weight_map)


def _named_form(config: Mapping[str, Any]) -> tuple[WeightForm] | None:
    """Returns the form that config.json names, if it names one."""
    name = config.get(_KEY)
    if name is None:
        return None
    if not _is_plain_name(name) or not name.endswith((".safetensors", ".safetensors.index.json")):
        raise ValueError(
            f"config.json: {_KEY}: found {name!r}, expected the name of a .safetensors file or its "
            "index beside config.json. Fix: correct or remove it."
        )
    return (WeightForm(name, name.endswith(".index.json"), "safetensors"),)


def check_file(file: Path) -> None:
    """Checks that a name in a directory is a file that exists.

    Raises:
      FileNotFoundError: it is a link that leads nowhere, or a directory.
    """
    if file.is_file():
        return
    if file.is_symlink():
        raise FileNotFoundError(
            f"{file} is a link to {file.readlink()}, which does not exist (an interrupted download "
            "or a copy of links only). Fix: download the file, or copy with cp -L."
        )
    if file.is_dir():
        raise FileNotFoundError(f"{file} is a directory, expected a file. {REDOWNLOAD}")
    raise FileNotFoundError(f"{file} is missing. {REDOWNLOAD}")


def _explain_absence(directory: Path, names: set[str], forms: tuple[WeightForm, ...]) -> str:
    """Returns the error for a directory in which no main file of the weights exists."""
    if foreign := describe_foreign_files(directory):
        return f"{directory} {foreign}"
    shards = [m for m in map(_SHARD.fullmatch, sorted(names)) if m]
    if shards:
        first = shards[0]
        stem, suffix, total = first[1], first[4], int(first[3])
        present = {int(m[2]) for m in shards if m[1] == stem and m[4] == suffix}
        absent = [
            f"{stem}-{i:05d}-of-{total:05d}.{suffix}"
            for i in range(1, min(total, 999) + 1)
            if i not in present
        ]
        index = f"{stem}.{suffix}.index.json"
        also = f", nor {join_first(absent, 3)}" if absent else ""
        fix = f"download {index}{' and the missing shards' if absent else ''}"
        if total == 1:
            fix = f"rename it to {stem}.{suffix}"
        return f"{directory} holds {first[0]} but not its index {index}{also}. Fix: {fix}."
    if variants := [n for n in sorted(names) if _VARIANT.fullmatch(n)]:
        return (
            f"{directory} holds a variant of the weights only: {join_first(variants)}. Fix: remove "
            "the variant from the names (model.fp16.safetensors -> model.safetensors)."
        )
    if others := sorted(n for n in names if n.endswith((".safetensors", ".bin"))):
        return (
            f"{directory} holds {join_first(others)}, and none of the names that transformers "
            f"knows: {', '.join(f.main for f in forms)}. Fix: rename the model's weights."
        )
    return (
        f"{directory} has no weights; {describe_content(directory)}. Expected one of "
        f"{', '.join(f.main for f in forms)}. Fix: download the weights as well."
    )


def _explain_missing_shards(main: Path, missing: list[str], names: set[str]) -> str:
    others = [f.main for f in WEIGHT_FORMS if f.main in names and f.main != main.name]
    other = f" Or remove the index, to read {others[0]}." if others else ""
    return (
        f"{main.parent} lacks {len(missing)} shard(s) that {main.name} names: "
        f"{join_first(missing)}. Fix: download them into that directory.{other}"
    )


def _read_weight_map(index: Path) -> dict[str, str]:
    """Reads the index over shards. Returns tensor name -> file name of the shard."""
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(
            f"{index}: 'weight_map' is {type(weight_map).__name__}, expected a non-empty object "
            f"of tensor name -> file name. {REDOWNLOAD}"
        )
    invalid = [repr(v) for v in weight_map.values() if not _is_plain_name(v)]
    if invalid:
        raise ValueError(
            f"{index}: weight_map leads to {join_first(sorted(set(invalid)))}, expected plain "
            "names of files beside the index. Fix: download it again, or do not use it."
        )
    return weight_map


def _is_plain_name(value: object) -> bool:
    if not isinstance(value, str) or value in ("", ".", ".."):
        return False
    # 255 bytes is the longest name of common file systems.
    return len(value.encode(errors="replace")) <= 255 and not any(c in value for c in "/\\:\0")
