"""What readings of long answers say: how far tokens are behind the reference's best, by their place in the answer."""

from __future__ import annotations

from collections.abc import Sequence

from .rows import Row, extreme, stretches, token_mean, token_slope

BUCKETS = ((0, 250), (250, 500), (500, 1000), (1000, 2000))
NGRAM = 4


def distinct(ids: Sequence[int], n: int = NGRAM) -> float:
    """Share of an answer's n-grams of tokens that are different ones; 1 where nothing is said twice."""
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0


def token_rows(test: str, place: str, series: Sequence[Sequence[float]], first: int = 0, end: int = 10**9) -> list[Row]:
    """Mean, worst and share of the reference's best (also where it is one of two) between two positions."""
    parts = stretches(series, first, end)
    if not parts:
        return []
    best = [[float(x <= 0) for x in values] for values in series]
    return [
        token_mean(test, f"behind best{place}", parts, "nats a token"),
        extreme(test, f"worst token{place}", [float(p[:, 1].max()) for p in parts], "nats behind best"),
        token_mean(test, f"is best{place}", stretches(best, first, end), "share of tokens"),
    ]


def drift_rows(test: str, series: Sequence[Sequence[float]]) -> list[Row]:
    """By bucket of positions, and the slope over all of them."""
    out = [row for first, end in BUCKETS for row in token_rows(test, f" {first}-{end}", series, first, end)]
    every = stretches(series, 0, BUCKETS[-1][1])
    return [*out, token_slope(test, "slope", every, "nats a token for 1,000 tokens")] if len(every) > 1 else out
