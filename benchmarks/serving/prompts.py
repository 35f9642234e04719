"""What servers are asked before they are loaded, and what random weights are told to answer."""

from __future__ import annotations

from functools import cache
from importlib.resources import files

from ..models import Model
from ..server_steps import TOKEN_IDS, prompt


@cache
def check_prompt(model: Model, tokens: int) -> list[int]:
    """Real weights read English, random ones random tokens. FileNotFoundError where SGLang's text is missing."""
    if model.tokenizer:
        return prompt("check", tokens)
    from transformers import AutoTokenizer

    text = (files("sglang") / "test" / "long_prompt.txt").read_text()
    return AutoTokenizer.from_pretrained(model.path)(text)["input_ids"][:tokens]


@cache
def plain_token(tokenizer: str) -> int:
    """A token whose text is a word."""
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(tokenizer)
    for token in TOKEN_IDS:
        if loaded.decode([token]).strip().isascii() and loaded.decode([token]).strip().isalpha():
            return token
    raise ValueError(f"{tokenizer}: none of the tokens {TOKEN_IDS.start} to {TOKEN_IDS.stop - 1} is a word")
