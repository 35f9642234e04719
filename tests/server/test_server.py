"""The real launch_server process with a packed cache: answers, cache report, reports about itself, clean stop."""

from __future__ import annotations

import signal
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
import requests
import sglang as sgl

pytestmark = pytest.mark.server


@pytest.fixture(scope="module")
def server(launch):
    return launch("--enable-metrics", "--enable-cache-report", "--max-total-tokens=6000", "--mem-fraction-static=0.3")


def chat(server, question: str, system: str = "You are a helpful assistant.") -> dict:
    messages = [{"role": "system", "content": system}, {"role": "user", "content": question}]
    body = {"model": "default", "messages": messages, "max_tokens": 12, "temperature": 0}
    response = requests.post(server.url + "/v1/chat/completions", json=body, timeout=600)
    response.raise_for_status()
    return response.json()


def test_concurrent_requests_share_their_prefix(server):
    system = "You are a careful geographer who answers in one short sentence. " * 4
    first = chat(server, "What is the capital of France?", system)
    assert "Paris" in first["choices"][0]["message"]["content"]
    countries = ["France", "Italy", "Spain", "Germany"]
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda c: chat(server, f"What is the capital of {c}?", system), countries))
    capitals = ["Paris", "Rome", "Madrid", "Berlin"]
    texts = [a["choices"][0]["message"]["content"] for a in answers]
    assert sum(capital in text for capital, text in zip(capitals, texts, strict=True)) >= 2, texts  # a 135M model
    for answer in answers:
        cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
        assert cached > 40 and cached < answer["usage"]["prompt_tokens"]


def test_server_info(server):
    info = server.info()["kv_quant"]
    assert info["mode"] == "blockgtq" and info["pool"] == "PackedKVPool"
    assert (info["k_bits"], info["v_bits"], info["allocator"]) == (3.0, 3.0, "template")
    # 30 layers of 3 heads x 52 bytes, each row padded to 160; bf16: 30 x 3 heads x 256.
    assert info["bytes_per_token"] == 30 * 160
    assert info["bf16_bytes_per_token"] == 30 * 3 * 256
    assert info["bytes_per_token_head"] == 52
    assert info["pool_bytes"] == 6016 * 30 * 160  # 6,000 and the padding slot, in whole blocks of 16
    assert info["max_total_num_tokens"] == 6000
    assert len(info["table_hash"]) == 64
    assert info["page"] == 512
    cost = info["quality"]
    assert set(cost) == {"kl", "attention_kl", "worst_layer", "worst_layer_kl", "tokens", "recent"}
    assert 0.001 < cost["kl"] < 0.3 and 0 < cost["attention_kl"] < cost["worst_layer_kl"]
    assert cost["tokens"] == 256 and cost["worst_layer"] in range(30)


def test_metrics(server):
    lines = server.get("/metrics").text.splitlines()
    values = {line.split("{")[0]: float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith("sglang:kv_quant")}
    assert values["sglang:kv_quant_bytes_per_token"] == 4800
    assert values["sglang:kv_quant_compression_ratio"] == pytest.approx(4.8)
    assert values["sglang:kv_quant_k_bits"] == 3
    assert values["sglang:kv_quant_info"] == 1
    assert any("kv_quant_info" in line and 'allocator="template"' in line for line in lines)
    cost = server.info()["kv_quant"]["quality"]
    for name in ("kl", "attention_kl", "worst_layer_kl"):
        assert values[f"sglang:kv_quant_{name}"] == pytest.approx(cost[name])


def test_start_up_line(server):
    lines = [line for line in server.log.read_text().splitlines() if "bytes per token" in line]
    assert len(lines) == 1
    assert "4800 bytes per token, 23040 in bf16 (x4.80)" in lines[0]
    cost = server.info()["kv_quant"]["quality"]
    assert f"KL of the answer {cost['kl']:.4f} nats a token over 256 held-out tokens" in lines[0]


@sgl.function
def fork_and_join(s):
    s += "Two tips for staying healthy are a balanced diet and regular exercise.\n"
    forks = s.fork(2)
    forks[0] += "A balanced diet means" + sgl.gen("tip", max_tokens=8, stop="\n")
    forks[1] += "Regular exercise means" + sgl.gen("tip", max_tokens=8, stop="\n")
    forks.join()
    s += "Diet:" + forks[0]["tip"] + "\nExercise:" + forks[1]["tip"] + "\n"
    s += "The capital of France is" + sgl.select("city", choices=[" Paris", " a stone"])


def test_frontend_program(server):
    backend = sgl.RuntimeEndpoint(server.url)
    state = fork_and_join.run(backend=backend, temperature=0)
    assert state["city"] == " Paris"
    assert "Diet:" in state.text() and "Exercise:" in state.text()
    diet = state.text().split("Diet:")[1].split("\n")[0]
    exercise = state.text().split("Exercise:")[1].split("\n")[0]
    assert diet.strip() and exercise.strip() and diet != exercise


def test_clean_stop(server):
    """Ctrl-C ends every process. Last in this file: it stops the server the others share."""
    assert server.process.poll() is None
    family = psutil.Process(server.process.pid).children(recursive=True)
    assert len(family) >= 2  # scheduler and detokenizer at least
    server.process.send_signal(signal.SIGINT)
    server.process.wait(timeout=60)
    _, alive = psutil.wait_procs(family, timeout=30)
    assert not alive
    log = server.log.read_text()
    assert "Application shutdown complete" in log
    assert "Traceback" not in log.split("Shutting down")[0]
    with pytest.raises(requests.ConnectionError):
        requests.get(server.url + "/health", timeout=5)
