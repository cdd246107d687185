"""Progress lines, with an injected clock."""

from __future__ import annotations

from btlm_jax.utils.progress import Progress


def test_a_log_line_appears_every_ten_seconds_and_at_the_end(caplog):
    now = [0.0]
    with caplog.at_level("INFO"), Progress(100, "step", "train", clock=lambda: now[0]) as progress:
        for _ in range(10):
            now[0] += 4.0
            progress.update(10, "loss 1.5")
    lines = [r.getMessage() for r in caplog.records]
    assert [x.split(",")[0] for x in lines] == [
        "train: 30 step/100 step (30%)",
        "train: 60 step/100 step (60%)",
        "train: 90 step/100 step (90%)",
        "train: 100 step/100 step (100%)",
    ]
    assert lines[0].endswith("2.5 step/s, 28 s left, loss 1.5")


def test_bytes_have_binary_prefixes():
    progress = Progress(3 << 30, "B", "convert", clock=iter([0.0, 2.0]).__next__)
    progress.update(1 << 30)
    assert progress.line(2.0) == "convert: 1.0 GiB/3.0 GiB (33%), 512.0 MiB/s, 4 s left"


def test_without_a_total_lines_show_count_and_rate(caplog):
    now = [0.0]
    with (
        caplog.at_level("INFO"),
        Progress(None, "window", "eval", clock=lambda: now[0]) as progress,
    ):
        for _ in range(3):
            now[0] += 6.0
            progress.update(12, "at most 100")
    assert [r.getMessage() for r in caplog.records] == ["eval: 24 window, 2 window/s, at most 100"]
