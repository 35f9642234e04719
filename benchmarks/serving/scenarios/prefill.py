"""Time to the first token of a prompt of which nothing is cached."""

from __future__ import annotations

from statistics import median

from . import Context, Outcomes, Plan, Unfit, Value, batches

NAME = "prefill"
ANSWER = 2


def cases(plan: Plan) -> list[str]:
    return [str(length) for length in plan.sizes.prefill]


def measure(ctx: Context, cases: list[str]) -> Outcomes:
    repeats = ctx.sizes.repeats
    lengths = [int(case) for case in cases for _ in range(repeats)]
    runs = ((length, result) for length, result, _ in batches.run(ctx, NAME, 1, lengths, ANSWER))
    for length, outcome in batches.together(runs, lambda _: repeats):
        if isinstance(outcome, Unfit):
            yield str(length), outcome
            continue
        seconds = [result["last_ttft"] for result in outcome]
        middle = median(seconds)
        note = "of " + " ".join(f"{1e3 * s:.5g}" for s in seconds)
        yield str(length), [Value("ttft", 1e3 * middle, "ms", note), Value("speed", length / middle, "tokens/s")]
