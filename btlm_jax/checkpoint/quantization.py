"""Weights in int8 and int4: which ones are quantized, and the arrays that a checkpoint then holds.

The weights that matrix products read are quantized: the kernels of the layers, in int8 (one scale
per output) or int4 (one scale per group of consecutive inputs), and the embedding and an untied
head, in int8 (one scale per row) or bfloat16. All other weights keep their dtype.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from btlm_jax.checkpoint.quantize_arrays import QUANTIZERS, QuantizedArray
from btlm_jax.checkpoint.schemes import INT8, KERNEL_SCHEMES, SCHEMES, Scheme
from btlm_jax.config import BTLMConfig
from btlm_jax.model import weights
from btlm_jax.model.packed import PackedWeight, transposed, unpack
from btlm_jax.model.params import Params, check_params, iter_unstacked, unflatten_tree

EMBEDDINGS = ("int8", "bfloat16")


@dataclasses.dataclass(frozen=True)
class Quantization:
    """How the weights of a model are quantized.

    Attributes:
      bits: bits of the kernels: 8 or 4.
      group: number of consecutive inputs of an int4 kernel that share a scale: 32, 64 or 128; None
        for int8.
      embedding: format of the embedding and an untied head: "int8" or "bfloat16".

    Raises:
      ValueError: a field has another value.
    """

    bits: int
    group: int | None = None
    embedding: Literal["int8", "bfloat16"] = "int8"

    def __post_init__(self) -> None:
        groups: dict[int, list[int | None]] = {}
        for bits, group in KERNEL_SCHEMES:
            groups.setdefault(bits, []).append(group)
        if self.bits not in groups:
            expected = " or ".join(map(str, groups))
            raise ValueError(f"quantization bits: found {self.bits!r}, expected {expected}")
        if self.group not in groups[self.bits]:
            expected = " or ".join(map(str, groups[self.bits]))
            raise ValueError(
                f"quantization group: found {self.group!r}, expected {expected} for "
                f"{self.bits} bits"
            )
        if self.embedding not in EMBEDDINGS:
            raise ValueError(
                f"quantization embedding: found {self.embedding!r}, expected "
                f"{' or '.join(EMBEDDINGS)}"
            )

    @classmethod
    def parse(cls, text: str, embedding: Any = "int8") -> Quantization:
        """Returns the quantization of kernels by the name of a scheme, such as "int4:128".

        Raises:
          ValueError: no scheme has this name.
        """
        if text not in SCHEMES:
            raise ValueError(f"quantize: found {text!r}, expected one of {', '.join(SCHEMES)}")
        scheme = SCHEMES[text]
        return cls(scheme.bits, scheme.group, embedding)

    def scheme(self, w: weights.Weight) -> Scheme | None:
        """Returns the scheme of a weight; None if it stays a float."""
        if not w.inputs:
            return None
        if w.stacked:
            return KERNEL_SCHEMES[self.bits, self.group]
        return INT8 if self.embedding == "int8" else None

    def __str__(self) -> str:
        group = f" in groups of {self.group}" if self.group else ""
        return f"int{self.bits}{group}, embedding {self.embedding}"


# Arrays of a checkpoint ---------------------------------------------------------------------------


def stored_leaves(
    config: BTLMConfig, quantization: Quantization | None
) -> Iterator[weights.DiskLeaf]:
    """Yields every stored array, layer by layer.

    Args:
      config: the model.
      quantization: None for a checkpoint of floats.
    """
    for leaf in weights.disk_leaves(config):
        yield from stored_parts(leaf, quantization)


def stored_parts(
    leaf: weights.DiskLeaf, quantization: Quantization | None
) -> tuple[weights.DiskLeaf, ...]:
    """Returns the arrays that store a weight: itself, or values ("int8", "int4") and "scales"."""
    w = leaf.weight
    if quantization is None or not w.inputs:
        return (leaf,)
    scheme = quantization.scheme(w)
    if scheme is None:
        return (dataclasses.replace(leaf, dtype="bfloat16"),)
    *outputs, inputs = w.transposed_shape({})
    return tuple(
        dataclasses.replace(
            leaf, part=part.name, part_shape=(*outputs, part.size), dtype=part.dtype
        )
        for part in scheme.parts(inputs)
    )


def quantize_array(
    x: np.ndarray, leaf: weights.DiskLeaf, quantization: Quantization
) -> QuantizedArray:
    """Quantizes one weight of a layer, the embedding or the head.

    Peak memory, besides x and the result, is a copy of the quantized values and a few MiB.

    Args:
      x: floats of the shape in the table; or any rows of an embedding or head.
      leaf: the weight, or one of its `stored_parts`.
      quantization: of the model.

    Returns:
      Values and scales in the layout of `stored_parts`.

    Raises:
      ValueError: NaN or Inf; the message names the weight.
    """
    w, scheme = leaf.weight, quantization.scheme(leaf.weight)
    assert scheme is not None
    outputs = w.transposed_shape({})[:-1]
    inputs_first = 0 in w.inputs
    matrix = x.reshape(-1, math.prod(outputs)) if inputs_first else x
    with np.errstate(invalid="ignore"):  # NaN and Inf, which are refused below
        result = QUANTIZERS[scheme.layout](matrix, scheme, 0 if inputs_first else 1)
    if inputs_first:
        values, scales = (
            np.ascontiguousarray(array.T).reshape(*outputs, -1)
            for array in (result.values, result.scales)
        )
        result = QuantizedArray(values, scales, result.errors)
    if not np.isfinite(result.scales.astype(np.float32)).all():
        raise ValueError(
            f"{'/'.join(leaf.path)} holds NaN or Inf, which cannot be quantized: repair the source"
        )
    return result


# In memory ----------------------------------------------------------------------------------------


def quantize_params(
    params: Mapping[str, Any], config: BTLMConfig, quantization: Quantization
) -> Params:
    """Quantizes weights in memory.

    Args:
      params: float weights, stacked or unstacked, on one device.
      config: their model.
      quantization: how to quantize them.

    Returns:
      Unstacked weights, equal to those of a quantized checkpoint that is loaded without a mesh.

    Raises:
      ValueError: the weights do not match the configuration, are padded, quantized already, or hold
        NaN or Inf.
    """
    if check_params(params, config):
        raise ValueError(
            "weights to quantize: found them padded for a mesh, expected unpadded ones"
        )
    flat, on_cpu = {}, jax.default_backend() == "cpu"
    for leaf, x in iter_unstacked(config, params):
        flat[leaf.path] = x
        first, *scales = stored_parts(leaf, quantization)
        if scales:
            flat[leaf.path] = _quantized_kernel(_to_host(x, leaf), first, quantization, on_cpu)
        elif first.dtype is not None:
            x = jnp.asarray(_to_host(x, leaf), first.dtype)
            flat[leaf.path] = transposed(x, leaf.weight.inputs) if on_cpu else x
    return unflatten_tree(flat)


def _quantized_kernel(
    x: np.ndarray, leaf: weights.DiskLeaf, quantization: Quantization, on_cpu: bool
) -> PackedWeight:
    """Quantizes a weight to a kernel on the default device; int4 stays packed only on CPUs."""
    values, scales, _ = quantize_array(x, leaf, quantization)
    inputs = leaf.weight.transposed_shape({})[-1]
    kernel = PackedWeight(jnp.asarray(values), jnp.asarray(scales), inputs)
    if kernel.packed and not on_cpu:
        kernel = dataclasses.replace(kernel, values=unpack(kernel.values).astype(jnp.int4))
    return kernel


def _to_host(x: Any, leaf: weights.DiskLeaf) -> np.ndarray:
    """Copies a float weight to the host, in the layout of the table.

    Raises:
      ValueError: it is quantized.
    """
    if not isinstance(x, PackedWeight):
        return np.asarray(x)
    if x.scales is not None:
        raise ValueError(
            f"{'/'.join(leaf.path)}: found {x.values.dtype} with scales, expected floats: quantize "
            "the original weights"
        )
    values = np.asarray(x.values)
    values = np.moveaxis(values, -1, 0) if 0 in leaf.weight.inputs else values
    return values.reshape(leaf.weight.shape)
