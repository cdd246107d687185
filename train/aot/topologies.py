"""Topologies by name: TPU slices and H200 nodes to compile for, which need not be attached.

"v5e:4x4" gives the chips along each dimension. "v5e-16" is the same slice by its number of chips
(v5e, v6e) or, in Google's names, cores (v4-8 and v5p-8 are four chips). "h200:8" is a node with
NVSwitch. libtpu compiles for TPUs without one; install it with `pip install 'btlm-jax[tpu]'`.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import re
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies

from btlm_jax.perf.chips import CHIPS, Chip
from btlm_jax.train.recipe import nearest_name_hint

_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16",
          "8x16x16")  # fmt: skip
# The shapes for rent: cloud.google.com/tpu/docs. libtpu compiles for other shapes as well.
SHAPES = {
    "v4": _CUBES,
    "v5e": _FLAT,
    "v5p": _CUBES,
    "v6e": _FLAT,
    "tpu7x": _CUBES,
    "h200": ("1", "2", "4", "8"),
}
# Cores per chip in names such as v5p-8; v5e and v6e count chips. For TPU7x such names are
# ambiguous.
_CORES_PER_CHIP = {"v4": 2, "v5p": 2, "v5e": 1, "v5litepod": 1, "v6e": 1}
_TARGET = Path(__file__).parent / "targets" / "h200.txtpb"


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices to compile for.

    Attributes:
      chip: the kind of chip.
      shape: chips along each dimension of one slice.
      slices: slices, connected by the data center network.
    """

    chip: Chip
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def name(self) -> str:
        """Returns the name for `parse_topology`, with the number of slices before it if above 1."""
        text = f"{self.chip.name}:{'x'.join(map(str, self.shape))}"
        return text if self.slices == 1 else f"{self.slices} x {text}"


def parse_topology(name: str, slices: int = 1) -> Topology:
    """Parses the name of a topology.

    Args:
      name: such as "v5e:4x4", "v5e-16" or "h200:8".
      slices: slices of that kind.

    Raises:
      ValueError: the chip or shape is unknown (the message lists the known ones), or slices < 1.
    """
    if slices < 1:
        raise ValueError(f"--slices: found {slices}, expected a positive int")
    valid = [f"{chip}:{shape}" for chip, shapes in SHAPES.items() for shape in shapes]
    text = name.strip().lower()
    if counted := re.fullmatch(r"([a-z0-9]+)-(\d+)", text):
        text = _name_by_shape(name, counted[1], int(counted[2]))
    chip, _, shape = text.partition(":")
    if chip not in SHAPES:
        raise ValueError(
            f"--topology {name}: unknown chip {chip!r}{nearest_name_hint(text, valid)}"
        )
    sizes = re.fullmatch(r"\d+(x\d+)*", shape)
    dimensions = CHIPS[chip].dimensions or 1
    if shape not in SHAPES[chip]:
        known = [f"{chip}:{s}" for s in SHAPES[chip]]
        # Slices larger than the listed ones exist; malformed shapes do not.
        chips = tuple(map(int, shape.split("x"))) if sizes else ()
        if chip == "h200" or len(chips) != dimensions or 0 in chips:
            raise ValueError(f"--topology {name}: no such shape{nearest_name_hint(text, known)}")
    if slices > 1 and chip == "h200":
        raise ValueError(f"--slices: found {slices}, expected 1, because h200 is a single node")
    return Topology(CHIPS[chip], tuple(map(int, shape.split("x"))), slices)


def _name_by_shape(name: str, chip: str, count: int) -> str:
    """Returns "v5p:2x2x1" for ("v5p", 8)."""
    known = {}
    for alias, cores in _CORES_PER_CHIP.items():
        family = "v5e" if alias == "v5litepod" else alias
        for shape in SHAPES[family]:
            chips = math.prod(map(int, shape.split("x")))
            known[f"{alias}-{chips * cores}"] = f"{family}:{shape}"
    if f"{chip}-{count}" not in known:
        hint = nearest_name_hint(f"{chip}-{count}", known)
        if chip in ("tpu7x", "h200"):
            hint = f"; write the shape in chips, such as {chip}:{SHAPES[chip][0]}"
        raise ValueError(f"--topology {name}: unknown name{hint}")
    return known[f"{chip}-{count}"]


def prepare_compiler() -> None:
    """Sets how libtpu and the CUDA plugin load; call it before JAX lists its devices.

    JAX itself runs on the CPU, and leaves accelerators of this machine free for other processes.
    """
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # otherwise a lock file stops a second process
    for name, value in {
        "TPU_SKIP_MDS_QUERY": "1",  # these three stop the search for a TPU machine's metadata
        "TPU_ACCELERATOR_TYPE": "v5litepod-8",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
        "CUDA_VISIBLE_DEVICES": "-1",
    }.items():
        os.environ.setdefault(name, value)
    jax.config.update("jax_platforms", "cpu")
    # JAX caches programs for detached devices, but cannot load them from the cache.
    jax.config.update("jax_enable_compilation_cache", False)


def topology_devices(topology: Topology) -> list[jax.Device]:
    """Returns devices that programs can be compiled for. Call `prepare_compiler` first.

    Raises:
      ValueError: libtpu or the CUDA plugin is not installed (the message says how to install it),
        or does not support the topology.
    """
    t = topology
    options: dict[str, Any] = {}
    if t.chip.name == "h200":
        if not any(importlib.util.find_spec(f"jax_cuda{n}_plugin") for n in (12, 13)):
            raise ValueError(
                "compiling for h200 needs JAX's CUDA plugin, and no GPU: pip install 'jax[cuda13]'"
            )
        options = {"target_config": _TARGET.read_text(), "topology": f"1x1x{t.shape[0]}"}
        platform, name = "cuda", ""
    else:
        if importlib.util.find_spec("libtpu") is None:
            raise ValueError(
                f"compiling for {t.name} needs libtpu, and no TPU: pip install 'btlm-jax[tpu]'"
            )
        platform, name = "tpu", f"{t.chip.name}:{'x'.join(map(str, t.shape))}"
        if t.chip.name == "v4":
            options["chip_config_name"] = "megacore"  # otherwise a chip would be two devices
        if set(t.shape) == {1}:
            options["chips_per_host_bounds"] = (1, 1, 1)  # the default is four chips per host
        if t.slices > 1:
            options["num_slices"] = t.slices
    try:
        return topologies.get_topology_desc(name, platform, **options).devices
    except RuntimeError as e:  # XLA's message says why
        known = ", ".join(f"{t.chip.name}:{shape}" for shape in SHAPES[t.chip.name])
        raise ValueError(
            f"--topology {t.name}: {str(e).splitlines()[0]}; known are {known}"
        ) from None
