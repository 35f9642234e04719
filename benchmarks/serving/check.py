"""Before a server is timed: are its answers those of the model?

Of every server: log-probabilities are finite, and the same request gets the same ones twice. With real weights also:
tokens generated step by step get the log-probabilities that reading them as a prompt gives, and a prompt read on top
of its cached beginning gets those that the unquantized server gave it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean

from ..launch import Server

#: mean absolute difference of log-probability between two equal cold requests. Sums in another order are 0.03 apart
#: (a stock server, cold against a prefix hit, benchmarks/results/server_agreement_h100.csv), wrong reads 2 and more
REPEATED = 0.1
#: the same between a server and the unquantized one, by the fewer of its bits: wide enough for the error of the codec
#: (0.03 unquantized, 0.1 at 3 bits, measured in that file), narrow enough for a cache that is read wrongly
AGREE = {16: 0.15, 8: 0.3, 4: 0.3, 3: 0.6, 2: 1.5}
ROUNDING = 1e-3  # above 0, of a log-probability


class CheckError(RuntimeError):
    """The server's answers are not to be trusted; it is not timed."""


@dataclass(frozen=True)
class Answers:
    """Of a server, to the fixed prompt. tail: log-probabilities of the tokens after the cached beginning."""

    tail: list[float]
    repeated_gap: float
    step_gap: float


def finite(values: Sequence[float | None], what: str) -> list[float]:
    """The values. CheckError where one is missing (JSON has no NaN: SGLang writes null), not finite or positive."""
    wrong = [i for i, value in enumerate(values) if value is None or not math.isfinite(value)]
    if wrong or not values:
        raise CheckError(f"{len(wrong)} of {len(values)} log-probabilities of {what} are not finite")
    if max(values) > ROUNDING:
        raise CheckError(f"a log-probability of {what} is {max(values):.3g}")
    return list(values)  # type: ignore[arg-type]


def gap(a: Sequence[float], b: Sequence[float]) -> float:
    if len(a) != len(b):
        raise CheckError(f"{len(a)} and {len(b)} log-probabilities cannot be compared")
    return fmean(abs(x - y) for x, y in zip(a, b, strict=True))


def ask(server: Server, ids: list[int], new: int) -> Answers:
    """CheckError for log-probabilities that are not finite."""
    cold = []
    for _ in range(2):
        server.flush()
        values, _cached = server.logprobs(ids, len(ids) // 2)
        cold.append(finite(values, "a cold prompt"))
    server.flush()
    beginning = 3 * len(ids) // 4
    server.generate(ids[:beginning])
    values, cached = server.logprobs(ids, beginning)
    tail = finite(values, "a prompt on its cached beginning")
    if cached < 0.9 * beginning:
        raise CheckError(f"only {cached} of {beginning} cached tokens were used again")
    meta = server.generate(ids, new=new)
    steps = finite([logprob for logprob, *_ in meta["output_token_logprobs"]], "generated tokens")
    generated = [token for _, token, *_ in meta["output_token_logprobs"]]
    values, _cached = server.logprobs(ids + generated, len(ids) - 1)
    return Answers(tail, gap(*cold), gap(steps, finite(values, "generated tokens read again")))


def bound(bits: float) -> float:
    return AGREE[min(b for b in AGREE if b >= bits)]


def judge(answers: Answers, bits: float, real: bool, reference: list[float] | None) -> dict:
    """What was found, for the record. real: whether the weights are. reference: the unquantized server's ``tail``.
    CheckError where a bound is exceeded."""
    found = {name: round(value, 5) for name, value in asdict(answers).items() if name != "tail"}
    if answers.repeated_gap > REPEATED:
        raise CheckError(
            f"the same request twice: log-probabilities {answers.repeated_gap:.3g} apart, {REPEATED} allowed"
        )
    if not real:
        return found | {"note": "random weights: only that answers are finite and repeat"}
    allowed = bound(bits)
    if answers.step_gap > allowed:
        raise CheckError(f"generated tokens are {answers.step_gap:.3g} from the same ones read, {allowed} allowed")
    if reference is None:
        return found | {"note": "not compared with an unquantized server"}
    apart = gap(answers.tail, reference)
    if apart > allowed:
        raise CheckError(f"log-probabilities are {apart:.3g} from those of the unquantized server, {allowed} allowed")
    return found | {"reference_gap": round(apart, 5), "allowed": allowed}
