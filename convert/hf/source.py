"""Opening of Hugging Face checkpoints: configuration, tensors and tokenizer files.

Opening reads only the headers of the weight files, so it is cheap for any size, and makes every
check that needs no tensor data.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from types import MappingProxyType

import numpy as np

from btlm_jax.checkpoint import zarr
from btlm_jax.checkpoint.assets import ASSET_NAMES
from btlm_jax.checkpoint.orbax_metadata import MARKER_FILE
from btlm_jax.convert.hf.advice import REDOWNLOAD
from btlm_jax.convert.hf.byte_ranges import contiguous_runs, file_identity, read_into
from btlm_jax.convert.hf.foreign_files import (
    describe_content,
    describe_foreign_bytes,
    describe_foreign_files,
)
from btlm_jax.convert.hf.headers import (
    TensorInfo,
    check_index,
    read_safetensors_header,
    read_torch_header,
)
from btlm_jax.convert.hf.hub import fetch_from_hub, is_hub_id
from btlm_jax.convert.hf.json_objects import read_json_object
from btlm_jax.convert.hf.torch_pickle import TorchFile
from btlm_jax.convert.hf.weight_files import WEIGHT_FORMS, check_file, find_weight_files
from btlm_jax.utils.local_paths import local_path

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class HFSource:
    """An opened checkpoint. Only `read_tensor` and `blocks` read tensor data.

    Attributes:
      directory: the directory of the files.
      config: the content of `config.json`.
      tensors: name -> `TensorInfo`, from the headers of the files. After `open_model` the name
        may differ from `TensorInfo.name`, which stays the one in the file.
      assets: those of `ASSET_NAMES` (tokenizer and generation files) that are present.
      description: the form of the weights for logs, such as "safetensors, 2 shards".
      identities: size and modification time of every weight file when it was opened.
      aliases: names that safetensors' `save_model` left out -> name of the tensor that they shared.
      revision: the commit on the Hub that was fetched; None for a directory.
    """

    directory: Path
    config: dict
    tensors: Mapping[str, TensorInfo]
    assets: tuple[Path, ...]
    description: str
    identities: Mapping[Path, tuple[int, int]]
    aliases: Mapping[str, str] = field(default_factory=dict)
    revision: str | None = None
    _torch_files: Mapping[Path, TorchFile] = field(default_factory=dict, repr=False, compare=False)

    def blocks(self, name: str, size: int) -> Iterator[np.ndarray]:
        """Yields a tensor's elements in C order, in 1-D arrays of `size` (the last may be shorter).

        Raises:
          KeyError: the checkpoint has no tensor of this name.
          ValueError: the file ends early, has changed since it was opened, or its bytes do not
            match the archive's checksum (which is known after the last block).
        """
        info = self._info(name)
        if info.offset is None:
            with self._open(info):  # checks that the file is unchanged
                flat = self._torch_files[info.file].read_tensor(info.name).reshape(-1)
            yield from zarr.split_blocks(flat, size)
            return
        crc32, itemsize = 0, info.dtype.itemsize
        with self._open(info) as file:
            for start in range(0, info.size, size):
                block = np.empty(min(size, info.size - start), info.dtype)
                read_into(file, info.offset + start * itemsize, block)
                if info.crc32 is not None:
                    crc32 = zlib.crc32(block.view(np.uint8).data, crc32)
                yield block
        if info.crc32 is not None and crc32 != info.crc32:
            raise ValueError(
                f"{info.file}: tensor {name!r}: checksum mismatch: the bytes are damaged. "
                f"{REDOWNLOAD}"
            )

    def read_tensor(
        self,
        name: str,
        index: tuple[slice, ...] | None = None,
        shape: tuple[int, ...] | None = None,
    ) -> np.ndarray:
        """Reads a tensor or a part of it, and no other bytes of the file.

        Args:
          name: name of the tensor.
          index: a slice of step 1 for every axis; None reads the whole tensor.
          shape: another shape with as many elements, to which `index` refers; default its own.

        Returns:
          A C-contiguous array.

        Raises:
          KeyError: the checkpoint has no tensor of this name.
          ValueError: the file is damaged, or has changed since it was opened.
        """
        info = self._info(name)
        shape = info.shape if shape is None else shape
        if index is None or all(
            i.indices(n) == (0, n, 1) for i, n in zip(index, shape, strict=True)
        ):  # by blocks, which checks the checksum
            blocks = self.blocks(name, zarr.BLOCK_BYTES // info.dtype.itemsize)
            return zarr.join_blocks(blocks, shape, info.dtype)
        if info.offset is None:
            return np.ascontiguousarray(self.read_tensor(name, None, shape)[index])
        out = np.empty([len(range(n)[i]) for n, i in zip(shape, index, strict=True)], info.dtype)
        flat, filled, itemsize = out.reshape(-1), 0, info.dtype.itemsize
        with self._open(info) as file:
            for start, length in contiguous_runs(shape, index):
                part = flat[filled : filled + length]
                read_into(file, info.offset + start * itemsize, part)
                filled += length
        return out

    def _info(self, name: str) -> TensorInfo:
        if name not in self.tensors:
            raise KeyError(f"{self.directory} holds no tensor {name!r}")
        return self.tensors[name]

    def _open(self, info: TensorInfo) -> FileIO:
        file = info.file.open("rb", buffering=0)
        if file_identity(info.file) != self.identities[info.file]:
            file.close()
            raise ValueError(
                f"{info.file} has changed since it was opened. Fix: do not write to it meanwhile."
            )
        return file


def open_hf(source: str | os.PathLike[str], *, revision: str | None = None) -> HFSource:
    """Opens a checkpoint directory, or fetches a model from the Hugging Face Hub and opens it.

    Args:
      source: a directory (or its file:// URL); or, as a string, a Hub id such as
        "cerebras/btlm-3b-8k-base" if no file or directory has that name.
      revision: branch, tag or commit on the Hub; None for its default branch.

    Raises:
      FileNotFoundError: the directory or model does not exist, or a file is missing.
      ConnectionError: the Hub cannot be reached and its cache has no copy.
      PermissionError: a file may not be read.
      ValueError: a file is damaged, contradicts another, or uses an unsupported dtype; or
        `revision` is given for a local directory.
    """
    path = local_path(source, "source")
    if path.is_dir():
        if revision is not None:
            raise ValueError(
                f"revision={revision!r} was given with the local directory {path}, which has no "
                "revisions. Fix: omit it, or name a Hub id."
            )
        return _open_directory(path)
    if path.exists():
        wrong = describe_foreign_bytes(_first_bytes(path))
        raise FileNotFoundError(
            f"{path} {wrong}"
            if wrong
            else f"{path} is a file, expected a checkpoint directory. Fix: pass {path.parent}"
        )
    if path.is_symlink():
        check_file(path)
    if isinstance(source, str) and is_hub_id(source):
        names = ("config.json", *ASSET_NAMES)
        snapshot = fetch_from_hub(source, revision, names, [f.main for f in WEIGHT_FORMS])
        # The Hub's cache names a snapshot by its commit.
        return dataclasses.replace(_open_directory(snapshot), revision=snapshot.name)
    raise FileNotFoundError(
        f"no directory {path.absolute()}. Fix: pass an existing checkpoint directory, or a Hub id "
        'like "cerebras/btlm-3b-8k-base".'
    )


def _first_bytes(file: Path) -> bytes:
    with file.open("rb") as opened:
        return opened.read(512)


def _open_directory(directory: Path) -> HFSource:
    try:
        return _open_files(directory)
    except PermissionError as error:
        raise PermissionError(
            f"no permission to read {error.filename or directory}. Fix: chmod or chown it, or run "
            "as a user who may read it."
        ) from None


def _open_files(directory: Path) -> HFSource:
    names = {p.name for p in directory.iterdir()}
    config_file = directory / "config.json"
    if config_file.name not in names:
        if foreign := describe_foreign_files(directory):
            raise FileNotFoundError(f"{directory} {foreign}")
        raise FileNotFoundError(
            f"{config_file} is missing; {describe_content(directory)}. Fix: pass the directory of "
            "a Hugging Face checkpoint, which has config.json next to the weights."
        )
    check_file(config_file)
    config = read_json_object(config_file)
    form, main, files, weight_map = find_weight_files(directory, config)
    if MARKER_FILE in names:
        raise ValueError(
            f"{directory} holds both an Orbax checkpoint ({MARKER_FILE}) and Hugging Face weights "
            f"({main.name}). Fix: move one of them to a directory of its own."
        )
    identities = {f: file_identity(f) for f in files}
    torch_files = {f: TorchFile(f) for f in files} if form.kind == "torch .bin" else {}
    headers: dict[Path, dict[str, TensorInfo]] = {}
    free_text: dict[str, str] = {}
    for file in files:
        if file in torch_files:
            headers[file] = read_torch_header(torch_files[file])
        else:
            headers[file], text = read_safetensors_header(file)
            free_text |= text
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
        assets=tuple(directory / n for n in ASSET_NAMES if n in names),
        description=form.kind + shards,
        identities=MappingProxyType(identities),
        aliases=MappingProxyType(
            {n: kept for n, kept in free_text.items() if kept in tensors and n not in tensors}
        ),
        _torch_files=MappingProxyType(torch_files),
    )
    for asset in source.assets:
        check_file(asset)
        if wrong := describe_foreign_bytes(_first_bytes(asset)):
            raise ValueError(f"{asset} {wrong}")
        if asset.suffix == ".json" and asset.name not in ("tokenizer.json", "vocab.json"):
            read_json_object(asset)
    logger.info("opened %s: %s, %d tensors", directory, source.description, len(tensors))
    return source
