"""The panel: its measures against plain loops, its tables on hand-made rows, a whole run on a tiny model."""

import json
import math

import pytest
import torch

from benchmarks.fidelity import __main__ as program
from benchmarks.fidelity import attention, lineup, model, panel, panel_cli, report, run, widths
from benchmarks.fidelity.methods import IntPerToken
from benchmarks.fidelity.offsets import offset_mae
from benchmarks.fidelity.rows import read_csv
from benchmarks.fidelity.window import Window
from sglang_blockgtq.calibrate.rope import RopeBlocks

PICTURES = {*panel.METRICS, *(f"{name}_window" for name in panel.METRICS if name != "mae_offsets")}
PICTURES |= {"wins", "fingerprint", "entropy", "energy"}


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class TestOffsets:
    @pytest.mark.parametrize("rope", [RopeBlocks(16, 16), RopeBlocks(16, 8), RopeBlocks(16, 16, neox=False)], ids=str)
    def test_against_rotation_matrices(self, rope):
        """``|q^T R_D e|`` with R_D written out, over query heads and offsets."""
        q, error = draw(3, 4, 16), draw(3, 2, 16, seed=1)
        speed = torch.tensor([1.0 / 3**i for i in range(rope.rotary_dim // 2)])
        got = offset_mae(q, error, rope, speed, window=7, offsets=5)
        want = torch.zeros(3)
        for offset in (-7.0, -3.5, 0.0, 3.5, 7.0):
            rotation = torch.eye(16)
            for i, (a, b) in enumerate(rope.channels()[: len(speed)].tolist()):
                angle = offset * float(speed[i])
                rotation[a, a] = rotation[b, b] = math.cos(angle)
                rotation[a, b], rotation[b, a] = -math.sin(angle), math.sin(angle)
            for j in range(4):
                want += (torch.einsum("nd,de,ne->n", q[:, j], rotation, error[:, j // 2])).abs() / 20
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)

    def test_the_papers_offsets_and_no_scaling(self):
        """One block at speed pi / 1024 and an error along q: the mean of |cos| over 50 offsets of two half-turns."""
        rope = RopeBlocks(2, 2)
        q = torch.tensor([[[3.0, 0.0]]])
        got = offset_mae(q, q, rope, torch.tensor([math.pi / 1024]))
        want = 9 * torch.linspace(-math.pi, math.pi, 50, dtype=torch.float64).cos().abs().mean()
        assert float(got) == pytest.approx(float(want), rel=1e-5)

    def test_before_and_after_rope_give_the_same(self):
        rope = RopeBlocks(32, 32)
        speed = 1e4 ** (-torch.arange(16) / 16)
        q, error = draw(2, 2, 32), draw(2, 1, 32, seed=1)
        rotated = (model.rotate(x, rope, speed, 5000) for x in (q, error))
        torch.testing.assert_close(
            offset_mae(*rotated, rope, speed), offset_mae(q, error, rope, speed), rtol=1e-4, atol=0
        )


class TestMeasure:
    positions = torch.tensor([5, 30, 39])

    def truth(self, tokens=40, heads=2, group=2, dim=16):
        q, k, v = draw(3, heads * group, dim), draw(tokens, heads, dim, seed=1), draw(tokens, heads, dim, seed=2)
        got = model.Capture(self.positions, {0: q}, {0: k}, {0: v})
        return panel.Truth.of(got, 0, 0.25)

    @pytest.fixture(autouse=True)
    def top_of_few(self, monkeypatch):
        monkeypatch.setattr(attention, "TOP", 3)

    @pytest.mark.parametrize("window", [None, (2, 8)])
    def test_against_a_loop(self, window):
        """Every query head on its own, reading exactly what its window leaves it."""
        true = self.truth()
        k_hat, v_hat = true.k + 0.3 * draw(40, 2, 16, seed=3), true.v + 0.3 * draw(40, 2, 16, seed=4)
        wrap = Window(IntPerToken(2, 16, 16), 16, 16, *window) if window else None
        got = panel.measure(true, k_hat, v_hat, wrap)
        mae, kl, overlap, error, length = [], [], [], 0.0, 0.0
        for n, last in enumerate(self.positions.tolist()):
            for j in range(4):
                k, v = true.k[: last + 1, j // 2], true.v[: last + 1, j // 2]
                read_k, read_v = k_hat[: last + 1, j // 2].clone(), v_hat[: last + 1, j // 2].clone()
                if window:
                    exact = [t for t in range(last + 1) if t < 2 or t > last - 8]
                    read_k[exact], read_v[exact] = k[exact].half().float(), v[exact].half().float()
                a, b = (x @ true.q[n, j] * 0.25 for x in (k, read_k))
                mae.append((a - b).abs().mean())
                p, r = a.softmax(0), b.softmax(0)
                kl.append((p * (p / r).log()).sum())
                overlap.append(len(set(a.topk(3).indices.tolist()) & set(b.topk(3).indices.tolist())) / 3)
                error += float((p @ v - r @ read_v).square().sum())
                length += float((p @ v).square().sum())
        assert got["mae"] == pytest.approx(float(torch.stack(mae).mean()), rel=1e-4)
        assert got["softmax_kl"] == pytest.approx(float(torch.stack(kl).mean()), rel=1e-3)
        assert got["top10_overlap"] == pytest.approx(sum(overlap) / len(overlap), rel=1e-5)
        assert got["output_error"] == pytest.approx(error / length, rel=1e-3)

    def test_a_window_over_everything_leaves_float16s_error(self):
        true = self.truth()
        wrap = Window(IntPerToken(2, 16, 16), 16, 16, 0, 64)
        got = panel.measure(true, torch.zeros_like(true.k), torch.zeros_like(true.v), wrap)
        assert got["top10_overlap"] == 1 and 0 < got["mae"] < 1e-2 and 0 < got["output_error"] < 1e-5


def row(method, layer, *, bits=3.0, seed=0, window="", mae=1.0, kl=1.0, top=0.5, equal=None, size=26.0, **more):
    base = {"method": method, "k_bits": bits, "v_bits": bits, "window": window, "seed": seed, "layer": layer}
    base |= {"k_bytes": size, "v_bytes": 26.0, "queries": 4, "tokens": 100}
    base |= {"mae_offsets": mae, "mae": mae, "softmax_kl": kl, "top10_overlap": top, "output_error": mae}
    if equal:
        base |= dict(zip(("equal_k_bits", "equal_v_bits"), equal, strict=True))
    return base | more


class TestReport:
    rows = [
        *(row("uniform-haar", i, mae=m, kl=k, equal=(3, 3)) for i, (m, k) in enumerate([(1.0, 0.1), (2.0, 0.3)])),
        *(row("uniform-haar", i, bits=3.5, mae=0.5, kl=0.05, equal=(3.5, 3.5), size=30.0) for i in range(2)),
        *(row("paper", i, mae=0.6, kl=0.1, top=0.7, equal=(3.5, 3.5), size=29.5) for i in range(2)),
        *(row("template", i, mae=0.6, kl=0.1, top=0.7, equal=(3, 3)) for i in range(2)),
        *(row("template", i, seed=1, mae=0.3, kl=0.1, equal=(3, 3)) for i in range(2)),
        *(row("uniform-hadamard", i, mae=1.2, kl=0.4, equal=(3, 3)) for i in range(2)),
        *(row("uniform-hadamard", i, seed=1, mae=0.2, kl=0.2, equal=(3, 3)) for i in range(2)),
    ]

    def test_summary_has_a_line_for_equal_bits_and_one_for_equal_bytes(self):
        lines = {(r["method"], r.get("at")): r for r in report.summary(self.rows)}
        bits, equal, same = lines["paper", "bits"], lines["paper", "bytes"], lines["template", "bits and bytes"]
        assert (bits["bytes"], bits["against_bytes"], equal["against_bytes"]) == (55.5, 52, 56)
        assert bits["mae_ratio"] == pytest.approx((0.6 + 0.3) / 2)  # of the layers' ratios
        assert bits["softmax_kl_ratio"] == pytest.approx(0.1 / 0.2)  # of the means
        assert (bits["wins_mae"], bits["wins_softmax_kl"]) == (2, 1)  # a tie is no win
        assert equal["mae_ratio"] == pytest.approx(1.2) and equal["wins_mae"] == 0
        assert same["mae_ratio"] == pytest.approx(0.45)
        assert (
            len(lines) == 5 and "mae_ratio" not in lines["uniform-haar", None]
        )  # nothing to compare the baseline with

    def test_wins(self):
        lines = {(r["method"], r["at"]): r for r in report.win_rows(self.rows)}
        assert (lines["paper", "bits"]["mae"], lines["paper", "bytes"]["mae"]) == (2, 0)
        assert lines["paper", "bits"]["top10_overlap"] == 2  # more is better
        assert lines["uniform-hadamard", "bits"]["mae"] == 1
        named = {r["method"]: r for r in report.win_rows(self.rows, "paper")}
        assert named["template"]["mae"] == 0 and named["uniform-haar"]["softmax_kl"] == 0
        with pytest.raises(ValueError, match="--against nobody: .*uniform-haar"):
            report.win_rows(self.rows, "nobody")

    def test_counter_claim_compares_seed_with_seed(self):
        lines = report.counter_claim(self.rows)
        assert [(r["method"], r["seed"], r["mae_ratio"]) for r in lines] == [
            ("template", 0, pytest.approx(0.5)),
            ("template", 1, pytest.approx(1.5)),
        ]
        assert [r["wins_mae"] for r in lines] == [2, 0]

    def test_counter_claim_refuses_other_bytes(self):
        rows = [row("template", 0, size=27.0), row("uniform-hadamard", 0)]
        with pytest.raises(ValueError, match="template takes 53 bytes and uniform-hadamard 52"):
            report.counter_claim(rows)

    def test_template_at_a_peers_bytes(self):
        rows = [
            *(row("kivi", i, mae=0.4, kl=0.3, equal=(3.5, 3.5), size=30.0) for i in range(2)),
            *(row("template", i, bits=3.5, mae=0.1 + 0.3 * i, kl=0.1, equal=(3.5, 3.5), size=30.0) for i in range(2)),
        ]
        (line,) = report.peer_rows(self.rows + rows)
        assert (line["method"], line["k_bits"], line["against"]) == ("template", 3.5, "kivi K3")
        assert (line["bytes"], line["against_bytes"]) == (56, 56)
        assert line["mae_ratio"] == pytest.approx((0.25 + 1) / 2) and (line["wins_mae"], line["wins_softmax_kl"]) == (
            1,
            2,
        )

    def test_rows_read_back_give_the_same(self):
        text = [{k: str(v) for k, v in r.items()} for r in self.rows]
        assert report.summary(text) == report.summary(self.rows)
        assert report.win_rows(text) == report.win_rows(self.rows)
        assert report.counter_claim(text) == report.counter_claim(self.rows)


def test_entropy():
    shares = torch.tensor([[1.0, 0, 0, 0], [0.5, 0.5, 0, 0], [0.25] * 4, [0.5, 0.25, 0.25, 0]], dtype=torch.float64)
    torch.testing.assert_close(widths.entropy(shares), torch.tensor([0.0, 1.0, 2.0, 1.5], dtype=torch.float64))


def test_calibration_range_spans_all_sequences(tiny_subject):
    got = lineup.calibration_range(tiny_subject)
    keys = [model.capture(tiny_subject.model, ids, [0]).k[1] for ids in tiny_subject.calibration_ids]
    torch.testing.assert_close(got[1, 0], torch.cat(keys).amin(0))
    torch.testing.assert_close(got[1, 1], torch.cat(keys).amax(0))
    assert (keys[0].amin(0) != got[1, 0]).any() and (keys[1].amin(0) != got[1, 0]).any()


def test_line_up(tiny_subject):
    entries = lineup.line_up(tiny_subject, lineup.METHODS, (2, 3), seeds=2)
    names = [(e.method.name, e.method.k_bits, e.seed) for e in entries]
    assert len(set(names)) == len(names)
    asked = {(name, bits, 0) for name in lineup.CODED for bits in (2, 3)}
    asked |= {(name, bits, 1) for name in lineup.SEEDED for bits in (2, 3)}
    assert set(names) >= asked | {("bf16", 16, 0), ("fp8_e4m3", 8, 0)}
    ours = {(e.method.k_bits, e.method.v_bits) for e in entries if e.method.name == "template"}
    assert {e.equal for e in entries if e.method.name in lineup.PEERS} <= ours
    uniform = {(e.method.k_bits, e.method.v_bits): e for e in entries if e.method.name == lineup.BASELINE}
    for e in entries:
        if e.method.name == "bf16":
            assert e.equal is None
        else:
            theirs, ours = (sum(x.sizes(400)) for x in (uniform[e.equal].method, e.method))
            assert ours <= theirs < ours + 2
    slots = [e for e in entries if e.method.name == "template" and e.method.k_bits == 3]
    k, v = draw(50, 2, 64), draw(50, 2, 64, seed=1)
    a, b = (e.method.round_trip(0, k, v)[0] for e in slots)
    assert (a - b).abs().max() > 0.01  # another rotation


def test_line_up_names_what_it_cannot_do(tiny_subject):
    with pytest.raises(ValueError, match="--methods int5: choose from bf16"):
        lineup.line_up(tiny_subject, ["int5"], (3,))
    with pytest.raises(ValueError, match="--bits 2.5: kivi takes whole bits"):
        lineup.line_up(tiny_subject, ["kivi"], (2.5,))


def test_allocations_add_up(tiny_subject):
    prints, entropies = widths.allocation_rows(tiny_subject, (2.0, 3.0))
    assert len(prints) == len(entropies) == len(lineup.BLOCK_GTQ) * 2 * 2
    for r in prints:
        bits = [value for name, value in r.items() if name.startswith("block_")]
        assert len(bits) == 32 and sum(bits) == pytest.approx(32 * r["k_bits"])
    for r in entropies:
        shares = [r[f"share_{b}"] for b in widths.WIDTHS]
        assert sum(shares) == pytest.approx(1)
        assert r["entropy"] == pytest.approx(-sum(p * math.log2(p) for p in shares if p))
        assert sum(b * p for b, p in zip(widths.WIDTHS, shares, strict=True)) == pytest.approx(r["k_bits"])
    assert {r["depth"] for r in entropies} == {0.0, 1.0}


def test_energies_are_the_moments(tiny_subject):
    rows = widths.energy_rows(tiny_subject)
    r = next(r for r in rows if (r["layer"], r["block"]) == (1, 7))
    q, k = (x[1, :, 7] for x in (tiny_subject.moments.q, tiny_subject.moments.k))
    assert len(rows) == 64 and (r["q_energy"], r["k_energy"]) == (float(q.mean()), float(k.mean()))
    assert r["product_score"] == pytest.approx(float((q * k).mean())) != pytest.approx(float(q.mean() * k.mean()))
    assert r["radians_per_token"] == pytest.approx(1e4 ** (-7 / 32))


def test_program_on_a_tiny_model(tiny_subject, tmp_path, monkeypatch, capsys):
    """All files and pictures, tables that follow from the rows, and pictures again from the files alone."""
    monkeypatch.setattr(run, "load", lambda *args: tiny_subject)
    named = {"model": {"name": "tiny"}, "calibration": {}}
    monkeypatch.setattr(panel_cli, "sources", lambda *args: named)
    out, images = tmp_path / "csv", tmp_path / "png"
    argv = f"panel --model-path tiny --out {out} --pictures {images} --prefix t_ --bits 3 --queries 4 --window"
    assert program.main([*argv.split(), "--tokens", "300"]) == 0
    tables = {path.stem: read_csv(path) for path in out.glob("*.csv")}
    assert sorted(tables) == sorted(
        ["layers", "summary", "wins", "counter_claim", "peers", "fingerprint", "entropy", "energy"]
    )
    rows = tables["layers"]
    assert {r["tokens"] for r in rows} == {"300"} and {r["queries"] for r in rows} == {"4"}
    assert {(r["method"], r["window"]) for r in rows} == {
        (name, window) for name in lineup.METHODS for window in ("", "4+128") if not (name in lineup.CASTS and window)
    }
    for r in rows:
        assert float(r["softmax_kl"]) > 0 and float(r["output_error"]) > 0 and 0 <= float(r["top10_overlap"]) <= 1
        assert (r["mae_offsets"] == "") == bool(r["window"])
    exact, coarse = ([float(r["mae_offsets"]) for r in rows if r["method"] == m] for m in ("bf16", "fp8_e4m3"))
    assert all(0 < a < b / 4 for a, b in zip(exact, coarse, strict=True))
    for windowed in (r for r in rows if r["window"] and r["method"] == "template"):
        plain = next(r for r in rows if r["method"] == "template" and r["layer"] == windowed["layer"])
        assert float(windowed["mae"]) < float(plain["mae"]) and float(windowed["k_bytes"]) > float(plain["k_bytes"])
    assert len(tables["summary"]) == len(report.summary(rows)) and len(tables["counter_claim"]) == 4
    assert {r["against"] for r in tables["peers"]} == {
        "fp8_e4m3 K8",
        "int_per_token K3",
        "kivi K3",
        "kivi-scale-only K3",
    }
    for r in tables["peers"]:
        assert r["method"] == "template" and float(r["bytes"]) <= float(r["against_bytes"]) + 1
    record = json.loads((out / "panel.json").read_text())
    assert record["evaluation"]["layers"] == [0, 1] and record["evaluation"]["tokens"] == 300
    assert "--bits 3 --window" in record["command"] and str(tmp_path) not in record["command"]
    shown = capsys.readouterr().out
    assert "at equal bytes" in shown and "product-segment" in shown

    pngs = {path.name for path in images.iterdir()}
    assert pngs == {f"t_{name}.png" for name in PICTURES}
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in images.iterdir())
    again = tmp_path / "again"
    assert program.main(f"panel --out {out} --pictures {again} --prefix t_ --draw".split()) == 0
    assert {path.name for path in again.iterdir()} == pngs


def test_model_path_is_asked_for(tmp_path, capsys):
    with pytest.raises(SystemExit):
        program.main(["panel", "--out", str(tmp_path)])
    assert "--model-path" in capsys.readouterr().err
