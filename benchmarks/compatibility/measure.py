"""The servers of one family, one after another, and what they answered: rows of the CSV."""

from __future__ import annotations

import os
import re
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path

import requests

from .. import server_agreement
from ..launch import Server, ServerError, plugin_path, shown
from .families import Family

COLUMNS = (
    *("family", "like", "heads", "device", "dtype", "page_size", "graphs", "outcome", "words"),
    *("bytes", "bf16_bytes", "tokens", "bf16_tokens"),
    *("cold", "warm", "read", "decode", "hit", "bf16_cold", "bf16_read", "start_s"),
)
PREFIX, LENGTH, NEW = 200, 260, 16  # tokens: several windows; of an answer
START = 400  # seconds
CPU_TOKENS = 2000
PACKED = ["--kv-quant=blockgtq", "--kv-quant-k-bits=8", "--kv-quant-v-bits=8"]
ALONE = Path(__file__).parent / "alone"  # a plugin for servers that share a GPU,
NO_TIME = "no time left"
SIZED = "sized as if alone on the GPU"  # which then say this
_LOADING = threading.Lock()  # transformers is not made for several threads


class OutOfTime(Exception):
    """No server may start any more."""


class AnswerError(Exception):
    """A server answered what is none."""


@dataclass
class Known:
    """Of a family, for the rows of other page sizes. settled: there are none."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    settled: bool = False
    stock: Answers | tuple[str, str] | None = None
    plain: list[float] | tuple[str, str] | None = None


@dataclass
class Run:
    """What is the same for all families. device: "cuda" or "cpu". name: of the GPU, or "cpu". ids: LENGTH tokens.

    fraction: of a GPU's memory that each server takes. stock: also start SGLang's own bf16 cache. work: a folder for
    models, tables and logs that go. end: on time.monotonic(), no server starts after it. logs: folder to keep logs.
    """

    device: str
    name: str
    stock: bool
    fraction: float
    tokenizer: Path
    ids: list[int]
    user_args: list[str]
    work: Path
    end: float = float("inf")
    logs: Path | None = None
    stopped: bool = False
    known: dict[str, Known] = field(default_factory=lambda: defaultdict(Known))
    _servers: set[Server] = field(default_factory=set)

    @property
    def cuda(self) -> bool:
        return self.device == "cuda"

    @property
    def models(self) -> Path:
        return self.work / "models"

    @property
    def dtype(self) -> str:
        return "bfloat16" if self.cuda else "float32"

    def arguments(self, family: Family, page: int | None) -> list[str]:
        """Of a server with packed pages of so many tokens; None: of stock SGLang."""
        args = [f"--device={self.device}", "--random-seed=0"]
        if self.cuda:
            args += ["--dtype=bfloat16", f"--mem-fraction-static={self.fraction}", "--max-running-requests=16"]
            # What a prompt is: a part of it behind a cached beginning, or the whole.
            args += ["--cuda-graph-max-bs-decode=8", "--cuda-graph-bs-prefill", "64", "320", *family.gpu_args]
        else:
            args += [f"--dtype={'bfloat16' if page is None else 'float32'}", "--mem-fraction-static=0.3"]
            args += [f"--max-total-tokens={CPU_TOKENS}"]
            if family.states:
                args += ["--max-running-requests=4", "--max-mamba-cache-size=16"]
        if page is not None:
            args += [*PACKED, f"--kv-quant-cache-dir={self.work}", f"--page-size={page}"]
        return args + self.user_args

    def environment(self, family: Family) -> dict[str, str]:
        env = {"HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        if self.cuda:
            env |= plugin_path(ALONE)
            env["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", "2")
        elif family.states:
            env["TRITON_INTERPRET"] = "1"
        return env

    def log(self, family: Family, page: int | None, folder: Path) -> Path:
        return (self.logs or folder) / f"{family.name}_{'stock' if page is None else page}.log"

    @contextmanager
    def server(self, family: Family, page: int | None, folder: Path) -> Iterator[Server]:
        """Ready to answer. OutOfTime, ServerError."""
        if time.monotonic() > self.end:
            raise OutOfTime
        log = self.log(family, page, folder)
        with Server(str(folder), *self.arguments(family, page), log=log, env=self.environment(family)) as server:
            self._servers.add(server)
            try:
                yield server.wait(START)
            finally:
                self._servers.discard(server)

    def stop(self) -> None:
        """Every server, and let none start."""
        self.end, self.stopped = 0, True
        for server in list(self._servers):
            server.stop()


@dataclass(frozen=True)
class Answers:
    """Log-probabilities: of the tokens after PREFIX in a cold prompt and on its cached beginning; of an answer's
    tokens but the first, as they were generated and as part of a cold prompt. hit: tokens from the cache."""

    cold: list[float]
    warm: list[float]
    decoded: list[float]
    reread: list[float]
    hit: int
    info: dict
    graphs: str
    start_s: float

    @classmethod
    def of(cls, server: Server, ids: list[int]) -> Answers:
        info, prompt = server.info(), ids[:PREFIX]
        cold, _ = server.logprobs(ids, PREFIX)
        server.flush()
        server.generate(prompt)
        warm, hit = server.logprobs(ids, PREFIX)
        server.flush()
        meta = server.generate(prompt, new=NEW)
        made = [(lp, token) for lp, token, *_ in meta["output_token_logprobs"]]
        server.flush()
        reread, _ = server.logprobs(prompt + [token for _, token in made], PREFIX - 1)
        decoded = [lp for lp, _ in made]
        if wrong := [x for x in (*cold, *warm, *decoded, *reread) if x is None or not isfinite(x)]:
            raise AnswerError(f"{len(wrong)} log-probabilities are no numbers")
        return cls(cold, warm, decoded[1:], reread[1:], hit, info, graphs(server.output()), server.start_s or 0)


def exact(family: Family, folder: Path, ids: list[int]) -> list[float] | tuple[str, str]:
    """Log-probabilities of the tokens after PREFIX, by transformers in float32; or "failed" and why."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    auto = AutoModelForCausalLM if family.vision is None else AutoModelForImageTextToText
    try:
        with _LOADING:
            model = auto.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
        with torch.inference_mode():
            logprobs = model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
    except Exception as e:  # a row tells it beside what the servers answered
        return "failed", f"{type(e).__name__}: {shown(str(e))}"[:300]
    return logprobs[PREFIX:-1].gather(1, torch.tensor(ids[PREFIX + 1 :])[:, None])[:, 0].tolist()


def gap(a: list[float], b: list[float]) -> float:
    return round(server_agreement.gap(a, b), 5)


def graphs(output: str) -> str:
    """Which CUDA graphs a server's log says were captured: "decode", "decode and prefill"; "off" for none."""
    return " and ".join(x for x in ("decode", "prefill") if f"Capture target {x} CUDA graph end" in output) or "off"


def why(output: str) -> tuple[str, str]:
    """The outcome of a server that did not start, and its last words."""
    lines = [line for line in output.splitlines() if re.match(r"(error:|[\w.]+(Error|Exception)\b)", line)]
    refused = [line for line in lines if "--kv-quant blockgtq" in line]
    words = (refused or lines or ["no reason found"])[-1]
    return ("refused" if refused and words.startswith("error:") else "failed"), shown(words)[:300]


def ask(run: Run, family: Family, page: int | None, folder: Path) -> Answers | tuple[str, str]:
    """A server's answers, or its outcome and words."""
    try:
        with run.server(family, page, folder) as server:
            if run.cuda and SIZED not in server.output():
                raise AnswerError("the cache was not sized as if the server were alone on its GPU")
            return Answers.of(server, run.ids)
    except AnswerError as e:
        return "failed", str(e)
    except (ServerError, requests.RequestException) as e:
        if run.stopped:
            raise OutOfTime from e
        return why(run.log(family, page, folder).read_text(errors="replace"))


def measured(run: Run, family: Family, page: int) -> dict | None:
    """A row of the CSV; None of a family of which an earlier row of this run says all. OutOfTime."""
    known = run.known[family.name]
    with known.lock:
        return None if known.settled else _measured(run, family, page, known)


def _measured(run: Run, family: Family, page: int, known: Known) -> dict:
    row = {"family": family.name, "like": family.like, "heads": "{}/{} of {}".format(*family.heads)}
    row |= {"device": run.name, "dtype": run.dtype}
    if family.gpu_only and not run.cuda:
        known.settled = True
        return row | {"outcome": "not run", "words": family.gpu_only}
    folder = run.models / family.name
    if not folder.exists():
        with _LOADING:
            family.build(run.tokenizer, folder, run.dtype)
    packed = ask(run, family, page, folder)
    if isinstance(packed, tuple) and packed[0] == "refused":
        known.settled = True
        return row | {"outcome": packed[0], "words": packed[1]}
    if run.stock and known.stock is None:
        try:
            known.stock = ask(run, family, None, folder)
        except OutOfTime:  # what the packed one answered is a row all the same
            known.stock = "failed", NO_TIME
    if known.plain is None and (not run.stock or isinstance(known.stock, Answers)):
        known.plain = exact(family, folder, run.ids)
    return row | {"page_size": page} | compared(packed, known.stock, known.plain, run.cuda)


def compared(
    packed: Answers | tuple[str, str],
    stock: Answers | tuple[str, str] | None,
    plain: list[float] | tuple[str, str] | None,
    sized: bool,
) -> dict:
    """A row's measurements. stock: SGLang's own cache, None where it is not started; then ``plain``, by transformers,
    is what the packed one's answers are compared with. sized: SGLang chose the number of tokens."""
    row: dict = {}
    if isinstance(stock, Answers):
        row |= {"bf16_read": gap(stock.cold, stock.warm)}
        row |= {"bf16_cold": gap(stock.cold, plain)} if isinstance(plain, list) else {}
        row |= {"bf16_tokens": stock.info["max_total_num_tokens"]} if sized else {}
    if isinstance(packed, tuple):
        also = {Answers: "; stock SGLang serves it", tuple: "; stock SGLang fails, too"}.get(type(stock), "")
        return row | {"outcome": packed[0], "words": packed[1] + also}
    quant = packed.info["kv_quant"]
    row |= {"outcome": "served", "graphs": packed.graphs, "start_s": round(packed.start_s, 1), "hit": packed.hit}
    row |= {"bytes": quant["bytes_per_token"], "bf16_bytes": quant["bf16_bytes_per_token"]}
    row |= {"tokens": quant["max_total_num_tokens"]} if sized else {}
    row |= {"read": gap(packed.cold, packed.warm), "decode": gap(packed.decoded, packed.reread)}
    missing = {"stock SGLang": stock, "transformers": plain}
    said = [f"{who}: {what[1]}" for who, what in missing.items() if isinstance(what, tuple)]
    row |= {"words": "; ".join(said)} if said else {}
    want = plain if stock is None else stock.cold if isinstance(stock, Answers) else None
    return row | ({"cold": gap(packed.cold, want), "warm": gap(packed.warm, want)} if isinstance(want, list) else {})


def finished(family: Family, kept: list[Mapping[str, str]], page_sizes: list[int]) -> set[int]:
    """Page sizes of a family that rows of a file have; all of them where one says that it is refused or not run."""
    own = [row for row in kept if row["family"] == family.name]
    if any(row["outcome"] in ("refused", "not run") for row in own):
        return set(page_sizes)
    return {int(row["page_size"]) for row in own}
