"""Small models of random weights whose attention is that of a family: its heads, RoPE, norms, windows, experts."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_WINDOWS = ["sliding_attention", "full_attention"]
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128}


@dataclass(frozen=True)
class Family:
    """config: transformers' class. heads: (query, KV, channels). like: models that attend so."""

    name: str
    like: str
    config: str
    heads: tuple[int, int, int]
    more: Mapping[str, Any] = field(default_factory=dict)

    def build(self, tokenizer: Path, folder: Path) -> None:
        """Save it in float32 with the tokenizer's files. Weights are large enough for answers to differ."""
        import torch
        import transformers

        query, kv, channels = self.heads
        config = getattr(transformers, self.config)(
            **{
                "vocab_size": len(transformers.AutoTokenizer.from_pretrained(tokenizer)),
                "hidden_size": 256,
                "intermediate_size": 256,
                "num_hidden_layers": 2,
                "num_attention_heads": query,
                "num_key_value_heads": kv,
                "head_dim": channels,
                "max_position_embeddings": 2048,
                "bos_token_id": 1,
                "eos_token_id": 2,
                "pad_token_id": 0,
                "architectures": [self.config.removesuffix("Config").removesuffix("Text") + "ForCausalLM"],
                **self.more,
            }
        )
        folder.mkdir(parents=True, exist_ok=True)
        for file in tokenizer.iterdir():
            if "token" in file.name or file.suffix == ".jinja" or file.name in ("vocab.json", "merges.txt"):
                shutil.copy(file, folder / file.name)
        torch.manual_seed(0)
        try:
            model = transformers.AutoModelForCausalLM.from_config(config)
        except ValueError:  # a part of a model that is none by itself; what refuses it reads the config alone
            config.save_pretrained(folder)
            return
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.data.normal_(0, 0.8 * weight.shape[-1] ** -0.5)
        model.save_pretrained(folder)


FAMILIES = (
    Family("qwen2", "Qwen2.5", "Qwen2Config", (14, 2, 64), {"hidden_size": 896}),
    Family("qwen3", "Qwen3", "Qwen3Config", (32, 8, 128)),
    Family("qwen3_moe", "Qwen3-30B-A3B", "Qwen3MoeConfig", (32, 4, 128), _EXPERTS),
    Family(
        "glm4_moe",
        "GLM-4.5",
        "Glm4MoeConfig",
        (96, 8, 128),
        {
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 128,
            "use_qk_norm": True,
            "attention_bias": True,
            "rope_parameters": {"rope_theta": 1e6, "partial_rotary_factor": 0.5},
        },
    ),
    Family(
        "minimax_m2",
        "MiniMax-M2",
        "MiniMaxM2Config",
        (48, 8, 128),
        {"num_local_experts": 4, "num_experts_per_tok": 2, "rotary_dim": 64, "scoring_func": "sigmoid"},
    ),
    Family("mistral", "Ministral, Mistral Small", "MistralConfig", (32, 8, 128), {"sliding_window": None}),
    Family("phi3", "Phi-3, Phi-4", "Phi3Config", (32, 8, 96), {"hidden_size": 3072}),
    Family("granite", "Granite 3", "GraniteConfig", (32, 8, 64), {"hidden_size": 2048}),
    Family(
        "olmo3",
        "OLMo 3",
        "Olmo3Config",
        (32, 8, 128),
        {"sliding_window": 64, "layer_types": _WINDOWS, "hidden_size": 4096},
    ),
    Family(
        "gemma2",
        "Gemma 2",
        "Gemma2Config",
        (8, 4, 256),
        {
            "sliding_window": 64,
            "layer_types": _WINDOWS,
            "hidden_act": "gelu_pytorch_tanh",
            "final_logit_softcapping": None,
        },
    ),
    Family(
        "gemma3",
        "Gemma 3 12B (text)",
        "Gemma3TextConfig",
        (16, 8, 256),
        {"sliding_window": 64, "layer_types": _WINDOWS},
    ),
    Family(
        "gpt_oss",
        "gpt-oss",
        "GptOssConfig",
        (64, 8, 64),
        {"sliding_window": 128, "layer_types": _WINDOWS, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    Family("llama4", "Llama 4", "Llama4TextConfig", (40, 8, 128), {"num_local_experts": 2}),
    Family(
        "deepseek_v2",
        "DeepSeek-V2-Lite",
        "DeepseekV2Config",
        (16, 16, 192),
        {"kv_lora_rank": 64, "n_routed_experts": 4},
    ),
    Family("head_of_80", "Phi-2 and others with heads of 80", "LlamaConfig", (32, 32, 80)),
)
