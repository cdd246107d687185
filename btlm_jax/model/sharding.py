"""Meshes, and the table of rules that maps logical axes to mesh axes.

Meshes have explicit axis types: the sharding of every array is part of its type, so that a weight
with an unintended sharding is an error at trace time, never a silent copy.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from btlm_jax.config import BTLMConfig
from btlm_jax.model import weights
from btlm_jax.model.params import flatten_tree, unflatten_tree

logger = logging.getLogger(__name__)

AXES = ("data", "fsdp", "context", "tensor")

Rules = tuple[tuple[str, str | tuple[str, ...] | None], ...]

# Logical axis -> mesh axis. Weights are stored by these rules and gathered over "embed" before use.
# "batch" is the first axis of every activation, "sequence" the second. The devices that share a
# sequence also shard the stored weights.
RULES: Rules = (
    ("batch", ("data", "fsdp")),
    ("sequence", "context"),
    ("vocab", "tensor"),
    ("heads", "tensor"),
    ("mlp", "tensor"),
    ("embed", ("fsdp", "context")),
    ("positions", None),
    ("qkv", None),
    ("head_dim", None),
)

# Matrix units work on tiles of 128; axes are padded to it if that costs at most this fraction.
_TILE, _TILE_COST = 128, 0.02


def make_mesh(
    *,
    data: int = 1,
    fsdp: int = -1,
    context: int = 1,
    tensor: int = 1,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """Makes a mesh with the axes `AXES`.

    Args:
      data: number of replicas of the weights; the batch is split over data x fsdp.
      fsdp: number of shards of weights, gradients and optimizer state; -1 takes all remaining
        devices.
      context: number of shards of every sequence, for sequences that are too long for one device;
        weights, gradients and optimizer state are sharded over this axis too.
      tensor: number of shards of heads, MLP and vocabulary.
      devices: default all devices.

    Raises:
      ValueError: the product of the sizes is not the number of devices, or several TPU slices do
        not divide over data and fsdp, along which they are laid out.
    """
    devices = list(devices) if devices is not None else jax.devices()
    sizes = {"data": data, "fsdp": fsdp, "context": context, "tensor": tensor}
    free = [name for name, n in sizes.items() if n == -1]
    if len(free) > 1 or any(n < 1 and n != -1 for n in sizes.values()):
        raise ValueError(f"mesh sizes: found {sizes}, expected positive ints and at most one -1")
    if free:
        others = math.prod(n for n in sizes.values() if n != -1)
        if len(devices) % others:
            given = ", ".join(f"{name} = {n}" for name, n in sizes.items() if n > 1)
            raise ValueError(
                f"mesh: {given} needs a multiple of {others} devices, found {len(devices)}: choose "
                "sizes whose product divides it"
            )
        sizes[free[0]] = len(devices) // others
    if math.prod(sizes.values()) != len(devices):
        raise ValueError(
            f"mesh {sizes} needs {math.prod(sizes.values())} devices, found {len(devices)}: "
            f"make the product of {', '.join(AXES)} equal to it"
        )
    explicit = (AxisType.Explicit,) * len(AXES)
    shape = tuple(sizes[name] for name in AXES)
    if devices[0].platform != "tpu":
        return jax.make_mesh(shape, AXES, explicit, devices=devices)
    return Mesh(_on_torus(shape, devices), AXES, axis_types=explicit)


def _on_torus(shape: tuple[int, ...], devices: Sequence[jax.Device]) -> np.ndarray:
    """Arranges TPUs for a mesh: neighbors along its last axes, slices along its first.

    Raises:
      ValueError: the slices do not divide over the data and fsdp axes.
    """
    slices = len({getattr(d, "slice_index", 0) for d in devices})
    over_data = math.gcd(shape[0], slices)
    over_fsdp = slices // over_data
    if shape[1] % over_fsdp:
        raise ValueError(
            f"mesh data={shape[0]}, fsdp={shape[1]}: {slices} slices do not divide over these two "
            "axes, and the others would be slow across slices; make data a multiple of "
            f"{slices}"
        )
    within = (shape[0] // over_data, shape[1] // over_fsdp, *shape[2:])

    def arrange(split: bool) -> np.ndarray:
        if slices == 1:
            return mesh_utils.create_device_mesh(within, devices, allow_split_physical_axes=split)
        outer = (over_data, over_fsdp, 1, 1)
        return mesh_utils.create_hybrid_device_mesh(
            within, outer, devices, allow_split_physical_axes=split
        )

    try:
        return arrange(False)
    except NotImplementedError:
        logger.warning(
            "mesh %s splits axes of the TPU's torus, so that collectives over different mesh axes "
            "share links: use sizes that are products of its dimensions", shape
        )  # fmt: skip
        return arrange(True)


def mesh_axes(rules: Rules, axis: str | None) -> tuple[str, ...]:
    """Returns the mesh axes that a logical axis is split over.

    Raises:
      ValueError: the rules do not mention the axis.
    """
    if axis is None:
        return ()
    table = dict(rules)
    if axis not in table:
        raise ValueError(f"logical axis {axis!r}: no sharding rule; the rules name {list(table)}")
    return axis_names(table[axis])


def axis_names(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """Returns the mesh axes in one entry of a PartitionSpec or of `Rules`."""
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def partition_spec(rules: Rules, *axes: str | None) -> PartitionSpec:
    """Returns the PartitionSpec of an array with these logical axes.

    Raises:
      ValueError: two dimensions would be split over the same mesh axis.
    """
    entries = [mesh_axes(rules, axis) for axis in axes]
    used = [name for entry in entries for name in entry]
    if len(set(used)) != len(used):
        raise ValueError(
            f"sharding rules collide: axes {axes} map to {entries}, expected each mesh axis once"
        )
    return PartitionSpec(*(e if len(e) > 1 else e[0] if e else None for e in entries))


def num_shards(mesh: Mesh | jax.sharding.AbstractMesh, rules: Rules, axis: str | None) -> int:
    """Returns the number of shards of a logical axis."""
    return math.prod(mesh.shape[name] for name in mesh_axes(rules, axis))


def check_mesh(mesh: Mesh | jax.sharding.AbstractMesh) -> None:
    """Raises ValueError if a mesh lacks one of `AXES`, or an axis is not of explicit type."""
    explicit = all(t == AxisType.Explicit for t in mesh.axis_types)
    if not set(AXES) <= set(mesh.axis_names) or not explicit:
        axes = {n: t.name for n, t in zip(mesh.axis_names, mesh.axis_types, strict=True)}
        raise ValueError(
            f"mesh: found axes {axes}, expected {', '.join(AXES)}, all of explicit type: make it "
            "with btlm_jax.make_mesh"
        )


def param_padding(config: BTLMConfig, mesh: Mesh, rules: Rules = RULES) -> dict[str, int]:
    """Returns the sizes of the axes that are zero-padded on a mesh, by logical axis.

    A size is padded to a multiple of its number of shards, and of 128 as well if that costs at most
    2 %: 6826 -> 6912 and 50257 -> 50304 for the released model. Padding is exact (padded MLP units
    stay zero under training, padded logits are masked) and never reaches a checkpoint.
    """
    check_mesh(mesh)
    padded = {}
    for axis, size in weights.paddable_sizes(config).items():
        shards = num_shards(mesh, rules, axis)
        tiled = round_up(size, math.lcm(_TILE, shards))
        target = tiled if tiled <= size * (1 + _TILE_COST) else round_up(size, shards)
        if target != size:
            cost = 100 * (target / size - 1)
            logger.warning(
                "%s is zero-padded from %d to %d on this mesh (+%.2f %%)", axis, size, target, cost
            )
            padded[axis] = target
    return padded


def round_up(n: int, multiple: int) -> int:
    """Rounds n up to a multiple."""
    return -(-n // multiple) * multiple


def param_specs(
    config: BTLMConfig,
    mesh: Mesh | jax.sharding.AbstractMesh,
    rules: Rules = RULES,
    pad: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """Returns the tree of PartitionSpecs of the stacked weights.

    Args:
      pad: padded sizes by logical axis, from `param_padding`.

    Raises:
      ValueError: a dimension does not divide over its mesh axes, or two dimensions share one; all
        such weights are listed with their dimensions, sizes and axes.
    """
    check_mesh(mesh)
    specs, problems = {}, []
    for w in weights.weight_table(config):
        shape = w.padded(pad or {})
        for axis, size in zip(w.axes, shape, strict=True):
            shards = num_shards(mesh, rules, axis)
            if size % shards:
                fits = [n for n in range(1, shards + 1) if size % n == 0]
                problems.append(
                    f"{w.name}: axis {axis!r} of size {size} does not divide over mesh axes "
                    f"{mesh_axes(rules, axis)} = {shards}; {fits[-1]} would fit"
                )
        try:
            specs[w.path] = partition_spec(rules, *(None,) * w.stacked, *w.axes)
        except ValueError as e:
            problems.append(f"{w.name} of shape {shape}: {e}")
    if problems:
        raise ValueError("weights do not fit the mesh:\n  " + "\n  ".join(problems))
    return unflatten_tree(specs)


@functools.cache
def check_params_fit(
    config: BTLMConfig, mesh, rules: Rules, pad: tuple[tuple[str, int], ...]
) -> None:
    """Raises ValueError if weights with this padding do not divide over their mesh."""
    try:
        param_specs(config, mesh, rules, dict(pad))
    except ValueError as e:
        raise ValueError(f"{e}\n(init and load pad weights for the mesh given as mesh=)") from None


def param_shardings(
    config: BTLMConfig, mesh: Mesh, rules: Rules = RULES, pad: Mapping[str, int] | None = None
) -> dict[str, Any]:
    """Returns the tree of NamedShardings of the stacked weights; see `param_specs`."""
    return jax.tree.map(
        lambda s: NamedSharding(mesh, s),
        param_specs(config, mesh, rules, pad),
        is_leaf=lambda x: isinstance(x, PartitionSpec),
    )


def param_layout(
    config: BTLMConfig, mesh: Mesh | None, rules: Rules = RULES
) -> tuple[dict[str, int], dict[weights.Path, jax.sharding.Sharding]]:
    """Returns the padded sizes by logical axis, and the sharding of every weight by path.

    Args:
      mesh: None gives the default device, without padding.
    """
    if mesh is None:
        single = SingleDeviceSharding(jax.devices()[0])
        return {}, {w.path: single for w in weights.weight_table(config)}
    pad = param_padding(config, mesh, rules)
    return pad, flatten_tree(param_shardings(config, mesh, rules, pad))


def layer_sharding(stacked: jax.sharding.Sharding) -> jax.sharding.Sharding:
    """Returns the sharding of one layer, given that of the stack."""
    if isinstance(stacked, NamedSharding):
        return NamedSharding(stacked.mesh, PartitionSpec(*stacked.spec[1:]))
    return stacked


def assemble_array(
    shape: tuple[int, ...],
    dtype: Any,
    out: jax.sharding.Sharding,
    stored: tuple[int, ...],
    read: Callable[[tuple[slice, ...]], np.ndarray],
) -> jax.Array:
    """Assembles a sharded array from the parts that the local devices hold.

    Args:
      shape: shape of the array, which is zero outside `stored`.
      dtype: its dtype.
      out: its sharding.
      stored: shape of the stored array.
      read: reads a part of the stored array, given slices with bounds. Devices that hold the same
        part share one call.
    """

    @functools.cache
    def read_padded(bounds: tuple[tuple[int, int], ...]) -> np.ndarray:
        inner = [(a, min(b, n)) for (a, b), n in zip(bounds, stored, strict=True)]
        sizes = [b - a for a, b in bounds]
        if any(b <= a for a, b in inner):
            return np.zeros(sizes, dtype)
        with np.errstate(over="ignore"):  # `narrowing` counts what becomes infinite
            part = read(tuple(slice(a, b) for a, b in inner)).astype(dtype, copy=False)
        if list(part.shape) == sizes:
            return part
        return np.pad(part, [(0, n - m) for n, m in zip(sizes, part.shape, strict=True)])

    def callback(index: tuple[slice, ...] | None) -> np.ndarray:
        slices = index or (slice(None),) * len(shape)
        return read_padded(tuple(s.indices(n)[:2] for s, n in zip(slices, shape, strict=True)))

    return jax.make_array_from_callback(shape, out, callback)


def mesh_of(x: Any) -> jax.sharding.AbstractMesh | None:
    """Returns the explicit mesh in the type of an array or a tree of arrays; None without one."""
    mesh = jax.typeof(jax.tree.leaves(x)[0]).sharding.mesh
    return None if mesh.empty else mesh


def on_mesh(mesh: jax.sharding.AbstractMesh | None) -> contextlib.AbstractContextManager:
    """Returns a context for tracing on `mesh`, so that callers of the model need not set one."""
    return jax.sharding.use_abstract_mesh(mesh) if mesh is not None else contextlib.nullcontext()


def num_chunks(shards: int) -> int:
    """Returns the number of chunks of a sequence, which divides its length.

    Each of several shards holds an early and a late chunk (`context_parallel`).
    """
    return 2 * shards if shards > 1 else 1


def check_batch(
    batch_size: int,
    mesh: Mesh | jax.sharding.AbstractMesh,
    rules: Rules,
    length: int | None = None,
) -> None:
    """Raises ValueError if a batch, or sequences of `length`, do not divide over the mesh."""
    sizes = {"batch": batch_size} | ({} if length is None else {"sequence": length})
    names = {"batch": "batch size", "sequence": "sequence length"}
    for axis, size in sizes.items():
        parts = num_shards(mesh, rules, axis)
        if axis == "sequence":
            parts = num_chunks(parts)
        if size % parts:
            raise ValueError(
                f"{names[axis]} {size} does not divide over mesh axes {mesh_axes(rules, axis)}, "
                f"{parts} parts: use a multiple of {parts}, or a mesh with more of another axis"
            )


def unshard_sequences(rules: Rules) -> Rules:
    """Returns the rules without sharding of sequences, for decoding with a cache."""
    return tuple((name, None if name == "sequence" else axes) for name, axes in rules)


def mesh_platform(mesh: jax.sharding.AbstractMesh | None) -> str:
    """Returns "cpu", "tpu" or "gpu": the platform of a mesh, or of the default backend.

    The devices of the mesh need not exist: `btlm compile` makes programs for other machines.
    """
    if mesh is None or mesh.empty or mesh.abstract_device is None:
        return jax.default_backend()
    return {"cuda": "gpu"}.get(mesh.abstract_device.platform, mesh.abstract_device.platform)


def concrete_mesh_of(x: Any) -> Mesh | None:
    """Returns the mesh of devices that hold concrete arrays; None without one or while tracing."""
    x = jax.tree.leaves(x)[0]
    if isinstance(x, jax.core.Tracer) or mesh_of(x) is None:
        return None
    mesh = getattr(x.sharding, "mesh", None)
    return mesh if isinstance(mesh, Mesh) else None
