"""Time to the first token of a prompt of which nothing is cached."""

from __future__ import annotations

from collections import defaultdict
from statistics import median

from . import Context, Outcomes, Plan, Unfit, Value, batches

NAME = "prefill"
ANSWER = 2


def cases(plan: Plan) -> list[str]:
    return [str(length) for length in plan.sizes.prefill]


def measure(ctx: Context, cases: list[str]) -> Outcomes:
    repeats = ctx.sizes.repeats
    seconds: dict[int, list[float]] = defaultdict(list)
    for length, result, _ in batches.run(ctx, NAME, 1, [int(case) for case in cases for _ in range(repeats)], ANSWER):
        if isinstance(result, Unfit):
            if length not in seconds:
                yield str(length), result
            seconds[length].append(0)
            continue
        seconds[length].append(result["last_ttft"])
        if len(seconds[length]) == repeats:
            middle = median(seconds[length])
            note = "of " + " ".join(f"{1e3 * s:.5g}" for s in seconds[length])
            yield str(length), [Value("ttft", 1e3 * middle, "ms", note), Value("speed", length / middle, "tokens/s")]
