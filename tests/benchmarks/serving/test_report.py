"""Records made by hand: files, verdicts on targets, tables, memory by process."""

from __future__ import annotations

import os
import sys
import time
from types import SimpleNamespace

import pytest

from benchmarks.serving import memory
from benchmarks.serving.record import UNFIT, UNMEASURED, Record, Row
from benchmarks.serving.report import page, write
from benchmarks.serving.scenarios import Failed, Unfit, batches, cost, decode
from benchmarks.serving.targets import TARGETS, verdicts

# A module that is None cannot be imported.
NO_MATPLOTLIB = {"matplotlib": None, "matplotlib.pyplot": None}
K3, BF16 = "blockgtq-k3v3", "bf16-fa3"


class Silent:
    """A server that has started and says nothing."""

    start_s = 1.0

    def output(self) -> str:
        return ""


@pytest.fixture
def record(tmp_path):
    return Record(tmp_path)


def both(record: Record, scenario: str, case: str, measure: str, bf16: float, ours: float) -> None:
    for method, value in ((BF16, bf16), (K3, ours)):
        record.put([Row("m", method, scenario, case, measure, value, "u")])


def met(record: Record, scenario: str, case: str) -> dict[str, bool | None]:
    return {v.target: v.met for v in verdicts(record) if (v.scenario, v.case, v.method) == (scenario, case, K3)}


def test_record_is_read_as_it_was_written(record, tmp_path):
    rows = [
        Row("m", K3, "decode", "4096", "step", 1.25, "ms", note="a, note"),
        Row("m", K3, "decode", "4096", "memory_peak", 3.0, "bytes"),
        Row("m", K3, "decode", "8192", state=UNFIT, note="too long"),
        Row("m", K3, "decode", "16384", state=UNMEASURED, note="the budget was spent"),
    ]
    record.put(rows)
    again = Record(tmp_path)
    assert again.rows == rows
    done = {case: again.finished(("m", K3, "decode", case)) for case in ("4096", "8192", "16384", "32768")}
    assert done == {"4096": True, "8192": True, "16384": False, "32768": False}
    again.put([Row("m", K3, "decode", "16384", "step", 2.0, "ms")])
    assert [r.case for r in again.rows] == ["4096", "4096", "8192", "16384"] and again.rows[-1].value == 2.0


def test_a_case_measured_again_returns_to_its_place(record):
    for method, case in ((K3, "8192"), (BF16, "131072"), (BF16, "8192"), (K3, "131072"), (BF16, "16384")):
        record.put([Row("m", method, "decode", case, "step", 1.0, "ms")])
    wanted = [(BF16, "8192"), (BF16, "16384"), (BF16, "131072"), (K3, "8192"), (K3, "131072")]
    assert [(r.method, r.case) for r in record.rows] == wanted
    assert [v.case for v in verdicts(record) if v.scenario == "decode"] == ["8192", "16384", "131072", "131072"]


@pytest.mark.parametrize(("ours", "wanted"), [(1.05, True), (1.06, False)])
def test_decode_target(record, ours, wanted):
    both(record, "decode", "4096", "step", 1.0, ours)
    assert met(record, "decode", "4096") == {"at most 1.05x bf16": wanted}


@pytest.mark.parametrize(("ours", "wanted"), [(0.75, True), (0.8, False)])
def test_decode_target_at_128k(record, ours, wanted):
    both(record, "decode", "131072", "step", 1.0, ours)
    assert met(record, "decode", "131072") == {"at most 1.05x bf16": True, "at most 0.75x bf16": wanted}


def test_longest_context_runs_where_bf16_does_not(record):
    record.put([Row("m", BF16, "decode", "524288", state=UNFIT, note="n")])
    record.put([Row("m", K3, "decode", "524288", "step", 9.0, "ms")])
    assert met(record, "decode", "524288") == {"at most 1.05x bf16": None, "runs": True}
    assert "does not fit bf16-fa3" in page(record, [])


@pytest.mark.parametrize(
    ("scenario", "case", "measure", "good", "bad"),
    [
        ("batch", "8x8192", "output_throughput", 1.16, 1.14),
        ("batch", "8x32768", "output_throughput", 1.71, 1.69),
        ("capacity", "start", "tokens", 4.61, 4.59),
        ("prefill", "32768", "speed", 0.96, 0.94),
        ("pressure", "32768+512 x64", "output_throughput", 2.1, 1.9),
        ("prefixes", "25x32768 by 2, round 3", "ttft_p50", 0.33, 0.34),
    ],
)
def test_ratio_targets(record, scenario, case, measure, good, bad):
    for ours, wanted in ((good, True), (bad, False)):
        both(record, scenario, case, measure, 1.0, ours)
        found = [v.met for v in verdicts(record) if v.case == case and v.measure == measure and v.method == K3]
        assert found[0] is wanted


def test_only_the_highest_load_counts(record):
    for slots in (8, 64):
        both(record, "pressure", f"1+1 x{slots}", "output_throughput", 1.0, 3.0)
    assert {v.case for v in verdicts(record) if v.scenario == "pressure"} == {"1+1 x64"}
    record.put([Row("m", "fp8-fa3", "pressure", "1+1 x64", "output_throughput", 2.5, "u")])
    assert met(record, "pressure", "1+1 x64") == {"at least 2x bf16": True, "at least 1.3x fp8-fa3": False}


def test_first_round_is_not_held_to_the_prefix_target(record):
    both(record, "prefixes", "8x9 by 8, round 1", "ttft_p50", 1.0, 1.0)
    assert [v for v in verdicts(record) if v.scenario == "prefixes"] == []


@pytest.mark.parametrize(("rate", "fits", "wanted"), [(0.99, 2000, True), (0.9, 2000, False), (0.9, 500, None)])
def test_hit_rate_is_held_to_what_fits(record, rate, fits, wanted):
    case = "8x9 by 8, round 2"
    for measure, value in (("hit_rate", rate), ("working_set", 1000)):
        record.rows.append(Row("m", K3, "prefixes", case, measure, value))
    record.put([Row("m", K3, "capacity", "start", "tokens", fits, "tokens")])
    assert [v.met for v in verdicts(record) if v.measure == "hit_rate"] == [wanted]


def test_missing_figures_are_neither_met_nor_missed(record):
    record.put([Row("m", K3, "decode", "4096", "step", 1.0, "ms")])
    assert met(record, "decode", "4096") == {"at most 1.05x bf16": None}
    record.put([Row("m", BF16, "decode", "4096", state=UNMEASURED, note="it died")])
    assert met(record, "decode", "4096") == {"at most 1.05x bf16": None}
    text = page(record, [])
    assert "bf16 was not measured" in text and "it died (decode 4096)" in text
    assert "met" not in [cell.strip(" *") for line in text.splitlines() for cell in line.split("|")]


def test_baseline_is_another_where_fa3_is_missing(record):
    record.put([Row("m", "bf16", "decode", "4096", "step", 2.0, "ms")])
    record.put([Row("m", K3, "decode", "4096", "step", 1.0, "ms")])
    assert met(record, "decode", "4096") == {"at most 1.05x bf16": True}
    assert "1 (0.50x)" in page(record, [])


def test_refused_server_is_in_the_report(record):
    record.meta["checks"]["m/fp8-fa3"] = {"failed": "7 of 9 are not finite"}
    assert "**refused**: 7 of 9 are not finite" in page(record, [])


def test_every_target_is_of_a_known_scenario():
    from benchmarks.serving.run import SCENARIOS

    assert {t.scenario for t in TARGETS} <= set(SCENARIOS)


def test_memory_of_the_servers_own_processes():
    mine = os.getpgid(0)
    apps = [(os.getpid(), 100), (999999999, 5), (1, 7), (os.getpid(), None), (os.getpid(), 20)]
    assert memory.of_group(apps, mine) == 120
    assert memory.of_group([(999999999, 5)], mine) is None


def test_memory_of_the_whole_device_where_processes_are_hidden(monkeypatch):
    monkeypatch.setattr(memory, "_nvml", lambda: ([(999999999, 5)], 700))
    assert memory.used(os.getpgid(0)) == (700.0, "all processes on all GPUs")
    monkeypatch.setattr(memory, "_nvml", lambda: ([(os.getpid(), 5)], 700))
    assert memory.used(os.getpgid(0)) == (5.0, "processes of the server")
    monkeypatch.setattr(memory, "_nvml", lambda: None)
    assert memory.used(os.getpgid(0)) == (None, "no NVML")


def server_info(cache: float) -> dict:
    """Of a server with 2 GiB of weights, half a GiB of graphs and 8 requests of 60 + 4 tokens, at 4 bytes each."""
    use = {"weight": 2.0, "kvcache": cache, "graph": {"decode": 0.5}}
    limits = {"effective_max_running_requests_per_dp": 8, "context_length": 60}
    return {"max_total_num_tokens": 1000, "internal_states": [{"memory_usage": use, **limits}]}


def test_memory_that_grows_with_the_cache_is_not_the_servers_own():
    """SGLang's table of requests is larger beside a cache that holds more tokens."""
    held = 8.0 * 2**30
    ctx = SimpleNamespace(server=Silent(), info=server_info(4.0), held=held, held_by="")
    ((_, values),) = cost.measure(ctx, ["start"])
    found = {v.measure: v.value for v in values}
    assert found["memory_requests"] == 9 * 64 * 4
    assert found["memory_rest"] == 1.5 * 2**30 - 9 * 64 * 4
    assert found["memory_weights"] == 2 * 2**30 and found["memory_graphs"] == 2**29


def test_memory_needed_holds_one_sequence(monkeypatch):
    result = {"input_len": 400, "output_len": 100, "batch_size": 1, "steady_state_output_throughput": 100.0}
    result["total_output_tokens"] = 100
    monkeypatch.setattr(batches, "run", lambda *_: [(400, result, (8.0 * 2**30, "all"))] * 3)
    ctx = SimpleNamespace(info=server_info(4.0), sizes=SimpleNamespace(steps=99))
    ((_, values),) = decode.measure(ctx, ["400"])
    found = {v.measure: v.value for v in values}
    assert found == {"step": 10, "memory_peak": 8 * 2**30, "memory_needed": 6 * 2**30 - 8 * 64 * 4}
    del ctx.info["internal_states"][0]["context_length"]
    ((_, values),) = decode.measure(ctx, ["400"])
    assert {v.measure for v in values} == {"step", "memory_peak"}, "what is not known is not guessed"


def runs_of(*runs: tuple[int, float | str]) -> list:
    """As batches.decode gives them: (length, ms a step or why not)."""
    out = []
    for length, ms in runs:
        if isinstance(ms, str):
            out.append((length, Unfit(ms)))
            continue
        result = {"input_len": length, "output_len": 129, "batch_size": 1, "steady_state_output_throughput": 1e3 / ms}
        out.append((length, [result, (ms, "all")]))
    return out


def test_a_pause_in_one_run_of_steps_does_not_count(monkeypatch):
    asked = []

    def decode_runs(ctx, name, batch, lengths, values):
        asked.extend(lengths)
        return runs_of((64, 4.0), (64, 5.0), (64, 4.1), (262144, 7.0), (128, "long"), (128, "long"), (128, "long"))

    monkeypatch.setattr(batches, "decode", decode_runs)
    outcomes = list(decode.measure(SimpleNamespace(info={}), ["64", "262144", "128"]))
    assert asked == [64] * 3 + [262144] + [128] * 3, "prompts that take minutes are read once"
    assert [case for case, _ in outcomes] == ["64", "262144", "128"]
    step, peak = outcomes[0][1]
    assert step.value == pytest.approx(4.1) and step.note == "means of 128 steps: 4 5 4.1" and peak.value == 5.0
    assert outcomes[1][1][0].value == pytest.approx(7.0) and outcomes[1][1][0].note == "mean of 128 steps"
    assert outcomes[2][1] == Unfit("long")


def test_a_length_that_failed_once_has_no_figure(monkeypatch):
    runs = runs_of((64, 4.0), (64, 5.0), (64, 4.1))
    runs[1] = (64, Failed("3 of 129 tokens were generated"))
    monkeypatch.setattr(batches, "decode", lambda *_: runs)
    assert list(decode.measure(SimpleNamespace(info={}), ["64"])) == [("64", runs[1][1])]


def test_smoke_figures_are_not_judged(record):
    both(record, "capacity", "start", "tokens", 1.0, 5.0)
    assert "## Targets" in page(record, [])
    record.meta["settings"] = {"sizes": {"name": "smoke"}}
    assert "## Targets" not in page(record, [])


def test_peak_since_the_last_look(monkeypatch):
    seen = iter([5.0, 9.0, 7.0])
    looked = []

    def used(group):
        looked.append(group)
        return next(seen, 2.0), "processes of the server"

    def wait(samples):
        deadline = time.monotonic() + 20
        while len(looked) < samples and time.monotonic() < deadline:
            time.sleep(0.001)

    monkeypatch.setattr(memory, "used", used)
    with memory.Sampler(3, every=0.001) as sampler:
        wait(5)
        assert sampler.take() == (9.0, "processes of the server")
        before = len(looked)
        wait(before + 2)
        assert sampler.take()[0] == 2.0


def test_report_without_matplotlib(record, tmp_path, monkeypatch, capsys):
    both(record, "decode", "4096", "step", 2.0, 1.0)
    for name, module in NO_MATPLOTLIB.items():
        monkeypatch.setitem(sys.modules, name, module)
    write(record, tmp_path)
    assert "matplotlib" in capsys.readouterr().err
    assert "1 (0.50x)" in (tmp_path / "report.md").read_text() and not list(tmp_path.glob("*.png"))
