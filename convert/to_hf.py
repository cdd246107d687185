"""Orbax -> Hugging Face: a directory that transformers loads with the original modelling code."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from btlm_jax import __version__, alibi, checkpoint, staging, weights
from btlm_jax.config import BTLMConfig
from btlm_jax.progress import Progress

from .to_orbax import SLOPES

logger = logging.getLogger(__name__)

_WRITER = "btlm_jax"  # an entry in the safetensors metadata of our exports


class Report(NamedTuple):
    """What an export did."""

    tensors: int
    nbytes: int
    files: tuple[str, ...]


def export(
    source: str | Path,
    target: str | Path,
    *,
    max_shard_bytes: int = 1 << 30,
    overwrite: bool = False,
) -> Report:
    """Exports an Orbax checkpoint to a Hugging Face directory, without loss.

    Writes safetensors (with an index if there is more than one file), `config.json` and the
    tokenizer files. Every array keeps its dtype and its bits. A tied head is left out, as
    safetensors wants it; the ALiBi slopes are written in the dtype they were stored in. The
    `config.json` of a converted checkpoint comes back as it was, key flavour included.

    Args:
      source: a checkpoint directory.
      target: a directory that does not exist yet.
      max_shard_bytes: of one safetensors file; also about what is held in memory.
      overwrite: replace an existing export.

    Raises:
      FileNotFoundError, ValueError: the source is not a checkpoint; see `checkpoint.load`.
      FileExistsError: the target exists.
    """
    meta = checkpoint.read_metadata(source)
    with staging.new_directory(target, overwrite=overwrite, ours=is_ours) as stage:
        stage.mkdir()
        return _write(source, meta, stage, max_shard_bytes)


def is_ours(path: Path) -> bool:
    """Whether a directory is an export we wrote: every weight file says so."""
    files = list(path.glob("*.safetensors"))
    try:
        return bool(files) and all(_WRITER in safe_open(f, "np").metadata() for f in files)
    except (SafetensorError, TypeError):
        return False


def _write(source, meta: checkpoint.Metadata, stage: Path, max_shard_bytes: int) -> Report:
    (stage / "config.json").write_text(json.dumps(hf_config(meta), indent=2) + "\n")
    for file in checkpoint.assets_of(source):
        shutil.copyfile(file, stage / file.name)
    _mention_missing_code(stage)
    slopes = slopes_tensor(meta).nbytes if meta.config.alibi else 0
    written: list[list[str]] = []  # the tensor names of every shard
    total = 0
    with Progress(meta.nbytes + slopes, "B", "export") as progress:
        for shard in _shards(_tensors(source, meta), max_shard_bytes):
            file = stage / f"shard-{len(written)}"
            save_file(shard, file, metadata={"format": "pt", _WRITER: __version__})
            nbytes = sum(array.nbytes for array in shard.values())
            total += nbytes
            written.append(list(shard))
            progress.update(nbytes)
    names = _name_shards(stage, written, total)
    return Report(sum(map(len, written)), total, tuple(names))


def _shards(tensors: Iterable[tuple[str, np.ndarray]], max_bytes: int):
    """Groups tensors, in order, into dicts of at most `max_bytes` (or of one larger tensor)."""
    shard: dict[str, np.ndarray] = {}
    size = 0
    for name, array in tensors:
        if shard and size + array.nbytes > max_bytes:
            yield shard
            shard, size = {}, 0
        shard[name] = array
        size += array.nbytes
    yield shard


def _mention_missing_code(stage: Path) -> None:
    """Says which modelling code a config.json names that is not in the directory."""
    named = json.loads((stage / "config.json").read_text()).get("auto_map", {}).values()
    local = {f"{entry.split('.')[0]}.py" for entry in named if "--" not in entry}
    missing = sorted(name for name in local if not (stage / name).is_file())
    if missing:
        logger.info(
            "config.json names %s: copy them from the original model into the export before "
            "loading it with transformers",
            " and ".join(missing),
        )


def _name_shards(stage: Path, written: list[list[str]], total: int) -> list[str]:
    """Gives the shards their final names, and writes the index if there are several."""
    if len(written) == 1:
        (stage / "shard-0").rename(stage / "model.safetensors")
        return ["model.safetensors"]
    names, weight_map = [], {}
    for i, tensors in enumerate(written):
        name = f"model-{i + 1:05d}-of-{len(written):05d}.safetensors"
        (stage / f"shard-{i}").rename(stage / name)
        names.append(name)
        weight_map.update(dict.fromkeys(tensors, name))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (stage / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return names


def _tensors(source, meta: checkpoint.Metadata):
    """Yields every tensor under its Hugging Face name, one layer in memory at a time."""
    for group in checkpoint.by_layer(meta.config):
        arrays = checkpoint.read_leaves(source, group)
        for leaf in group:
            yield leaf.hf_name, arrays[leaf.path].reshape(leaf.weight.hf_shape)
    if meta.config.alibi:
        yield SLOPES, slopes_tensor(meta)


def slopes_tensor(meta: checkpoint.Metadata) -> np.ndarray:
    """The slopes [H, 1], in the dtype they were read in, else the narrowest that holds them.

    Fresh models have exact slopes, written as fp32, in which the model uses them.
    """
    slopes = alibi.model_slopes(meta.config)[:, None]
    stored = meta.origin.get("slopes_dtype")
    candidates = [stored] if stored else ["bfloat16", "float32"]
    for name in candidates:
        out = slopes.astype(jnp.dtype(name))
        if np.array_equal(out.astype(np.float64), slopes):
            return out
    return slopes.astype(np.float32)


def hf_config(meta: checkpoint.Metadata) -> dict[str, Any]:
    """The `config.json`: the original one if it still describes the model, else a fresh one."""
    original = meta.origin.get("hf_config")
    plain = dataclasses.replace(meta.config, alibi_slopes=None)
    if original is not None and BTLMConfig.from_hf(original) == plain:
        return dict(original)
    dtypes = {str(meta.leaves[leaf.path].dtype) for leaf in weights.disk_leaves(meta.config)}
    dtype = dtypes.pop() if len(dtypes) == 1 else "float32"
    return plain.to_hf() | {"torch_dtype": dtype}
