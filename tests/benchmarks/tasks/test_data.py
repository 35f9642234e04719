"""LongBench and AIME: metrics on pairs whose values are known by hand, records, prompts, runs over both."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.tasks import aime, longbench, metrics
from benchmarks.tasks.longbench import TASKS
from benchmarks.tasks.prompts import Tokens


@pytest.mark.parametrize(
    ("prediction", "truth", "value"),
    [
        ("The Eiffel Tower.", "eiffel tower", 1),
        ("in Paris, France", "Paris", 0.5),  # 1 of 3 words, 1 of 1
        ("a b a", "a a c", 0),  # "a" is an article, which leaves b and c
        ("x x y", "x z x z", 4 / 7),  # x twice in common
        ("", "word", 0),
    ],
)
def test_f1(prediction, truth, value):
    assert metrics.f1(prediction, truth) == pytest.approx(value)


@pytest.mark.parametrize(
    ("prediction", "truth", "value"),
    [
        ("the cat sat", "the cat sat", 1),
        ("the cat sat on", "the dog sat", 4 / 7),  # the, sat: 2 of 4 and 2 of 3
        ("one two. three four", "three four. one two", 1),  # sentence by sentence
        ("two one", "one two", 0.5),  # order counts within one
        ("a a a b", "a b b", 1),  # different words only
        ("Cat", "cat", 0),  # case counts
        # The blank after the last full stop is a sentence of one empty word: 2 of 3 and 2 of 2.
        ("one two. ", "one two", 0.8),
        ("", "x", 0),
        ("x", "...", 0),
    ],
)
def test_rouge_l(prediction, truth, value):
    assert metrics.rouge_l(prediction, truth) == pytest.approx(value, abs=1e-6)


def test_rouge_l_takes_one_subsequence_of_several():
    """a b and b a share either word; reading from the end, the prediction's last word is left out first."""
    assert metrics.common_words(["a", "b"], ["b", "a"]) == {"b"}


def test_classification():
    classes = ["Number", "Other number", "City"]
    assert metrics.classification("Type: City", "City", classes) == 1
    assert metrics.classification("City or Number", "City", classes) == 0.5
    assert metrics.classification("Other Number", "City", classes) == 0
    # A class within the true one's name does not count; the class after it stays, whatever it is.
    assert metrics.classification("a number of things", "a number", ["number", "a number"]) == 1
    assert metrics.classification("abc", "abc", ["a", "b", "abc"]) == 0.5


def test_count_and_retrieval():
    assert metrics.count("There are 5, or 6, or 5.", "5") == pytest.approx(2 / 3)
    assert metrics.count("five", "5") == 0
    assert metrics.retrieval("Paragraph 12", "Paragraph 12") == 1
    assert metrics.retrieval("Paragraph 1 or 12", "Paragraph 12") == 0.5
    with pytest.raises(ValueError, match="'twelve'"):
        metrics.retrieval("12", "twelve")


def test_code_similarity():
    assert metrics.code_similarity("\n# comment\n```python\nx = 1\ny = 2", "x = 1") == 1
    assert metrics.code_similarity("abcd", "bcde") == 0.75
    assert metrics.code_similarity("// only\n# comments", "x") == 0
    assert metrics.code_similarity("abc", "ab") == 0.8


def test_longbench_scores_take_the_best_answer_and_the_first_line():
    assert longbench.score("qasper", "yes", ["no", "yes"], None) == 1
    assert longbench.score("trec", "\nCity\nNumber", ["City"], ["City", "Number"]) == 1
    assert longbench.score("triviaqa", "Paris\nPassage: more", ["Paris"], None) == 1
    assert longbench.score("hotpotqa", "Paris\nmore", ["Paris"], None) == pytest.approx(2 / 3)


def test_longbench_tasks_are_the_english_ones():
    assert len(TASKS) == 16
    plain = {name for name, task in TASKS.items() if not task.template}
    assert plain == {"trec", "triviaqa", "samsum", "lcc", "repobench-p"}
    assert {name for name, task in TASKS.items() if task.first_line} == {"trec", "triviaqa", "samsum"}
    assert all(task.prompt.count("{context}") == 1 for task in TASKS.values())
    assert {n for n, t in TASKS.items() if "{input}" not in t.prompt} == {
        *("gov_report", "multi_news", "passage_count", "lcc")
    }


@pytest.fixture
def folder(tmp_path) -> Path:
    out = tmp_path / "data"
    out.mkdir()
    qa = [
        {
            "context": f"Fact {i}: {{braces}} " + "w " * 400,
            "input": f"Q{i}?",
            "answers": ["A", f"B{i}"],
            "length": 5000 * i,
        }
        for i in range(3)
    ]
    (out / "qasper.jsonl").write_text("\n".join(map(json.dumps, qa)) + "\n")
    (out / "qasper_e.jsonl").write_text("\n".join(map(json.dumps, qa)) + "\n")
    trec = {"context": "Q\nType: City", "input": "Where?", "answers": ["City"], "all_classes": ["City", "Number"]}
    (out / "trec.jsonl").write_text(json.dumps(trec) + "\n")
    return out


def test_longbench_prompts(tokenizer, folder, tmp_path):
    tokens = Tokens(tokenizer)
    jobs = longbench.jobs(folder, tokens, 10_000, None, None, None, 0)
    assert [(j.task, j.length, j.trial) for j in jobs] == [
        *(("longbench/qasper", None, i) for i in range(3)),
        *(("longbench/qasper_e", bucket, i) for i, bucket in enumerate(("0-4k", "4-8k", "8k+"))),
        ("longbench/trec", None, 0),
    ]
    sample = jobs[1].make()
    assert "Fact 1: {braces} w w" in sample.context and sample.question.endswith("Question: Q1?\nAnswer:")
    assert sample.new_tokens == 128 and not sample.binary and sample.score("B1") == 1
    assert "<|user|>" in tokens.text(sample.context, sample.question, template=sample.template)
    plain = jobs[-1].make()
    assert plain.score("City") == 1 and plain.score("Number") == 0
    assert "<|user|>" not in tokens.text(plain.context, plain.question, template=plain.template)

    short = longbench.jobs(folder, tokens, 600, ["qasper"], None, 2, 0)
    assert len(short) == 2
    trimmed = short[0].make()
    assert tokens.size(trimmed.context + trimmed.question) == 600 and trimmed.question.endswith("Answer:")
    assert trimmed.context[:20] == sample.context[:20]

    prompts = tmp_path / "dataset2prompt.json"
    prompts.write_text(json.dumps({"qasper": "Published. {context} | {input}"}))
    published = longbench.jobs(folder, tokens, 10_000, ["qasper"], prompts, None, 0)
    made = published[2].make()
    assert made.context.startswith("Published. Fact 2") and made.question == " | Q2?"
    assert published[2].knobs != jobs[2].knobs


def test_longbench_says_what_is_not_there(folder, tmp_path):
    cases = [
        ((tmp_path, None), "none of narrativeqa.jsonl"),
        ((folder, ["musique"]), "no musique.jsonl"),
        ((folder, ["dureader"]), "--tasks dureader: LongBench's English tasks are"),
    ]
    for (where, wanted), message in cases:
        with pytest.raises(ValueError, match=message):
            longbench.jobs(where, None, 100, wanted, None, None, 0)
    (folder / "lcc.jsonl").write_text('\n{"context": "x", "input": ""}\n')
    with pytest.raises(ValueError, match="lcc.jsonl line 2: no answers"):
        longbench.jobs(folder, None, 100, ["lcc"], None, None, 0)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (r"so \boxed{042}.", 42),
        (r"\boxed{1} but no: \boxed{ 2 }", 2),
        (r"\boxed{\text{ }113}", 113),
        (r"<think>\boxed{5}</think> The final answer is $\boxed{7}$", 7),
        (r"<think>\boxed{5}</think> I am not sure", None),
        (r"\boxed{\frac{1}{2}}", None),
        (r"\boxed{x = 5}", None),
        (r"\boxed{3.5}", None),
        (r"\boxed{90^\circ}", 90),
        (r"\boxed{12", None),
        ("The answer is 17.", 17),
        ("Answer: 1,024", 1024),
        ("The answer is 3.5", None),
        ("first 17, then 18", None),
    ],
)
def test_final_integer(text, value):
    assert aime.final_integer(text) == value


def test_aime_files(tmp_path):
    lines = tmp_path / "aime24.jsonl"
    lines.write_text('{"problem": "P0", "answer": "033"}\n{"question": "P1", "answer": 7}\n')
    assert aime.read(lines) == [("P0", 33), ("P1", 7)]
    listed = tmp_path / "list.json"
    listed.write_text(json.dumps([{"problem": "P", "answer": "0"}]))
    assert aime.read(listed) == [("P", 0)]
    listed.write_text(json.dumps([{"problem": "P", "answer": "x"}]))
    with pytest.raises(ValueError, match="list.json record 1"):
        aime.read(listed)
    jobs = aime.jobs(lines, 2, 50)
    assert [(j.task, j.trial) for j in jobs] == [("aime/aime24", i) for i in range(4)]
    sample = jobs[3].make()
    assert sample.context == "P1" and sample.new_tokens == 50 and sample.trial == 3
    assert (sample.score(r"\boxed{7}"), sample.score("7")) == (1, 0)
