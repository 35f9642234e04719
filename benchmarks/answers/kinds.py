"""Kinds of values, by JSON schema: each draws one, says it in words, and knows when another is the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any


@dataclass(frozen=True)
class Kind:
    """draw: a value and the words for it."""

    schema: dict
    draw: Callable[[Random], tuple[Any, str]]


def _plain(schema: dict, options: Sequence[Any]) -> Kind:
    def draw(rng: Random) -> tuple[Any, str]:
        value = rng.choice(options)
        return value, str(value)

    return Kind(schema, draw)


def text(*options: str) -> Kind:
    return _plain({"type": "string"}, options)


def choice(*options: str) -> Kind:
    return _plain({"type": "string", "enum": list(options)}, options)


def whole(least: int, most: int) -> Kind:
    return _plain({"type": "integer", "minimum": least, "maximum": most}, range(least, most + 1))


def real(*options: float) -> Kind:
    return _plain({"type": "number"}, options)


def flag(yes: str, no: str) -> Kind:
    """A boolean that is said by one of two phrases."""

    def draw(rng: Random) -> tuple[bool, str]:
        value = rng.random() < 0.5
        return value, yes if value else no

    return Kind({"type": "boolean"}, draw)


def several(least: int, most: int, *options: str, closed: bool = False) -> Kind:
    """An array of different strings; closed: of an enum."""
    item = {"type": "string", **({"enum": list(options)} if closed else {})}

    def draw(rng: Random) -> tuple[list[str], str]:
        value = rng.sample(options, rng.randint(least, most))
        return value, " and ".join([", ".join(value[:-1]), value[-1]] if len(value) > 1 else value)

    return Kind({"type": "array", "items": item, "minItems": least, "maxItems": most}, draw)


def record(properties: dict[str, dict]) -> dict:
    """Schema of an object that has all of these and nothing else."""
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


def same(said: Any, wanted: Any) -> bool:
    """Whether a value is the wanted one. Case and blanks of strings do not count, nor does the order of a list."""
    if isinstance(wanted, bool) or isinstance(said, bool):
        return said is wanted
    if isinstance(wanted, str):
        return isinstance(said, str) and said.casefold().split() == wanted.casefold().split()
    if isinstance(wanted, list):
        return (
            isinstance(said, list)
            and len(said) == len(wanted)
            and all(any(same(s, w) for s in said) for w in wanted)
            and all(any(same(s, w) for w in wanted) for s in said)
        )
    if isinstance(wanted, dict):
        return isinstance(said, dict) and said.keys() == wanted.keys() and all(same(said[k], wanted[k]) for k in wanted)
    return isinstance(said, int | float) and said == wanted
