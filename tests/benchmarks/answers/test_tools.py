"""Tool-call prompts and what counts as a call."""

from __future__ import annotations

import json

import pytest
from jsonschema import Draft202012Validator

from benchmarks.answers.engines import Reply
from benchmarks.answers.functions import FUNCTIONS
from benchmarks.answers.kinds import same
from benchmarks.answers.tools import Tools, figures, parsed, written

ALARM = next(f for f in FUNCTIONS if f.name == "set_alarm")
MUSIC = next(f for f in FUNCTIONS if f.name == "play_music")
ARGUMENTS = {"hour": 7, "minute": 5, "days": ["monday", "friday"]}


class Listener:
    """An engine that only notes what it is asked."""

    def __init__(self):
        self.bodies = []

    def chat(self, body, timeout):
        self.bodies.append(body)
        return {"content": "x"}, Reply("x", 1, None, 1, "stop")


def bodies(seed, samples=50):
    engine = Listener()
    for i in range(samples):
        Tools(seed).question(i).ask(engine, 1)
    return engine.bodies


def test_prompts_are_the_same_for_a_seed_and_vary():
    mine = bodies(0)
    assert mine == bodies(0) and mine != bodies(1)
    assert bodies(0, 3) == mine[:3]
    assert len({b["messages"][0]["content"] for b in mine}) > 45
    assert {len(b["tools"]) for b in mine} == {2, 3, 4}
    names = [[t["function"]["name"] for t in b["tools"]] for b in mine]
    assert all(len(set(n)) == len(n) for n in names)
    wanted = [Tools(0).question(i).score.keywords["wanted"].name for i in range(50)]
    assert set(wanted) == {f.name for f in FUNCTIONS}
    assert {n.index(w) for n, w in zip(names, wanted, strict=True)} == {0, 1, 2, 3}


def test_every_wanted_call_is_allowed_and_said_in_the_question():
    types = set()
    for i in range(64):
        question = Tools(3).question(i)
        wanted, arguments = question.score.keywords["wanted"], question.score.keywords["arguments"]
        engine = Listener()
        question.ask(engine, 1)
        text = engine.bodies[0]["messages"][0]["content"]
        assert Draft202012Validator(wanted.schema).is_valid(arguments)
        for name, value in arguments.items():
            spec = wanted.schema["properties"][name]
            types.add("enum" if "enum" in spec else spec["type"])
            if not isinstance(value, bool):
                assert all(str(v) in text for v in (value if isinstance(value, list) else [value])), (text, value)
    assert types == {"string", "integer", "number", "boolean", "enum", "array"}


@pytest.mark.parametrize(
    "function", [f for f in FUNCTIONS if any(k.schema["type"] == "boolean" for k in f.parameters.values())]
)
def test_both_values_of_a_flag_are_said_differently(function):
    from random import Random

    said = {}
    for i in range(20):
        for kind in function.parameters.values():
            if kind.schema["type"] == "boolean":
                value, words = kind.draw(Random(i))
                said[value] = words
    assert len(said) == 2 and said[True] != said[False]


def call(name="set_alarm", arguments=ARGUMENTS):
    return {"function": {"name": name, "arguments": arguments if isinstance(arguments, str) else json.dumps(arguments)}}


def judge(*calls, content=""):
    message = json.dumps({"content": content, "tool_calls": list(calls)})
    return figures(message, (MUSIC, ALARM), ALARM, ARGUMENTS)


def test_the_wanted_call_is_valid_and_correct():
    assert parsed([call()], (MUSIC, ALARM)) == (ALARM, ARGUMENTS)
    assert set(judge(call()).values()) == {1.0}


@pytest.mark.parametrize(
    "calls",
    [
        (),
        (call(), call()),
        (call("set_clock"),),
        (call(arguments='{"hour": 7'),),
        (call(arguments="[]"),),
        (call(arguments={"hour": 7, "minute": 5}),),
        (call(arguments={**ARGUMENTS, "label": "x"}),),
        (call(arguments={**ARGUMENTS, "hour": "7"}),),
        (call(arguments={**ARGUMENTS, "minute": 5.5}),),
        (call(arguments={**ARGUMENTS, "days": ["Montag"]}),),
        (call(arguments={**ARGUMENTS, "days": []}),),
        ({"function": {}},),
    ],
    ids=lambda calls: json.dumps(calls)[:60],
)
def test_what_is_no_valid_call(calls):
    assert set(judge(*calls).values()) == {0.0}


@pytest.mark.parametrize(
    "call_",
    [
        call(arguments={**ARGUMENTS, "hour": 8}),
        call(arguments={**ARGUMENTS, "days": ["monday"]}),
        call("play_music", {"artist": "Bjork", "volume": 10, "shuffle": True}),
    ],
)
def test_a_valid_call_may_be_wrong(call_):
    assert judge(call_) == {"valid": 1.0, "correct": 0.0, "valid or in text": 1.0, "correct or in text": 0.0}


def test_a_call_in_the_text_counts_apart():
    text = 'Sure:\n```json\n{"name": "set_alarm", "arguments": ' + json.dumps(ARGUMENTS) + "}\n```"
    apart = {"valid": 0.0, "correct": 0.0, "valid or in text": 1.0, "correct or in text": 1.0}
    assert judge(content=text) == apart
    assert judge(content=text + text)["valid or in text"] == 0.0
    assert written("no {call} here, {1}") == [] == written('{"a": {"name": "set_alarm"}}')


@pytest.mark.parametrize(
    ("said", "wanted", "is_same"),
    [
        ("  oslo", "Oslo", True),
        ("Oslo!", "Oslo", False),
        (20.0, 20, True),
        (20.5, 20, False),
        ("20", 20, False),
        (1, True, False),
        (True, 1, False),
        (True, True, True),
        (["b", "A"], ["a", "b"], True),
        (["a", "a"], ["a", "b"], False),
        (["a"], ["a", "b"], False),
        ({"x": [1]}, {"x": [1]}, True),
        ({"x": 1, "y": 2}, {"x": 1}, False),
        (None, "None", False),
    ],
)
def test_same(said, wanted, is_same):
    assert same(said, wanted) is is_same
