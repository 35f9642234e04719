"""A tokenizer for the tiny model, and a lab that has it."""

from __future__ import annotations

import pytest

from benchmarks.fidelity import lab, run


class Characters:
    """A tokenizer of 97 tokens."""

    @classmethod
    def from_pretrained(cls, path):
        return cls()

    def encode(self, text, add_special_tokens=True):
        return [ord(c) % 97 for c in text]


def make_lab(subject: run.Subject, limit: int = 64, queries: int = 4) -> lab.Lab:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lab, "AutoTokenizer", Characters)
        return lab.Lab(subject, "tiny", queries=queries, limit=limit)
