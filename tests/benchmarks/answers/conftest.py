"""A tokenizer, a model folder and a stand-in server for every test of the answers: no weights are needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ..stand_in import JsonServer

TEMPLATE = (
    "{% if tools %}<|tools|>{% endif %}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "<|assistant|>"
)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte a token, and a chat template that knows tools."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    raw.add_special_tokens(["<|tools|>", "<|user|>", "<|assistant|>", "<|end|>"])
    return PreTrainedTokenizerFast(tokenizer_object=raw, chat_template=TEMPLATE, eos_token="<|end|>")


@pytest.fixture(scope="session")
def model(tokenizer, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return str(folder)


class Fake(JsonServer):
    """Answers like a server of SGLang. say: text after a prompt's text. call: message of a chat request's body.

    Its reading finds the token at place i of what it reads ``behind(i)`` nats behind the best one.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        super().__init__()
        self.tokenizer = tokenizer
        self.say: Callable[[str], str] = lambda text: "A fine answer. "
        self.call: Callable[[dict], dict] = lambda body: {"content": "{}"}
        self.behind: Callable[[int], float] = lambda i: 0.0

    def reply(self, path: str, body: dict) -> dict:
        if path == "/v1/chat/completions":
            usage = {"prompt_tokens": 7, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 2}}
            return {"choices": [{"message": self.call(body), "finish_reason": "stop"}], "usage": usage}
        ids, start = body["input_ids"], body.get("logprob_start_len")
        meta = {"prompt_tokens": len(ids), "cached_tokens": 0, "completion_tokens": 1}
        if start is not None:
            places = range(start, len(ids))
            chosen = [[None if i == start else -2.0 - self.behind(i - start - 1), ids[i], None] for i in places]
            best = [None if i == start else [[-2.0, 0, None]] for i in places]
            return {"text": "", "meta_info": {**meta, "input_token_logprobs": chosen, "input_top_logprobs": best}}
        sampling = body["sampling_params"]
        new, said = sampling["max_new_tokens"], self.say(self.tokenizer.decode(ids))
        out = self.tokenizer(said)["input_ids"]
        if sampling["ignore_eos"]:
            out = out * (new // len(out) + 1)
        finish = "length" if len(out) >= new else "stop"
        out = out[:new]
        tokens = [[-0.5, token, None] for token in out]
        meta |= {"completion_tokens": len(out), "finish_reason": {"type": finish}, "output_token_logprobs": tokens}
        return {"text": self.tokenizer.decode(out), "meta_info": meta}


@pytest.fixture
def fake(tokenizer) -> Iterator[Fake]:
    server = Fake(tokenizer)
    yield server
    server.stop()
