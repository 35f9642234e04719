"""Free answers and quotes: what is asked, and how a quote is judged."""

from __future__ import annotations

import pytest

from benchmarks.answers.engines import Reply
from benchmarks.answers.questions import chat_ids
from benchmarks.answers.quote import ASKED, PASSAGE_WORDS, Quote, distance, figures, passages, report
from benchmarks.answers.writing import SCRIPTS, Length, Long, Script
from benchmarks.tasks.prompts import Tokens


class Writer:
    """An engine that notes its prompts and answers them one after another."""

    def __init__(self, *texts):
        self.texts, self.asked = list(texts), []

    def remember(self, ids, timeout):
        self.asked.append(("remember", ids))

    def write(self, ids, new, timeout, stop=True):
        self.asked.append((new, stop, ids))
        return Reply(self.texts.pop(0), len(ids), 0, 9, "stop", ids=[1, 2], logprobs=[-1.0, -2.0])


@pytest.fixture(scope="module")
def tokens(tokenizer) -> Tokens:
    return Tokens(tokenizer)


def test_every_question_is_another_one(tokens):
    for test, least in ((Long(tokens), 4), (Length(tokens), 40), (Script(tokens), 5)):
        messages = [test.message(i) for i in range(test.most)]
        assert len(set(messages)) == len(messages) >= least and test.samples <= test.most
        assert not any("{" in m and "}" in m for m in messages)
    assert all("bash script" in text for text in SCRIPTS)


def test_the_prompt_is_cached_before_it_is_answered(tokens):
    engine = Writer("once upon", "an answer")
    question = Long(tokens).question(0)
    reply = question.ask(engine, 5)
    (first, ids), (new, stop, again) = engine.asked
    assert (first, new, stop) == ("remember", 2000, False) and ids == again == list(question.prompt)
    assert tokens.tokenizer.decode(ids).endswith("<|end|><|assistant|>")
    assert list(reply.ids) == [1, 2] and list(reply.logprobs) == [-1.0, -2.0]
    short = Length(tokens).question(0).ask(engine, 5)
    assert engine.asked[-1][:2] == (512, True) and not short.ids


def test_passages_have_a_third_sentence_that_nobody_mistakes():
    found = passages(report())
    assert len(found) >= 10 and len({p[ASKED] for p in found}) == len(found)
    for passage in found:
        assert PASSAGE_WORDS <= sum(len(s.split()) for s in passage) < PASSAGE_WORDS + 60
        assert len(passage) > 3 and all(s.count(".") == 1 and s.endswith(".") for s in passage)
        opening = passage[ASKED].split()[:3]
        assert [s.split()[:3] for s in passage].count(opening) == 1
    assert passages("Too short. Both of them.") == []


def test_the_quote_is_asked_for_after_the_essay(tokens):
    test = Quote(tokens)
    passage = test.passages[2]
    engine = Writer("An essay of some words.", f'It is: "{passage[ASKED]}"')
    question = test.question(2)
    reply = question.ask(engine, 5)
    (essay_tokens, stop, first), (_, _, second) = engine.asked
    asked, again = tokens.tokenizer.decode(first), tokens.tokenizer.decode(second)
    assert (essay_tokens, stop) == (600, True) and " ".join(passage) in asked
    assert again.startswith(asked + "An essay of some words.") and "word for word" in again[len(asked) :]
    assert passage[ASKED] not in again[len(asked) :]
    assert reply.first == "An essay of some words." and question.score(reply.text) == {"exact": 1.0, "errors": 0.0}


@pytest.mark.parametrize(
    ("wanted", "text", "errors"),
    [
        ("abc", "abc", 0),
        ("abc", "xx abc yy", 0),
        ("abc", "axc", 1),
        ("abc", "ac", 1),
        ("abc", "abxc", 1),
        ("abc", "", 3),
        ("abc", "xyz", 3),
        ("kitten", "the sitting cat", 2),
    ],
)
def test_distance_to_the_nearest_part(wanted, text, errors):
    assert distance(wanted, text) == errors


def test_a_quote_with_an_error_is_not_exact():
    sentence = "The commission has ten members."
    assert figures("The commission  has\nten members.", sentence) == {"exact": 1.0, "errors": 0.0}
    assert figures("The commission had ten members.", sentence) == {"exact": 0.0, "errors": pytest.approx(1 / 31)}


def test_turns_alternate(tokens):
    text = tokens.tokenizer.decode(chat_ids(tokens, "a", "b", "c"))
    assert text == "<|user|>a<|end|><|assistant|>b<|end|><|user|>c<|end|><|assistant|>"
