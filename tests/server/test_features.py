"""Engine features over packed rows of eight bits, against transformers without quantization.

LoRA, sessions, priorities with preemption, grammars, the OpenAI client and new weights, on one server.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean

import pytest
import requests
import torch

pytestmark = pytest.mark.server

EIGHT = ("--kv-quant-k-bits=8", "--kv-quant-v-bits=8")
START, LENGTH = 160, 200

# Nats. Another adapter, or other weights, move a log-probability by 0.15 in the mean.
COLD = 1e-3  # a prompt of one chunk reads its own raw keys: float32 noise
WARM = 0.03  # mean gap of a suffix that reads eight bits; 0.006 seen
TIE = 0.1  # how far a greedy token may be below the best of the reference; 0 seen


@pytest.fixture(scope="module")
def base(smollm2):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory) -> Path:
    """A PEFT adapter of rank 8 with random weights for every projection."""
    from safetensors.torch import save_file

    folder, generator = tmp_path_factory.mktemp("adapter"), torch.Generator().manual_seed(0)
    tensors = {}
    for name, module in base.model.layers.named_modules():
        if isinstance(module, torch.nn.Linear):
            key, (out, into) = f"base_model.model.model.layers.{name}.lora_", module.weight.shape
            tensors[key + "A.weight"] = torch.randn(8, into, generator=generator) / into**0.5
            tensors[key + "B.weight"] = torch.randn(out, 8, generator=generator) * 0.02
    save_file(tensors, folder / "adapter_model.safetensors")
    targets = sorted({key.split(".")[-3] for key in tensors})
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": targets, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def merged(smollm2, adapter):
    """The model with the adapter in its weights."""
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    tensors = load_file(adapter / "adapter_model.safetensors")
    with torch.no_grad():
        for key in [key for key in tensors if "lora_A" in key]:
            layer = model.get_submodule(key.removeprefix("base_model.model.").removesuffix(".lora_A.weight"))
            layer.weight += 16 / 8 * tensors[key.replace("lora_A", "lora_B")] @ tensors[key]
    return model


@pytest.fixture(scope="module")
def server(launch, adapter):
    return launch(
        "--dtype=float32", "--max-total-tokens=900", *EIGHT,
        "--enable-lora", "--lora-backend=torch_native", "--lora-paths", f"north={adapter}",
        "--enable-priority-scheduling", "--max-running-requests=2", "--enable-streaming-session",
        record="lora_on_cpu",
    )  # fmt: skip


def gap(found: list[float], model, prompt: list[int]) -> float:
    """Mean |difference of log-probability| from the model's, of the prompt's last tokens."""
    with torch.inference_mode():
        logprobs = model(torch.tensor([prompt])).logits[0, :-1].log_softmax(-1)
    exact = logprobs.gather(1, torch.tensor(prompt)[1:, None])[-len(found) :, 0].tolist()
    return fmean(abs(a - b) for a, b in zip(found, exact, strict=True))


def behind_best(model, prompt: list[int], answer: list[int], grammar=None) -> float:
    """How far the worst token of an answer is below the model's most likely one that ``grammar`` accepts, in nats."""
    with torch.inference_mode():
        logprobs = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    if grammar is not None:
        import xgrammar

        matcher, mask = xgrammar.GrammarMatcher(grammar), xgrammar.allocate_token_bitmask(1, logprobs.shape[1])
        for row, token in zip(logprobs, answer, strict=True):
            matcher.fill_next_token_bitmask(mask)
            xgrammar.apply_token_bitmask_inplace(row[None], mask)
            assert matcher.accept_token(token)
    chosen = logprobs.gather(1, torch.tensor(answer)[:, None])[:, 0]
    return (logprobs.max(-1).values - chosen).max().item()


def test_an_adapter_and_none_never_share_rows(server, token_ids, base, merged):
    prompt = token_ids[:LENGTH]
    for limit, hits in ((COLD, 0), (WARM, START)):
        for model, more in ((base, {}), (merged, {"lora_path": "north"})):
            found, cached = server.logprobs(prompt, START, **more)
            assert cached == hits
            assert gap(found, model, prompt) < limit
    assert gap(found, base, prompt) > 0.1, "the adapter makes no difference"


def test_a_session_branches(server, token_ids, base):
    root = token_ids[300:360]
    session = requests.post(server.url + "/open_session", json={"capacity_of_str_len": 1000}, timeout=60).json()
    first = server.generate(root, 8, session_params={"id": session})
    here = {"id": session, "rid": first["meta_info"]["id"]}
    said = first["output_ids"]
    branches = (
        ({}, root + said, 67),  # the last token of an answer has no row yet
        ({}, root + said, 67),
        ({"drop_previous_output": True}, root, 60),
        ({"offset": 40}, root[:40], 40),
    )
    for i, (params, history, hits) in enumerate(branches):
        new = token_ids[600 + 50 * i :][:20]
        turn = server.generate(new, 8, session_params=here | params)
        assert turn["meta_info"]["prompt_tokens"] == len(history + new)
        assert turn["meta_info"]["cached_tokens"] >= hits
        assert behind_best(base, history + new, turn["output_ids"]) < TIE
    requests.post(server.url + "/close_session", json={"session_id": session}, timeout=60).raise_for_status()


def test_a_streaming_session_goes_on(server, token_ids, base):
    body = {"capacity_of_str_len": 1000, "streaming": True}
    session, history = requests.post(server.url + "/open_session", json=body, timeout=60).json(), []
    for start, hits in ((400, 0), (600, 47), (650, 75)):
        new = token_ids[start:][: 20 if history else 40]
        turn = server.generate(new, 8, session_params={"id": session})
        history += new
        assert (turn["meta_info"]["prompt_tokens"], turn["meta_info"]["cached_tokens"]) == (len(history), hits)
        assert behind_best(base, history, turn["output_ids"]) < TIE
        history += turn["output_ids"]
    requests.post(server.url + "/close_session", json={"session_id": session}, timeout=60).raise_for_status()


def streamed(server, running: threading.Event, body: dict) -> dict:
    """The last piece of a streamed request; sets ``running`` at the first."""
    with requests.post(server.url + "/generate", json=body | {"stream": True}, stream=True, timeout=600) as pieces:
        for line in pieces.iter_lines():
            if line.startswith(b"data: {"):
                running.set()
                last = json.loads(line.removeprefix(b"data: "))
    return last


def test_a_preempted_request_goes_on(server, token_ids, base, merged):
    """Both places are taken when a request of higher priority comes: one of the two gives up its rows."""
    low = [(token_ids[1000:1080], base, {}), (token_ids[1100:1180], merged, {"lora_path": "north"})]
    high, sampling = token_ids[1200:1300], {"max_new_tokens": 24, "temperature": 0, "ignore_eos": True}
    running = [threading.Event() for _ in low]
    with ThreadPoolExecutor(2) as pool:
        bodies = [{"input_ids": p, "sampling_params": sampling, "priority": 0, **more} for p, _, more in low]
        waiting = [pool.submit(streamed, server, *both) for both in zip(running, bodies, strict=True)]
        assert all(event.wait(60) for event in running)
        first = server.generate(high, 4, priority=100)
        assert not all(future.done() for future in waiting)
        last = [future.result() for future in waiting]
    assert first["meta_info"]["num_retractions"] == 0
    assert sorted(answer["meta_info"]["num_retractions"] for answer in last) == [0, 1]
    assert behind_best(base, high, first["output_ids"]) < TIE
    for (prompt, model, _), answer in zip(low, last, strict=True):
        assert len(answer["output_ids"]) == 24
        assert behind_best(model, prompt, answer["output_ids"]) < TIE


SCHEMA = json.dumps({
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "capital_of_the_country": {"enum": ["Paris", "Rome", "Berlin"]},
        "population": {"type": "integer", "minimum": 0, "maximum": 99999999},
    },
    "required": ["name", "capital_of_the_country", "population"],
    "additionalProperties": False,
})  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "text"), [("json_schema", SCHEMA), ("regex", r"It is (Paris|Rome|Berlin), since [0-9]{4}\.")]
)
def test_structured_output(server, smollm2, base, kind, text):
    import xgrammar
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    prompt = tokenizer("Italy, its capital and how many people live there:\n")["input_ids"]
    answer = server.generate(prompt, 80, grammar={kind: text})
    assert answer["meta_info"]["finish_reason"]["type"] == "stop"
    if kind == "json_schema":
        assert json.loads(answer["text"])["capital_of_the_country"]
    info = xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=base.config.vocab_size)
    grammar = getattr(xgrammar.GrammarCompiler(info), f"compile_{kind}")(text)
    assert behind_best(base, prompt, answer["output_ids"], grammar) < TIE


def test_openai_client(server, base, smollm2):
    from transformers import AutoTokenizer

    example = Path(__file__).parents[2] / "examples" / "openai_client.py"
    run = subprocess.run([sys.executable, str(example), "--url", server.url], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    *two, stream, schema = run.stdout.splitlines()
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    prompt, answer = (tokenizer(text)["input_ids"] for text in ("The capital of France is", " Paris."))
    with torch.inference_mode():
        logprobs = base(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    expected = logprobs.gather(1, torch.tensor(answer)[:, None]).sum().item()
    assert len(two) == 2
    for line in two:
        _, text, reason, total = line.split("|")
        assert (text, reason) == (" Paris", "stop")
        assert float(total) == pytest.approx(expected, abs=WARM)
    pieces = stream.split("|")[1:]
    assert len(pieces) > 3 and "Paris" in "".join(pieces)
    assert schema.startswith("schema: {'city': ")


def test_new_weights(server, smollm2, token_ids, base, merged, tmp_path):
    """Last on this server: answers follow the weights, though the table is of the first."""
    merged.save_pretrained(tmp_path)
    prompt = token_ids[:LENGTH]
    server.generate(prompt)
    for path, model in ((tmp_path, merged), (smollm2, base)):
        body = {"model_path": str(path)}
        done = requests.post(server.url + "/update_weights_from_disk", json=body, timeout=600).json()
        assert done["success"], done
        for limit, hits in ((COLD, 0), (WARM, START)):
            found, cached = server.logprobs(prompt, START)
            assert cached == hits
            assert gap(found, model, prompt) < limit
    assert server.log.read_text().count("the allocation table is still that of the weights at start-up") == 2
    server.stop()
