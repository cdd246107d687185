"""Causal ALiBi attention: which implementation computes it, and on which part of a mesh.

`"xla"` is the reference and runs everywhere; `"splash"` (TPU) and `"cudnn"` (NVIDIA) are fused
kernels.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec, reshard

from btlm_jax.model import alibi, attention_fused, attention_xla, context_parallel, remat, sharding

logger = logging.getLogger(__name__)

Implementation = Literal["xla", "splash", "cudnn"]
# Bytes of keys and values of whole sequences at a time, where they are split over devices. At 64k
# tokens over 8 devices, all heads at once would take 2.9 GiB forward and backward; groups of 4 take
# 0.7, for the same bytes over the interconnect.
_GATHERED = 128 << 20
FUSED: dict[str, Implementation] = {"tpu": "splash", "gpu": "cudnn"}  # by platform


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    slopes: jax.Array | None,
    segments: tuple[jax.Array, jax.Array] | None = None,
    implementation: Implementation | None = None,
    precision: jax.lax.Precision | None = None,
    shard: PartitionSpec | None = None,
) -> jax.Array:
    """softmax(q·k - slope * distance, causal and within segments) @ v.

    Args:
      q: [B, H, T, K], already multiplied by the factor on q·k (where that costs no rounding).
      k, v: [B, H, T, K].
      slopes: fp32 [H], divided by the ALiBi scale; None without ALiBi. On a mesh, sharded as the
        heads are.
      segments: int32 ids of queries and keys, [B, T] each; attention stays within equal ids.
      implementation: None takes the fused kernel of the platform; where that cannot serve, "xla",
        with one warning that says why. A named one that cannot serve is an error. (Attention over a
        cache is `kv_cache.extend`.)
      precision: of the matrix products of "xla".
      shard: on a mesh, the mesh axes of batch, heads and sequence. Attention runs per shard:
        without communication along batch and heads. Where the sequence is split, it is so as in
        `context`, and the keys and values of the whole of it are gathered.

    Returns:
      [B, H, T, K] in q's dtype.

    Raises:
      ValueError: unknown implementation, or one that cannot serve.
    """
    mesh = jax.sharding.get_abstract_mesh()
    batch, heads, sequence = shard or (None, None, None)
    parts = 1 if sequence is None else mesh.shape[sequence]
    platform = sharding.mesh_platform(mesh)
    chosen = _choose(q, slopes, segments, implementation, parts, platform)
    local_heads = q.shape[1] // (1 if heads is None else mesh.shape[heads])
    local_batch = q.shape[0] // math.prod(mesh.shape[name] for name in sharding.axis_names(batch))
    groups = 1 if parts == 1 else _groups(local_heads, local_batch * k.shape[2])
    kernel = None
    if chosen == "splash":
        length = attention_fused.splash_length(q.shape[2], parts)
        kernel = attention_fused.splash_kernel(
            length, local_heads // groups, parts, interpret=platform == "cpu"
        )
    attend = functools.partial(_attend, chosen, precision, sequence if parts > 1 else None)
    local = functools.partial(_in_groups, attend, groups)
    arrays = q, k, v, slopes, segments, kernel
    return local(*arrays) if shard is None else _per_shard(local, shard, *arrays)


def _attend(chosen, precision, sequence, q, k, v, slopes, segments, kernel) -> jax.Array:
    """Attention of the queries of one device; `sequence` is the mesh axis they are split over."""
    positions = None
    if sequence is not None:
        # The gradients of k and v are scattered back by the transpose of the gather.
        positions = context_parallel.local_positions(q.shape[2], sequence)
        k, v = (context_parallel.gather_in_natural_order(x, sequence, 2) for x in (k, v))
        if segments is not None:
            segments = (
                segments[0],
                context_parallel.gather_in_natural_order(segments[1], sequence, 1),
            )
    inputs = dict(slopes=slopes, segments=segments)
    if chosen == "splash":
        return attention_fused.splash_attention(q, k, v, **inputs, kernel=kernel)
    if chosen == "cudnn":
        return attention_fused.cudnn_attention(q, k, v, **inputs, positions=positions)
    out = attention_xla.xla_attention(q, k, v, **inputs, positions=positions, precision=precision)
    return checkpoint_name(out, remat.ATTENTION)


def _in_groups(attend: Callable[..., jax.Array], groups: int, q, k, v, slopes, *shared):
    """`attend`, one group of heads after another."""
    if groups == 1:
        return attend(q, k, v, slopes, *shared)

    def split(x):
        return jnp.moveaxis(x.reshape(x.shape[0], groups, -1, *x.shape[2:]), 1, 0)

    # The backward pass gathers again, rather than keep what the forward pass has gathered.
    names = jax.checkpoint_policies.save_only_these_names(remat.ATTENTION)
    one = jax.checkpoint(attend, prevent_cse=False, policy=names)
    xs = *map(split, (q, k, v)), None if slopes is None else slopes.reshape(groups, -1)
    out = jax.lax.map(lambda x: one(*x, *shared), xs)
    return jnp.moveaxis(out, 0, 1).reshape(q.shape)


def _per_shard(
    local: Callable[..., jax.Array], shard: PartitionSpec, q, k, v, slopes, segments, kernel
) -> jax.Array:
    """`local` on every device of the mesh, with its part of the arrays."""
    batch, heads, sequence = shard
    bhtk, bt = PartitionSpec(batch, heads, sequence, None), PartitionSpec(batch, sequence)
    specs = (
        bhtk,
        bhtk,
        bhtk,
        None if slopes is None else PartitionSpec(heads),
        None if segments is None else (bt, bt),
        # Every leaf says what the rows of queries do: [rows] or [1, blocks of rows, ...].
        jax.tree.map(lambda x: PartitionSpec(*(None, sequence)[2 - min(x.ndim, 2) :]), kernel),
    )
    if kernel is not None:
        kernel = jax.tree.map(reshard, kernel, specs[-1])
    # Pallas does not say over which axes its results vary.
    mapped = jax.shard_map(local, in_specs=specs, out_specs=bhtk, check_vma=kernel is None)
    return mapped(q, k, v, slopes, segments, kernel)


def _groups(heads: int, rows: int) -> int:
    """Into how many groups heads are cut, so that the gathered part of one stays small."""
    fit = max(1, _GATHERED // (rows * 2 * 128 * 2))  # keys and values in bf16, 128 lanes wide
    return next(n for n in range(1, heads + 1) if heads % n == 0 and heads // n <= fit)


def _choose(q, slopes, segments, named, parts: int, platform: str) -> Implementation:
    """The implementation that computes this call."""
    if named is not None and named not in get_args(Implementation):
        expected = ", ".join(map(repr, get_args(Implementation)))
        raise ValueError(f"implementation: found {named!r}, expected one of {expected}, or None")
    wanted = named or FUSED.get(platform, "xla")
    if wanted == "xla":
        return "xla"
    why = _cannot(wanted, q, slopes, segments, parts, platform)
    if why is None:
        _tell_costs(wanted, q, segments, parts)
        return wanted
    if named is not None:
        raise ValueError(f"attention {named!r}: found {why}; use 'xla', or None for the best")
    _warn_once(f"attention runs in plain XLA, several times slower than {wanted!r}: {why}")
    return "xla"


def _cannot(wanted: str, q, slopes, segments, parts: int, platform: str) -> str | None:
    """Why a fused implementation cannot compute this call; None if it can."""
    T, K = q.shape[2:]
    if wanted == "splash":
        if platform not in ("tpu", "cpu"):
            return f"platform {platform!r}, expected 'tpu' ('cpu' interprets it, for tests)"
        if platform == "tpu" and q.dtype != jnp.bfloat16:
            return f"dtype {q.dtype}, expected bfloat16"
        if parts > 1 and T % (2 * parts * 128):
            return (
                f"length {T} over {parts} devices of the context axis, expected a multiple of "
                f"{2 * parts * 128} (two stripes of 128 each)"
            )
    else:
        if platform != "gpu":
            return f"platform {platform!r}, expected 'gpu'"
        if q.dtype not in (jnp.bfloat16, jnp.float16):
            return f"dtype {q.dtype}, expected bfloat16 or float16"
        width, limit = attention_fused.cudnn_width(K, slopes is not None), _cudnn_limit()
        if width > limit:
            return f"heads {width} wide (ALiBi included), expected at most {limit} on this GPU"
        if (segments is not None or parts > 1) and T % 2:
            return f"an odd length ({T}) with a mask, expected an even one"
    if slopes is not None and T > alibi.POSITIONS:
        return f"length {T}, expected at most {alibi.POSITIONS}: positions are exact in bf16 to it"
    return None


def _cudnn_limit() -> int:
    device = jax.devices()[0]
    return 256 if float(getattr(device, "compute_capability", 0)) >= 9 else 128


def _tell_costs(chosen: str, q, segments, parts: int) -> None:
    B, _, T, _ = q.shape
    if chosen == "splash":
        padded = attention_fused.splash_length(T, parts)
        if padded != T:
            cost = 100 * ((padded / T) ** 2 - 1)
            _warn_once(f"attention pads sequences from {T} to {padded} (+{cost:.0f} % of its work)")
    elif segments is not None or parts > 1:
        size = B * T * T * 2 / parts / 2**20
        _warn_once(
            f"attention 'cudnn' reads segments and split sequences as a mask: {size:,.0f} MiB for "
            f"{B} sequences of {T}"
        )


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning("%s", message)
