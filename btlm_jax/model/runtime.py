"""The static arguments of a forward pass, and helpers that shard its arrays."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, reshard
from jax.typing import DTypeLike

from btlm_jax.config import BTLMConfig
from btlm_jax.model import attention, context_parallel, sharding
from btlm_jax.model.einsum import einsum
from btlm_jax.model.packed import PackedWeight
from btlm_jax.model.remat import Remat
from btlm_jax.model.weights import Weight


class StoredWeight(NamedTuple):
    """A weight as the tree of parameters holds it, one layer's if it is stacked.

    Attributes:
      entry: its entry in the table.
      value: an array, as `entry` describes it, or a packed weight.
    """

    entry: Weight
    value: jax.Array | PackedWeight


@dataclasses.dataclass(frozen=True)
class Runtime:
    """The static arguments of a forward pass, bound once from a model and its weights.

    `BTLM.runtime` makes it; the functions of `forward`, the layers and the losses take it. It is
    hashable, so that jit can specialize on it.

    Attributes:
      config: the model.
      dtype: the compute dtype.
      rules: logical axis -> mesh axis.
      padding: logical axis -> padded size, for the axes that the weights pad.
      mesh: the mesh of the weights; None without one.
      implementation: the attention implementation; None chooses by platform.
      remat: what is saved for the backward pass.
    """

    config: BTLMConfig
    dtype: np.dtype
    rules: sharding.Rules
    padding: tuple[tuple[str, int], ...]
    mesh: jax.sharding.AbstractMesh | None
    implementation: attention.Implementation | None
    remat: Remat

    @property
    def precision(self) -> jax.lax.Precision | None:
        """The precision of matrix products: TPUs and GPUs would round float32 to bf16 or TF32."""
        return jax.lax.Precision.HIGHEST if self.dtype == jnp.float32 else None

    @property
    def attention_shard(self) -> PartitionSpec | None:
        """The mesh axes of batch, heads and queries in attention; None without a mesh."""
        return self.axes("batch", "heads", "sequence")

    def axes(self, *axes: str | None) -> PartitionSpec | None:
        """Returns the PartitionSpec of these logical axes, or None without a mesh."""
        return sharding.partition_spec(self.rules, *axes) if self.mesh is not None else None

    def shard(self, x: jax.Array, *axes: str | None) -> jax.Array:
        """Shards an array by logical axes; the identity without a mesh."""
        if self.mesh is None:
            return x
        spec = sharding.partition_spec(self.rules, *axes)
        return reshard(x, NamedSharding(self.mesh, spec))

    def zeros(self, shape, dtype, *axes: str | None) -> jax.Array:
        """Returns zeros, sharded by logical axes."""
        return jnp.zeros(shape, dtype, out_sharding=self.axes(*axes))

    def gathered(self, w: StoredWeight, dtype: DTypeLike | None = None) -> Any:
        """Returns a weight, gathered from its fsdp shards, in `dtype` or the compute dtype.

        A packed weight is returned as it is: its products and rows gather what they need.
        """
        if isinstance(w.value, PackedWeight):
            return w.value
        return self.shard(w.value.astype(dtype or self.dtype), *w.entry.gathered_axes)

    def einsum(self, equation: str, x: jax.Array, w: StoredWeight, *axes: str | None) -> jax.Array:
        """Computes the einsum of x and a weight, fp32, sharded by the logical axes of the result.

        Every product with a weight is this one, whether the weight is packed or not.
        """
        out, gathered = self.axes(*axes), self.axes(*w.entry.gathered_axes)
        return einsum(equation, x, w.value, self.precision, out, gathered)

    def to_balanced_order(self, x_BT: jax.Array) -> jax.Array:
        """Reorders sequences that are split over devices, as `context_parallel` wants them."""
        return self._reorder_sequence(x_BT, context_parallel.to_balanced_order)

    def to_natural_order(self, x_BTD: jax.Array) -> jax.Array:
        """Inverts `to_balanced_order`."""
        return self._reorder_sequence(x_BTD, context_parallel.to_natural_order)

    def _reorder_sequence(
        self, x: jax.Array, order: Callable[[jax.Array, str], jax.Array]
    ) -> jax.Array:
        """Reorders x [B, T, ...] along T if sequences are split over devices."""
        if self.mesh is None or sharding.num_shards(self.mesh, self.rules, "sequence") == 1:
            return x
        spec = self.axes("batch", "sequence", *(None,) * (x.ndim - 2))
        assert spec is not None
        axis = spec[1]
        return jax.shard_map(lambda x: order(x, axis), in_specs=spec, out_specs=spec)(x)

    def without_context_parallel(self) -> Runtime:
        """Returns a runtime that does not split sequences: a step of decoding is too short."""
        return dataclasses.replace(self, rules=sharding.unshard_sequences(self.rules))

    def check_batch(self, batch_size: int, length: int | None = None) -> None:
        """Raises ValueError if a batch, or its sequences, do not divide over the mesh."""
        if self.mesh is not None:
            sharding.check_batch(batch_size, self.mesh, self.rules, length)
