"""Decode of one sequence by context, and the GPU memory that it takes.

A server takes its whole cache at start, so the sampled peak is nearly the same for every length. ``memory_needed`` is
that peak less the cache and SGLang's table of requests, plus what the sequence fills of both: what a server sized for
it would take.
"""

from __future__ import annotations

from ..counters import pool_bytes, request_table
from . import Context, Outcomes, Plan, Value, batches

NAME = "decode"


def cases(plan: Plan) -> list[str]:
    return [str(length) for length in plan.sizes.decode]


def measure(ctx: Context, cases: list[str]) -> Outcomes:
    tokens, pool, table = ctx.info.get("max_total_num_tokens"), pool_bytes(ctx.info), request_table(ctx.info)

    def values(result: dict, memory: tuple[float | None, str]) -> list[Value]:
        step = step_value(result)
        peak, what = memory
        if peak is None:
            return [step]
        out = [step, Value("memory_peak", peak, "bytes", what)]
        if tokens and pool and table:
            filled = (result["input_len"] + result["output_len"]) * pool / tokens
            needed = peak - pool - table[0] + filled + table[1]
            out.append(
                Value("memory_needed", needed, "bytes", "the cache and the table of requests for the sequence only")
            )
        return out

    for length, outcome in batches.decode(ctx, NAME, 1, [int(case) for case in cases], values):
        yield str(length), outcome


def step_value(result: dict) -> Value:
    return Value("step", batches.step_ms(result), "ms", f"mean of {result['output_len'] - 1} steps")
