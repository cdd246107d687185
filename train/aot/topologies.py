"""Devices that are not here: TPU slices and H200 nodes by name, to compile for.

A topology is named "v5e:4x4", chips along each dimension; "v5e-16" is the same by its number of
chips (v5e, v6e) or, as Google counts, of cores (v4-8 and v5p-8 are four chips). "h200:8" is a node
with NVSwitch. libtpu, which compiles for TPUs without one, comes with `pip install
'btlm-jax[tpu]'`.
"""

from __future__ import annotations

import dataclasses
import importlib.util
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
# What one can rent: cloud.google.com/tpu/docs. libtpu compiles for other shapes as well.
SHAPES = {
    "v4": _CUBES,
    "v5e": _FLAT,
    "v5p": _CUBES,
    "v6e": _FLAT,
    "tpu7x": _CUBES,
    "h200": ("1", "2", "4", "8"),
}
# Chips are counted in cores in names such as v5p-8. TPU7x has no such names of one meaning.
_COUNTED = {"v4": 2, "v5p": 2, "v5e": 1, "v5litepod": 1, "v6e": 1}
_TARGET = Path(__file__).parent / "targets" / "h200.txtpb"


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices to compile for.

    Attributes:
      chip: which.
      shape: of one slice, in chips.
      slices: how many, joined by the data center's network.
    """

    chip: Chip
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def name(self) -> str:
        """As `parse_topology` reads it, with the number of slices before it."""
        text = f"{self.chip.name}:{'x'.join(map(str, self.shape))}"
        return text if self.slices == 1 else f"{self.slices} x {text}"


def parse_topology(name: str, slices: int = 1) -> Topology:
    """Reads a topology's name.

    Raises:
      ValueError: unknown chip or shape (the message lists those there are), or slices < 1.
    """
    if slices < 1:
        raise ValueError(f"--slices: found {slices}, expected a positive int")
    valid = [f"{chip}:{shape}" for chip, shapes in SHAPES.items() for shape in shapes]
    text = name.strip().lower()
    if counted := re.fullmatch(r"([a-z0-9]+)-(\d+)", text):
        text = _by_count(name, counted[1], int(counted[2]))
    chip, _, shape = text.partition(":")
    if chip not in SHAPES:
        raise ValueError(
            f"--topology {name}: unknown chip {chip!r}{nearest_name_hint(text, valid)}"
        )
    sizes = re.fullmatch(r"\d+(x\d+)*", shape)
    dimensions = CHIPS[chip].dimensions or 1
    if shape not in SHAPES[chip]:
        known = [f"{chip}:{s}" for s in SHAPES[chip]]
        # Larger slices exist than the list has; what is malformed does not.
        parts = tuple(map(int, shape.split("x"))) if sizes else ()
        if chip == "h200" or len(parts) != dimensions or 0 in parts:
            raise ValueError(f"--topology {name}: no such shape{nearest_name_hint(text, known)}")
    if slices > 1 and chip == "h200":
        raise ValueError(f"--slices {slices}: slices are of TPUs; h200 is one node")
    return Topology(CHIPS[chip], tuple(map(int, shape.split("x"))), slices)


def _by_count(name: str, chip: str, count: int) -> str:
    """v5p-8 -> v5p:2x2x1."""
    known = {}
    for alias, cores in _COUNTED.items():
        family = "v5e" if alias == "v5litepod" else alias
        for shape in SHAPES[family]:
            size = 1
            for n in shape.split("x"):
                size *= int(n)
            known[f"{alias}-{size * cores}"] = f"{family}:{shape}"
    if f"{chip}-{count}" not in known:
        hint = nearest_name_hint(f"{chip}-{count}", known)
        if chip in ("tpu7x", "h200"):
            hint = f"; write {chip}:{SHAPES[chip][0]} and the like, the shape in chips"
        raise ValueError(f"--topology {name}: unknown{hint}")
    return known[f"{chip}-{count}"]


def prepare_compiler() -> None:
    """Settles how libtpu and the CUDA plugin load; before JAX has asked for a device.

    JAX itself runs on the CPU, also on a machine with accelerators, which stay free for others.
    """
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # or a second process would find a lock
    for name, value in {
        "TPU_SKIP_MDS_QUERY": "1",  # these three silence the search for a TPU machine's metadata
        "TPU_ACCELERATOR_TYPE": "v5litepod-8",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
        "CUDA_VISIBLE_DEVICES": "-1",
    }.items():
        os.environ.setdefault(name, value)
    jax.config.update("jax_platforms", "cpu")
    # Programs for devices that are not here are written to the cache and cannot be read back.
    jax.config.update("jax_enable_compilation_cache", False)


def topology_devices(topology: Topology) -> list[jax.Device]:
    """The devices, with which programs can be compiled and not run. Call `prepare_compiler` before.

    Raises:
      ValueError: libtpu, or the CUDA plugin, is not installed (says how), or does not know the
        topology.
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
            options["chip_config_name"] = "megacore"  # or a chip would be two devices
        if set(t.shape) == {1}:
            options["chips_per_host_bounds"] = (1, 1, 1)  # default four, which it is not
        if t.slices > 1:
            options["num_slices"] = t.slices
    try:
        return topologies.get_topology_desc(name, platform, **options).devices
    except (RuntimeError, NotImplementedError) as e:  # XLA's own text says which rule is broken
        known = ", ".join(f"{t.chip.name}:{shape}" for shape in SHAPES[t.chip.name])
        raise ValueError(
            f"--topology {t.name}: {str(e).splitlines()[0]}; there are {known}"
        ) from None
