"""Fused attention kernels, with ALiBi as four extra features of queries and keys.

Softmax ignores a constant per row, so slope * key may replace slope * (key - query), and that is a
product of features exact in bf16 (`alibi.query_features`). Neither kernel needs a bias, and the
result is as accurate as that of a kernel with a built-in bias. Nothing of size T x S exists, except
the mask in which cuDNN takes segments and split sequences.
"""

from __future__ import annotations

import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash_lib
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as mask_lib

from btlm_jax.model import alibi, context_parallel, remat

_LANES, _SUBLANES = 128, 8  # of a TPU: lengths and widths come in multiples of them
_BLOCK, _BLOCK_COMPUTE = 1024, 512  # queries and keys at a time; the largest that fit every TPU
_MIN_BLOCK = 384  # smaller blocks cost more than the padding that avoids them
_CUDNN_WIDTH = 8  # widths come in multiples of it
_NO_MESH = jax.sharding.AbstractMesh((), ())


# Splash (TPU) -----------------------------------------------------------------------------------


def splash_length(length: int, num_shards: int = 1) -> int:
    """Returns the length to which splash pads a sequence: the next one that large blocks divide.

    A sequence split over devices is not padded, because padding would move tokens between devices;
    its length is a multiple of two chunks of `_LANES` per device.
    """
    if num_shards > 1:
        return length
    n = -(-length // _LANES) * _LANES
    while _largest_block(n, _BLOCK) < min(n, _MIN_BLOCK):
        n += _LANES
    return n


@functools.lru_cache(maxsize=32)  # visiting all blocks takes seconds for long sequences
def splash_kernel(
    length: int, heads: int, num_shards: int, interpret: bool
) -> splash_lib.SplashAttentionKernel:
    """Builds the kernel for causal attention in sequences of `length` (a `splash_length`).

    Args:
      length: of whole sequences.
      heads: of one call.
      num_shards: devices over which a sequence is split, in the balanced order of
        `context_parallel`. The leaves of the kernel list the blocks to visit, and must be split
        over the devices too.
      interpret: whether to run as array operations, on any platform.
    """
    mask = mask_lib.MultiHeadMask([_CausalMask(length, num_shards)] * heads)
    q_rows = length // (1 if num_shards == 1 else 2 * num_shards)
    q, kv = _largest_block(q_rows, _BLOCK), _largest_block(length, _BLOCK)
    compute = _largest_block(kv, _BLOCK_COMPUTE)
    with jax.ensure_compile_time_eval(), jax.sharding.use_abstract_mesh(_NO_MESH):
        kernel = splash_lib.make_splash_mha(
            mask,
            head_shards=1,
            q_seq_shards=num_shards,
            block_sizes=splash_lib.BlockSizes(
                block_q=q,
                block_kv=kv,
                block_kv_compute=compute,
                block_q_dkv=q,
                block_kv_dkv=kv,
                block_kv_dkv_compute=compute,
                block_q_dq=q,
                block_kv_dq=kv,
            ),
            residual_checkpoint_name=remat.ATTENTION,
            interpret=interpret,
        )
        # NumPy arrays, because the program may be compiled for devices that are not attached.
        return jax.tree.map(np.asarray, kernel)


class _CausalMask(mask_lib.Mask):
    """A causal mask whose rows are in the balanced order of `context_parallel`."""

    def __init__(self, length: int, num_shards: int) -> None:
        self._length, self._key = length, (length, num_shards)
        # Splash reads these two attributes and computes the mask inside the kernel.
        self.q_sequence = context_parallel.device_positions(length, num_shards).reshape(-1)
        self.mask_function = _is_visible

    @property
    def shape(self) -> tuple[int, int]:
        return self._length, self._length

    def __getitem__(self, idx) -> np.ndarray:
        rows, keys = self.q_sequence[idx[0]], np.arange(self._length)[idx[1]]
        shape = len(rows), len(keys)
        if rows.min() >= keys[-1] or rows.max() < keys[0]:  # nearly all blocks
            return np.broadcast_to(rows.min() >= keys[-1], shape)
        return _is_visible(rows[:, None], keys[None, :])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _CausalMask) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)


def _is_visible(query, key):
    return query >= key


def _largest_block(n: int, limit: int) -> int:
    """Returns the largest multiple of `_LANES`, at most `limit`, that divides n."""
    return next(size for size in range(limit, 0, -_LANES) if n % size == 0)


def splash_attention(q_BHTK, k_BHSK, v_BHSK, *, slopes_H, segments, kernel) -> jax.Array:
    """Computes JAX's splash attention; arguments as in `attention.attention`.

    Args:
      kernel: the `splash_kernel` for this length.
    """
    T = q_BHTK.shape[2]
    pad_rows = len(kernel.fwd_mask_info.q_sequence) - T
    if slopes_H is not None:
        q_BHTK, k_BHSK = _append_alibi_features(q_BHTK, k_BHSK, slopes_H, _SUBLANES)
    pad_width = (0, 0), (0, 0), (0, pad_rows), (0, 0)
    padded = (jnp.pad(x, pad_width) for x in (q_BHTK, k_BHSK, v_BHSK))
    ids = None
    if segments is not None:
        # The keys of the padding come after every query, so any segment will do.
        ids = splash_lib.SegmentIds(*(jnp.pad(x, ((0, 0), (0, pad_rows))) for x in segments))
    return jax.vmap(kernel)(*padded, ids)[:, :, :T]


# cuDNN (NVIDIA) ---------------------------------------------------------------------------------


def cudnn_attention(
    q_BHTK,
    k_BHSK,
    v_BHSK,
    *,
    slopes_H,
    segments,
    positions_T,
    implementation: Literal["xla", "cudnn"] = "cudnn",
) -> jax.Array:
    """Computes cuDNN's flash attention through JAX; arguments as in `attention_xla.xla_attention`.

    Causal masks are built into cuDNN; segments and positions become a boolean mask [B, 1, T, S].

    Args:
      implementation: "xla" computes the same without a GPU, for tests.
    """
    T, S, K = q_BHTK.shape[2], k_BHSK.shape[2], q_BHTK.shape[3]
    width = cudnn_width(K, slopes_H is not None)
    if slopes_H is not None:
        q_BHTK, k_BHSK = _append_alibi_features(q_BHTK, k_BHSK, slopes_H, width - K)
    q_BTHK, k_BSHK, v_BSHK = (
        jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, width - x.shape[3]))).swapaxes(1, 2)
        for x in (q_BHTK, k_BHSK, v_BHSK)
    )
    mask = None  # [1 or B, 1, T, S]
    if segments is not None or positions_T is not None:
        positions_T = jnp.arange(T) if positions_T is None else positions_T
        mask = (jnp.arange(S) <= positions_T[:, None])[None, None]
        if segments is not None:
            mask = mask & (segments[0][:, None, :, None] == segments[1][:, None, None, :])
    out_BTHK = jax.nn.dot_product_attention(
        q_BTHK,
        k_BSHK,
        v_BSHK,
        mask=mask,
        scale=1.0,
        is_causal=mask is None,
        implementation=implementation,
    )
    return out_BTHK.swapaxes(1, 2)[..., :K]


def cudnn_width(head_dim: int, alibi_features: bool) -> int:
    """Returns the width of q, k and v under cuDNN: 88 for heads of 80 with ALiBi."""
    return -(-(head_dim + 4 * alibi_features) // _CUDNN_WIDTH) * _CUDNN_WIDTH


def _append_alibi_features(q_BHTK, k_BHSK, slopes_H, width: int):
    """Appends `width` columns to q and k; the first four hold ALiBi, the others zeros."""
    q_features_H4 = alibi.query_features(jax.lax.stop_gradient(slopes_H))
    k_features_S4 = alibi.key_features(np.arange(k_BHSK.shape[2]))

    def append(x_BHTK, features):
        features = jnp.pad(features.astype(x_BHTK.dtype), ((0, 0),) * 3 + ((0, width - 4),))
        columns = jnp.broadcast_to(features, (*x_BHTK.shape[:3], width))
        return jnp.concatenate([x_BHTK, columns], axis=-1)

    q_BHTK = append(q_BHTK, q_features_H4[None, :, None])
    return q_BHTK, append(k_BHSK, k_features_S4[None, None])
