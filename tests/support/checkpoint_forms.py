"""One set of weights in every format that `verify` reads, and checkpoints that differ from it."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
from orbax.checkpoint import v1 as ocp
from safetensors.numpy import save_file

from btlm_jax import BTLMConfig
from btlm_jax.checkpoint import metadata
from btlm_jax.convert import convert, export, verify
from btlm_jax.model import weights
from btlm_jax.model.params import unflatten_tree
from support import golden

BTLM_BIN = golden.GOLDEN / "btlm_bin"
BF16, UNTIED = golden.load("g_bf16"), golden.load("i_untied")
NAME = "transformer.h.1.mlp.c_fc.weight"
FORMS = (
    "safetensors",
    "bin",
    "sharded bin",
    "orbax",
    "export",
    "sharded export",
    "ocdbt",
    "orbax's own",
)


def make_forms(folder: Path) -> dict[str, Path]:
    """Writes the weights of tests/golden/btlm_bin in all `FORMS`."""
    with np.load(BTLM_BIN / "weights.npz") as z:
        tensors = {name: z[name].view(ml_dtypes.bfloat16) for name in z.files}
    forms = {name: folder / name for name in ("safetensors", "orbax", "export", "sharded export")}
    forms |= {"bin": BTLM_BIN / "single", "sharded bin": BTLM_BIN / "sharded"}
    forms["safetensors"].mkdir()
    shutil.copy(BTLM_BIN / "single/config.json", forms["safetensors"])
    save_file(tensors, forms["safetensors"] / "model.safetensors")
    convert(forms["bin"], forms["orbax"])
    export(forms["orbax"], forms["export"])
    export(forms["orbax"], forms["sharded export"], max_shard_bytes=20_000)
    config = metadata.read_metadata(forms["orbax"]).config
    forms["ocdbt"] = write_by_orbax(folder / "ocdbt", config, tensors)
    forms["orbax's own"] = write_by_orbax(folder / "own", config, tensors, use_ocdbt=False)
    assert set(forms) == set(FORMS)
    return forms


def write_by_orbax(path: Path, config: BTLMConfig, tensors: dict, sha256=None, **saving) -> Path:
    """Writes a checkpoint with Orbax itself, as training does, with items beside the weights."""
    leaves = list(weights.disk_leaves(config))
    state = {x.path: np.asarray(tensors[x.hf_name]).reshape(x.weight.shape) for x in leaves}
    notes = metadata.custom_metadata(config, {}, sha256 or {}, {}, None)
    context = ocp.Context()
    for option, value in saving.items():
        setattr(context.array_options.saving, option, value)
    optimizer = {"mu": np.ones(7, np.float32), "count": np.array(4)}
    items = {"state": unflatten_tree(state), "optimizer": optimizer}
    with context:
        ocp.save_checkpointables(path, items, custom_metadata=notes)
    return path


def write_tensors(path: Path, case: golden.Case, tensors: dict, **config) -> Path:
    """Writes tensors as a Hugging Face directory, with the case's config.json and changes to it."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps(case.hf_config | config))
    save_file(tensors, path / "model.safetensors")
    return path


def write_pair(folder: Path, change, **config) -> tuple[Path, Path]:
    """Writes the untied golden model, and one with changed tensors and configuration."""
    tensors = UNTIED.weights
    first = write_tensors(folder / "one", UNTIED, tensors)
    change(tensors)
    return first, write_tensors(folder / "two", UNTIED, tensors, **config)


def in_both_formats(a: Path, b: Path) -> list[tuple[Path, Path]]:
    """Returns the pair of Hugging Face directories in all four combinations of the formats."""
    for path in (a, b):
        convert(path, path.with_name(f"{path.name}.c"), allow_nonfinite=True)
    orbax_a, orbax_b = (path.with_name(f"{path.name}.c") for path in (a, b))
    return [(a, b), (orbax_a, orbax_b), (a, orbax_b), (orbax_a, b)]


def differences(a, b=None, **options) -> dict[str, str]:
    """Returns the differences that `verify` reports, by tensor, file or field."""
    result = verify(a, b, **options)
    assert bool(result) == (not result.differences)
    by_name = dict(result.differences)
    assert len(by_name) == len(result.differences)
    return by_name


@contextlib.contextmanager
def flipped_bit(file: Path, bit: int) -> Iterator[None]:
    """Within the block, one bit of a file is flipped; negative numbers count from the end."""
    original = file.read_bytes()
    damaged = bytearray(original)
    bit %= 8 * len(original)
    damaged[bit // 8] ^= 1 << (bit % 8)
    file.write_bytes(damaged)
    try:
        yield
    finally:
        file.write_bytes(original)


def custom_metadata_span(file: Path) -> tuple[int, int]:
    """Returns where our metadata begin and end in Orbax's file, in bytes."""
    text = file.read_text()
    entry = json.dumps(json.loads(text)["custom_metadata"]["btlm_jax"])
    return text.index(entry), text.index(entry) + len(entry)
