"""More long prompts than fit: a closed loop in which so many requests are always under way."""

from __future__ import annotations

from ..bench import serving, serving_command
from ..counters import decoding, retracted
from . import Context, Outcomes, Plan, Unfit, Value

NAME = "pressure"


def cases(plan: Plan) -> list[str]:
    prompt, answer = plan.sizes.pressure
    return [f"{prompt}+{answer} x{slots}" for slots in plan.sizes.concurrency]


def load(plan: Plan, case: str) -> list[str]:
    """bench_serving's options for a case."""
    prompt, answer = plan.sizes.pressure
    slots = int(case.rpartition("x")[2])
    return [
        *("--dataset-name", "random-ids", "--random-input-len", str(prompt), "--random-output-len", str(answer)),
        *("--random-range-ratio", "1", "--num-prompts", str(round(slots * plan.sizes.per_slot))),
        *("--max-concurrency", str(slots)),
    ]


def measure(ctx: Context, cases: list[str]) -> Outcomes:
    prompt, answer = ctx.sizes.pressure
    for case in cases:
        tokens = ctx.info.get("max_total_num_tokens") or 0
        if tokens < prompt + answer:
            yield case, Unfit(f"{prompt + answer} tokens are needed by one request, {tokens} fit")
            continue
        out = ctx.raw / f"{NAME}_{case.rpartition('x')[2]}.jsonl"
        before, logged = retracted(ctx.server), len(ctx.server.output())
        command = serving_command(ctx.target, out, load(ctx.plan, case), answer, warm=not ctx.warm, flush=True)
        result = serving(ctx.worker, command, out, out.with_suffix(".log"), ctx.timeout())
        ctx.warm = True
        values = [*stream_values(result), Value("retractions", retracted(ctx.server) - before, "requests")]
        if found := decoding(ctx.server.output()[logged:]):
            values.append(Value("decode_requests", found[0], "requests", "the most of a step"))
            values.append(
                Value("decode_throughput", found[1], "tokens/s", "of steps with so many, by the server's log")
            )
        yield case, values


def stream_values(result: dict) -> list[Value]:
    """What a stream of requests is measured by."""
    report = result["cache_report"]
    note = f"{result['completed']} requests in {result['duration']:.4g} s"
    return [
        Value("output_throughput", result["output_throughput"], "tokens/s", note),
        Value("total_throughput", result["total_throughput"], "tokens/s", "prompts and answers"),
        Value("ttft_p50", result["median_ttft_ms"], "ms"),
        Value("ttft_p99", result["p99_ttft_ms"], "ms"),
        Value("tpot_p50", result["median_tpot_ms"], "ms"),
        Value("tpot_p99", result["p99_tpot_ms"], "ms"),
        Value("itl_p50", result["median_itl_ms"], "ms", "between two tokens, all requests"),
        Value("hit_rate", report["total_cached_tokens"] / max(report["total_prompt_tokens"], 1), "of prompt tokens"),
    ]
