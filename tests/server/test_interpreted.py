"""The CUDA backend inside the real server, on the CPU: what its kernels answer is what the PyTorch backend answers.

Two layers, in float32: enough for answers to depend on every row that is read, and few enough for Triton's interpreter;
those of the small real model, and random ones of which one has a window, with capped logits. Pages of means are so
short that prompts and steps cross from one to the next.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from sglang_blockgtq.calibrate import RECENT

pytestmark = pytest.mark.server

PLUGIN, DRAFTS = (Path(__file__).parent / name for name in ("interpreted", "drafts_on_cpu"))
PAGE, PROMPT, HIT, CHUNK, NEW = 64, 84, 70, 32, 5
#: nats. Measured: 1e-4, and 6e-4 where a code turned. With the slots of an earlier step the tokens are other ones.
LIMIT = 5e-3
ARGS = "--dtype=float32", "--max-total-tokens=600", f"--chunked-prefill-size={CHUNK}", "--max-running-requests=4"
#: nats that a token may be less likely than the best, when all is read as one prompt. Measured: 0.016.
TIE = 0.1


def cut_to_two_layers(smollm2: str, folder: Path) -> str:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(smollm2)
    model.model.layers = model.model.layers[:2]
    model.config.num_hidden_layers = 2
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(smollm2).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module", params=["real", "window"])
def two_layers(request, smollm2, tmp_path_factory) -> str:
    if request.param == "window":
        return request.getfixturevalue("gemma2")
    return cut_to_two_layers(smollm2, tmp_path_factory.mktemp("model") / "two-layers")


def table_for(model_folder: str, folder: Path, recent: int = RECENT, bits: int = 8) -> str:
    """Of eight bits by default: a batch of another size rounds otherwise, and a code on a threshold turns, which then
    is little.

    Its cost is said to be known, with as many exact tokens as its server has, so that none measures it in the
    interpreter.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from sglang_blockgtq.calibrate.build import build_table
    from sglang_blockgtq.calibrate.hf import collect
    from sglang_blockgtq.calibrate.model import config_hash, rope_blocks
    from sglang_blockgtq.calibrate.quality import Quality
    from sglang_blockgtq.calibrate.text import read_text, token_sequences

    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype="float32").eval()
    sequences = token_sequences(AutoTokenizer.from_pretrained(model_folder), read_text(None), 2048, 2048)
    rope = rope_blocks(model.config)
    names = {"config_hash": config_hash(model.config), "page": PAGE}
    made = build_table(collect(model, sequences, rope, progress=False), rope, k_bits=bits, v_bits=bits, **names)
    assert made.header.page == PAGE and made.tensors["mean"].any(-1).any(-1).all()
    path = folder / "table.safetensors"
    made.with_quality(Quality(0.0, 0.0, 0, 0.0, 1, recent)).save(path)
    return str(path)


@pytest.fixture(scope="module")
def table(two_layers, tmp_path_factory) -> str:
    recent = 0 if "gemma" in two_layers else RECENT  # none beside a window
    return table_for(two_layers, tmp_path_factory.mktemp("table"), recent)


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


def test_kernels_answer_like_pytorch(launch, two_layers, table, token_ids, tmp_path):
    args = *ARGS, f"--kv-quant-table={table}"
    plain = launch(*args, model=two_layers)
    want = answers(plain, token_ids)
    plain.stop()
    interpreted = launch(*args, model=two_layers, env={"TRITON_INTERPRET": "1", "PYTHONPATH": str(PLUGIN)})
    got = answers(interpreted, token_ids)
    interpreted.stop()
    check(got, want)
    turned_by = "the model" if "gemma" in two_layers else "attention"
    assert f"interpreted: RoPE by {turned_by}" in interpreted.log.read_text(errors="replace")
    if "gemma" in two_layers:
        return
    # Drafts that are found in the text change nothing: rows of rejected ones are written over, accepted ones moved.
    # Nor do checksums differ, which go with them.
    drafts = "--speculative-algorithm=NGRAM", "--speculative-num-draft-tokens=6", "--kv-quant-check-rows=8"
    env = {"TRITON_INTERPRET": "1", "PYTHONPATH": f"{PLUGIN}:{DRAFTS}"}
    args = *ARGS, "--kv-quant-exact-recent=0", f"--kv-quant-table={table_for(two_layers, tmp_path, 0)}"
    packed = launch(*args, model=two_layers)
    want = answers(packed, token_ids)
    packed.stop()
    drafting = launch(*args, *drafts, model=two_layers, env=env)
    check(answers(drafting, token_ids), want)
    check_drafts(drafting, token_ids)
    drafting.flush()
    assert "rows of each layer compared: all are as written" in drafting.log.read_text(errors="replace")
    drafting.stop()


CHAIN = "--speculative-num-steps=3", "--speculative-eagle-topk=1", "--speculative-num-draft-tokens=4"
TREE = "--speculative-num-steps=3", "--speculative-eagle-topk=2", "--speculative-num-draft-tokens=6"


@pytest.mark.parametrize(
    "algorithm, shape",
    [
        ("NEXTN", TREE),
        pytest.param("EAGLE3", CHAIN, marks=pytest.mark.long),
        pytest.param("STANDALONE", TREE, marks=pytest.mark.long),
        pytest.param("EAGLE", CHAIN, marks=pytest.mark.long),
    ],
    ids=lambda x: x if isinstance(x, str) else "chain" if x is CHAIN else "tree",
)
def test_drafts_of_a_model_change_nothing(launch, smollm2, token_ids, tmp_path, algorithm, shape):
    target, draft = cut_to_two_layers(smollm2, tmp_path / "target"), tmp_path / "draft"
    args = [*ARGS, *shape, f"--speculative-algorithm={algorithm}", "--disable-cuda-graph"]
    if algorithm == "STANDALONE":
        args.append(f"--speculative-draft-model-path={target}")
    elif algorithm == "NEXTN":
        add_mtp_head(target)  # the checkpoint is its own draft
    else:
        draft.mkdir()
        {"EAGLE": save_eagle_head, "EAGLE3": save_eagle3_head}[algorithm](target, draft)
        args.append(f"--speculative-draft-model-path={draft}")
    args.append(f"--kv-quant-table={table_for(target, tmp_path, RECENT if shape is CHAIN else 0)}")
    server = launch(*args, model=target, env={"TRITON_INTERPRET": "1", "PYTHONPATH": f"{PLUGIN}:{DRAFTS}"})
    check_drafts(server, token_ids)
    server.stop()


def test_chains_read_their_last_tokens_exactly(launch, smollm2, token_ids, tmp_path):
    """Two bits, and more exact tokens than a request has: log-probabilities are those of transformers, whatever was
    accepted or rejected before. Of a longer one they are not."""
    from transformers import AutoModelForCausalLM

    target, draft = cut_to_two_layers(smollm2, tmp_path / "target"), tmp_path / "draft"
    draft.mkdir()
    save_eagle_head(target, draft)
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    args = *ARGS, *CHAIN, "--speculative-algorithm=EAGLE", f"--speculative-draft-model-path={draft}"
    env = {"TRITON_INTERPRET": "1", "PYTHONPATH": f"{PLUGIN}:{DRAFTS}"}
    own = "--kv-quant-exact-recent=60", f"--kv-quant-table={table_for(target, tmp_path, 60, 2)}"
    server = launch(*args, *own, "--disable-cuda-graph", model=target, env=env)

    def gap(prompt: list[int]) -> tuple[float, int]:
        worst, meta = server.off(model, prompt, 30)
        return worst, meta["spec_verify_ct"]

    with ThreadPoolExecutor(2) as pool:  # together less than a chunk
        gaps, steps = zip(*pool.map(gap, (token_ids[:8] * 2, token_ids[40:49])), strict=True)
    assert max(gaps) < 2e-3 and gap(token_ids[100:190])[0] > 0.01
    assert 30 / 4 < min(steps) < 30, "some drafts are accepted, some are not"
    server.stop()


def check_drafts(server, ids) -> None:
    """Some are accepted, and what comes of it is what the model would say token by token."""
    prompt = ids[:12] * 3
    meta = server.generate(prompt, max_new_tokens=4 * NEW, logprob_start=len(prompt) - 1)["meta_info"]
    assert meta["spec_verify_ct"] < meta["completion_tokens"] == 4 * NEW
    answer = [token for _, token, *_ in meta["output_token_logprobs"]]
    server.flush()
    assert max(server.behind_best(prompt, answer)) < TIE


def random_layer(config: dict, prefix: str, wide: int = 1) -> dict[str, torch.Tensor]:
    """A decoder layer's, small: what comes in goes out nearly as it was. wide: hidden vectors that attention reads."""
    torch.manual_seed(0)
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    kv = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    shapes = {"self_attn.q_proj": (hidden, wide * hidden), "self_attn.o_proj": (hidden, hidden)}
    shapes |= {f"self_attn.{name}_proj": (kv, wide * hidden) for name in "kv"}
    shapes |= {f"mlp.{name}_proj": (inner, hidden) for name in ("gate", "up")} | {"mlp.down_proj": (hidden, inner)}
    out = {f"{prefix}{name}.weight": 0.01 * torch.randn(shape) for name, shape in shapes.items()}
    norms = "input_layernorm", "post_attention_layernorm"
    return out | {f"{prefix}{name}.weight": torch.ones(hidden) for name in norms}


def save(folder: str | Path, config: dict, tensors: dict[str, torch.Tensor]) -> None:
    from safetensors.torch import save_file

    save_file(tensors, Path(folder) / "model.safetensors", metadata={"format": "pt"})
    (Path(folder) / "config.json").write_text(json.dumps(config))


def config_of(target: str) -> dict:
    return json.loads((Path(target) / "config.json").read_text())


def save_eagle_head(target: str, folder: Path) -> None:
    """Random but for one thing: it guesses that the last token comes again, which the target's two layers do a lot."""
    config = config_of(target)
    hidden = config["hidden_size"]
    tensors = random_layer(config, "layers.0.") | {
        "fc.weight": torch.cat((torch.eye(hidden), 0.01 * torch.randn(hidden, hidden)), 1),
        "fc.bias": torch.zeros(hidden),
    }
    del tensors["layers.0.input_layernorm.weight"]  # it has none
    config |= {"architectures": ["LlamaForCausalLMEagle"], "num_hidden_layers": 1, "tie_word_embeddings": False}
    save(folder, config, tensors)


def save_eagle3_head(target: str, folder: Path) -> None:
    """Random, over the embedding and the first layer's output, with a vocabulary of its own: of 16 tokens that the
    target says next in any place of a text."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    text = AutoTokenizer.from_pretrained(target)(
        "It was a bright cold day in April, and the clocks.", return_tensors="pt"
    )
    made = AutoModelForCausalLM.from_pretrained(target).generate(**text, max_new_tokens=40, do_sample=False)
    likely = sorted(set(made[0].tolist()))[:16]
    config = config_of(target)
    hidden = config["hidden_size"]
    tensors = random_layer(config, "midlayer.", wide=2) | {
        "midlayer.hidden_norm.weight": torch.ones(hidden),
        "norm.weight": torch.ones(hidden),
        "fc.weight": 0.01 * torch.randn(hidden, 2 * hidden),
        "lm_head.weight": torch.randn(len(likely), hidden),
        "d2t": torch.tensor(likely) - torch.arange(len(likely)),
    }
    config |= {"architectures": ["LlamaForCausalLMEagle3"], "num_hidden_layers": 1, "tie_word_embeddings": False}
    config |= {"draft_vocab_size": len(likely), "eagle_config": {"eagle_aux_hidden_state_layer_ids": [-1, 0]}}
    save(folder, config, tensors)


def add_mtp_head(target: str) -> None:
    """Make a MiMo of the target, which is a Qwen2 with such heads; random as that of EAGLE."""
    from safetensors.torch import load_file

    tensors, config = load_file(Path(target) / "model.safetensors"), config_of(target)
    hidden, head = config["hidden_size"], "model.mtp_layers.0."
    tensors |= random_layer(config, head) | {
        head + "input_proj.weight": torch.cat((0.01 * torch.randn(hidden, hidden), torch.eye(hidden)), 1),
        **{f"{head}{name}_layernorm.weight": torch.ones(hidden) for name in ("token", "hidden", "final")},
    }
    for name in [name for name in tensors if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight"))]:
        tensors[name.replace("weight", "bias")] = torch.zeros(len(tensors[name]))
    kept = {name: value for name, value in config.items() if name not in ("attention_bias", "mlp_bias", "head_dim")}
    kept |= {"architectures": ["MiMoForCausalLM"], "model_type": "qwen2", "num_nextn_predict_layers": 1}
    save(target, kept, tensors)


def check(got, want) -> None:
    assert len(want) == 5 and all(len(found) >= NEW for found in want.values())
    for name, expected in want.items():
        assert [token for token, _ in got[name]] == [token for token, _ in expected], name
        apart = max(abs(a - b) for (_, a), (_, b) in zip(got[name], expected, strict=True))
        assert apart < LIMIT, (name, apart)
