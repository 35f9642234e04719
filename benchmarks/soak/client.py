"""One request, and its outcome."""

from __future__ import annotations

import json
import re
import threading
import uuid
from dataclasses import dataclass

import requests

from .session import GRAMMARS, Turn

PATIENCE = 600  # seconds


class WrongAnswer(RuntimeError):
    """An answer that no server may give."""


@dataclass(frozen=True)
class Outcome:
    """choices: (tokens, their log-probabilities) of each answer; empty where it was aborted or given up. complete: the
    grammar's end was reached."""

    choices: list[tuple[list[int], list[float]]]
    retractions: int = 0
    cached: int = 0
    complete: bool = False


class Client:
    """Of a server at ``url``; for one thread. last: the vocabulary's last id, see :func:`named`."""

    def __init__(self, url: str, last: int | None = None):
        self.url, self.last, self._session = url, last, requests.Session()
        self._session.trust_env = False  # a proxy is not for the machine itself

    def post(self, path: str, body: dict, timeout: float = PATIENCE) -> requests.Response:
        return self._session.post(self.url + path, json=body, timeout=timeout)

    def ask(self, turn: Turn, seconds: float) -> Outcome:
        """seconds: of an answer of this length; aborts and timeouts come within them. WrongAnswer."""
        body = turn.body()
        if turn.kind == "timeout":
            try:
                return self._outcome(turn, self.post("/generate", body, max(turn.after * seconds, 0.02)))
            except (requests.Timeout, requests.ConnectionError) as e:
                if not isinstance(e, requests.Timeout) and "timed out" not in str(e):  # within the answer
                    raise
                self._session.close()
                return Outcome([])
        if turn.kind != "abort":
            return self._outcome(turn, self.post("/generate", body))
        body["rid"] = uuid.uuid4().hex
        timer = threading.Timer(turn.after * seconds, Client(self.url).post, ("/abort_request", {"rid": body["rid"]}))
        timer.start()
        try:
            return self._outcome(turn, self.post("/generate", body))
        finally:
            timer.cancel()
            timer.join()

    def read(self, ids: list[int]) -> list[float]:
        """Log-probabilities of all tokens but the first, read as a cold prompt. WrongAnswer."""
        sampling = {"max_new_tokens": 1, "temperature": 0}
        body = {"input_ids": ids, "sampling_params": sampling, "return_logprob": True, "logprob_start_len": 0}
        response = self.post("/generate", body)
        if response.status_code != 200:
            raise WrongAnswer(f"a prompt of {len(ids)} tokens: status {response.status_code}: {response.text[:300]}")
        meta = response.json()["meta_info"]
        found = meta["input_token_logprobs"][1:]
        tokens = [token for _, token, *_ in found]
        if meta["cached_tokens"]:
            raise WrongAnswer(f"a cold prompt of {len(ids)} tokens: {meta['cached_tokens']} were cached")
        sent = named(ids[1:], self.last)
        if tokens != sent:
            others = [(i, a, b) for i, (a, b) in enumerate(zip(tokens, sent, strict=False)) if a != b]
            said = f"log-probabilities of {len(tokens)} tokens, {len(others)} of another token"
            if others:
                said += ", the first at {} of {} in place of {}".format(*others[0])
            raise WrongAnswer(f"a cold prompt of {len(ids)} tokens: {said}; retractions: {meta.get('num_retractions')}")
        return [lp for lp, *_ in found]

    def flush(self) -> None:
        self.post("/flush_cache?timeout=30", {}, 60).raise_for_status()

    def _outcome(self, turn: Turn, response: requests.Response) -> Outcome:
        try:
            answers = response.json()
        except ValueError:
            answers = None
        if turn.kind == "abort" and "abort" in response.text.lower():
            return Outcome([])
        if response.status_code != 200:
            raise WrongAnswer(f"{turn.kind}: status {response.status_code}: {response.text[:300]}")
        answers = answers if isinstance(answers, list) else [answers]
        metas = [answer["meta_info"] for answer in answers]
        choices = [
            (
                [token for _, token, *_ in meta["output_token_logprobs"]],
                [lp for lp, *_ in meta["output_token_logprobs"]],
            )
            for meta in metas
        ]
        reasons = [(meta.get("finish_reason") or {}).get("type") for meta in metas]
        if len(choices) != turn.n:
            raise WrongAnswer(f"{turn.kind}: {len(choices)} answers where {turn.n} were asked for")
        for (tokens, logprobs), reason in zip(choices, reasons, strict=True):
            if turn.grammar is None and len(tokens) != turn.new:
                raise WrongAnswer(f"{turn.kind}: {len(tokens)} tokens where {turn.new} were asked for ({reason})")
            if not all(lp is not None and lp == lp and lp <= 1e-3 for lp in logprobs):
                raise WrongAnswer(f"{turn.kind}: log-probabilities {logprobs}")
        complete = turn.grammar is not None and reasons == ["stop"]
        if complete and not follows(turn.grammar, answers[0]["text"]):
            raise WrongAnswer(f"{turn.grammar}: {answers[0]['text']!r} does not follow {GRAMMARS[turn.grammar]}")
        return Outcome(
            choices,
            sum(meta["num_retractions"] for meta in metas),
            max(meta["cached_tokens"] for meta in metas),
            complete,
        )


def named(ids: list[int], last: int | None) -> list[int]:
    """How SGLang 0.5.23 names a prompt's tokens beside their log-probabilities: the vocabulary's last id, and what is
    beyond, which would be of an image, is called 0 (``SchedulerLogprobResultProcessor``). Those that it generates keep
    their names."""
    return ids if last is None else [0 if token >= last else token for token in ids]


def follows(grammar: str, text: str) -> bool:
    """Whether an answer that ended is one of the grammar."""
    if grammar == "regex":
        return re.fullmatch(GRAMMARS["regex"], text) is not None
    try:
        found = json.loads(text)
    except ValueError:
        return False
    return set(found) == {"tool", "line"} and found["tool"] in ("search", "read", "write")
