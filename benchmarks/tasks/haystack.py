"""Prose of an exact number of tokens, with sentences hidden at chosen depths."""

from __future__ import annotations

import ast
import random
import re
import sysconfig
from collections import defaultdict
from collections.abc import Callable, Iterable
from itertools import accumulate
from pathlib import Path

from .prompts import Tokens

Unit = tuple[str, int]  # a sentence or word, and its tokens
TRIES = 64


def default_text() -> str:
    """Docstrings of the standard library, which every Python brings along and calibration does not read."""
    found = []
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        for node in ast.walk(ast.parse(file.read_bytes())):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and (text := ast.get_docstring(node)):
                found.append(text)
    return "\n\n".join(found)


def sentences(text: str) -> list[str]:
    """The prose of a text: sentences of 4 to 60 words that begin with a capital. No code, tables or headings."""
    found = []
    for block in re.split(r"\n\s*\n", text):
        lines = block.strip("\n").split("\n")
        if any(re.search(r"::=|>>>|\||[=*~^-]{4,}", line) for line in lines) or lines[0].startswith("    "):
            continue
        for sentence in re.split(r"(?<=[.!?])\s+(?=[A-Z\"'])", " ".join(" ".join(lines).split())):
            if re.match(r"[A-Z].*[.!?]$", sentence) and 4 <= len(sentence.split()) <= 60:
                found.append(sentence)
    return found


def fit(
    chosen: list[Unit], spare: Iterable[Unit], count: Callable[[list[Unit]], int], target: int, rng: random.Random
) -> list[Unit]:
    """``chosen`` with whole units dropped, added or exchanged for ``spare`` ones until ``count`` is ``target``.

    Sizes of units only steer the search, since neighbours may merge into one token; ``count`` decides. ValueError
    where no exchange is left.
    """
    by_size: dict[int, list[Unit]] = defaultdict(list)
    for unit in spare:
        by_size[unit[1]].append(unit)
    chosen = list(chosen)
    for _ in range(TRIES):
        gap = target - count(chosen)
        if gap == 0:
            return chosen
        while gap < 0 and chosen:
            gap += chosen.pop()[1]
        if gap == 0:
            continue
        if gap in by_size:
            chosen.append(rng.choice(by_size[gap]))
            continue
        order = rng.sample(range(len(chosen)), len(chosen))
        swap = next((i for i in order if chosen[i][1] + gap in by_size), None)
        if swap is not None:
            chosen[swap] = rng.choice(by_size[chosen[swap][1] + gap])
            continue
        smaller = [size for size in by_size if size < gap]
        if not smaller:
            break
        chosen.append(rng.choice(by_size[max(smaller)]))
    raise ValueError(f"length {target}: no choice of whole sentences gives it; another length or a longer --text will")


def lay(chosen: list[Unit], placed: list[tuple[float, str]]) -> tuple[str, list[float]]:
    """Units with each of ``placed`` (depth, sentence) at the nearest gap between two, and the depths that this gives.

    Depth is the share of the units' tokens that stand before. Sentences at one gap keep their order.
    """
    ends = [0, *accumulate(size for _, size in chosen)]
    total = max(ends[-1], 1)
    at = [min(range(len(ends)), key=lambda i: abs(ends[i] - depth * total)) for depth, _ in placed]
    out: list[str] = []
    for i in range(len(ends)):
        out += [text for where, (_, text) in zip(at, placed, strict=True) if where == i]
        out += [chosen[i][0]] if i < len(chosen) else []
    return " ".join(out), [ends[i] / total for i in at]


class Haystack:
    """Sentences of a text, with their sizes. ValueError for a text with hardly any prose."""

    def __init__(self, tokens: Tokens, text: str | None = None):
        self.tokens = tokens
        self.text = default_text() if text is None else text
        found = sentences(self.text)
        if len(found) < 50:
            raise ValueError(f"--text: {len(found)} sentences of prose; at least 50 are needed")
        self.units: list[Unit] = list(zip(found, tokens.sizes([" " + s for s in found]), strict=True))

    @classmethod
    def of(cls, tokens: Tokens, file: Path | None) -> Haystack:
        return cls(tokens, None if file is None else file.read_text())

    def words(self) -> list[str]:
        """Different lower-case words of 4 to 10 letters, in alphabetical order."""
        return sorted(set(re.findall(r"(?<!\S)[a-z]{4,10}(?=[\s.,;])", " ".join(s for s, _ in self.units))))

    def fill(
        self, head: str, placed: list[tuple[float, str]], question: str, prefix: str, length: int, rng: random.Random
    ) -> tuple[str, list[float], float]:
        """A context that makes a prompt of exactly ``length`` tokens, the depths of ``placed``, its share of prose.

        A running text from a random place on; one longer than the text begins again.
        """

        def count(chosen: list[Unit]) -> int:
            return len(self.tokens.ids(head + lay(chosen, placed)[0], question, prefix))

        room = length - count([])
        if room < 0:
            raise ValueError(
                f"length {length}: the question and {len(placed)} hidden sentences alone are {-room} tokens more"
            )
        chosen: list[Unit] = []
        i, used = rng.randrange(len(self.units)), 0
        while used < room:
            chosen.append(self.units[i % len(self.units)])
            used += chosen[-1][1]
            i += 1
        chosen = fit(chosen, self.units, count, length, rng)
        body, places = lay(chosen, placed)
        return head + body, places, room / length
