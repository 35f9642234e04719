"""Fidelity: its measures against plain loops, its verdict on hand-made rows, its figures on the real small model."""

import json
import math
from statistics import fmean

import pytest
import torch
from transformers import LlamaConfig

from benchmarks.fidelity import attention, model, perplexity, run, targets
from benchmarks.fidelity.__main__ import main
from benchmarks.fidelity.methods import Cast, IntPerToken
from benchmarks.fidelity.rows import read_csv
from sglang_blockgtq.calibrate.rope import RopeBlocks

LIVE_LAYERS = (0, 13, 29)
#: softmax KL and MAE in units of uniform's
QUALITY = {"uniform": 1.0, "paper": 0.9, "product": 0.8, "template": 0.3}


@pytest.fixture
def rows() -> list[run.Row]:
    """As the program measures them: two layers, a near and a far window, with and without the shift."""
    out: list[run.Row] = []
    for method, quality in QUALITY.items():
        for bits, shift in ((2, 0), (3, 0), (3, run.SHIFT)):
            for layer, window in ((0, "0-2048"), (0, "4096-6144"), (1, "0-2048"), (1, "4096-6144")):
                row = {"method": method, "k_bits": bits, "v_bits": bits, "bytes_per_token_head": 52, "layer": layer}
                row |= {"mae": quality / bits, "softmax_kl": quality * (1 + layer) / bits, "top10_overlap": 0.9}
                out.append(row | {"window": window, "shift": shift, "tokens": 8})
    for method, bits, ppl in (("fp32", 32, 11.0), ("bf16", 16, 11.01), ("template", 8, 11.02)):
        row = {"method": method, "k_bits": bits, "v_bits": bits, "bytes_per_token_head": 132, "ppl": ppl}
        out.append(row | {"kl_final": 0.001, "window": "0-2048", "shift": 0, "tokens": 2047})
    return out


def test_rows_from_a_file_are_judged_as_they_were_measured(rows):
    """Rows as measured lack the columns that do not apply, those from a file have them empty."""
    read = [{name: str(row.get(name, "")) for name in run.FIELDS} for row in rows]
    assert targets.summary(read) == targets.summary(rows)
    assert targets.check(read, run.SHIFT) == targets.check(rows, run.SHIFT)
    assert "template           8   8   132.0" in targets.summary(rows)


def test_targets_hold_and_fail(rows):
    results = targets.check(rows, run.SHIFT)
    assert len(results) == 11 and all(target.holds for target in results)
    for row in rows:
        if row["method"] == "template" and "layer" in row:
            row |= {"mae": row["mae"] / 0.3, "softmax_kl": row["softmax_kl"] / 0.3}  # as uniform's
    failed = [t.text for t in targets.check(rows, run.SHIFT) if not t.holds]
    assert len(failed) == 5 and all("template" in text for text in failed)


def test_rotate_is_the_models_rope():
    """Turning a vector from position p by s gives the model's vector at p + s."""
    config = LlamaConfig(hidden_size=64, num_attention_heads=2, num_key_value_heads=1, head_dim=32, num_hidden_layers=1)
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    rotary = LlamaRotaryEmbedding(config)
    x = torch.randn(1, 1, 5, 32)
    at = [apply_rotary_pos_emb(x, x, *rotary(x, torch.arange(5)[None] + start))[0][0, 0] for start in (0, 700)]
    turned = model.rotate(at[0], RopeBlocks(32, 32), rotary.inv_freq, 700)
    torch.testing.assert_close(turned, at[1], atol=2e-4, rtol=0)
    assert (turned - at[0]).abs().max() > 0.5


def test_compare_against_a_loop():
    torch.manual_seed(0)
    tokens, heads, group, dim = 40, 2, 3, 16
    positions = torch.tensor([12, 30, 39])
    q, k = torch.randn(3, heads * group, dim), torch.randn(tokens, heads, dim)
    k_hat = k + 0.3 * torch.randn_like(k)
    got = attention.compare(attention.reference(q, k, positions, 0.25), q, k_hat, positions, 0.25)
    for n, last in enumerate(positions.tolist()):
        mae, kl, overlap = [], [], []
        for j in range(heads * group):
            a, b = (x[: last + 1, j // group] @ q[n, j] * 0.25 for x in (k, k_hat))
            mae.append((a - b).abs().mean())
            p, r = a.softmax(0), b.softmax(0)
            kl.append((p * (p / r).log()).sum())
            overlap.append(len(set(a.topk(10).indices.tolist()) & set(b.topk(10).indices.tolist())) / 10)
        assert float(got["mae"][n]) == pytest.approx(float(torch.stack(mae).mean()), rel=1e-4)
        assert float(got["softmax_kl"][n]) == pytest.approx(float(torch.stack(kl).mean()), rel=1e-3)
        assert float(got["top10_overlap"][n]) == pytest.approx(fmean(overlap), rel=1e-5)


def test_queries_do_not_depend_on_later_text():
    """So a short text gives the same first window."""
    long = attention.draw_queries(6973, 32, run.SEED)
    assert attention.draw_queries(2048, 32, run.SEED) == long[:32]
    assert len(long) == 128 and long == sorted(set(long)) and long[0] >= attention.FIRST_QUERY
    assert [sum(a <= p < b for p in long) for a, b in ((0, 2048), (2048, 4096), (4096, 6144), (6144, 6973))] == [32] * 4
    with pytest.raises(ValueError, match="queries = 32.*6144 to 6160"):
        attention.draw_queries(6160, 32, run.SEED)


@pytest.fixture(scope="module")
def tiny(tiny_llama):
    return tiny_llama(32)


def test_hook_replaces_keys_and_values(tiny):
    """The identity changes nothing, other values do, and the model's own attention is back afterwards."""
    ids = torch.randint(0, 97, (300,), generator=torch.Generator().manual_seed(1)).tolist()
    before = tiny.config._attn_implementation
    with torch.inference_mode():
        plain = tiny.base_model(torch.tensor([ids])).last_hidden_state[0]
    seen = []

    class Same:
        def round_trip(self, layer, k, v):
            seen.append((layer, k.shape, v.shape))
            return k, v

    torch.testing.assert_close(perplexity.hidden_states(tiny, ids, Same()), plain, atol=1e-4, rtol=1e-4)
    assert seen == [(layer, (300, 2, 32), (300, 2, 32)) for layer in (0, 1)]
    coarse = perplexity.hidden_states(tiny, ids, IntPerToken(2, 32, 32))
    assert (coarse - plain).abs().max() > 0.05
    assert tiny.config._attn_implementation == before


def test_score_is_cross_entropy_and_kl(tiny):
    ids = torch.randint(0, 97, (300,), generator=torch.Generator().manual_seed(2)).tolist()
    true = perplexity.hidden_states(tiny, ids, None)
    rough = perplexity.hidden_states(tiny, ids, Cast("fp8_e4m3", torch.float8_e4m3fn, 32, 32))
    score = perplexity.Score()
    perplexity.add_score(score, tiny, ids, rough, true)
    with torch.inference_mode():
        a, b = tiny.lm_head(true)[:-1], tiny.lm_head(rough)[:-1]
    nll = torch.nn.functional.cross_entropy(b, torch.tensor(ids[1:]))
    kl = torch.nn.functional.kl_div(b.log_softmax(-1), a.softmax(-1), reduction="batchmean")
    assert score.tokens == 299
    assert score.ppl == pytest.approx(math.exp(nll), rel=1e-4)
    assert score.kl_final == pytest.approx(float(kl), rel=1e-3) and score.kl_final > 0


def test_same_text_is_refused(smollm2):
    with pytest.raises(ValueError, match="--text: it is the calibration text"):
        run.load(smollm2, run.default_text(), str(run.default_text()))


def test_figures_are_the_recorded_ones(smollm2, root):
    """Calibrate and measure the first window of three layers again."""
    results = root / "benchmarks" / "results" / "fidelity_smollm2.csv"
    old = {}
    for row in read_csv(results):
        if row["layer"] and row["shift"] == "0":
            old[row["method"], float(row["k_bits"]), int(row["layer"]), row["window"]] = row
    subject = run.load(smollm2)
    subject.ids = subject.ids[:2048]
    # Another Python brings another calibration text: other moments, much the same table.
    calibrated_on = json.loads(results.with_suffix(".json").read_text())["calibration"]["ids_sha256"]
    tolerance = 0.03 if subject.calibration_hash == calibrated_on else 0.2
    got = run.attention_rows(subject, (3,), (), 32, LIVE_LAYERS)
    assert len(got) == len(LIVE_LAYERS) * len({*run.PACKED, "int_per_token", "fp8_e4m3"})
    for row in got:
        recorded = old[row["method"], row["k_bits"], row["layer"], row["window"]]
        for column in ("mae", "softmax_kl", "top10_overlap"):
            assert row[column] == pytest.approx(float(recorded[column]), rel=tolerance), (row, column)


@pytest.mark.parametrize("program", [[], ["peers"]], ids=["fidelity", "peers"])
def test_a_text_that_cannot_be_read_is_told(program, tmp_path, capsys):
    """By the option that names it, and with no model loaded."""
    for option in ("--text", "--calibration-text"):
        given = [*program, "--model-path", "none", "--out", str(tmp_path / "x.csv"), option, str(tmp_path / "gone")]
        assert main(given) == 2
        assert capsys.readouterr().err == f"{option} {tmp_path / 'gone'}: no such file; name a UTF-8 text file\n"
