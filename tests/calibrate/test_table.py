"""The table file: round trip, and every way it can be damaged."""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sglang_blockgtq.calibrate.build import build_table
from sglang_blockgtq.calibrate.quality import Quality
from sglang_blockgtq.calibrate.rope import RopeBlocks
from sglang_blockgtq.calibrate.table import FORMAT_VERSION, AllocationTable, TableError

KEY = "blockgtq"


@pytest.fixture(scope="module", params=["plain", "with means"])
def table(make_moments, request):
    rope = [RopeBlocks(32, 16, neox=False)] * 2
    names = {"model_id": "a/b", "config_hash": "c"}
    if request.param == "plain":
        names |= {"allocator": "product", "granularity": "block"}
        return build_table(make_moments(blocks=16), rope, k_bits=2.5, v_bits=3, **names)
    made = build_table(make_moments(blocks=16, bias=0.5), rope, k_bits=3, v_bits=3, **names)
    assert made.header.page == 512
    return made.with_quality(Quality(0.0125, 0.02, 1, 0.035, 256))


@pytest.fixture
def saved(table, tmp_path):
    path = tmp_path / "deep" / "folder" / "table.safetensors"
    table.save(path)
    return path


def rewrite(path, metadata):
    """The same tensors under another metadata."""
    save_file(load_file(path), path, metadata=metadata)


def header_of(path) -> dict:
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()[KEY])


def test_round_trip(table, saved):
    loaded = AllocationTable.load(saved)
    assert loaded.header == table.header
    assert loaded.tensors.keys() == table.tensors.keys()
    for name, tensor in table.tensors.items():
        assert loaded.tensors[name].dtype == tensor.dtype
        assert torch.equal(loaded.tensors[name], tensor)
    for layer in range(2):
        assert torch.equal(loaded.layer_codec(layer).k_in, table.layer_codec(layer).k_in)
        assert loaded.row_layout(layer) == table.row_layout(layer)
        assert (loaded.layer_codec(layer).mean is None) == (table.header.page == 0)


def test_header_is_json_in_the_safetensors_metadata(table, saved):
    header = header_of(saved)
    assert header["format_version"] == FORMAT_VERSION
    assert header["table_hash"] == table.computed_hash()
    assert header["rope"] == [[16, False], [16, False]]


def test_every_truncation_is_noticed(saved):
    data = saved.read_bytes()
    for length in (0, 1, 7, 8, 9, 100, 1000, len(data) // 2, len(data) - 1):
        saved.write_bytes(data[:length])
        with pytest.raises(TableError, match=r"table .*table\.safetensors: .*make it again"):
            AllocationTable.load(saved)


def test_every_flipped_bit_is_noticed(saved):
    """Bytes all over the file, its header included."""
    data = saved.read_bytes()
    header_end = 8 + int.from_bytes(data[:8], "little")
    places = {*range(0, header_end, 7), *range(header_end, len(data), len(data) // 97), len(data) - 1}
    for place in sorted(places):
        damaged = bytearray(data)
        damaged[place] ^= 1 << (place % 8)
        saved.write_bytes(damaged)
        with pytest.raises(TableError):
            AllocationTable.load(saved)


def test_changed_values_under_an_intact_file_are_noticed(saved):
    header = header_of(saved)
    cost = {"kl": 1e-6, "attention_kl": 1e-6, "worst_layer": 0, "worst_layer_kl": 1e-6, "tokens": 256}
    for change in ({"k_bits": 4.0}, {"page": 64}, {"quality": cost}):
        rewrite(saved, {KEY: json.dumps({**header, **change})})
        with pytest.raises(TableError, match="contents hash to .* it was changed or damaged"):
            AllocationTable.load(saved)
    rewrite(saved, {KEY: json.dumps(header)})
    tensors = load_file(saved)
    for name in tensors.keys() & {"mean", "theta", "k_gain"}:
        changed = tensors[name].clone()
        changed.view(-1)[-1] += 1e-3
        save_file({**tensors, name: changed}, saved, metadata={KEY: json.dumps(header)})
        with pytest.raises(TableError, match="contents hash to .* it was changed or damaged"):
            AllocationTable.load(saved)


OLDER = f"holds other tensors than version {FORMAT_VERSION}, which this build reads; make it again with python -m"
NEWER = f"is of a newer sglang-blockgtq, this build reads version {FORMAT_VERSION}; make it again with python -m"


@pytest.mark.parametrize(
    "version, says",
    [
        (2, f"format version 2 {OLDER}"),
        (3, f"format version 3 {OLDER}"),
        (FORMAT_VERSION + 1, f"format version {FORMAT_VERSION + 1} {NEWER}"),
        ("three", r"no format version \('three' is no whole number\); make it again"),
        (None, "no format version"),
        (True, "no format version"),
        (float(FORMAT_VERSION), "no format version"),
    ],
)
def test_other_versions(saved, version, says):
    """Whatever else their headers hold."""
    rewrite(saved, {KEY: json.dumps({**header_of(saved), "format_version": version, "novel": 1})})
    with pytest.raises(TableError, match=f"table .*{says}"):
        AllocationTable.load(saved)


def test_a_table_of_version_3(saved):
    """As version 3 wrote it: of keys without means, and with no word of what it costs."""
    header = {**header_of(saved), "format_version": 3}
    del header["page"], header["quality"]
    tensors = {name: x for name, x in load_file(saved).items() if name not in ("mean", "theta")}
    save_file(tensors, saved, metadata={KEY: json.dumps(header)})
    with pytest.raises(TableError, match=f"format version 3 {OLDER}"):
        AllocationTable.load(saved)


def test_an_unknown_header_field(saved):
    rewrite(saved, {KEY: json.dumps({**header_of(saved), "novel": 1})})
    with pytest.raises(TableError, match="its header has the unknown field novel; make it again"):
        AllocationTable.load(saved)


@pytest.mark.parametrize("key", ["allocator", "rope", "layers", "granularity", "table_hash", "page", "quality"])
def test_missing_header_key(saved, key):
    header = header_of(saved)
    del header[key]
    rewrite(saved, {KEY: json.dumps(header)})
    with pytest.raises(TableError, match=f"its header lacks {key}; make it again"):
        AllocationTable.load(saved)


def test_missing_tensor(saved):
    tensors = load_file(saved)
    header = header_of(saved)
    del tensors["widths"]
    save_file(tensors, saved, metadata={KEY: json.dumps(header)})
    with pytest.raises(TableError, match="hash"):
        AllocationTable.load(saved)


@pytest.mark.parametrize("text", ["{", "[]", "null", '"x"', ""])
def test_header_that_is_no_json_object(saved, text):
    rewrite(saved, {KEY: text})
    with pytest.raises(TableError, match=r"table .*make it again"):
        AllocationTable.load(saved)


def test_another_safetensors_file(saved):
    rewrite(saved, {"format": "pt"})
    with pytest.raises(TableError, match="not an allocation table"):
        AllocationTable.load(saved)


def test_what_is_no_file_is_named(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for path, says in {
        tmp_path / "none": "no such file",
        tmp_path / "none" / "deeper": "no such file",
        tmp_path: "a folder, not a file",
        tmp_path / "pipe": "a pipe or device, not a regular file",  # opened, it would wait for ever
        os.devnull: "a pipe or device, not a regular file",
        tmp_path / "loop": r"cannot be read \(.*\)",
        "a\0b": r"cannot be read \(.*\)",
    }.items():
        with pytest.raises(TableError, match=f"table .*: {says}; make one with python -m sglang_blockgtq.calibrate"):
            AllocationTable.load(path)
    (tmp_path / "secret").write_text("")
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(TableError, match="no permission to read it"):
        AllocationTable.load(tmp_path / "secret")


def full_disk(*_, **__):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("owner, name", [(os, "replace"), (Path, "write_bytes")])
def test_a_failed_save_leaves_the_old_file_and_nothing_else(table, saved, monkeypatch, owner, name):
    before = saved.read_bytes()
    monkeypatch.setattr(owner, name, full_disk)
    with pytest.raises(OSError, match="No space left on device"):
        table.save(saved)
    assert saved.read_bytes() == before
    assert os.listdir(saved.parent) == [saved.name]


def test_savers_of_one_name_do_not_meet(table, tmp_path):
    """Threads have one process id, as the first processes of containers that share a folder have."""
    path, barrier = tmp_path / "t.safetensors", Barrier(8, timeout=60)

    def save() -> None:
        barrier.wait()
        for _ in range(40):
            table.save(path)

    with ThreadPoolExecutor(8) as pool:
        for job in [pool.submit(save) for _ in range(8)]:
            job.result()  # raises what a lost save raised
    assert AllocationTable.load(path).header == table.header
    assert os.listdir(tmp_path) == [path.name]


def test_others_may_read_a_table(table, tmp_path):
    """As any new file: a cache folder may be shared."""
    table.save(tmp_path / "t.safetensors")
    (tmp_path / "plain").write_bytes(b"")
    modes = [(tmp_path / name).stat().st_mode for name in ("t.safetensors", "plain")]
    assert modes[0] == modes[1]


def test_save_replaces_a_damaged_file(table, saved):
    saved.write_bytes(b"rubbish")
    table.save(saved)
    assert AllocationTable.load(saved).header == table.header
