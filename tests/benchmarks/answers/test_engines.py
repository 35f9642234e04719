"""Engines: the transformers one against the model, the served one against the stand-in's words."""

from __future__ import annotations

import pytest
import torch

from benchmarks.answers.engines import Local, Served
from benchmarks.launch import ServerError

from ..stand_in import tiny_llama_of


@pytest.fixture(scope="module")
def llama(tokenizer):
    return tiny_llama_of(tokenizer, eos_token_id=None).eval()


def test_local_writes_what_the_model_generates_and_reads_it_as_its_best(llama, tokenizer):
    engine, ids = Local(llama, tokenizer), [5, 9, 33]
    reply = engine.write(ids, 12, 60, stop=False)
    expected = llama.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)[0, 3:].tolist()
    assert list(reply.ids) == expected and reply.text == tokenizer.decode(expected)
    assert (reply.prompt_tokens, reply.completion_tokens, reply.finish) == (3, 12, "length")
    with torch.no_grad():
        logprobs = llama(torch.tensor([ids + expected])).logits[0].log_softmax(-1)
    own = [float(logprobs[2 + i, token]) for i, token in enumerate(expected)]
    assert list(reply.logprobs) == pytest.approx(own, abs=1e-4)
    assert max(engine.read(ids + expected, 3, 60).behind) < 1e-4

    changed = [*expected[:4], (expected[4] + 1) % len(tokenizer), *expected[5:]]
    behind = engine.read(ids + changed, 3, 60).behind
    wanted = float(logprobs[6].max() - logprobs[6, changed[4]])
    assert len(behind) == 12 and behind[4] == pytest.approx(wanted, abs=1e-4) and max(behind[:4]) < 1e-4


def test_local_stops_at_the_end_of_text_unless_told_not_to(llama, tokenizer):
    engine, ids = Local(llama, tokenizer), [5, 9, 33]
    free = engine.write(ids, 12, 60, stop=False)
    end = free.ids[3]
    llama.generation_config.eos_token_id = end
    try:
        stopped, ignored = engine.write(ids, 12, 60), engine.write(ids, 12, 60, stop=False)
    finally:
        llama.generation_config.eos_token_id = None
    assert list(stopped.ids) == list(free.ids[: free.ids.index(end) + 1]) and stopped.finish == "stop"
    assert list(ignored.ids) == list(free.ids) and ignored.finish == "length"


def test_served_reads_every_token_after_the_start(fake):
    fake.behind = lambda i: 0.25 * i
    engine = Served(fake.url + "/")
    assert list(engine.read([1, 2, 3, 4, 5], 2, 60).behind) == [0.0, 0.25, 0.5]
    body = fake.requests[-1][1]
    assert body["logprob_start_len"] == 1 and body["top_logprobs_num"] == 1


def test_served_answers_greedily(fake, tokenizer):
    engine = Served(fake.url)
    reply = engine.write([1, 2], 40, 60, stop=False)
    assert len(reply.ids) == len(reply.logprobs) == 40 and reply.finish == "length"
    assert engine.write([1, 2], 40, 60).text == "A fine answer. "
    assert all(body["sampling_params"]["temperature"] == 0 for _, body in fake.requests)
    message, reply = engine.chat({"messages": []}, 60)
    assert message == {"content": "{}"} and (reply.prompt_tokens, reply.cached_tokens) == (7, 2)
    assert fake.requests[-1][1]["temperature"] == 0 and fake.requests[-1][1]["repetition_penalty"] == 1.0


def test_served_refuses_what_is_no_answer(fake):
    engine = Served(fake.url)
    fake.status = 500
    with pytest.raises(ServerError, match="/generate answered 500"):
        engine.write([1], 4, 60)
    fake.status = 200
    fake.reply = lambda path, body: {
        "meta_info": {"input_token_logprobs": [[-1.0, 9, None]], "input_top_logprobs": [[[-1.0, 9, None]]]}
    }
    with pytest.raises(ServerError, match="not those of the last 1 tokens"):
        engine.read([1, 2], 1, 60)
