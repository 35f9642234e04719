"""Figures of answers by hand: intervals, buckets of positions, slope, repetition."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.answers.drift import distinct, drift_rows, token_rows
from benchmarks.answers.rows import average, extreme, share, stretches, token_mean, token_slope
from benchmarks.tasks.record import wilson


def by_measure(rows):
    return {row.measure: row for row in rows}


def test_share_has_wilsons_interval():
    row = share("t", "m", [1.0, 0.0, 1.0, 1.0])
    assert (row.samples, row.value) == (4, 0.75) and (row.low, row.high) == wilson(0.75, 4)


def test_mean_and_median():
    values = [10.0, 20.0, 60.0]
    mean, median = average("t", "m", values, "u"), average("t", "m", values, "u", np.median)
    assert (mean.value, median.value) == (30.0, 20.0)
    assert (mean.low, mean.high) == (10.0, 60.0) == (median.low, median.high)
    wide, narrow = (average("t", "m", [0.0, 1.0] * n, "u") for n in (5, 500))
    assert narrow.high - narrow.low < (wide.high - wide.low) / 5
    assert average("t", "m", [3.0], "u").low == 3.0


def test_stretches_cover_every_position_once():
    series = [list(range(130)), list(range(40))]
    parts = stretches(series, 0, 1000)
    assert [len(p) for p in parts] == [50, 50, 30, 40]
    assert all((p[:, 0] == p[:, 1]).all() for p in parts)
    assert [len(p) for p in stretches(series, 35, 60)] == [25, 5]


def test_buckets_are_of_the_positions_they_name():
    values = [1.0] * 250 + [2.0] * 250 + [3.0] * 500 + [0.0] * 1000
    values[700] = 9.0
    rows = by_measure(drift_rows("long", [values, values]))
    assert rows["behind best 0-250"].value == 1.0 and rows["behind best 0-250"].samples == 500
    assert rows["behind best 250-500"].value == 2.0
    assert rows["behind best 500-1000"].value == pytest.approx(3 + 6 / 500)
    assert rows["worst token 500-1000"].value == 9.0 and rows["worst token 500-1000"].low is None
    assert rows["behind best 1000-2000"].value == 0.0
    assert (rows["is best 1000-2000"].value, rows["is best 0-250"].value) == (1.0, 0.0)
    assert rows["is best 0-250"].unit == "share of tokens"


def test_short_answers_have_no_rows_of_later_buckets():
    rows = by_measure(drift_rows("long", [[0.5] * 40]))
    assert "behind best 0-250" in rows and "behind best 250-500" not in rows and "slope" not in rows
    assert token_rows("bash", "", []) == []


def test_slope_is_nats_for_a_thousand_tokens():
    rising = [0.001 * i for i in range(2000)]
    row = by_measure(drift_rows("long", [rising] * 4))["slope"]
    assert row.value == pytest.approx(1.0) and row.low == pytest.approx(1.0) and row.high == pytest.approx(1.0)
    noise = np.random.default_rng(1).random(2000).tolist()
    flat = token_slope("t", "m", stretches([noise], 0, 2000), "u")
    assert flat.low < 0 < flat.high and abs(flat.value) < 0.1


def test_intervals_draw_whole_stretches():
    """Tokens alike within a stretch say less than so many different ones."""
    alike = [[float(i // 50 % 2) for i in range(1000)]]
    mixed = [[float(i % 2) for i in range(1000)]]
    wide, narrow = (token_mean("t", "m", stretches(s, 0, 1000), "u") for s in (alike, mixed))
    assert wide.value == narrow.value == 0.5
    assert wide.high - wide.low > 0.3 and narrow.high - narrow.low < 0.01


def test_worst_and_repetition():
    assert extreme("t", "m", [-0.5, -11.5, -1.0], "u", min).value == -11.5
    assert distinct(list(range(20))) == 1.0
    assert distinct([1, 2] * 10) == pytest.approx(2 / 17)
    assert distinct([1, 2]) == 1.0
