"""Start a server with the packed KV cache, ask it one question, show what the cache costs, keep serving.

usage: python scripts/serve.py --model-path PATH [--once] [--question TEXT] [-- SERVER ARGUMENTS...]

Runs ``python -m sglang.launch_server`` as it is; every argument after ``--`` goes to it. Ctrl-C
stops the server and everything it started.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

QUESTION = "What is the capital of France? Answer in one sentence."
HEARTBEAT = 10.0  # seconds between progress lines while the server loads
STOP_SECONDS = 20.0  # given to a clean shutdown before the process group is killed
LOG_LINES = 25  # shown when the server dies

#: Without a GPU: start quickly and take a bounded share of the memory.
CPU_ARGS = ["--device", "cpu", "--max-total-tokens", "65536"]
CPU_ARGS += ["--cuda-graph-backend-decode", "disabled", "--cuda-graph-backend-prefill", "disabled"]

#: The server is on this machine, whatever proxy the environment names.
OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class Stopped(Exception):
    """Ctrl-C, SIGTERM or a closed terminal."""


class ServerDied(Exception):
    """The server process ended by itself."""


def say(text: str) -> None:
    print(text, flush=True)


def option(args: list[str], name: str) -> str | None:
    """Value of ``--name VALUE`` or ``--name=VALUE`` in an argument list, the last one counting."""
    value = None
    for i, arg in enumerate(args):
        if arg == name and i + 1 < len(args):
            value = args[i + 1]
        elif arg.startswith(name + "="):
            value = arg.split("=", 1)[1]
    return value


def has_gpu() -> bool:
    """Whether torch sees a CUDA device; asked in a child so that this process stays small."""
    code = "import torch; print(torch.cuda.is_available())"
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout.strip().endswith("True")


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def server_command(model: str, extra: list[str]) -> tuple[list[str], int]:
    """The launch_server command line and its port. What the user gave in ``extra`` wins."""
    args = ["--model-path", model]
    if option(extra, "--kv-quant") is None:
        args += ["--kv-quant", "blockgtq"]
    if option(extra, "--device") is None and not has_gpu():
        say("no CUDA device: serving on the CPU")
        args += CPU_ARGS
    port = option(extra, "--port")
    if port is None:
        port = str(free_port())
        args += ["--port", port]
    return [sys.executable, "-m", "sglang.launch_server", *args, *extra], int(port)


def last_lines(log: Path, count: int) -> list[str]:
    """The end of the log; of lines redrawn with carriage returns only the last state."""
    lines = [line.rsplit("\r", 1)[-1].rstrip() for line in log.read_text(errors="replace").split("\n")]
    return [line for line in lines if line][-count:]


def doing(log: Path) -> str:
    """What the server is at: its last line that a reader of a progress report cares about."""
    telling = [line for line in last_lines(log, 50) if ("%|" in line or line[:1] == "[") and "/health" not in line]
    return telling[-1] if telling else "starting"


def request(url: str, body: dict | None = None, timeout: float = 600.0) -> tuple[int, bytes]:
    """HTTP status and body; status 0 when nobody answers."""
    data = None if body is None else json.dumps(body).encode()
    call = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        with OPENER.open(call, timeout=timeout) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as e:
        return e.code, e.read()
    except OSError:
        return 0, b""


def wait_until_ready(server: subprocess.Popen, url: str, log: Path) -> float:
    """Seconds until the server answers. Raises ServerDied."""
    begin = shown = time.monotonic()
    while True:
        if server.poll() is not None:
            raise ServerDied(f"the server ended with exit code {server.returncode} while loading")
        if request(f"{url}/health", timeout=30)[0] == 200:
            return time.monotonic() - begin
        now = time.monotonic()
        if now - shown >= HEARTBEAT:
            shown = now
            width = shutil.get_terminal_size((120, 24)).columns
            say(f"  {now - begin:4.0f} s  {doing(log)}"[: max(width - 1, 40)])
        time.sleep(0.5)


def ask(url: str, model: str, question: str) -> str:
    """The model's answer. Raises RuntimeError when the server refuses."""
    messages = [{"role": "user", "content": question}]
    body = {"model": model, "messages": messages, "temperature": 0, "max_tokens": 64}
    status, data = request(f"{url}/v1/chat/completions", body)
    if status == 200:
        return json.loads(data)["choices"][0]["message"]["content"].strip()
    if status == 400 and b"chat template" in data.lower():
        say("(the model has no chat template: asking as plain text)")
        body = {"text": f"Question: {question}\nAnswer:", "sampling_params": {"temperature": 0, "max_new_tokens": 64}}
        status, data = request(f"{url}/generate", body)
        if status == 200:
            return json.loads(data)["text"].strip()
    raise RuntimeError(f"the server answered the question with HTTP {status}: {data[:500].decode(errors='replace')}")


def capacity_line(kv: dict) -> str:
    """One line from the server's ``kv_quant`` report."""
    quality = kv.get("quality")
    return (
        f"KV cache: K {kv['k_bits']:g} bits, V {kv['v_bits']:g} bits ({kv['allocator']}), "
        f"{kv['bytes_per_token']:,} bytes per token instead of {kv['bf16_bytes_per_token']:,} in bf16 "
        f"(x{kv['bf16_bytes_per_token'] / kv['bytes_per_token']:.2f}), "
        f"{kv['max_total_num_tokens']:,} tokens fit, table {kv['table_hash'][:12]}"
        + (f", KL of the answer {quality['kl']:.4f} nats a token" if quality else "")
    )


def report(url: str) -> str:
    status, data = request(f"{url}/server_info")
    if status != 200:
        raise RuntimeError(f"/server_info answered HTTP {status}")
    kv = json.loads(data).get("kv_quant")
    if kv is None:
        return "KV cache: not quantized (the server reports no kv_quant)"
    return capacity_line(kv)


def stop(server: subprocess.Popen) -> None:
    """End the server: politely first, then whatever is left of its process group."""
    if server.poll() is None:
        server.terminate()
        try:
            server.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            pass
    for _ in range(100):  # killed processes need a moment to go
        try:
            os.killpg(server.pid, signal.SIGKILL)
        except ProcessLookupError:
            break
        if server.poll() is None:
            server.wait()
        time.sleep(0.05)


def run(options: argparse.Namespace, log: Path) -> None:
    model = options.model_path
    command, port = server_command(model, options.server_args)
    url = f"http://127.0.0.1:{port}"
    say(f"$ {shlex.join(['python', *command[1:]])}\n  log: {log}")
    # python -m would put the current folder on sys.path, and a clone's kernels/ with it.
    # Waiting OpenMP threads that spin make small operations on busy cores a hundred times slower.
    environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ, "PYTHONSAFEPATH": "1"}
    with log.open("wb") as out:
        # A process group of its own: Ctrl-C reaches only this process, which then stops the whole group.
        server = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
    try:
        say(f"ready after {wait_until_ready(server, url, log):.0f} s at {url}\n")
        say(f"Q: {options.question}\nA: {ask(url, model, options.question)}\n")
        say(report(url))
        if options.once:
            return
        say("\nserving until Ctrl-C; try:")
        body = json.dumps({"model": "default", "messages": [{"role": "user", "content": "Hello!"}]})
        say(f"  curl {url}/v1/chat/completions -H 'Content-Type: application/json' -d {shlex.quote(body)}")
        status = server.wait()
        raise ServerDied(f"the server ended with exit code {status}")
    finally:
        # A second Ctrl-C must not leave the server behind.
        for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(name, signal.SIG_IGN)
        stop(server)


def _raise_stopped(signum, frame) -> None:
    raise Stopped


def main() -> int:
    argv, server_args = sys.argv[1:], []
    if "--" in argv:
        cut = argv.index("--")
        argv, server_args = argv[:cut], argv[cut + 1 :]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", required=True, help="model folder or hub name")
    parser.add_argument("--once", action="store_true", help="stop after the answer")
    parser.add_argument("--question", default=QUESTION)
    options = parser.parse_args(argv)
    options.server_args = server_args
    if options.model_path.startswith(("/", ".", "~")) and not os.path.isdir(os.path.expanduser(options.model_path)):
        print(f"model {options.model_path}: no such folder; give a model folder or a hub name", file=sys.stderr)
        return 1
    options.model_path = os.path.expanduser(options.model_path)
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(name, _raise_stopped)

    handle, name = tempfile.mkstemp(prefix="sglang-blockgtq-", suffix=".log")
    os.close(handle)
    log = Path(name)
    try:
        run(options, log)
    except Stopped:
        say("\nstopped")
        if options.once:  # the answer was asked for and did not come
            return 130
    except (ServerDied, RuntimeError) as e:
        sys.stdout.flush()
        print("\n".join(["", *last_lines(log, LOG_LINES), "", f"{e}; the whole log is {log}"]), file=sys.stderr)
        return 1
    log.unlink()
    return 0


if __name__ == "__main__":
    sys.exit(main())
