"""Perplexity of a checkpoint on text files: `btlm eval perplexity`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from btlm_jax.checkpoint import metadata
from btlm_jax.checkpoint.assets import warn_of_changed_assets
from btlm_jax.checkpoint.quantization import Quantization
from btlm_jax.checkpoint.trained_documents import Reading, read_trained_documents
from btlm_jax.evaluation.batch_shapes import check_batch_size
from btlm_jax.evaluation.checkpoint_loading import load_for_evaluation
from btlm_jax.evaluation.documents import TextInputs, hold_documents
from btlm_jax.evaluation.perplexity import cross_entropy
from btlm_jax.evaluation.quantization_cost import (
    compare_quantizations,
    format_quantization_costs,
    quantization_costs_json,
)
from btlm_jax.evaluation.rolling_windows import cut_rolling_windows
from btlm_jax.utils.dtypes import optional_dtype


def checkpoint_perplexity(
    path: str,
    texts: TextInputs,
    *,
    reading: Reading | None,
    length: int | None,
    stride: int | None,
    batch_size: int | None,
    quantizations: Sequence[Quantization],
    dtype: str | None,
    mesh: Any,
    show: Callable[[str], None],
) -> dict[str, Any]:
    """Measures the cross-entropy of texts.

    Args:
      path: a checkpoint with a tokenizer.
      texts: the text files.
      reading: how to read the documents; None is as in training, or separate if the checkpoint does
        not record it.
      length, stride: as in `cut_rolling_windows`.
      batch_size: as in `cross_entropy`.
      quantizations: quantizations to compare with the original weights.
      dtype, mesh: as in `load_for_evaluation`.
      show: called with every line of the report.

    Returns:
      The report as a JSON object.

    Raises:
      FileNotFoundError, ValueError: a bad argument, text or checkpoint; raised before the weights
        are read.
      FloatingPointError: the loss is not finite.
    """
    optional_dtype(dtype, "dtype")
    meta = metadata.read_metadata(path)
    warn_of_changed_assets(meta)
    _check_quantizations(path, quantizations, meta.quantization, mesh)
    check_batch_size(batch_size, mesh)
    encoder = texts.encoder(path, meta.config.vocab_size)
    trained = read_trained_documents(meta.origin)
    reading = reading or trained.reading or "separate"
    documents = hold_documents(texts.documents(encoder))
    prefix = texts.prefix(encoder, trained)
    windows = cut_rolling_windows(
        meta.config, documents, prefix, length=length, stride=stride, joined=reading == "joined"
    )
    show(f"text: {len(documents):,} documents, {windows.tokens:,} tokens, {windows.text_bytes:,} "
         f"bytes; {len(windows):,} windows of {windows.length} tokens, stride "
         f"{windows.stride}")  # fmt: skip
    show(trained.describe(reading))
    model, params = load_for_evaluation(path, dtype, mesh)
    compute_dtype = str(model.runtime(params).dtype)
    report: dict[str, Any] = {
        "checkpoint": path, "documents": len(documents), "tokens": windows.tokens,
        "text_bytes": windows.text_bytes, "length": windows.length, "stride": windows.stride,
        "read_documents": reading, "trained_documents": trained.reading,
        "compute_dtype": compute_dtype,
    }  # fmt: skip
    table = []
    if quantizations:
        costs = compare_quantizations(model, params, windows, quantizations, batch_size=batch_size)
        loss, report["compared"] = costs[0].loss, quantization_costs_json(costs)
        table = ["", *format_quantization_costs(costs)]
    else:
        loss = cross_entropy(model, params, windows, batch_size=batch_size)
    show(f"cross-entropy: {loss.nats_per_token:.5f} nats per token, "
         f"{loss.bits_per_token:.5f} bits per token, "
         f"{loss.bits_per_byte:.5f} bits per byte")  # fmt: skip
    show(f"perplexity: {loss.perplexity:.4f} per token (computed in {compute_dtype})")
    for line in table:
        show(line)
    return report | loss.metrics()


def _check_quantizations(
    path: str, quantizations: Sequence[Quantization], stored: Quantization | None, mesh: Any
) -> None:
    if quantizations and stored is not None:
        raise ValueError(
            f"--quantize: {path} is quantized already ({stored}): leave it out, or name the "
            "checkpoint this one was made of"
        )
    if quantizations and mesh is not None:
        raise ValueError(
            "--quantize: found a mesh, expected one device, where weights are quantized: leave "
            "--set mesh.* out, or evaluate the output of `btlm convert --quantize` on it"
        )
