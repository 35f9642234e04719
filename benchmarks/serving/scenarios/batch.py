"""Decode of batches that start together."""

from __future__ import annotations

from collections import defaultdict

from . import Context, Outcomes, Plan, Value, batches

NAME = "batch"


def cases(plan: Plan) -> list[str]:
    return [f"{batch}x{length}" for batch, length in plan.sizes.batches]


def measure(ctx: Context, cases: list[str]) -> Outcomes:
    by_batch: dict[int, list[int]] = defaultdict(list)
    for case in cases:
        batch, length = map(int, case.split("x"))
        by_batch[batch].append(length)
    for batch, lengths in by_batch.items():
        for length, outcome in batches.decode(ctx, NAME, batch, lengths, _values):
            yield f"{batch}x{length}", outcome


def _values(result: dict, memory: tuple) -> list[Value]:
    return [
        Value("step", batches.step_ms(result), "ms"),
        Value("output_throughput", result["steady_state_output_throughput"], "tokens/s", "while all decode"),
    ]
