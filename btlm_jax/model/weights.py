"""The table of weights: every trainable array of the model, declared once.

Init, abstract shapes, shardings, optimizer groups, conversion in both directions, checkpoints and
parameter counts follow from `weight_table(config)`; nothing else lists weights by name.

In memory the weights of the layers are stacked: one leaf [L, ...] per weight under "blocks", so
that the layers can be scanned. On disk every layer has its own array (`disk_leaves`).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

from btlm_jax.config import BTLMConfig, Positions
from btlm_jax.utils.dtypes import FLOATS

Path = tuple[str, ...]
Role = Literal["embedding", "hidden", "vector"]
# Dtypes of stored weights, in our checkpoints and in those we convert.
STORED_DTYPES = FLOATS


@dataclasses.dataclass(frozen=True)
class Weight:
    """One trainable array.

    Attributes:
      path: the position in the tree of parameters; weights under "blocks" exist once per layer.
      shape: the unpadded shape for one layer.
      axes: the logical axis of each dimension (`sharding.RULES` maps them to mesh axes); None
        means replicated.
      inputs: the dimensions that a product with this weight contracts; empty for biases and other
        weights that are only added. Weights with inputs can be quantized (`packed.PackedWeight`).
      mean, std: the init is N(mean, std²), untruncated; a std of 0 gives a constant.
      role: the muP group, as in the original's `get_mup_param_groups`: the learning rate of
        "hidden" arrays is multiplied by mup_width_scale.
      decay: whether weight decay applies.
      hf_name: the name of the Hugging Face tensor, with `{layer}` if there is one per layer.
      hf_shape: the shape of that tensor, a reshape of `shape` (never a transpose).
    """

    path: Path
    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    inputs: tuple[int, ...]
    mean: float
    std: float
    role: Role
    decay: bool
    hf_name: str
    hf_shape: tuple[int, ...]

    @property
    def stacked(self) -> bool:
        """Whether there is one array per layer, stacked in memory."""
        return self.path[0] == "blocks"

    @property
    def name(self) -> str:
        """The path joined with slashes."""
        return "/".join(self.path)

    @property
    def gathered_axes(self) -> tuple[str | None, ...]:
        """The logical axes where the weight is used, after the gather of its fsdp shards."""
        return tuple(None if axis == "embed" else axis for axis in self.axes)

    def transposed_shape(self, padding: Mapping[str, int]) -> tuple[int, ...]:
        """Returns the padded shape of `packed.PackedWeight`: outputs, then all inputs flattened."""
        shape = self.padded(padding)
        outputs = (n for i, n in enumerate(shape) if i not in self.inputs)
        return (*outputs, math.prod(shape[i] for i in self.inputs))

    def padded(self, padding: Mapping[str, int]) -> tuple[int, ...]:
        """Returns the shape for one layer, with the logical axes in `padding` enlarged."""
        return tuple(
            padding.get(a, n) if a else n for a, n in zip(self.axes, self.shape, strict=True)
        )


@functools.cache
def weight_table(config: BTLMConfig) -> tuple[Weight, ...]:
    """Returns every weight of the model, in the order of the forward pass."""
    c = config
    D, H, K, F, V = c.n_embd, c.n_head, c.head_dim, c.n_inner, c.vocab_size
    std = c.initializer_range
    hidden = std * math.sqrt(c.mup_width_scale)
    # Under CompleteP, a factor in the forward pass replaces the 1 / sqrt(2 L).
    residual = hidden if c.completep_base_layers else hidden / math.sqrt(2 * c.n_layer)

    def embedding(name: str, size: int, axis: str) -> Weight:
        axes, hf = (axis, "embed"), f"transformer.{name}.weight"
        inputs = (1,) if name == "wte" else ()
        shape = (size, D)
        return Weight((name,), shape, axes, inputs, 0.0, std, "embedding", True, hf, shape)

    def vector(path: Path, shape: tuple[int, ...], axes: tuple, mean: float, hf: str) -> Weight:
        hf_shape = (math.prod(shape),)
        return Weight(path, shape, axes, (), mean, 0.0, "vector", False, hf, hf_shape)

    def layer_norm(path: Path, hf: str) -> list[Weight]:
        return [
            vector((*path, "scale"), (D,), (None,), 1.0, f"{hf}.weight"),
            vector((*path, "bias"), (D,), (None,), 0.0, f"{hf}.bias"),
        ]

    def linear(module: str, name: str, n_in: int, shape, axes, bias_from: int, std: float):
        """Returns a kernel, whose dimensions from `bias_from` on are outputs, and its bias."""
        path, hf = ("blocks", module, name), f"transformer.h.{{layer}}.{module}.{name}"
        hf_shape = (n_in, math.prod(shape) // n_in)
        bias = (*path, "bias"), shape[bias_from:], axes[bias_from:]
        kernel = (*path, "kernel")
        # The outputs of a projection back into the residual stream are not sharded: their bias is
        # added after the reduction over the tensor axis.
        bias_axes = tuple(None if a == "embed" else a for a in bias[2])
        return [
            Weight(
                kernel,
                shape,
                axes,
                tuple(range(bias_from)),
                0.0,
                std,
                "hidden",
                True,
                f"{hf}.weight",
                hf_shape,
            ),
            vector(bias[0], bias[1], bias_axes, 0.0, f"{hf}.bias"),
        ]

    qkv_axes = ("embed", "qkv", "heads", "head_dim")
    block = [
        *layer_norm(("blocks", "ln_1"), "transformer.h.{layer}.ln_1"),
        *linear("attn", "c_attn", D, (D, 3, H, K), qkv_axes, 1, hidden),
        *linear("attn", "c_proj", D, (H, K, D), ("heads", "head_dim", "embed"), 2, residual),
        *layer_norm(("blocks", "ln_2"), "transformer.h.{layer}.ln_2"),
        *linear("mlp", "c_fc", D, (D, F), ("embed", "mlp"), 1, hidden),
        *(linear("mlp", "c_fc2", D, (D, F), ("embed", "mlp"), 1, hidden) if c.gated else []),
        *linear("mlp", "c_proj", F, (F, D), ("mlp", "embed"), 1, residual),
    ]
    learned = c.positions is Positions.LEARNED
    weights = [
        embedding("wte", V, "vocab"),
        *([embedding("wpe", c.n_positions, "positions")] if learned else []),
        *block,
        *layer_norm(("ln_f",), "transformer.ln_f"),
    ]
    if not c.tie_word_embeddings:
        shape, axes = (V, D), ("vocab", "embed")
        head = Weight(
            ("lm_head",), shape, axes, (1,), 0.0, hidden, "hidden", True, "lm_head.weight", shape
        )
        weights.append(head)
    return tuple(weights)


@functools.cache
def weights_by_path(config: BTLMConfig) -> Mapping[Path, Weight]:
    """Returns the table keyed by tree path."""
    return {w.path: w for w in weight_table(config)}


@functools.cache
def weights_by_name(config: BTLMConfig) -> Mapping[str, Weight]:
    """Returns the table keyed by the path joined with slashes."""
    return {w.name: w for w in weight_table(config)}


def count_parameters(config: BTLMConfig) -> int:
    """Counts the trainable parameters: tied embeddings once, ALiBi slopes not at all."""
    return sum(math.prod(stacked_shape(w, config)) for w in weight_table(config))


def stacked_shape(w: Weight, config: BTLMConfig, padding: Mapping[str, int] | None = None):
    """Returns the shape in memory: `[L, ...]` for the weights of the layers, padded if given."""
    return (config.n_layer,) * w.stacked + w.padded(padding or {})


def paddable_sizes(config: BTLMConfig) -> dict[str, int]:
    """Returns the logical axes that a mesh may zero-pad, with their true sizes."""
    return {"vocab": config.vocab_size, "mlp": config.n_inner}


# One array per layer: the layout on disk and of Hugging Face --------------------------------------


@dataclasses.dataclass(frozen=True)
class DiskLeaf:
    """One stored array: a weight of one layer or outside the layers, or a part of a quantized one.

    Attributes:
      weight: its entry in the table.
      layer: the number of the layer; None for weights outside the layers.
      part: the name of one array of a quantized weight (`quantization.stored_parts`); else None.
      part_shape: the shape of that array.
      dtype: the only valid dtype; None allows any of `STORED_DTYPES`.
    """

    weight: Weight
    layer: int | None
    part: str | None = None
    part_shape: tuple[int, ...] = ()
    dtype: str | None = None

    @property
    def path(self) -> Path:
        """The path in a checkpoint: "blocks" is followed by the layer's number."""
        path = self.weight.path
        if self.layer is not None:
            path = ("blocks", str(self.layer), *path[1:])
        return path if self.part is None else (*path, self.part)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the stored array."""
        return self.weight.shape if self.part is None else self.part_shape

    @property
    def hf_name(self) -> str:
        """The Hugging Face name of the weight, followed by our name of the part if there is one."""
        name = self.weight.hf_name.format(layer=self.layer)
        return name if self.part is None else f"{name}.{self.part}"


def disk_leaves_of(w: Weight, config: BTLMConfig) -> list[DiskLeaf]:
    """Returns the stored arrays of one weight, one per layer."""
    return [DiskLeaf(w, i) for i in range(config.n_layer)] if w.stacked else [DiskLeaf(w, None)]


def common_dtype(w: Weight, dtypes: Iterable[Any]) -> Any:
    """Returns the dtype that the stored arrays of one weight have in common.

    Raises:
      ValueError: the layers have different dtypes.
    """
    by_name = {str(d): d for d in dtypes}
    if len(by_name) > 1:
        raise ValueError(
            f"the layers of {w.name} are stored as {', '.join(sorted(by_name))} and cannot be "
            "stacked without a conversion; pass dtype="
        )
    return next(iter(by_name.values()))


def disk_leaves(config: BTLMConfig) -> Iterator[DiskLeaf]:
    """Yields every stored array, layer by layer, in the order of the forward pass."""
    weights = weight_table(config)
    stacked = [w for w in weights if w.stacked]
    first = weights.index(stacked[0])
    yield from (DiskLeaf(w, None) for w in weights[:first])
    for layer in range(config.n_layer):
        yield from (DiskLeaf(w, layer) for w in stacked)
    yield from (DiskLeaf(w, None) for w in weights[first + len(stacked) :])
