"""The static arguments of a forward pass, and helpers that shard its arrays."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, reshard

from btlm_jax.config import BTLMConfig
from btlm_jax.model import attention, sharding
from btlm_jax.model.einsum import einsum
from btlm_jax.model.kv_cache import KVCache
from btlm_jax.model.remat import Remat


@dataclasses.dataclass(frozen=True)
class Runtime:
    """The static arguments of one forward pass; hashable, so that jit can specialize on it.

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
    def on_cpu(self) -> bool:
        """Whether this runs on CPUs, whose compiler needs other forms of some products."""
        return sharding.mesh_platform(self.mesh) == "cpu"

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

    def einsum(self, equation: str, x: jax.Array, y: jax.Array, *axes: str | None) -> jax.Array:
        """Computes `einsum.einsum`, fp32, sharded by the logical axes of the result."""
        return einsum(equation, x, y, self.precision, self.axes(*axes))

    def reorder_sequence(
        self, x: jax.Array, order: Callable[[jax.Array, str], jax.Array]
    ) -> jax.Array:
        """Reorders x [B, T, ...] along T if sequences are split over devices.

        Args:
          order: `context_parallel.to_balanced_order` or `to_natural_order`.
        """
        if self.mesh is None or sharding.num_shards(self.mesh, self.rules, "sequence") == 1:
            return x
        spec = self.axes("batch", "sequence", *(None,) * (x.ndim - 2))
        assert spec is not None
        axis = spec[1]
        return jax.shard_map(lambda x: order(x, axis), in_specs=spec, out_specs=spec)(x)

    def check_batch(self, batch_size: int, length: int | None = None) -> None:
        """Raises ValueError if a batch, or its sequences, do not divide over the mesh."""
        if self.mesh is not None:
            sharding.check_batch(batch_size, self.mesh, self.rules, length)

    def check_cache(self, cache: KVCache, batch_size: int) -> None:
        """Raises ValueError if a cache belongs to another model, batch size or mesh."""
        c, keys = self.config, [layer.keys.data for layer in cache.layers]
        expected = (batch_size, c.n_head, cache.capacity, c.head_dim)
        if len(keys) != c.n_layer or keys[0].shape != expected:
            raise ValueError(
                f"cache: found {len(keys)} layers of {list(keys[0].shape)}, expected {c.n_layer} "
                f"of {list(expected)} for this model and batch: make it with init_cache"
            )
        if sharding.mesh_of(keys[0]) != self.mesh:
            raise ValueError(
                "cache: found one that is not on the mesh of the weights: make it with init_cache"
            )
