"""SGLang's own load generators in a process beside: their command lines, their JSON, their errors.

``sglang.benchmark.serving`` (bench_serving) for streams of requests, ``sglang.benchmark.one_batch_server``
(bench_one_batch_server) for one batch at a time. Both are pointed at a running server and work offline.
"""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

SERVING = "sglang.benchmark.serving"
ONE_BATCH = "sglang.benchmark.one_batch_server"


class BenchError(RuntimeError):
    """A load generator failed, or its figures cannot be trusted. The message ends with its last words."""


@dataclass(frozen=True)
class Target:
    """The server that is loaded. word: for random weights, the token that every answer consists of."""

    url: str
    model: str
    tokenizer: str
    word: int | None = None


def serving_command(target: Target, out: Path, load: Sequence[str], answer: int, warm: bool, flush: bool) -> list[str]:
    """bench_serving on prompts of token ids. answer: tokens of every answer. flush: empty the cache first, after
    ``warm`` has sent one request of the load."""
    # bench_serving takes no time of a token without text. Random weights choose special tokens, and ones that another
    # model's tokenizer does not have: they are told which token to choose.
    sampling = {"temperature": 0, "max_new_tokens": answer, "ignore_eos": True, "skip_special_tokens": False}
    if target.word is not None:
        sampling["logit_bias"] = {str(target.word): 1000.0}
    return [
        *(SERVING, "--backend", "sglang", "--base-url", target.url),
        *("--model", target.model, "--tokenizer", target.tokenizer, "--tokenize-prompt", *load),
        *("--extra-request-body", json.dumps({"sampling_params": sampling})),
        *("--warmup-requests", str(int(warm)), *(["--flush-cache"] if flush else [])),
        *("--cache-report", "--disable-tqdm", "--output-details", "--output-file", str(out)),
    ]


def one_batch_command(target: Target, out: Path, batch: int, lengths: Sequence[int], answer: int) -> list[str]:
    """bench_one_batch_server: each length in turn, the cache emptied before each. A length that stands twice is
    measured twice, with other prompts."""
    return [
        *(ONE_BATCH, "--model", "None", "--base-url", target.url),
        *("--local-tokenizer-path", target.tokenizer, "--dataset-name", "random-ids"),
        *("--batch-size", str(batch), "--input-len", *map(str, lengths), "--output-len", str(answer)),
        *("--result-filename", str(out), "--no-append-to-github-summary"),
    ]


def environment() -> dict[str, str]:
    """Of the load generators: no proxy to this machine, and the user's own hub cache, whatever HOME is."""
    hub = os.environ.get("HF_HOME", str(Path.home() / ".cache" / "huggingface"))
    local = {name: f"{os.environ.get(name, '')},127.0.0.1".lstrip(",") for name in ("no_proxy", "NO_PROXY")}
    return {**os.environ, "PYTHONSAFEPATH": "1", "HF_HOME": hub, **local}


class NoGenerators(BenchError):
    """SGLang's load generators cannot be imported: no server is worth starting."""


class Worker:
    """The process in which load generators run, see worker.py. It starts with :meth:`start` or its first command, and
    anew after :meth:`stop` or a command that failed to end; it ends with the with block."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._process: subprocess.Popen | None = None
        self._count = 0

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._folder.cleanup()

    @property
    def log(self) -> Path:
        """What it said before its first command."""
        return Path(self._folder.name) / "worker.log"

    def start(self) -> subprocess.Popen:
        """Its process, which imports while a server starts."""
        if self._process is None:
            script = Path(__file__).with_name("worker.py")
            with self.log.open("w") as out:
                self._process = subprocess.Popen(
                    [sys.executable, str(script), SERVING, ONE_BATCH],
                    stdin=subprocess.PIPE,
                    bufsize=0,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    env=environment(),
                    start_new_session=True,
                )
        return self._process

    def check(self) -> None:
        """NoGenerators where it ended before its first command, which is when it imports."""
        if self._process is not None and not self._count and self._process.poll() is not None:
            said = self.log.read_text(errors="replace").strip().splitlines()
            raise NoGenerators(
                f"SGLang's load generators cannot be imported: {said[-1] if said else 'no reason given'}"
            )

    def stop(self) -> None:
        """End it with all that it started."""
        if self._process is None:
            return
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self._process.wait()
        self._process.stdin.close()
        self._process = None

    def run(self, command: Sequence[str], log: Path) -> Job:
        """Start a command: module, then its arguments."""
        process = self.start()
        log.parent.mkdir(parents=True, exist_ok=True)
        log.unlink(missing_ok=True)
        self._count += 1
        # bench_serving keeps prompts of shared prefixes in ~/.cache by the *class* of the tokenizer: two models would
        # be sent the same token ids. So every command has a home of its own.
        home = Path(self._folder.name) / str(self._count)
        home.mkdir()
        done = home / "done"
        line = {"argv": list(command), "log": str(log.absolute()), "home": str(home), "done": str(done)}
        try:
            process.stdin.write(json.dumps(line).encode() + b"\n")
            process.stdin.flush()
        except BrokenPipeError:
            pass  # Job.done says what it died of
        return Job(self, process, log, done)


@dataclass
class Job:
    """A load generator at work. With its with block ends what has not ended by itself."""

    worker: Worker
    process: subprocess.Popen
    log: Path
    _done: Path

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        if not self._done.exists():
            self.worker.stop()

    def output(self) -> str:
        log = self.log if self.log.exists() else self.worker.log
        return log.read_text(errors="replace")

    def error(self, what: str) -> BenchError:
        return BenchError("\n".join([f"the load generator {what}:", *self.output().splitlines()[-20:]]))

    def done(self, deadline: float) -> bool:
        """Whether it ended well. BenchError if it did not, TimeoutError after the deadline (time.monotonic)."""
        died = self.process.poll()  # before looking: what it ended with was written by then
        if self._done.exists():
            if code := int(self._done.read_text()):
                raise self.error(f"ended with exit code {code}")
            return True
        if died is not None:
            raise self.error(f"died with exit code {died}")
        if time.monotonic() > deadline:
            raise TimeoutError("the time for it was over")
        return False


def serving(worker: Worker, command: list[str], out: Path, log: Path, timeout: float) -> dict:
    """One result of bench_serving, checked. BenchError, TimeoutError."""
    out.unlink(missing_ok=True)  # it appends
    deadline = time.monotonic() + timeout
    with worker.run(command, log) as job:
        while not job.done(deadline):
            time.sleep(0.1)
        if not out.exists():
            raise job.error("wrote no result")
    return parse_serving(out.read_text())


def parse_serving(text: str) -> dict:
    """The last line of bench_serving's file. BenchError where a request failed or no time was taken."""
    lines = text.splitlines()
    if not lines:
        raise BenchError("bench_serving wrote an empty result")
    result = json.loads(lines[-1])
    errors = [error for error in result["errors"] if error]
    if errors:
        raise BenchError(f"{len(errors)} of {len(result['errors'])} requests failed: {errors[0].strip()[-300:]}")
    if not result["completed"]:
        raise BenchError("no request was completed")
    if not all(first > 0 for first in result["ttfts"]):
        raise BenchError("some answers had no text, so that bench_serving took no time to the first token")
    for name in (
        "output_throughput",
        "median_ttft_ms",
        "p99_ttft_ms",
        "median_tpot_ms",
        "p99_tpot_ms",
        "median_itl_ms",
    ):
        if not math.isfinite(result[name]):
            raise BenchError(f"bench_serving says {name} is {result[name]}")
    return result


@dataclass(frozen=True)
class Skipped:
    """What bench_one_batch_server left out, and its reason."""

    batch: int
    length: int
    note: str


def parse_skips(text: str) -> list[Skipped]:
    pattern = r"Skip benchmark batch_size=(\d+)(?: input_len=(\d+) output_len=\d+: (.*?due to kv cache limit))?"
    out = []
    for batch, length, why in re.findall(pattern, text):
        if not length:
            raise BenchError(f"the server takes fewer than {batch} requests at a time: raise --max-running-requests")
        counts = re.search(r"resident_tokens=(\d+) > skip_token_capacity_threshold=(\d+)", why)
        note = f"{counts[1]} tokens are needed, {counts[2]} fit" if counts else why
        out.append(Skipped(int(batch), int(length), note))
    return out


def one_batch(worker: Worker, command: list[str], out: Path, log: Path, timeout: float) -> Iterator[dict | Skipped]:
    """Results of bench_one_batch_server as they come, then what it left out. BenchError, TimeoutError."""
    out.unlink(missing_ok=True)  # it appends
    deadline, seen = time.monotonic() + timeout, 0
    with worker.run(command, log) as job:
        while True:
            done = job.done(deadline)  # before reading: the last line was written by then
            lines = out.read_text().split("\n")[:-1] if out.exists() else []  # the last part is no whole line yet
            yield from map(json.loads, lines[seen:])
            seen = len(lines)
            if done:
                break
            time.sleep(0.1)
        text = job.output()
    yield from parse_skips(text)
