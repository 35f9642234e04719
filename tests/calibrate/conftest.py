"""Synthetic moments and tiny random models shared by the calibration tests."""

import importlib.util
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from sglang_blockgtq.calibrate.moments import Moments


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Tiny operations: waiting for a second thread costs more than it helps."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def make_moments():
    """Factory of uneven random moments ``[layers, heads, blocks]``.

    bias: share of each block's energy that its keys' mean has, None: no means are known. base: of the frequencies.
    """

    def make(layers=2, heads=2, blocks=32, seed=0, spread=1.5, v_head_dim=None, bias=None, base=1e6):
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape):
            return torch.exp(spread * torch.randn(*shape, generator=generator, dtype=torch.float64))

        v = (v_head_dim or 2 * blocks) * draw(layers, heads)
        moments = Moments(draw(layers, heads, blocks), draw(layers, heads, blocks), v, tokens=2048)
        if bias is not None:
            moments.theta = base ** (-torch.arange(blocks, dtype=torch.float64) / blocks).repeat(layers, 1)
            angle = 6.3 * torch.rand(layers, heads, blocks, generator=generator, dtype=torch.float64)
            moments.mean = torch.view_as_real(torch.polar((bias * moments.k).sqrt(), angle))
        return moments

    return make


#: Name -> (config class, what differs from the common tiny shape). Two layers, head_dim 32.
TINY = {
    "llama_gqa1": ("LlamaConfig", {"num_attention_heads": 2, "num_key_value_heads": 2}),
    "llama_gqa3": ("LlamaConfig", {"num_attention_heads": 6, "num_key_value_heads": 2}),
    "llama_gqa4": ("LlamaConfig", {"num_attention_heads": 8, "num_key_value_heads": 2}),
    "llama_gqa7": ("LlamaConfig", {"num_attention_heads": 14, "num_key_value_heads": 2}),
    "llama_gqa8": ("LlamaConfig", {"num_attention_heads": 8, "num_key_value_heads": 1}),
    "qwen2_bias": ("Qwen2Config", {}),
    "qwen3_qk_norm": ("Qwen3Config", {}),
    "glm4_interleaved_partial": ("Glm4Config", {}),
    "ernie_interleaved": ("Ernie4_5Config", {}),
    "cohere_interleaved_qk_norm": ("CohereConfig", {"use_qk_norm": True}),
    "stablelm_quarter": ("StableLmConfig", {}),
    "phi_half": ("PhiConfig", {}),
    "smollm3_nope": ("SmolLM3Config", {"no_rope_layers": [1, 0]}),
    "granite_own_scaling": ("GraniteConfig", {"attention_multiplier": 0.5}),
    "gpt2_no_rope": ("GPT2Config", {"num_key_value_heads": 4}),
}


def tiny_config(name: str) -> transformers.PretrainedConfig:
    class_name, extra = TINY[name]
    common = {
        "vocab_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "intermediate_size": 64,
        "max_position_embeddings": 1024,
        "pad_token_id": 0,
        "bos_token_id": 0,
        "eos_token_id": 0,
        **extra,
    }
    common["hidden_size"] = 32 * common["num_attention_heads"]
    config = getattr(transformers, class_name)(**common)
    config._attn_implementation = "sdpa"
    return config


@pytest.fixture(scope="session")
def tiny_model():
    """Factory of tiny random float32 models, made uneven so that every channel pair has its own energy."""
    cache = {}

    def make(name):
        if name not in cache:
            torch.manual_seed(0)
            model = transformers.AutoModelForCausalLM.from_config(tiny_config(name)).eval()
            for key, weight in model.named_parameters():
                if any(part in key for part in ("q_proj.weight", "k_proj.weight", "q_norm.weight", "k_norm.weight")):
                    rows = torch.exp(torch.randn(weight.shape[0]))
                    weight.data *= rows.view(-1, *[1] * (weight.dim() - 1)) * (20 if "proj" in key else 1)
            cache[name] = model
        return cache[name]

    return make


@pytest.fixture(scope="session")
def byte_tokenizer():
    """A tokenizer with one token per byte."""
    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.fixture(scope="session")
def model_folder(tiny_model, byte_tokenizer, tmp_path_factory):
    """A saved tiny Llama with its tokenizer: what --model-path names."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    tiny_model("llama_gqa3").save_pretrained(folder)
    byte_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def loaded():
    """The module of a stand-in for a loaded ModelRunner; it imports SGLang."""
    spec = importlib.util.spec_from_file_location("calibrate_loaded", Path(__file__).with_name("loaded.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
