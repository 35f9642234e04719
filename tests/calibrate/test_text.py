"""Calibration text to token sequences."""

import hashlib
import os

import pytest

from sglang_blockgtq.calibrate.text import (
    HELD_OUT_LEAST,
    MIN_TOKENS,
    TextError,
    check_text_size,
    held_out,
    read_text,
    text_hash,
    token_sequences,
)


class Tokenizer:
    """One token per character, optionally between special ids as BOS and EOS are."""

    def __init__(self, before=(), after=()):
        self.before, self.after, self.longest = list(before), list(after), 0

    def encode(self, text, add_special_tokens=True):
        self.longest = max(self.longest, len(text))
        ids = [ord(c) for c in text]
        return self.before + ids + self.after if add_special_tokens else ids


TEXT = "".join(chr(97 + i % 26) for i in range(9000))


def test_default_text_is_english_and_long_enough():
    text = read_text(None)
    assert len(text) > 100_000
    assert text.count(" the ") > 1000
    assert text == read_text(None)


def test_a_file(tmp_path):
    path = tmp_path / "text"
    path.write_text("naïve ☃\n", encoding="utf-8")
    assert read_text(str(path)) == "naïve ☃\n"


@pytest.mark.parametrize(
    "content, reason",
    [(None, "no such file"), (b"", "blank"), (b" \n\t", "blank"), (b"ok \xff\xfe", r"not UTF-8 \(byte 3\)")],
)
def test_unusable_files(tmp_path, content, reason):
    path = tmp_path / "text"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(TextError, match=f"--kv-quant-calibration-text {path}: .*{reason}"):
        read_text(str(path))


def test_what_is_no_file_is_named(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")  # opened, it would wait for ever
    for path, says in {
        tmp_path: "a folder, not a file",
        tmp_path / "pipe": "a pipe or device, not a regular file",
        os.devnull: "a pipe or device, not a regular file",
        tmp_path / "none" / "deeper": "no such file",
    }.items():
        with pytest.raises(TextError, match=f"--kv-quant-calibration-text {path}: {says}; name a UTF-8 text file"):
            read_text(str(path))
    (tmp_path / "secret").write_text("text")
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(TextError, match="no permission to read it; name a UTF-8 text file"):
        read_text(str(tmp_path / "secret"))


def test_more_tokens_than_a_text_has_bytes(tmp_path):
    size = len(read_text(None).encode())
    with pytest.raises(
        TextError,
        match=f"--kv-quant-calibration-tokens 100000000: the built-in text has {size} bytes, and a token takes one or "
        f"more; ask for about {size // 4}, or name a longer text with --kv-quant-calibration-text",
    ):
        check_text_size(100_000_000, None)
    check_text_size(size, None)
    path = tmp_path / "text"
    path.write_text("é" * 1500)
    with pytest.raises(TextError, match=f"3500: {path} has 3000 bytes, .* or more; name a longer text with"):
        check_text_size(3500, str(path))
    path.write_text("")
    with pytest.raises(TextError, match=f"2048: {path} has 0 bytes"):
        check_text_size(2048, str(path))


@pytest.mark.parametrize("before", [[], [1], [1, 2, 3, 4]])
def test_what_some_tokenizer_makes_of_a_text_is_let_through(tmp_path, before):
    """One token a byte, and special ids before each of the shortest sequences."""
    path, count = tmp_path / "text", 100
    path.write_text("x" * (count * (64 - len(before))))
    check_text_size(64 * count, str(path))
    assert len(token_sequences(Tokenizer(before), read_text(str(path)), 64 * count, 64)) == count


def test_python_without_the_default_text(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pydoc_data.topics", None)
    with pytest.raises(TextError, match="no pydoc_data.*name a UTF-8 text file with --kv-quant-calibration-text"):
        read_text(None)


@pytest.mark.parametrize(
    "tokens, max_length, lengths",
    [
        (2048, 8192, [2048]),
        (2048, 2048, [2048]),
        (2049, 8192, [1025, 1024]),
        (5000, 1024, [1000] * 5),
        (4096, 2047, [1366, 1365, 1365]),
        (2048, 64, [64] * 32),
    ],
)
def test_sequences_are_balanced_and_exact(tokens, max_length, lengths):
    sequences = token_sequences(Tokenizer(), TEXT, tokens, max_length)
    assert [len(s) for s in sequences] == lengths
    assert [i for s in sequences for i in s] == [ord(c) for c in TEXT[:tokens]]


@pytest.mark.parametrize("before, after", [([1], []), ([1], [2]), ([5, 6], []), ([], [2])])
def test_every_sequence_starts_as_a_prompt_does(before, after):
    sequences = token_sequences(Tokenizer(before, after), TEXT, 5000, 1024)
    assert all(s[: len(before)] == before for s in sequences)
    assert [len(s) for s in sequences] == [1000] * 5
    body = [i for s in sequences for i in s[len(before) :]]
    assert body == [ord(c) for c in TEXT[: 5000 - 5 * len(before)]]


@pytest.mark.parametrize("before", [[], [1], [5, 6]])
@pytest.mark.parametrize("tokens, max_length", [(2048, 8192), (5000, 1024)])
def test_held_out_text_is_not_calibrated_on(before, tokens, max_length):
    """It starts as a prompt does, behind whatever the sequences hold, and goes on without a gap within."""
    text = "".join(chr(1000 + i) for i in range(9000))  # every token once
    tokenizer = Tokenizer(before)
    seen = {i for s in token_sequences(tokenizer, text, tokens, max_length) for i in s[len(before) :]}
    ids = held_out(tokenizer, text, tokens, 600)
    assert len(ids) == 600 and ids[: len(before)] == before
    body = ids[len(before) :]
    assert not seen & set(body) and max(seen) < min(body)
    assert body == list(range(1000 + tokens, 1000 + tokens + len(body)))


@pytest.mark.parametrize("before", [[], [1, 2]])
def test_held_out_text_that_ends_early(before):
    def held(more: int) -> list[int]:
        return held_out(Tokenizer(before), TEXT[: 2048 + more], 2048, 600)

    least = HELD_OUT_LEAST - len(before)
    assert len(held(least)) == HELD_OUT_LEAST and len(held(400)) == 400 + len(before) and len(held(9000)) == 600
    assert held(least - 1) == held(0) == held(-100) == []


def test_a_long_text_is_not_tokenized_whole():
    tokenizer = Tokenizer()
    token_sequences(tokenizer, TEXT * 1000, 2048, 2048)
    assert held_out(tokenizer, TEXT * 1000, 2048, 2048)
    assert tokenizer.longest < 50_000


@pytest.mark.parametrize("tokens", [MIN_TOKENS - 1, 0, -5, 2048.0, "2048", True, None])
def test_unusable_token_counts(tokens):
    with pytest.raises(TextError, match=f"--kv-quant-calibration-tokens {tokens}: .*2048 or more"):
        token_sequences(Tokenizer(), TEXT, tokens, 2048)


def test_too_short_a_text_says_how_many_tokens_it_has():
    with pytest.raises(
        TextError, match="tokens 9001: .* only 9000 tokens; use --kv-quant-calibration-tokens 9000 at most"
    ):
        token_sequences(Tokenizer(), TEXT, 9001, 2048)
    with pytest.raises(TextError, match="only 100 tokens; use a longer text with --kv-quant-calibration-text"):
        token_sequences(Tokenizer(), TEXT[:100], 2048, 2048)
    assert len(token_sequences(Tokenizer(), TEXT, 9000, 2048)) == 5


def test_the_count_named_for_a_short_text_works():
    with pytest.raises(TextError, match="only 9005 tokens"):
        token_sequences(Tokenizer([1]), TEXT, 9100, 2048)
    assert sum(map(len, token_sequences(Tokenizer([1]), TEXT, 9005, 2048))) == 9005


def test_too_short_a_context():
    with pytest.raises(TextError, match="context length 63"):
        token_sequences(Tokenizer(), TEXT, 2048, 63)


def test_hash_sees_ids_order_and_cuts():
    hashes = [text_hash(s) for s in ([[1, 2, 3]], [[1, 2], [3]], [[1], [2, 3]], [[3, 2, 1]], [[1, 2, 4]], [[258, 3]])]
    assert len(set(hashes)) == len(hashes)
    expected = hashlib.sha256(b"".join(i.to_bytes(8, "little") for i in (2, 7, 300))).hexdigest()
    assert text_hash([[7, 300]]) == expected
