"""One question to a model, and the exact tokens that a server gets for it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Sample:
    """A prompt and how its answer is judged.

    The user's message is ``context + question``; ``context`` ends where a cached prefix may end. ``prefix`` begins the
    model's answer, where the API can carry it. ``score`` maps the model's text to [0, 1]; with ``binary`` an answer
    passes at 1. ``places``: where each of ``answers`` stands in the context, 0 its beginning, 1 its end.
    """

    task: str
    context: str
    question: str
    score: Callable[[str], float]
    new_tokens: int
    length: int | None = None  # tokens of the whole prompt
    depth: float | None = None
    trial: int = 0
    prefix: str = ""
    answers: tuple[str, ...] = ()
    places: tuple[float, ...] = ()
    knobs: dict[str, int] = field(default_factory=dict)
    prose: float = 1.0  # share of the prompt that nobody asks for
    binary: bool = True
    template: bool = True  # False: sent as plain text even to a chat model


class Tokens:
    """A model's tokenizer and chat template.

    ``chat=False``: prompts are plain text, as for a base model. ``prefix=False``: nobody begins the model's answer.
    """

    def __init__(self, tokenizer: Any, chat: bool = True, prefix: bool = True):
        if chat and not getattr(tokenizer, "chat_template", None):
            raise ValueError("the tokenizer has no chat template; --plain sends prompts as plain text")
        self.tokenizer, self.chat, self.prefix = tokenizer, chat, prefix

    @classmethod
    def of(cls, model: str, chat: bool = True, prefix: bool = True) -> Tokens:
        from transformers import AutoTokenizer

        return cls(AutoTokenizer.from_pretrained(model), chat, prefix)

    def size(self, text: str) -> int:
        """Tokens of ``text`` in the middle of other text."""
        return len(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def sizes(self, texts: Sequence[str]) -> list[int]:
        return [len(ids) for ids in self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]]

    def text(self, context: str, question: str, prefix: str = "", template: bool = True) -> str:
        """What the model reads."""
        message = context + question
        prefix = prefix if self.prefix else ""
        if not (self.chat and template):
            return f"{message}\n{prefix}" if prefix else message
        messages = [{"role": "user", "content": message}]
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) + prefix

    def ids(self, context: str, question: str, prefix: str = "", template: bool = True) -> list[int]:
        # A chat template writes the special tokens itself.
        special = not (self.chat and template)
        text = self.text(context, question, prefix, template)
        return self.tokenizer(text, add_special_tokens=special)["input_ids"]

    def prompt(self, sample: Sample) -> tuple[list[int], int]:
        """Token ids, and how many of them, from the first on, depend on the context alone."""
        parts = (sample.context, sample.question, sample.prefix, sample.template)
        ids = self.ids(*parts)
        text = self.text(*parts)
        end = text.find(sample.context)
        if end < 0:
            raise ValueError(f"{sample.task}: the chat template changes the message")
        special = not (self.chat and sample.template)
        alone = self.tokenizer(text[: end + len(sample.context)], add_special_tokens=special)["input_ids"]
        shared = next(
            (i for i, (a, b) in enumerate(zip(ids, alone, strict=False)) if a != b), min(len(ids), len(alone))
        )
        return ids, shared


def answer_tokens(plain: int) -> int:
    """Room for an answer that takes ``plain`` tokens in one line: models write lists, and everything twice."""
    return 2 * plain + 16


def first_of(pattern: str, answers: Sequence[str]) -> Callable[[str], float]:
    """Share of ``answers`` among the first len(answers) different matches of ``pattern``: naming everything that
    looks like an answer does not pass."""
    wanted = set(answers)

    def score(text: str) -> float:
        text = re.sub(r"(?<=\d),(?=\d{3})", "", text)  # 4,829,173 is the number 4829173
        found = list(dict.fromkeys(re.findall(pattern, text)))[: len(wanted)]
        return len(wanted.intersection(found)) / len(wanted)

    return score


def all_words(answers: Sequence[str]) -> Callable[[str], float]:
    """Share of ``answers`` that stand in the text as whole words, whatever their case."""

    def score(text: str) -> float:
        words = set(re.findall(r"[a-z]+", text.lower()))
        return sum(a.lower() in words for a in answers) / len(answers)

    return score
