"""Tool calls: some functions, a question that one of them answers, and whether that call was made."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from random import Random
from typing import Any

from jsonschema import Draft202012Validator

from .engines import Reply, Served
from .functions import FUNCTIONS, Function
from .kinds import same
from .questions import Question
from .record import Answer
from .rows import Row, share

ANSWER_TOKENS = 256


def parsed(calls: Any, defined: Sequence[Function]) -> tuple[Function, dict] | None:
    """The function that is called and its arguments. None unless it is exactly one call, of a defined function, whose
    arguments are JSON that its schema allows."""
    try:
        (call,) = calls
        function = next(f for f in defined if f.name == call["function"]["name"])
        arguments = json.loads(call["function"]["arguments"])
    except (TypeError, KeyError, ValueError, StopIteration):
        return None
    return (function, arguments) if Draft202012Validator(function.schema).is_valid(arguments) else None


def written(content: str) -> list[dict]:
    """Calls that stand in a text as JSON, in the API's form: models of code leave out the marks that a parser needs."""
    found, at, decoder = [], content.find("{"), json.JSONDecoder()
    while at >= 0:
        try:
            value, end = decoder.raw_decode(content, at)
        except ValueError:
            end = at + 1
        else:
            if isinstance(value, dict) and "name" in value:
                call = {"name": value["name"], "arguments": json.dumps(value.get("arguments"))}
                found.append({"function": call})
        at = content.find("{", end)
    return found


def figures(message: str, defined: Sequence[Function], wanted: Function, arguments: dict) -> dict[str, float]:
    """valid, correct (0 or 1) of an answer's message as JSON; and the same where a call in its text counts, too."""
    said = json.loads(message)
    calls = said.get("tool_calls")
    out = {}
    for where, these in (("", calls), (" or in text", calls or written(said.get("content") or ""))):
        found = parsed(these, defined)
        correct = found is not None and found[0] is wanted and same(found[1], arguments)
        out |= {f"valid{where}": float(found is not None), f"correct{where}": float(correct)}
    return out


class Tools:
    name, samples, most, chat, reads = "tools", 50, 10_000, True, False

    def __init__(self, seed: int):
        self.seed = seed

    def question(self, sample: int) -> Question:
        rng = Random(f"{self.seed} tools {sample}")
        wanted = FUNCTIONS[sample % len(FUNCTIONS)]
        others = rng.sample([f for f in FUNCTIONS if f is not wanted], rng.randint(1, 3))
        defined = rng.sample([wanted, *others], 1 + len(others))
        text, arguments = wanted.ask(rng)
        body = {
            "messages": [{"role": "user", "content": text}],
            "tools": [f.tool for f in defined],
            "tool_choice": "auto",
            "max_tokens": ANSWER_TOKENS,
        }

        def ask(engine: Served, timeout: float) -> Reply:
            message, reply = engine.chat(body, timeout)
            kept = {name: message[name] for name in ("content", "tool_calls") if message.get(name)}
            return replace(reply, text=json.dumps(kept))

        return Question(ask, partial(figures, defined=defined, wanted=wanted, arguments=arguments))

    def rows(self, answers: Sequence[Answer], readings: Sequence) -> list[Row]:
        return [share(self.name, measure, [a.figures[measure] for a in answers]) for measure in answers[0].figures]
