"""SGLang's own load generators as subprocesses: their command lines, their JSON, their errors.

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
    """The server that is loaded."""

    url: str
    model: str
    tokenizer: str


def serving_command(target: Target, out: Path, load: Sequence[str], answer: int, warm: bool, flush: bool) -> list[str]:
    """bench_serving on prompts of token ids. answer: tokens of every answer. flush: empty the cache first, after
    ``warm`` has sent one request of the load."""
    # Without special tokens an answer of random weights can be empty text, of which bench_serving takes no time.
    sampling = {"temperature": 0, "max_new_tokens": answer, "ignore_eos": True, "skip_special_tokens": False}
    return [
        *(sys.executable, "-m", SERVING, "--backend", "sglang", "--base-url", target.url),
        *("--model", target.model, "--tokenizer", target.tokenizer, "--tokenize-prompt", *load),
        *("--extra-request-body", json.dumps({"sampling_params": sampling})),
        *("--warmup-requests", str(int(warm)), *(["--flush-cache"] if flush else [])),
        *("--cache-report", "--disable-tqdm", "--output-details", "--output-file", str(out)),
    ]


def one_batch_command(target: Target, out: Path, batch: int, lengths: Sequence[int], answer: int) -> list[str]:
    """bench_one_batch_server: each length in turn, the cache emptied before each. A length that stands twice is
    measured twice, with other prompts."""
    return [
        *(sys.executable, "-m", ONE_BATCH, "--model", "None", "--base-url", target.url),
        *("--local-tokenizer-path", target.tokenizer, "--dataset-name", "random-ids"),
        *("--batch-size", str(batch), "--input-len", *map(str, lengths), "--output-len", str(answer)),
        *("--result-filename", str(out), "--no-append-to-github-summary"),
    ]


def environment(home: str) -> dict[str, str]:
    """bench_serving keeps prompts of shared prefixes in ~/.cache by the *class* of the tokenizer: two models would be
    sent the same token ids. So every run gets a home of its own, in which only the hub's cache is the user's."""
    hub = os.environ.get("HF_HOME", str(Path.home() / ".cache" / "huggingface"))
    local = {name: f"{os.environ.get(name, '')},127.0.0.1".lstrip(",") for name in ("no_proxy", "NO_PROXY")}
    return {**os.environ, "PYTHONSAFEPATH": "1", "HOME": home, "HF_HOME": hub, **local}


class Process:
    """A load generator. Its whole process group ends with the with block."""

    def __init__(self, command: list[str], log: Path):
        self._home = tempfile.TemporaryDirectory()
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as out:
            self.process = subprocess.Popen(
                command, stdout=out, stderr=subprocess.STDOUT, env=environment(self._home.name), start_new_session=True
            )

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait()
        self._home.cleanup()

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def error(self, what: str) -> BenchError:
        return BenchError("\n".join([f"the load generator {what}:", *self.output().splitlines()[-20:]]))

    def done(self, deadline: float) -> bool:
        """Whether it ended well. BenchError if it did not, TimeoutError after the deadline (time.monotonic)."""
        code = self.process.poll()
        if code:
            raise self.error(f"ended with exit code {code}")
        if code is None and time.monotonic() > deadline:
            raise TimeoutError("the time for it was over")
        return code == 0


def serving(command: list[str], out: Path, log: Path, timeout: float) -> dict:
    """One result of bench_serving, checked. BenchError, TimeoutError."""
    out.unlink(missing_ok=True)  # it appends
    deadline = time.monotonic() + timeout
    with Process(command, log) as process:
        while not process.done(deadline):
            time.sleep(0.2)
        if not out.exists():
            raise process.error("wrote no result")
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
    for name in ("output_throughput", "median_ttft_ms", "p99_ttft_ms", "median_tpot_ms", "p99_tpot_ms"):
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


def one_batch(command: list[str], out: Path, log: Path, timeout: float) -> Iterator[dict | Skipped]:
    """Results of bench_one_batch_server as they come, then what it left out. BenchError, TimeoutError."""
    out.unlink(missing_ok=True)  # it appends
    deadline, seen = time.monotonic() + timeout, 0
    with Process(command, log) as process:
        while True:
            done = process.done(deadline)  # before reading: the last line was written by then
            lines = out.read_text().split("\n")[:-1] if out.exists() else []  # the last part is no whole line yet
            yield from map(json.loads, lines[seen:])
            seen = len(lines)
            if done:
                break
            time.sleep(0.2)
        text = process.output()
    yield from parse_skips(text)
