"""The tests by name."""

from __future__ import annotations

from functools import partial

from ..tasks.prompts import Tokens
from ..tasks.run import Job, in_turn
from .questions import Test
from .quote import Quote
from .schema import Schema
from .tools import Tools
from .writing import Length, Long, Script

NAMES = ("tools", "schema", "long", "length", "quote", "bash")
TOOL_PARSER = "qwen25"  # SGLang's parser of the calls that the templates of Qwen2.5 and Qwen3 ask for


def tests(names: list[str], tokens: Tokens, seed: int) -> dict[str, Test]:
    every = (Tools(seed), Schema(seed), Long(tokens), Length(tokens), Quote(tokens), Script(tokens))
    return {test.name: test for test in every if test.name in names}


def knows_tools(tokens: Tokens) -> bool:
    """Whether the model's chat template says what functions there are."""
    return "tools" in str(tokens.tokenizer.chat_template)


def plan(chosen: dict[str, Test], scale: float) -> tuple[list[Job], dict[str, str]]:
    """Every sample, tests in turn; and which tests have fewer than are asked for."""
    jobs, fewer = [], {}
    for name, test in chosen.items():
        count = max(1, round(scale * test.samples))
        if count > test.most:
            fewer[name] = f"--samples {scale:g} asks for {count} of its questions, there are {test.most}"
        jobs += [Job(name, None, None, i, {}, partial(test.question, i)) for i in range(min(count, test.most))]
    return in_turn(jobs), fewer
