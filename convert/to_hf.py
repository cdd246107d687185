"""Export of Orbax checkpoints to Hugging Face directories that transformers loads."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from etils import epath
from safetensors import SafetensorError, safe_open

from btlm_jax import __version__, hf_config
from btlm_jax.checkpoint import damage, metadata
from btlm_jax.checkpoint.assets import asset_files, changed_assets
from btlm_jax.config import Positions
from btlm_jax.convert.conversion_report import ConversionReport, weights_digest
from btlm_jax.convert.hf.safetensors_writer import (
    WRITER_KEY,
    SafetensorsFile,
    TensorSpec,
    plan_shards,
)
from btlm_jax.convert.hf.tensor_names import SLOPES
from btlm_jax.convert.threads import for_each_in_threads, num_threads
from btlm_jax.convert.to_orbax import check_finite, recorded_nonfinite
from btlm_jax.model import alibi, weights
from btlm_jax.utils import atomic, paths
from btlm_jax.utils.format import DEFAULT_MEMORY
from btlm_jax.utils.local_paths import local_path
from btlm_jax.utils.process_memory import peak_rss
from btlm_jax.utils.progress import Progress

logger = logging.getLogger(__name__)

DEFAULT_SHARD_BYTES = 5 * 10**9  # the default of transformers
INDEX = "model.safetensors.index.json"


def export(
    source: metadata.PathLike,
    target: str | os.PathLike[str],
    *,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    max_memory: int = DEFAULT_MEMORY,
    allow_nonfinite: bool = False,
    overwrite: bool = False,
) -> ConversionReport:
    """Exports an Orbax checkpoint to a Hugging Face directory, without loss.

    Writes safetensors (with an index if there is more than one file), `config.json`,
    `generation_config.json` and the tokenizer files. Every tensor keeps its dtype and its bits, and
    is checked against the SHA-256 that the checkpoint records. A tied head is left out, as
    safetensors requires; the ALiBi slopes are written in the dtype in which they were stored. A
    converted checkpoint gets its original `config.json` back, key flavor included. A training
    checkpoint is exported without its optimizer state. The same call resumes an export that was
    killed or failed.

    Args:
      source: a checkpoint directory or URL.
      target: a local directory that does not exist yet.
      max_shard_bytes: largest size of one safetensors file, in bytes.
      max_memory: budget for weights in flight, in bytes.
      allow_nonfinite: export weights with NaN or Inf too, with a warning.
      overwrite: replace an existing export.

    Raises:
      FileNotFoundError: the source does not exist.
      FileExistsError: the target exists.
      ValueError: the source is not a checkpoint, damaged or quantized, or holds NaN or Inf; the
        target is in an object
        store; the budget is too small for one block; or the model uses CompleteP, which the
        original code cannot compute (call `fold_completep` first).
      OSError: the disk is full or fails.
    """
    began = time.monotonic()
    target = local_path(target, "target")
    paths.location(source, "source")
    if max_shard_bytes <= 0:
        raise ValueError(f"max_shard_bytes: found {max_shard_bytes}, expected a positive number")
    atomic.refuse_existing(target, overwrite=overwrite, ours=is_our_export)
    meta = metadata.read_metadata(source)
    if meta.quantization is not None:
        raise ValueError(
            f"{source} is quantized ({meta.quantization}), which the original code cannot read: "
            "export the checkpoint it was made from"
        )
    check_assets(meta)
    if meta.nonfinite and not allow_nonfinite:  # before anything is written
        check_finite(os.fspath(source), meta.nonfinite, "export", allow_nonfinite)
    config = _config_json(meta)
    threads = num_threads(max_memory, meta.largest_block)
    leaves = {leaf.hf_name: leaf for leaf in weights.disk_leaves(meta.config)}
    tensors = [
        TensorSpec(name, np.dtype(meta.leaves[leaf.path].dtype), leaf.weight.hf_shape)
        for name, leaf in leaves.items()
    ]
    slopes = slopes_tensor(meta) if meta.config.positions is Positions.ALIBI else None
    if slopes is not None:
        tensors.append(TensorSpec(SLOPES, slopes.dtype, slopes.shape))
    shards = _name_shards(plan_shards(tensors, max_shard_bytes))
    key = _resume_key(meta, shards)
    with atomic.new_directory(target, overwrite=overwrite, ours=is_our_export, key=key) as stage:
        content = Path(stage.content)
        unfinished = [t for t in tensors if t.name not in stage.finished]
        total, remaining = (sum(t.nbytes for t in ts) for ts in (tensors, unfinished))
        atomic.require_space(target, remaining)
        files = {
            name: SafetensorsFile(content / name, shard, __version__)
            for name, shard in shards.items()
        }
        file_by_tensor = {t.name: files[name] for name, shard in shards.items() for t in shard}
        with Progress(total, "B", "export", done=total - remaining) as progress:

            def export_tensor(tensor: TensorSpec) -> None:
                name = tensor.name

                def blocks() -> Iterator[np.ndarray]:
                    is_slopes = slopes is not None and name == SLOPES
                    for block in [slopes.reshape(-1)] if is_slopes else meta.blocks(leaves[name]):
                        yield block
                        progress.update(block.nbytes)

                digest = file_by_tensor[name].write(name, blocks())
                sha256 = digest.sha256
                recorded = meta.sha256.get(leaves[name].path) if name in leaves else None
                if recorded is not None and sha256 != recorded:
                    raise damage.damaged_error(
                        meta.path, f"{name}: its bytes do not match the recorded SHA-256"
                    )
                stage.record(name, {"sha256": sha256, "nonfinite": digest.nonfinite})

            for_each_in_threads(unfinished, export_tensor, threads)
        counts = recorded_nonfinite(stage.finished)
        check_finite(os.fspath(source), counts, "export", allow_nonfinite)
        sha256 = {t.name: stage.finished[t.name]["sha256"] for t in tensors}
        for file in files.values():
            file.finish(sha256)
        _write_small_files(meta, config, stage.content, shards)
    return ConversionReport(
        tensors=len(tensors),
        resumed=len(tensors) - len(unfinished),
        nbytes=total,
        dtypes=Counter(str(t.dtype) for t in tensors),
        seconds=time.monotonic() - began,
        peak_rss=peak_rss(),
        digest=weights_digest({name: sha256[name] for name in leaves}),
        files=tuple(shards),
    )


def check_assets(meta: metadata.CheckpointMetadata) -> None:
    """Checks the files that a checkpoint carries against its record, before they are copied.

    Raises:
      ValueError: a file is missing or has changed.
    """
    for name, change in changed_assets(meta).items():
        if change == "missing":
            raise ValueError(
                f"{meta.path}: tokenizer/{name} is missing, which the checkpoint records: copy it "
                "there again from the source of the checkpoint, or convert again"
            )
        raise damage.damaged_error(meta.path, f"{name} does not match the recorded SHA-256")
    if not {"tokenizer.json", "vocab.json"} & {file.name for file in asset_files(meta.path)}:
        logger.warning("%s has no tokenizer files: its copy will have none either", meta.path)


def is_our_export(path: metadata.PathLike) -> bool:
    """Returns whether `export` wrote a directory, as the header of every weight file states."""
    files = list(Path(path).glob("*.safetensors"))
    try:
        return bool(files) and all(WRITER_KEY in safe_open(f, "np").metadata() for f in files)
    except (SafetensorError, TypeError):
        return False


def _config_json(meta: metadata.CheckpointMetadata) -> dict[str, Any]:
    """Returns the `config.json` of an export; see `hf_config.export_config_json`."""
    dtypes = {str(meta.leaves[leaf.path].dtype) for leaf in weights.disk_leaves(meta.config)}
    return hf_config.export_config_json(
        meta.config, sorted(dtypes), meta.origin.get("hf_config"), meta.origin.get("dtypes")
    )


def _name_shards(shards: list[list[TensorSpec]]) -> dict[str, list[TensorSpec]]:
    """Names the files of an export as transformers does."""
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    count = len(shards)
    return {f"model-{i:05d}-of-{count:05d}.safetensors": shard for i, shard in enumerate(shards, 1)}


def _resume_key(
    meta: metadata.CheckpointMetadata, shards: Mapping[str, Sequence[TensorSpec]]
) -> dict[str, Any]:
    """Returns the facts that must be unchanged to resume an interrupted export."""
    mark = (meta.path / metadata.MARKER_FILE).read_bytes()
    return {
        "by": f"export {__version__}",
        "checkpoint": hashlib.sha256(mark).hexdigest(),
        "shards": {name: [t.name for t in shard] for name, shard in shards.items()},
    }


def _write_small_files(
    meta: metadata.CheckpointMetadata,
    config: dict[str, Any],
    content: epath.Path,
    shards: Mapping[str, Sequence[TensorSpec]],
) -> None:
    """Writes everything but the weights: configuration, carried files, and the index of shards."""
    _write_json(content / "config.json", config)
    _write_json(content / "generation_config.json", hf_config.generation_config_json(meta.config))
    for file in asset_files(meta.path):
        atomic.write_bytes(content / file.name, file.read_bytes())
    _log_missing_code(content)
    if len(shards) > 1:
        weight_map = {t.name: name for name, shard in shards.items() for t in shard}
        total = sum(t.nbytes for shard in shards.values() for t in shard)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        _write_json(content / INDEX, index)


def _write_json(path: epath.Path, value: Any) -> None:
    atomic.write_text(path, json.dumps(value, indent=2) + "\n")


def _log_missing_code(stage: epath.Path) -> None:
    """Logs which modelling code config.json refers to that is not in the directory."""
    named = json.loads((stage / "config.json").read_text()).get("auto_map", {}).values()
    local = {f"{entry.split('.')[0]}.py" for entry in named if "--" not in entry}
    missing = sorted(name for name in local if not (stage / name).is_file())
    if missing:
        logger.info(
            "config.json names %s: copy them from the original model into the export before "
            "loading it with transformers",
            " and ".join(missing),
        )


def slopes_tensor(meta: metadata.CheckpointMetadata) -> np.ndarray:
    """Returns the ALiBi slopes [H, 1] in the dtype of the source, if that holds them exactly.

    A checkpoint that was not converted gets bfloat16, or float32 where bfloat16 would round; fresh
    models have exact slopes, which the model uses in float32.
    """
    slopes = alibi.model_slopes(meta.config)[:, None]
    stored = meta.origin.get("slopes_dtype")
    candidates = [stored] if stored else ["bfloat16", "float32"]
    for name in candidates:
        rounded = slopes.astype(jnp.dtype(name))
        if np.array_equal(rounded.astype(np.float64), slopes):
            return rounded
    return slopes.astype(np.float32)
