"""Retrieval accuracy of a checkpoint: `btlm eval retrieval`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from btlm_jax.checkpoint import metadata
from btlm_jax.checkpoint.assets import load_checkpoint_tokenizer
from btlm_jax.evaluation import retrieval
from btlm_jax.evaluation.checkpoint_loading import load_for_evaluation
from btlm_jax.evaluation.context_extension import ScalingKind, trained_length, with_scaling_kind
from btlm_jax.evaluation.retrieval_report import format_retrieval, plot_retrieval, retrieval_json
from btlm_jax.evaluation.retrieval_texts import RetrievalTask
from btlm_jax.model.btlm import BTLM
from btlm_jax.utils.dtypes import optional_dtype


def checkpoint_retrieval(
    path: str,
    task: RetrievalTask,
    *,
    lengths: Sequence[int],
    samples: int,
    seed: int,
    kinds: Sequence[ScalingKind],
    trained: int | None,
    lead: bool,
    max_new_tokens: int,
    batch_size: int,
    dtype: str | None,
    mesh: Any,
    plot: Path | None,
    show: Callable[[str], None],
) -> dict[str, Any]:
    """Asks for answers far back in prompts, plots the accuracy and shows a line per outcome.

    Args:
      path: a checkpoint with a tokenizer.
      task: "lines" or "topics".
      lengths: tokens of the prompts; () is a quarter, half, all, twice and four times the trained
        length.
      samples, seed, lead: as in `retrieval_prompts`.
      kinds: kinds of scaling to compare.
      trained: trained length; None is the model's `n_positions`.
      max_new_tokens: tokens of an answer.
      batch_size: prompts per batch.
      dtype, mesh: as in `load_for_evaluation`.
      plot: file for the plot, or None.
      show: called with every line of the report, as soon as it is known.

    Returns:
      The report as a JSON object.

    Raises:
      FileNotFoundError, ValueError: a bad argument or checkpoint; raised before the weights are
        read.
    """
    optional_dtype(dtype, "dtype")
    for name, value in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name}: found {value}, expected at least 1")
    meta = metadata.read_metadata(path)
    tokenizer = load_checkpoint_tokenizer(meta)
    model = BTLM(meta.config, compute_dtype=dtype)
    trained = trained_length(model, trained)
    lengths = lengths or tuple(trained * n // 4 for n in (1, 2, 4, 8, 16))
    pairs = [(kind, length) for length in lengths for kind in dict.fromkeys(kinds)]
    for kind, length in pairs:  # raises if the model does not support it
        with_scaling_kind(model, kind, trained, length, new_tokens=max_new_tokens)
    prompts = {
        n: retrieval.retrieval_prompts(task, tokenizer, n, samples, seed=seed, lead=lead)
        for n in lengths
    }
    model, params = load_for_evaluation(path, dtype, mesh, unstacked=True)
    outcomes = []
    for kind, length in pairs:
        scaled = with_scaling_kind(model, kind, trained, length, new_tokens=max_new_tokens)
        continue_prompts = retrieval.greedy_continuation(
            scaled, params, tokenizer, new_tokens=max_new_tokens, batch_size=batch_size
        )
        outcome = retrieval.evaluate_retrieval(
            task, kind, length, prompts[length], continue_prompts
        )
        outcomes.append(outcome)
        show(format_retrieval(task, outcome))
    if plot is not None:
        title = f"{Path(path).name}: {task}, {samples} prompts a length"
        plot_retrieval(plot, outcomes, trained, title)
    return {
        "checkpoint": path, "task": task, "trained": trained, "seed": seed, "lead": lead,
        "compute_dtype": str(model.runtime(params).dtype), "outcomes": retrieval_json(outcomes),
    }  # fmt: skip
