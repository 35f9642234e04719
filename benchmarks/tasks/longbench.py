"""LongBench's English tasks from a local copy of the data (arXiv 2308.14508).

DIR holds ``NAME.jsonl`` as published, LongBench-E's ``NAME_e.jsonl``, or both; each line an object with ``context``,
``input``, ``answers`` (any of which may be matched), ``all_classes`` and ``length``. Prompts have the published
structure in words of our own: task, context, task again, question, cue. The published words are read from
``dataset2prompt.json`` of the benchmark's repository, if it is given.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from . import metrics
from .prompts import Sample, Tokens
from .run import Job

BRIEF = "Give a short answer, a phrase where that will do, and nothing else."
PASSAGES = f"Use the passages to answer the question. {BRIEF}"
PAPER = (
    f"Use the article to answer the question. {BRIEF} To a yes/no question, answer yes or no. If the article does not "
    "hold the answer, write unanswerable."
)


def _twice(task: str, name: str, cue: str) -> str:
    """Task, context, task again, cue."""
    return f"{task}\n\n{name}:\n{{context}}\n\n{task}\n\n{cue}"


@dataclass(frozen=True)
class Task:
    metric: Callable[..., float]
    new_tokens: int
    prompt: str
    template: bool = True  # few-shot and code tasks are published without a chat template
    first_line: bool = False  # only the answer's first line is scored


QA = "Question: {input}\nAnswer:"
TASKS = {
    "narrativeqa": Task(metrics.f1, 128, _twice(f"Answer the question about the story. {BRIEF}", "Story", QA)),
    "qasper": Task(metrics.f1, 128, _twice(PAPER, "Article", QA)),
    "multifieldqa_en": Task(metrics.f1, 64, _twice(f"Use the text to answer the question. {BRIEF}", "Text", QA)),
    "hotpotqa": Task(metrics.f1, 32, _twice(PASSAGES, "Passages", QA)),
    "2wikimqa": Task(metrics.f1, 32, _twice(PASSAGES, "Passages", QA)),
    "musique": Task(metrics.f1, 32, _twice(PASSAGES, "Passages", QA)),
    "gov_report": Task(
        metrics.rouge_l, 512, _twice("Summarize the government report on one page.", "Report", "Summary:")
    ),
    "qmsum": Task(
        metrics.rouge_l,
        512,
        _twice("Answer the query about the meeting in a few sentences.", "Transcript", "Query: {input}\nAnswer:"),
    ),
    "multi_news": Task(metrics.rouge_l, 512, _twice("Summarize all the news on one page.", "News", "Summary:")),
    "trec": Task(
        metrics.classification,
        64,
        "Name the type of the last question. Other questions and their types come first.\n\n{context}\n{input}",
        template=False,
        first_line=True,
    ),
    "triviaqa": Task(
        metrics.f1, 32, f"{PASSAGES} Examples come first.\n\n{{context}}\n\n{{input}}", template=False, first_line=True
    ),
    "samsum": Task(
        metrics.rouge_l,
        128,
        "Sum up the last dialogue in a few short sentences. Examples come first.\n\n{context}\n\n{input}",
        template=False,
        first_line=True,
    ),
    "passage_count": Task(
        metrics.count,
        32,
        "Some of these paragraphs from Wikipedia may be there more than once.\n\n{context}\n\nHow many different "
        "paragraphs are there? Answer with the number alone.\n\nThe number of different paragraphs: ",
    ),
    "passage_retrieval_en": Task(
        metrics.retrieval,
        32,
        "One of these paragraphs from Wikipedia is summarized after them.\n\n{context}\n\nSummary:\n\n{input}\n\n"
        'Which paragraph is it? Answer in the form "Paragraph 1".\n\nAnswer: ',
    ),
    "lcc": Task(metrics.code_similarity, 64, "Continue this code.\n{context}Next line of code:\n", template=False),
    "repobench-p": Task(
        metrics.code_similarity, 64, "Continue this code.\n{context}{input}Next line of code:\n", template=False
    ),
}
BUCKETS = ((4000, "0-4k"), (8000, "4-8k"))  # LongBench-E reports by words of the text


def bucket(words: int) -> str:
    return next((name for end, name in BUCKETS if words < end), "8k+")


def score(name: str, text: str, answers: list[str], classes: list[str] | None) -> float:
    """The best score over the answers."""
    task = TASKS[name]
    if task.first_line:
        text = text.lstrip("\n").split("\n")[0]
    extra = {"classes": classes or []} if task.metric is metrics.classification else {}
    return max(task.metric(text, answer, **extra) for answer in answers)


def trim(tokens: Tokens, context: str, question: str, most: int) -> tuple[str, str]:
    """The prompt without its middle, where it has more than ``most`` tokens."""
    ids = tokens.tokenizer(context + question, add_special_tokens=False)["input_ids"]
    if len(ids) <= most:
        return context, question
    half = most // 2
    text = "".join(tokens.tokenizer.decode(part, skip_special_tokens=True) for part in (ids[:half], ids[-half:]))
    if text.endswith(question):
        return text[: -len(question)], question
    return text, ""


def read(file: Path) -> list[dict]:
    """Records of one file. ValueError names the line that is not one."""
    out = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        record = json.loads(line)
        lacking = [name for name in ("context", "input", "answers") if name not in record]
        if lacking or not record["answers"]:
            raise ValueError(f"{file.name} line {number}: no {', '.join(lacking) or 'answers'}")
        out.append(record)
    return out


def sample(name: str, record: dict, trial: int, prompt: str, tokens: Tokens, most: int) -> Sample:
    task = TASKS[name]
    before, found, after = prompt.partition("{context}")
    if not found:
        raise ValueError(f"{name}: its prompt has no {{context}}")
    # Not str.format: contexts and questions are full of braces.
    before, after = (part.replace("{input}", record["input"]) for part in (before, after))
    context, question = trim(tokens, before + record["context"], after, most)
    classes = record.get("all_classes")
    return Sample(
        name,
        context.lstrip() if task.template else context,
        question.rstrip() if task.template else question,  # templates may do so themselves
        partial(score, name, answers=record["answers"], classes=classes),
        task.new_tokens,
        trial=trial,
        answers=tuple(record["answers"]),
        binary=False,
        template=task.template,
    )


def jobs(
    folder: Path,
    tokens: Tokens,
    most: int,
    wanted: list[str] | None,
    prompts: Path | None,
    samples: int | None,
    seed: int,
) -> list[Job]:
    """A job per record of every task that the folder has. samples: at most so many of each, chosen by ``seed``.

    ValueError where nothing, or something that is wanted, is not there.
    """
    published = json.loads(prompts.read_text(encoding="utf-8")) if prompts else {}
    names = wanted or [name for name in TASKS for name in (name, f"{name}_e") if (folder / f"{name}.jsonl").exists()]
    if not names:
        raise ValueError(f"--longbench {folder.name}: none of {', '.join(f'{name}.jsonl' for name in TASKS)} is there")
    out: list[Job] = []
    for name in names:
        base, file = name.removesuffix("_e"), folder / f"{name}.jsonl"
        if base not in TASKS:
            raise ValueError(
                f"--tasks {name}: LongBench's English tasks are {', '.join(TASKS)}, each with _e or without"
            )
        if not file.exists():
            raise ValueError(f"--tasks {name}: there is no {file.name} in the folder")
        if prompts and base not in published:
            raise ValueError(f"--longbench-prompts {prompts.name}: it has no prompt for {base}")
        prompt = published.get(base, TASKS[base].prompt)
        records = read(file)
        chosen = range(len(records))
        if samples is not None and samples < len(records):
            chosen = sorted(random.Random(f"{seed} {name}").sample(chosen, samples))
        digest = hashlib.sha256(file.read_bytes() + prompt.encode()).hexdigest()[:8]
        about = {"max_length": most, "prompt": "published" if prompts else "own", "sha256": digest}
        for i in chosen:
            length = bucket(records[i]["length"]) if name.endswith("_e") and "length" in records[i] else None
            make = partial(sample, base, records[i], i, prompt, tokens, most)
            out.append(Job(f"longbench/{name}", length, None, i, about, make))
    return out
