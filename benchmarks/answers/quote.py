"""A sentence of the prompt, quoted word for word after a long answer about it."""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from importlib.resources import files

from ..tasks.haystack import sentences
from ..tasks.prompts import Tokens
from .engines import Engine, Reply
from .questions import Question, chat_ids
from .record import Answer
from .rows import Row, average, share

PASSAGE_WORDS, ASKED, OPENING = 110, 2, 3  # the third sentence is asked for, by its first three words
ESSAY_TOKENS, QUOTE_TOKENS = 600, 160


def passages(text: str) -> list[list[str]]:
    """Sentences of successive parts of a text, PASSAGE_WORDS or some more words each. Sentences with an inner full stop
    are left out, so that nobody can disagree on which is the third."""
    clean = [s for s in sentences(text) if re.fullmatch(r"[A-Z][^.!?]*\.", s)]
    out: list[list[str]] = []
    part: list[str] = []
    for sentence in clean:
        part.append(sentence)
        if sum(len(s.split()) for s in part) >= PASSAGE_WORDS:
            openings = [tuple(s.split()[:OPENING]) for s in part]
            if len(part) > ASKED + 1 and openings.count(openings[ASKED]) == 1:
                out.append(part)
            part = []
    return out


def report() -> str:
    """The government report that comes with SGLang; no part of it is calibration text."""
    return (files("sglang") / "test" / "long_prompt.txt").read_text().replace("\\n", "\n")


def distance(wanted: str, text: str) -> int:
    """Least number of characters to insert, delete or exchange that makes a part of ``text`` the wanted one (Sellers'
    algorithm): words before and after the quote cost nothing."""
    above = [0] * (len(text) + 1)
    for i, a in enumerate(wanted):
        row = [i + 1]
        for j, b in enumerate(text):
            row.append(min(above[j] + (a != b), above[j + 1] + 1, row[j] + 1))
        above = row
    return min(above)


def figures(text: str, wanted: str) -> dict[str, float]:
    """exact: 1 where the sentence stands in the answer. errors: wrong characters over the sentence's length."""
    said = " ".join(text.split())
    return {"exact": float(wanted in said), "errors": distance(wanted, said) / len(wanted)}


class Quote:
    name, samples, chat, reads = "quote", 10, False, False

    def __init__(self, tokens: Tokens):
        self.tokens, self.passages = tokens, passages(report())
        self.most, self._lock = len(self.passages), threading.Lock()

    def question(self, sample: int) -> Question:
        passage = self.passages[sample]
        opening = " ".join(passage[ASKED].split()[:OPENING])
        first = (
            f"Read this passage:\n\n{' '.join(passage)}\n\nWrite a detailed essay of at least five paragraphs on "
            "what it says: its background, its reasons, its consequences and the questions that it leaves open. Use "
            "your own words."
        )
        second = (
            f'Quote the third sentence of the passage, which begins with "{opening}", word for word. Write this '
            "sentence and nothing else."
        )
        ids = chat_ids(self.tokens, first)

        def ask(engine: Engine, timeout: float) -> Reply:
            essay = engine.write(ids, ESSAY_TOKENS, timeout)
            with self._lock:  # tokenizers are not made for several threads
                following = chat_ids(self.tokens, first, essay.text, second)
            reply = engine.write(following, QUOTE_TOKENS, timeout)
            return replace(reply, first=essay.text, ids=(), logprobs=())

        return Question(ask, partial(figures, wanted=passage[ASKED]))

    def rows(self, answers: Sequence[Answer], readings: Sequence) -> list[Row]:
        return [
            share(self.name, "exact", [a.figures["exact"] for a in answers]),
            average(self.name, "character errors", [a.figures["errors"] for a in answers], "share of characters"),
            average(self.name, "essay", [len(a.reply.first.split()) for a in answers], "words"),
        ]
