"""Real models side by side: figures against another way to them, a whole run on a tiny model, a real one's answers."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from characters import Characters, make_lab
from elsewhere import DEVICE, Elsewhere, is_away, send_module

from benchmarks.fidelity import __main__ as program
from benchmarks.fidelity import attention, real_models, run
from benchmarks.fidelity import lab as lab_module
from benchmarks.fidelity.coder import Cache
from benchmarks.fidelity.lab import Lab, without_mean
from benchmarks.fidelity.methods import Packed
from benchmarks.fidelity.model import rotate
from benchmarks.fidelity.real_models import HALF_PAGE, IN_COLUMNS, Entry, Judge
from benchmarks.fidelity.rows import read_csv
from sglang_blockgtq.calibrate.build import PAGE
from sglang_blockgtq.calibrate.hf import collect
from sglang_blockgtq.calibrate.rope import RopeBlocks

LIMIT = 100  # all 400 tokens of the tiny model's text are attended to, a border of pages among them
QWEN = "qwen2.5-coder-0.5b"


@pytest.fixture
def judge(tiny_subject) -> Judge:
    return Judge(make_lab(tiny_subject, LIMIT), "tiny")


def test_queries_at_borders_are_where_half_a_page_later_one_ends_and_one_begins():
    positions = real_models.border_queries(3 * PAGE)
    assert [(p + HALF_PAGE) % PAGE for p in positions] == [PAGE - 1, 0] * 3
    assert real_models.border_queries(HALF_PAGE) == []


def test_figures_are_those_of_the_ablation(judge):
    """Whose caches are coded another way, by sides."""
    lab = judge.lab
    for entry in (Entry("template", 3, 2), Entry("paper", 2, 2)):
        for seed in (0, 1):
            row = judge.measure(entry, seed)
            cache = Cache("", *lab.of_table(lab.table(entry.name, entry.k_bits, entry.v_bits, seed)))
            kl = lab.attention_kl(cache)
            assert row["attention_kl"] == pytest.approx(kl["all"], rel=1e-3)
            assert row["attention_kl_shift"] == pytest.approx(kl["shift"], rel=1e-3)
            sequences = [s for text in lab.texts for s in text.sequences]
            score, exact = (lab.answers(method, sequences) for method in (cache, None))
            assert row["kl"] == pytest.approx(score.kl_final, rel=1e-3) and row["tokens"] == score.tokens == 99 * 5
            assert row["ppl"] == pytest.approx(score.ppl, rel=1e-4) and row["ppl_exact"] == pytest.approx(exact.ppl)
            assert row["bytes"] == pytest.approx(sum(cache.sizes(1)))
    others = judge.measure(Entry("template", 3, 2), 1)
    assert others["kl"] != judge.measure(Entry("template", 3, 2), 0)["kl"], "another rotation"


def test_worst_layer_and_layers_better_than_paper(judge):
    """From the fidelity program's rows: the paper's at the whole bits below, of the same rotation."""
    row, lab = judge.measure(Entry("template", 2.5, 2), 1), judge.lab
    mae, kl = {}, {}
    for name, bits in (("template", 2.5), ("paper", 2), ("paper", 3)):
        method = Packed(lab.table(name, bits, 2, 1))
        for layer in (0, 1):
            q, k, positions = (x[layer] for x in (judge.captured.q, judge.captured.k, [judge.captured.positions] * 2))
            q, positions = q[: len(judge.drawn)], positions[: len(judge.drawn)]
            true = attention.reference(q, k, positions, lab.scale)
            read = method.round_trip(layer, k, judge.captured.v[layer])[0]
            found = attention.compare(true, q, read, positions, lab.scale)
            mae[name, bits, layer], kl[name, bits, layer] = (float(found[x].mean()) for x in ("mae", "softmax_kl"))
    mine = [mae["template", 2.5, layer] for layer in (0, 1)]
    assert row["layers_better_than_paper"] == sum(mine[i] < mae["paper", 2, i] for i in (0, 1))
    assert row["logit_mae_mean"] == pytest.approx(sum(mine) / 2, rel=1e-5)
    layers = [kl["template", 2.5, layer] for layer in (0, 1)]
    assert row["worst_layer_kl"] == pytest.approx(max(layers)) and row["worst_layer"] == layers.index(max(layers))
    judge.attention_of(Entry("paper", 2, 2), 1)["mae"] = torch.tensor([0.0, 1e9])
    assert judge.measure(Entry("template", 2.5, 2), 1)["layers_better_than_paper"] == 1
    wide = judge.measure(Entry("template", 8, 8), 0)
    assert "layers_better_than_paper" not in wide and wide["attention_kl"] < row["attention_kl"] / 50


def test_a_fault_beyond_a_border_shows_only_where_there_is_one(judge):
    """Keys from position PAGE on are lost: the text in place ends before, half a page later it does not."""

    class Faulty:
        def __init__(self, start):
            self.start = start

        def round_trip(self, layer, k, v, first=0):
            lost = torch.arange(first, first + len(k)) >= self.start
            return torch.where(lost[:, None, None], torch.zeros_like(k), k), v

    found = judge.attention(Faulty(PAGE))
    assert float(found["kl"].max()) < 1e-6 and float(found["shift"].max()) > 0.1 and float(found["page"].max()) > 1e-4
    never = judge.attention(Faulty(1 << 20))
    assert all(float(x.max()) < 1e-5 for name, x in never.items() if name != "mae")


def test_shifted_keys_are_coded_at_their_positions(judge):
    """Keys with a bias in a slow block: a page mean that is not turned to the shifted page would lie across it."""
    subject, entry = judge.lab.subject, Entry("template", 4, 4)
    plain = judge.attention(judge.method(entry, 0))
    bias = torch.zeros(2, 64)
    bias[:, [31, 63]] = 50.0  # one block: channels i and i + 32 rotate together
    for i, k in judge.captured.k.items():
        turned = rotate(bias.expand_as(k), subject.rope[i], judge.lab.inv_freq, torch.arange(len(k)))
        judge.captured.k[i] = k + turned
    own, mean = subject.moments, subject.moments.mean.clone()
    mean[..., 31, :] += 50.0
    biased = replace(own, k=own.k + (mean.square() - own.mean.square()).sum(-1), mean=mean)
    subject.moments = biased
    coded = judge.attention(judge.method(entry, 0))
    subject.moments = without_mean(biased)
    whole = judge.attention(judge.method(entry, 0))
    for place in ("kl", "shift", "page"):
        assert float(coded[place].mean()) < 1.5 * float(plain[place].mean()), place
        assert float(coded[place].mean()) < 0.6 * float(whole[place].mean()), place


def test_every_cache_runs_on_another_device(tiny_llama):
    generator = torch.Generator().manual_seed(1)
    text, ids = (torch.randint(0, 97, (n,), generator=generator).tolist() for n in (256, 300))
    with Elsewhere():
        model, rope = send_module(tiny_llama(64)), [RopeBlocks(64, 64)] * 2
        subject = run.Subject(model, rope, collect(model, [text], rope, progress=False), ids, "", [text])
        judge = Judge(make_lab(subject, LIMIT), "tiny")
        assert judge.lab.device == DEVICE and is_away(judge.captured.k[0])
        for name in dict.fromkeys(e.name for e in real_models.entries()):
            row = judge.measure(next(e for e in real_models.entries() if e.name == name), 0)
            assert row["kl"] == row["kl"] and row["tokens"] == 99 * 5


@pytest.fixture
def run_program(tiny_subject, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "load", lambda *args: tiny_subject)
    monkeypatch.setattr(lab_module, "AutoTokenizer", Characters)
    monkeypatch.setattr(real_models, "sources", lambda *args: {"model": {"name": "tiny"}})
    out = tmp_path / "real.csv"

    def go(*options):
        return program.main(["real-models", "--model-path", "some/tiny", "--out", str(out), "--queries", "4", *options])

    return SimpleNamespace(go=go, out=out, read=lambda: read_csv(out), log=out.with_suffix(".json"))


def test_program_measures_every_cache_that_fits(run_program, capsys):
    """With more bytes of one kind the answer changes less."""
    assert run_program.go("--limit", str(LIMIT), "--seeds", "1") == 0
    rows = run_program.read()
    labels = [(r["method"], float(r["k_bits"]), float(r["v_bits"])) for r in rows]
    quarters = {f"{n} {b}" for n in IN_COLUMNS for b in ("K2.25V2.25", "K3.25V3", "K3V3.25", "K4.25V4", "K4V4.25")}
    fit = [e for e in real_models.entries() if e.label not in quarters]
    assert labels == [(e.name, e.k_bits, e.v_bits) for e in fit]
    assert {(r["model"], r["seed"]) for r in rows} == {("tiny", "0")}
    runs = json.loads(run_program.log.read_text())["runs"]
    assert set(runs[0]["skipped"]) == quarters
    assert "template K3.25V3 is left out: K3.25V3 of head_dim 64 does not lie in columns" in capsys.readouterr().out
    assert runs[0]["evaluation"]["scored"] == int(rows[0]["tokens"]) and runs[0]["evaluation"]["layers"] == 2
    assert runs[0]["command"].startswith("python -m benchmarks.fidelity real-models --model-path some/tiny --out real")
    by = {(r["method"], float(r["k_bits"]), float(r["v_bits"])): r for r in rows}
    exact = by["exact", 32, 32]
    assert float(exact["kl"]) == 0 and exact["ppl"] == exact["ppl_exact"] and exact["attention_kl"] == ""
    for name in IN_COLUMNS:
        for column in ("kl", "attention_kl", "attention_kl_shift", "attention_kl_page", "logit_mae_mean"):
            falling = [float(by[name, b, b][column]) for b in (2, 3, 4, 8)]
            assert falling == sorted(falling, reverse=True) and falling[-1] > 0, (name, column)
        assert all(by[name, *pair]["layers_better_than_paper"] in "012" for pair in real_models.WHOLE)
        assert by[name, 8, 8]["layers_better_than_paper"] == ""
    assert by["paper", 3, 3]["layers_better_than_paper"] == ""


def test_the_first_rotation_of_everything_comes_first():
    labels = [(e.label, seed) for e, seed in real_models.plan([], 3)]
    assert len(set(labels)) == len(labels) and [seed for _, seed in labels] == sorted(seed for _, seed in labels)
    once = {label for label, _ in labels} - {label for label, seed in labels if seed == 2}
    assert once == {"exact K32V32", "bf16 K16V16", "fp8_e4m3 K8V8"}
    assert {e.name for e, _ in real_models.plan(["K3V3", "bf16"], 1)} == {"bf16", "uniform", "paper", *IN_COLUMNS}


def test_a_file_is_gone_on_with(run_program, monkeypatch):
    """After an interruption nothing is measured twice; another model comes behind; what does not belong is refused."""
    measured, plain = [], Judge.measure
    monkeypatch.setattr(Judge, "measure", lambda self, e, s: measured.append(e.label) or plain(self, e, s))
    options = ["--limit", str(LIMIT), "--seeds", "1", "--append"]
    assert run_program.go(*options, "--only", "bf16") == 0
    assert run_program.go(*options, "--only", "bf16", "uniform K3V3") == 0
    assert measured == ["bf16 K16V16", "uniform K3V3"]
    assert run_program.go(*options, "--only", "bf16", "--name", "other") == 0
    rows = [(r["model"], r["method"]) for r in run_program.read()]
    assert rows == [("tiny", "bf16"), ("tiny", "uniform"), ("other", "bf16")]
    runs = json.loads(run_program.log.read_text())["runs"]
    assert [r["name"] for r in runs] == ["tiny", "tiny", "other"]
    assert runs[2]["command"].endswith(
        "--name other --out real.csv --append --limit 100 --seeds 1 --only bf16 --queries 4"
    )
    with pytest.raises(SystemExit):
        run_program.go("--limit", "64", "--append")
    assert run_program.go("--limit", str(LIMIT), "--seeds", "1", "--only", "bf16") == 0
    assert len(run_program.read()) == 1 and len(json.loads(run_program.log.read_text())["runs"]) == 1


def test_a_row_that_fails_is_recorded_and_stops_no_other(run_program, monkeypatch):
    plain = Judge.method

    def method(self, entry, seed):
        if entry.name == "bf16":
            raise RuntimeError("out of luck")
        return plain(self, entry, seed)

    monkeypatch.setattr(Judge, "method", method)
    assert run_program.go("--limit", str(LIMIT), "--only", "bf16", "fp8_e4m3") == 1
    assert [r["method"] for r in run_program.read()] == ["fp8_e4m3"]
    (entry,) = json.loads(run_program.log.read_text())["runs"]
    assert entry["failed"] == {"bf16 K16V16, rotation 0": "RuntimeError: out of luck"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--only", "nobody"], "--only nobody: no row is called so; there are exact K32V32"),
        (["--limit", "63"], "--limit 63: at least 64 tokens"),
        (["--append", "--limit", "64"], "rows of tiny on 495 tokens, this run has 315"),
        (["--append", "--limit", "100", "--name", "new"], "real.csv has other columns"),
    ],
)
def test_what_does_not_fit_is_refused(run_program, capsys, options, message):
    row = "tiny,bf16,16,16,256,0,1,1,0,,,,,,,,495"
    header = ",".join(real_models.FIELDS) if "new" not in options else "model,method"
    run_program.out.write_text(f"{header}\n{row}\n")
    with pytest.raises(SystemExit):
        run_program.go(*options)
    assert message in capsys.readouterr().err
    assert run_program.out.read_text() == f"{header}\n{row}\n"


@pytest.fixture(scope="module")
def qwen(load_script) -> Lab:
    """Of Qwen2.5-Coder-0.5B, whose keys are biased in slow blocks, on the first tokens of five texts."""
    path = load_script("get_model").cache_folder() / QWEN
    if not path.is_dir():
        pytest.skip(f"no model at {path}: python scripts/get_model.py {QWEN} makes it")
    return Lab(run.load(str(path)), str(path), queries=8, limit=128)


def test_a_biased_model_keeps_its_answers(qwen):
    judge = Judge(qwen, QWEN)
    shipped = judge.measure(Entry("template", 3, 3), 0)
    assert shipped["bytes"] == 52 and shipped["kl"] < 0.09
    assert shipped["layers_better_than_paper"] >= len(qwen.subject.rope) - 1  # all, on longer texts
    places = [shipped[f"attention_kl{place}"] for place in ("", "_shift", "_page")]
    assert max(places) < 1.5 * min(places)
    table = qwen.table("template", 3, 3, moments=without_mean(qwen.subject.moments))
    assert qwen.answers(Packed(table), judge.sequences).kl_final > 2 * shipped["kl"]
