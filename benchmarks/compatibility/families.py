"""Small models of random weights whose attention is that of a family: its heads, RoPE, norms, windows, experts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_WINDOWS = ["sliding_attention", "full_attention"]
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128}
_DELTA_NETS = {
    "num_hidden_layers": 4,  # the last has full attention
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
}
_INTERVAL = {"full_attention_interval": 4}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 1024,
}
_IMAGE_TOKENS = {"image_token_id": 3, "video_token_id": 4, "vision_start_token_id": 5, "vision_end_token_id": 6}
_VISION = {"depth": 1, "hidden_size": 64, "num_heads": 2, "intermediate_size": 64}


@dataclass(frozen=True)
class Family:
    """config: transformers' class. heads: (query, KV, channels). like: models that attend so.

    saved: what checkpoints of it have in config.json in the place of what transformers writes; None: nothing.
    vision: config of a small vision tower; then ``more`` is the language model's, and prompts are text alone.

    states: some layers keep a state for each request, in Triton kernels that the CPU runs in Triton's interpreter.
    gpu_only: why no server of it is started on a CPU. gpu_args: what its servers need on a GPU. config_only: it is
    refused by its config, so it has no weights.
    """

    name: str
    like: str
    config: str
    heads: tuple[int, int, int]
    more: Mapping[str, Any] = field(default_factory=dict)
    saved: Mapping[str, Any] = field(default_factory=dict)
    vision: Mapping[str, Any] | None = None
    states: bool = False
    gpu_only: str = ""
    gpu_args: tuple[str, ...] = ()
    config_only: bool = False

    @property
    def architecture(self) -> str:
        name = self.config.removesuffix("Config").removesuffix("Text")
        return name + ("ForCausalLM" if self.vision is None else "ForConditionalGeneration")

    def build(self, tokenizer: Path, folder: Path, dtype: str = "float32") -> None:
        """Save it with the tokenizer's files. Weights are large enough for answers to differ."""
        import torch
        import transformers

        query, kv, channels = self.heads
        text = {
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
            **self.more,
        }
        tower = {"text_config": text, "vision_config": self.vision, **_IMAGE_TOKENS}
        given = {"architectures": [self.architecture], **(text if self.vision is None else tower)}
        config = getattr(transformers, self.config)(**given)
        folder.mkdir(parents=True, exist_ok=True)
        for file in tokenizer.iterdir():
            if "token" in file.name or file.suffix == ".jinja" or file.name in ("vocab.json", "merges.txt"):
                shutil.copy(file, folder / file.name)
        if self.config_only:
            config.save_pretrained(folder)
            return
        torch.manual_seed(0)
        auto = transformers.AutoModelForCausalLM
        if self.vision is not None:
            auto = transformers.AutoModelForImageTextToText
            transformers.Qwen2VLImageProcessor().save_pretrained(folder)
            transformers.Qwen3VLVideoProcessor().save_pretrained(folder)
        model = auto.from_config(config)
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.data.normal_(0, 0.8 * weight.shape[-1] ** -0.5)
        model.to(getattr(torch, dtype)).save_pretrained(folder)
        file = folder / "config.json"
        written = json.loads(file.read_text()) | self.saved
        left_out = {name for name, value in self.saved.items() if value is None}
        file.write_text(json.dumps({name: written[name] for name in written if name not in left_out}, indent=1))


_NO_MAMBA = "SGLang loads the convolutions of its Mamba layers only where there is a GPU"
_NO_DELTA_NETS = "SGLang's gated delta nets are Triton kernels that Triton's interpreter does not compute"

FAMILIES = (
    Family(
        "llama",
        "Llama-3.1-8B, DeepSeek-R1-Distill-Llama-8B",
        "LlamaConfig",
        (32, 8, 128),
        {"rope_parameters": _LLAMA3_ROPE},
    ),
    Family("qwen2", "Qwen2.5-0.5B", "Qwen2Config", (14, 2, 64), {"hidden_size": 896}),
    Family("qwen2_3b", "Qwen2.5-3B", "Qwen2Config", (16, 2, 128), {"hidden_size": 2048}),
    Family("qwen2_7b", "Qwen2.5-7B, DeepSeek-R1-Distill-Qwen-7B", "Qwen2Config", (28, 4, 128), {"hidden_size": 3584}),
    Family("qwen2_14b", "Qwen2.5-14B", "Qwen2Config", (40, 8, 128), {"hidden_size": 5120}),
    Family("qwen3", "Qwen3-8B", "Qwen3Config", (32, 8, 128)),
    Family("qwen3_moe", "Qwen3-30B-A3B", "Qwen3MoeConfig", (32, 4, 128), _EXPERTS),
    Family(
        "mistral",
        "Ministral, Mistral Small, Mistral-Nemo-12B",
        "MistralConfig",
        (32, 8, 128),
        {"sliding_window": None},
    ),
    Family("glm4", "GLM-4-9B", "Glm4Config", (32, 2, 128)),
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
        saved={"use_routing_bias": True},
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
        gpu_only="SGLang's experts of gpt-oss multiply other shapes on a CPU",
    ),
    Family(
        "mellum",
        "Mellum 2",
        "MellumConfig",
        (32, 4, 128),
        {"sliding_window": 64, "layer_types": _WINDOWS, "mlp_layer_types": ["dense"] * 2, "num_experts": 4},
    ),
    Family(
        "mimo_v2",
        "MiMo-V2-Flash (keys of 192 channels, values of 128)",
        "MiMoV2FlashConfig",
        (64, 4, 192),
        {
            "sliding_window": 64,
            "layer_types": ["full_attention", "sliding_attention"],
            "mlp_layer_types": ["dense"] * 2,
        },
        # What SGLang reads. Its window does not count a query's own token.
        saved={
            "hybrid_layer_pattern": [0, 1],
            "moe_layer_freq": [0, 0],
            "swa_num_attention_heads": 64,
            "swa_num_key_value_heads": 8,
            "swa_head_dim": 192,
            "swa_v_head_dim": 128,
            "sliding_window_size": 63,
            "layernorm_epsilon": 1e-5,
            "add_swa_attention_sink_bias": True,
            "rope_theta": 5e6,
            "swa_rope_theta": 1e4,
            "partial_rotary_factor": 0.334,
            "rope_parameters": {
                "rope_type": "default",
                "full_attention": {"rope_type": "default", "rope_theta": 5e6, "partial_rotary_factor": 0.334},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.334},
            },
        },
    ),
    Family(
        "lfm2",
        "LFM2",
        "Lfm2Config",
        (16, 8, 64),
        {
            "hidden_size": 1024,
            "num_hidden_layers": 4,
            "layer_types": ["conv", "full_attention"] * 2,
            "block_auto_adjust_ff_dim": False,
        },
        states=True,
    ),
    Family(
        "nemotron_h",
        "Nemotron-H",
        "NemotronHConfig",
        (32, 8, 128),
        {
            "hybrid_override_pattern": "M-M*",
            "mamba_num_heads": 8,
            "mamba_head_dim": 64,
            "n_groups": 8,
            "ssm_state_size": 128,
        },
        saved={
            "hybrid_override_pattern": "M-M*",
            "num_hidden_layers": 4,
            "layers_block_type": None,
            "mtp_layers_block_type": None,
        },
        states=True,
        gpu_only=_NO_MAMBA,
    ),
    Family(
        "qwen3_next",
        "Qwen3-Next",
        "Qwen3NextConfig",
        (16, 2, 256),
        {**_DELTA_NETS, **_EXPERTS, "shared_expert_intermediate_size": 128},
        saved=_INTERVAL,
        states=True,
        gpu_only=_NO_DELTA_NETS,
    ),
    Family(
        "qwen3_5",
        "Qwen3.5 (text)",
        "Qwen3_5TextConfig",
        (24, 4, 256),
        _DELTA_NETS,
        saved=_INTERVAL,
        states=True,
        gpu_only=_NO_DELTA_NETS,
    ),
    Family(
        "qwen2_5_vl",
        "Qwen2.5-VL (text prompts)",
        "Qwen2_5_VLConfig",
        (28, 4, 128),
        {
            "hidden_size": 3584,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        },
        vision=_VISION | {"out_hidden_size": 3584},
    ),
    Family(
        "qwen3_vl",
        "Qwen3-VL (text prompts)",
        "Qwen3VLConfig",
        (32, 8, 128),
        {
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 5e6,
                "mrope_section": [24, 20, 20],
                "mrope_interleaved": True,
            },
        },
        vision=_VISION | {"out_hidden_size": 256, "deepstack_visual_indexes": [0]},
    ),
    Family("llama4", "Llama 4", "Llama4TextConfig", (40, 8, 128), {"num_local_experts": 2}, config_only=True),
    Family(
        "deepseek_v2",
        "DeepSeek-V2-Lite",
        "DeepseekV2Config",
        (16, 16, 192),
        {"kv_lora_rank": 64, "n_routed_experts": 4},
        config_only=True,
    ),
    Family("phi3", "Phi-3, Phi-4", "Phi3Config", (32, 8, 96), {"hidden_size": 3072}),
    Family("granite", "Granite 3", "GraniteConfig", (32, 8, 64), {"hidden_size": 2048}),
    Family("head_of_80", "Phi-2 and others with heads of 80", "LlamaConfig", (32, 32, 80)),
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
        "granite4",
        "Granite 4 (hybrid)",
        "GraniteMoeHybridConfig",
        (12, 4, 128),
        {
            "hidden_size": 1536,
            "layer_types": ["mamba", "attention"],
            "mamba_n_heads": 48,
            "mamba_d_head": 64,
            "mamba_n_groups": 1,
            "mamba_d_state": 128,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 256,
        },
        states=True,
        gpu_only=_NO_MAMBA,
    ),
    Family(
        "falcon_h1",
        "Falcon-H1",
        "FalconH1Config",
        (12, 2, 128),
        {"mamba_d_ssm": 512, "mamba_n_heads": 8, "mamba_d_head": 64, "mamba_n_groups": 1, "mamba_d_state": 128},
        states=True,
        gpu_only=_NO_MAMBA,
        gpu_args=("--cuda-graph-backend-prefill=disabled",),
    ),
    Family(
        "exaone4",
        "EXAONE 4 (no RoPE in full layers)",
        "Exaone4Config",
        (40, 8, 128),
        {"sliding_window": 64, "layer_types": _WINDOWS, "hidden_size": 5120},
        saved={"sliding_window_pattern": "LG"},
    ),
    Family(
        "gemma3_images",
        "Gemma 3 with images",
        "Gemma3Config",
        (16, 8, 256),
        {"architectures": ["Gemma3ForConditionalGeneration"]},
        config_only=True,
    ),
)
