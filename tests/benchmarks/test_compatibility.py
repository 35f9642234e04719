"""The program that starts servers of every family: which, what it makes of their answers and ends, its files, and the
document that is written from them."""

from __future__ import annotations

import csv
import json
import sys
import time
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import tokenizers
import torch
from transformers import PreTrainedTokenizerFast

from benchmarks.compatibility import __main__ as program
from benchmarks.compatibility import document, measure
from benchmarks.compatibility.families import FAMILIES, Family
from benchmarks.launch import ServerError

PLAIN = Family("plain", "Plain", "LlamaConfig", (4, 2, 32))
HYBRID = Family("hybrid", "Hybrid", "LlamaConfig", (4, 2, 32), states=True)
ON_GPUS = Family("on_gpus", "On GPUs", "LlamaConfig", (4, 2, 32), gpu_only="no kernel")


@pytest.mark.parametrize(
    ("output", "outcome", "words"),
    [
        ("loading\nerror: --kv-quant blockgtq: model type x: no; serve\n", "refused", "model type x: no"),
        ("sglang_blockgtq.options.KVQuantError: --kv-quant blockgtq: late\n", "failed", "late"),
        ("RuntimeError: --kv-quant blockgtq: ours\nBrokenPipeError: [Errno 32] Broken pipe\n", "failed", "ours"),
        ("  File '/a/b.py'\nIndexError: index 18\n", "failed", "IndexError: index 18"),
        ("nothing\n", "failed", "no reason found"),
    ],
)
def test_why_a_server_did_not_start(output, outcome, words):
    found = measure.why(output)
    assert found[0] == outcome and words in found[1]


def test_graphs_of_a_log():
    prefill, decode = (f"[x] Capture target {kind} CUDA graph end. elapsed=1\n" for kind in ("prefill", "decode"))
    assert [measure.graphs(log) for log in ("", decode, prefill + decode)] == ["off", "decode", "decode and prefill"]


def a_run(tmp_path, **given) -> measure.Run:
    values = {"device": "cuda", "name": "GPU", "stock": True, "fraction": 0.0625, "work": tmp_path}
    values |= {"tokenizer": tmp_path, "ids": [*range(260)], "user_args": ["--mine"]}
    return measure.Run(**{**values, **given})


def test_arguments(tmp_path):
    gpu, cpu = a_run(tmp_path), a_run(tmp_path, device="cpu", stock=False)
    packed, stock, host = gpu.arguments(HYBRID, 64), gpu.arguments(HYBRID, None), cpu.arguments(HYBRID, 1)
    assert set(packed) - set(stock) == {*measure.PACKED, f"--kv-quant-cache-dir={tmp_path}", "--page-size=64"}
    assert set(stock) < set(packed) and packed[-1] == "--mine" and "--mem-fraction-static=0.0625" in stock
    assert not any(arg.startswith("--max-total-tokens") for arg in packed)  # SGLang sizes both caches
    assert "--dtype=float32" in host and "--max-mamba-cache-size=16" in host
    assert "--max-mamba-cache-size=16" not in cpu.arguments(PLAIN, 1)
    assert gpu.environment(PLAIN)["PYTHONPATH"].startswith(str(measure.ALONE))
    assert cpu.environment(HYBRID)["TRITON_INTERPRET"] == "1" and "TRITON_INTERPRET" not in cpu.environment(PLAIN)


def test_sglang_knows_every_option_of_a_server(tmp_path):
    from argparse import ArgumentParser

    from sglang.srt.server_args import ServerArgs

    parser = ArgumentParser()
    ServerArgs.add_cli_args(parser)
    runs = a_run(tmp_path, user_args=[]), a_run(tmp_path, user_args=[], device="cpu")
    for args in (run.arguments(HYBRID, page) for run in runs for page in (64, None)):
        ours = [arg for arg in args if not arg.startswith("--kv-quant")]
        assert {arg.partition("=")[0] for arg in ours if arg[0] == "-"} <= set(parser._option_string_actions)
        parser.parse_args(["--model-path=x", *ours])


class StandIn:
    """A server whose cold answers are log-probability -2, those from its cache -2.5, and generated ones -2.25."""

    def __init__(self, log: str = "", start_s: float = 5.0):
        self.cached, self.start_s, self.log = False, start_s, log

    def info(self):
        quant = {"bytes_per_token": 40, "bf16_bytes_per_token": 80, "max_total_num_tokens": 700}
        return {"kv_quant": quant, "max_total_num_tokens": 350}

    def output(self):
        return self.log

    def flush(self):
        self.cached = False

    def generate(self, ids, new=1):
        self.cached = True
        return {"output_token_logprobs": [(-2.25, 9)] * new}

    def logprobs(self, ids, start):
        return [-2.5 if self.cached else -2.0] * (len(ids) - start - 1), 192 if self.cached else 0


@pytest.fixture
def answers() -> measure.Answers:
    ids = [*range(measure.LENGTH)]
    return measure.Answers.of(StandIn("Capture target decode CUDA graph end"), ids)


def test_what_a_server_is_asked(answers):
    assert len(answers.cold) == len(answers.warm) == measure.LENGTH - measure.PREFIX - 1
    assert len(answers.decoded) == len(answers.reread) == measure.NEW - 1
    assert (answers.cold[0], answers.warm[0], answers.decoded[0], answers.reread[0]) == (-2, -2.5, -2.25, -2)
    assert answers.hit == 192 and answers.graphs == "decode"


@pytest.mark.parametrize("wrong", [None, float("nan")])
def test_answers_that_are_no_numbers(monkeypatch, wrong):
    monkeypatch.setattr(StandIn, "generate", lambda self, ids, new=1: {"output_token_logprobs": [(wrong, 9)] * new})
    with pytest.raises(measure.AnswerError, match="15 log-probabilities are no numbers|16 log-probabilities"):
        measure.Answers.of(StandIn(), [*range(measure.LENGTH)])


def test_a_row_of_a_gpu_is_compared_with_stock_sglang(answers):
    plain = [-2.125] * len(answers.cold)
    row = measure.compared(answers, answers, plain, sized=True)
    assert (row["tokens"], row["bf16_tokens"], row["bytes"], row["bf16_bytes"]) == (700, 350, 40, 80)
    assert (row["cold"], row["warm"], row["read"], row["decode"]) == (0, 0.5, 0.5, 0.25)
    assert (row["bf16_cold"], row["bf16_read"], row["outcome"]) == (0.125, 0.5, "served")
    failed = measure.compared(answers, ("failed", "no kernel"), None, sized=True)
    assert failed["words"] == "stock SGLang: no kernel" and "cold" not in failed and "bf16_tokens" not in failed
    alone = measure.compared(answers, answers, ("failed", "no class"), sized=True)
    assert alone["words"] == "transformers: no class" and alone["cold"] == 0 and "bf16_cold" not in alone


def test_a_row_of_a_cpu_is_compared_with_transformers(answers):
    row = measure.compared(answers, None, [-2.125] * len(answers.cold), sized=False)
    assert (row["cold"], row["warm"]) == (0.125, 0.375) and not {"tokens", "bf16_tokens", "bf16_cold"} & set(row)


@pytest.mark.parametrize(("stock", "more"), [(None, ""), (("failed", "x"), "; stock SGLang fails, too")])
def test_a_row_of_a_server_that_failed(answers, stock, more):
    row = measure.compared(("failed", "IndexError: 1"), stock, None, sized=True)
    assert row == {"outcome": "failed", "words": "IndexError: 1" + more}
    assert "stock SGLang serves it" in measure.compared(("failed", "a"), answers, answers.cold, sized=True)["words"]


@pytest.fixture
def started(monkeypatch, answers):
    """Builds and starts nothing; keeps which servers were asked for, by page size."""
    pages, result = [], {}
    monkeypatch.setattr(Family, "build", lambda *_: None)
    monkeypatch.setattr(measure, "exact", lambda family, folder, ids: answers.cold)

    def ask(run, family, page, folder):
        pages.append(page)
        return result.get(page, answers)

    monkeypatch.setattr(measure, "ask", ask)
    return SimpleNamespace(pages=pages, result=result)


def test_one_stock_server_for_all_page_sizes(started, tmp_path):
    run = a_run(tmp_path)
    found = [measure.measured(run, PLAIN, page) for page in (1, 64)]
    assert started.pages == [1, None, 64] and [row["page_size"] for row in found] == [1, 64]
    assert found[0] == found[1] | {"page_size": 1} and found[0]["bf16_tokens"] == 350
    assert (found[0]["device"], found[0]["dtype"], found[0]["heads"]) == ("GPU", "bfloat16", "4/2 of 32")


def test_what_is_refused_is_started_once(started, tmp_path):
    started.result[1], run = ("refused", "MLA"), a_run(tmp_path)
    row = measure.measured(run, PLAIN, 1)
    assert started.pages == [1] and row["words"] == "MLA" and "page_size" not in row
    assert measure.measured(run, PLAIN, 64) is None and started.pages == [1]


def test_a_packed_cache_without_the_stock_one(started, tmp_path, monkeypatch):
    """Time was over: what is known is a row."""
    ask = measure.ask

    def no_stock(run, family, page, folder):
        if page is None:
            raise measure.OutOfTime
        return ask(run, family, page, folder)

    monkeypatch.setattr(measure, "ask", no_stock)
    row = measure.measured(a_run(tmp_path), PLAIN, 1)
    assert row["outcome"] == "served" and row["words"] == f"stock SGLang: {measure.NO_TIME}"
    assert row["read"] != "" and "cold" not in row and "bf16_tokens" not in row


def test_what_a_cpu_cannot_run_is_not_started(started, tmp_path):
    run = a_run(tmp_path, device="cpu", name="cpu")
    row = measure.measured(run, ON_GPUS, 1)
    assert not started.pages and (row["outcome"], row["words"]) == ("not run", "no kernel")
    assert measure.measured(run, ON_GPUS, 64) is None
    assert measure.measured(a_run(tmp_path), ON_GPUS, 64)["outcome"] == "served" and started.pages == [64, None]


def test_a_cache_that_is_sized_among_others_is_no_row(tmp_path, monkeypatch):
    """The plugin's own line tells that it was at work."""
    server = SimpleNamespace(output=lambda: "nothing of it")
    monkeypatch.setattr(measure.Run, "server", lambda *_: nullcontext(server))
    assert measure.ask(a_run(tmp_path), PLAIN, 1, tmp_path)[1].startswith("the cache was not sized as if")


def test_no_server_starts_after_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "Server", lambda *args, **kwargs: pytest.fail("a server was started"))
    with pytest.raises(measure.OutOfTime):
        measure.ask(a_run(tmp_path, end=time.monotonic() - 1), PLAIN, 1, tmp_path)


def test_a_server_that_dies_leaves_its_words(tmp_path, monkeypatch):
    def server(folder, *args, log, env):
        log.write_text("IndexError: index 18\n")
        raise ServerError("died")

    monkeypatch.setattr(measure, "Server", server)
    assert measure.ask(a_run(tmp_path, logs=tmp_path), PLAIN, 1, tmp_path) == ("failed", "IndexError: index 18")
    assert (tmp_path / "plain_1.log").exists()


def test_caches_are_sized_as_if_alone(monkeypatch, caplog):
    """Of a GPU with 64 GiB the process holds 2; what others hold and what SGLang measured do not matter."""
    caplog.set_level("INFO")
    monkeypatch.syspath_prepend(str(measure.ALONE))
    monkeypatch.delitem(sys.modules, "blockgtq_alone", raising=False)
    import blockgtq_alone
    from sglang.srt.mem_cache import kv_cache_configurator

    assert callable(kv_cache_configurator.KVCacheConfigurator._profile_available_bytes)
    assert blockgtq_alone._TARGET.startswith(kv_cache_configurator.__name__ + ".KVCacheConfigurator.")

    def orig(self, pre_model_load_memory):
        free = kv_cache_configurator.get_available_gpu_memory("cuda", 0, distributed=False, cpu_group=None)
        return int(100 * pre_model_load_memory + free)

    gib = blockgtq_alone.GIB
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(kv_cache_configurator, "get_available_gpu_memory", real := lambda *_, **__: 5)
    assert blockgtq_alone.size_alone(orig, None, 3) == 305  # a CPU's is left to SGLang
    for name, value in {
        "is_available": True,
        "current_device": 0,
        "get_device_properties": SimpleNamespace(total_memory=64 * gib),
        "empty_cache": None,
        "memory_reserved": 2 * gib,
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    assert blockgtq_alone.size_alone(orig, None, 3) == 6462 and measure.SIZED in caplog.text
    assert kv_cache_configurator.get_available_gpu_memory is real


@pytest.fixture
def model_folder(monkeypatch, tmp_path):
    """With a tokenizer of one token for each number."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "tokenizer_config.json").write_text("{}")
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda _: lambda _: {"input_ids": [*range(999)]})
    return folder


@pytest.fixture
def asked(monkeypatch, model_folder):
    """Measures nothing, and keeps which families and page sizes were asked for."""
    names = []

    def measured(run, family, page):
        assert run.tokenizer == model_folder and len(run.ids) == measure.LENGTH and run.user_args == ["--a"]
        names.append((family.name, page))
        if family is FAMILIES[2] and page == 64:
            raise RuntimeError("a bug")
        return {"family": family.name, "outcome": "served", "page_size": page}

    monkeypatch.setattr(program, "measured", measured)
    monkeypatch.setattr(program, "missing_plugin", lambda args: None)
    return names


def test_files(asked, model_folder, tmp_path, capsys):
    out, (first, second, third) = tmp_path / "deep" / "c.csv", (family.name for family in FAMILIES[:3])
    args = ["--tokenizer", str(model_folder), "--out", str(out), "--server-args=--a", "--commit", "abc"]
    args += ["--device=cpu", "--parallel=2"]
    assert program.main([*args, "--only", second, "--page-sizes=1"]) == 0
    whole = out.read_text()
    unfinished = whole.splitlines()[1].split(",")
    unfinished[0], unfinished[list(measure.COLUMNS).index("words")] = first, f"stock SGLang: {measure.NO_TIME}"
    out.write_text(whole + ",".join(unfinished) + "\na_former_family" + "," * (len(measure.COLUMNS) - 1) + "\n")
    assert program.main([*args, "--resume", "--only", first, second]) == 0
    assert sorted(asked) == [(first, 1), (first, 64), (second, 1), (second, 64)]
    assert program.main([*args, "--resume", "--only", third]) == 1  # what went wrong is no row
    assert "RuntimeError: a bug" in capsys.readouterr().out
    with out.open() as file:
        found = [(row["family"], row["page_size"]) for row in csv.DictReader(file)]
    assert found == [(first, "1"), (first, "64"), (second, "1"), (second, "64"), (third, "1")]
    made = json.loads(out.with_suffix(".json").read_text())
    assert made["commit"] == "abc" and made["server_args"]["packed"][-1] == "--a" and "/" not in made["command"]


def test_finished_rows():
    rows = [
        {"family": "plain", "outcome": "served", "page_size": "1"},
        {"family": "hybrid", "outcome": "refused", "page_size": ""},
    ]
    assert measure.finished(PLAIN, rows, [1, 64]) == {1} and measure.finished(HYBRID, rows, [1, 64]) == {1, 64}
    assert measure.finished(ON_GPUS, rows, [1, 64]) == set()


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--tokenizer", "{}", "--out", "c.csv"], "no tokenizer_config.json there; name a model's folder"),
        (["--out", "c.csv"], "--tokenizer and --out are needed"),
        (["--tokenizer", "{}", "--out", "c.csv", "--page-sizes=1,1"], "different numbers of tokens are needed"),
    ],
)
def test_bad_input(tmp_path, capsys, args, words):
    with pytest.raises(SystemExit):
        program.main([arg.format(tmp_path) for arg in args])
    assert words in capsys.readouterr().err


def test_a_gpu_that_is_not_there(model_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(program, "missing_plugin", lambda args: None)
    with pytest.raises(SystemExit, match="--device cuda: PyTorch finds no GPU; use --device cpu"):
        program.main(["--tokenizer", str(model_folder), "--out", str(tmp_path / "c.csv"), "--device=cuda"])


def test_families_are_told_apart():
    assert len({family.name for family in FAMILIES}) == len(FAMILIES)
    assert len({family.like for family in FAMILIES}) == len(FAMILIES)


def test_what_checkpoints_write_otherwise(tmp_path):
    """A value that is none stays, since another one is the default."""
    words = tokenizers.models.WordLevel({"a": 0, "b": 1, "<unk>": 2}, unk_token="<unk>")
    PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(words)).save_pretrained(tmp_path / "tokenizer")
    small = {"hidden_size": 16, "intermediate_size": 16, "final_logit_softcapping": None}
    family = Family("x", "X", "Gemma2Config", (2, 1, 8), small, saved={"pattern": "M-", "query_pre_attn_scalar": None})
    family.build(tmp_path / "tokenizer", tmp_path / "model", "bfloat16")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["pattern"] == "M-" and "query_pre_attn_scalar" not in config
    assert config["final_logit_softcapping"] is None and config["dtype"] == "bfloat16" and config["vocab_size"] == 3
    assert (tmp_path / "model" / "tokenizer.json").exists()


def test_the_document_is_what_the_program_writes():
    text = document.DOC.read_text()
    files = document.RESULTS.glob("compatibility_*.csv")
    assert document.rewrite(text, files) == text, "run python -m benchmarks.compatibility --write-docs"


def test_a_table(tmp_path):
    served = {"family": "a", "like": "A", "heads": "4/2 of 32", "device": "GPU", "dtype": "bfloat16", "page_size": 1}
    served |= {"graphs": "decode", "outcome": "served", "bytes": 4160, "bf16_bytes": 8192, "read": 0.00251}
    other = served | {"page_size": 64, "read": 0.00301}
    refused = {"family": "b", "like": "B", "heads": "1/1 of 16", "device": "GPU", "dtype": "bfloat16"}
    refused |= {"outcome": "refused", "words": "error: --kv-quant blockgtq: MLA; serve this model without --kv-quant"}
    path = tmp_path / "compatibility_gpu.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, measure.COLUMNS)
        writer.writeheader()
        writer.writerows([served, other, refused])
    assert document.generated([path]).splitlines() == [
        "On one GPU, K8V8, bfloat16 ([`compatibility_gpu.csv`](../benchmarks/results/compatibility_gpu.csv)):",
        "",
        "| like | heads, query/KV of channels | page | outcome | bytes a token, bf16 | read |",
        "| :--- | :--- | ---: | :--- | ---: | ---: |",
        "| A | 4/2 of 32 | 1, 64 | served, decode graphs | 4,160, 8,192 | 0.0030 |",
        "| B | 1/1 of 16 |  | refused: MLA |  |  |",
    ]
    with pytest.raises(ValueError, match="one <!-- families"):
        document.rewrite("no markers", [path])
