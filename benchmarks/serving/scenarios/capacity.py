"""Tokens that fit the cache, at the same share of the GPU's memory for every server."""

from __future__ import annotations

from ..counters import pool_bytes
from . import Context, Failed, Outcomes, Plan, Value

NAME = "capacity"
CASE = "start"


def cases(plan: Plan) -> list[str]:
    return [CASE]


def measure(ctx: Context, cases: list[str]) -> Outcomes:
    tokens, pool = ctx.info.get("max_total_num_tokens"), pool_bytes(ctx.info)
    if not tokens:
        yield CASE, Failed("/server_info has no max_total_num_tokens")
        return
    values = [Value("tokens", tokens, "tokens")]
    if pool:
        values += [Value("cache", pool, "bytes"), Value("bytes_per_token", pool / tokens, "bytes")]
    yield CASE, values
