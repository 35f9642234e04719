"""The CUDA backend inside the real server, on the CPU: what its kernels answer is what the PyTorch backend answers.

Two layers, in float32: enough for answers to depend on every row that is read, and few enough for Triton's interpreter;
those of the small real model, and random ones of which one has a window, with capped logits. Pages of means are so
short that prompts and steps cross from one to the next.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytestmark = pytest.mark.server

PLUGIN, DRAFTS = (Path(__file__).parent / name for name in ("interpreted", "drafts_on_cpu"))
PAGE, PROMPT, HIT, CHUNK, NEW = 64, 84, 70, 32, 5
#: nats. Measured: 1e-4, and 6e-4 where a code turned. With the slots of an earlier step the tokens are other ones.
LIMIT = 5e-3
#: nats that a token may be less likely than the best, when all is read as one prompt. Measured: 0.016.
TIE = 0.1


@pytest.fixture(scope="module", params=["real", "window"])
def two_layers(request, smollm2, tmp_path_factory) -> str:
    if request.param == "window":
        return request.getfixturevalue("gemma2")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = str(tmp_path_factory.mktemp("model") / "two-layers")
    model = AutoModelForCausalLM.from_pretrained(smollm2)
    model.model.layers = model.model.layers[:2]
    model.config.num_hidden_layers = 2
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(smollm2).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def table(two_layers, tmp_path_factory) -> str:
    """Of eight bits: a batch of another size rounds otherwise, and a code on a threshold turns, which then is little.

    Its cost is said to be known, so that no server measures it in the interpreter.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from sglang_blockgtq.calibrate.build import build_table
    from sglang_blockgtq.calibrate.hf import collect
    from sglang_blockgtq.calibrate.model import config_hash, rope_blocks
    from sglang_blockgtq.calibrate.quality import Quality
    from sglang_blockgtq.calibrate.text import read_text, token_sequences

    model = AutoModelForCausalLM.from_pretrained(two_layers, dtype="float32").eval()
    sequences = token_sequences(AutoTokenizer.from_pretrained(two_layers), read_text(None), 2048, 2048)
    rope = rope_blocks(model.config)
    names = {"config_hash": config_hash(model.config), "page": PAGE}
    made = build_table(collect(model, sequences, rope, progress=False), rope, k_bits=8, v_bits=8, **names)
    assert made.header.page == PAGE and made.tensors["mean"].any(-1).any(-1).all()
    path = tmp_path_factory.mktemp("table") / "table.safetensors"
    made.with_quality(Quality(0.0, 0.0, 0, 0.0, 1)).save(path)
    return str(path)


def answers(server, ids) -> dict[str, list[tuple[int, float]]]:
    """Tokens and their log-probabilities: a prompt in chunks, the same on its cached beginning, and three requests of
    different lengths that decode side by side."""

    def step_by_step(prompt):
        meta = server.generate(prompt, max_new_tokens=NEW, logprob_start=len(prompt) - 1)["meta_info"]
        return [(token, lp) for lp, token, *_ in meta["output_token_logprobs"]]

    def read(prompt, start):
        logprobs, cached = server.logprobs(prompt, start)
        return list(zip(prompt[start + 1 :], logprobs, strict=True)), cached

    out = {"cold": read(ids[:PROMPT], 0)[0]}
    server.flush()
    server.generate(ids[:HIT])
    out["hit"], cached = read(ids[:PROMPT], HIT)
    assert cached == HIT
    server.flush()
    prompts = ids[:PROMPT], ids[100:111], ids[30 : 30 + PAGE - 2]
    for prompt in prompts:
        server.generate(prompt)  # read one by one: how prompts in one batch are cut depends on when they arrive
    with ThreadPoolExecutor(len(prompts)) as threads:
        for prompt, found in zip(prompts, threads.map(step_by_step, prompts), strict=True):
            out[f"steps after {len(prompt)}"] = found
    return out


def test_kernels_answer_like_pytorch(launch, two_layers, table, token_ids):
    args = "--dtype=float32", "--max-total-tokens=600", f"--chunked-prefill-size={CHUNK}", "--max-running-requests=4"
    args += (f"--kv-quant-table={table}",)
    plain = launch(*args, model=two_layers)
    want = answers(plain, token_ids)
    plain.stop()
    interpreted = launch(*args, model=two_layers, env={"TRITON_INTERPRET": "1", "PYTHONPATH": str(PLUGIN)})
    got = answers(interpreted, token_ids)
    interpreted.stop()
    check(got, want)
    if "gemma" in two_layers:
        return
    # Drafts that are found in the text change nothing: rows of rejected ones are written over, accepted ones moved.
    drafts = "--speculative-algorithm=NGRAM", "--speculative-num-draft-tokens=6"
    env = {"TRITON_INTERPRET": "1", "PYTHONPATH": f"{PLUGIN}:{DRAFTS}"}
    drafting = launch(*args, *drafts, model=two_layers, env=env)
    check(answers(drafting, token_ids), want)
    prompt = token_ids[:12] * 3
    meta = drafting.generate(prompt, max_new_tokens=4 * NEW, logprob_start=len(prompt) - 1)["meta_info"]
    assert meta["spec_verify_ct"] < meta["completion_tokens"] == 4 * NEW
    answer = [token for _, token, *_ in meta["output_token_logprobs"]]
    drafting.flush()
    assert max(drafting.behind_best(prompt, answer)) < TIE
    drafting.stop()


def check(got, want) -> None:
    assert len(want) == 5 and all(len(found) >= NEW for found in want.values())
    for name, expected in want.items():
        assert [token for token, _ in got[name]] == [token for token, _ in expected], name
        apart = max(abs(a - b) for (_, a), (_, b) in zip(got[name], expected, strict=True))
        assert apart < LIMIT, (name, apart)
