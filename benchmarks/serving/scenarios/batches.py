"""Batches by bench_one_batch_server: what decode, batch and prefill share."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

from ..bench import Skipped, one_batch, one_batch_command
from ..memory import Sampler
from . import Context, Failed, Unfit


def run(
    ctx: Context, name: str, batch: int, lengths: Sequence[int], answer: int
) -> Iterator[tuple[int, dict | Unfit, tuple[float | None, str]]]:
    """(length, result, (peak bytes of GPU memory, what they count)) of each length, as it is measured."""
    out = ctx.raw / f"{name}_{batch}.jsonl"
    command = one_batch_command(ctx.target, out, batch, lengths, answer)
    with Sampler(ctx.server.process.pid) as sampler:
        for result in one_batch(ctx.worker, command, out, out.with_suffix(".log"), ctx.timeout()):
            if isinstance(result, Skipped):
                yield result.length, Unfit(result.note), (None, "")
            else:
                ctx.warm = True
                yield result["input_len"], result, sampler.take()


def decode(
    ctx: Context, name: str, batch: int, lengths: Sequence[int], values: Callable[[dict, tuple], list]
) -> Iterator[tuple[int, list | Unfit | Failed]]:
    """Cases that need the window in which the whole batch decodes."""
    steps = ctx.sizes.steps
    for length, result, memory in run(ctx, name, batch, lengths, steps + 1):
        if isinstance(result, Unfit):
            yield length, result
        elif result["total_output_tokens"] != batch * (steps + 1):
            yield length, Failed(f"{result['total_output_tokens']} of {batch * (steps + 1)} tokens were generated")
        elif not result["steady_state_output_throughput"]:
            yield length, Failed("there was no time in which all requests of the batch were decoding")
        else:
            yield length, values(result, memory)


Measured = TypeVar("Measured")


def together(
    runs: Iterable[tuple[int, Measured | Unfit | Failed]], times: Callable[[int], int]
) -> Iterator[tuple[int, list[Measured] | Unfit | Failed]]:
    """Of a length that runs ``times(length)`` times, all that was measured, once it is there; or what kept it, once."""
    found: dict[int, list[Measured]] = defaultdict(list)
    refused: set[int] = set()
    for length, run in runs:
        if isinstance(run, Unfit | Failed):
            if length not in refused:
                yield length, run
            refused.add(length)
            continue
        found[length].append(run)
        if len(found[length]) == times(length):
            yield length, found[length]


def step_ms(result: dict) -> float:
    """Milliseconds between two tokens of a request while the whole batch decodes."""
    return 1e3 * result["batch_size"] / result["steady_state_output_throughput"]
