"""Several servers that run with --kv-quant blockgtq behind SGLang's router, which finds the one that knows a prompt.

usage: python examples/router.py --workers http://127.0.0.1:30001 http://127.0.0.1:30002

Needs ``pip install sglang-router``. The servers need one table: the first that starts makes it and keeps it in the
cache folder, or give all of them --kv-quant-table. A few stories are asked for at the same time, each to go on twice;
the second time the router finds the server that has read it.
"""

from __future__ import annotations

import argparse
import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

STORIES = ("a lighthouse keeper", "an old clockmaker", "a girl who talks to whales", "two rival bakers")


def ask(url: str, body: dict[str, Any] | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=600) as response:
        text = response.read()
    return json.loads(text) if text[:1] in b"[{" else text


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start(workers: list[str]) -> tuple[subprocess.Popen, str]:
    """The router's process, and its address once it has found its workers."""
    port = free_port()
    command = [sys.executable, "-m", "sglang_router.launch_router", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--prometheus-port", str(free_port()), "--policy", "cache_aware", "--worker-urls", *workers]
    router, url = subprocess.Popen(command, stdout=subprocess.DEVNULL), f"http://127.0.0.1:{port}"
    for _ in range(600):
        if router.poll() is not None:
            raise SystemExit(f"the router ended with {router.returncode}")
        try:
            ask(f"{url}/readiness")
            return router, url
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.1)
    router.kill()
    raise SystemExit("the router found no workers within a minute")


def tell(url: str, story: str) -> str:
    text, cached = f"This is the story of {story}, as it was told to me when I was young. Once", []
    for _ in range(2):
        answer = ask(f"{url}/generate", {"text": text, "sampling_params": {"max_new_tokens": 8, "temperature": 0}})
        cached.append(answer["meta_info"]["cached_tokens"])
        text += answer["text"]
    total = answer["meta_info"]["prompt_tokens"]
    return f"{story}: {cached[0]} tokens from the cache, then {cached[1]} of {total}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", nargs="+", required=True, metavar="URL", help="servers that are running")
    workers = parser.parse_args().workers
    tables = {ask(f"{worker}/server_info")["kv_quant"]["table_hash"] for worker in workers}
    print(f"{len(workers)} servers, {len(tables)} table")
    router, url = start(workers)
    try:
        with ThreadPoolExecutor() as pool:
            print(*pool.map(partial(tell, url), STORIES), sep="\n")
    finally:
        router.terminate()
        router.wait()


if __name__ == "__main__":
    main()
