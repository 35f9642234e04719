"""Questions to an engine, and answers to the reference that reads them, several at a time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from threading import Lock
from typing import Any

from ..server_steps import Budget
from ..tasks.run import Job, ask_all, open_jobs
from .engines import Engine, Reading, Reply
from .questions import Question, Test
from .record import Answer, Read, Record

LINES = 10  # of progress


@dataclass
class Asker:
    """An engine as tasks.run.ask_all asks it."""

    engine: Any

    def ask(self, question: Question, timeout: float) -> Reply | Reading:
        return question.ask(self.engine, timeout)


def rows(chosen: dict[str, Test], record: Record) -> list[dict]:
    """Of every configuration that has answers, test by test."""
    answers: dict[tuple, list[Answer]] = defaultdict(list)
    for _, a in sorted(record.answers.items(), key=lambda item: item[1].sample):
        answers[a.config, a.engine, a.test].append(a)
    out = []
    for config, engine in dict.fromkeys((a.config, a.engine) for a in record.answers.values()):
        for name, test in chosen.items():
            if group := answers.get((config, engine, name)):
                read = [record.readings[a.key].behind for a in group if a.key in record.readings]
                out += [{"config": config, "engine": engine, **asdict(row)} for row in test.rows(group, read)]
    return out


def measure(
    jobs: Sequence[Job],
    config: str,
    name: str,
    engine: Engine,
    concurrency: int,
    budget: Budget,
    record: Record,
) -> str | None:
    """Every open job of a configuration, whose engine is called ``name``. What went wrong, or None."""
    todo, lock, done = open_jobs(jobs, config, name, record), Lock(), 0

    def keep(job: Job, question: Question, figures: dict, reply: Reply) -> None:
        nonlocal done
        record.add(Answer(config, name, job.task, job.trial, figures, reply))
        with lock:
            done += 1
            if done % max(1, len(todo) // LINES) == 0:
                print(f"{config}: {done} of {len(todo)}", flush=True)

    return ask_all(todo, Asker(engine), concurrency, budget, keep)


def unread(chosen: dict[str, Test], record: Record) -> list[Answer]:
    """Answers that the reference has yet to read."""
    return [
        a for a in record.answers.values() if a.test in chosen and chosen[a.test].reads and a.key not in record.readings
    ]


def read(chosen: dict[str, Test], engine: Engine, concurrency: int, budget: Budget, record: Record) -> str | None:
    """Every unread answer, after the prompt that it answers. What went wrong, or None."""
    todo = {a.key: a for a in unread(chosen, record)}

    def made(a: Answer) -> Question:
        prompt = list(chosen[a.test].question(a.sample).prompt)
        return Question(lambda engine, timeout: engine.read([*prompt, *a.reply.ids], len(prompt), timeout))

    jobs = [
        Job(a.test, None, None, a.sample, {"of": a.config, "by": a.engine}, partial(made, a)) for a in todo.values()
    ]

    def keep(job: Job, question: Question, figures: dict, reading: Reading) -> None:
        record.add(Read(job.knobs["of"], job.knobs["by"], job.task, job.trial, list(reading.behind)))

    print(f"{len(jobs)} answers to read", flush=True)
    return ask_all(jobs, Asker(engine), concurrency, budget, keep)
