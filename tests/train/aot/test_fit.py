"""The search for settings that fit, with simulated compiles."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from btlm_jax import BTLMConfig
from btlm_jax.perf.chips import CHIPS
from btlm_jax.perf.roofline import TimeBound
from btlm_jax.train.aot import fit_table, topologies
from btlm_jax.train.aot.fit import Candidate, fit_phase, list_candidates, search_candidates
from btlm_jax.train.recipe import Phase
from btlm_jax.train.recipe_file import load_recipe

CONFIG_3B = BTLMConfig.preset("btlm-3b-8k")


def candidates_for(name: str, slices: int = 1):
    """Returns the candidates of 480 sequences of 8,192 tokens, devices and rates of a topology."""
    topology = topologies.parse_topology(name, slices)
    num_devices = slices * math.prod(topology.shape)
    rates = topology.chip.per_device(topology.shape)
    phase = Phase(1, 480, 8192)
    return list_candidates(CONFIG_3B, phase, num_devices, slices, rates), num_devices, rates


def test_candidates_divide_the_phase_and_are_ordered_by_bound():
    candidates, num_devices, rates = candidates_for("v5e:4x4")
    assert candidates
    for c in candidates:
        data, fsdp, context, tensor = c.mesh
        assert data * fsdp * context * tensor == num_devices
        assert 480 % c.microbatch == 0 and c.microbatch % (data * fsdp) == 0
        assert 32 % tensor == 0 and (context == 1 or 8192 % (2 * context) == 0)
        assert 2560 % (fsdp * context) == 0
        assert c.memory <= 1.25 * rates.memory
    bounds = [(c.bound.seconds, c.bound.in_turn) for c in candidates]
    assert bounds == sorted(bounds)
    assert {c.remat for c in candidates} >= {"full", "attention"}
    # 480 sequences do not divide over 256 devices: another axis must split sequences or heads.
    large, _, _ = candidates_for("v5e:16x16")
    assert large and all(c.mesh[0] * c.mesh[1] <= 96 for c in large)


def test_slices_divide_over_data_and_fsdp():
    candidates, num_devices, _ = candidates_for("v5e:4x4", slices=2)
    assert num_devices == 32 and candidates
    assert all(c.mesh[0] * c.mesh[1] % 2 == 0 for c in candidates)
    assert all(c.bound.dcn > 0 for c in candidates)
    # The best candidate has a replica on each slice, so that only gradients cross between them.
    assert candidates[0].mesh[0] == 2


def test_settings_are_overrides_of_the_recipe():
    candidate = Candidate((1, 16, 1, 1), 32, "full", TimeBound(1, 1, 1, 0), 1.0)
    assert candidate.settings(1) == [
        "mesh.data=1", "mesh.fsdp=16", "mesh.context=1", "mesh.tensor=1",
        "phases.1.microbatch=32", "run.remat=full",
    ]  # fmt: skip


def candidate_of(memory: float, remat="full", microbatch=1):
    return Candidate((1, 1, 1, 1), microbatch, remat, TimeBound(1, 1, 1, 0), memory)


def run_search(candidates, needed_bytes, jobs=1, keep=2, attempts=10):
    """Searches with 100 bytes available; returns microbatches that fit, miss and were compiled."""
    compiled = []

    def evaluate(candidate):
        compiled.append(candidate.microbatch)
        needed = needed_bytes[candidate.microbatch]
        if needed is None:
            return {"failed": "no room in VMEM"}
        return {"needed": needed} if needed > 100 else {"memory": {"peak": needed}}

    with ThreadPoolExecutor(jobs) as pool:
        result = search_candidates(
            candidates, evaluate, pool, available=100, keep=keep, attempts=attempts, jobs=jobs
        )
    fits = [c.microbatch for c, _ in result.fits]
    return fits, [c.microbatch for c, _ in result.misses], compiled


def test_the_search_stops_when_enough_candidates_fit():
    candidates = [candidate_of(50, microbatch=m) for m in range(5)]
    needed = dict.fromkeys(range(5), 60)
    assert run_search(candidates, needed) == ([0, 1], [], [0, 1])
    assert run_search(candidates, needed, attempts=1) == ([0], [], [0])
    fits, misses, compiled = run_search(candidates, needed, jobs=3, keep=3)
    assert sorted(fits) == [0, 1, 2] and not misses and len(compiled) == 3


def test_compiled_memory_corrects_the_estimates():
    """The first needs three times its estimate: those estimated at 80 and 60 are not compiled."""
    candidates = [candidate_of(90, microbatch=0), candidate_of(80, microbatch=1),
                  candidate_of(60, microbatch=2), candidate_of(30, microbatch=3),
                  candidate_of(80, "dots", microbatch=4)]  # fmt: skip
    assert run_search(candidates, {0: 270, 3: 90, 4: 70}) == ([3, 4], [0], [0, 3, 4])


def test_candidates_that_fail_to_compile_are_logged_and_skipped(caplog):
    candidates = [candidate_of(90, microbatch=0), candidate_of(80, microbatch=1)]
    assert run_search(candidates, {0: None, 1: 80}) == ([1], [], [0, 1])
    assert "mesh 1 x 1 x 1 x 1, microbatch 0, remat full: no room in VMEM" in caplog.text


def test_a_search_without_a_fit_returns_the_misses():
    candidates = [candidate_of(90, microbatch=0), candidate_of(80, microbatch=1)]
    assert run_search(candidates, {0: 110, 1: 110}, attempts=5) == ([], [0, 1], [0, 1])


def test_counts_must_be_positive():
    recipe = load_recipe("btlm-3b-8k")
    with pytest.raises(ValueError, match="--jobs: found 0"):
        fit_phase(recipe, 0, topologies.parse_topology("v5e:4x4"), keep=1, attempts=1, jobs=0)


def test_the_table_replaces_the_text_between_the_markers(tmp_path: Path, monkeypatch):
    def fake_fit_phase(recipe, index, topology, **_):
        if topology.chip is CHIPS["v4"]:
            raise ValueError("nothing fits")
        return [{
            "mesh": {"data": 1, "fsdp": 16, "context": 1, "tensor": 1}, "microbatch": 32,
            "remat": "full", "length": recipe.phases[index].length, "mfu": 0.5,
            "memory": {"peak": 8 << 30, "available": 16 << 30},
            "bound": {"seconds": 0.5, "limit": "compute"}, "tokens_per_second_per_device": 12345.6,
        }]  # fmt: skip

    monkeypatch.setattr(fit_table, "fit_phase", fake_fit_phase)
    file = tmp_path / "page.md"
    file.write_text(f"before\n{fit_table.BEGIN}\nold\n{fit_table.END}\nafter\n")
    recipe = load_recipe("btlm-3b-8k")
    fit_table.write_fit_table(file, recipe, attempts=1, jobs=1, names=("v5e-16", "v4-8"))
    text = file.read_text()
    assert text.startswith("before\n") and text.endswith(f"{fit_table.END}\nafter\n")
    assert "old" not in text and "v4-8 at 8192: nothing fits" in text
    rows = [line for line in text.splitlines() if line.startswith("| v5e-16 (v5e:4x4)")]
    assert len(rows) == 2 and "| 8.00 of 16.00 GiB | 500 ms | COMPUTE | 12,346 | 50% |" in rows[1]
    fit_table.write_fit_table(file, recipe, attempts=1, jobs=1, names=("v5e-16", "v4-8"))
    assert file.read_text() == text
    file.write_text("nothing here")
    with pytest.raises(ValueError, match="found no <!-- btlm compile --table"):
        fit_table.write_fit_table(file, recipe, attempts=1, jobs=1)
