"""Tasks of lm-evaluation-harness over a checkpoint: `btlm eval harness`."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from btlm_jax.checkpoint import checkpoint, metadata, unstacked
from btlm_jax.checkpoint.assets import load_checkpoint_tokenizer
from btlm_jax.checkpoint.trained_documents import read_trained_documents
from btlm_jax.evaluation import harness
from btlm_jax.evaluation.tasks import load_tasks
from btlm_jax.generation import result_journal
from btlm_jax.model.btlm import BTLM
from btlm_jax.model.params import Params
from btlm_jax.utils.dtypes import optional_dtype
from btlm_jax.utils.local_paths import local_path


def checkpoint_harness(
    path: str,
    names: Sequence[str],
    json_file: Path,
    *,
    include_path: Path | None,
    num_fewshot: int | None,
    limit: float | None,
    max_length: int | None,
    batch_size: int | None,
    seed: int,
    overwrite: bool,
    dtype: str | None,
    mesh: Any,
    show: Callable[[str], None],
) -> None:
    """Runs tasks, writes the report and shows its tables.

    Args:
      path: a checkpoint with a tokenizer.
      names, include_path: as in `load_tasks`.
      json_file: file for the report; answers are kept beside it until it is complete.
      num_fewshot, limit: as in `harness.run_tasks`.
      max_length, batch_size, seed: as in `harness.RequestAnswerer`.
      overwrite: replace the file, and the unfinished answers of a run of another checkpoint.
      dtype: dtype of weights and computation; None keeps the stored dtype and computes in the
        platform's.
      mesh: the mesh to load onto, or None.
      show: called with the tables.

    Raises:
      FileNotFoundError, FileExistsError, ValueError: a bad argument, task or checkpoint; raised
        before the weights are read.
    """
    optional_dtype(dtype, "dtype")
    json_file = local_path(json_file, "json_file")
    meta = metadata.read_metadata(path)
    tokenizer = load_checkpoint_tokenizer(meta)
    # Decided here and not by the requests: a task's answers must not depend on the other tasks.
    decoding_dtype = dtype or unstacked.decoding_dtype(meta, None, mesh)
    model = BTLM(meta.config, compute_dtype=decoding_dtype)
    compute_dtype = str(model.dtype_on(None if mesh is None else mesh.abstract_mesh))

    def load() -> tuple[BTLM, Params]:
        model, params = checkpoint.load(path, dtype=dtype, mesh=mesh, unstacked=True)
        return dataclasses.replace(model, compute_dtype=compute_dtype), params

    key = {"checkpoint": result_journal.checkpoint_fingerprint(meta), "dtype": dtype, "seed": seed}
    key |= {"max_length": max_length, "compute_dtype": compute_dtype}
    trained = read_trained_documents(meta.origin)
    limits: dict[str, Any] = dict(num_fewshot=num_fewshot, limit=limit)
    logging.getLogger("lm_eval").handlers = logging.getLogger("btlm_jax").handlers
    with result_journal.open_journal(json_file, key, overwrite=overwrite) as journal:
        tasks = load_tasks(names, include_path, **limits)
        lm = harness.make_language_model(
            meta.config, tokenizer, load, max_length, batch_size, seed, journal, trained.eos_id
        )
        results = harness.run_tasks(lm, tasks, **limits)
        header = {"checkpoint": path, "tasks": list(names), **limits}
        header |= {"read_documents": "separate", "trained_documents": trained.reading}
        header |= {"prefix_token": lm.prefix_token_id, "compute_dtype": compute_dtype}
        result_journal.finish_journal(json_file, harness.encode_report(header, results))
    show(trained.describe("separate"))
    show(harness.format_results(results))
