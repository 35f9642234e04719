"""Samples to a server, several at a time, and their answers to the record."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

import requests

from ..launch import ServerError
from ..server_steps import Budget, summary
from .client import Client
from .prompts import Sample
from .record import Answer, Record, key


@dataclass(frozen=True)
class Job:
    """A sample that is made only when it is asked."""

    task: str
    length: int | str | None
    depth: float | None
    trial: int
    knobs: dict = field(hash=False)
    make: Callable[[], Sample] = field(compare=False)

    def key(self, config: str, engine: str) -> tuple:
        return key(config, engine, self.task, self.length, self.depth, self.trial, self.knobs)

    def __str__(self) -> str:
        where = [] if self.length is None else [f"{self.length}"]
        where += [] if self.depth is None else [f"depth {self.depth:g}"]
        return " ".join([self.task, *where, f"trial {self.trial}"])


def in_turn(jobs: Sequence[Job]) -> list[Job]:
    """One sample of every cell after another, each depth once before any is asked again: a run that is cut short has
    some of all."""
    cells: dict[tuple, list[Job]] = {}
    for job in sorted(jobs, key=lambda job: job.trial):
        cells.setdefault((job.task, job.length, tuple(job.knobs.items())), []).append(job)
    places = [(i / len(cell), job) for cell in cells.values() for i, job in enumerate(cell)]
    return [job for _, job in sorted(places, key=lambda place: place[0])]


def ask_all(
    jobs: Sequence[Job],
    client: Client,
    concurrency: int,
    budget: Budget,
    keep: Callable[[Job, Sample, float, object], None],
) -> str | None:
    """Ask every job; ``keep`` gets each answer. The first error ends it and is returned, a spent budget ends it."""
    stop, making, errors = threading.Event(), threading.Lock(), []

    def one(job: Job) -> None:
        if stop.is_set() or budget.left <= 0:
            return
        try:
            with making:  # tokenizers are not made for several threads
                sample = job.make()
            reply = client.ask(sample, budget.timeout())
            keep(job, sample, sample.score(reply.text), reply)
        except (ServerError, requests.RequestException, ValueError, TimeoutError) as e:
            stop.set()
            if budget.left > 0:  # else it was only cut off
                errors.append(f"{job}: {e}")
        except BaseException:
            stop.set()
            raise

    with ThreadPoolExecutor(concurrency) as pool:
        try:
            for future in [pool.submit(one, job) for job in jobs]:
                future.result()
        finally:  # told to end: those that were not sent yet are not sent any more
            stop.set()
    return errors[0] if errors else None


@contextmanager
def noted(config: str, budget: Budget, failed: dict[str, str]) -> Iterator[None]:
    """A configuration whose server does not start or answer is noted in ``failed`` and printed."""
    try:
        yield
    except (ServerError, requests.RequestException) as e:
        if budget.left > 0:  # else it was only cut off
            failed[config] = summary(str(e))
        print(f"{config}: {e}", file=sys.stderr, flush=True)


def report(failed: dict[str, str], missing: dict[str, int]) -> int:
    """Print what failed and how many samples are missing, by configuration; the program's exit status."""
    for config, error in failed.items():
        print(f"{config}: {error}", file=sys.stderr)
    if missing:
        print("not measured: " + ", ".join(f"{n} samples of {c}" for c, n in missing.items()), file=sys.stderr)
    return 1 if failed else 0


def open_jobs(jobs: Sequence[Job], config: str, engine: str, record: Record) -> list[Job]:
    """Those without an answer."""
    return [job for job in jobs if job.key(config, engine) not in record.answers]


def measure(
    jobs: Sequence[Job],
    config: str,
    engine: str,
    client: Client,
    concurrency: int,
    budget: Budget,
    record: Record,
) -> str | None:
    """Every open job of a configuration. What went wrong, or None."""
    todo = open_jobs(jobs, config, engine, record)
    every = max(1, len(todo) // 10)
    done = 0
    lock = threading.Lock()

    def keep(job: Job, sample: Sample, score: float, reply) -> None:
        nonlocal done
        record.add(
            Answer(
                config,
                engine,
                job.task,
                job.length,
                job.depth,
                job.trial,
                job.knobs,
                round(score, 6),
                score == 1 if sample.binary else None,
                reply.text,
                reply.prompt_tokens,
                reply.cached_tokens,
                reply.completion_tokens,
                reply.finish,
            )
        )
        with lock:
            done += 1
            if done % every == 0:
                record.write()
                print(f"{config}: {done} of {len(todo)}", flush=True)

    error = ask_all(todo, client, concurrency, budget, keep)
    record.write()
    return error
