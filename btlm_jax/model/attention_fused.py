"""Fused attention kernels, to which ALiBi comes as four more features of queries and keys.

Softmax ignores a constant per row, so slope * (key - query) may be slope * key, a product of
features that are exact in bf16 (`alibi.query_features`). Neither kernel knows of a bias, and the
result is as accurate as that of a kernel with a bias of its own. Nothing of size T x S exists, but
for the mask that cuDNN takes segments and split sequences as.
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

_LANES, _SUBLANES = 128, 8  # of a TPU: multiples of lengths and of widths
_BLOCK, _BLOCK_COMPUTE = 1024, 512  # of queries and keys at a time; the largest that fit every TPU
_USEFUL_BLOCK = 384  # smaller ones cost more than the padding that avoids them
_CUDNN_WIDTH = 8  # widths come in multiples of it


def splash_length(length: int, parts: int = 1) -> int:
    """The length to which splash pads a sequence: the next that useful blocks divide.

    A sequence split over several devices keeps its own, a multiple of two stripes of lanes for each
    of them: padding would shift what the others hold.
    """
    if parts > 1:
        return length
    n = -(-length // _LANES) * _LANES
    while _divisor(n, _BLOCK) < min(n, _USEFUL_BLOCK):
        n += _LANES
    return n


@functools.lru_cache(maxsize=32)  # visiting all blocks takes seconds for long sequences
def splash_kernel(
    length: int, heads: int, parts: int, interpret: bool
) -> splash_lib.SplashAttentionKernel:
    """The kernel for causal attention within sequences of `length` (a `splash_length`).

    Args:
      parts: devices over which a sequence is balanced (`context`). The leaves of the kernel say
        which blocks each visits, and are split over them.
      interpret: run as array operations, on any platform.
    """
    mask = mask_lib.MultiHeadMask([_Causal(length, parts)] * heads)
    q, kv = _divisor(length // (1 if parts == 1 else 2 * parts), _BLOCK), _divisor(length, _BLOCK)
    compute = _divisor(kv, _BLOCK_COMPUTE)
    with jax.ensure_compile_time_eval(), jax.sharding.use_abstract_mesh(_NO_MESH):
        kernel = splash_lib.make_splash_mha(
            mask,
            head_shards=1,
            q_seq_shards=parts,
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
        # On the host, because the program may be compiled for devices that are not here.
        return jax.tree.map(np.asarray, kernel)


_NO_MESH = jax.sharding.AbstractMesh((), ())


class _Causal(mask_lib.Mask):
    """A causal mask whose rows are those of `context.rows`."""

    def __init__(self, length: int, parts: int) -> None:
        self._length, self._key = length, (length, parts)
        # Read by splash, which then computes the mask within its kernel.
        self.q_sequence = context_parallel.device_positions(length, parts).reshape(-1)
        self.mask_function = _not_later

    @property
    def shape(self) -> tuple[int, int]:
        return self._length, self._length

    def __getitem__(self, idx) -> np.ndarray:
        rows, keys = self.q_sequence[idx[0]], np.arange(self._length)[idx[1]]
        shape = len(rows), len(keys)
        if rows.min() >= keys[-1] or rows.max() < keys[0]:  # nearly all blocks
            return np.broadcast_to(rows.min() >= keys[-1], shape)
        return _not_later(rows[:, None], keys[None, :])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Causal) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)


def _not_later(query, key):
    return query >= key


def _divisor(n: int, limit: int) -> int:
    """The largest multiple of the lanes, at most `limit`, that divides n."""
    return next(size for size in range(limit, 0, -_LANES) if n % size == 0)


def splash_attention(q, k, v, *, slopes, segments, kernel) -> jax.Array:
    """JAX's splash attention; arguments as in `attention.attention`, `kernel` for this length."""
    T = q.shape[2]
    rows = len(kernel.fwd_mask_info.q_sequence) - T  # of padding, at the end
    if slopes is not None:
        q, k = _with_features(q, k, slopes, _SUBLANES)
    q, k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, rows), (0, 0))) for x in (q, k, v))
    ids = None
    if segments is not None:
        # Keys of the padding come after every query, so any segment will do.
        ids = splash_lib.SegmentIds(*(jnp.pad(x, ((0, 0), (0, rows))) for x in segments))
    return jax.vmap(kernel)(q, k, v, ids)[:, :, :T]


def cudnn_attention(
    q,
    k,
    v,
    *,
    slopes,
    segments,
    positions,
    implementation: Literal["xla", "cudnn"] = "cudnn",
) -> jax.Array:
    """cuDNN's flash attention through JAX; arguments as in `attention_xla.xla_attention`.

    Causal masks are its own; segments and other positions are a boolean [B, 1, T, S].

    Args:
      implementation: "xla" computes the same, to test what is done here without the device.
    """
    width, K = cudnn_width(q.shape[3], slopes is not None), q.shape[3]
    if slopes is not None:
        q, k = _with_features(q, k, slopes, width - K)
    q, k, v = (
        jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, width - x.shape[3]))).swapaxes(1, 2)
        for x in (q, k, v)
    )
    mask = None
    if segments is not None or positions is not None:
        query = jnp.arange(q.shape[1]) if positions is None else positions
        mask = (jnp.arange(k.shape[1]) <= query[:, None])[None, None]
        if segments is not None:
            mask = mask & (segments[0][:, None, :, None] == segments[1][:, None, None, :])
    out = jax.nn.dot_product_attention(
        q, k, v, mask=mask, scale=1.0, is_causal=mask is None, implementation=implementation
    )
    return out.swapaxes(1, 2)[..., :K]


def cudnn_width(head_dim: int, alibi_features: bool) -> int:
    """The width of queries, keys and values under cuDNN: 88 for heads of 80 with ALiBi."""
    return -(-(head_dim + 4 * alibi_features) // _CUDNN_WIDTH) * _CUDNN_WIDTH


def _with_features(q, k, slopes, width: int):
    """q and k with `width` more columns, of which the first four hold ALiBi."""
    of_query = alibi.query_features(jax.lax.stop_gradient(slopes))[None, :, None]
    of_key = alibi.key_features(np.arange(k.shape[2]))[None, None]

    def append(x, features):
        features = jnp.pad(features.astype(x.dtype), ((0, 0),) * 3 + ((0, width - 4),))
        return jnp.concatenate([x, jnp.broadcast_to(features, (*x.shape[:3], width))], axis=-1)

    return append(q, of_query), append(k, of_key)
