"""Writes random Hugging Face checkpoints in every file format, without torch, in little memory."""

from __future__ import annotations

import dataclasses
import itertools
import json
import pickle
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from btlm_jax import __version__
from btlm_jax.checkpoint import zarr
from btlm_jax.config import BTLMConfig
from btlm_jax.convert.hf.safetensors_writer import SafetensorsFile, TensorSpec
from btlm_jax.convert.hf.tensor_names import EMBEDDING, LM_HEAD, SLOPES
from btlm_jax.model import alibi, weights
from btlm_jax.utils.progress import Progress

Form = Literal["safetensors", "safetensors-sharded", "bin", "bin-sharded"]
FORMS: tuple[str, ...] = get_args(Form)
NUM_SHARDS = 3
_STORAGES = {"bfloat16": b"ctorch\nBFloat16Storage\n", "float32": b"ctorch\nFloatStorage\n"}
BF16 = zarr.BF16


def write_random_checkpoint(
    directory: Path, *, layers: int, form: str, preset: str = "btlm-3b-8k"
) -> int:
    """Writes a checkpoint with random bf16 weights.

    Args:
      directory: a new directory.
      layers: replaces the preset's number of layers.
      form: one of `FORMS`. A `.bin` also holds the tied head, like the published one.
      preset: preset of the model.

    Returns:
      The bytes of the weights.
    """
    config = dataclasses.replace(BTLMConfig.preset(preset), n_layer=layers)
    directory.mkdir(parents=True)
    values = config.to_hf() | {"torch_dtype": "bfloat16"}
    (directory / "config.json").write_text(json.dumps(values, indent=2))
    tensors = [TensorSpec(x.hf_name, BF16, x.weight.hf_shape) for x in weights.disk_leaves(config)]
    tensors.append(TensorSpec(SLOPES, BF16, (config.n_head, 1)))
    count = NUM_SHARDS if form.endswith("sharded") else 1
    binary = form.startswith("bin")
    stem, suffix = ("pytorch_model", ".bin") if binary else ("model", ".safetensors")
    edges = [len(tensors) * i // count for i in range(count + 1)]
    shards = [tensors[a:b] for a, b in itertools.pairwise(edges)]
    names = [f"{stem}-{i + 1:05d}-of-{count:05d}{suffix}" for i in range(count)]
    names = names if count > 1 else [f"{stem}{suffix}"]
    total = sum(t.nbytes for t in tensors)
    slopes = alibi.slopes(config.n_head).astype(BF16)
    with Progress(total, "B", "write") as progress:

        def content(tensor: TensorSpec) -> Iterator[np.ndarray]:
            blocks = [slopes] if tensor.name == SLOPES else _random(tensor)
            for block in blocks:
                yield block
                progress.update(block.nbytes)

        for name, shard in zip(names, shards, strict=True):
            (write_bin if binary else _write_safetensors)(directory / name, shard, content)
    if count > 1:
        weight_map = {t.name: n for n, shard in zip(names, shards, strict=True) for t in shard}
        if binary:
            weight_map[LM_HEAD] = weight_map[EMBEDDING]
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / f"{stem}{suffix}.index.json").write_text(json.dumps(index))
    return total


def _random(tensor: TensorSpec) -> Iterator[np.ndarray]:
    """Yields blocks of normal values, drawn once and rolled, so that no two rows are equal."""
    size, remaining = zarr.BLOCK_BYTES // 2, tensor.nbytes // 2
    rng = np.random.default_rng(zlib.crc32(tensor.name.encode()))
    values = (rng.standard_normal(min(size, remaining), np.float32) * 0.02).astype(BF16)
    while remaining:
        n = min(size, remaining)
        yield np.roll(values, int(rng.integers(len(values))))[:n]
        remaining -= n


def _write_safetensors(path: Path, shard: list[TensorSpec], content) -> None:
    file = SafetensorsFile(path, shard, __version__)
    file.finish({t.name: file.write(t.name, content(t)).sha256 for t in shard})


def write_bin(path: Path, shard: list[TensorSpec], content, *, tied: bool = True) -> None:
    """Writes a zip like `torch.save`: a pickle that describes the tensors, and a member for each.

    Args:
      path: the file.
      shard: the tensors.
      content: yields the blocks of a tensor.
      tied: the embedding occurs a second time in the pickle, as the head.
    """
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", _pickled(shard, tied))
        archive.writestr("archive/byteorder", "little")
        for key, tensor in enumerate(shard):
            with archive.open(f"archive/data/{key}", "w", force_zip64=True) as member:
                for block in content(tensor):
                    member.write(block.view(np.uint8).data)
        archive.writestr("archive/version", "3\n")


def _pickled(shard: list[TensorSpec], tied: bool) -> bytes:
    """Returns the pickle (protocol 2, as torch writes) of an OrderedDict of tensors.

    It is written opcode by opcode, because `pickle` would need torch to name its types.
    """
    opcodes = [b"\x80\x02", b"ccollections\nOrderedDict\n", b")R", b"("]
    entries = list(enumerate(shard))
    entries += [
        (key, t._replace(name=LM_HEAD)) for key, t in entries if tied and t.name == EMBEDDING
    ]
    for key, tensor in entries:
        numel = tensor.nbytes // tensor.dtype.itemsize
        strides = [int(np.prod(tensor.shape[i + 1 :])) for i in range(len(tensor.shape))]
        opcodes += [_text(tensor.name), b"ctorch._utils\n_rebuild_tensor_v2\n", b"("]
        opcodes += [b"(", _text("storage"), _STORAGES[tensor.dtype.name], _text(str(key))]
        opcodes += [_text("cpu"), _int(numel), b"t", b"Q"]
        opcodes += [_int(0), b"(", *map(_int, tensor.shape), b"t", b"(", *map(_int, strides), b"t"]
        opcodes += [b"\x89", b"ccollections\nOrderedDict\n", b")R", b"t", b"R"]
    return b"".join([*opcodes, b"u", b"."])


def _text(value: str) -> bytes:
    data = value.encode()
    return b"X" + len(data).to_bytes(4, "little") + data


def _int(value: int) -> bytes:
    return pickle.dumps(value, 2)[2:-1]
