"""Sessions played against a server by several threads, and what came of it."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import requests

from .client import Client, WrongAnswer
from .plan import Plan
from .session import Reading, Session


@dataclass
class Load:
    """text: tokens to cut from. counts, errors: so far. ready: texts that are over and not read again yet."""

    url: str
    plan: Plan
    seed: int
    text: Sequence[int]
    counts: Counter = field(default_factory=Counter)
    errors: list[str] = field(default_factory=list)
    ready: list[Reading] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._lock, self._random = threading.Lock(), random.Random(self.seed)
        self._live: deque[Session] = deque(self._new(i, midway=True) for i in range(self.plan.sessions))
        self._started = self.plan.sessions
        self._seconds = 0.0  # of all answers

    def _new(self, number: int, midway: bool = False) -> Session:
        return Session(number, self.seed, self.plan, self.text, midway)

    def play(self, until: float, rush: bool = False) -> None:
        """Turns of all sessions in any order, until so late on time.monotonic() or until the server is gone.

        rush: those of the shortest sessions, from half of them on to their end. The cache holds what is asked; the
        answers together outgrow it.
        """
        threads = [threading.Thread(target=self._work, args=(until, rush)) for _ in range(self.plan.parallel)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def close(self) -> None:
        """Sessions that are under way are over."""
        while self._live:
            self._finish(self._live.popleft())

    def waiting(self) -> int:
        """Tokens that would have to be read again if all were over now."""
        with self._lock:
            return sum(len(x.ids) for x in self.ready) + sum(len(x.ids) for x in self._live if x.answers)

    @property
    def _token_s(self) -> float:
        """Seconds of a token of an answer."""
        written = self.counts["answer tokens"]
        return self._seconds / written if written else 0.1

    def _finish(self, session: Session) -> None:
        if session.answers:
            self.ready.append(session.reading())

    def _next(self, rush: bool) -> Session:
        if not rush:
            return self._live.popleft()
        shortest = min(self._live, key=lambda session: len(session.ids))
        self._live.remove(shortest)
        return shortest

    def _work(self, until: float, rush: bool) -> None:
        client = Client(self.url)
        while time.monotonic() < until and not self.errors:
            with self._lock:
                session = self._next(rush)
            try:
                self._turn(client, session, rush)
            except (WrongAnswer, requests.RequestException, KeyError) as e:
                self.errors.append(f"session {session.number}, turn {session.turns}: {type(e).__name__}: {e}")
            with self._lock:
                if session.over:
                    self._finish(session)
                    self.counts["sessions"] += 1
                    session = self._new(self._started)
                    self._started += 1
                # Sessions that were left longest come next, but not always: some lose their rows in between.
                self._live.insert(self._random.randrange(len(self._live) + 1), session)

    def _turn(self, client: Client, session: Session, rush: bool) -> None:
        turn, begin = session.turn(rush), time.monotonic()
        outcome = client.ask(turn, turn.new * self._token_s)
        with self._lock:
            counts = self.counts
            counts["requests"] += 1
            counts["retractions"] += outcome.retractions
            counts["retracted requests"] += outcome.retractions > 0
            counts["cached tokens"] += outcome.cached
            counts["prompt tokens"] += len(turn.ids)
            if not outcome.choices:
                counts[turn.kind + "s"] += 1
                return
            self._seconds += time.monotonic() - begin
            counts["turns"] += 1
            counts["answers"] += len(outcome.choices)
            counts["answer tokens"] += sum(len(tokens) for tokens, _ in outcome.choices)
            counts["requests of several answers"] += turn.n > 1
            counts["answers by a grammar"] += turn.grammar is not None
            counts["grammars that ended"] += outcome.complete
            session.keep(turn, *outcome.choices[0], outcome.retractions)
            for choice in outcome.choices[1:]:
                branch = Session(session.number, session.seed, session.plan, session.text)
                branch.keep(turn, *choice, outcome.retractions)
                self.ready.append(branch.reading())
