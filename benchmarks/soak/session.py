"""Agent sessions: what each turn asks, and what the server made of it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from .plan import ESSAYS, PROMPTS, Plan

#: Share of each kind of turn; the rest are plain.
KINDS = {"abort": 0.06, "timeout": 0.06, "several": 0.1, "grammar": 0.08}
GRAMMARS = {
    "regex": r"(Yes|No|Perhaps), (since|because) [a-z ]{8,24}\.",
    "json_schema": '{"type": "object", "properties": {"tool": {"enum": ["search", "read", "write"]}, "line": '
    '{"type": "integer", "minimum": 0, "maximum": 999}}, "required": ["tool", "line"], "additionalProperties": false}',
}
GRAMMAR_TOKENS = 60


@dataclass(frozen=True)
class Answer:
    """Tokens of an answer, which begin at ``start`` of what it belongs to. logprobs: as they were generated, nats;
    None where a grammar changed them. how: it came about, in words."""

    start: int
    tokens: list[int]
    logprobs: list[float] | None
    how: str = ""


@dataclass
class Reading:
    """A text with answers in it, to be read again as one cold prompt."""

    ids: list[int]
    answers: list[Answer]
    session: int

    @property
    def compared(self) -> int:
        """Tokens."""
        return sum(len(a.tokens) for a in self.answers if a.logprobs is not None)


@dataclass(frozen=True)
class Turn:
    """A request. kind: of :data:`KINDS`, or "plain". grammar: one of :data:`GRAMMARS`. new: tokens of the answer.
    after: of the answer's time, when it is aborted or given up."""

    kind: str
    ids: list[int]
    new: int
    temperature: float
    grammar: str | None = None
    n: int = 1
    after: float = 0.0

    def body(self) -> dict:
        sampling = {"max_new_tokens": self.new, "temperature": self.temperature, "ignore_eos": self.grammar is None}
        if self.grammar:
            sampling[self.grammar] = GRAMMARS[self.grammar]
        if self.n > 1:
            sampling["n"] = self.n
        return {"input_ids": self.ids, "sampling_params": sampling, "return_logprob": True}


@dataclass
class Session:
    """text: tokens that the user's words and system prompts are cut from. Which turns come depends on the seed and the
    number alone. midway: it begins with a history of any length, as if met on its way."""

    number: int
    seed: int
    plan: Plan
    text: Sequence[int]
    midway: bool = False
    ids: list[int] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)
    turns: int = 0

    def __post_init__(self) -> None:
        self._random = random.Random(f"{self.seed} {self.number}")
        which = self._random.randrange(PROMPTS)
        self.ids = list(self.text[which * self.plan.system :][: self.plan.system])
        if self.midway:
            self.ids += self._cut((0, self.plan.context - self.plan.system - self._most))

    def _cut(self, bounds: tuple[int, int]) -> list[int]:
        count = self._random.randint(*bounds)
        start = self._random.randrange(PROMPTS * self.plan.system, len(self.text) - count)
        return list(self.text[start : start + count])

    def turn(self, rush: bool = False) -> Turn:
        """The next one. It is asked again in another way if it comes to nothing. rush: after more words of
        the user's, to half of the session, for an answer that takes the other half."""
        draw, random_ = self._random.random(), self._random
        kind = "plain"
        for name, share in KINDS.items():
            if draw < share:
                kind = name
                break
            draw -= share
        long = random_.random() < ESSAYS or kind in ("abort", "timeout")
        user, bounds = self.plan.user, self.plan.essay if long else self.plan.answer
        if rush:
            words = max(user[1], self.plan.context // 2 - len(self.ids))
            rest = self.plan.context - len(self.ids) - words
            user, bounds = (words, words), (rest, rest)
        grammar = random_.choice(sorted(GRAMMARS)) if kind == "grammar" else None
        ids = self.ids + self._cut(user)
        new = GRAMMAR_TOKENS if grammar else random_.randint(*bounds)
        return Turn(
            kind=kind,
            ids=ids,
            new=new,
            temperature=random_.choice((0.0, 1.0)) if kind != "several" else 1.0,
            grammar=grammar,
            n=random_.randint(2, 3) if kind == "several" else 1,
            after=random_.random() / 2,  # of what the answer takes; by then most are still being written
        )

    def keep(self, turn: Turn, tokens: list[int], logprobs: list[float], retractions: int = 0) -> None:
        """The answer to a turn becomes part of the session."""
        how = f"{turn.kind}, temperature {turn.temperature:g}, {retractions} retractions"
        self.answers.append(Answer(len(turn.ids), tokens, None if turn.grammar else logprobs, how))
        self.ids = turn.ids + tokens
        self.turns += 1

    @property
    def _most(self) -> int:
        """Tokens of a turn."""
        return self.plan.user[1] + max(self.plan.essay[1], GRAMMAR_TOKENS)

    @property
    def over(self) -> bool:
        return self.turns >= self.plan.turns or len(self.ids) + self._most > self.plan.context

    def reading(self) -> Reading:
        return Reading(self.ids, self.answers, self.number)
