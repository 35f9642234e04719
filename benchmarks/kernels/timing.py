"""Medians of CUDA graph replays over data that the L2 cache has not kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch

MIN_REPLAYS = 20
MAX_REPLAYS = 100
MAX_CALLS = 256  # in one graph
COLD_BYTES = 200_000_000  # what one replay should touch before it comes back to the same data; L2 is 50 MB
_WARMUP_REPLAYS = 3

#: ``launch(window)`` enqueues one call on the current stream; windows are disjoint copies of the data
Launch = Callable[[int], object]


@dataclass(frozen=True)
class Timing:
    """us: median over replays of one call's time. calls: in each replay."""

    us: float
    timed: str  # "graph" or "eager"
    calls: int
    replays: int
    note: str = ""


def calls_per_replay(num_bytes: float, windows: int) -> int:
    """Enough calls to touch COLD_BYTES; no more than there are windows, but two where data are large."""
    wanted = -(-COLD_BYTES // max(1, int(num_bytes)))
    return max(2, min(wanted, max(windows, 2), MAX_CALLS))


def _capture(launch: Launch, windows: int, calls: int) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(calls):
            launch(i % windows)
    return graph


def _elapsed(run: Callable[[], object], count: int) -> list[float]:
    """Milliseconds of each of ``count`` runs."""
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
    for start, stop in events:
        start.record()
        run()
        stop.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(stop) for start, stop in events]


def measure(launch: Launch, num_bytes: float, windows: int, seconds: float) -> Timing:
    """Time ``launch``.

    num_bytes: data one call touches. seconds: about how long the replays may take, beyond the least number.
    Where the call cannot be captured, it is timed eagerly, and the note says what capture said.
    """
    calls = calls_per_replay(num_bytes, windows)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for i in range(2):
            launch(i % windows)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    timed, note = "graph", ""
    try:
        graph = _capture(launch, windows, calls)
        run = graph.replay
    except RuntimeError as e:
        torch.cuda.set_stream(torch.cuda.default_stream())  # a failed capture leaves its own
        torch.cuda.synchronize()
        timed, note = "eager", f"not captured: {str(e).strip().splitlines()[0][:120]}"

        def run() -> None:
            for i in range(calls):
                launch(i % windows)

    guess = median(_elapsed(run, _WARMUP_REPLAYS))
    replays = max(MIN_REPLAYS, min(MAX_REPLAYS, int(seconds * 1e3 / max(guess, 1e-3))))
    times = _elapsed(run, replays)
    del run
    if timed == "graph":
        graph.reset()
    return Timing(median(times) * 1e3 / calls, timed, calls, replays, note)


def copy_gbps(device: torch.device | str = "cuda", num_bytes: int = 1 << 30) -> tuple[Timing, int]:
    """A device-to-device copy of ``num_bytes``; returns its timing and the bytes read and written."""
    source = torch.randint(0, 255, (num_bytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return measure(lambda _: target.copy_(source), 2 * num_bytes, 1, 0.3), 2 * num_bytes
