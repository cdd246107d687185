"""Orbax -> Hugging Face: a directory that transformers loads with the original modelling code."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from etils import epath
from safetensors import SafetensorError, safe_open

from btlm_jax import __version__
from btlm_jax.checkpoint import metadata
from btlm_jax.checkpoint.assets import asset_files
from btlm_jax.convert.conversion_report import ConversionReport, weights_digest
from btlm_jax.convert.hf.export_config import config_json, generation_config
from btlm_jax.convert.hf.safetensors_writer import WRITER, SafetensorsFile, TensorSpec, plan_shards
from btlm_jax.convert.hf.tensor_names import SLOPES
from btlm_jax.convert.threads import for_each_in_threads, num_threads
from btlm_jax.model import alibi, weights
from btlm_jax.utils import atomic, paths
from btlm_jax.utils.format import DEFAULT_MEMORY
from btlm_jax.utils.process_memory import peak_rss
from btlm_jax.utils.progress import Progress

logger = logging.getLogger(__name__)

DEFAULT_SHARD = 5 * 10**9  # transformers' own
INDEX = "model.safetensors.index.json"


def export(
    source: metadata.PathLike,
    target: str | os.PathLike[str],
    *,
    max_shard_bytes: int = DEFAULT_SHARD,
    max_memory: int = DEFAULT_MEMORY,
    overwrite: bool = False,
) -> ConversionReport:
    """Exports an Orbax checkpoint to a Hugging Face directory, without loss.

    Writes safetensors (with an index if there is more than one file), `config.json`,
    `generation_config.json` and the tokenizer files. Every array keeps its dtype and its bits, and
    is checked against the SHA-256 that the checkpoint records. A tied head is left out, as
    safetensors wants it; the ALiBi slopes are written in the dtype they were stored in. The
    `config.json` of a converted checkpoint comes back as it was, key flavor included. Of a
    training checkpoint the weights are exported. An export that was killed or failed is continued
    by the same call.

    Args:
      source: a checkpoint directory or URL.
      target: a local directory that does not exist yet.
      max_shard_bytes: of one safetensors file.
      max_memory: bytes of weights in flight.
      overwrite: replace an existing export.

    Raises:
      FileNotFoundError, ValueError: the source is not a checkpoint, or damaged; the target is in an
        object store; the budget is below one block; the source is quantized; the model has
        CompleteP, which the original code cannot compute (`fold_completep` first).
      FileExistsError: the target exists.
      OSError: the disk is full or fails.
    """
    began = time.monotonic()
    if paths.is_remote(paths.location(target)):
        raise ValueError(
            f"{target}: an export is written to a local directory, from where it can be uploaded"
        )
    if max_shard_bytes <= 0:
        raise ValueError(f"max_shard_bytes: found {max_shard_bytes}, expected a positive number")
    atomic.refuse_existing(target, overwrite=overwrite, ours=is_ours)
    meta = metadata.read_metadata(source)
    if meta.quantization is not None:
        raise ValueError(
            f"{source} is quantized ({meta.quantization}), which the original code cannot read: "
            "export the checkpoint it was made from"
        )
    config = config_json(meta)
    threads = num_threads(max_memory, meta.largest_block)
    leaves = {leaf.hf_name: leaf for leaf in weights.disk_leaves(meta.config)}
    tensors = [
        TensorSpec(name, np.dtype(meta.leaves[leaf.path].dtype), leaf.weight.hf_shape)
        for name, leaf in leaves.items()
    ]
    slopes = slopes_tensor(meta) if meta.config.alibi else None
    if slopes is not None:
        tensors.append(TensorSpec(SLOPES, slopes.dtype, slopes.shape))
    shards = plan_shards(tensors, max_shard_bytes)
    names = _names(len(shards))
    key = _key(meta, names, shards)
    with atomic.new_directory(target, overwrite=overwrite, ours=is_ours, key=key) as stage:
        content = Path(stage.content)
        todo = [t for t in tensors if t.name not in stage.finished]
        total, left = (sum(t.nbytes for t in ts) for ts in (tensors, todo))
        atomic.require_space(target, left)
        files = {
            name: SafetensorsFile(content / name, shard, __version__)
            for name, shard in zip(names, shards, strict=True)
        }
        file_of = {t.name: files[n] for n, shard in zip(names, shards, strict=True) for t in shard}
        with Progress(total, "B", "export", done=total - left) as progress:

            def one(tensor: TensorSpec) -> None:
                name = tensor.name
                found: Iterable[np.ndarray] = (
                    [slopes.reshape(-1)] if slopes is not None and name == SLOPES
                    else meta.blocks(leaves[name])
                )  # fmt: skip

                def blocks() -> Iterator[np.ndarray]:
                    for block in found:
                        yield block
                        progress.update(block.nbytes)

                sha256 = file_of[name].write(name, blocks()).sha256
                recorded = meta.sha256.get(leaves[name].path) if name in leaves else None
                if recorded is not None and sha256 != recorded:
                    raise metadata.damaged_error(
                        meta.path, f"{name}: its bytes do not match the recorded SHA-256"
                    )
                stage.record(name, {"sha256": sha256})

            for_each_in_threads(todo, one, threads)
        sha256 = {t.name: stage.finished[t.name]["sha256"] for t in tensors}
        for file in files.values():
            file.finish(sha256)
        _small_files(meta, config, stage.content, names, shards)
    return ConversionReport(
        tensors=len(tensors),
        resumed=len(tensors) - len(todo),
        nbytes=total,
        dtypes=Counter(str(t.dtype) for t in tensors),
        seconds=time.monotonic() - began,
        peak_rss=peak_rss(),
        digest=weights_digest({name: sha256[name] for name in leaves}),
        files=tuple(names),
    )


def is_ours(path: metadata.PathLike) -> bool:
    """Whether a directory is an export we wrote: every weight file says so."""
    files = list(Path(path).glob("*.safetensors"))
    try:
        return bool(files) and all(WRITER in safe_open(f, "np").metadata() for f in files)
    except (SafetensorError, TypeError):
        return False


def _names(count: int) -> list[str]:
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]


def _key(
    meta: metadata.Metadata, names: list[str], shards: list[list[TensorSpec]]
) -> dict[str, Any]:
    """What must be the same for an interrupted export to be continued."""
    mark = (meta.path / metadata.MARKER_FILE).read_bytes()
    return {
        "by": f"export {__version__}",
        "checkpoint": hashlib.sha256(mark).hexdigest(),
        "shards": {n: [t.name for t in shard] for n, shard in zip(names, shards, strict=True)},
    }


def _small_files(
    meta: metadata.Metadata,
    config: dict[str, Any],
    content: epath.Path,
    names: list[str],
    shards: list[list[TensorSpec]],
) -> None:
    _write_json(content / "config.json", config)
    _write_json(content / "generation_config.json", generation_config(meta.config))
    for file in asset_files(meta.path):
        data = file.read_bytes()
        recorded = meta.asset_sha256.get(file.name)
        if recorded is not None and hashlib.sha256(data).hexdigest() != recorded:
            raise metadata.damaged_error(
                meta.path, f"{file.name} does not match the recorded SHA-256"
            )
        atomic.write_bytes(content / file.name, data)
    _mention_missing_code(content)
    if len(names) > 1:
        weight_map = {t.name: n for n, shard in zip(names, shards, strict=True) for t in shard}
        total = sum(t.nbytes for shard in shards for t in shard)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        _write_json(content / INDEX, index)


def _write_json(path: epath.Path, value: Any) -> None:
    atomic.write_text(path, json.dumps(value, indent=2) + "\n")


def _mention_missing_code(stage: epath.Path) -> None:
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


def slopes_tensor(meta: metadata.Metadata) -> np.ndarray:
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
