"""Causal ALiBi attention: which implementation computes it, and how it is split over a mesh.

`"xla"` is the reference and runs everywhere; `"splash"` (TPU) and `"cudnn"` (NVIDIA) are fused
kernels.
"""

from __future__ import annotations

import functools
import math
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec, reshard

from btlm_jax.model import alibi, attention_fused, attention_xla, context_parallel, remat, sharding
from btlm_jax.utils.notices import warn_once

Implementation = Literal["xla", "splash", "cudnn"]
FUSED: dict[str, Implementation] = {"tpu": "splash", "gpu": "cudnn"}  # by platform
# Where sequences are split over devices, this many bytes of keys and values are gathered at a time.
# At 64k tokens over 8 devices, all heads at once would take 2.9 GiB forward and backward; groups of
# 4 take 0.7 GiB, for the same number of bytes over the interconnect.
_MAX_GATHERED_BYTES = 128 << 20


def attention(
    q_BHTK: jax.Array,
    k_BHTK: jax.Array,
    v_BHTK: jax.Array,
    *,
    slopes_H: jax.Array | None,
    segments: tuple[jax.Array, jax.Array] | None = None,
    implementation: Implementation | None = None,
    precision: jax.lax.Precision | None = None,
    shard: PartitionSpec | None = None,
) -> jax.Array:
    """Computes softmax(q·k - slope * distance, causal and within segments) @ v.

    Args:
      q_BHTK: the queries, already multiplied by the factor on q·k (where that costs no rounding).
      k_BHTK, v_BHTK: the keys and values.
      slopes_H: fp32, divided by the ALiBi scale; None without ALiBi. On a mesh, sharded like the
        heads.
      segments: int32 ids of queries and keys, [B, T] each; attention stays within equal ids.
      implementation: None takes the fused kernel of the platform; if that cannot be used, "xla",
        with one warning that gives the reason. (For attention over a cache see
        `attention_cached.cached_attention`.)
      precision: of the matrix products of "xla".
      shard: on a mesh, the mesh axes of batch, heads and sequence. Attention runs per shard,
        without communication along batch and heads. A split sequence must be in the balanced order
        of `context_parallel`; keys and values of the whole sequence are gathered.

    Returns:
      [B, H, T, K] in the dtype of q.

    Raises:
      ValueError: the implementation is unknown, or was given and cannot be used.
    """
    mesh = jax.sharding.get_abstract_mesh()
    batch_axes, head_axis, sequence_axis = shard or (None, None, None)
    num_shards = 1 if sequence_axis is None else mesh.shape[sequence_axis]
    platform = sharding.mesh_platform(mesh)
    chosen = choose_implementation(q_BHTK, slopes_H, segments, implementation, num_shards, platform)
    B, H, T, _ = q_BHTK.shape
    local_heads = H // (1 if head_axis is None else mesh.shape[head_axis])
    batch_shards = math.prod(mesh.shape[name] for name in sharding.axis_names(batch_axes))
    groups = 1
    if num_shards > 1:
        groups = _num_head_groups(local_heads, B // batch_shards * T)
    kernel = None
    if chosen == "splash":
        length = attention_fused.splash_length(T, num_shards)
        kernel = attention_fused.splash_kernel(
            length, local_heads // groups, num_shards, interpret=platform == "cpu"
        )
    gather_axis = sequence_axis if num_shards > 1 else None
    local = functools.partial(_local_attention, chosen, precision, gather_axis, groups)
    arrays = q_BHTK, k_BHTK, v_BHTK, slopes_H, segments, kernel
    if shard is None:
        return local(*arrays)
    specs = _shard_specs(shard, slopes_H, segments, kernel)
    if kernel is not None:
        arrays = *arrays[:-1], jax.tree.map(reshard, kernel, specs[-1])
    # Pallas does not declare over which axes its results vary.
    local = jax.shard_map(local, in_specs=specs, out_specs=specs[0], check_vma=kernel is None)
    return local(*arrays)


def _local_attention(
    chosen: Implementation, precision, gather_axis: str | None, groups: int,
    q_BHTK, k_BHTK, v_BHTK, slopes_H, segments, kernel,
) -> jax.Array:  # fmt: skip
    """Computes attention for the queries of one device, in groups of heads.

    Args:
      gather_axis: the mesh axis over which sequences are split; None if they are not.
      groups: the number of groups of heads.
    """

    def attend(heads):
        q_BHTK, k_BHSK, v_BHSK, slopes_H = heads
        positions_T, ids = None, segments
        if gather_axis is not None:
            # The gradients of k and v are scattered back by the transpose of the gather.
            gather = context_parallel.gather_in_natural_order
            positions_T = context_parallel.local_positions(q_BHTK.shape[2], gather_axis)
            k_BHSK, v_BHSK = (gather(x, gather_axis, 2) for x in (k_BHSK, v_BHSK))
            if segments is not None:
                ids = segments[0], gather(segments[1], gather_axis, 1)
        arrays = q_BHTK, k_BHSK, v_BHSK
        masks: dict[str, Any] = dict(slopes_H=slopes_H, segments=ids)
        if chosen == "splash":
            return attention_fused.splash_attention(*arrays, **masks, kernel=kernel)
        masks["positions_T"] = positions_T
        if chosen == "cudnn":
            return attention_fused.cudnn_attention(*arrays, **masks)
        out_BHTK = attention_xla.xla_attention(*arrays, **masks, precision=precision)
        return checkpoint_name(out_BHTK, remat.ATTENTION)

    if groups == 1:
        return attend((q_BHTK, k_BHTK, v_BHTK, slopes_H))

    def split(x):
        return jnp.moveaxis(x.reshape(x.shape[0], groups, -1, *x.shape[2:]), 1, 0)

    # The backward pass gathers again instead of keeping what the forward pass has gathered.
    policy = jax.checkpoint_policies.save_only_these_names(remat.ATTENTION)
    attend = jax.checkpoint(attend, prevent_cse=False, policy=policy)
    slopes_GH = None if slopes_H is None else slopes_H.reshape(groups, -1)
    out_GBHTK = jax.lax.map(attend, (*map(split, (q_BHTK, k_BHTK, v_BHTK)), slopes_GH))
    return jnp.moveaxis(out_GBHTK, 0, 1).reshape(q_BHTK.shape)


def _shard_specs(shard: PartitionSpec, slopes_H, segments, kernel) -> tuple:
    """Returns the PartitionSpecs of queries, keys, values, slopes, segments and kernel."""
    batch, heads, sequence = shard
    spec_BHTK, spec_BT = PartitionSpec(batch, heads, sequence, None), PartitionSpec(batch, sequence)
    return (
        spec_BHTK,
        spec_BHTK,
        spec_BHTK,
        None if slopes_H is None else PartitionSpec(heads),
        None if segments is None else (spec_BT, spec_BT),
        # Leaves of the kernel have an entry per query or block of them: [rows], [1, blocks, ...].
        jax.tree.map(lambda x: PartitionSpec(*(None, sequence)[2 - min(x.ndim, 2) :]), kernel),
    )


def _num_head_groups(heads: int, rows: int) -> int:
    """Returns the number of head groups that keeps one group's gathered keys and values small.

    Args:
      heads: on one device.
      rows: batch rows times length of whole sequences, on one device.
    """
    bytes_per_head = rows * 2 * 128 * 2  # keys and values in bf16, 128 lanes wide
    max_heads = max(1, _MAX_GATHERED_BYTES // bytes_per_head)
    return next(n for n in range(1, heads + 1) if heads % n == 0 and heads // n <= max_heads)


# Choice of the implementation -------------------------------------------------------------------


def choose_implementation(
    q_BHTK, slopes_H, segments, requested: Implementation | None, num_shards: int, platform: str
) -> Implementation:
    """Returns the implementation that computes this call of `attention`.

    Raises:
      ValueError: `requested` is unknown or cannot compute this call.
    """
    if requested is not None and requested not in get_args(Implementation):
        expected = ", ".join(map(repr, get_args(Implementation)))
        raise ValueError(
            f"implementation: found {requested!r}, expected one of {expected}, or None"
        )
    candidate = requested or FUSED.get(platform, "xla")
    if candidate == "xla":
        return "xla"
    reason = _why_unsupported(candidate, q_BHTK, slopes_H, segments, num_shards, platform)
    if reason is None:
        _warn_of_costs(candidate, q_BHTK, segments, num_shards)
        return candidate
    if requested is not None:
        raise ValueError(
            f"attention {requested!r}: found {reason}; use 'xla', or None for the best"
        )
    warn_once(f"attention runs in plain XLA, several times slower than {candidate!r}: {reason}")
    return "xla"


def _why_unsupported(
    candidate: Implementation, q_BHTK, slopes_H, segments, num_shards: int, platform: str
) -> str | None:
    """Returns why a fused implementation cannot compute this call, or None if it can."""
    T = q_BHTK.shape[2]
    if candidate == "splash":
        reason = _why_no_splash(q_BHTK, num_shards, platform)
    else:
        reason = _why_no_cudnn(q_BHTK, slopes_H, segments, num_shards, platform)
    if reason is None and slopes_H is not None and T > alibi.MAX_POSITIONS:
        return (
            f"length {T}, expected at most {alibi.MAX_POSITIONS}: positions are exact in bf16 up "
            "to there"
        )
    return reason


def _why_no_splash(q_BHTK, num_shards: int, platform: str) -> str | None:
    T = q_BHTK.shape[2]
    if platform not in ("tpu", "cpu"):
        return f"platform {platform!r}, expected 'tpu' ('cpu' interprets it, for tests)"
    if platform == "tpu" and q_BHTK.dtype != jnp.bfloat16:
        return f"dtype {q_BHTK.dtype}, expected bfloat16"
    if num_shards > 1 and T % (2 * num_shards * 128):
        return (
            f"length {T} over {num_shards} devices of the context axis, expected a multiple of "
            f"{2 * num_shards * 128} (two chunks of 128 each)"
        )
    return None


def _why_no_cudnn(q_BHTK, slopes_H, segments, num_shards: int, platform: str) -> str | None:
    T, K = q_BHTK.shape[2:]
    if platform != "gpu":
        return f"platform {platform!r}, expected 'gpu'"
    if q_BHTK.dtype not in (jnp.bfloat16, jnp.float16):
        return f"dtype {q_BHTK.dtype}, expected bfloat16 or float16"
    width, limit = attention_fused.cudnn_width(K, slopes_H is not None), _max_cudnn_width()
    if width > limit:
        return f"heads {width} wide (ALiBi included), expected at most {limit} on this GPU"
    if (segments is not None or num_shards > 1) and T % 2:
        return f"an odd length ({T}) with a mask, expected an even one"
    return None


def _max_cudnn_width() -> int:
    device = jax.devices()[0]
    return 256 if float(getattr(device, "compute_capability", 0)) >= 9 else 128


def _warn_of_costs(chosen: Implementation, q_BHTK, segments, num_shards: int) -> None:
    """Warns of padding (splash) and of masks that take memory (cuDNN)."""
    B, _, T, _ = q_BHTK.shape
    if chosen == "splash":
        padded = attention_fused.splash_length(T, num_shards)
        if padded != T:
            cost = 100 * ((padded / T) ** 2 - 1)
            warn_once(f"attention pads sequences from {T} to {padded} (+{cost:.0f} % of its work)")
    elif segments is not None or num_shards > 1:
        size = B * T * T * 2 / num_shards / 2**20
        warn_once(
            f"attention 'cudnn' reads segments and split sequences as a mask: {size:,.0f} MiB for "
            f"{B} sequences of {T}"
        )
