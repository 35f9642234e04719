"""What stands in for a server and for a model: no weights are needed."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch
from transformers import LlamaConfig, LlamaForCausalLM


class JsonServer:
    """Answers a POST with ``reply(path, body)`` of a subclass, one at a time. requests: what came, by path."""

    def __init__(self) -> None:
        self.requests, self.status, self.lock = [], 200, threading.Lock()
        own = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with own.lock:
                    own.requests.append((self.path, body))
                    data = json.dumps(own.reply(self.path, body)).encode()
                self.send_response(own.status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    def reply(self, path: str, body: dict) -> dict:
        raise NotImplementedError

    def stop(self) -> None:
        self.http.shutdown()
        self.http.server_close()


def tiny_llama_of(tokenizer, eos_token_id: int | None) -> LlamaForCausalLM:
    """Random weights, always the same, for the tokens of ``tokenizer``."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        eos_token_id=eos_token_id,
    )
    return LlamaForCausalLM(config)
