"""Where a server's table comes from: a cache that may fail, weights that it belongs to, a file that is named."""

import os
import re
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import LlamaConfig

from sglang_blockgtq import obtain
from sglang_blockgtq.calibrate import allocate, build, quality
from sglang_blockgtq.calibrate.build import build_table
from sglang_blockgtq.calibrate.model import config_hash
from sglang_blockgtq.calibrate.rope import RopeBlocks
from sglang_blockgtq.calibrate.table import AllocationTable, layers_of
from sglang_blockgtq.calibrate.text import read_text
from sglang_blockgtq.choose import choose
from sglang_blockgtq.obtain import cache_path, calibration_text, load_named_table
from sglang_blockgtq.options import KVQuantError, KVQuantOptions

ROPE = [(32, True)] * 2


class Bytes:
    """One token per byte."""

    def encode(self, text, add_special_tokens=True):
        return list(text.encode())


@pytest.fixture
def start(loaded, make_moments, monkeypatch, tmp_path):
    """Chooses a table on one rank for weights in a folder, of moments that are drawn, and counts how often they are."""
    loaded.install(monkeypatch, loaded.group(), loaded.group(), loaded.group())
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.bin").write_bytes(b"weights")
    calls = {"calibrated": 0}

    def collect(runner, sequences):
        calls["calibrated"] += 1
        assert sum(map(len, sequences)) == 2048
        return make_moments(blocks=16), [RopeBlocks(32, 32)] * 2

    def tokenizer(path, **options):
        calls["tokenizer"] = (path, options)
        return Bytes()

    monkeypatch.setattr("sglang_blockgtq.capture.collect_moments", collect)
    monkeypatch.setattr("sglang.srt.utils.hf_transformers_utils.get_tokenizer", tokenizer)

    def start(args=None, **options):
        options = KVQuantOptions(**{"cache_dir": str(tmp_path / "cache"), **options})
        runner = loaded.runner(ROPE, ROPE, **{"model_path": str(folder), **(args or {})})
        choice = choose(runner, options, lambda table: layers_of(table, slice(None), (0, 1), "cpu", 1024))
        return choice.table, choice.origin

    start.calls, start.folder, start.tables = calls, folder, tmp_path / "cache" / "tables"
    return start


def test_a_table_is_kept_and_found_again(start):
    first, again = start(), start()
    assert (first[1], again[1], start.calls["calibrated"]) == ("calibrated", "cache", 1)
    assert first[0].header == again[0].header
    (start.folder / "model.bin").write_bytes(b"tuned")
    assert start()[1] == "calibrated"


@pytest.mark.parametrize("allocator", ["uniform", "paper", "product", "template"])
def test_every_allocator_is_by_segments_unless_blocks_are_asked_for(start, allocator):
    has_choice = allocator in ("paper", "product")
    assert start(allocator=allocator, granularity="segment")[0].header.granularity == "segment"
    table, origin = start(allocator=allocator, granularity="block")
    assert (table.header.granularity, origin) == (("block", "calibrated") if has_choice else ("segment", "cache"))


@pytest.mark.parametrize(
    "owner, name",
    [(allocate, "ALLOCATOR_VERSION"), (build, "BUILDER_VERSION"), (quality, "QUALITY_VERSION")],
)
def test_the_name_of_a_cached_table_has_the_versions(owner, name, monkeypatch):
    options = KVQuantOptions(cache_dir="/c")
    before = cache_path(options, "config", "weights", "text")
    assert cache_path(options, "config", "weights", "text") == before
    monkeypatch.setattr(obtain, name, getattr(owner, name) + 1)
    assert cache_path(options, "config", "weights", "text") != before


def test_the_name_of_a_cached_table_has_what_it_is_made_from():
    def path(config="config", weights="weights", text="text", **options):
        given = {"cache_dir": "/c", "allocator": "paper", "granularity": "segment", **options}
        return cache_path(KVQuantOptions(**given), config, weights, text)

    other = [{"config": "x"}, {"weights": "x"}, {"text": "x"}, {"k_bits": 2.0}, {"v_bits": 2.0}]
    other += [{"allocator": "product"}, {"granularity": "block"}, {"exact_recent": 0}, {"exact_recent": 8}]
    auto = {"k_bits": None, "v_bits": None}
    other += [auto, {**auto, "max_kl": 0.1}, {**auto, "bits_range": (2.0, 4.0)}]
    assert len({path(), *(path(**change) for change in other)}) == 1 + len(other)
    assert path(chunk_attention="quantized") == path()
    assert path(max_kl=0.1) == path()  # the table of fixed bits is the same


def full_disk(*_, **__):
    raise OSError(28, "No space left on device")


def test_a_full_disk_costs_the_cache_alone(start, monkeypatch, caplog):
    monkeypatch.setattr(Path, "write_bytes", full_disk)
    table, origin = start()
    assert origin == "calibrated" and table.computed_hash() == table.header.table_hash
    (line,) = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert f"--kv-quant-cache-dir {start.tables.parent}: the table cannot be kept there" in line
    assert "No space left on device" in line and "\n" not in line


@pytest.mark.parametrize("owner, name", [(Path, "write_bytes"), (os, "replace")], ids=["half", "unnamed"])
def test_a_writer_that_was_killed_leaves_no_table(start, monkeypatch, owner, name):
    """Half way through the file, or before it has its name."""
    table, _ = start()
    (path,) = start.tables.iterdir()
    path.unlink()

    def killed(target, data, *_):
        if name == "write_bytes":
            with open(target, "wb") as file:
                file.write(data[: len(data) // 2])
        os.kill(os.getpid(), signal.SIGKILL)

    if not (child := os.fork()):
        monkeypatch.setattr(owner, name, killed)
        table.save(path)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    (scratch,) = start.tables.iterdir()
    assert scratch.name.endswith(".tmp") and scratch.stat().st_size > 1000
    again, origin = start()
    assert origin == "calibrated" and again.header == table.header and start()[1] == "cache"


@pytest.mark.parametrize("folder", ["file", "file/deeper", "/proc/none"])
def test_an_impossible_cache_folder_costs_the_cache_alone(start, tmp_path, caplog, folder):
    (tmp_path / "file").write_text("")
    table, origin = start(cache_dir=str(tmp_path / folder))
    assert origin == "calibrated" and table.header.layers == 2
    assert f"--kv-quant-cache-dir {tmp_path / folder}: the table cannot be kept there" in caplog.text


def test_a_cache_folder_that_may_not_be_looked_into(start, monkeypatch, caplog):
    is_file = Path.is_file

    def denied(self):
        if start.tables in self.parents:
            raise PermissionError(13, "Permission denied", str(self))
        return is_file(self)

    monkeypatch.setattr(Path, "is_file", denied)
    assert start()[1] == "calibrated" and "Permission denied" in caplog.text


def test_scratch_files_of_dead_writers_are_removed(start):
    start.tables.mkdir(parents=True)
    names = [".a.safetensors.77.tmp", ".b.safetensors.0123456789abcdef.tmp", ".tmpAbCdEf"]
    old, new, others = names, [".c.safetensors.0123456789abcdef.tmp"], ["d.safetensors", "notes.tmp", ".nfs01"]
    for name in [*old, *new, *others]:
        (start.tables / name).write_bytes(b"")
        if name not in new:
            os.utime(start.tables / name, (time.time() - 4000,) * 2)
    start()
    left = {path.name for path in start.tables.iterdir()}
    assert left & {*old, *new, *others} == {*new, *others}


def test_revision_and_download_dir_of_the_server_reach_the_weights(start, monkeypatch):
    asked = []
    monkeypatch.setattr(obtain, "weights_hash", lambda *a: asked.append(a) or "w")
    args = {"model_path": "org/name", "revision": "v2", "download_dir": "/d", "tokenizer_mode": "slow"}
    assert start(args)[0].header.weights_hash == "w"
    assert asked == [("org/name", "v2", "/d")]
    path, options = start.calls["tokenizer"]
    assert path == "org/name"
    assert options == {"revision": "v2", "tokenizer_mode": "slow", "trust_remote_code": False}


@pytest.mark.parametrize("args", [{"load_format": "dummy"}, {"model_path": "no/such-model"}])
def test_what_cannot_be_known_again_is_not_kept(start, caplog, args):
    assert start(args)[0].header.weights_hash == ""
    assert not start.tables.exists()
    assert re.search(r"no weight files of .* to know the table by, so it is not kept", caplog.text)


def test_a_damaged_cached_table_is_made_again(start, caplog):
    start()
    (file,) = start.tables.iterdir()
    file.write_bytes(file.read_bytes()[:-1])
    assert start()[1] == "calibrated" and "calibrating again" in caplog.text
    assert start()[1] == "cache"


@pytest.fixture
def named(tmp_path, make_moments):
    """Saves a table for the stand-in's config, with a changed header, and gives the options that name it."""
    config = LlamaConfig(num_hidden_layers=2, head_dim=32, num_key_value_heads=2)

    def named(layers=2, heads=2, dim=32, bias=None, config=config, **header):
        moments = make_moments(layers, heads, dim // 2, bias=bias)
        names = {"config_hash": config_hash(config), "v_head_dim": dim}
        table = build_table(moments, [RopeBlocks(dim, dim)] * layers, k_bits=3, v_bits=3, **names)
        table = AllocationTable(replace(table.header, **header), table.tensors).sealed()
        table.save(tmp_path / "named.safetensors")
        nothing = dict.fromkeys(("k_bits", "v_bits", "allocator", "granularity"))
        return KVQuantOptions(table=str(tmp_path / "named.safetensors"), **nothing)

    named.config = config
    return named


@pytest.mark.parametrize(
    "shape, says",
    [
        ({"layers": 3}, "layers 3, the model has 2"),
        ({"heads": 1}, "kv_heads 1, the model has 2"),
        ({"dim": 64}, "head_dim 64, the model has 32"),
    ],
)
def test_a_table_of_another_shape_under_the_models_hash(named, shape, says):
    options = named(**shape)
    with pytest.raises(KVQuantError, match=f"--kv-quant-table {options.table}: {says}; make one for this model"):
        load_named_table(options, named.config)


def test_a_table_of_another_model(named):
    with pytest.raises(KVQuantError, match="made for another model"):
        load_named_table(named(config_hash="x"), named.config)
    assert load_named_table(named(), named.config).header.layers == 2


def test_means_where_positions_have_several_sides(named):
    """A table with them is as good as any other without M-RoPE, and one without them with it."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]}
    config = LlamaConfig(num_hidden_layers=2, head_dim=32, num_key_value_heads=2, rope_parameters=rope)
    with pytest.raises(KVQuantError, match="has means for pages of 512 positions.* M-RoPE .*make it again with"):
        load_named_table(named(bias=0.5, config=config), config)
    assert load_named_table(named(config=config), config).header.page == 0
    assert load_named_table(named(bias=0.5), named.config).header.page == 512


@pytest.mark.parametrize("name", ["k_bits", "v_bits", "allocator", "granularity"])
def test_a_named_table_must_be_what_is_asked_for(named, name):
    other = {"k_bits": 4.0, "v_bits": 2.0, "allocator": "paper", "granularity": "block"}[name]
    flag = f"--kv-quant-{name.replace('_', '-')}"
    with pytest.raises(KVQuantError, match=f"{flag} {other}: the table .* has .*; leave {flag} out"):
        load_named_table(replace(named(), **{name: other}), named.config)


@pytest.mark.parametrize("theirs", ["", "same", "other"])
def test_a_named_table_of_other_weights_is_told(named, loaded, monkeypatch, caplog, theirs):
    monkeypatch.setattr(obtain, "weights_hash", lambda *_: "same")
    runner = loaded.runner(ROPE, ROPE, config=named.config)
    found = obtain.named(runner, named(weights_hash=theirs))
    assert found.header.weights_hash == theirs
    assert ("made from other weight files than those of org/name" in caplog.text) == (theirs == "other")


def test_an_error_while_building_names_the_option(start, monkeypatch):
    def broken(*_, **__):
        raise ValueError("k_bits = 9:\nan average between 1 and 8 bits is supported")

    monkeypatch.setattr(obtain, "build_table", broken)
    with pytest.raises(KVQuantError) as e:
        start()
    assert str(e.value) == "--kv-quant blockgtq: ValueError: k_bits = 9: an average between 1 and 8 bits is supported"
    assert isinstance(e.value.__cause__, ValueError)


@pytest.mark.parametrize("device, held", [("cpu", 256), ("cuda:0", 2048)])
def test_text_to_measure_on_follows_the_text_to_calibrate_on(device, held):
    options = KVQuantOptions(calibration_tokens=3000)
    sequences, ids = calibration_text(Bytes(), options, 4096, device)
    assert sum(sequences, []) + ids == list(read_text(None).encode())[: 3000 + held]
    assert len(calibration_text(Bytes(), options, 1000, "cuda:0")[1]) == 1000  # as long as a request may be


def test_tables_of_other_text_to_measure_on_are_kept_apart(start, monkeypatch):
    start()
    monkeypatch.setattr(obtain, "CPU_TOKENS", 200)
    assert start()[1] == "calibrated" and len(list(start.tables.iterdir())) == 2


def test_a_short_text_is_told_without_the_kind_of_error(start, tmp_path):
    (tmp_path / "text").write_text("word " * 10)
    with pytest.raises(KVQuantError, match="^--kv-quant-calibration-tokens 2048: the calibration text has only 50"):
        start(calibration_text=str(tmp_path / "text"))
