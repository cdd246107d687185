"""Open a Hugging Face checkpoint: its config, its tensors (headers only) and its tokenizer files.

Nothing but headers is read until `HFSource.read` asks for a tensor, so opening is cheap however
large the checkpoint is. Every check that needs no tensor data is made on opening.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from btlm_jax.tokenizer import ASSETS

from .hf_hub import fetch, is_hub_id
from .torch_pickle import TorchFile
from .weight_files import (
    REDOWNLOAD,
    TensorInfo,
    check_index,
    load_json,
    safetensors_header,
    torch_header,
    weight_map_of,
)

_log = logging.getLogger(__name__)


class WeightForm(NamedTuple):
    """One way in which a checkpoint keeps its weights, known by the name of its main file."""

    main: str
    sharded: bool
    kind: str


# In order of preference: safetensors needs no pickle, and an index knows of all its shards.
WEIGHT_FORMS = (
    WeightForm("model.safetensors.index.json", True, "safetensors"),
    WeightForm("model.safetensors", False, "safetensors"),
    WeightForm("pytorch_model.bin.index.json", True, "torch .bin"),
    WeightForm("pytorch_model.bin", False, "torch .bin"),
)


@dataclass(frozen=True)
class HFSource:
    """An opened checkpoint. Only `read` touches tensor data.

    Attributes:
        directory: where the files lie.
        config: `config.json`, parsed.
        tensors: name -> `TensorInfo`, from the files' headers.
        assets: those of `ASSETS` (tokenizer and generation files) that are present.
        description: the form of the weights for logs, e.g. `"safetensors, 2 shards"`.
    """

    directory: Path
    config: dict
    tensors: Mapping[str, TensorInfo]
    assets: tuple[Path, ...]
    description: str
    _torch_files: Mapping[Path, TorchFile] = field(default_factory=dict, repr=False, compare=False)

    def read(self, name: str) -> np.ndarray:
        """Read one tensor.

        Returns:
            A C-contiguous array with the shape and dtype of `tensors[name]`.

        Raises:
            KeyError: the checkpoint has no tensor of this name.
            ValueError: the file is damaged, or is not the one that was opened.
        """
        if name not in self.tensors:
            raise KeyError(f"{self.directory} holds no tensor {name!r}")
        info = self.tensors[name]
        if info.file in self._torch_files:
            return self._torch_files[info.file].read(name)
        try:
            with safe_open(info.file, framework="numpy") as file:
                array = np.asarray(file.get_tensor(name), order="C")
        except SafetensorError as error:
            raise ValueError(f"{info.file}: tensor {name!r}: {error}. {REDOWNLOAD}") from None
        if array.shape != info.shape or array.dtype != info.dtype:
            raise ValueError(
                f"{info.file}: tensor {name!r} is now {array.dtype}{array.shape}, but was "
                f"{info.dtype}{info.shape} on opening. Fix: leave the file alone meanwhile."
            )
        return array


def open_hf(source: str | Path, *, revision: str | None = None) -> HFSource:
    """Open a checkpoint directory, or fetch a model from the Hugging Face Hub and open that.

    Args:
        source: a directory; or, given as a string, a Hub id such as
            `"cerebras/btlm-3b-8k-base"` when no file or directory has that name.
        revision: branch, tag or commit on the Hub; None means its default branch.

    Raises:
        FileNotFoundError: no such directory or model, or a file of it is missing.
        ConnectionError: the Hub cannot be reached and holds no local copy.
        ValueError: a file is damaged, contradicts another, or uses an unsupported dtype; or
            `revision` is given for a local directory.
    """
    path = Path(source)
    if path.is_dir():
        if revision is not None:
            raise ValueError(
                f"revision={revision!r} was given with the local directory {path}, which has no "
                "revisions. Fix: drop it, or name a Hub id."
            )
        return _open_directory(path)
    if path.exists():
        raise FileNotFoundError(
            f"{path} is a file, expected a checkpoint directory. Fix: pass {path.parent}"
        )
    if isinstance(source, str) and is_hub_id(source):
        names = ("config.json", *ASSETS)
        return _open_directory(fetch(source, revision, names, [f.main for f in WEIGHT_FORMS]))
    raise FileNotFoundError(
        f"no directory {path.absolute()}. Fix: pass an existing checkpoint directory, or a Hub id "
        'like "cerebras/btlm-3b-8k-base".'
    )


def _open_directory(directory: Path) -> HFSource:
    config_file = directory / "config.json"
    if not config_file.is_file():
        raise FileNotFoundError(
            f"{config_file} is missing; {_holds(directory)}. Fix: pass the directory of a Hugging "
            "Face checkpoint, which has config.json next to the weights."
        )
    config = load_json(config_file)
    form = next((f for f in WEIGHT_FORMS if (directory / f.main).is_file()), None)
    if form is None:
        raise FileNotFoundError(
            f"{directory} has no weights; {_holds(directory)}. Expected one of "
            f"{', '.join(f.main for f in WEIGHT_FORMS)}. Fix: download the weights as well."
        )
    main = directory / form.main
    weight_map = weight_map_of(main) if form.sharded else None
    files = [directory / n for n in sorted(set(weight_map.values()))] if weight_map else [main]
    torch_files = {f: TorchFile(f) for f in files} if form.kind == "torch .bin" else {}
    headers = {
        f: torch_header(torch_files[f]) if f in torch_files else safetensors_header(f)
        for f in files
    }
    if weight_map is not None:
        check_index(main, weight_map, headers)
    tensors = {name: info for header in headers.values() for name, info in header.items()}
    if not tensors:
        raise ValueError(f"{main} holds no tensors. {REDOWNLOAD}")
    shards = f", {len(files)} shard{'s' * (len(files) != 1)}" if form.sharded else ""
    source = HFSource(
        directory=directory,
        config=config,
        tensors=MappingProxyType(tensors),
        assets=tuple(directory / n for n in ASSETS if (directory / n).is_file()),
        description=form.kind + shards,
        _torch_files=MappingProxyType(torch_files),
    )
    _log.info("opened %s: %s, %d tensors", directory, source.description, len(tensors))
    return source


def _holds(directory: Path) -> str:
    names = sorted(p.name for p in directory.iterdir())
    listed = ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
    return f"it holds {listed}" if names else "it is empty"
