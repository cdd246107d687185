"""Cross-entropy of texts: what `btlm eval perplexity` measures."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import numpy as np

from btlm_jax.evaluation.batch_shapes import batch_shape
from btlm_jax.evaluation.windows import Windows
from btlm_jax.model.btlm import BTLM
from btlm_jax.model.loss import head_loss
from btlm_jax.model.params import Params
from btlm_jax.utils.progress import Progress


@dataclasses.dataclass(frozen=True)
class CrossEntropy:
    """A sum over texts, and what is usually told of it.

    There is no perplexity per word: that depends on what one takes for words.

    Attributes:
      nats: the summed negative log-likelihood of all tokens.
      tokens: how many.
      text_bytes: of their text, in UTF-8.
    """

    nats: float
    tokens: int
    text_bytes: int

    @property
    def nats_per_token(self) -> float:
        """The mean, as training reports it."""
        return self.nats / self.tokens

    @property
    def bits_per_token(self) -> float:
        """The mean in bits."""
        return self.nats_per_token / math.log(2)

    @property
    def bits_per_byte(self) -> float:
        """Of text: to compare models of different tokenizers."""
        return self.nats / math.log(2) / self.text_bytes

    @property
    def perplexity(self) -> float:
        """exp of the mean, per token; inf beyond float64."""
        return math.exp(self.nats_per_token) if self.nats_per_token < 709 else math.inf

    def numbers(self) -> dict[str, float]:
        """What is told, by name."""
        names = ("nats_per_token", "bits_per_token", "bits_per_byte", "perplexity")
        return {name: getattr(self, name) for name in names}


def cross_entropy(
    model: BTLM,
    params: Params,
    windows: Windows,
    *,
    batch_size: int | None = None,
    title: str = "evaluate",
) -> CrossEntropy:
    """The cross-entropy of documents, in batches of one shape; whole logits are never held.

    Every batch is summed in fp32, batches in float64. The head of quantized weights is dequantized;
    their other products are as `packed.packed_matmul` makes them.

    Args:
      model, params: the model and its weights, stacked or by layer, on a device or a mesh.
      windows: from `windows.cut`.
      batch_size: windows at a time, over all devices; default about 8192 tokens on each.
      title: of the progress that is shown.

    Raises:
      ValueError: a batch that does not divide over the mesh.
      FloatingPointError: a loss that is not finite.
    """
    runtime = model.runtime(params)
    rows, width = batch_shape(runtime, windows.length, len(windows), batch_size)
    positions = None
    if not model.config.alibi:  # the filling must not ask for more than there are
        positions = np.minimum(np.arange(width, dtype=np.int32), windows.length - 1)
        positions = np.broadcast_to(positions, (rows, width))
    nats, tokens = 0.0, 0
    with Progress(windows.tokens, "token", title) as progress:
        for batch in windows.batches(rows, width, model.config):
            options: dict[str, Any] = dict(positions=positions, length=np.int32(batch.length))
            h, _ = model.hidden(params, batch.inputs, **options)
            found = jax.device_get(head_loss(runtime, params, h, batch.targets)[1])
            if not math.isfinite(found.nll):
                raise FloatingPointError(
                    f"cross-entropy: found {found.nll} after {tokens} tokens, expected a number: "
                    "are the weights finite, and the ids of the vocabulary? float32 rules out that "
                    "the computation overflows"
                )
            n = int(found.tokens)
            nats, tokens = nats + float(found.nll), tokens + n
            progress.update(n, f"{nats / tokens:.4f} nats per token")
    return CrossEntropy(nats, tokens, windows.text_bytes)
