"""JSON by a schema: a note, the record that it describes, and whether the answer is that record."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from random import Random
from typing import Any

from jsonschema import Draft202012Validator

from .engines import Reply, Served
from .functions import CITIES, PEOPLE
from .kinds import record, same
from .questions import Question
from .record import Answer
from .rows import Row, average, share

ANSWER_TOKENS = 512
WORD, NUMBER = {"type": "string", "maxLength": 40}, {"type": "integer", "minimum": 0, "maximum": 100_000}
FREE = {"type": "string", "maxLength": 80}  # has no one right answer


def options(*names: str) -> dict:
    return {"type": "string", "enum": list(names)}


def items(schema: dict, least: int, most: int) -> dict:
    return {"type": "array", "items": schema, "minItems": least, "maxItems": most}


Made = tuple[str, dict, dict]  # a note, its schema, what the fields with one right answer hold


def order(rng: Random) -> Made:
    name, city = rng.choice(PEOPLE), rng.choice(CITIES)
    status, number = rng.choice(("open", "paid", "shipped")), rng.randint(1000, 9999)
    goods = [
        (g, rng.randint(1, 9)) for g in rng.sample(("lamp", "chair", "kettle", "rug", "mirror"), rng.randint(2, 4))
    ]
    listed = ", ".join(f"{n} x {g}" for g, n in goods)
    note = f"Order number {number} of {name} from {city}: {listed}. The order is {status}."
    schema = record(
        {
            "number": NUMBER,
            "customer": record({"name": WORD, "city": WORD}),
            "status": options("open", "paid", "shipped"),
            "items": items(record({"product": WORD, "quantity": NUMBER}), 1, 5),
            "remark": FREE,
        }
    )
    bought = [{"product": g, "quantity": n} for g, n in goods]
    return (
        note,
        schema,
        {
            "number": number,
            "customer": {"name": name, "city": city},
            "status": status,
            "items": bought,
        },
    )


def person(rng: Random) -> Made:
    name, city, age = rng.choice(PEOPLE), rng.choice(CITIES), rng.randint(20, 65)
    role = rng.choice(("engineer", "nurse", "teacher", "painter"))
    languages = rng.sample(("English", "French", "Hindi", "Polish", "Swahili"), rng.randint(1, 3))
    street, house = rng.choice(("Mill Lane", "Harbour Road", "Station Street")), rng.randint(1, 99)
    note = f"{name}, {age} years old, works as a {role}, lives at {street} {house} in {city} and speaks "
    note += " and ".join(languages) + "."
    address = {"street": WORD, "house": NUMBER, "city": WORD}
    schema = record(
        {
            "name": WORD,
            "age": NUMBER,
            "role": options("engineer", "nurse", "teacher", "painter"),
            "address": record(address),
            "languages": items(WORD, 1, 3),
            "greeting": FREE,
        }
    )
    where = {"street": street, "house": house, "city": city}
    return note, schema, {"name": name, "age": age, "role": role, "address": where, "languages": languages}


def incident(rng: Random) -> Made:
    service, level = rng.choice(("billing", "search", "login")), rng.choice(("low", "medium", "high"))
    minutes, solved = rng.randint(3, 240), rng.random() < 0.5
    hosts = [f"node{n}" for n in rng.sample(range(10, 99), rng.randint(1, 4))]
    who = rng.choice(PEOPLE)
    note = f"The service {service} was down for {minutes} minutes on {', '.join(hosts)}. The severity is {level}. "
    note += f"{who} reported it. It is {'solved' if solved else 'not solved yet'}."
    schema = record(
        {
            "service": options("billing", "search", "login"),
            "severity": options("low", "medium", "high"),
            "outage": record({"minutes": NUMBER, "hosts": items(WORD, 1, 4)}),
            "reporter": WORD,
            "solved": {"type": "boolean"},
            "advice": FREE,
        }
    )
    outage = {"minutes": minutes, "hosts": hosts}
    return (
        note,
        schema,
        {
            "service": service,
            "severity": level,
            "outage": outage,
            "reporter": who,
            "solved": solved,
        },
    )


def parcel(rng: Random) -> Made:
    sender, receiver = rng.sample(PEOPLE, 2)
    start, end = rng.sample(CITIES, 2)
    grams, express = rng.randint(200, 9000), rng.random() < 0.5
    stops = rng.sample(("Lyon", "Graz", "Turin", "Leeds"), rng.randint(1, 3))
    note = f"{sender} sends a parcel of {grams} grams from {start} to {receiver} in {end}, by way of "
    note += f"{' and '.join(stops)}, {'by express' if express else 'not by express'}, insured for {grams // 10} euros."
    schema = record(
        {
            "from": record({"name": WORD, "city": WORD}),
            "to": record({"name": WORD, "city": WORD}),
            "grams": NUMBER,
            "kind": options("express", "standard"),
            "stops": items(WORD, 1, 3),
            "insured_euros": NUMBER,
            "label": FREE,
        }
    )
    return (
        note,
        schema,
        {
            "from": {"name": sender, "city": start},
            "to": {"name": receiver, "city": end},
            "grams": grams,
            "kind": "express" if express else "standard",
            "stops": stops,
            "insured_euros": grams // 10,
        },
    )


MAKERS: tuple[Callable[[Random], Made], ...] = (order, person, incident, parcel)


def leaves(value: Any, path: str = "") -> dict[str, Any]:
    """Values of a nested record that are no containers, by path."""
    if isinstance(value, dict | list):
        inner = value.items() if isinstance(value, dict) else enumerate(value)
        return {p: v for k, item in inner for p, v in leaves(item, f"{path}/{k}").items()}
    return {path: value}


def figures(text: str, schema: dict, wanted: dict) -> dict[str, float]:
    """valid: 0 or 1. correct: share of the wanted fields that the answer has right, 0 where it is not valid."""
    try:
        said = json.loads(text)
    except ValueError:
        return {"valid": 0.0, "correct": 0.0}
    if not Draft202012Validator(schema).is_valid(said):
        return {"valid": 0.0, "correct": 0.0}
    have, want = leaves(said), leaves(wanted)
    return {"valid": 1.0, "correct": sum(same(have.get(path), value) for path, value in want.items()) / len(want)}


class Schema:
    name, samples, most, chat, reads = "schema", 20, 10_000, True, False

    def __init__(self, seed: int):
        self.seed = seed

    def question(self, sample: int) -> Question:
        note, schema, wanted = MAKERS[sample % len(MAKERS)](Random(f"{self.seed} schema {sample}"))
        text = f"Turn this note into JSON of the schema below.\n\nNote: {note}\n\nSchema: {json.dumps(schema)}"
        body = {
            "messages": [{"role": "user", "content": text}],
            "response_format": {"type": "json_schema", "json_schema": {"name": "record", "schema": schema}},
            "max_tokens": ANSWER_TOKENS,
        }

        def ask(engine: Served, timeout: float) -> Reply:
            return engine.chat(body, timeout)[1]

        return Question(ask, partial(figures, schema=schema, wanted=wanted))

    def rows(self, answers: Sequence[Answer], readings: Sequence) -> list[Row]:
        return [
            share(self.name, "valid", [a.figures["valid"] for a in answers]),
            average(self.name, "correct", [a.figures["correct"] for a in answers], "share of fields"),
        ]
