"""The generated tasks: exact lengths, answers where promised and nowhere else, seeds, knobs and their search."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from benchmarks.tasks import knobs, needles
from benchmarks.tasks.haystack import Haystack, fit, lay, sentences
from benchmarks.tasks.knobs import RUNGS, make, search, verdict
from benchmarks.tasks.prompts import Tokens, all_words, first_of

LENGTHS = (2048, 3001)


@pytest.fixture(scope="module")
def haystack(tokenizer) -> Haystack:
    return Haystack(Tokens(tokenizer))


def cells(rung: int) -> list:
    return [pytest.param(task, rungs[rung], id=f"{task}-{rung}") for task, rungs in RUNGS.items()]


def at(task: str, depth: float) -> float | None:
    return None if task in knobs.NO_DEPTH else depth


@pytest.mark.parametrize(("task", "knob"), [*cells(0), *cells(4)])
def test_length_is_exact_and_seeds_reproduce(haystack, task, knob):
    for length in LENGTHS:  # a token is hardly two letters here
        sample = make(task, haystack, length, at(task, 0.5), 3, knob, seed=7)
        ids, shared = haystack.tokens.prompt(sample)
        assert len(ids) == length == sample.length
        text = haystack.tokens.tokenizer.decode(ids)
        assert text.startswith("<|user|>" + sample.context[:20]) and text.endswith(sample.prefix)
        start = haystack.tokens.tokenizer.decode(ids[:shared])
        assert ("<|user|>" + sample.context).startswith(start) and len(start) > len(sample.context)
        again = make(task, haystack, length, at(task, 0.5), 3, knob, seed=7)
        assert (again.context, again.question, again.answers) == (sample.context, sample.question, sample.answers)
        for other in (make(task, haystack, length, at(task, 0.5), t, knob, s) for t, s in ((4, 7), (3, 8))):
            assert other.answers != sample.answers and other.context != sample.context


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("prefix", [True, False])
def test_length_is_exact_without_template_or_prefix(tokenizer, chat, prefix):
    tokens = Tokens(tokenizer, chat=chat, prefix=prefix)
    sample = make("multikey", Haystack(tokens), 2000, 0.3, 0, RUNGS["multikey"][4], 0)
    ids, _ = tokens.prompt(sample)
    text = tokens.tokenizer.decode(ids)
    assert len(ids) == 2000
    assert ("<|user|>" in text) == chat
    assert text.endswith(sample.prefix) == prefix


@pytest.mark.parametrize("task", [*needles.TASKS, "variables"])
@pytest.mark.parametrize("depth", [0.0, 0.4, 1.0])
def test_answers_stand_where_promised_and_nowhere_else(haystack, task, depth):
    sample = make(task, haystack, 4000, depth, 0, RUNGS[task][4], 0)
    body = sample.context.removeprefix(needles.HEAD)
    longest = max(size for _, size in haystack.units) / 4000
    assert len(sample.places) == len(sample.answers) == len(set(sample.answers))
    assert abs(sample.places[0] - depth) < longest
    ends = body.rindex(sample.answers[0]) + len(sample.answers[0])
    assert (body.index(sample.answers[0]) < 60) == (depth == 0) and (len(body) - ends < 60) == (
        depth == 1 and task != "variables"  # whose later steps follow
    )
    size = haystack.tokens.size(body)
    for answer, place in zip(sample.answers, sample.places, strict=True):
        mentions = 1 if task != "variables" else 1 + (answer != sample.answers[-1])  # the next step names it, too
        assert sample.context.count(answer) == mentions
        assert answer not in sample.question and answer not in sample.prefix
        # Hidden sentences themselves count in this share, not in the promised one.
        assert abs(haystack.tokens.size(body[: body.index(answer)]) / size - place) < 0.15


@pytest.mark.parametrize("task", ["distractor", "multikey", "multiquery"])
def test_other_facts_differ_from_the_needle(haystack, task):
    """Every number once, and what is asked for names exactly one of them."""
    knob = RUNGS[task][6]
    sample = make(task, haystack, 6000, 0.5, 0, knob, 0)
    found = re.findall(r"The ([a-z ]+ (?:code|number)) for the (\w+ \w+) is (\d+)\.", sample.context)
    expected = {"distractor": knob["count"] + 1, "multikey": knob["count"], "multiquery": 2 * knob["count"]}[task]
    assert len(found) == len({number for *_, number in found}) == expected
    assert len({(what, name) for what, name, _ in found}) == expected
    asked = {number for what, name, number in found if what == "access code" and f"the {name}" in sample.question}
    assert asked == set(sample.answers)
    if task == "distractor":
        name = next(name for what, name, number in found if number == sample.answers[0])
        same = [f for f in found if f[1] == name]
        alike = [f for f in found if f[1] != name]
        assert len(same) - 1 == len(alike) == knob["count"] // 2
        assert all(set(f[1].split()) & set(name.split()) and f[0] == "access code" for f in alike)


def test_chains_of_variables(haystack):
    knob = {"digits": 5, "chains": 3, "hops": 4}
    sample = make("variables", haystack, 4000, 0.2, 0, knob, 0)
    values: dict[str, str] = {}
    for new, old in re.findall(r"The variable (\w+) is set to (?:the value of )?(\w+)\.", sample.context):
        values[new] = values.get(old, old)  # in the order of the text: a chain never runs ahead of itself
    wanted = re.search(r"value (\d+)", sample.question)[1]
    begins = [m.start() for m in re.finditer(r"is set to \d", sample.context)]
    assert max(begins) - min(begins) > 0.1 * len(sample.context)  # other chains begin elsewhere
    assert len(values) == 15 and len(set(values.values())) == 3
    assert {name for name, value in values.items() if value == wanted} == set(sample.answers)


@pytest.mark.parametrize("length", [2000, 9000])
def test_frequent_words_are_the_answers(haystack, length):
    knob = {"count": 3, "ratio": 6}
    sample = make("words", haystack, length, None, 0, knob, 0)
    listed = sample.context.split("Words: ")[1].split()
    counts = sorted(((listed.count(w), w) for w in set(listed)), reverse=True)
    assert {word for _, word in counts[:3]} == set(sample.answers)
    assert counts[0][0] == counts[2][0] > 2 * counts[3][0]
    assert counts[2][0] % 6 == 0


def test_what_does_not_fit_is_refused(haystack):
    with pytest.raises(ValueError, match="length 300: the question and .* more"):
        make("multikey", haystack, 300, 0.5, 0, RUNGS["multikey"][8], 0)
    with pytest.raises(ValueError, match="length 400: too short for 10 words of ratio 20"):
        make("words", haystack, 400, None, 0, {"count": 10, "ratio": 20}, 0)
    with pytest.raises(ValueError, match="ratio 1 does not set 2 words apart"):
        make("words", haystack, 2000, None, 0, {"count": 2, "ratio": 1}, 0)
    with pytest.raises(ValueError, match="distractors 25: 24 is the most"):
        make("distractor", haystack, 4000, 0.5, 0, {"digits": 7, "count": 25}, 0)
    with pytest.raises(ValueError, match="1 sentences of prose"):
        Haystack(haystack.tokens, "One sentence stands here alone.")
    with pytest.raises(ValueError, match="chat template"):
        Tokens(PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE())))


def test_fit_exchanges_when_nothing_of_the_size_is_spare():
    """Units of 5 and 7 only: 22 needs an exchange after 3 x 5 + ..."""
    spare = [("five", 5), ("seven", 7)]
    got = fit([("five", 5)] * 4, spare, lambda units: sum(size for _, size in units), 22, random.Random(0))
    assert sorted(size for _, size in got) == [5, 5, 5, 7]
    with pytest.raises(ValueError, match="length 3"):
        fit([], spare, lambda units: sum(size for _, size in units), 3, random.Random(0))


def test_fit_counts_what_neighbours_lose():
    """Neighbours of one kind merge into one token less: sizes alone would miss the target."""
    spare = [(kind, size) for kind in "abc" for size in (3, 4, 5)]

    def count(units: list) -> int:
        return sum(size for _, size in units) - sum(a[0] == b[0] for a, b in zip(units, units[1:], strict=False))

    for seed in range(50):
        rng = random.Random(seed)
        assert count(fit(rng.choices(spare, k=30), spare, count, 100, rng)) == 100


def test_lay_puts_sentences_at_the_nearest_gap():
    units = [("A.", 10), ("B.", 30), ("C.", 60)]
    text, places = lay(units, [(0.0, "start"), (0.35, "middle"), (0.36, "next"), (1.0, "end")])
    assert text == "start A. B. middle next C. end"
    assert places == [0, 0.4, 0.4, 1]


def test_sentences_are_prose():
    text = (
        "A heading\n=========\n\nThis is a sentence of prose.  And one\nthat goes on here!\n\n    x = code(1, 2, 3)\n"
    )
    assert sentences(text + "\nGrammar ::= is not kept at all.\n") == [
        "This is a sentence of prose.",
        "And one that goes on here!",
    ]


def test_scores():
    score = first_of(r"(?<!\d)\d{4}(?!\d)", ["1234", "5678"])
    assert score("5678 and 1234.") == 1
    assert score("1,234 first") == 0.5
    assert score("12345 5678") == 0.5
    assert score("9999, 1234, 5678") == 0.5  # naming everything is no answer
    assert score("1234, 1234, 5678") == 1
    assert score("none") == 0
    assert all_words(["Alpha", "beta"])("1. ALPHA 2. betas") == 0.5


def rates(*values: float | None):
    asked = []

    def measure(rung: int) -> float | None:
        asked.append(rung)
        return values[rung]

    return asked, measure


def test_search_finds_the_range_by_bisection():
    asked, measure = rates(1, 1, 1, 1, 1, 0.99, 0.9, 0.1, 0.0)
    rung, measured = search(9, measure)
    assert (rung, asked) == (6, [4, 6]) and verdict(measured, rung, 9) == ""
    asked, measure = rates(1, 0.7, 0.3, None, None)  # what does not fit is too hard
    rung, measured = search(5, measure)
    assert (rung, asked) == (1, [2, 0, 1]) and verdict(measured, rung, 5) == ""
    asked, measure = rates(1, 0.7, None, None, None)
    assert search(5, measure)[0] == 1 and asked == [2, 0, 1]


def test_search_says_why_nothing_is_in_range():
    rung, measured = search(5, rates(1, 1, 1, 1, 0.97)[1])
    assert rung == 4 and verdict(measured, rung, 5) == "too easy at the hardest rung"
    rung, measured = search(5, rates(1, 1, 1, None, None)[1])
    assert rung == 2 and verdict(measured, rung, 5) == "too easy at the hardest rung that fits"
    rung, measured = search(5, rates(0.2, 0, 0, 0, 0)[1])
    assert rung == 0 and verdict(measured, rung, 5) == "too hard, at the easiest rung too"
    rung, measured = search(5, rates(1, 1, 0.5, 0, 0)[1])
    assert rung == 1 and verdict(measured, rung, 5) == "no rung between too easy and too hard"
    with pytest.raises(ValueError, match="too short"):
        search(3, rates(None, None, None)[1])


def test_rungs_have_the_knobs_that_tasks_read():
    for task, rungs in RUNGS.items():
        assert len({json.dumps(r, sort_keys=True) for r in rungs}) == len(rungs), task
        assert all(r.keys() == rungs[0].keys() for r in rungs), task


def test_knobs_of_a_file(tmp_path):
    file = tmp_path / "knobs.json"
    file.write_text(json.dumps({"tasks": {"single": {"512": {"knobs": {"digits": 9}}}}}))
    loaded = knobs.load(file)
    assert knobs.choose("single", 512, loaded) == [{"digits": 9}]
    assert knobs.choose("single", 512, None) == [knobs.DEFAULTS["single"]]
    assert knobs.choose("words", 512, loaded, [0, 8]) == [RUNGS["words"][0], RUNGS["words"][8]]
    with pytest.raises(ValueError, match=r"single at 1024 tokens was not calibrated \(512 was\)"):
        knobs.choose("single", 1024, loaded)
    with pytest.raises(ValueError, match=r"words at 512 .* \(no length was\)"):
        knobs.choose("words", 512, loaded)
    file.write_text(json.dumps({"tasks": {"single": {"512": {"knobs": [{"digits": 3}, {"digits": 9}]}}}}))
    assert knobs.choose("single", 512, knobs.load(file)) == [{"digits": 3}, {"digits": 9}]


def test_ladders_hold_knobs_that_tasks_read():
    files = list((Path(knobs.__file__).parent / "ladders").glob("*.json"))
    assert files
    for file in files:
        for task, cells in knobs.load(file).items():
            for listed in cells.values():
                assert all(each.keys() == RUNGS[task][0].keys() for each in listed), (file.name, task)
                assert len({json.dumps(each, sort_keys=True) for each in listed}) == len(listed)
