"""Six needle tasks: plain facts hidden in prose, asked for after it.

    single       one object's access code
    distractor   the same, among other facts about the object and codes of objects with like names
    multikey     the same, among access codes of other objects
    multi        codes of several objects: all that the text holds
    multivalue   several codes of one object: all of them
    multiquery   codes of several named objects, among twice as many

Several asked needles stand evenly apart, the first of them at the depth asked for, the others after it and from
the beginning on again. Needles that are not asked for stand anywhere.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from .haystack import Haystack
from .prompts import Sample, answer_tokens, first_of

ADJECTIVES = (
    *("amber", "bronze", "copper", "crimson", "dusty", "emerald", "frosted", "gilded", "hollow", "ivory", "jade"),
    *("leather", "marble", "narrow", "oaken", "painted", "quilted", "rusty", "silver", "tin", "velvet", "walnut"),
)
NOUNS = (
    *("anchor", "basket", "cabinet", "drawer", "easel", "fountain", "globe", "hammock", "jar", "kettle", "lantern"),
    *("mirror", "notebook", "organ", "piano", "quiver", "radio", "saddle", "teapot", "umbrella", "violin", "wagon"),
)
ATTRIBUTES = (
    *("serial number", "stock number", "inventory number", "customs number", "order number", "invoice number"),
    *("catalogue number", "parcel number", "insurance number", "repair number", "auction number", "licence number"),
)
HEAD = "Read the following text with care. A question about it comes at the end.\n\n"
TASKS = ("single", "distractor", "multi", "multikey", "multivalue", "multiquery")


def numbers(rng: random.Random, count: int, digits: int, text: str) -> list[str]:
    """Different numbers that ``text`` does not hold."""
    out: list[str] = []
    while len(out) < count:
        number = str(rng.randrange(10 ** (digits - 1), 10**digits))
        if number not in out and number not in text:
            out.append(number)
    return out


def names(rng: random.Random, count: int) -> list[str]:
    """Different objects. ValueError beyond what the lists can give."""
    every = [f"{a} {n}" for a in ADJECTIVES for n in NOUNS]
    if count > len(every):
        raise ValueError(f"{count} objects: {len(every)} is the most")
    return rng.sample(every, count)


def fact(name: str, code: str, attribute: str = "access code") -> str:
    return f"The {attribute} for the {name} is {code}."


def listed(items: list[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def spread(depth: float, count: int) -> list[float]:
    """``count`` depths evenly apart, the first as given; after the end they go on at the beginning."""
    return [(depth + i / count) % 1 if i else depth for i in range(count)]


def _one(rng, depth, codes, objects, others: Callable) -> tuple:
    name, asked = objects[0], [codes[0]]
    placed = [(depth, fact(name, codes[0])), *((rng.random(), text) for text in others(name))]
    return placed, asked, f"What is the access code for the {name}?", f"The access code for the {name} is"


def _single(rng, depth, codes, objects, n):
    return _one(rng, depth, codes, objects, lambda name: [])


def _distractor(rng, depth, codes, objects, n):
    if n > 2 * len(ATTRIBUTES):
        raise ValueError(f"distractors {n}: {2 * len(ATTRIBUTES)} is the most")

    def others(name: str) -> list[str]:
        adjective, noun = name.split()
        like = [f"{adjective} {x}" for x in NOUNS if x != noun] + [f"{x} {noun}" for x in ADJECTIVES if x != adjective]
        like, attributes = rng.sample(like, n), rng.sample(ATTRIBUTES, len(ATTRIBUTES))
        # Turn by turn: the object's other numbers, and access codes of objects that share a word with it.
        return [
            fact(like[i], c) if i % 2 else fact(name, c, attributes[i // 2]) for i, c in enumerate(codes[1 : n + 1])
        ]

    return _one(rng, depth, codes, objects, others)


def _multikey(rng, depth, codes, objects, n):
    return _one(rng, depth, codes, objects, lambda name: map(fact, objects[1:n], codes[1:n]))


def _multi(rng, depth, codes, objects, n):
    placed = list(zip(spread(depth, n), map(fact, objects[:n], codes[:n]), strict=True))
    question = f"The text gives the access codes for {n} objects. List all {n} codes."
    return placed, codes[:n], question, "The access codes are"


def _multivalue(rng, depth, codes, objects, n):
    name = objects[0]
    texts = [f"One access code for the {name} is {code}." for code in codes[:n]]
    question = f"The {name} has {n} access codes. What are all {n} of them?"
    return list(zip(spread(depth, n), texts, strict=True)), codes[:n], question, f"The access codes for the {name} are"


def _multiquery(rng, depth, codes, objects, n):
    facts = list(map(fact, objects[: 2 * n], codes))
    placed = list(zip([*spread(depth, n), *(rng.random() for _ in range(n))], facts, strict=True))
    asked = listed([f"the {name}" for name in objects[:n]])
    return placed, codes[:n], f"What are the access codes for {asked}?", f"The access codes for {asked} are"


MAKE = dict(zip(TASKS, (_single, _distractor, _multi, _multikey, _multivalue, _multiquery), strict=True))


def sample(
    task: str, haystack: Haystack, length: int, depth: float, trial: int, knobs: dict[str, int], seed: int = 0
) -> Sample:
    """One of :data:`TASKS` in a prompt of exactly ``length`` tokens.

    knobs: digits of every number; count of what the task has several of (distractors, objects, values, queries).
    ValueError where the length cannot hold them.
    """
    rng = random.Random(f"{seed} {task} {length} {depth} {trial}")
    digits, n = knobs["digits"], knobs.get("count", 1)
    codes = numbers(rng, 2 * n + 1, digits, haystack.text)
    placed, asked, question, prefix = MAKE[task](rng, depth, codes, names(rng, max(2 * n, 1)), n)
    numeric = "the number alone" if len(asked) == 1 else "the numbers alone"
    question = f"\n\nQuestion: {question} Answer with {numeric}."
    context, places, prose = haystack.fill(HEAD, placed, question, prefix, length, rng)
    return Sample(
        task,
        context,
        question,
        first_of(rf"(?<!\d)\d{{{digits}}}(?!\d)", asked),
        new_tokens=answer_tokens(haystack.tokens.size(" " + listed(asked))),
        length=length,
        depth=depth,
        trial=trial,
        prefix=prefix,
        answers=tuple(asked),
        places=tuple(places[: len(asked)]),
        knobs=knobs,
        prose=prose,
    )
