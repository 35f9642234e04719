"""What is asked: a test makes questions one by one, and rows of the answers to them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ..tasks.prompts import Tokens
from .engines import Reading, Reply
from .record import Answer
from .rows import Row


@dataclass(frozen=True)
class Question:
    """``ask(engine, seconds)`` gets the answer; ``score`` maps its text to figures. prompt: token ids, of answers that
    are read back."""

    ask: Callable[[Any, float], Reply | Reading]
    score: Callable[[str], dict[str, float]] = lambda text: {}
    prompt: Sequence[int] = ()


class Test(Protocol):
    """samples: of a run of scale 1; most: of any. chat: needs the chat API. reads: its answers are read back."""

    name: str
    samples: int
    most: int
    chat: bool
    reads: bool

    def question(self, sample: int) -> Question:
        """The same for the same seed and sample, however many are asked."""
        ...

    def rows(self, answers: Sequence[Answer], readings: Sequence[Sequence[float]]) -> list[Row]:
        """Of one configuration. readings: ``Reading.behind`` of those of its answers that were read."""
        ...


def chat_ids(tokens: Tokens, *turns: str) -> list[int]:
    """Token ids of a conversation in which user and assistant take turns and the assistant is next."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]
    text = tokens.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokens.tokenizer(text, add_special_tokens=False)["input_ids"]
