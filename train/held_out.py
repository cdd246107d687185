"""Held-out loss during training."""

from __future__ import annotations

import math

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from btlm_jax.data.token_shards import TokenShards
from btlm_jax.model import sharding
from btlm_jax.model.btlm import BTLM
from btlm_jax.model.params import Params
from btlm_jax.train.batches import document_segments
from btlm_jax.train.recipe import Recipe
from btlm_jax.train.step import make_eval_step


class HeldOutEvaluation:
    """Computes the held-out loss.

    Every evaluation covers the same tokens, in order, in windows of the longest phase, and masks
    documents if training does.

    Args:
      recipe: the recipe.
      model: the model to evaluate.
      mesh: the mesh that the weights lie on.
      held_out: the held-out tokens; None makes every evaluation empty.

    Raises:
      ValueError: there are fewer tokens than one batch needs.
    """

    def __init__(
        self, recipe: Recipe, model: BTLM, mesh: Mesh, held_out: TokenShards | None
    ) -> None:
        self._tokens = held_out
        if held_out is None:
            return
        num_shards = sharding.num_shards(mesh, sharding.RULES, "batch")
        length = max(p.length for p in recipe.phases)
        micro = recipe.phases[-1].microbatch_size
        budget = min(len(held_out) - 1, recipe.data.held_out_tokens)
        rows = max(num_shards, min(micro, budget // length // num_shards * num_shards))
        self._num_batches = budget // (rows * length)
        if self._num_batches < 1:
            raise ValueError(
                f"data.held_out: {len(held_out)} tokens are fewer than one batch of {rows} "
                f"sequences of {length} tokens"
            )
        self._rows, self._length = rows, length
        self._mask, self._eos = recipe.data.mask_documents, held_out.metadata.eos_id
        spec = PartitionSpec(*sharding.partition_spec(sharding.RULES, "batch"), None)
        self._sharding = NamedSharding(mesh, spec)
        self._step = make_eval_step(model)
        self._bytes_per_token = held_out.metadata.text_bytes / max(len(held_out), 1)

    def __call__(self, params: Params) -> dict[str, float]:
        """Returns the metrics of an evaluation; empty without held-out tokens.

        Returns:
          "held_out_loss", in nats per token (EOS included), "held_out_bits_per_byte" of the text,
          and "held_out_masked", 1 if documents were masked.
        """
        if self._tokens is None:
            return {}
        nll = tokens = 0.0
        for number in range(self._num_batches):
            loss = jax.device_get(self._step(params, *self._batch(self._tokens, number)))
            nll, tokens = nll + float(loss.nll), tokens + float(loss.tokens)
        mean = nll / tokens
        bits = mean / math.log(2) / self._bytes_per_token
        return {
            "held_out_loss": mean,
            "held_out_bits_per_byte": bits,
            "held_out_masked": float(self._mask),
        }

    def _batch(self, tokens: TokenShards, number: int) -> tuple[jax.Array, ...]:
        """Returns (tokens,) or (tokens, segment_ids) on the devices, int32 [rows, length + 1]."""

        def read(index: tuple[slice, ...]) -> np.ndarray:
            rows = range(self._rows)[index[0]]
            starts = [(number * self._rows + row) * self._length for row in rows]
            return np.stack([tokens.read(start, self._length + 1) for start in starts])

        def read_segments(index: tuple[slice, ...]) -> np.ndarray:
            return document_segments(read(index), self._eos)

        shape, readers = (self._rows, self._length + 1), (read, read_segments)[: 1 + self._mask]
        with jax.transfer_guard("allow"):  # an intentional transfer
            return tuple(
                sharding.assemble_array(shape, np.int32, self._sharding, shape, reader)
                for reader in readers
            )
