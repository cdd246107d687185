"""The table of weights: every trainable array of the model, declared once.

Init, abstract shapes, shardings, optimizer groups, conversion in both directions, checkpoints and
parameter counts follow from `table(config)`; nothing else lists weights by name.

In memory the weights of a layer are stacked: one leaf [L, ...] per weight under "blocks", so that
the layers can be scanned. On disk every layer has its own leaf (`disk_leaves`).
"""

from __future__ import annotations

import dataclasses
import functools
import math
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from btlm_jax.config import BTLMConfig
from btlm_jax.model.packed import Kernel

Path = tuple[str, ...]
Params = dict[str, Any]
Role = Literal["embedding", "hidden", "vector"]
# The dtypes weights are stored in, by us and in the checkpoints we convert.
STORED_DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class Weight:
    """One trainable array.

    Attributes:
      path: where it stands in the tree; weights under "blocks" exist once per layer.
      shape: of one layer, unpadded.
      axes: the logical axis of each dimension (`sharding.RULES` maps them to mesh axes); None is
        replicated by design.
      inputs: the dimensions over which a product with it sums; none for what is only added. These
        weights can be quantized (`kernels.Kernel`).
      mean, std: the init is N(mean, std²), untruncated; std 0 is a constant.
      role: the muP group (FACTS of the original's `get_mup_param_groups`): "hidden" arrays get
        their learning rate multiplied by mup_width_scale.
      decay: whether weight decay applies.
      hf_name: its Hugging Face name, with `{layer}` where there is one per layer.
      hf_shape: its shape there, a reshape of `shape` (never a transpose).
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
        """Whether there is one per layer."""
        return self.path[0] == "blocks"

    @property
    def name(self) -> str:
        """The path joined with slashes, for messages."""
        return "/".join(self.path)

    def inputs_last(self, padding: Mapping[str, int]) -> tuple[int, ...]:
        """The padded shape as `kernels.Kernel` has it: outputs, then all inputs as one."""
        shape = self.padded(padding)
        outputs = (n for i, n in enumerate(shape) if i not in self.inputs)
        return (*outputs, math.prod(shape[i] for i in self.inputs))

    def padded(self, padding: Mapping[str, int]) -> tuple[int, ...]:
        """The shape of one layer with the logical axes in `padding` enlarged to the given sizes."""
        return tuple(
            padding.get(a, n) if a else n for a, n in zip(self.axes, self.shape, strict=True)
        )


@functools.cache
def table(config: BTLMConfig) -> tuple[Weight, ...]:
    """Every weight of the model, in the order of the forward pass."""
    c = config
    D, H, K, F, V = c.n_embd, c.n_head, c.head_dim, c.n_inner, c.vocab_size
    std = c.initializer_range
    hidden = std * math.sqrt(c.mup_width_scale)
    # Under CompleteP the forward pass has a factor in its place.
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
        """A kernel whose dimensions from `bias_from` on are outputs, and its bias."""
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
    weights = [
        embedding("wte", V, "vocab"),
        *([] if c.alibi else [embedding("wpe", c.n_positions, "positions")]),
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
def by_path(config: BTLMConfig) -> Mapping[Path, Weight]:
    """The table keyed by tree path."""
    return {w.path: w for w in table(config)}


def count(config: BTLMConfig) -> int:
    """The number of trainable parameters (tied embeddings once, slopes not counted)."""
    return sum(math.prod(stacked_shape(w, config)) for w in table(config))


def stacked_shape(w: Weight, config: BTLMConfig, padding: Mapping[str, int] | None = None):
    """The in-memory shape: `[L, ...]` for the weights of a layer, with padded axes if given."""
    return (config.n_layer,) * w.stacked + w.padded(padding or {})


def init(
    key: jax.Array,
    config: BTLMConfig,
    dtype: DTypeLike = jnp.float32,
    padding: Mapping[str, int] | None = None,
    shardings: Mapping[str, Any] | None = None,
    truncation: float | None = None,
) -> Params:
    """Draws fresh weights; the values depend on neither padding, which is zero, nor sharding.

    Every weight has its own key, derived from its path, so adding a weight changes no other. They
    are drawn one by one: the peak of memory is the result and one weight.

    Args:
      shardings: a tree like the result; default the default device.
      truncation: draw within this many standard deviations of the plain normal, whose standard
        deviation shrinks with it (0.88 of it at 2), as in the original training.
    """
    placed = flatten(shardings) if shardings is not None else {}
    leaves = {}
    for w in table(config):
        shape, target = stacked_shape(w, config), stacked_shape(w, config, padding)
        out = placed.get(w.path)
        draw = _drawer(shape, target, w.mean, w.std, truncation, jnp.dtype(dtype), out)
        leaves[w.path] = draw(jax.random.fold_in(key, zlib.crc32(w.name.encode())))
    return unflatten(leaves)


@functools.cache
def _drawer(shape, target, mean, std, truncation, dtype, sharding):
    """A compiled function from a key to N(mean, std²) of `shape`, zero-padded to `target`."""

    def normal(key):
        if truncation is None:
            return jax.random.normal(key, shape)
        return jax.random.truncated_normal(key, -truncation, truncation, shape)

    def draw(key):
        value = mean + std * normal(key) if std else jnp.full(shape, mean)
        pads = [(0, n - m) for m, n in zip(shape, target, strict=True)]
        return jnp.pad(value.astype(dtype), pads)

    return jax.jit(draw, out_shardings=sharding)


def fold_completep(config: BTLMConfig, params: Mapping[str, Any]) -> tuple[BTLMConfig, Params]:
    """The same model without CompleteP, as Hugging Face's code can run it.

    The factor on residual branches is multiplied into the kernels and biases of their
    out-projections, in their dtype: exact if it is a power of two (and nothing underflows), else
    rounded. The result is for inference and export; what is trained on is the original. `save` it
    with `assets=asset_files(path)` to carry the tokenizer of a checkpoint along.

    Args:
      config: with CompleteP or without; then nothing changes.
      params: its weights, sharded or not, padded or not.
    """
    scale, flat = config.residual_scale, flatten(params)
    if scale != 1.0:
        residual = {p for p in by_path(config) if p[-2:-1] == ("c_proj",)}

        def scaled(x):
            return (x.astype(jnp.float32) * scale).astype(x.dtype)

        flat = {path: scaled(x) if path in residual else x for path, x in flat.items()}
    plain = dataclasses.replace(config, completep_base_layers=None, completep_alpha=1.0)
    return plain, unflatten(flat)


def flatten(tree: Mapping[str, Any]) -> dict[Path, Any]:
    """A nested dict as a flat one keyed by path."""
    flat: dict[Path, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            for path, leaf in flatten(value).items():
                flat[(key, *path)] = leaf
        else:
            flat[(key,)] = value
    return flat


def unflatten(flat: Mapping[Path, Any]) -> Params:
    """The inverse of `flatten`."""
    tree: Params = {}
    for path, leaf in flat.items():
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = leaf
    return tree


def by_layer(config: BTLMConfig, params: Mapping[str, Any]) -> Params:
    """The weights with every layer's apart, as decoding wants them: {"blocks": {"0": {...}}}."""
    return unflatten({leaf.path: x for leaf, x in layers_of(config, params)})


def layers_of(config: BTLMConfig, params: Mapping[str, Any]) -> Iterator[tuple[DiskLeaf, Any]]:
    """Every weight of every layer, one after the other: cut out of stacked ones, or as it is."""
    flat, apart = flatten(params), is_by_layer(params)
    for leaf in disk_leaves(config):
        if apart or leaf.layer is None:
            yield leaf, flat[leaf.path]
        else:
            stacked = flat[leaf.weight.path]
            yield leaf, jax.lax.index_in_dim(stacked, leaf.layer, 0, keepdims=False)


def is_by_layer(params: Mapping[str, Any]) -> bool:
    """Whether every layer's weights are apart, not stacked."""
    return "0" in params.get("blocks", {})


def check(params: Mapping[str, Any], config: BTLMConfig) -> dict[str, int]:
    """Checks a tree of weights, stacked or by layer, against the table.

    Returns:
      Its padding by logical axis.

    Raises:
      ValueError: weights are missing, unexpected or of the wrong shape; all are listed.
    """
    flat, apart = flatten(params), is_by_layer(params)
    known = {x.path: x.weight for x in disk_leaves(config)} if apart else by_path(config)
    problems = [f"missing: {'/'.join(p)}" for p in known if p not in flat]
    problems += [f"unexpected: {'/'.join(p)}" for p in flat if p not in known]
    sizes, padding = padded_sizes(config), {}
    for path, w in known.items():
        for axis in sizes.keys() - padding.keys():
            if path in flat and axis in w.axes:
                size = _size_of(flat[path], w, axis, w.stacked and not apart)
                padding |= {} if size is None else {axis: size}
    padding = {a: n for a, n in padding.items() if n > sizes[a]}
    for path, leaf in flat.items():
        if path not in known:
            continue
        w, kinds = known[path], jnp.floating
        expected = (config.n_layer,) * (w.stacked and not apart) + w.padded(padding)
        if isinstance(leaf, Kernel):
            expected, kinds = w.inputs_last(padding), jnp.number
        if tuple(leaf.shape) != expected:
            problems.append(f"{'/'.join(path)}: found shape {leaf.shape}, expected {expected}")
        if not jnp.issubdtype(leaf.dtype, kinds):
            problems.append(f"{'/'.join(path)}: found dtype {leaf.dtype}, expected a float")
    if problems:
        raise ValueError("the weights do not match the configuration:\n  " + "\n  ".join(problems))
    return padding


def _size_of(leaf: Any, w: Weight, axis: str, stacked: bool) -> int | None:
    """The size of a logical axis of a weight; None if it has not even as many dimensions."""
    dim = w.axes.index(axis)
    if isinstance(leaf, Kernel):
        if dim in w.inputs:  # flattened; the table pads none that has others beside it
            return leaf.inputs
        dim = [i for i in range(len(w.axes)) if i not in w.inputs].index(dim)
    dim += stacked
    return leaf.shape[dim] if len(leaf.shape) > dim else None


def padded_sizes(config: BTLMConfig) -> dict[str, int]:
    """The logical axes that a mesh may zero-pad, with their true sizes."""
    return {"vocab": config.vocab_size, "mlp": config.n_inner}


# One leaf per layer: the layout on disk and of Hugging Face ---------------------------------------


@dataclasses.dataclass(frozen=True)
class DiskLeaf:
    """One array as stored: a weight of one layer, or outside the layers; or a part of such a one.

    Attributes:
      weight, layer: which weight.
      part: of a quantized weight, which of its arrays (`quantization.stored_parts`).
      part_shape: the shape of the part.
      dtype: the only one it can have; None is any of `STORED_DTYPES`.
    """

    weight: Weight
    layer: int | None
    part: str | None = None
    part_shape: tuple[int, ...] = ()
    dtype: str | None = None

    @property
    def path(self) -> Path:
        """Its path in a checkpoint: "blocks" is followed by the layer's number."""
        whole = self.weight.path
        if self.layer is not None:
            whole = ("blocks", str(self.layer), *whole[1:])
        return whole if self.part is None else (*whole, self.part)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the stored array."""
        return self.weight.shape if self.part is None else self.part_shape

    @property
    def hf_name(self) -> str:
        """The weight's Hugging Face name; a part's is ours and follows it."""
        name = self.weight.hf_name.format(layer=self.layer)
        return name if self.part is None else f"{name}.{self.part}"


def leaves_of(w: Weight, config: BTLMConfig) -> list[DiskLeaf]:
    """The stored arrays of one weight, by layer."""
    return [DiskLeaf(w, i) for i in range(config.n_layer)] if w.stacked else [DiskLeaf(w, None)]


def one_dtype(w: Weight, dtypes: Iterable[Any]) -> Any:
    """The dtype in which the arrays of one weight are stored.

    Raises:
      ValueError: there are several.
    """
    found = {str(d): d for d in dtypes}
    if len(found) > 1:
        raise ValueError(
            f"the layers of {w.name} are stored as {', '.join(sorted(found))} and cannot be "
            "stacked as they are; pass dtype="
        )
    return next(iter(found.values()))


def disk_leaves(config: BTLMConfig) -> Iterator[DiskLeaf]:
    """Every stored array, layer by layer."""
    weights = table(config)
    stacked = [w for w in weights if w.stacked]
    first = weights.index(stacked[0])
    yield from (DiskLeaf(w, None) for w in weights[:first])
    for layer in range(config.n_layer):
        yield from (DiskLeaf(w, layer) for w in stacked)
    yield from (DiskLeaf(w, None) for w in weights[first + len(stacked) :])
