"""The ablation: transforms, frames and budgets by what defines them; every row on a tiny model and a pretended GPU."""

import csv
import json
import re
from copy import copy
from dataclasses import replace
from itertools import combinations

import pytest
import torch
from characters import Characters, make_lab
from elsewhere import DEVICE, Elsewhere, is_away, send, send_module

from benchmarks.fidelity import __main__ as program
from benchmarks.fidelity import ablation, ablation_rows, budgets, klt, methods, run
from benchmarks.fidelity import lab as lab_module
from benchmarks.fidelity.ablation_rows import Recipe, recipes
from benchmarks.fidelity.coder import Cache, Frame, Side, mixed
from benchmarks.fidelity.lab import Lab
from benchmarks.fidelity.methods import Packed
from benchmarks.fidelity.model import rotate
from sglang_blockgtq.calibrate.build import PAGE
from sglang_blockgtq.calibrate.hf import collect
from sglang_blockgtq.calibrate.rope import RopeBlocks

DIM = 64


def possible() -> list[Recipe]:
    """Rows that a model of two layers can have: one layer cannot pay for the other's 8 bits."""
    return [r for r in recipes() if "at 8 bits" not in r.name or "more bytes" in r.name]


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_subject(tiny) -> run.Subject:
    generator = torch.Generator().manual_seed(1)
    text, ids = (torch.randint(0, 97, (n,), generator=generator).tolist() for n in (256, 300))
    rope = [RopeBlocks(DIM, DIM)] * 2
    return run.Subject(tiny, rope, collect(tiny, [text], rope, progress=False), ids, "", [text])


@pytest.fixture(scope="module")
def lab(tiny_llama) -> Lab:
    return make_lab(make_subject(tiny_llama(DIM)))


def test_shipped_sides_are_the_packed_rows(lab, monkeypatch):
    """One coder or many layouts, one norm or several, with page means or without: what the bytes that serve give back
    at any position, and their number."""
    monkeypatch.setattr(methods, "CHUNK", 16)
    k, v = draw(40, 2, DIM), draw(40, 2, DIM, seed=1)
    for name in ("template", "paper", "product-segment", "uniform"):
        table = lab.table(name, 3, 2)
        packed, cache = Packed(table), Cache("", *lab.of_table(table))
        assert (packed.codecs[0].mean is not None) == (name in ("template", "product-segment"))
        read = []
        for layer, first in ((0, 0), (1, 0), (1, PAGE - 20)):
            read.append(cache.round_trip(layer, k, v, first))
            for mine, theirs in zip(read[-1], packed.round_trip(layer, k, v, first), strict=True):
                torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)
        assert torch.equal(read[1][0][:20], read[2][0][:20])  # of the first page both times
        assert torch.equal(read[1][0][20:], read[2][0][20:]) == (packed.codecs[0].mean is None)
        assert cache.sizes(40) == packed.sizes(40)


def test_page_means_of_a_table_stay_in_its_frame(lab):
    with pytest.raises(ValueError, match="page means of their own"):
        lab_module.in_frame(lab, lab.keys("template", 3), 1)


def test_layers_that_are_mixed_keep_their_own_page_means(lab):
    k, plain = draw(40, 2, DIM), lab.keys("template", 3, moments=lab_module.without_mean(lab.subject.moments))
    side = mixed([plain, lab.keys("template", 3)])
    assert torch.equal(side.round_trip(0, k, PAGE), plain.round_trip(0, k))
    assert torch.equal(side.round_trip(1, k, PAGE), lab.keys("template", 3).round_trip(1, k, PAGE))


def test_pages_of_another_length_have_another_mean(lab):
    k, first = draw(40, 2, DIM), 4096 + 640  # of the second long page, which 64 divides
    short, shipped, long, none = (
        lab.ruled_keys("template", 3, 0, **change).round_trip(1, k, first)
        for change in ({"page": 64}, {}, {"page": 4096}, {"means": False})
    )
    assert all((a - b).abs().max() > 0.01 for a, b in combinations((short, shipped, long, none), 2))
    plain = lab.keys("template", 3, moments=lab_module.without_mean(lab.subject.moments))
    assert torch.equal(none, plain.round_trip(1, k))


@pytest.mark.parametrize("page", [1, 16, 64])
def test_rotating_back_and_on_is_exact(lab, page):
    k, frame = draw(200, 2, DIM), Frame(page, lab.subject.rope, lab.inv_freq)
    for first in (0, run.SHIFT):
        positions = torch.arange(first, first + 200)
        origin = frame.origin(positions)
        assert bool((origin % page == 0).all()) and bool((positions - origin < page).all())
        back = frame.rotate(1, k, -origin)
        assert (back - k).abs().max() > 0.5
        torch.testing.assert_close(frame.rotate(1, back, origin), k, atol=2e-6, rtol=0)


def test_before_rope_a_vector_is_the_same_at_every_position(lab):
    frame = lab.frame(1)
    positions = torch.arange(50) * 613
    key = draw(1, 2, DIM)
    there = frame.rotate(0, key.expand(50, -1, -1), positions)
    torch.testing.assert_close(frame.rotate(0, there, -positions), key.expand(50, -1, -1), atol=2e-6, rtol=0)
    one = rotate(key, lab.subject.rope[0], lab.inv_freq, 613)
    torch.testing.assert_close(there[1:2], one, atol=0, rtol=0)


def test_balanced_transform_has_one_diagonal_on_both_sides():
    a, b = (torch.stack([x @ x.T for x in draw(3, 16, 24, seed=s).double()]) for s in (1, 2))
    forward, inverse_t, sigma = klt.balanced(a, b, ridge=0)
    diagonal = torch.diag_embed(sigma)
    torch.testing.assert_close(forward @ a @ forward.mT, diagonal, atol=1e-8, rtol=1e-8)
    torch.testing.assert_close(inverse_t @ b @ inverse_t.mT, diagonal, atol=1e-8, rtol=1e-8)
    torch.testing.assert_close(inverse_t.mT @ forward, torch.eye(16).double().expand(3, -1, -1), atol=1e-9, rtol=0)
    assert bool((sigma[:, :-1] >= sigma[:, 1:]).all())


@pytest.mark.parametrize("neox", [True, False])
def test_mean_over_rotations_is_that_of_rotated_moments(neox):
    rope = RopeBlocks(32, 24, neox)
    inv_freq = 10000.0 ** (-torch.arange(12) / 12)
    x = draw(40, 1, 32).double()
    moment = torch.einsum("thd,the->de", x, x)
    rotated = [rotate(x, rope, inv_freq, p) for p in range(9)]
    wanted = sum(torch.einsum("thd,the->de", y, y) for y in rotated) / 9
    torch.testing.assert_close(klt.rotated_mean(moment, rope, inv_freq, 9), wanted, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("page", [1, 16, None])
def test_many_bits_give_the_keys_back(lab, page, centred):
    """At any position: a wrong inverse, rotation or mean would show."""
    layer, k = 1, lab.samples[1].k
    errors = []
    for bits in (8, 3):
        side = lab.klt_keys(bits, page, centred=centred)
        read = [side.round_trip(layer, rotate(k, lab.subject.rope[layer], lab.inv_freq, s), s) for s in (0, 977)]
        back = rotate(read[1], lab.subject.rope[layer], lab.inv_freq, -977)
        errors.append([float((x - k).norm() / k.norm()) for x in (read[0], back)])
    assert max(errors[0]) < 0.02 < 0.08 < min(errors[1])


@pytest.mark.parametrize("metric", ["plain", "output", "answer"])
def test_many_bits_give_the_values_back(lab, metric):
    v = draw(100, 2, DIM)
    for options in ({}, {"centred": True}, {"weighted": True}, {"unbiased": True}):
        read = lab.klt_values(8, metric=metric, **options).round_trip(0, v)
        assert float((read - v).norm() / v.norm()) < 0.05, options  # of another distribution than calibrated


def test_transform_lowers_the_error_it_is_fitted_to(lab):
    """Expected cost of the KLT's widths below that of a plain rotation; and so is the true error in that metric."""
    got, metric = lab.seconds(), lab.output_metric
    sigma = klt.balanced(got.v, metric)[2]
    flat = torch.full_like(sigma, 2).long()
    chosen = klt.segment_widths(sigma, 2)
    assert bool((klt.expected_error(sigma, chosen) <= klt.expected_error(sigma, flat) * 1.001).all())
    assert bool((chosen.sum(-1) == 2 * DIM).all()) and bool((chosen[..., :-1] >= chosen[..., 1:]).all())


def test_unbiased_values_keep_their_length():
    """Runs of few bits are too short under norm correction, and right without the bias."""
    eye = torch.eye(DIM).double().expand(1, 1, -1, -1)
    sigma = torch.ones(1, 1, DIM).double()
    widths = torch.tensor([3] * 16 + [2] * 32 + [1] * 16).view(1, 1, DIM)
    x = draw(4000, 1, DIM)
    kept = {}
    for unbiased in (False, True):
        coder = klt.coders((eye, eye, sigma), widths, torch.device("cpu"), unbiased=unbiased)[0]
        read = coder.round_trip(x)
        kept[unbiased] = [
            float((read * x)[..., a:b].sum() / x[..., a:b].square().sum()) for a, b in ((0, 16), (48, 64))
        ]
    assert kept[True] == pytest.approx([1, 1], abs=0.03)
    assert kept[False][1] < 0.85


def test_sensitivity_predicts_the_cost_of_small_errors(lab):
    """``1/2 e^T F e`` summed over tokens is about the KL that noise on one layer's keys or values makes."""
    model, ids = lab.model, lab.calibration()[0]
    with torch.no_grad():
        true = torch.log_softmax(model.lm_head(model.base_model(torch.tensor([ids])).last_hidden_state[0]), -1)
    for which in ("k", "v"):
        fisher = getattr(lab.sensitivity, which)[0]
        size = 0.02 * (lab.seconds().k if which == "k" else lab.seconds().v)[0].diagonal(dim1=-2, dim2=-1).mean() ** 0.5
        found = []
        for seed in range(6):

            def noisy(layer, q, k, v, seed=seed, size=size, which=which):
                noise = draw(*k.shape, seed=seed) * size * (layer == 0)
                return (k + noise, v) if which == "k" else (k, v + noise)

            with torch.no_grad(), klt.kv_hook(model, noisy):
                hidden = model.base_model(torch.tensor([ids]), use_cache=False).last_hidden_state[0]
                other = torch.log_softmax(model.lm_head(hidden), -1)
            found.append(float((true.exp() * (true - other)).sum()))
        predicted = 0.5 * float(size) ** 2 * float(fisher.diagonal(dim1=-2, dim2=-1).sum()) * len(ids)
        assert 0.6 < sum(found) / len(found) / predicted < 1.6, which


def test_exact_attention_does_not_change_under_the_shift(lab):
    """The control itself: keys that are kept exactly, coded as nothing, rotated on by 30,000."""

    class Same:
        exact = False
        sizes = [0]
        bits, dim = 16, DIM

        def round_trip(self, layer, x, first=0):
            return x

    got = lab.attention_kl(Cache("", Same(), lab.exact()))
    assert set(got) == {"0_2k", "all", "shift"} and all(abs(x) < 1e-5 for x in got.values())
    coarse = lab.attention_kl(Cache("", lab.keys("template", 2), lab.exact()))
    assert coarse["all"] > 1e-3 and coarse["shift"] == pytest.approx(coarse["all"], rel=0.5)
    before = lab.attention_kl(Cache("", lab.klt_keys(2, 1), lab.exact()))
    assert before["shift"] == pytest.approx(before["all"], rel=1e-2) and before["all"] > 1e-3


def test_a_mean_by_token_is_taken_off_where_that_is_better(lab):
    """Vectors about the mean are coded as with it, vectors near zero as without."""
    values = lab.values(2)
    mean = torch.full((2, 2, DIM), 3.0)
    less, gated = (Side(2, values.coders, DIM, None, mean, chosen) for chosen in (False, True))
    x = torch.cat([3.0 + 0.1 * draw(20, 2, DIM), 0.01 * draw(5, 2, DIM, seed=1)])
    got = gated.round_trip(0, x)
    torch.testing.assert_close(got[:20], less.round_trip(0, x)[:20], atol=0, rtol=0)
    torch.testing.assert_close(got[20:], values.round_trip(0, x)[20:], atol=0, rtol=0)


def test_spending_is_best_for_convex_costs():
    sizes = {2.0: 2.0, 3.0: 3.0, 4.0: 4.0}
    costs = budgets.cost_at([100.0, 1.0, 1.0, 1.0], 3, list(sizes))
    chosen = budgets.spend(costs, sizes, 12.0)
    assert chosen == [4.0, 3.0, 3.0, 2.0]  # ties: the first
    assert budgets.spend(costs, sizes, 12.0, {3: 4.0}) == [4.0, 2.0, 2.0, 4.0]
    with pytest.raises(ValueError, match="7 bytes"):
        budgets.spend(costs, sizes, 7.0)


def test_rows_that_claim_equal_bytes_have_them(lab):
    """Within a group and a pair of widths all rows take the bytes of what ships, but for those that say otherwise."""
    sizes = {"frame": {}, "score": {}, "scale": {}, "values": {}, "best": {}, "protect": {}, "calibration": {}}
    for recipe in possible():
        if recipe.group in sizes:
            size = recipe.make(lab, 0).bytes_per_token_head
            by_pair = sizes[recipe.group].setdefault((recipe.k_bits, recipe.v_bits), {})
            by_pair[recipe.name] = size
    for group, pairs in sizes.items():
        for (k, v), rows in pairs.items():
            wanted = (DIM * k / 8 + 2 if k < 16 else 2 * DIM) + DIM * v / 8 + 2
            for name, size in rows.items():
                if "more bytes" in name:
                    assert size > wanted
                elif "by layer" in name:
                    assert wanted - 8 <= size <= wanted + 1e-9, (group, name)  # two layers: large steps
                else:
                    assert size == pytest.approx(wanted, rel=1e-6), (group, name)


def test_rules_of_keys_change_one_thing(lab):
    k = draw(60, 2, DIM)
    same, shipped = lab.ruled_keys("template", 2, 0), lab.keys("template", 2)
    torch.testing.assert_close(same.round_trip(1, k), shipped.round_trip(1, k), atol=0, rtol=0)
    own = lab.subject.moments
    slope = 0.8 ** torch.arange(DIM // 2)  # blocks differ, so that widths do
    uneven = copy(lab)
    uneven.subject = replace(lab.subject, moments=replace(own, q=own.q * (1 + slope), k=own.k * slope))
    lab = uneven
    one, own = lab.ruled_keys("product", 3, 0, norms="one"), lab.ruled_keys("product", 3, 0)
    most = [max(len(set(head.widths)) for head in coder.layouts) for coder in own.coders]
    assert max(most) > 1 and own.sizes == [size + 2 * (n - 1) for size, n in zip(one.sizes, most, strict=True)]
    for change in ({"gains": False}, {"balance": False}):
        side = lab.ruled_keys("product", 3, 0, norms="one", **change)
        assert side.sizes == one.sizes
        assert (side.round_trip(1, k) - one.round_trip(1, k)).abs().max() > 0.01
        coder = side.coders[1]
        inverse = coder.leave.mT @ coder.enter
        torch.testing.assert_close(inverse, torch.eye(DIM).expand_as(inverse), atol=1e-5, rtol=0)
    plain = lab.ruled_keys("product", 3, 0, gains=False, balance=False, norms="one")
    lengths = [coder.enter.norm(dim=-1) for coder in plain.coders]
    assert all(torch.allclose(x, x[:, :1].expand_as(x), rtol=1e-4) for x in lengths)  # a rotation times one number


def test_labels_are_distinct_and_quick_rows_exist():
    labels = [recipe.label for recipe in recipes()]
    assert len(labels) == len(set(labels))
    assert set(ablation.QUICK_ROWS) <= set(labels)
    assert {recipe.group for recipe in recipes()} == set(ablation_rows.GROUPS)


def test_a_pretended_device_refuses_what_a_real_one_would():
    with Elsewhere():
        there, here = torch.zeros(3, device="cuda"), torch.ones(3)
        assert there.device == DEVICE and here.device.type == "cpu" and is_away(there + 1)
        assert is_away(here.to(DEVICE)) and not is_away(here) and not is_away(there.cpu())
        assert is_away(there[torch.tensor([0, 1])])
        for mix in (lambda: there + here, lambda: torch.cat([there, here]), lambda: here[there.long()]):
            with pytest.raises(RuntimeError, match="on the CPU"):
                mix()
        with pytest.raises(RuntimeError, match="on the CPU"):
            there[:] = here


def test_every_row_runs_on_another_device(tiny_llama):
    """All recipes through :func:`ablation.measure` on a device that only pretends to be one."""
    with Elsewhere():
        lab = make_lab(make_subject(send_module(tiny_llama(DIM))))
        assert lab.device == DEVICE
        seen = set()
        for recipe in possible():
            kind = recipe.group, re.sub(r"\d+", "", recipe.name)
            if kind not in seen:
                seen.add(kind)
                row = ablation.measure(lab, recipe, 0)
                assert row["kl_all"] == row["kl_all"] and row["tokens"] == 63 * 5
        assert is_away(lab.samples[0].k) and is_away(lab.keys("template", 3).coders[0].enter)
        assert send(torch.zeros(1)).device == DEVICE


def test_program_writes_rows_at_once_and_survives_a_failing_one(lab, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "load", lambda *args: lab.subject)
    monkeypatch.setattr(lab_module, "AutoTokenizer", Characters)
    monkeypatch.setattr(ablation, "sources", lambda *args: {"model": {"name": "tiny"}})
    out = tmp_path / "ablation.csv"
    real, lines = ablation.measure, []

    def measure(lab, recipe, seed):
        lines.append(len(out.read_text().splitlines()))
        if recipe.name == "bf16":
            raise RuntimeError("out of luck")
        return real(lab, recipe, seed)

    monkeypatch.setattr(ablation, "measure", measure)
    command = ["ablation", "--model-path", "tiny", "--out", str(out), "--limit", "64", "--queries", "4"]
    assert program.main([*command, "--seeds", "2", "--only", "reference", "uniform-haar K3V3"]) == 1
    assert lines == [1, 2, 3, 3, 4, 5]
    with out.open() as file:
        rows = list(csv.DictReader(file))
    names = ["float32", "float32 through the hook", "fp8_e4m3", "uniform-haar", "uniform-haar"]
    assert [r["name"] for r in rows] == names and [r["seed"] for r in rows] == ["0", "0", "0", "0", "1"]
    assert float(rows[1]["kl_all"]) < 1e-6 < float(rows[2]["kl_all"]) < float(rows[3]["kl_all"])
    record = json.loads(out.with_suffix(".json").read_text())
    assert list(record["failed"]) == ["reference: bf16 K16V16, rotation 0"] and "out of luck" in str(record["failed"])
    assert record["evaluation"]["scored"] == 63 * 5 and len(record["evaluation"]["texts"]) == 5
    printed = capsys.readouterr().out
    assert program.main(["ablation", "--table", str(out)]) == 0
    table = capsys.readouterr().out
    assert table in printed and "### baseline" in table and " ± " in table
    page = tmp_path / "page.md"
    page.write_text("before\n{}\nold\n{}\nafter\n".format(*ablation.MARKS))
    assert program.main(["ablation", "--table", str(out), "--only", "baseline", "--into", str(page)]) == 0
    text = page.read_text()
    assert "old" not in text and text.startswith("before\n") and text.endswith("\nafter\n")
    assert "| K3V3 | uniform-haar | 52 |" in text and "### reference" not in text
    with pytest.raises(ValueError, match="no place"):
        ablation.insert("no marks", "")
    assert program.main([*command, "--budget", "0"]) == 0
    assert len(json.loads(out.with_suffix(".json").read_text())["left_out"]) == len(ablation.plan([], 3, False))
