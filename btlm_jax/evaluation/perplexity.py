"""Cross-entropy of texts, which `btlm eval perplexity` measures."""

from __future__ import annotations

import dataclasses
import math

import jax
import numpy as np

from btlm_jax.evaluation.batch_shapes import batch_shape
from btlm_jax.evaluation.rolling_windows import RollingWindows
from btlm_jax.model import forward
from btlm_jax.model.btlm import BTLM
from btlm_jax.model.chunked_loss import head_loss
from btlm_jax.model.params import Params
from btlm_jax.utils.progress import Progress


@dataclasses.dataclass(frozen=True)
class CrossEntropy:
    """The summed loss of texts, and the usual metrics that follow from it.

    There is no perplexity per word, because it would depend on the definition of a word.

    Attributes:
      nats: the summed negative log-likelihood of all tokens.
      tokens: number of tokens.
      text_bytes: bytes of their text, in UTF-8.
    """

    nats: float
    tokens: int
    text_bytes: int

    @property
    def nats_per_token(self) -> float:
        """The mean loss, as training reports it."""
        return self.nats / self.tokens

    @property
    def bits_per_token(self) -> float:
        """The mean loss in bits."""
        return self.nats_per_token / math.log(2)

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte of text, which compares models with different tokenizers."""
        return self.nats / math.log(2) / self.text_bytes

    @property
    def perplexity(self) -> float:
        """exp(nats per token); inf beyond float64."""
        return math.exp(self.nats_per_token) if self.nats_per_token < 709 else math.inf

    def metrics(self) -> dict[str, float]:
        """Returns the metrics by name."""
        names = ("nats_per_token", "bits_per_token", "bits_per_byte", "perplexity")
        return {name: getattr(self, name) for name in names}


def cross_entropy(
    model: BTLM,
    params: Params,
    windows: RollingWindows,
    *,
    batch_size: int | None = None,
    title: str = "evaluate",
) -> CrossEntropy:
    """Computes the cross-entropy of documents, in batches of one shape.

    Full logits are never materialized. Sums are fp32 within a batch and float64 across batches. The
    head of quantized weights is dequantized; their other products use `packed.packed_matmul`.

    Args:
      model, params: the model and its weights, stacked or unstacked, on a device or a mesh.
      windows: from `cut_rolling_windows`.
      batch_size: windows per batch, over all devices; default about 8192 tokens on each device.
      title: title of the progress display.

    Raises:
      ValueError: the batch does not divide over the mesh.
      FloatingPointError: the loss is not finite.
    """
    runtime = model.runtime(params)
    rows, width = batch_shape(runtime, windows.length, len(windows), batch_size)
    nats, tokens = 0.0, 0
    with Progress(windows.tokens, "token", title) as progress:
        for batch in windows.batches(rows, width, model.config):
            length = np.int32(batch.length)
            h, _ = forward.hidden(runtime, params, batch.inputs, length=length)
            sums = jax.device_get(head_loss(runtime, params, h, batch.targets)[1])
            if not math.isfinite(sums.nll):
                raise FloatingPointError(
                    f"cross-entropy: found {sums.nll} after {tokens} tokens, expected a finite "
                    "number: check that the weights are finite and the ids within the vocabulary, "
                    "and try float32 in case the computation overflows"
                )
            n = int(sums.tokens)
            nats, tokens = nats + float(sums.nll), tokens + n
            progress.update(n, f"{nats / tokens:.4f} nats per token")
    return CrossEntropy(nats, tokens, windows.text_bytes)
