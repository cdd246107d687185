"""Loss by position of a checkpoint on text files: `btlm eval loss-by-position`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from btlm_jax.checkpoint import metadata
from btlm_jax.checkpoint.assets import warn_of_changed_assets
from btlm_jax.checkpoint.trained_documents import Reading, read_trained_documents
from btlm_jax.evaluation.batch_shapes import check_batch_size
from btlm_jax.evaluation.by_position import check_window_length, loss_by_position
from btlm_jax.evaluation.by_position_report import (
    format_loss_by_position,
    loss_by_position_json,
    plot_loss_by_position,
)
from btlm_jax.evaluation.checkpoint_loading import load_for_evaluation
from btlm_jax.evaluation.context_extension import (
    ScalingKind,
    scaling_kinds,
    trained_length,
    with_scaling_kind,
)
from btlm_jax.evaluation.documents import TextInputs
from btlm_jax.evaluation.long_windows import LongWindows
from btlm_jax.model.btlm import BTLM
from btlm_jax.utils.dtypes import optional_dtype


def checkpoint_loss_by_position(
    path: str,
    texts: TextInputs,
    *,
    length: int | None,
    trained: int | None,
    kinds: Sequence[ScalingKind],
    max_windows: int,
    max_per_document: int | None,
    reading: Reading,
    batch_size: int | None,
    dtype: str | None,
    mesh: Any,
    plot: Path | None,
    show: Callable[[str], None],
) -> dict[str, Any]:
    """Measures loss by position, plots it and shows a table.

    Args:
      path: a checkpoint with a tokenizer.
      texts: the text files.
      length: tokens per window; None is four times the trained length.
      trained: trained length; None is the model's `n_positions`.
      kinds: kinds of scaling to compare; () compares all that the model supports.
      max_windows: as in `LongWindows`.
      max_per_document: as in `LongWindows`, for separate documents; None is 4.
      reading: how to read the documents.
      batch_size: as in `loss_by_position`.
      dtype, mesh: as in `load_for_evaluation`.
      plot: file for the plot, or None.
      show: called with every line of the report.

    Returns:
      The report as a JSON object.

    Raises:
      FileNotFoundError, ValueError: a bad argument, text or checkpoint; raised before the weights
        are read.
      FloatingPointError: the loss is not finite.
    """
    optional_dtype(dtype, "dtype")
    if reading == "joined" and max_per_document is not None:
        raise ValueError(
            "--windows-per-document: documents that are joined have no windows of their own: leave "
            "it out, or --documents separate"
        )
    meta = metadata.read_metadata(path)
    warn_of_changed_assets(meta)
    model = BTLM(meta.config, compute_dtype=dtype)
    trained = trained_length(model, trained)
    length = 4 * trained if length is None else length
    check_window_length(length, trained)
    kinds = tuple(dict.fromkeys(kinds)) or scaling_kinds(model)
    for kind in kinds:
        with_scaling_kind(model, kind, trained, length)  # raises if the model does not support it
    check_batch_size(batch_size, mesh)
    encoder = texts.encoder(path, meta.config.vocab_size)
    trained_reading = read_trained_documents(meta.origin)
    windows = LongWindows(
        texts.documents(encoder),
        texts.prefix(encoder, trained_reading),
        length,
        max_windows=max_windows,
        max_per_document=4 if max_per_document is None else max_per_document,
        concatenate=reading == "joined",
    )
    model, params = load_for_evaluation(path, dtype, mesh)
    compute_dtype = str(model.runtime(params).dtype)
    report = loss_by_position(
        model, params, windows, trained=trained, kinds=kinds, batch_size=batch_size
    )
    source = "one stream" if reading == "joined" else f"{len(report.windows):,} documents"
    description = f"{report.count:,} windows of {length:,} tokens from {source}"
    show(f"{description}; {report.short_documents:,} shorter documents left out; computed in "
         f"{compute_dtype}")  # fmt: skip
    show(trained_reading.describe(reading))
    for line in format_loss_by_position(report):
        show(line)
    if plot is not None:
        title = f"{Path(path).name}, trained on {trained:,} tokens: {description}"
        plot_loss_by_position(plot, report, title)
    header: dict[str, Any] = {"checkpoint": path, "compute_dtype": compute_dtype}
    header |= {"read_documents": reading, "trained_documents": trained_reading.reading}
    return header | loss_by_position_json(report)
