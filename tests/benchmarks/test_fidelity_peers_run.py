"""Peers beside this package in one run: mixed caches inside a model, and the whole program on a tiny one."""

import json
from types import SimpleNamespace

import pytest
import torch
from characters import Characters, make_lab

from benchmarks.fidelity import __main__ as program
from benchmarks.fidelity import lab as lab_module
from benchmarks.fidelity import peers, perplexity, run
from benchmarks.fidelity.exact import Exact, Mixed
from benchmarks.fidelity.methods import IntPerToken
from benchmarks.fidelity.model import attention_hook
from benchmarks.fidelity.rows import read_csv

LENGTH = 256  # two tiles of KVarN, and less than OSCAR's window


class Same:
    name, k_bits, v_bits, bytes_per_token_head = "same", 32, 32, 512

    def round_trip(self, layer, k, v, first=0):
        return k, v


def test_each_token_reads_its_own_mixture(tiny_subject):
    """Exact keys make the model's own answers; a mixture gives each token what it would read alone as the last one."""
    model, ids = tiny_subject.model, tiny_subject.ids[:60]
    plain = perplexity.hidden_states(model, ids, None)
    rules = Exact(sink=3, group=8), Exact(recent=5)
    torch.testing.assert_close(
        perplexity.hidden_states(model, ids, Mixed(Same(), 64, 64, *rules)), plain, atol=1e-2, rtol=1e-2
    )  # float16
    coarse = Mixed(IntPerToken(2, 64, 64), 64, 64, *rules)
    read = perplexity.hidden_states(model, ids, coarse)
    assert (read - plain).abs().max() > 0.1
    seen: dict[int, tuple] = {}

    def keep(layer, q, k, v, scale):
        seen.setdefault(layer, (q, k, v, scale))
        return coarse.attend(layer, q, k, v, scale)

    with torch.inference_mode(), attention_hook(model, keep):
        model.base_model(torch.tensor([ids]), use_cache=False)
    q, k, v, scale = seen[0]
    whole = coarse.attend(0, q, k, v, scale)
    for last in (10, 31, 59):
        keys, values = coarse.round_trip(0, k[: last + 1], v[: last + 1])
        group = q.shape[1] // k.shape[1]
        for head in range(q.shape[1]):
            weights = (keys[:, head // group] @ q[last, head] / 8).softmax(0)
            torch.testing.assert_close(whole[last, head], weights @ values[:, head // group], atol=1e-4, rtol=1e-4)


def test_halves_are_the_whole(tiny_subject):
    """Both halves together score what one pass scores, the second half alone its own tokens."""
    judge = peers.Judge(make_lab(tiny_subject), "tiny", [tiny_subject.ids[:100], tiny_subject.ids[100:200]])
    early, late = judge.halves(IntPerToken(2, 64, 64))
    whole = perplexity.Score()
    for ids, true in zip(judge.scored, judge.true, strict=True):
        hidden = perplexity.hidden_states(tiny_subject.model, ids, IntPerToken(2, 64, 64))
        perplexity.add_score(whole, tiny_subject.model, ids, hidden, true)
    both = perplexity.together([early, late])
    assert (early.tokens, late.tokens, both.tokens) == (100, 98, whole.tokens)
    assert both.kl == pytest.approx(whole.kl) and both.ppl == pytest.approx(whole.ppl)


@pytest.fixture
def run_program(tiny_subject, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "load", lambda *args: tiny_subject)
    monkeypatch.setattr(lab_module, "AutoTokenizer", Characters)
    monkeypatch.setattr(peers, "sources", lambda *args: {"model": {"name": "tiny"}})
    monkeypatch.setattr(peers, "SHORTEST", LENGTH)
    out = tmp_path / "peers.csv"

    def go(*options):
        chosen = ("--model-path", "some/tiny", "--out", str(out), "--length", str(LENGTH))
        return program.main(["peers", *chosen, *options])

    return SimpleNamespace(go=go, out=out, read=lambda: read_csv(out), log=out.with_suffix(".json"))


def test_program_measures_every_cache(run_program):
    assert run_program.go() == 0
    rows = run_program.read()
    entries = list(peers.entries())
    assert [peers.key(r)[1:] for r in rows] == [
        (e.name, float(e.k_bits), float(e.v_bits), *map(str, e.exact)) for e in entries
    ]
    assert len({peers.key(r) for r in rows}) == len(rows) and {r["tokens"] for r in rows} == {str(2 * (LENGTH - 1))}
    kl = {peers.key(r)[1:]: float(r["kl"]) for r in rows}
    none = ("none", "none")
    assert kl["exact", 32, 32, *none] == 0
    assert kl["template", 2, 2, *none] > kl["template", 3, 3, *none] > kl["template", 4, 4, *none] > 0
    for name in ("oscar", "oscar-by-head", "template"):
        assert kl[name, 2, 2, "first 64 last 256", "first 64 last 256"] < 0.1 * kl[name, 2, 2, *none]
    sizes = {peers.key(r)[1:]: (float(r["bytes"]), float(r["bytes_at_length"])) for r in rows}
    assert sizes["kivi", 2, 2, "open 128", "last 128"] == pytest.approx((48, 24 + 26 + 12 + 64))
    assert sizes["kvarn", 4, 2, "first 128 open 128", "first 128 open 128"] == pytest.approx((57, 0.75 * 256 + 57 / 4))
    for name, bits, exact, ours in peers.WINDOWED:
        window = tuple(map(str, exact))
        assert sizes["template", *ours, *window][0] <= sizes[name, *bits, *window][0]
    (record,) = json.loads(run_program.log.read_text())["runs"]
    assert [t["tokens"] for t in record["evaluation"]["texts"]] == [LENGTH] * 2 and record["failed"] == {}
    assert record["command"].startswith("python -m benchmarks.fidelity peers --model-path some/tiny")


def test_a_file_is_gone_on_with(run_program):
    assert run_program.go("--only", "bf16") == 0
    assert run_program.go("--only", "bf16", "kivi K2V2", "--append") == 0
    assert [(r["method"], r["k_bits"]) for r in run_program.read()] == [("bf16", "16"), ("kivi", "2")]
    assert len(json.loads(run_program.log.read_text())["runs"]) == 2
    with pytest.raises(SystemExit):
        run_program.go("--texts", "1", "--append")


def test_windows_of_ones_own(run_program):
    assert run_program.go("--windows", "0+0", "0+8", "4+8", "--only", "K3V3", "--texts", "1") == 0
    rows = run_program.read()
    assert [r["exact_keys"] for r in rows] == [r["exact_values"] for r in rows] == ["none", "last 8", "first 4 last 8"]
    assert {(r["method"], r["k_bits"]) for r in rows} == {("template", "3")}
    none, last, both = (float(r["kl"]) for r in rows)
    assert none > last > both > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--windows", "4-8"], "4-8: FIRST+LAST is needed, as in 4+32"),
        (["--windows", "0+8", "--only", "oscar"], "--only oscar: no row is called so; there are template K2V2"),
        (["--only", "nobody"], "--only nobody: no row is called so; there are exact K32V32"),
        (["--length", "255"], "--length 255: at least 256 tokens"),
        (["--length", "401"], "--texts 2 --length 401: there are 5 texts"),
    ],
)
def test_what_does_not_fit_is_refused(run_program, capsys, options, message):
    with pytest.raises(SystemExit):
        run_program.go(*options)
    assert message in capsys.readouterr().err and not run_program.out.exists()
