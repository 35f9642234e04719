"""Calibration text: where it comes from, how it becomes token sequences, how it is named."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from .files import file_problem

DEFAULT_TOKENS = 2048
MIN_TOKENS = 2048
MAX_SEQUENCE = 2048  # tokens; longer sequences only cost memory, the moments hold at every position
MIN_SEQUENCE = 64
HELD_OUT_LEAST = 128

TEXT_OPTION = "--kv-quant-calibration-text"
TOKENS_OPTION = "--kv-quant-calibration-tokens"


class TextError(ValueError):
    """Calibration text that cannot be used; the message says why and what would work."""


def read_text(path: str | None, option: str = TEXT_OPTION) -> str:
    """The calibration text: a UTF-8 file, or by default CPython's own documentation.

    The default is ``pydoc_data.topics`` in alphabetical order of topics. It comes with every
    full Python, so a server can calibrate without network; it may differ between Python versions.
    option: what the user gave the path with. Raises TextError if it is no regular file, unreadable, blank or not UTF-8.
    """
    if path is None:
        try:
            from pydoc_data.topics import topics
        except ImportError as e:
            raise TextError(
                f"{option} is not set and this Python has no pydoc_data (the default text): "
                f"name a UTF-8 text file with {option}"
            ) from e
        return "\n\n".join(topics[name] for name in sorted(topics))
    if problem := file_problem(path):
        raise TextError(f"{option} {path}: {problem}; name a UTF-8 text file")
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        raise TextError(f"{option} {path}: not UTF-8 (byte {e.start}); convert it or name another file") from e
    except OSError as e:
        raise TextError(f"{option} {path}: cannot be read ({e.strerror}); name a UTF-8 text file") from e
    if not text.strip():
        raise TextError(f"{option} {path}: the file is blank; name a text of {MIN_TOKENS} tokens or more")
    return text


def check_tokens(tokens: int) -> None:
    """TextError unless ``tokens`` is a whole number, at least MIN_TOKENS."""
    if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < MIN_TOKENS:
        raise TextError(f"{TOKENS_OPTION} {tokens}: a whole number of tokens, {MIN_TOKENS} or more, is needed")


def check_text_size(tokens: int, path: str | None) -> None:
    """TextError if the text of :func:`read_text` has too few bytes for ``tokens`` tokens of any model.

    A token takes at least one byte, all but the special ids that a sequence starts with, of which four in MIN_SEQUENCE
    are allowed for. A file is not read for it.
    """
    size = len(read_text(None).encode()) if path is None else os.path.getsize(path)
    if tokens - tokens // (MIN_SEQUENCE // 4) > size:
        name = "the built-in text" if path is None else path
        fewer = f"ask for about {size // 4}, or " if size // 4 >= MIN_TOKENS else ""
        raise TextError(
            f"{TOKENS_OPTION} {tokens}: {name} has {size} bytes, and a token takes one or more; "
            f"{fewer}name a longer text with {TEXT_OPTION}"
        )


def _encode(tokenizer, text: str, wanted: int) -> list[int]:
    """At least ``wanted`` ids of the start of the text, or all it has. A long text is not tokenized whole."""
    chars = max(8 * wanted, 4096)
    while True:
        ids = list(tokenizer.encode(text[:chars], add_special_tokens=False))
        # The ids next to the cut may change with what follows it; MIN_SEQUENCE is far more than that reaches.
        if chars >= len(text) or len(ids) >= wanted + MIN_SEQUENCE:
            return ids
        chars *= 2


def _prefix(tokenizer) -> list[int]:
    """The special ids this tokenizer puts before a text, such as BOS: every sequence starts as a prompt does."""
    bare = list(tokenizer.encode("a", add_special_tokens=False))
    full = list(tokenizer.encode("a"))
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return full[:start]
    return []


def token_sequences(tokenizer, text: str, tokens: int, max_length: int) -> list[list[int]]:
    """Exactly ``tokens`` ids, in sequences of equal length (within one) that fit ``max_length``.

    tokenizer: a transformers tokenizer. max_length: the model's context length. Sequences are at
    most MAX_SEQUENCE long, and each starts with the special ids a prompt starts with, which count.
    Raises TextError if ``tokens`` is too small or the text has too few.
    """
    check_tokens(tokens)
    if max_length < MIN_SEQUENCE:
        raise TextError(f"context length {max_length}: calibration needs sequences of {MIN_SEQUENCE} tokens or more")
    prefix = _prefix(tokenizer)
    count = -(-tokens // min(max_length, MAX_SEQUENCE))
    wanted = tokens - count * len(prefix)
    ids = _encode(tokenizer, text, wanted)
    if len(ids) < wanted:
        most = len(ids) + count * len(prefix)
        remedy = f"a longer text with {TEXT_OPTION}"
        if most >= MIN_TOKENS:
            remedy = f"{TOKENS_OPTION} {most} at most, or {remedy}"
        raise TextError(f"{TOKENS_OPTION} {tokens}: the calibration text has only {most} tokens; use {remedy}")
    sequences, start = [], 0
    for i in range(count):
        length = tokens // count + (i < tokens % count) - len(prefix)
        sequences.append(prefix + ids[start : start + length])
        start += length
    return sequences


def held_out(tokenizer, text: str, tokens: int, count: int) -> list[int]:
    """``count`` ids of the text behind the ``tokens`` of :func:`token_sequences`, as a prompt, to measure on.

    Fewer where the text ends, and none where fewer than HELD_OUT_LEAST are left.
    """
    prefix = _prefix(tokenizer)
    ids = _encode(tokenizer, text, tokens + count)[tokens : tokens + count - len(prefix)]
    return prefix + ids if len(prefix) + len(ids) >= HELD_OUT_LEAST else []


def text_hash(sequences: Sequence[Sequence[int]]) -> str:
    """sha256 (hex) over the token ids and where they are cut."""
    digest = hashlib.sha256()
    for sequence in sequences:
        digest.update(len(sequence).to_bytes(8, "little"))
        for token in sequence:
            digest.update(int(token).to_bytes(8, "little"))
    return digest.hexdigest()
