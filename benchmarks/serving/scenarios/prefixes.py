"""Long prefixes that requests share, asked for again round after round.

The prefixes together take more than fits the unquantized cache (``overfill`` times as much), where that is known: it
has lost a prefix when the next round asks for it, a cache several times larger has not. Every round sends the same
requests, in the same order, the first to an empty cache.
"""

from __future__ import annotations

import math

from ..bench import serving, serving_command
from ..configs import PREFIX_SLOTS
from ..counters import retracted
from . import Context, Outcomes, Plan, Unfit, Value
from .pressure import stream_values

NAME = "prefixes"


def shape(plan: Plan) -> tuple[int, int]:
    """Prefixes, and requests of a round for each."""
    sizes = plan.sizes
    prefixes = max(sizes.prefixes, math.ceil(sizes.overfill * (plan.capacity or 0) / sizes.prefix))
    return prefixes, max(1, sizes.prefix_requests // prefixes)


def working_set(plan: Plan) -> int:
    """Tokens that a cache must hold to keep everything."""
    prefixes, each = shape(plan)
    return prefixes * (plan.sizes.prefix + each * (plan.sizes.question + plan.sizes.prefix_answer))


def rounds(plan: Plan) -> list[str]:
    prefixes, each = shape(plan)
    return [f"{prefixes}x{plan.sizes.prefix} by {each}, round {i + 1}" for i in range(plan.sizes.rounds)]


cases = rounds


def load(plan: Plan) -> list[str]:
    """bench_serving's options."""
    prefixes, each = shape(plan)
    sizes = plan.sizes
    return [
        *("--dataset-name", "generated-shared-prefix", "--gsp-num-groups", str(prefixes)),
        *("--gsp-prompts-per-group", str(each), "--gsp-system-prompt-len", str(sizes.prefix)),
        *("--gsp-question-len", str(sizes.question), "--gsp-output-len", str(sizes.prefix_answer)),
        *("--max-concurrency", str(PREFIX_SLOTS)),
    ]


def measure(ctx: Context, cases: list[str]) -> Outcomes:
    sizes = ctx.sizes
    longest = sizes.prefix + sizes.question + sizes.prefix_answer
    tokens = ctx.info.get("max_total_num_tokens") or 0
    if tokens < longest:
        for case in cases:
            yield case, Unfit(f"{longest} tokens are needed by one request, {tokens} fit")
        return
    every = rounds(ctx.plan)  # a round means something only after those before it
    for i, case in enumerate(every):
        out = ctx.raw / f"{NAME}_{i + 1}.jsonl"
        before = retracted(ctx.server)
        first = i == 0
        warm = first and not ctx.warm
        command = serving_command(ctx.target, out, load(ctx.plan), sizes.prefix_answer, warm=warm, flush=first)
        result = serving(ctx.worker, command, out, out.with_suffix(".log"), ctx.timeout())
        values = [*stream_values(result), Value("retractions", retracted(ctx.server) - before, "requests")]
        values.append(Value("working_set", working_set(ctx.plan), "tokens"))
        if case in cases:
            yield case, values
