"""A fingerprint of a model's weights: which files they are, by little reading and without the network."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
PIECE = 64 << 10  # bytes read in one place
BUDGET = 64 << 20  # bytes read of all files together; more only where there are more than 5,000 tensors
MIN_PIECE = 4 << 10

_CONTENT_HASH = re.compile("[0-9a-f]{40}|[0-9a-f]{64}")

Span = tuple[int, int]  # first byte in the file, bytes


def _files(folder: Path) -> list[Path]:
    return sorted(f for f in folder.iterdir() if f.suffix in WEIGHT_SUFFIXES and f.is_file())


def _snapshot(model_path: str, revision: str | None, download_dir: str | None) -> Path | None:
    """Folder of a hub model's weights in the local cache, looked for where SGLang's loader does: first download_dir."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    for cache in (download_dir, None) if download_dir else (None,):
        try:
            folder = snapshot_download(model_path, revision=revision, cache_dir=cache, local_files_only=True)
        except (OSError, HFValidationError):  # LocalEntryNotFoundError is an OSError
            continue
        if _files(Path(folder)):
            return Path(folder)
    return None


def _blob(file: Path) -> str | None:
    """The content hash that names what a file of a hub snapshot is a link to; None for any other file."""
    target = Path(os.readlink(file)) if file.is_symlink() else Path()
    return target.name if target.parent.name == "blobs" and _CONTENT_HASH.fullmatch(target.name) else None


def _tensors(file: Path) -> tuple[bytes, list[Span]] | None:
    """Header and tensors of a safetensors file; None for another or a damaged one."""
    size = file.stat().st_size
    with open(file, "rb") as f:
        length = int.from_bytes(f.read(8), "little")
        if not 0 < length <= size - 8:
            return None
        header = f.read(length)
    try:
        ends = [entry["data_offsets"] for name, entry in json.loads(header).items() if name != "__metadata__"]
        return header, [(8 + length + start, stop - start) for start, stop in ends]
    except (ValueError, TypeError, KeyError, AttributeError):
        return None


def _of_tensor(span: Span, piece: int) -> Iterator[Span]:
    """Its beginning, middle and end."""
    start, size = span
    if size <= 3 * piece:
        yield span
    else:
        yield from ((start + at, piece) for at in (0, (size - piece) // 2, size - piece))


def _of_file(size: int, stride: int) -> Iterator[Span]:
    """Its first and last MiB, and a piece at each stride."""
    yield 0, 1 << 20
    yield max(size - (1 << 20), 0), 1 << 20
    yield from ((at, PIECE) for at in range(0, size, stride))


def weights_hash(model_path: str, revision: str | None = None, download_dir: str | None = None) -> str:
    """sha256 (hex) that tells the weights of a model from others, ``""`` if there are none to see.

    model_path: a folder, one file (GGUF), or a hub id, whose snapshot of ``revision`` (None: main) is looked for in
    ``download_dir``, then in the hub's own cache. A snapshot's files are links to blobs that are named by a hash of
    their contents: those names are taken, and nothing is read. Of other safetensors files the header and three places
    of every tensor count, so that a change of one projection shows; of other formats both ends and a thousand places
    between them. A fingerprint, not a checksum: 16 GB take a fraction of a second.
    """
    path = Path(model_path)
    if not path.exists():
        snapshot = _snapshot(model_path, revision, download_dir)
        if snapshot is None:
            return ""
        path = snapshot
    files = [path] if path.is_file() else _files(path)
    if not files:
        return ""
    blobs = {file: _blob(file) for file in files}
    sizes = {file: file.stat().st_size for file in files}
    parsed = {f: _tensors(f) for f in files if blobs[f] is None and f.suffix == ".safetensors"}
    count = sum(len(tensors[1]) for tensors in parsed.values() if tensors)
    piece = max(MIN_PIECE, min(PIECE, BUDGET // (3 * max(count, 1))))
    stride = max(PIECE, sum(sizes.values()) * PIECE // BUDGET)
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name} {sizes[file]} {blobs[file] or ''}\n".encode())
        if blobs[file]:
            continue
        spans = _of_file(sizes[file], stride)
        if tensors := parsed.get(file):
            digest.update(tensors[0])
            spans = (part for span in tensors[1] for part in _of_tensor(span, piece))
        with open(file, "rb") as f:
            for start, length in spans:
                digest.update(os.pread(f.fileno(), length, start))
    return digest.hexdigest()
