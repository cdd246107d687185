"""Training runs: their losses and final weights."""

from __future__ import annotations

import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

import btlm_jax as btlm
from btlm_jax.model.params import flatten_tree
from btlm_jax.train.metrics import read_metrics


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory):
    """Every run compiles the same step; once is enough."""
    names = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("cache")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in names}
    for name, value in names.items():
        jax.config.update(name, value)
    yield names["jax_compilation_cache_dir"]
    for name, value in before.items():
        jax.config.update(name, value)


def losses(run: Path) -> dict[int, float]:
    return {int(x["step"]): x["loss"] for x in read_metrics(run / "metrics.jsonl") if "loss" in x}


def final_weights(run: Path) -> dict:
    return flatten_tree(btlm.load(run)[1])


def copy_of(run: Path, to: Path) -> Path:
    return Path(shutil.copytree(run, to))


def same_bits(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)
