"""Checkpoints of either format, opened for comparison tensor by tensor."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping

import numpy as np
from safetensors import safe_open

from btlm_jax.checkpoint import metadata, quantization, zarr
from btlm_jax.checkpoint.assets import asset_files
from btlm_jax.checkpoint.quantization import Quantization
from btlm_jax.config import BTLMConfig
from btlm_jax.convert import auto
from btlm_jax.convert.hf.safetensors_writer import SHA256_KEY
from btlm_jax.convert.hf.source import HFSource
from btlm_jax.convert.hf.source_config import open_model
from btlm_jax.convert.hf.tensor_names import SLOPES
from btlm_jax.model import weights


@dataclasses.dataclass(frozen=True)
class VerifiableCheckpoint:
    """A checkpoint of either format, as `verify` compares it.

    Attributes:
      name: the checkpoint as the user named it.
      config: the model, with its stored slopes.
      quantized: the quantization of its weights; None for floats.
      dtypes: dtype of every tensor, by Hugging Face name.
      blocks: yields a tensor in 1-D blocks. The second argument is the width in bytes of the
        elements for which the size of the blocks is chosen, so that blocks of two checkpoints with
        different dtypes hold the same elements.
      sha256: recorded SHA-256 of the tensors, by Hugging Face name.
      assets: contents of its tokenizer and other small files, by file name.
      asset_sha256: recorded SHA-256 of these files, by file name.
      other_sha256: further recorded hashes and functions that compute the present ones, by name: of
        the files that describe the arrays, or of ALiBi slopes that are stored as a tensor.
      largest_block: bytes of the largest block.
    """

    name: str
    config: BTLMConfig
    quantized: Quantization | None
    dtypes: Mapping[str, np.dtype]
    blocks: Callable[[weights.DiskLeaf, int], Iterator[np.ndarray]]
    sha256: Mapping[str, str]
    assets: Mapping[str, bytes]
    asset_sha256: Mapping[str, str]
    other_sha256: Mapping[str, tuple[str | None, Callable[[], str | None]]]
    largest_block: int = zarr.BLOCK_BYTES

    @property
    def disk_leaves(self) -> list[weights.DiskLeaf]:
        """Every stored tensor."""
        return list(quantization.stored_leaves(self.config, self.quantized))

    def nbytes(self, leaf: weights.DiskLeaf) -> int:
        """Returns the bytes of a tensor."""
        return math.prod(leaf.shape) * self.dtypes[leaf.hf_name].itemsize


def open_for_verification(source: metadata.PathLike) -> VerifiableCheckpoint:
    """Opens a checkpoint of either format.

    Args:
      source: an Orbax checkpoint (directory or URL), a Hugging Face directory, or a Hub id.

    Raises:
      FileNotFoundError, ConnectionError, ValueError: it does not exist or is not a checkpoint.
    """
    name = os.fspath(source)
    if auto.is_huggingface(source):
        return _open_huggingface(name, *open_model(source))
    meta = metadata.read_metadata(source)
    leaves = {leaf.hf_name: leaf for leaf in meta.disk_leaves}

    def hash_structure() -> str | None:
        return metadata.structure_sha256(meta.path, meta.leaves)

    return VerifiableCheckpoint(
        name=name,
        config=meta.config,
        quantized=meta.quantization,
        dtypes={n: np.dtype(meta.leaves[leaf.path].dtype) for n, leaf in leaves.items()},
        blocks=meta.blocks,
        sha256={n: meta.sha256[x.path] for n, x in leaves.items() if x.path in meta.sha256},
        assets={file.name: file.read_bytes() for file in asset_files(meta.path)},
        asset_sha256=meta.asset_sha256,
        other_sha256={"zarr.json, _METADATA": (meta.structure_sha256, hash_structure)},
        largest_block=meta.largest_block,
    )


def _open_huggingface(name: str, hf: HFSource, config: BTLMConfig) -> VerifiableCheckpoint:
    def blocks(leaf: weights.DiskLeaf, width: int) -> Iterator[np.ndarray]:
        return hf.blocks(leaf.hf_name, zarr.block_size(leaf.weight.shape, width))

    recorded: dict[str, str] = {}
    for file in {info.file for info in hf.tensors.values()}:
        if file.suffix == ".safetensors":
            with safe_open(file, "numpy") as opened:
                recorded |= json.loads((opened.metadata() or {}).get(SHA256_KEY, "{}"))

    def hash_slopes() -> str:
        return hashlib.sha256(hf.read_tensor(SLOPES).tobytes()).hexdigest()

    return VerifiableCheckpoint(
        name=name,
        config=config,
        quantized=None,
        dtypes={n: info.dtype for n, info in hf.tensors.items()},
        blocks=blocks,
        sha256=recorded,
        assets={file.name: file.read_bytes() for file in hf.assets},
        asset_sha256={},
        other_sha256={SLOPES: (recorded[SLOPES], hash_slopes)} if SLOPES in recorded else {},
    )
