"""Who answers: a server, or the model as transformers runs it. Both write greedily and read a text token by token."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from ..launch import ServerError
from ..tasks import client


@dataclass(frozen=True)
class Reply(client.Reply):
    """An answer. first: that of the turn before. ids, logprobs: its tokens and what the engine itself gave them."""

    first: str = ""
    ids: Sequence[int] = ()
    logprobs: Sequence[float] = ()


@dataclass(frozen=True)
class Reading:
    """behind: nats by which each token of a text that was read is less likely than the best one, 0 for the best."""

    behind: Sequence[float]
    text: str = ""  # it says nothing


class Engine(Protocol):
    def write(self, ids: list[int], new: int, timeout: float, stop: bool = True) -> Reply:
        """At most ``new`` greedy tokens after ``ids``; exactly so many with ``stop=False``."""
        ...

    def remember(self, ids: list[int], timeout: float) -> None:
        """Have ``ids`` in the prefix cache, so that all but the last of them are read from it next time."""
        ...

    def read(self, ids: list[int], start: int, timeout: float) -> Reading:
        """The tokens ``ids[start:]``, each after all that stand before it."""
        ...


class Served(client.Connection):
    """A server of SGLang. ServerError for anything but an answer."""

    def write(self, ids: list[int], new: int, timeout: float, stop: bool = True) -> Reply:
        sampling = {"temperature": 0, "max_new_tokens": new, "ignore_eos": not stop}
        body = {"input_ids": ids, "sampling_params": sampling, "return_logprob": True}
        answer = self.post("/generate", body, timeout)
        meta = answer["meta_info"]
        tokens = meta["output_token_logprobs"]
        return Reply(
            answer["text"],
            meta["prompt_tokens"],
            meta.get("cached_tokens"),
            meta["completion_tokens"],
            (meta.get("finish_reason") or {}).get("type", ""),
            ids=[token for _, token, *_ in tokens],
            logprobs=[value for value, *_ in tokens],
        )

    def remember(self, ids: list[int], timeout: float) -> None:
        self.write(ids, 1, timeout)

    def chat(self, body: dict, timeout: float) -> tuple[dict, Reply]:
        """The message of a chat completion, and what is known of it."""
        # The model's generation_config may ask for a penalty, which greedy decoding does not have.
        greedy = {"model": "default", "temperature": 0, "repetition_penalty": 1.0}
        answer = self.post("/v1/chat/completions", {**greedy, **body}, timeout)
        choice, usage = answer["choices"][0], answer["usage"]
        details = usage.get("prompt_tokens_details") or {}
        message = choice["message"]
        return message, Reply(
            message.get("content") or "",
            usage["prompt_tokens"],
            details.get("cached_tokens"),
            usage["completion_tokens"],
            choice.get("finish_reason") or "",
        )

    def read(self, ids: list[int], start: int, timeout: float) -> Reading:
        body = {
            "input_ids": ids,
            "sampling_params": {"temperature": 0, "max_new_tokens": 1},
            "return_logprob": True,
            "logprob_start_len": start - 1,
            "top_logprobs_num": 1,
        }
        meta, count = self.post("/generate", body, timeout)["meta_info"], len(ids) - start
        chosen, best = (meta[f"input_{name}_logprobs"][-count:] for name in ("token", "top"))
        if [token for _, token, *_ in chosen] != ids[start:]:
            raise ServerError(f"/generate: the log-probabilities are not those of the last {count} tokens")
        return Reading([round(top[0][0] - value, 5) for (value, *_), top in zip(chosen, best, strict=True)])


@dataclass
class Local:
    """A model of transformers, one request at a time. It has no chat API: neither tools nor a grammar."""

    model: Any
    tokenizer: Any
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def write(self, ids: list[int], new: int, timeout: float, stop: bool = True) -> Reply:
        import torch

        ends = self.model.generation_config.eos_token_id
        ends = set(ends if isinstance(ends, list) else [ends]) if stop else set()
        out: list[int] = []
        logprobs: list[float] = []
        following, past = torch.tensor([ids], device=self.model.device), None
        with self._lock, torch.inference_mode():
            while len(out) < new and not (out and out[-1] in ends):
                answer = self.model(following, past_key_values=past, use_cache=True, logits_to_keep=1)
                value, token = answer.logits[0, -1].float().log_softmax(-1).max(-1)
                out.append(int(token))
                logprobs.append(float(value))
                following, past = token[None, None], answer.past_key_values
        finish = "stop" if out and out[-1] in ends else "length"
        text = self.tokenizer.decode(out, skip_special_tokens=True)
        return Reply(text, len(ids), None, len(out), finish, ids=out, logprobs=logprobs)

    def remember(self, ids: list[int], timeout: float) -> None:
        """It keeps no cache."""

    def read(self, ids: list[int], start: int, timeout: float) -> Reading:
        import torch

        tokens = torch.tensor([ids], device=self.model.device)
        with self._lock, torch.inference_mode():
            kept = self.model(tokens, logits_to_keep=len(ids) - start + 1).logits[0, :-1].float()
        chosen = kept.gather(1, tokens[0, start:, None])[:, 0]
        return Reading([round(x, 5) for x in (kept.amax(-1) - chosen).tolist()])
