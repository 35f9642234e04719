"""LongBench's metrics for English, each ``(prediction, truth) -> [0, 1]`` (arXiv 2308.14508, section 3 and appendix).

They give what the benchmark's own program gives, down to its habits where these change a score.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from difflib import SequenceMatcher


def words_of_answer(text: str) -> list[str]:
    """Lower-case words without punctuation and articles, as SQuAD compares them."""
    plain = text.lower().translate(str.maketrans("", "", string.punctuation))
    return re.sub(r"\b(?:a|an|the)\b", " ", plain).split()


def f1(prediction: str, truth: str) -> float:
    """Harmonic mean of precision and recall over words, repeated ones counted."""
    said, true = words_of_answer(prediction), words_of_answer(truth)
    shared = (Counter(said) & Counter(true)).total()
    return 2 * shared / (len(said) + len(true)) if shared else 0.0


def common_words(reference: Sequence[str], said: Sequence[str]) -> set[str]:
    """Words of a longest common subsequence. Of several it is the one that leaves words of ``said`` out first,
    reading from the end."""
    rows = [[0] * (len(said) + 1)]
    for word in reference:
        above, row = rows[-1], [0]
        for j, other in enumerate(said):
            row.append(above[j] + 1 if word == other else max(above[j + 1], row[j]))
        rows.append(row)
    found, i, j = set(), len(reference), len(said)
    while i and j:
        if reference[i - 1] == said[j - 1]:
            i, j = i - 1, j - 1
            found.add(reference[i])
        elif rows[i - 1][j] > rows[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return found


def rouge_l(prediction: str, truth: str) -> float:
    """ROUGE-L over sentences as the package ``rouge`` 1.0.1 counts it: sentences end at every full stop, and each
    different word counts once, if it is in the common subsequence of any two sentences. Blanks alone between two full
    stops, or after the last, are a sentence of one empty word."""
    said, true = ([part.split() or [""] for part in text.split(".") if part] for text in (prediction, truth))
    words: list[set[str]] = [set().union(*side) for side in (said, true)]
    if not all(words):
        return 0.0
    shared = set().union(*(common_words(t, s) for t in true for s in said))
    precision, recall = (len(shared) / len(side) for side in words)
    return 2 * precision * recall / (precision + recall + 1e-8)


def classification(prediction: str, truth: str, classes: Sequence[str]) -> float:
    """One over the number of classes that the prediction names, if the true one is among them.

    A class whose name is part of the true one's does not count. The list is walked while it shrinks, so that the
    class after one that was taken out stays: the benchmark's program does so.
    """
    named = [name for name in classes if name in prediction]
    i = 0
    while i < len(named):
        if named[i] in truth and named[i] != truth:
            del named[i]
        i += 1
    return 1 / len(named) if truth in named else 0.0


def count(prediction: str, truth: str) -> float:
    """Share of the prediction's numbers that are the true one."""
    numbers = re.findall(r"\d+", prediction)
    return numbers.count(truth) / len(numbers) if numbers else 0.0


def retrieval(prediction: str, truth: str) -> float:
    """The same for ``Paragraph N``. ValueError for a truth of another form."""
    number = re.search(r"Paragraph (\d+)", truth)
    if not number:
        raise ValueError(f"answer {truth!r}: 'Paragraph NUMBER' is needed")
    return count(prediction, number[1])


def code_similarity(prediction: str, truth: str) -> float:
    """Similarity in whole per cent of the first line that is neither comment nor markup to the true line."""
    lines = prediction.lstrip("\n").split("\n")
    line = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")
    if line == truth:
        return 1.0
    return round(100 * SequenceMatcher(None, line, truth).ratio()) / 100 if line and truth else 0.0
