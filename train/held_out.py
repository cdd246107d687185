"""Held-out loss while training."""

from __future__ import annotations

import logging
import math

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from btlm_jax.data.token_shards import TokenShards
from btlm_jax.model import sharding
from btlm_jax.model.btlm import BTLM
from btlm_jax.train.metrics import MetricsLog
from btlm_jax.train.recipe import Recipe
from btlm_jax.train.step import TrainState, make_eval_step

logger = logging.getLogger(__name__)


class Evaluation:
    """Held-out loss: always the same tokens, in order, in windows of the longest phase."""

    def __init__(self, recipe: Recipe, model: BTLM, mesh: Mesh, held: TokenShards | None) -> None:
        self._held = held
        if held is None:
            return
        ways = sharding.num_shards(mesh, sharding.RULES, "batch")
        last = recipe.phases[-1]
        length = max(p.length for p in recipe.phases)
        micro = last.microbatch or last.batch_size
        budget = min(len(held) - 1, recipe.data.held_out_tokens)
        self._batch = max(ways, min(micro, budget // length // ways * ways))
        count = budget // (self._batch * length)
        if count < 1:
            raise ValueError(
                f"data.held_out: {len(held)} tokens are fewer than one batch of {self._batch} "
                f"sequences of {length} tokens"
            )
        self._count, self._length, self._mesh = count, length, mesh
        self._step = make_eval_step(model)
        self._bytes_per_token = held.metadata.text_bytes / max(len(held), 1)

    def __call__(self, state: TrainState, log: MetricsLog, step: int) -> float:
        if self._held is None:
            return math.nan
        spec = jax.sharding.PartitionSpec(*sharding.partition_spec(sharding.RULES, "batch"), None)
        place = NamedSharding(self._mesh, spec)
        shape = (self._batch, self._length + 1)
        nll = tokens = 0.0
        for i in range(self._count):

            def part(index, i=i):
                rows = range(self._batch)[index[0]]
                starts = [(i * self._batch + r) * self._length for r in rows]
                return np.stack([self._held.read(s, self._length + 1) for s in starts])

            with jax.transfer_guard("allow"):  # this one is meant
                batch = jax.make_array_from_callback(shape, place, part)
            loss = jax.device_get(self._step(state.params, batch))
            nll, tokens = nll + float(loss.nll), tokens + float(loss.tokens)
        mean = nll / tokens
        bits = mean / math.log(2) / self._bytes_per_token
        log.write(step, {"held_out_loss": mean, "held_out_bits_per_byte": bits})
        logger.info(
            "step %d: held-out loss %.4f nats per token, %.4f bits per byte", step, mean, bits
        )
        return mean
