"""The servers that are compared: names, arguments, how each is started."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..launch import Server, shown
from ..server_agreement import SETTINGS
from .reference import Reference

#: name -> server arguments
CONFIGURATIONS = {
    "bf16": [],
    "fp8": ["--kv-cache-dtype=fp8_e4m3"],
    **{name: ["--kv-quant=blockgtq", *args] for name, args in SETTINGS.items()},
    "k3v2": ["--kv-quant=blockgtq", "--kv-quant-k-bits=3", "--kv-quant-v-bits=2"],
}


def engine(config: str, cuda: bool) -> str:
    """What serves it. SGLang's wheel serves an unquantized cache on a GPU only. ValueError for fp8 without one."""
    if config == "fp8" and not cuda:
        raise ValueError("configuration fp8 needs a CUDA device")
    return "transformers" if config == "bf16" and not cuda else "sglang"


def arguments(config: str, cuda: bool, tokens: int, user: list[str]) -> list[str]:
    """Server arguments; those of the user come last and win. tokens: cache that the requests at a time need."""
    out = ["--dtype=bfloat16", "--enable-cache-report", *CONFIGURATIONS[config]]
    if not cuda:
        out += [f"--max-total-tokens={tokens}", "--mem-fraction-static=0.3"]
    return [*out, *user]


@contextmanager
def serve(
    config: str, model: str, cuda: bool, tokens: int, user: list[str], log: Path | None, timeout: float
) -> Iterator[tuple[str, dict]]:
    """Its URL and a description for the record. ServerError where it does not start."""
    if engine(config, cuda) == "transformers":
        with Reference.of(model) as reference:
            yield reference.url, {"engine": "transformers", "dtype": "bfloat16"}
        return
    args = arguments(config, cuda, tokens, user)
    with Server(model, *args, log=log) as server:
        server.wait(timeout)
        about = {"engine": "sglang", "args": shown(shlex.join(args)), "start_s": round(server.start_s or 0, 1)}
        info = server.info()
        if info.get("kv_quant"):
            about["kv_quant"] = info["kv_quant"]
        yield server.url, about
