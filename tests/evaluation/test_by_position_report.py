"""Reports of the loss by position: means, errors, tables and plots."""

from __future__ import annotations

import dataclasses
import functools
import json

import numpy as np
import pytest

from btlm_jax.evaluation import by_position, by_position_report
from btlm_jax.evaluation.by_position import (
    LossByPosition,
    PositionCurve,
    bin_means,
    loss_by_position,
)
from btlm_jax.evaluation.long_windows import LongWindows
from btlm_jax.utils.progress import Progress
from support.documents import random_documents


def make_report(groups: np.ndarray, edges, trained: int) -> LossByPosition:
    """Returns the report of losses [groups, T], with one window per group."""
    sums = np.add.reduceat(groups, edges[:-1], axis=1)
    curve = PositionCurve("none", (edges[-1],), groups.sum(0), np.square(groups).sum(0), sums)
    counts = np.ones(len(groups), int)
    return LossByPosition(trained, edges[-1], np.array(edges), counts, 0, (curve,))


def test_bins_have_means_and_standard_errors():
    """With equal group sizes, the error is that of a mean of independent groups."""
    losses = np.random.default_rng(0).gamma(2.0, 1.0, (7, 30))
    report = make_report(losses, [0, 2, 5, 10, 30], 5)
    bins = bin_means(report, report.curves[0], [0, 5, 30])
    for x, (a, b) in zip(bins, ((0, 5), (5, 30)), strict=True):
        means = losses[:, a:b].mean(1)
        assert (x.start, x.stop) == (a, b) and x.mean == pytest.approx(means.mean())
        assert x.error == pytest.approx(means.std(ddof=1) / 7**0.5)
    single = make_report(losses[:1], [0, 5, 30], 5)
    assert np.isnan(bin_means(single, single.curves[0], [0, 5, 30])[0].error)


def test_windows_of_a_document_are_not_independent():
    """Copies of a window in one group count in the mean, but as one in the error."""
    losses = np.random.default_rng(1).gamma(2.0, 1.0, (5, 8))
    report, copies = make_report(losses, [0, 8], 4), np.array([1, 2, 3, 1, 5])
    sums = report.curves[0].group_sums * copies[:, None]
    curve = dataclasses.replace(report.curves[0], group_sums=sums)
    (the_bin,) = bin_means(dataclasses.replace(report, windows=copies), curve, [0, 8])
    # A regression on a constant with errors clustered by group (CR1), token by token.
    tokens = np.repeat(losses, copies, axis=0).ravel()
    group = np.repeat(np.arange(5), copies * 8)
    mean = np.linalg.lstsq(np.ones((len(tokens), 1)), tokens, rcond=None)[0][0]
    scores = np.bincount(group, tokens - mean)
    assert the_bin.mean == pytest.approx(mean, rel=1e-12)
    expected = (5 / 4 * scores @ scores) ** 0.5 / len(tokens)
    assert the_bin.error == pytest.approx(expected, rel=1e-12)


def test_a_stream_has_no_standard_errors(tiny, tmp_path, caplog):
    """Its windows are neighbors. Their number is unknown until the stream ends."""
    model, params = tiny
    windows = LongWindows(random_documents(30, 41), 2, 10, max_windows=100, concatenate=True)
    with caplog.at_level("INFO"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(by_position, "Progress", functools.partial(Progress, every=0.0))
        report = loss_by_position(model, params, windows, trained=5, kinds=["none", "dynamic"])
    assert report.windows.tolist() == [7]
    assert all(np.isnan(x.error) for x in bin_means(report, report.curves[0], report.edges))
    assert "±" not in "".join(by_position_report.format_loss_by_position(report))
    summary = by_position_report.loss_by_position_json(report)["curves"][1]["summary_of_difference"]
    assert {x["error"] for x in summary} == {None}
    by_position_report.plot_loss_by_position(tmp_path / "a.png", report, "title")
    (line,) = (r.getMessage() for r in caplog.records if r.name == "btlm_jax.utils.progress")
    assert line.startswith("evaluate: 7 window, ") and line.endswith("window/s, at most 100")


def test_table_json_and_plot_show_means_and_paired_differences(tmp_path):
    losses = np.random.default_rng(0).gamma(2.0, 1.0, (7, 64))
    other = losses + np.random.default_rng(1).normal(0.1, 0.01, (7, 64))
    edges = [int(x) for x in by_position.bin_edges(16, 64)]
    report = make_report(losses, edges, 16)
    curve = dataclasses.replace(make_report(other, edges, 16).curves[0], kind="fixed")
    report = dataclasses.replace(report, curves=(*report.curves, curve))
    assert by_position.summary_edges(report) == [0, 2, 4, 8, 16, 23, 32, 45, 64]
    head, first, *_, last = by_position_report.format_loss_by_position(report)
    assert head.endswith("fixed, distances / 4 - plain ALiBi")
    assert first.split()[0] == "0-1"
    # The mean of the first curve, and the paired difference of the other.
    expected = []
    for x in (losses, other - losses):
        means = x[:, 45:].mean(1)
        expected += [means.mean(), 1.96 * means.std(ddof=1) / 7**0.5]
    place, mean, _, error, change, _, error_of_change = last.split()
    assert place == "45-63" and change.startswith("+0.1")
    printed = [float(x) for x in (mean, error, change, error_of_change)]
    np.testing.assert_allclose(printed, expected, atol=6e-5)
    assert expected[3] < expected[1] / 10
    one, two = json.loads(json.dumps(by_position_report.loss_by_position_json(report)))["curves"]
    np.testing.assert_allclose(one["mean"], losses.mean(0), atol=1e-6)
    np.testing.assert_allclose(one["deviation"], losses.std(0), atol=1e-6)
    np.testing.assert_allclose(two["mean"], other.mean(0), atol=1e-6)
    assert one["summary"][-1]["stop"] == 64
    last = two["summary_of_difference"][-1]
    np.testing.assert_allclose([last["mean"], 1.96 * last["error"]], expected[2:], atol=1e-9)
    by_position_report.plot_loss_by_position(tmp_path / "a" / "b.png", report, "title")
    assert (tmp_path / "a" / "b.png").read_bytes().startswith(b"\x89PNG")
