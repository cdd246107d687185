"""Everything measured, in one file."""

from __future__ import annotations

import pytest
from btlm_jax.train import bench_all, measure

from btlm_jax import chips, cli


def quick(monkeypatch, names):
    def bench(title):
        def run(*, rounds, show):
            if title == "broken":
                raise RuntimeError("no memory")
            show(f"{title}: {rounds} rounds")
            return {"length": 2048, "rates": {"step": 48_200.0}}

        return run

    monkeypatch.setattr(bench_all, "_benches", lambda: ((n, bench(n)) for n in names))


def test_one_section_per_bench_and_failures_are_written_down(monkeypatch, tmp_path, capsys):
    quick(monkeypatch, ["Loss", "broken", "btlm-3b-8k at 2048"])
    file = tmp_path / "found.md"
    file.write_text("of yesterday")
    assert cli.main(["bench", "all", str(file), "--rounds", "3"]) == 2
    text = file.read_text()
    assert text.startswith("## ") and "cpu" in text and "of yesterday" not in text
    assert "### Loss\n\n```\nLoss: 3 rounds\n```" in text
    assert "FAILED: RuntimeError: no memory" in text
    assert "24,100 tokens/s/GPU, MFU 43.7 % of the data sheet's peak; here 2.00 x its" in text
    assert [p.name for p in tmp_path.iterdir()] == ["found.md"]
    said = capsys.readouterr()
    assert "Loss: 3 rounds" in said.out
    assert f"btlm: error: failed: broken; the errors, and the rest, are in {file}" in said.err


def test_mfu_where_the_peak_is_known(monkeypatch):
    """Of 48,200 tokens/s on an H200, by hand: 6 N and full attention, over 989 TFLOP/s."""
    found = {"length": 2048, "rates": {"step": 48_200.0}}
    assert "x its tokens/s, MFU" not in bench_all._beside_mpt("btlm-3b-8k at 2048", found)[0]
    monkeypatch.setattr(chips, "peak_flops", lambda kind: 989e12)
    per_token = 6 * (32 * (4 * 2560**2 + 3 * 2560 * 6826) + 50257 * 2560) + 12 * 32 * 2048 * 2560
    expected = f"x its tokens/s, MFU {per_token * 48_200 / 989e12:.1%}"
    assert expected in bench_all._beside_mpt("btlm-3b-8k at 2048", found)[0]


def test_what_is_measured_where(monkeypatch):
    decoding = ["Decoding, bfloat16", "Decoding, int8", "Decoding, int4", "Prefill"]
    found = [title for title, _ in bench_all._benches()]
    assert found == [*decoding, "Attention", "Loss", "btlm-40m"]
    monkeypatch.setattr(bench_all.sharding, "platform", lambda mesh: "gpu")
    titles = [title for title, _ in bench_all._benches()]
    assert titles[-2:] == ["btlm-3b-8k at 2048", "btlm-3b-8k at 8192"]


def test_the_smallest_of_each_runs(monkeypatch, tmp_path):
    """As they are called, with sizes that take a moment."""
    monkeypatch.setattr(measure, "MATMUL", 64)
    real = list(bench_all._benches())
    small = {
        "Attention": dict(preset="tiny", length=32),
        "Loss": dict(preset="tiny", rows=64),
        "btlm-40m": dict(preset="tiny", length=16, batch_size=1, torch=False),
    }
    decoding = dict(preset="tiny", layers=1, context=8, torch=False)
    small |= {f"Decoding, {kind}": decoding for kind in ("bfloat16", "int8", "int4")}
    small["Prefill"] = dict(preset="tiny", layers=1, lengths=(8,), torch=False)
    for title, bench in real:
        lines = []
        found = bench(rounds=1, show=lines.append, **small[title])
        assert found["rounds"] == 1 and lines


def test_no_directory(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing: no such directory; make it first"):
        bench_all.bench_all(tmp_path / "missing" / "x.md", rounds=1)
