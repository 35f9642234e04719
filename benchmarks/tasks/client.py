"""Questions to a server through the OpenAI API."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import requests

from ..launch import ServerError
from .prompts import Sample, Tokens


@dataclass(frozen=True)
class Sampling:
    temperature: float = 0.0
    top_p: float = 1.0

    def body(self, seed: int) -> dict:
        """Request fields. A seed where there is something to draw."""
        if self.temperature == 0:
            return {"temperature": 0}
        return {"temperature": self.temperature, "top_p": self.top_p, "seed": seed}


@dataclass(frozen=True)
class Reply:
    text: str
    prompt_tokens: int
    cached_tokens: int | None  # None where the server does not say
    completion_tokens: int
    finish: str


class Connection:
    """JSON to the server at ``url``, from several threads if need be."""

    def __init__(self, url: str):
        self.url, self._local = url.rstrip("/"), threading.local()

    def post(self, path: str, body: dict, timeout: float) -> dict:
        """ServerError for anything but an answer."""
        if not hasattr(self._local, "session"):
            self._local.session = requests.Session()
            self._local.session.trust_env = False  # a proxy is not for the machine itself
        response = self._local.session.post(self.url + path, json=body, timeout=max(timeout, 0.1))
        if response.status_code != 200:
            raise ServerError(f"{path} answered {response.status_code}: {response.text[:500]}")
        return response.json()


@dataclass
class Client:
    """Asks the server at ``url`` (see :class:`Connection`).

    api: ``completions`` sends token ids, ``chat`` sends the message and leaves the template to the server.
    context: ``cached`` first sends the context alone, so that question and answer read it from the server's prefix
    cache; ``fresh`` sends everything at once.
    """

    url: str
    tokens: Tokens
    api: str = "completions"
    context: str = "cached"
    model: str = "default"
    sampling: Sampling = Sampling()

    def __post_init__(self) -> None:
        self._connection = Connection(self.url)
        if self.api == "chat" and self.context == "cached":
            raise ValueError("--context cached needs --api completions: a chat message cannot end before its question")
        if self.api == "chat" and not self.tokens.chat:
            raise ValueError("--plain needs --api completions")
        if self.api == "chat" and self.tokens.prefix:
            raise ValueError("a chat message cannot begin the model's answer: Tokens(..., prefix=False) is needed")

    def post(self, path: str, body: dict, timeout: float) -> dict:
        return self._connection.post(f"/v1/{path}", body, timeout)

    def ask(self, sample: Sample, timeout: float) -> Reply:
        """ServerError also where the server counts the prompt's tokens differently."""
        ids, shared = self.tokens.prompt(sample)
        common = {"model": self.model, **self.sampling.body(sample.trial), "max_tokens": sample.new_tokens}
        if self.api == "chat":
            if not sample.template:
                raise ValueError(f"{sample.task} is sent as plain text, which needs --api completions")
            messages = [{"role": "user", "content": sample.context + sample.question}]
            answer = self.post("chat/completions", {**common, "messages": messages}, timeout)
            text = answer["choices"][0]["message"].get("content") or ""
        else:
            if self.context == "cached" and shared:
                first = {"model": self.model, "temperature": 0, "max_tokens": 1}
                self.post("completions", {**first, "prompt": ids[:shared]}, timeout)
            answer = self.post("completions", {**common, "prompt": ids}, timeout)
            text = answer["choices"][0]["text"]
        usage = answer["usage"]
        if usage["prompt_tokens"] != len(ids):
            raise ServerError(f"{sample.task}: the server counts {usage['prompt_tokens']} tokens, not {len(ids)}")
        details = usage.get("prompt_tokens_details") or {}
        return Reply(
            text,
            usage["prompt_tokens"],
            details.get("cached_tokens"),
            usage["completion_tokens"],
            answer["choices"][0].get("finish_reason") or "",
        )
