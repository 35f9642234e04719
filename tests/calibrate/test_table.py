"""The table file: round trip, and every way it can be damaged."""

import json
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sglang_blockgtq.calibrate.build import build_table
from sglang_blockgtq.calibrate.rope import RopeBlocks
from sglang_blockgtq.calibrate.table import FORMAT_VERSION, AllocationTable, TableError

KEY = "blockgtq"


@pytest.fixture(scope="module")
def table(make_moments):
    rope = [RopeBlocks(32, 16, neox=False)] * 2
    return build_table(
        make_moments(blocks=16), rope, k_bits=2.5, v_bits=3, allocator="product", model_id="a/b", config_hash="c"
    )


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
    rewrite(saved, {KEY: json.dumps({**header, "k_bits": 4.0})})
    with pytest.raises(TableError, match="hash"):
        AllocationTable.load(saved)


def test_newer_version(saved):
    rewrite(saved, {KEY: json.dumps({**header_of(saved), "format_version": FORMAT_VERSION + 1, "novel": 1})})
    with pytest.raises(TableError, match=f"format version {FORMAT_VERSION + 1}, this build reads version"):
        AllocationTable.load(saved)


@pytest.mark.parametrize("key", ["allocator", "rope", "scale_search", "layers"])
def test_missing_header_key(saved, key):
    header = header_of(saved)
    del header[key]
    rewrite(saved, {KEY: json.dumps(header)})
    with pytest.raises(TableError, match="header is incomplete"):
        AllocationTable.load(saved)


def test_missing_tensor(saved):
    tensors = load_file(saved)
    header = header_of(saved)
    del tensors["widths"]
    save_file(tensors, saved, metadata={KEY: json.dumps(header)})
    with pytest.raises(TableError, match="hash"):
        AllocationTable.load(saved)


@pytest.mark.parametrize("text", ["{", "[]", "null", '"x"'])
def test_header_that_is_no_json_object(saved, text):
    rewrite(saved, {KEY: text})
    with pytest.raises(TableError, match=r"table .*make it again"):
        AllocationTable.load(saved)


def test_another_safetensors_file(saved):
    rewrite(saved, {"format": "pt"})
    with pytest.raises(TableError, match="not an allocation table"):
        AllocationTable.load(saved)


def test_no_file(tmp_path):
    with pytest.raises(TableError, match="no such file"):
        AllocationTable.load(tmp_path / "none.safetensors")
    with pytest.raises(TableError, match="no such file"):
        AllocationTable.load(tmp_path)


def test_a_failed_save_leaves_the_old_file_and_nothing_else(table, saved, monkeypatch):
    before = saved.read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        table.save(saved)
    assert saved.read_bytes() == before
    assert os.listdir(saved.parent) == [saved.name]


def test_save_replaces_a_damaged_file(table, saved):
    saved.write_bytes(b"rubbish")
    table.save(saved)
    assert AllocationTable.load(saved).header == table.header
