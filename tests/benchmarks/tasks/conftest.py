"""A tokenizer that every test of the tasks can have: no model is needed."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

TEMPLATE = "{% for m in messages %}<|user|>{{ m['content'] }}<|end|>{% endfor %}<|assistant|>"
#: frequent letters pair up, so that words of one length have different sizes
PAIRS = [(a, b) for a in "Ġetaoinshrdlu" for b in "etaoinshrdlu"]


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte pairs, some 1.6 bytes a token, with a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*alphabet, *(a + b for a, b in PAIRS)])}
    raw = Tokenizer(models.BPE(vocabulary, PAIRS))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    raw.add_special_tokens(["<|user|>", "<|end|>", "<|assistant|>"])
    return PreTrainedTokenizerFast(tokenizer_object=raw, chat_template=TEMPLATE)
