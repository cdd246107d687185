"""The search for what fits, with made-up compiles."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from btlm_jax import BTLMConfig
from btlm_jax.perf.chips import CHIPS
from btlm_jax.perf.roofline import TimeBound
from btlm_jax.train.aot import fit as fit_lib
from btlm_jax.train.aot import fit_table, topologies
from btlm_jax.train.aot.fit import Candidate, candidates, search
from btlm_jax.train.recipe import Phase
from btlm_jax.train.recipe_file import load_recipe

B3 = BTLMConfig.preset("btlm-3b-8k")


def found_for(name: str, slices: int = 1, batch_size: int = 480, length: int = 8192):
    t = topologies.parse_topology(name, slices)
    n = slices
    for size in t.shape:
        n *= size
    rates = t.chip.per_device(t.shape)
    return candidates(B3, Phase(1, batch_size, length), n, slices, rates), n, rates


def test_candidates_divide_and_are_ordered():
    found, n, rates = found_for("v5e:4x4")
    assert found
    for c in found:
        data, fsdp, context, tensor = c.mesh
        assert data * fsdp * context * tensor == n
        assert 480 % c.microbatch == 0 and c.microbatch % (data * fsdp) == 0
        assert 32 % tensor == 0 and (context == 1 or 8192 % (2 * context) == 0)
        assert 2560 % (fsdp * context) == 0
        assert c.memory <= 1.25 * rates.memory
    bounds = [(c.bound.seconds, c.bound.in_turn) for c in found]
    assert bounds == sorted(bounds)
    assert {c.remat for c in found} >= {"full", "attention"}
    # 480 sequences cannot be split over 256 devices: some axis must split the sequences or heads.
    large, _, _ = found_for("v5e:16x16")
    assert large and all(c.mesh[0] * c.mesh[1] <= 96 for c in large)


def test_slices_divide_over_data_and_fsdp():
    found, n, _ = found_for("v5e:4x4", slices=2)
    assert n == 32 and found
    assert all(c.mesh[0] * c.mesh[1] % 2 == 0 for c in found)
    assert all(c.bound.dcn > 0 for c in found)
    # Across slices only sums of gradients: the best has a replica on each.
    assert found[0].mesh[0] == 2


def test_settings():
    c = Candidate((1, 16, 1, 1), 32, "full", TimeBound(1, 1, 1, 0), 1.0)
    assert c.settings(1) == [
        "mesh.data=1", "mesh.fsdp=16", "mesh.context=1", "mesh.tensor=1",
        "phases.1.microbatch=32", "run.remat=full",
    ]  # fmt: skip


def row(estimate: float, remat="full", micro=1):
    return Candidate((1, 1, 1, 1), micro, remat, TimeBound(1, 1, 1, 0), estimate)


def searched(ordered, needs, jobs=1, keep=2, attempts=10):
    tried = []

    def run(candidate):
        tried.append(candidate.microbatch)
        needed = needs[candidate.microbatch]
        if needed is None:
            return {"failed": "no room in VMEM"}
        return {"needed": needed} if needed > 100 else {"memory": {"peak": needed}}

    with ThreadPoolExecutor(jobs) as pool:
        found, misses = search(
            ordered, run, pool, available=100, keep=keep, attempts=attempts, jobs=jobs
        )
    return [c.microbatch for c, _ in found], [c.microbatch for c, _ in misses], tried


def test_search_stops_when_enough_fit():
    rows = [row(50, micro=m) for m in range(5)]
    assert searched(rows, dict.fromkeys(range(5), 60)) == ([0, 1], [], [0, 1])
    assert searched(rows, dict.fromkeys(range(5), 60), attempts=1) == ([0], [], [0])
    found, misses, tried = searched(rows, dict.fromkeys(range(5), 60), jobs=3, keep=3)
    assert sorted(found) == [0, 1, 2] and not misses and len(tried) == 3


def test_what_a_compile_needed_corrects_the_estimates():
    """The first needs three times its estimate: those estimated at 80 and 60 are not tried."""
    rows = [row(90, micro=0), row(80, micro=1), row(60, micro=2), row(30, micro=3),
            row(80, "dots", micro=4)]  # fmt: skip
    needs = {0: 270, 3: 90, 4: 70}
    assert searched(rows, needs) == ([3, 4], [0], [0, 3, 4])


def test_what_cannot_be_compiled_is_shown_and_passed_over(caplog):
    rows = [row(90, micro=0), row(80, micro=1)]
    assert searched(rows, {0: None, 1: 80}) == ([1], [], [0, 1])
    assert "mesh 1 x 1 x 1 x 1, microbatch 0, remat full: no room in VMEM" in caplog.text


def test_nothing_fits():
    rows = [row(90, micro=0), row(80, micro=1)]
    assert searched(rows, {0: 110, 1: 110}, attempts=5) == ([], [0, 1], [0, 1])


def test_bad_numbers():
    recipe = load_recipe("btlm-3b-8k")
    with pytest.raises(ValueError, match="--jobs: found 0"):
        fit_lib.fit(recipe, 0, topologies.parse_topology("v5e:4x4"), keep=1, attempts=1, jobs=0)


def test_table_goes_between_the_markers(tmp_path: Path, monkeypatch):
    def fit(recipe, index, topology, **_):
        if topology.chip is CHIPS["v4"]:
            raise ValueError("nothing fits")
        return [{
            "mesh": {"data": 1, "fsdp": 16, "context": 1, "tensor": 1}, "microbatch": 32,
            "remat": "full", "length": recipe.phases[index].length, "mfu": 0.5,
            "memory": {"peak": 8 << 30, "available": 16 << 30},
            "bound": {"seconds": 0.5, "limit": "compute"}, "tokens_per_second_per_device": 12345.6,
        }]  # fmt: skip

    monkeypatch.setattr(fit_table, "fit", fit)
    file = tmp_path / "README.md"
    file.write_text(f"before\n{fit_table.BEGIN}\nold\n{fit_table.END}\nafter\n")
    recipe = load_recipe("btlm-3b-8k")
    fit_table.write_fit_table(file, recipe, attempts=1, jobs=1, names=("v5e-16", "v4-8"))
    text = file.read_text()
    assert text.startswith("before\n") and text.endswith(f"{fit_table.END}\nafter\n")
    assert "old" not in text and "v4-8 at 8192: nothing fits" in text
    rows = [line for line in text.splitlines() if line.startswith("| v5e-16 (v5e:4x4)")]
    assert len(rows) == 2 and "| 8.00 of 16.00 GiB | 500 ms | COMPUTE | 12,346 | 50% |" in rows[1]
    again = file.read_text()
    fit_table.write_fit_table(file, recipe, attempts=1, jobs=1, names=("v5e-16", "v4-8"))
    assert file.read_text() == again
    file.write_text("nothing here")
    with pytest.raises(ValueError, match="found no <!-- btlm compile --table"):
        fit_table.write_fit_table(file, recipe, attempts=1, jobs=1)
