"""What SGLang's load generators are told, and how their files are read; the files are real ones."""

from __future__ import annotations

import importlib.util
import json
import os
import time
from itertools import product
from pathlib import Path

import pytest

from benchmarks.models import Model
from benchmarks.serving import bench, counters
from benchmarks.serving.bench import BenchError, Target
from benchmarks.serving.configs import FULL, NAMED, SERVERS, SHORT, arguments
from benchmarks.serving.run import SCENARIOS
from benchmarks.serving.scenarios import Plan, batches, prefixes, pressure

TARGET = Target("http://127.0.0.1:1", "some/model", "some/tokenizer")


def option(command: list[str], name: str) -> str:
    assert command.count(name) == 1, (name, command)
    return command[command.index(name) + 1]


def test_reads_bench_serving(data):
    result = bench.parse_serving((data / "bench_serving.jsonl").read_text())
    values = {v.measure: v for v in pressure.stream_values(result)}
    assert values["output_throughput"].value == pytest.approx(6.664, rel=1e-3)
    assert values["ttft_p50"].value == pytest.approx(978.94, rel=1e-3)
    assert values["tpot_p99"].value == pytest.approx(223.43, rel=1e-3)
    assert values["itl_p50"].value == pytest.approx(218.83, rel=1e-3)
    assert values["hit_rate"].value == 0 and values["hit_rate"].unit == "of prompt tokens"
    assert values["output_throughput"].note == "4 requests in 4.802 s"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"errors": ["", "Bad gateway", "", ""]}, "1 of 4 requests failed: Bad gateway"),
        ({"ttfts": [0.0, 1.0, 1.0, 1.0]}, "no text"),
        ({"completed": 0}, "no request was completed"),
        ({"p99_tpot_ms": float("nan")}, "p99_tpot_ms is nan"),
    ],
)
def test_refuses_bench_serving(data, change, says):
    result = json.loads((data / "bench_serving.jsonl").read_text())
    with pytest.raises(BenchError, match=says):
        bench.parse_serving(json.dumps(result | change))


def test_reads_one_batch(data):
    first, second, third = map(json.loads, (data / "bench_one_batch.jsonl").read_text().splitlines())
    assert (first["input_len"], second["input_len"], third["batch_size"]) == (64, 2000, 2)
    assert batches.step_ms(first) == pytest.approx(1e3 * first["steady_state_window_s"] / 7, rel=1e-2)
    # Two requests in a batch: each waits for the whole step.
    assert batches.step_ms(third) == pytest.approx(1e3 * third["steady_state_window_s"] / 7, rel=1e-2)


def test_reads_what_one_batch_left_out(data):
    assert bench.parse_skips((data / "bench_one_batch.log").read_text()) == [
        bench.Skipped(2, 2000, "4016 tokens are needed, 3000 fit")
    ]
    with pytest.raises(BenchError, match="fewer than 64 requests"):
        bench.parse_skips("Skip benchmark batch_size=64 > skip_max_running_requests_threshold=48 due to max")


def test_speeds_of_the_largest_batch_in_a_log():
    line = (
        "[2026-11-30] Decode batch, #running-req: {}, #token: 9, cuda graph: True, gen throughput (token/s): {}, #queue"
    )
    steps = [(8, 100.5), (64, 12.0), (64, 250.25), (64, 260.0), (9, 999.0)]
    log = "\n".join([*(line.format(*step) for step in steps), "Prefill batch, #running-req: 70, gen throughput"])
    assert counters.decoding(log) == (64, 250.25)
    assert counters.decoding("Prefill batch, #running-req: 70") is None


def test_counters(data):
    text = (data / "metrics.txt").read_text()
    assert counters.total(text, "sglang:prompt_tokens_total") == 2518
    assert counters.total(text, "sglang:num_retracted_requests_total") == 0
    assert counters.total(text, "sglang:kv_quant_k_bits") == 3


def test_serving_command(tmp_path):
    plan = Plan(FULL)
    command = bench.serving_command(TARGET, tmp_path / "o", pressure.load(plan, "32768+512 x64"), 512, True, True)
    assert command[0] == "sglang.benchmark.serving"
    assert option(command, "--max-concurrency") == "64" and option(command, "--num-prompts") == "128"
    assert option(command, "--random-input-len") == "32768" and option(command, "--random-range-ratio") == "1"
    assert "--flush-cache" in command and option(command, "--warmup-requests") == "1"
    sampling = json.loads(option(command, "--extra-request-body"))["sampling_params"]
    assert sampling["max_new_tokens"] == 512 == int(option(command, "--random-output-len"))
    assert sampling["ignore_eos"] and not sampling["skip_special_tokens"]
    warm = bench.serving_command(TARGET, tmp_path / "o", prefixes.load(plan), 64, False, False)
    assert "--flush-cache" not in warm and option(warm, "--warmup-requests") == "0"
    assert int(option(warm, "--gsp-num-groups")) * int(option(warm, "--gsp-prompts-per-group")) == 64


def test_random_weights_are_told_what_to_answer(tmp_path):
    for word, bias in ((None, None), (123, {"123": 1000.0})):
        target = Target("http://127.0.0.1:1", "m", "t", word)
        command = bench.serving_command(target, tmp_path, pressure.load(Plan(FULL), "1+1 x8"), 1, True, True)
        sampling = json.loads(option(command, "--extra-request-body"))["sampling_params"]
        assert sampling.get("logit_bias") == bias


def test_a_loop_has_more_requests_than_places():
    for sizes in (FULL, SHORT):
        case = pressure.cases(Plan(sizes))[-1]
        load = pressure.load(Plan(sizes), case)
        assert int(option(load, "--num-prompts")) > int(option(load, "--max-concurrency"))


@pytest.fixture
def modules(tmp_path, monkeypatch):
    """Two load generators of our own, which note process and home, and do what they are told."""
    package = tmp_path / "loads"
    package.mkdir()
    (package / "__init__.py").touch()
    code = "import os, sys, time\n\ndef cli_main():\n    print(os.getpid(), os.environ['HOME'])\n"
    (package / "ok.py").write_text(code)
    (package / "bad.py").write_text(code + "    sys.exit('no load today' if len(sys.argv) < 2 else int(sys.argv[1]))\n")
    (package / "slow.py").write_text(code + "    time.sleep(60)\n")
    (package / "gone.py").write_text(code + "    os._exit(7)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(bench, "SERVING", "loads.ok")
    monkeypatch.setattr(bench, "ONE_BATCH", "loads.bad")


def ended(worker, name: str, log: Path, *argv: str, seconds: float = 30) -> list[str]:
    """Words that a module printed."""
    with worker.run([f"loads.{name}", *argv], log) as job:
        deadline = time.monotonic() + seconds
        while not job.done(deadline):
            time.sleep(0.02)
        return job.output().split()


def test_one_process_runs_all_loads(modules, tmp_path):
    with bench.Worker() as worker:
        first, home = ended(worker, "ok", tmp_path / "a.log")
        with pytest.raises(BenchError, match=r"(?s)exit code 1:.*no load today"):
            ended(worker, "bad", tmp_path / "b.log")
        with pytest.raises(BenchError, match="exit code 3"):
            ended(worker, "bad", tmp_path / "b.log", "3")
        ended(worker, "bad", tmp_path / "b.log", "0")
        again, other_home = ended(worker, "ok", tmp_path / "c.log")
        assert again == first and other_home != home


def test_a_load_that_hangs_or_dies_takes_only_its_process(modules, tmp_path):
    with bench.Worker() as worker:
        first, _ = ended(worker, "ok", tmp_path / "a.log")
        with pytest.raises(TimeoutError):
            ended(worker, "slow", tmp_path / "b.log", seconds=0.5)
        with pytest.raises(BenchError, match="died with exit code 7"):
            ended(worker, "gone", tmp_path / "c.log")
        again, _ = ended(worker, "ok", tmp_path / "d.log")
        assert again != first
    with pytest.raises(ProcessLookupError):
        os.kill(int(again), 0)


def test_a_module_that_does_not_import_says_so(modules, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "SERVING", "loads.missing")
    with bench.Worker() as worker, pytest.raises(BenchError, match=r"(?s)died.*No module named 'loads.missing'"):
        ended(worker, "ok", tmp_path / "a.log")


def test_a_failed_import_shows_before_the_first_load(modules, tmp_path, monkeypatch):
    with bench.Worker() as worker:
        worker.check()  # nothing was started
        worker.start()
        ended(worker, "ok", tmp_path / "a.log")
        worker.check()
    monkeypatch.setattr(bench, "ONE_BATCH", "loads.missing")
    with bench.Worker() as worker:
        worker.start().wait(30)
        with pytest.raises(bench.NoGenerators, match="cannot be imported: .*No module named 'loads.missing'"):
            worker.check()


def test_commands_are_understood_by_sglang(tmp_path):
    """Every option that is used is one of the installed release's."""
    root = Path(importlib.util.find_spec("sglang").submodule_search_locations[0])  # found, not imported
    for name, command in {
        "serving": [
            *bench.serving_command(TARGET, tmp_path, pressure.load(Plan(FULL), "1+1 x8"), 1, True, True),
            *prefixes.load(Plan(FULL)),
        ],
        "one_batch_server": bench.one_batch_command(TARGET, tmp_path, 8, [1, 2], 3),
    }.items():
        source = (root / "benchmark" / f"{name}.py").read_text()
        own = {word for word in command if word.startswith("--")} - {"--model"}
        assert own and not [word for word in own if f'"{word}"' not in source and f'"--{word[5:]}"' not in source]


def test_one_batch_command(tmp_path):
    command = bench.one_batch_command(TARGET, tmp_path / "o", 8, [8192, 8192], 129)
    at = command.index("--input-len")
    assert command[at + 1 : at + 4] == ["8192", "8192", "--output-len"]
    assert option(command, "--batch-size") == "8" and option(command, "--local-tokenizer-path") == "some/tokenizer"


def test_prefixes_outgrow_the_unquantized_cache():
    for capacity in (None, 100_000, 400_000, 1_600_000):
        plan = Plan(FULL, capacity)
        assert prefixes.working_set(plan) > 2 * (capacity or 0)
        groups, each = prefixes.shape(plan)
        assert groups >= FULL.prefixes and each >= 1
    assert prefixes.shape(Plan(FULL)) == (8, 8)


def test_own_home_keeps_the_hub_cache(monkeypatch):
    monkeypatch.delenv("HF_HOME", raising=False)
    monkeypatch.setenv("HOME", "/users/one")
    env = bench.environment()
    assert env["HF_HOME"] == "/users/one/.cache/huggingface" and "HOME" in env
    assert "127.0.0.1" in env["no_proxy"].split(",")


def test_graphs_that_the_user_forbids_are_not_asked_for():
    model = Model.of("m=config,tokenizer")
    for user, asked in ([], True), (["--cuda-graph-backend-prefill=disabled"], False):
        args = arguments(model, "bf16-fa3", SHORT, 0.8, True, user, ["batch", "pressure"])
        assert ("--cuda-graph-bs-prefill" in args) == asked and "--cuda-graph-max-bs-decode=12" in args


@pytest.mark.parametrize(
    "scenarios, batch", [((), 1), (("decode", "prefill"), 1), (("batch",), 32), (("prefixes",), 8)]
)
def test_quick_graphs_are_those_of_what_is_measured(scenarios, batch):
    args = arguments(Model.of("m=config,tokenizer"), "bf16-fa3", FULL, 0.8, True, [], scenarios)
    assert f"--cuda-graph-max-bs-decode={batch}" in args


def test_every_server_gets_the_same_memory():
    for method, sizes in product(SERVERS, NAMED.values()):
        args = arguments(Model.of("m=config,tokenizer"), method, sizes, 0.8, True, ["--user"], SCENARIOS)
        assert "--mem-fraction-static=0.8" in args and "--load-format=dummy" in args and args[-1] == "--user"
        context = int(next(a for a in args if a.startswith("--context-length=")).split("=")[1])
        assert context > max(sizes.decode, default=0) + sizes.steps
        assert not sizes.concurrency or context > sum(sizes.pressure)
