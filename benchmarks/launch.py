"""Start ``sglang.launch_server`` processes, wait for them, ask them, stop them."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from http.client import HTTPConnection
from importlib.metadata import entry_points
from pathlib import Path
from types import FrameType

import requests

READY = "fired up"  # SGLang logs it once its own warm-up request was answered
STREAM_END = b"[DONE]"


class ServerError(RuntimeError):
    """A server died, did not start in time, or answered with an error. The message ends with its last words."""


def missing_plugin(args: Iterable[str]) -> str | None:
    """What is wrong if server arguments ask for a packed cache and SGLang would not find the plugin.

    A server would say so, too, after a minute, and a benchmark only when the servers before it are done.
    """
    if not any(arg.startswith("--kv-quant") for arg in args):
        return None
    if entry_points(group="sglang.srt.plugins", name="blockgtq"):
        return None
    return "--kv-quant: sglang-blockgtq is not installed for this Python, so its servers cannot start; pip install it"


def plugin_path(folder: Path) -> dict[str, str]:
    """Variables of a server that finds what lies in ``folder``, too: an SGLang plugin, or modules in others' place."""
    return {"PYTHONPATH": os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))}


@dataclass(frozen=True)
class Stream:
    """One streamed answer. arrivals: (seconds after the request was sent, tokens generated so far) of each event.

    came: tokens of the prompt by where they were cached ("device", "host"), with --enable-cache-report.
    """

    arrivals: tuple[tuple[float, int], ...]
    cached_tokens: int
    came: dict[str, int] = field(default_factory=dict)

    @property
    def first(self) -> float:
        """Seconds to the first token."""
        return self.arrivals[0][0]

    def gaps(self, drop: int = 0) -> list[float]:
        """Seconds between consecutive tokens, without the first ``drop``. Tokens of one event share its gap."""
        gaps: list[float] = []
        for (t0, n0), (t1, n1) in zip(self.arrivals, self.arrivals[1:], strict=False):
            gaps += [(t1 - t0) / (n1 - n0)] * (n1 - n0)
        return gaps[drop:]


class Server:
    """A server process. It starts here, is waited for with :meth:`wait`, and stops when the with block ends.

    log: file for its output; by default a temporary one, removed when the with block ends. env: more variables.
    """

    def __init__(self, model: str, *args: str, log: Path | None = None, env: Mapping[str, str] | None = None):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.port = s.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._temporary = log is None
        if log is None:
            handle, name = tempfile.mkstemp(suffix=".log")
            os.close(handle)
            log = Path(name)
        self.log = log
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.start_s: float | None = None
        self._stopped = False
        self._session = requests.Session()
        self._session.trust_env = False  # a proxy is not for the machine itself
        command = [sys.executable, "-m", "sglang.launch_server", "--model-path", model, "--port", str(self.port), *args]
        self._started = time.monotonic()
        with self.log.open("w") as out:
            self.process = subprocess.Popen(
                command,
                stdout=out,
                stderr=subprocess.STDOUT,
                # A server started in the clone must not take its folders for packages.
                env={**os.environ, "PYTHONSAFEPATH": "1", **(env or {})},
                start_new_session=True,
            )

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._session.close()
        if self._temporary:
            self.log.unlink(missing_ok=True)

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def error(self, what: str) -> ServerError:
        return ServerError("\n".join([f"the server {what}:", *self.output().splitlines()[-30:]]))

    def ready(self) -> bool:
        """Whether it answers; notes ``start_s``, the seconds from launch until it did. ServerError if it died."""
        if self.start_s is None:
            # The exit code first: a server that ends in between has then written its last line.
            code = self.process.poll()
            if READY in self.output():
                self.start_s = time.monotonic() - self._started
            elif code is not None:
                raise self.error(f"died with exit code {code}")
        return self.start_s is not None

    def wait(self, timeout: float = 900, meanwhile: Callable[[], object] = lambda: None) -> Server:
        """Until it answers, calling ``meanwhile`` again and again. ServerError if it died or took longer."""
        failed = wait_for([self], timeout, meanwhile)
        if failed:
            raise failed[self]
        return self

    def stop(self) -> None:
        """End it and every process it started, and wait until their GPU memory is free again."""
        if self._stopped:
            return
        self._stopped = True
        for sig, seconds in ((signal.SIGTERM, 20), (signal.SIGKILL, 5)):
            try:
                os.killpg(self.process.pid, sig)
                self.process.wait(seconds)
            except subprocess.TimeoutExpired:
                continue
            except ProcessLookupError:
                break
        deadline = time.monotonic() + 3  # children that nobody reaps stay in the group
        while time.monotonic() < deadline:
            try:
                os.killpg(self.process.pid, 0)
            except ProcessLookupError:
                return
            time.sleep(0.1)

    def info(self) -> dict:
        response = self._session.get(self.url + "/server_info", timeout=60)
        response.raise_for_status()
        return response.json()

    def metrics(self) -> str:
        """Prometheus text; the server needs --enable-metrics."""
        response = self._session.get(self.url + "/metrics", timeout=60)
        response.raise_for_status()
        return response.text

    def flush(self) -> None:
        """Empty the prefix cache; waits for requests that are just ending."""
        response = self._session.post(self.url + "/flush_cache?timeout=10", timeout=60)
        response.raise_for_status()

    def generate(self, ids: list[int], new: int = 1, logprob_start: int = -1) -> dict:
        """``meta_info`` of one greedy request with log-probabilities."""
        body = {**_request(ids, new), "return_logprob": True, "logprob_start_len": logprob_start}
        response = self._session.post(self.url + "/generate", json=body, timeout=1800)
        response.raise_for_status()
        return response.json()["meta_info"]

    def logprobs(self, ids: list[int], start: int) -> tuple[list[float], int]:
        """Of the prompt's tokens after ``start``, and how many tokens came from the prefix cache."""
        meta = self.generate(ids, logprob_start=start)
        return [lp for lp, *_ in meta["input_token_logprobs"][-(len(ids) - start - 1) :]], meta["cached_tokens"]

    def stream(self, ids: list[int], new: int = 1, timeout: float = 1800) -> Stream:
        """One greedy request of ``new`` tokens, timed as they arrive. TimeoutError, ServerError."""
        body = json.dumps({**_request(ids, new), "stream": True}).encode()  # before the clock starts
        connection = HTTPConnection("127.0.0.1", self.port, timeout=max(timeout, 0.1))
        arrivals, meta = [], {}
        try:
            connection.connect()
            start = time.perf_counter()
            connection.request("POST", "/generate", body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            if response.status != 200:
                raise ServerError(f"/generate answered {response.status}: {response.read(2000).decode()}")
            while line := response.readline():
                now = time.perf_counter() - start
                if not line.startswith(b"data:"):
                    continue
                data = line[5:].strip()
                if data == STREAM_END:
                    break
                event = json.loads(data)
                if "error" in event:
                    raise ServerError(f"/generate: {event['error']}")
                meta = event["meta_info"]
                if not arrivals or meta["completion_tokens"] > arrivals[-1][1]:
                    arrivals.append((now, meta["completion_tokens"]))
        finally:
            connection.close()
        if not arrivals or arrivals[-1][1] != new:
            raise self.error(f"streamed {arrivals[-1][1] if arrivals else 0} of {new} tokens")
        came = {place: n for place, n in (meta.get("cached_tokens_details") or {}).items() if isinstance(n, int) and n}
        return Stream(tuple(arrivals), meta["cached_tokens"], came)


def _request(ids: list[int], new: int) -> dict:
    return {"input_ids": ids, "sampling_params": {"max_new_tokens": new, "temperature": 0, "ignore_eos": True}}


def wait_for(
    servers: Iterable[Server], timeout: float, meanwhile: Callable[[], object] = lambda: None
) -> dict[Server, ServerError]:
    """Until each of them answers, has died, or ``timeout`` seconds are over. What went wrong, by server."""
    deadline = time.monotonic() + timeout
    waiting, failed = list(servers), {}
    while waiting:
        for server in list(waiting):
            try:
                if server.ready():
                    waiting.remove(server)
                elif time.monotonic() > deadline:
                    raise server.error(f"did not start within {timeout:.0f} s")
            except ServerError as e:
                failed[server] = e
                waiting.remove(server)
        if waiting:
            meanwhile()
            time.sleep(0.25)
    return failed


def shown(text: str) -> str:
    """A command for a result file: absolute paths, which are one machine's own, become their last part."""
    return re.sub(r"(?<![\w.*])/(?:[^/\s,]+/)+", "", text)


def exit_on_sigterm() -> None:
    """Make SIGTERM leave with blocks in order, so that no server outlives a benchmark that is told to end."""

    def leave(signum: int, frame: FrameType | None) -> None:
        sys.exit(128 + signum)

    signal.signal(signal.SIGTERM, leave)
