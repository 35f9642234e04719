"""Every answer read again as part of a cold prompt: how far its log-probabilities move."""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from statistics import fmean

import requests

from .client import Client, WrongAnswer, named
from .session import Reading

SHORT = 8  # tokens of an answer whose mean says little
FAR = 0.5, 1.0, 2.0, 4.0, 8.0, 16.0  # nats
MANY = 2.0  # of FAR
LIKELY = -1.0  # log-probability
SHOWN, BEFORE = 4.0, 16  # nats from which on a token is shown, with so many before it


@dataclass(frozen=True)
class Bound:
    """Nats that an answer may be away from its cold reading: in the mean over its tokens, and in one token.

    A token that is unlikely moves more than one that is likely: one of log-probability -x has ``1 + x / 4`` times
    the bound of a token. That allows much of the unlikeliest, so of a million tokens only ``often`` may be farther off
    than MANY nats, and two of any number.
    """

    mean: float
    token: float
    often: float = math.inf

    def allows_far(self, far: int, tokens: int) -> bool:
        return far <= 2 or far - 2 <= self.often * tokens / 1e6

    def allows(self, generated: float, read: float) -> bool:
        return abs(generated - read) <= self.token * (1 - min(generated, read) / 4)


@dataclass
class Replay:
    """gaps: mean of each answer, nats. far: tokens farther off than each of FAR; likely: those of them that one of
    the two readings finds likely. outliers: in words; texts: up to each token that is shown, and its log-probability
    when they are read again. prompts, prompt_tokens: read so far, in seconds. renamed: tokens of prompts that had the
    vocabulary's ``last`` id, which SGLang calls by another name."""

    url: str
    bound: Bound
    last: int | None = None
    gaps: list[float] = field(default_factory=list)
    worst: float = 0.0  # of a token, and its log-probabilities as generated and as read
    pair: tuple[float, float] | None = None
    tokens: int = 0
    far: Counter[float] = field(default_factory=Counter)
    likely: Counter[float] = field(default_factory=Counter)
    outliers: list[str] = field(default_factory=list)
    texts: list[dict] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    prompts: int = 0
    prompt_tokens: int = 0
    renamed: int = 0
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self._lock = threading.Lock()

    def read(self, readings: Iterable[Reading], parallel: int) -> None:
        """All of them, some at a time, until one fails."""
        todo, begin = list(readings), time.monotonic()
        threads = [threading.Thread(target=self._work, args=(todo,)) for _ in range(min(parallel, len(todo)))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.seconds += time.monotonic() - begin

    @property
    def shown(self) -> list[str]:
        """The texts' ends, in words."""
        return [
            f"{text['said']}, and then at {text.get('again', math.nan):.3f}; up to it {text['ids'][-BEFORE - 1 :]}"
            for text in self.texts
        ]

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return self.prompt_tokens / self.seconds if self.prompt_tokens else 100.0

    def _work(self, todo: list[Reading]) -> None:
        client = Client(self.url, self.last)
        while not self.errors:
            with self._lock:
                if not todo:
                    return
                reading = todo.pop()
            try:
                read = client.read(reading.ids)
                with self._lock:
                    texts = self.compare(reading, read)
                for text in texts:
                    text["again"] = client.read(text["ids"])[-1]
            except (WrongAnswer, requests.RequestException, KeyError) as e:
                self.errors.append(f"session {reading.session}: {type(e).__name__}: {e}")
                return

    def compare(self, reading: Reading, read: list[float]) -> list[dict]:
        """read: log-probabilities of all the text's tokens but the first. Returns the texts up to tokens that are
        shown, which are to be read again."""
        known = len(self.texts)
        self.prompts += 1
        self.prompt_tokens += len(reading.ids)
        self.renamed += sum(a != b for a, b in zip(reading.ids, named(reading.ids, self.last), strict=True))
        for answer in reading.answers:
            if answer.logprobs is None:
                continue
            cold = read[answer.start - 1 :][: len(answer.tokens)]
            pairs = list(zip(answer.logprobs, cold, strict=True))
            gaps = [abs(a - b) for a, b in pairs]
            self.tokens += len(gaps)
            self.gaps.append(fmean(gaps))
            if max(gaps) > self.worst:
                self.worst, self.pair = max((gap, pair) for gap, pair in zip(gaps, pairs, strict=True))
            where = f"session {reading.session}, {len(gaps)} tokens from {answer.start} on ({answer.how})"
            if len(gaps) >= SHORT and self.gaps[-1] > self.bound.mean:
                self.outliers.append(f"{where}: {self.gaps[-1]:.3f} nats a token")
            for i, (gap, (a, b)) in enumerate(zip(gaps, pairs, strict=True)):
                beyond = [nats for nats in FAR if gap > nats]
                self.far.update(beyond)
                self.likely.update(beyond if max(a, b) > LIKELY else ())
                allowed = self.bound.allows(a, b)
                if allowed and gap <= SHOWN:
                    continue
                said = f"{where}: token {i} generated at {a:.3f}, read at {b:.3f}"
                if not allowed:
                    self.outliers.append(said)
                if gap > SHOWN:
                    ids = reading.ids[: answer.start + i + 1]
                    self.texts.append({"said": said, "generated": a, "read": b, "ids": ids})
        return self.texts[known:]
