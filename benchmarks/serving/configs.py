"""The servers that are compared, and how large the loads are."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..models import Model
from ..server_steps import CHUNK, METHODS, Method

SERVERS = {
    **METHODS,
    "blockgtq-k4v4": Method(4, 4, ("--kv-quant=blockgtq", "--kv-quant-k-bits=4", "--kv-quant-v-bits=4")),
    # SGLang's own choice of attention, for GPUs that have no FlashAttention-3.
    "bf16": Method(16, 16, ()),
}
NO_PREFILL_GRAPHS = "--cuda-graph-backend-prefill=disabled"
#: bf16 first: its answers and its capacity are what the others are held against
DEFAULT = (
    *("bf16-fa3", "bf16-flashinfer", "fp8-fa3"),
    *("blockgtq-k3v3", "blockgtq-k2v2", "blockgtq-k4v4", "blockgtq-uniform-k3v3"),
)
#: what "bf16" means in ratios and targets: the first of these that was measured
BASELINES = ("bf16-fa3", "bf16", "bf16-flashinfer")
PREFIX_SLOTS = 8  # requests on shared prefixes that are under way at a time


@dataclass(frozen=True)
class Sizes:
    """Of every load. Lengths in tokens."""

    decode: tuple[int, ...] = (4096, 16384, 65536, 131072, 262144, 524288)
    steps: int = 128  # decode steps after the first token
    batches: tuple[tuple[int, int], ...] = ((8, 8192), (8, 32768), (32, 8192), (32, 32768))
    pressure: tuple[int, int] = (32768, 512)  # prompt, answer
    concurrency: tuple[int, ...] = (8, 32, 64)
    per_slot: float = 2  # requests under pressure for each of those at a time
    prefix: int = 32768
    prefixes: int = 8  # at the least
    overfill: float = 2.0  # what the prefixes take of the unquantized cache, at the least
    prefix_requests: int = 64  # a round
    question: int = 128
    prefix_answer: int = 64
    rounds: int = 3
    prefill: tuple[int, ...] = (8192, 32768, 131072)
    repeats: int = 3  # of a prefill
    check_prompt: int = 1024
    check_new: int = 32

    @property
    def context(self) -> int:
        """The longest request, with some room."""
        longest = [
            *(length + self.steps + 1 for length in self.decode),
            *(length + self.steps + 1 for _, length in self.batches),
            *(sum(self.pressure) for _ in self.concurrency),
            *(self.prefix + self.question + self.prefix_answer for _ in range(self.rounds)),
            *(length + 8 for length in self.prefill),
            self.check_prompt + 2 * self.check_new,
            1024 + 16,  # bench_one_batch_server's own warm-up
        ]
        return max(longest) + 64


FULL = Sizes()
QUICK = Sizes(
    decode=(4096, 32768, 131072),
    steps=100,
    batches=((8, 8192), (8, 32768)),
    concurrency=(64,),
    per_slot=1,
    prefix_requests=32,
    rounds=2,
    prefill=(8192, 32768),
    repeats=2,
    check_prompt=512,
)
#: minutes of one GPU, with little room for the cache: --mem-fraction at which the larger batch just fits bf16
SHORT = Sizes(
    decode=(),
    batches=((8, 8192), (8, 32768)),
    concurrency=(12,),
    per_slot=1.2,
    overfill=1.4,
    prefix_requests=1,  # every prefix once a round
    prefix_answer=16,
    rounds=2,
    prefill=(),
    check_prompt=512,
    check_new=16,
)
#: one long sequence, and nothing else
LONG = Sizes(decode=(131072, 524288), batches=(), concurrency=(), rounds=0, prefill=(), check_prompt=512, check_new=16)
#: to see that everything runs; its figures mean nothing
SMOKE = Sizes(
    decode=(64, 128),
    steps=8,
    batches=((2, 64),),
    pressure=(64, 8),
    concurrency=(2,),
    prefix=64,
    prefixes=2,
    prefix_requests=4,
    question=16,
    prefix_answer=4,
    rounds=2,
    prefill=(64,),
    repeats=1,
    check_prompt=96,
    check_new=4,
)
NAMED = {"full": FULL, "quick": QUICK, "short": SHORT, "long": LONG, "smoke": SMOKE}


def arguments(
    model: Model,
    method: str,
    sizes: Sizes,
    fraction: float,
    quick_graphs: bool,
    user: list[str],
    scenarios: Iterable[str],
) -> list[str]:
    """Server arguments; those of the user come last and win. scenarios: what is to be measured on this server."""
    out = [*model.args, f"--context-length={sizes.context}", f"--chunked-prefill-size={CHUNK}"]
    out += [f"--mem-fraction-static={fraction}", "--enable-metrics", "--enable-cache-report", *SERVERS[method].args]
    if quick_graphs:
        # The sizes that are measured; SGLang's default list has them among many more.
        loads = {"batch": [n for n, _ in sizes.batches], "pressure": sizes.concurrency, "prefixes": [PREFIX_SLOTS]}
        out += [f"--cuda-graph-max-bs-decode={max([1, *(n for name in scenarios for n in loads.get(name, ()))])}"]
        if NO_PREFILL_GRAPHS not in user:
            out += ["--cuda-graph-bs-prefill", str(CHUNK)]
    return [*out, *user]
