"""JSON by a schema: notes, schemas and scores."""

from __future__ import annotations

import json

import pytest
from jsonschema import Draft202012Validator

from benchmarks.answers.schema import MAKERS, Schema, figures, leaves

FREE = ("remark", "greeting", "advice", "label")


def made(sample, seed=0):
    asked = Schema(seed).question(sample).score.keywords
    return asked["schema"], asked["wanted"]


def full(schema, wanted):
    """A right answer: the fields with one, and anything in the others."""
    return {**wanted, **{name: "anything" for name in FREE if name in schema["properties"]}}


def test_records_are_the_same_for_a_seed_vary_and_have_right_answers():
    mine = [made(i) for i in range(20)]
    assert mine == [made(i) for i in range(20)] and mine != [made(i, 1) for i in range(20)]
    assert len({json.dumps(wanted) for _, wanted in mine}) == 20
    for schema, wanted in mine:
        Draft202012Validator.check_schema(schema)
        answer = full(schema, wanted)
        assert figures(json.dumps(answer), schema, wanted) == {"valid": 1.0, "correct": 1.0}
        assert answer.keys() - wanted.keys(), "one field has no right answer"
    kinds = json.dumps([schema for schema, _ in mine[: len(MAKERS)]])
    assert all(word in kinds for word in ('"enum"', '"maxItems"', '"array"', '"boolean"'))
    assert all(any(isinstance(v, dict) for v in wanted.values()) for _, wanted in mine[: len(MAKERS)])


@pytest.mark.parametrize(
    "change",
    [
        lambda a: "Here it is: " + json.dumps(a),
        lambda a: json.dumps(a)[:-1],
        lambda a: json.dumps({**a, "more": 1}),
        lambda a: json.dumps({k: v for k, v in a.items() if k != "status"}),
        lambda a: json.dumps({**a, "status": "lost"}),
        lambda a: json.dumps({**a, "items": []}),
        lambda a: json.dumps({**a, "items": a["items"] * 9}),
        lambda a: json.dumps({**a, "customer": "Greta"}),
    ],
)
def test_what_is_not_valid(change):
    schema, wanted = made(0)
    assert figures(change(full(schema, wanted)), schema, wanted) == {"valid": 0.0, "correct": 0.0}


def test_correct_is_a_share_of_the_fields():
    schema, wanted = made(0)
    answer = full(schema, wanted)
    answer["number"] += 1
    count = len(leaves(wanted))
    assert figures(json.dumps(answer), schema, wanted)["correct"] == pytest.approx(1 - 1 / count)
    answer["items"] = answer["items"][:1]
    lost = 2 * (len(wanted["items"]) - 1)
    assert figures(json.dumps(answer), schema, wanted)["correct"] == pytest.approx(1 - (1 + lost) / count)
    assert leaves({"a": {"b": [1, {"c": 2}]}}) == {"/a/b/0": 1, "/a/b/1/c": 2}
