"""A stand-in for a ModelRunner with weights loaded: a small model around SGLang's attention modules, on the CPU."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm
from torch import nn
from transformers import LlamaConfig

from sglang_blockgtq.calibrate.model import has_mrope

DIM, HEADS, KV_HEADS, HIDDEN = 32, 4, 2, 64


def theta_of(rotary_dim: int) -> torch.Tensor:
    return 10_000.0 ** (-torch.arange(rotary_dim // 2, dtype=torch.float64) / max(rotary_dim // 2, 1))


def rotate(x: torch.Tensor, positions: torch.Tensor, rotary_dim: int, neox: bool) -> torch.Tensor:
    """RoPE of ``[T, heads, DIM]``, written out independently of what is tested."""
    half = rotary_dim // 2
    angle = (positions[:, None, None] * theta_of(rotary_dim)).float()
    first = torch.arange(half) if neox else 2 * torch.arange(half)
    second = first + half if neox else first + 1
    out = x.clone()
    out[..., first] = x[..., first] * angle.cos() - x[..., second] * angle.sin()
    out[..., second] = x[..., second] * angle.cos() + x[..., first] * angle.sin()
    return out


def rotary(rotary_dim: int, neox: bool, **other) -> SimpleNamespace:
    """What SGLang's rotary modules tell of themselves, their table of cosines and sines included."""
    angle = torch.arange(1024)[:, None] * theta_of(rotary_dim)
    cache = torch.cat([angle.cos(), angle.sin()], -1).float()
    return SimpleNamespace(**{"rotary_dim": rotary_dim, "is_neox_style": neox, "cos_sin_cache": cache, **other})


class Attention(nn.Module):
    """true, said: (rotary_dim, neox) as it computes, and as its rotary_emb tells; said None: it has none."""

    def __init__(self, layer: int, true: tuple[int, bool], said: tuple[int, bool] | None):
        super().__init__()
        self.true = true
        if said is not None:
            self.rotary_emb = rotary(*said)
        self.attn = RadixAttention(HEADS, DIM, DIM**-0.5, KV_HEADS, layer)
        self.qkv = nn.Linear(HIDDEN, DIM * (HEADS + 2 * KV_HEADS), bias=False)
        self.out = nn.Linear(DIM * HEADS, HIDDEN, bias=False)

    def forward(self, x: torch.Tensor, positions: torch.Tensor, batch) -> torch.Tensor:
        q, k, v = self.qkv(x).split([DIM * HEADS, DIM * KV_HEADS, DIM * KV_HEADS], -1)
        q, k = (rotate(y.view(len(x), -1, DIM), positions, *self.true).flatten(1) for y in (q, k))
        return x + self.out(self.attn(q, k, v, batch))


class Model(nn.Module):
    def __init__(self, true: list, said: list):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(256, HIDDEN)
        self.layers = nn.ModuleList(Attention(i, t, s) for i, (t, s) in enumerate(zip(true, said, strict=True)))
        self.head = nn.Linear(HIDDEN, 256, bias=False)
        self.seen: list[int] = []  # tokens of each forward

    def forward(self, ids: torch.Tensor, positions: torch.Tensor, batch) -> SimpleNamespace:
        """Logits of the last token of each sequence, by its lengths on the device, as SGLang has them."""
        self.seen.append(len(ids))
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x, positions, batch)
        last = batch.extend_seq_lens.cumsum(0) - 1
        return SimpleNamespace(next_token_logits=self.head(x[last]))


def runner(true: list, said: list, context: int = 1024, config: LlamaConfig | None = None, **args) -> SimpleNamespace:
    """args: what differs from the ServerArgs here."""
    config = config or LlamaConfig(num_hidden_layers=len(true), head_dim=DIM, num_key_value_heads=KV_HEADS)
    given = {"model_path": "org/name", "tokenizer_path": None, "tokenizer_mode": "auto", "load_format": "auto"}
    given |= {"trust_remote_code": False, "revision": None, "download_dir": None}
    return SimpleNamespace(
        model=Model(true, said),
        device="cpu",
        spec_algorithm=SpeculativeAlgorithm.NONE,
        server_args=SimpleNamespace(**{**given, **args}),
        model_config=SimpleNamespace(
            hf_config=config,
            num_hidden_layers=len(true),
            head_dim=DIM,
            v_head_dim=DIM,
            context_len=context,
            model_is_mrope=has_mrope(config),
            is_generation=True,
            get_total_num_kv_heads=lambda: KV_HEADS,
        ),
    )


def group(size: int = 1, rank: int = 0, cpu_group=None) -> SimpleNamespace:
    """A GroupCoordinator's part that is used."""
    return SimpleNamespace(
        world_size=size,
        rank_in_group=rank,
        ranks=list(range(size)),
        cpu_group=cpu_group,
        is_first_rank=rank == 0,
        is_last_rank=rank == size - 1,
    )


def install(monkeypatch, world: SimpleNamespace, tp: SimpleNamespace, pp: SimpleNamespace) -> None:
    """Make these SGLang's process groups; all ranks of tp hold all heads."""
    from sglang.srt.distributed import parallel_state

    from sglang_blockgtq import capture, ranks

    parallel = SimpleNamespace(attn_tp_rank=0, attn_tp_size=1, tp_rank=tp.rank_in_group)
    for owner in (parallel_state, capture, ranks):
        for name, value in (("get_world_group", world), ("get_attn_tp_group", tp), ("get_pp_group", pp)):
            monkeypatch.setattr(owner, name, lambda value=value: value, raising=False)
    monkeypatch.setattr(capture, "get_parallel", lambda: parallel)
