"""The model as transformers runs it, behind the same API: the reference where SGLang's stock server does not start."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Reference:
    """A server in a thread of this process, for ``with``. One request at a time; greedy only; token ids only.

    It keeps no prefix cache: a context sent alone is answered with one token and forgotten.
    """

    def __init__(self, model: Any, tokenizer: Any):
        self.model, self.tokenizer, self.lock = model.eval(), tokenizer, threading.Lock()
        self.closed = False
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                try:
                    status, answer = 200, outer.complete(body)
                except (KeyError, ValueError) as e:
                    status, answer = 400, {"error": str(e)}
                data = json.dumps(answer).encode()
                try:
                    self.send_response(status)
                    self.send_header("Content-Length", str(len(data)))
                    self.end_headers()
                    self.wfile.write(data)
                except (BrokenPipeError, ConnectionResetError):
                    pass  # who asked ran out of time and went

            def log_message(self, *args: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    @classmethod
    def of(cls, path: str, dtype: str = "bfloat16") -> Reference:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype))
        return cls(model, AutoTokenizer.from_pretrained(path))

    def __enter__(self) -> Reference:
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.http.shutdown()
        self.http.server_close()
        # An answer still being generated would be computing while the process ends; none begins after it.
        with self.lock:
            self.closed = True

    def complete(self, body: dict) -> dict:
        """Answer to a body of /v1/completions. ValueError for what this server cannot do."""
        import torch

        ids, new = body["prompt"], body["max_tokens"]
        if not (isinstance(ids, list) and ids and all(isinstance(i, int) for i in ids)):
            raise ValueError("prompt: a list of token ids is needed")
        if body.get("temperature") != 0:
            raise ValueError(f"temperature {body.get('temperature')}: only 0 is possible")
        out: list[int] = []
        if new > 1:
            prompt = torch.tensor([ids], device=self.model.device)
            with self.lock, torch.inference_mode():
                if self.closed:
                    raise ValueError("the server is closing")
                every = self.model.generate(
                    prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new, do_sample=False
                )
            out = every[0, len(ids) :].tolist()
        stops = self.model.generation_config.eos_token_id
        stopped = bool(out) and out[-1] in (stops if isinstance(stops, list) else [stops])
        return {
            "choices": [
                {
                    "text": self.tokenizer.decode(out, skip_special_tokens=True),
                    "finish_reason": "stop" if stopped else "length",
                }
            ],
            "usage": {"prompt_tokens": len(ids), "completion_tokens": len(out)},
        }
