"""Two tasks in the manner of RULER (arXiv 2404.06654, sections 3.2 and 3.3), with texts of our own.

variables   chains of variables, each set to the one before it: which ones hold the first one's value?
words       a long list of words, a few of them much more frequent: which are these?
"""

from __future__ import annotations

import random
import string

from .haystack import Haystack, Unit, fit
from .needles import HEAD, numbers
from .prompts import Sample, all_words, answer_tokens, first_of

LETTERS = 5  # of a variable's name
WORDS_HEAD = "The following is a list of words, in which some words come up far more often than others.\n\nWords: "


def variable_names(rng: random.Random, count: int, text: str) -> list[str]:
    out: list[str] = []
    while len(out) < count:
        name = "".join(rng.choices(string.ascii_uppercase, k=LETTERS))
        if name not in out and name not in text:
            out.append(name)
    return out


def variables(
    haystack: Haystack, length: int, depth: float, trial: int, knobs: dict[str, int], seed: int = 0
) -> Sample:
    """``chains`` chains of ``hops`` steps; the one that is asked for begins at ``depth``, its steps follow in order."""
    rng = random.Random(f"{seed} variables {length} {depth} {trial}")
    chains, hops = knobs["chains"], knobs["hops"]
    values = numbers(rng, chains, knobs["digits"], haystack.text)
    every = variable_names(rng, chains * (hops + 1), haystack.text)
    placed: list[tuple[float, str]] = []
    for c, value in enumerate(values):
        own = every[c * (hops + 1) : (c + 1) * (hops + 1)]
        begin = rng.random() if c else depth
        steps = sorted(rng.uniform(begin, 1) for _ in range(hops))
        placed.append((begin, f"The variable {own[0]} is set to {value}."))
        for where, old, new in zip(steps, own, own[1:], strict=False):
            placed.append((where, f"The variable {new} is set to the value of {old}."))
    asked = every[: hops + 1]
    question = (
        f"\n\nQuestion: Which variables hold the value {values[0]}, by themselves or through other variables? "
        f"There are {len(asked)}. Answer with their names alone."
    )
    prefix = f"The variables that hold {values[0]} are"
    context, places, prose = haystack.fill(HEAD, placed, question, prefix, length, rng)
    return Sample(
        "variables",
        context,
        question,
        first_of(rf"(?<![A-Za-z])[A-Z]{{{LETTERS}}}(?![A-Za-z])", asked),
        new_tokens=answer_tokens(haystack.tokens.size(" " + ", ".join(asked))),
        length=length,
        depth=depth,
        trial=trial,
        prefix=prefix,
        answers=tuple(asked),
        places=tuple(places[: len(asked)]),
        knobs=knobs,
        prose=prose,
    )


def words(haystack: Haystack, length: int, trial: int, knobs: dict[str, int], seed: int = 0) -> Sample:
    """``count`` words, each ``ratio`` times as frequent as any other of the list. Has no depth.

    The other words come up once each in a short list, more often where the text has too few different words.
    """
    rng = random.Random(f"{seed} words {length} {trial}")
    count, ratio, tokens = knobs["count"], knobs["ratio"], haystack.tokens
    vocabulary = haystack.words()
    rng.shuffle(vocabulary)
    units: list[Unit] = list(zip(vocabulary, tokens.sizes([" " + word for word in vocabulary]), strict=True))
    common, rest = units[:count], units[count:]
    question = f"\n\nQuestion: Which {count} words come up most often in the list? Answer with the words alone."
    if count == 1:
        question = "\n\nQuestion: Which word comes up most often in the list? Answer with the word alone."
    prefix = "The most frequent words are" if count > 1 else "The most frequent word is"

    def listing(chosen: list[Unit]) -> str:
        every = [word for word, _ in chosen + frequent]
        random.Random(f"{seed} order {length} {trial}").shuffle(every)
        return WORDS_HEAD + " ".join(every)

    def size(chosen: list[Unit]) -> int:
        return len(tokens.ids(listing(chosen), question, prefix))

    # Rest words come up `times` each, the frequent ones ratio * times.
    frequent: list[Unit] = []
    room, heavy = length - size([]), ratio * sum(size for _, size in common)
    times = 1
    while times * heavy + times * sum(size for _, size in rest) < room:
        times += 1
    frequent = common * (ratio * times)
    left = room - times * heavy
    if left < count * times:
        raise ValueError(f"length {length}: too short for {count} words of ratio {ratio}")
    chosen: list[Unit] = []
    for unit in rest:
        if left > 0:
            chosen += [unit] * times
            left -= unit[1] * times
    # Filling up exactly may take a word or two once more than the others.
    chosen = fit(chosen, rest, size, length, rng)
    most = max(map([w for w, _ in chosen].count, {w for w, _ in chosen}), default=0)
    if most >= ratio * times:
        raise ValueError(f"length {length}: ratio {ratio} does not set {count} words apart; a larger one does")
    asked = tuple(word for word, _ in common)
    return Sample(
        "words",
        listing(chosen),
        question,
        all_words(asked),
        new_tokens=answer_tokens(tokens.size(" " + ", ".join(asked))),
        length=length,
        trial=trial,
        prefix=prefix,
        answers=asked,
        knobs=knobs,
    )
