"""Decode of one sequence by context, and the GPU memory that it takes.

A server takes its whole cache at start, so the sampled peak is nearly the same for every length. ``memory_needed`` is
that peak less the cache and SGLang's table of requests, plus what the sequence fills of both: what a server sized for
it would take.

A step is the mean of a run of steps, and a pause of the host in it weighs as much as ten of them: up to 128K tokens
there are three runs, of which the middle one counts. Longer prompts take minutes to read and run once.
"""

from __future__ import annotations

from statistics import median

from ..counters import pool_bytes, request_table
from . import Context, Failed, Outcomes, Plan, Unfit, Value, batches

NAME = "decode"
REPEATS, REPEATED_UP_TO = 3, 131072


def cases(plan: Plan) -> list[str]:
    return [str(length) for length in plan.sizes.decode]


def repeats(length: int) -> int:
    return REPEATS if length <= REPEATED_UP_TO else 1


def measure(ctx: Context, cases: list[str]) -> Outcomes:
    lengths = [length for case in cases for length in [int(case)] * repeats(int(case))]
    runs = batches.decode(ctx, NAME, 1, lengths, lambda *run: list(run))
    for length, outcome in batches.together(runs, repeats):
        yield str(length), outcome if isinstance(outcome, Unfit | Failed) else values(ctx, outcome)


def values(ctx: Context, runs: list[list]) -> list[Value]:
    """Of one length's runs: each result and (peak of GPU memory, what it counts)."""
    steps = [batches.step_ms(result) for result, _ in runs]
    result = runs[0][0]
    count = result["output_len"] - 1
    note = f"mean of {count} steps"
    if len(runs) > 1:
        note = f"means of {count} steps: {' '.join(f'{ms:.5g}' for ms in steps)}"
    out = [Value("step", median(steps), "ms", note)]
    peaks, (_, what) = [peak for _, (peak, _) in runs if peak is not None], runs[0][1]
    if not peaks:
        return out
    out.append(Value("memory_peak", max(peaks), "bytes", what))
    tokens, pool, table = ctx.info.get("max_total_num_tokens"), pool_bytes(ctx.info), request_table(ctx.info)
    if tokens and pool and table:
        filled = (result["input_len"] + result["output_len"]) * pool / tokens
        needed = max(peaks) - pool - table[0] + filled + table[1]
        note = "the cache and the table of requests for the sequence only"
        out.append(Value("memory_needed", needed, "bytes", note))
    return out
