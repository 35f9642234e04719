"""The fingerprint of weights: what it sees, where it looks, how little it reads."""

import json
import os

import pytest
import torch
from safetensors.torch import save_file

from sglang_blockgtq.calibrate import weights
from sglang_blockgtq.calibrate.weights import BUDGET, weights_hash

MIB = 1 << 20


def test_contents_names_and_sizes(tmp_path):
    def shard(name, data):
        (tmp_path / name).write_bytes(data)
        return weights_hash(str(tmp_path))

    assert weights_hash(str(tmp_path)) == ""
    (tmp_path / "config.json").write_text("{}")
    assert weights_hash(str(tmp_path)) == ""
    big = bytes(3 * MIB)
    seen = [
        shard("model-1.bin", big),
        shard("model-1.bin", b"\1" + big[1:]),
        shard("model-1.bin", big[1:] + b"\1"),
        shard("model-1.bin", big + b"\0"),
        shard("model-2.bin", b"x"),
        shard("model-3.gguf", b"x"),
        shard("model-4.pt", b"x"),
        weights_hash(str(tmp_path / "model-2.bin")),
    ]
    assert len(set(seen)) == len(seen)
    assert all(len(h) == 64 for h in seen)
    (tmp_path / "config.json").write_text("{ }")
    (tmp_path / "model-5.bin").symlink_to(tmp_path / "nowhere")
    assert weights_hash(str(tmp_path)) == seen[6]


@pytest.fixture
def layers(tmp_path):
    """A model of two files, larger than what is read of it; the tensors of the first in the order of the file."""
    for shard in range(2):
        names = [f"{shard}.{i}.{name}_proj" for i in range(8) for name in "qkvo"]
        save_file({name: torch.zeros(512, 1200) for name in names}, tmp_path / f"model-{shard}.safetensors")
    header = read_header(tmp_path / "model-0.safetensors")
    assert sum(f.stat().st_size for f in tmp_path.iterdir()) > 2 * BUDGET
    return tmp_path, header


def read_header(path) -> dict[str, tuple[int, int]]:
    """Name -> first and last byte."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    entries = json.loads(data[8 : 8 + length])
    offsets = {name: entry["data_offsets"] for name, entry in entries.items() if name != "__metadata__"}
    return {name: (8 + length + a, 8 + length + b - 1) for name, (a, b) in offsets.items()}


def flip(path, at):
    with open(path, "r+b") as f:
        f.seek(at)
        byte = f.read(1)[0]
        f.seek(at)
        f.write(bytes([byte ^ 1]))


def test_every_tensor_counts(layers):
    """A fine-tune of one projection of one layer, wherever it lies in the file."""
    folder, header = layers
    path, before = folder / "model-0.safetensors", weights_hash(str(folder))
    for first, last in header.values():
        for at in (first, (first + last) // 2, last):
            flip(path, at)
            assert weights_hash(str(folder)) != before
            flip(path, at)
    assert weights_hash(str(folder)) == before


def test_names_and_types_of_tensors_count(tmp_path):
    def saved(tensors):
        save_file(tensors, tmp_path / "model.safetensors")
        return weights_hash(str(tmp_path))

    a, b = torch.zeros(4, 6), torch.zeros(8, 3)
    made = [{"a": a}, {"b": a}, {"a": b}, {"a": a.half().repeat(2, 1)}, {"a": a.int()}]
    assert len({saved(tensors) for tensors in made}) == len(made)


@pytest.mark.parametrize(
    "head", [b"", b"\xff" * 8, (100).to_bytes(8, "little") + b"{", (2).to_bytes(8, "little") + b"[]"]
)
def test_a_damaged_safetensors_file_is_fingerprinted_as_any_other(tmp_path, head):
    path = tmp_path / "model.safetensors"
    path.write_bytes(head + bytes(3 * MIB))
    before = weights_hash(str(tmp_path))
    flip(path, 2 * MIB)
    assert weights_hash(str(tmp_path)) != before != ""


def sparse(path, size):
    with open(path, "wb") as f:
        f.truncate(size)


@pytest.fixture
def bytes_read(monkeypatch):
    total = []
    pread = os.pread

    def counted(fd, length, at):
        total.append(length)
        return pread(fd, length, at)

    monkeypatch.setattr(weights.os, "pread", counted)
    return total


def test_little_is_read_of_much(tmp_path, bytes_read):
    """16 GB as other formats have them, and 12 GB of 6,000 tensors, which a mixture of experts has."""
    for i in range(4):
        sparse(tmp_path / f"model-{i}.bin", 4 << 30)
    assert weights_hash(str(tmp_path))
    assert sum(bytes_read) < 1.2 * BUDGET

    bytes_read.clear()
    entries = {f"t{i}": {"dtype": "U8", "shape": [2 * MIB], "data_offsets": [2 * MIB * i, 2 * MIB * (i + 1)]}
               for i in range(6000)}  # fmt: skip
    header = json.dumps(entries).encode()
    path = tmp_path / "experts.safetensors"
    sparse(path, 8 + len(header) + 6000 * 2 * MIB)
    with open(path, "r+b") as f:
        f.write(len(header).to_bytes(8, "little") + header)
    assert weights_hash(str(path))
    assert len(bytes_read) == 3 * 6000 and sum(bytes_read) < 1.2 * BUDGET


def test_every_16_mib_of_16_gb_are_looked_at(tmp_path):
    path = tmp_path / "model.gguf"
    sparse(path, 16 << 30)
    before = weights_hash(str(path))
    for at in (64 << 20, (9 << 30) + (16 << 20) + 65535):
        flip(path, at)
        assert weights_hash(str(path)) != before
        flip(path, at)


@pytest.fixture
def no_network(monkeypatch):
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("asked the network"))


@pytest.mark.parametrize("name", ["no/such-model", "nosuchmodel", "/no/such/folder", "a b/c?d/e"])
def test_what_is_not_here_is_empty(name, no_network, tmp_path):
    assert weights_hash(name, revision="v1", download_dir=str(tmp_path)) == ""


@pytest.fixture
def hub(tmp_path, monkeypatch, no_network):
    """Adds a revision of org/name to a cache as huggingface_hub lays it out, and names the two caches."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))

    def add(revision: str, content: bytes | None, cache: str = "cache", name: str = "model.safetensors"):
        repo = tmp_path / cache / "models--org--name"
        commit = f"{len(list(repo.glob('refs/*')) if repo.exists() else []):040x}"
        snapshot = repo / "snapshots" / commit
        snapshot.mkdir(parents=True)
        (repo / "refs").mkdir(exist_ok=True)
        (repo / "blobs").mkdir(exist_ok=True)
        (repo / "refs" / revision).write_text(commit)
        (snapshot / "config.json").write_text("{}")
        if content is not None:
            blob = repo / "blobs" / weights.hashlib.sha256(content).hexdigest()
            blob.write_bytes(content)
            (snapshot / name).symlink_to(os.path.relpath(blob, snapshot))
        return snapshot

    add.downloads = str(tmp_path / "downloads")
    return add


def test_a_hub_model_follows_its_revision(hub):
    main, tuned = hub("main", b"base"), hub("tuned", b"tuned")
    assert weights_hash("org/name") == weights_hash("org/name", "main") == weights_hash(str(main)) != ""
    assert weights_hash("org/name", "tuned") == weights_hash(str(tuned)) != weights_hash("org/name")
    assert weights_hash("org/name", tuned.name) == weights_hash(str(tuned))
    assert weights_hash("org/name", "absent") == ""


def test_a_hub_model_follows_the_download_dir(hub):
    """As SGLang's loader does: what was downloaded there is served, else what the hub's own cache has."""
    own = hub("main", b"cached")
    there = hub("main", b"downloaded", cache="downloads")
    hub("tuned", None, cache="downloads")  # a config alone
    tuned = hub("tuned", b"tuned")
    assert weights_hash("org/name", None, hub.downloads) == weights_hash(str(there)) != weights_hash(str(own))
    assert weights_hash("org/name") == weights_hash(str(own))
    assert weights_hash("org/name", "tuned", hub.downloads) == weights_hash(str(tuned)) != ""


def test_blobs_are_known_by_their_names(hub, bytes_read):
    snapshot = hub("main", bytes(3 * MIB))
    before = weights_hash("org/name")
    assert bytes_read == []
    (blob,) = (snapshot.parents[1] / "blobs").iterdir()
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to(blob)  # not relative
    assert weights_hash("org/name") == before
    other = hub("other", bytes(3 * MIB - 1) + b"\1")
    assert weights_hash(str(other)) != before


def test_links_to_other_files_are_read(tmp_path):
    (tmp_path / "blobs").mkdir()
    (tmp_path / "model").mkdir()
    (tmp_path / "blobs" / "shared.bin").write_bytes(b"one")
    (tmp_path / "model" / "model.bin").symlink_to(tmp_path / "blobs" / "shared.bin")
    before = weights_hash(str(tmp_path / "model"))
    (tmp_path / "blobs" / "shared.bin").write_bytes(b"two")
    assert weights_hash(str(tmp_path / "model")) != before
