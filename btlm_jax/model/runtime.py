"""What is static in a forward pass, and how its arrays lie on a mesh."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec, reshard

from btlm_jax.config import BTLMConfig
from btlm_jax.model import attention, sharding
from btlm_jax.model import einsum as einsum_lib
from btlm_jax.model.kv_cache import KVCache
from btlm_jax.model.remat import Remat


@dataclasses.dataclass(frozen=True)
class Runtime:
    """What is static in one forward pass: the configuration, dtype, padding and mesh."""

    config: BTLMConfig
    dtype: np.dtype
    rules: sharding.Rules
    padding: tuple[tuple[str, int], ...]
    mesh: jax.sharding.AbstractMesh | None
    implementation: attention.Implementation | None
    remat: Remat

    @property
    def precision(self) -> jax.lax.Precision | None:
        """float32 means float32: TPUs and GPUs would otherwise use bf16 or TF32 products."""
        return jax.lax.Precision.HIGHEST if self.dtype == jnp.float32 else None

    def axes(self, *axes: str | None) -> PartitionSpec | None:
        """The PartitionSpec of an activation with these logical axes; None off any mesh."""
        return sharding.partition_spec(self.rules, *axes) if self.mesh is not None else None

    def shard(self, x: jax.Array, *axes: str | None) -> jax.Array:
        """Shards an array by logical axes; the identity off any mesh."""
        if self.mesh is None:
            return x
        return reshard(
            x, jax.sharding.NamedSharding(self.mesh, sharding.partition_spec(self.rules, *axes))
        )

    def reorder_sequence(
        self, x: jax.Array, order: Callable[[jax.Array, str], jax.Array]
    ) -> jax.Array:
        """x [B, T, ...] by `context.balanced` or `.natural`, where sequences are split."""
        if self.mesh is None or sharding.num_shards(self.mesh, self.rules, "sequence") == 1:
            return x
        shards = self.axes("batch", "sequence", *(None,) * (x.ndim - 2))
        assert shards is not None
        axis = shards[1]
        return jax.shard_map(lambda x: order(x, axis), in_specs=shards, out_specs=shards)(x)

    @property
    def attention_shard(self) -> PartitionSpec | None:
        """How attention is split, along batch, heads and queries; None off any mesh."""
        return self.axes("batch", "heads", "sequence")

    def zeros(self, shape, dtype, *axes: str | None) -> jax.Array:
        """A sharded array of zeros."""
        return jnp.zeros(shape, dtype, out_sharding=self.axes(*axes))

    def einsum(self, equation: str, x: jax.Array, y: jax.Array, *axes: str | None) -> jax.Array:
        """`einsum.einsum`, fp32, sharded by the logical axes of the result."""
        return einsum_lib.einsum(equation, x, y, self.precision, self.axes(*axes))

    def check_batch(self, batch_size: int, length: int | None = None) -> None:
        """Raises ValueError if a batch, or its sequences, do not divide over the mesh."""
        if self.mesh is not None:
            sharding.check_batch(batch_size, self.mesh, self.rules, length)

    @property
    def on_cpu(self) -> bool:
        """Whether this runs on CPUs, whose compiler wants some products written otherwise."""
        return sharding.mesh_platform(self.mesh) == "cpu"

    def check_cache(self, cache: KVCache, batch_size: int) -> None:
        """Raises ValueError if a cache was made for another model, batch, dtype or mesh."""
        c, keys = self.config, [layer.keys.data for layer in cache.layers]
        expected = (batch_size, c.n_head, cache.capacity, c.head_dim)
        if len(keys) != c.n_layer or keys[0].shape != expected:
            raise ValueError(
                f"cache: found {len(keys)} layers of {list(keys[0].shape)}, expected {c.n_layer} "
                f"of {list(expected)} for this model and batch: make it with init_cache"
            )
        if sharding.mesh_of(keys[0]) != self.mesh:
            raise ValueError("cache: not on the mesh of the weights: make it with init_cache")
