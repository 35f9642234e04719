"""The command line end to end on a tiny model, and one line for every bad input."""

import json
import subprocess
import sys

import pytest
import torch
import transformers
from matplotlib.image import imread
from safetensors.torch import load_file, save_file

from sglang_blockgtq.calibrate import RECENT, hf
from sglang_blockgtq.calibrate.__main__ import main
from sglang_blockgtq.calibrate.build import build_table
from sglang_blockgtq.calibrate.fingerprint import fingerprint
from sglang_blockgtq.calibrate.inspect import layer_groups, summary, templates_of, width_shares
from sglang_blockgtq.calibrate.model import config_hash, rope_blocks
from sglang_blockgtq.calibrate.rope import RopeBlocks
from sglang_blockgtq.calibrate.table import AllocationTable
from sglang_blockgtq.calibrate.weights import weights_hash


@pytest.fixture(scope="module")
def made(model_folder, tmp_path_factory):
    """A table made by the command itself."""
    out = tmp_path_factory.mktemp("made") / "new" / "table.safetensors"
    argv = f"--model-path {model_folder} --k-bits 2.5 --v-bits 3 --out {out} --device cpu"
    assert main(argv.split()) == 0
    return out


def test_a_table_end_to_end(made, model_folder, tiny_model):
    table = AllocationTable.load(made)
    h = table.header
    assert (h.k_bits, h.v_bits, h.allocator, h.tokens) == (2.5, 3.0, "template", 2048)
    assert (h.layers, h.kv_heads, h.head_dim, h.v_head_dim) == (2, 2, 32, 32)
    assert h.rope == ((32, True),) * 2
    assert h.model_id == str(model_folder)
    model = tiny_model("llama_gqa3")
    assert h.config_hash == config_hash(model.config)
    assert h.weights_hash == weights_hash(str(model_folder)) != ""
    assert len(h.text_hash) == 64

    text = hf.read_text(None)
    sequences = hf.token_sequences(hf.AutoTokenizer.from_pretrained(model_folder), text, 2048, 1024)
    assert [len(s) for s in sequences] == [1024, 1024]
    assert hf.text_hash(sequences) == h.text_hash
    rope = rope_blocks(model.config)
    again = build_table(hf.collect(model, sequences, rope, progress=False), rope, k_bits=2.5, v_bits=3)
    assert torch.equal(again.tensors["widths"], table.tensors["widths"])
    torch.testing.assert_close(again.tensors["k_gain"], table.tensors["k_gain"])
    # 2.5 bits of 32 channels are in no columns, so their rows are plain; what they cost is measured all the same.
    ids = hf.held_out(hf.AutoTokenizer.from_pretrained(model_folder), text, 2048, 1024)
    assert h.page == 0 and len(ids) == 1024
    cost = hf.measure(model, ids, again, RECENT)
    assert h.quality == pytest.approx(cost.to_dict(), rel=1e-3) and cost.recent == RECENT and cost.tokens == 512


def test_means_reach_the_table(model_folder, tmp_path):
    """By the program itself, which warns of nothing."""
    out = tmp_path / "t.safetensors"
    command = [sys.executable, "-m", "sglang_blockgtq.calibrate", "--model-path", model_folder, "--out", out]
    done = subprocess.run([*command, "--device", "cpu"], capture_output=True, text=True)
    assert done.returncode == 0 and "page means" not in done.stderr and "not measured" not in done.stderr
    table = AllocationTable.load(out)
    assert (table.header.k_bits, table.header.page) == (3.0, 512)
    theta = 10_000.0 ** (-torch.arange(16, dtype=torch.float64) / 16)
    torch.testing.assert_close(table.tensors["theta"], theta.expand(2, -1), rtol=1e-5, atol=1e-9)
    assert torch.equal(table.tensors["mean"].any(-1), (theta * 512 <= 2).expand(2, 2, -1))
    quality = table.header.quality
    assert 0 < quality["kl"] < 1 and quality["worst_layer"] in (0, 1) and quality["tokens"] == 512
    assert 0 < quality["attention_kl"] <= quality["worst_layer_kl"]


def test_a_text_without_more_tokens_leaves_a_table_unmeasured(model_folder, tmp_path, caplog):
    text, out = tmp_path / "text", tmp_path / "t.safetensors"
    argv = f"--model-path {model_folder} --out {out} --device cpu --calibration-text {text}".split()
    for more, measured in ((127, False), (128, True)):
        text.write_text("x" * (2048 + more))
        caplog.clear()
        assert main(argv) == 0
        assert (AllocationTable.load(out).header.quality is not None) == measured
        assert (
            "the calibration text has no more tokens: what the cache costs is not measured" in caplog.text
        ) != measured


def test_options_reach_the_table(model_folder, tmp_path, capsys):
    text, out = tmp_path / "text", tmp_path / "t.safetensors"
    text.write_text("All work and no play makes Jack a dull boy. " * 100)
    argv = f"--model-path {model_folder} --k-bits 3 --v-bits 2 --out {out} --allocator paper --calibration-text {text} "
    assert main([*(argv + "--calibration-tokens 2500 --device cpu --dtype bfloat16").split()]) == 0
    h = AllocationTable.load(out).header
    assert (h.k_bits, h.v_bits, h.allocator, h.tokens) == (3.0, 2.0, "paper", 2500)
    packed = AllocationTable.load(out).bytes_per_token_head()
    assert f"{out}: paper, K 3 V 2 bits, {packed:g} bytes per token and KV head" in capsys.readouterr().out


def test_granularity_reaches_the_table(model_folder, tmp_path, capsys):
    out = tmp_path / "t.safetensors"
    argv = f"--model-path {model_folder} --out {out} --allocator product --device cpu"
    for said, granularity in (("", "segment"), (" --granularity slot", "segment"), (" --granularity block", "block")):
        assert main((argv + said).split()) == 0
        h = AllocationTable.load(out).header
        assert (h.allocator, h.granularity) == ("product", granularity)


def test_defaults_are_the_servers(model_folder, tmp_path):
    out = tmp_path / "t.safetensors"
    assert main(["--model-path", str(model_folder), "--out", str(out), "--device=cpu"]) == 0
    h = AllocationTable.load(out).header
    assert (h.k_bits, h.v_bits, h.allocator, h.tokens) == (3.0, 3.0, "template", 2048)
    assert h.granularity == "segment"


def test_a_model_without_rope_gets_uniform_bits_and_a_notice(tiny_model, byte_tokenizer, tmp_path, caplog):
    tiny_model("gpt2_no_rope").save_pretrained(tmp_path)
    byte_tokenizer.save_pretrained(tmp_path)
    out = tmp_path / "t.safetensors"
    assert main(["--model-path", str(tmp_path), "--out", str(out), "--device=cpu"]) == 0
    table = AllocationTable.load(out)
    assert (table.header.allocator, table.header.page) == ("uniform", 0) and table.header.quality["tokens"] == 512
    assert (table.tensors["widths"] == 3).all()
    assert "no layer of" in caplog.text and "has RoPE" in caplog.text


@pytest.mark.parametrize("family", ["Qwen2_5_VL", "Qwen3VL"])
def test_a_model_with_images_is_calibrated_by_its_text(family, byte_tokenizer, tmp_path, caplog):
    """The table is that of the same language model without images, but without means."""
    shape = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 32,
             "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 1024,
             "rms_norm_eps": 1e-6, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}  # fmt: skip
    rope = {"rope_type": "default", "rope_theta": 10_000.0}
    vision = {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": 64}
    sides = {**shape, "rope_parameters": {**rope, "mrope_section": [4, 6, 6]}}
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(text_config=sides, vision_config=vision)
    model = getattr(transformers, f"{family}ForConditionalGeneration")(config)
    text = {"Qwen2_5_VL": "Qwen2", "Qwen3VL": "Qwen3"}[family]
    alone = getattr(transformers, f"{text}ForCausalLM")(
        getattr(transformers, f"{text}Config")(**shape, rope_parameters=rope)
    )
    alone.model.load_state_dict(model.model.language_model.state_dict())
    alone.lm_head.load_state_dict(model.lm_head.state_dict())
    tables = []
    for name, made in (("images", model), ("text", alone)):
        made.save_pretrained(tmp_path / name)
        byte_tokenizer.save_pretrained(tmp_path / name)
        argv = ["--model-path", tmp_path / name, "--out", tmp_path / f"{name}.table", "--allocator", "product"]
        assert main([str(x) for x in [*argv, "--device", "cpu"]]) == 0
        tables.append(AllocationTable.load(tmp_path / f"{name}.table"))
        assert ("do not rotate by one angle a position (M-RoPE)" in caplog.text) == (made is model)
        caplog.clear()
    mine, other = tables
    assert (mine.header.page, other.header.page) == (0, 512)
    assert mine.header.rope == other.header.rope == ((32, True),) * 2
    torch.testing.assert_close(mine.tensors["v_gain"], other.tensors["v_gain"], rtol=1e-4, atol=0)
    assert 0 < mine.header.quality["kl"] < 1 and mine.header.quality["tokens"] == 512


def png_size(path):
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")


def test_inspect(made, capsys):
    assert main(["inspect", str(made)]) == 0
    table, out = AllocationTable.load(made), capsys.readouterr().out
    assert summary(table) in out
    for part in (
        "2 layers, 2 KV heads, head_dim 32",
        "neox pairs, 32 channels (2 layers)",
        "K 2.5, V 3 on average",
        "template",
        "2048 tokens",
        f"{table.bytes_per_token_head():g} bytes",
        table.header.table_hash,
        table.header.text_hash,
        "share of RoPE blocks by width",
        "layer 1",
    ):
        assert part in out, part
    png = made.with_suffix(".png")
    assert str(png) in out
    width, height = png_size(png)
    assert 800 < width < 2000
    assert 300 < height < 1200


def test_inspect_in_a_process_of_its_own(made, tmp_path):
    png = tmp_path / "x.png"
    command = [sys.executable, "-m", "sglang_blockgtq.calibrate", "inspect", made, "--png", png]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "table hash" in done.stdout
    assert imread(png).std() > 0.1
    made.with_suffix(".txt").write_text("no table")
    done = subprocess.run([*command[:4], made.with_suffix(".txt")], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_inspect_without_matplotlib(made, monkeypatch, capsys):
    """A server's installation has none: the summary is there all the same, and what is missing is said."""
    made.with_suffix(".png").unlink(missing_ok=True)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "sglang_blockgtq.calibrate.fingerprint")
    assert main(["inspect", str(made)]) == 0
    out = capsys.readouterr().out
    assert summary(AllocationTable.load(made)) in out and "pip install matplotlib" in out
    assert main(["inspect", str(made), "--png", "x.png"]) == 2
    assert "error: --png x.png: matplotlib is not installed" in capsys.readouterr().err
    assert not made.with_suffix(".png").exists()


def test_the_picture_shows_the_shares(make_moments):
    rope = [RopeBlocks(64, 64)] * 5
    table = build_table(make_moments(layers=5), rope, k_bits=3, v_bits=3, allocator="product", granularity="block")
    left, right, _colorbar = fingerprint(table).axes
    shares = width_shares(table)
    assert len(left.containers) == int((shares > 0).any(0).sum()) > 3
    top = torch.zeros(5, dtype=torch.float64)
    for bars in left.containers:
        bits = int(bars.get_label().split()[0])
        torch.testing.assert_close(torch.tensor([bar.get_height() for bar in bars]).double(), shares[:, bits])
        torch.testing.assert_close(torch.tensor([bar.get_y() for bar in bars]).double(), top)
        top += shares[:, bits]
    image = torch.tensor(right.images[0].get_array())
    torch.testing.assert_close(image, table.tensors["widths"].float().mean(1).T)


def test_summary_figures(make_moments):
    table = build_table(
        make_moments(layers=9, heads=2, blocks=64), [RopeBlocks(128, 64, False)] * 9, k_bits=3, v_bits=3
    )
    shares = width_shares(table)
    assert shares.shape == (9, 9)
    torch.testing.assert_close(shares.sum(-1), torch.ones(9, dtype=torch.float64))
    torch.testing.assert_close((shares * torch.arange(9)).sum(-1), torch.full((9,), 3.0, dtype=torch.float64))
    text = summary(table)
    assert "100 bytes, 19.5% of bf16 (512 bytes)" in text
    assert "interleaved pairs, 64 channels (9 layers)" in text
    ((template, share),) = templates_of(table)
    assert share == 1 and "of heads" not in text
    assert sum(template) == 192
    assert f"{template.count(template[0])} blocks at {template[0]} bits" in text
    assert "1800 bytes in all layers" in text
    for name in ("layers 0-1", "layers 2-3", "layers 4-5", "layers 6-8"):
        assert name in text
    rope = [RopeBlocks(64, 64)] * 2
    free = build_table(make_moments(), rope, k_bits=3, v_bits=3, allocator="product", granularity="block")
    assert templates_of(free) == []
    assert "product by blocks" in summary(free) and "by segments" not in text
    assert "none: widths differ" in summary(free)


def test_inspect_by_segments(make_moments):
    moments, rope = make_moments(layers=5, heads=4, spread=2.0), [RopeBlocks(64, 64)] * 5
    table = build_table(moments, rope, k_bits=3, v_bits=3, allocator="product", granularity="segment")
    templates = templates_of(table)
    assert len(templates) == len(table.k_templates) > 1 and sum(share for _, share in templates) == pytest.approx(1)
    text = summary(table)
    assert "product by segments" in text
    for widths, share in templates:
        assert f"{share:.0%} of heads: {widths.count(widths[0])} blocks at {widths[0]} bit" in text


def test_layer_groups_cover_all_layers():
    for layers in (1, 3, 4, 30, 61):
        groups = layer_groups(layers)
        assert [i for g in groups for i in g] == list(range(layers))
        assert max(map(len, groups)) - min(map(len, groups)) <= 1


def run(argv, capsys):
    """Exit code and the one line on stderr."""
    try:
        code = main([str(a) for a in argv])
    except SystemExit as e:
        code = e.code
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert len(lines) == 1, captured.err
    assert captured.out == ""
    return code, lines[0]


GOOD = {"--model-path": "M", "--k-bits": "3", "--v-bits": "3", "--out": "O", "--device": "cpu"}


@pytest.fixture
def bad(model_folder, tmp_path, capsys, monkeypatch):
    """Runs the command with some options changed and expects exit code 2 before any weights are read."""

    def call(**changes):
        def loaded(*_, **__):
            pytest.fail("weights were loaded")

        monkeypatch.setattr(hf.AutoModelForCausalLM, "from_pretrained", loaded)
        options = {**GOOD, "--model-path": model_folder, "--out": tmp_path / "t.safetensors"}
        options |= {"--" + name.replace("_", "-"): value for name, value in changes.items()}
        argv = [part for name, value in options.items() if value is not None for part in (name, value)]
        code, line = run(argv, capsys)
        assert code == 2
        assert not (tmp_path / "t.safetensors").exists()
        return line

    return call


@pytest.mark.parametrize("bits", ["0", "9", "nan", "inf", "-1", "three", "0.5", ""])
@pytest.mark.parametrize("side", ["k_bits", "v_bits"])
def test_bad_bits(bad, side, bits):
    option = "--" + side.replace("_", "-")
    line = bad(**{side: bits})
    assert option in line
    assert f"'{bits}': an average between 1 and 8 bits is supported" in line


def test_bad_options(bad, tmp_path):
    assert "--allocator" in (line := bad(allocator="best")) and "best" in line and "template" in line
    assert "--granularity" in (line := bad(granularity="head")) and "segment" in line
    line = bad(granularity="block")
    assert "--granularity block: has no effect on the allocator template" in line and "paper, product" in line
    line = bad(granularity="segment", allocator="paper", k_bits="2.5")
    assert line.startswith("error: --granularity segment: --k-bits 2.5 gives the 2 segments of head_dim 32 5 bits")
    assert "2 and 3 work, or --granularity block takes any" in line
    assert "--dtype" in (line := bad(dtype="int8")) and "bfloat16" in line
    assert "--device" in (line := bad(device="toaster")) and "cpu works everywhere" in line
    assert "--calibration-tokens" in (line := bad(calibration_tokens="2047")) and "2048 or more" in line
    assert "--calibration-tokens" in (line := bad(calibration_tokens="many")) and "whole number" in line
    for recent in ("65", "-1", "2.5", "all"):
        assert f"'{recent}': a whole number up to 64 is needed, e.g. 32" in bad(exact_recent=recent)
    assert "--model-path" in bad(model_path=None)
    assert "--nonsense" in bad(nonsense="1")


def test_bad_text(bad, tmp_path):
    line = bad(calibration_text=tmp_path / "none.txt")
    assert line == f"error: --calibration-text {tmp_path / 'none.txt'}: no such file; name a UTF-8 text file"
    (tmp_path / "short.txt").write_text("word " * 10)
    line = bad(calibration_text=tmp_path / "short.txt")
    short = f"--calibration-tokens 2048: {tmp_path / 'short.txt'} has 50 bytes, and a token takes one or more"
    assert line == f"error: {short}; name a longer text with --calibration-text"
    (tmp_path / "short.txt").write_text("é" * 1500)
    line = bad(calibration_text=tmp_path / "short.txt", calibration_tokens="3100")
    assert "--calibration-tokens 3100: the calibration text has only 3000 tokens" in line
    line = bad(calibration_tokens="100000000")
    assert line.startswith("error: --calibration-tokens 100000000: the built-in text has") and "ask for about" in line
    assert "a folder, not a file" in bad(calibration_text=tmp_path)
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    assert "not UTF-8" in bad(calibration_text=tmp_path / "binary")


def test_bad_model(bad, tmp_path):
    line = bad(model_path=tmp_path / "no-model")
    assert f"--model-path {tmp_path / 'no-model'}" in line
    folder = tmp_path / "odd"
    folder.mkdir()
    assert f"--model-path {folder}" in bad(model_path=folder)


def test_unsupported_models(bad, model_folder, tmp_path):
    config = json.loads((model_folder / "config.json").read_text())
    folder = tmp_path / "odd"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**config, "head_dim": 40}))
    assert "head_dim 40 is not supported; multiples of 16 from 32 to 256 are" in bad(model_path=folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama4_text", "head_dim": 64}))
    assert "chunked_attention" in bad(model_path=folder)
    (folder / "config.json").write_text(json.dumps(config))
    assert "tokenizer" in bad(model_path=folder)


def test_missing_weights(model_folder, tmp_path, capsys):
    folder = tmp_path / "no-weights"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((model_folder / name).read_bytes())
    argv = ["--model-path", folder, "--k-bits", 3, "--v-bits", 3, "--out", tmp_path / "t", "--device", "cpu"]
    code, line = run(argv, capsys)
    assert code == 2
    assert f"--model-path {folder}: its weights cannot be loaded" in line


def test_bad_out(bad, tmp_path):
    assert "is a folder; name a file" in bad(out=tmp_path)
    (tmp_path / "file").write_text("")
    assert "is not a folder" in bad(out=tmp_path / "file" / "t.safetensors")


def test_out_without_permission(bad, tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda *_: False)
    assert f"no permission to write in {tmp_path}" in bad()


def test_inspect_bad_tables(made, tmp_path, capsys):
    path = tmp_path / "t.safetensors"
    data = made.read_bytes()

    def line(argv=("inspect", path)):
        code, text = run(argv, capsys)
        assert code == 2
        return text

    assert f"error: table {path}: no such file" in line()
    path.write_bytes(data[: len(data) // 2])
    assert "damaged" in line()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert "hash" in line()
    header = json.loads(AllocationTable.load(made).header.to_json())
    save_file(load_file(made), path, metadata={"blockgtq": json.dumps({**header, "format_version": 99})})
    assert "format version 99" in line()
    assert "FILE" in line(["inspect"])
    assert "error:" in line(["inspect", made, "--png", tmp_path / "no" / "folder.png"])
