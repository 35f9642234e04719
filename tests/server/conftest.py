"""Fixtures that start the real server process on the small real model."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import requests
import torch

RUNNING: list[Server] = []


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """What servers of the test's module said last, beside a failure."""
    report = yield
    if report.failed:
        report.sections += [(f"server {i}", server.tail()) for i, server in enumerate(RUNNING)]
    return report


@dataclass
class Server:
    """A running launch_server process."""

    process: subprocess.Popen
    url: str
    log: Path
    record: Path

    def wait(self) -> None:
        """Until it answers."""
        deadline = time.monotonic() + 600
        while "fired up" not in self.log.read_text(errors="replace"):
            if self.process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"the server did not start:\n{self.tail()}")
            time.sleep(0.5)

    def get(self, path: str) -> Any:
        response = requests.get(self.url + path, timeout=60)
        response.raise_for_status()
        return response

    def info(self) -> dict:
        return self.get("/server_info").json()

    def generate(
        self,
        input_ids: list[int],
        max_new_tokens: int = 1,
        logprob_start: int | None = None,
        top_logprobs: int = 0,
        grammar: dict[str, str] | None = None,
        **more: Any,
    ) -> dict:
        """One greedy request; with logprob_start also the log-probabilities of the prompt from there on.

        grammar: what the answer must follow, as a sampling parameter. more: fields of the request.
        """
        body: dict[str, Any] = {
            "input_ids": input_ids,
            "sampling_params": {"max_new_tokens": max_new_tokens, "temperature": 0, **(grammar or {})},
            **more,
        }
        if logprob_start is not None:
            body |= {"return_logprob": True, "logprob_start_len": logprob_start, "top_logprobs_num": top_logprobs}
        response = requests.post(self.url + "/generate", json=body, timeout=600)
        response.raise_for_status()
        return response.json()

    def logprobs(self, input_ids: list[int], start: int, **more: Any) -> tuple[list[float], int]:
        """Log-probabilities of the prompt's tokens after ``start``, and how many tokens came from the cache."""
        meta = self.generate(input_ids, logprob_start=start, **more)["meta_info"]
        return [lp for lp, *_ in meta["input_token_logprobs"] if lp is not None], meta["cached_tokens"]

    def behind_best(self, prompt: list[int], answer: list[int]) -> list[float]:
        """How far each token of an answer is below the most likely one, in nats, when all is read as one prompt."""
        meta = self.generate(prompt + answer, logprob_start=len(prompt) - 1, top_logprobs=1)["meta_info"]
        chosen, best = meta["input_token_logprobs"][1:], meta["input_top_logprobs"][1:]
        assert [token for _, token, *_ in chosen] == answer
        return [top[0][0] - lp for (lp, *_), top in zip(chosen, best, strict=True)]

    def off(self, model: Any, prompt: list[int], new: int) -> tuple[float, dict]:
        """The largest |difference| of an answer's log-probabilities from those of a transformers model, and the
        answer's meta_info."""
        meta = self.generate(prompt, new, logprob_start=len(prompt) - 1, ignore_eos=True)["meta_info"]
        logprobs, answer = zip(*((lp, token) for lp, token, *_ in meta["output_token_logprobs"]), strict=True)
        with torch.inference_mode():
            logits = model(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
        exact = logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None])[:, 0]
        return float((exact - torch.tensor(logprobs)).abs().max()), meta

    def flush(self) -> None:
        """Once nothing runs: the last request may still be ending."""
        requests.post(self.url + "/flush_cache?timeout=60", timeout=90).raise_for_status()

    def records(self) -> list[dict]:
        return [json.loads(line) for line in self.record.read_text().splitlines()]

    def tail(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-40:])

    def stop(self) -> int:
        """Ctrl-C, then the exit code."""
        self.process.send_signal(signal.SIGINT)
        try:
            return self.process.wait(timeout=60)
        finally:
            try:
                os.killpg(self.process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def command(model: str, *args: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "sglang.launch_server",
        "--model-path",
        str(model),
        "--mem-fraction-static",
        "0.3",
        *args,
    ]


def environment(**extra: str) -> dict[str, str]:
    # PYTHONSAFEPATH: a server started in the clone must not take its folders for packages.
    return {**os.environ, "PYTHONSAFEPATH": "1", "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE", **extra}


@pytest.fixture(scope="session")
def token_ids(smollm2) -> list[int]:
    """Token ids of a long English text that calibration never saw."""
    from transformers import AutoTokenizer

    text = (files("sglang") / "test" / "long_prompt.txt").read_text()
    return AutoTokenizer.from_pretrained(smollm2)(text)["input_ids"]


@pytest.fixture(scope="session")
def gemma2(smollm2, tmp_path_factory) -> str:
    """Random: one layer with a window of 48 and one without, capped logits, weights large enough for attention to
    matter."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma2Config

    folder = str(tmp_path_factory.mktemp("model") / "gemma2")
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, query_pre_attn_scalar=8, sliding_window=48, attn_logit_softcapping=2.0,
        final_logit_softcapping=None, max_position_embeddings=1024, initializer_range=0.3, bos_token_id=1,
        eos_token_id=2, pad_token_id=0, hidden_act="gelu_pytorch_tanh",
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def mellum(smollm2, tmp_path_factory) -> str:
    """Random: layers with a window of 48, which SGLang keeps apart, and layers without by turns. All experts answer:
    a choice of some would jump with the least error."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, MellumConfig

    folder = str(tmp_path_factory.mktemp("model") / "mellum")
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    torch.manual_seed(0)
    config = MellumConfig(
        vocab_size=len(tokenizer), hidden_size=128, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        head_dim=32, moe_intermediate_size=64, num_experts=2, num_experts_per_tok=2, mlp_layer_types=["sparse"] * 4,
        layer_types=["sliding_attention", "full_attention"] * 2, sliding_window=48, max_position_embeddings=1024,
        initializer_range=0.1, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def table_cache(tmp_path_factory) -> str:
    """One cache folder for all servers of a run: only the first start of a setting calibrates."""
    return str(tmp_path_factory.mktemp("kv-quant-cache"))


#: Options that say what bits a server has. Without one it would measure several before it starts.
BITS = ("--kv-quant-preset", "--kv-quant-k-bits", "--kv-quant-v-bits", "--kv-quant-table")


@pytest.fixture(scope="module")
def launch(smollm2, table_cache, tmp_path_factory):
    """Start servers; all are stopped at the end of the module."""

    def start(
        *args: str, record: str = "", model: str = smollm2, env: dict[str, str] | None = None, wait: bool = True
    ) -> Server:
        """record: the test-only plugin beside this file that writes the server's record. wait: until it answers."""
        folder = tmp_path_factory.mktemp("server")
        port = free_port()
        flags = ["--kv-quant", "blockgtq", "--kv-quant-cache-dir", table_cache]
        if not any(arg.startswith(BITS) for arg in args):
            flags += ["--kv-quant-preset", "balanced"]
        extra, plugin = dict(env or {}), None
        if record:
            plugin = str(Path(__file__).parent / record)
            extra["BLOCKGTQ_RECORD"] = str(folder / "record.jsonl")
        # What this process was told stays: a server takes the package from where the tests do.
        paths = plugin, extra.get("PYTHONPATH"), os.environ.get("PYTHONPATH")
        if any(paths):
            extra["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        log = folder / "log"
        with log.open("w") as out:
            process = subprocess.Popen(
                command(model, "--port", str(port), *flags, *args),
                stdout=out,
                stderr=subprocess.STDOUT,
                env=environment(**extra),
                cwd=folder,
                start_new_session=True,
            )
        server = Server(process, f"http://127.0.0.1:{port}", log, folder / "record.jsonl")
        RUNNING.append(server)
        if wait:
            server.wait()
        return server

    yield start
    for server in RUNNING:
        if server.process.poll() is None:
            server.stop()
    RUNNING.clear()
