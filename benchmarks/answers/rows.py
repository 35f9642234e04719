"""Figures with their 95 % intervals: rates, means, medians, and means and slopes over positions of long answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ..tasks.record import wilson

RESAMPLES = 1000
STRETCH = 50  # tokens that are drawn together: neighbours in a text are alike


@dataclass(frozen=True)
class Row:
    """samples: what value is a figure of: answers, or tokens where unit says so. low, high: None without interval."""

    test: str
    measure: str
    samples: int
    value: float
    low: float | None
    high: float | None
    unit: str


def share(test: str, measure: str, passed: Sequence[float]) -> Row:
    """Of answers that are right (1) or not (0), with Wilson's interval."""
    value = float(np.mean(passed))
    return Row(test, measure, len(passed), value, *wilson(value, len(passed)), "share")


def _drawn(count: int) -> np.ndarray:
    """``[RESAMPLES, count]`` places, drawn with replacement."""
    return np.random.default_rng(0).integers(0, count, (RESAMPLES, count))


def _interval(values: np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(values, (2.5, 97.5))
    return float(low), float(high)


def average(
    test: str, measure: str, values: Sequence[float], unit: str, statistic: Callable[..., np.ndarray] = np.mean
) -> Row:
    """Mean or another statistic of one figure an answer, with its bootstrap interval."""
    every = np.asarray(values, float)
    resampled = statistic(every[_drawn(len(every))], axis=1)
    return Row(test, measure, len(every), float(statistic(every)), *_interval(resampled), unit)


def stretches(series: Sequence[Sequence[float]], first: int, end: int) -> list[np.ndarray]:
    """``[n, 2]`` positions and values of every STRETCH tokens between two positions, of each answer."""
    out = []
    for values in series:
        for start in range(first, min(end, len(values)), STRETCH):
            stop = min(start + STRETCH, end, len(values))
            out.append(np.stack([np.arange(start, stop), np.asarray(values[start:stop], float)], 1))
    return out


def _sums(parts: Sequence[np.ndarray]) -> np.ndarray:
    """``[stretches, 5]``: n, sum x, sum y, sum xx, sum xy."""
    return np.stack([np.array([len(p), *p.sum(0), p[:, 0] @ p[:, 0], p[:, 0] @ p[:, 1]]) for p in parts])


def token_mean(test: str, measure: str, parts: Sequence[np.ndarray], unit: str) -> Row:
    """Mean over tokens; the interval draws whole stretches."""
    sums = _sums(parts)
    n, _, y, *_ = sums[_drawn(len(parts))].sum(1).T
    total = sums.sum(0)
    return Row(test, measure, int(total[0]), float(total[2] / total[0]), *_interval(y / n), unit)


def token_slope(test: str, measure: str, parts: Sequence[np.ndarray], unit: str) -> Row:
    """Least-squares slope for 1,000 positions; the interval draws whole stretches. Two of them are the least."""
    sums = _sums(parts)

    def slope(n, x, y, xx, xy):
        spread = n * xx - x * x
        return 1000 * np.divide(n * xy - x * y, spread, out=np.zeros_like(spread), where=spread > 0)

    total = sums.sum(0)
    value = float(slope(*total[:, None])[0])
    return Row(test, measure, int(total[0]), value, *_interval(slope(*sums[_drawn(len(parts))].sum(1).T)), unit)


def extreme(test: str, measure: str, values: Sequence[float], unit: str, pick: Callable = max) -> Row:
    """Worst of all tokens; no interval."""
    return Row(test, measure, len(values), float(pick(values)), None, None, unit)
