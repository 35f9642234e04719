"""One forward pass over the calibration text, inside the server, with attention that takes moments.

Runs after the weights are loaded and before any pool, backend or graph exists: SGLang's modules
find their attention backend through ForwardContext, so a backend that computes dense causal
attention and adds up energies is all it takes. Every TP and PP rank walks the same batches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from sglang.srt.distributed.parallel_state import get_pp_group
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.model_executor.forward_batch_info import (
    CaptureHiddenMode,
    ForwardBatch,
    ForwardMode,
    PPProxyTensors,
)
from sglang.srt.model_executor.forward_context import ForwardContext, forward_context
from sglang.srt.runtime_context import get_parallel
from tqdm import tqdm

from .calibrate.frequencies import frequencies, of_blocks
from .calibrate.model import ModelError, has_mrope, has_states, packed_layers, rope_parameters
from .calibrate.moments import Moments, MomentSums
from .calibrate.quality import attend
from .calibrate.rope import RopeBlocks
from .calibrate.rope_check import Probe, check_swings, trusted
from .options import NAME, KVQuantError
from .ranks import reduce
from .states import with_states
from .terms import terms_of


def attention_layers(model: torch.nn.Module) -> list[RadixAttention]:
    """The model's attention layers on this rank, by layer id."""
    found = {m.layer_id: m for m in model.modules() if isinstance(m, RadixAttention)}
    return [found[i] for i in sorted(found)]


def local_heads(total_kv_heads: int) -> slice:
    """Which of the model's KV heads this rank holds. With more ranks than heads, heads are replicated."""
    rank, size = get_parallel().attn_tp_rank, get_parallel().attn_tp_size
    if size <= total_kv_heads:
        local = total_kv_heads // size
        return slice(rank * local, (rank + 1) * local)
    head = rank // (size // total_kv_heads)
    return slice(head, head + 1)


def rotary_modules(model: torch.nn.Module) -> dict[int, Any]:
    """The rotary embedding of each layer id that has one, found at the module that owns both it and the attention."""
    out = {}
    for module in model.modules():
        rotary = getattr(module, "rotary_emb", None)
        if rotary is None or getattr(module, "use_rope", True) is False:
            continue
        for child in module.children():
            if isinstance(child, RadixAttention):
                out[child.layer_id] = rotary
    return out


def rope_of(model: torch.nn.Module, head_dim: int) -> dict[int, RopeBlocks]:
    """RoPE pairing per layer id; ``rotary_dim`` 0 for a layer without one."""
    out = {layer.layer_id: RopeBlocks(head_dim, 0) for layer in attention_layers(model)}
    for layer, rotary in rotary_modules(model).items():
        out[layer] = RopeBlocks(head_dim, int(rotary.rotary_dim), bool(getattr(rotary, "is_neox_style", True)))
    return out


def _turns(cache: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    return cache[positions.to(cache.device)].unflatten(-1, (2, -1))


def frequencies_of(model: torch.nn.Module, head_dim: int) -> dict[int, torch.Tensor | None]:
    """How fast blocks rotate per layer id; None where positions have several sides (M-RoPE) or no linear table."""
    known: dict[int, torch.Tensor | None] = {}  # by rotary module, which layers share
    rotaries, out = rotary_modules(model), {}
    for layer, blocks in rope_of(model, head_dim).items():
        rotary = rotaries.get(layer)
        if rotary is not None and id(rotary) not in known:
            cache = getattr(rotary, "cos_sin_cache", None)
            known[id(rotary)] = None
            if cache is not None and cache.dim() == 2 and not getattr(rotary, "mrope_section", None):
                known[id(rotary)] = frequencies(partial(_turns, cache), len(cache))
        out[layer] = of_blocks(None if rotary is None else known[id(rotary)], blocks)
    return out


class CaptureBackend(AttentionBackend):
    """Dense causal attention over one batch of whole sequences. ``take(layer_id, q, k, v)`` sees ``[T, heads, D]``, and
    may return what to attend to instead (:data:`.calibrate.quality.Hook`)."""

    def __init__(self, take: Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], Any]):
        super().__init__()
        # uint8 keeps fused RoPE-and-store kernels off: there is no pool to store into.
        self.token_to_kv_pool = SimpleNamespace(dtype=torch.uint8)
        self.req_to_token_pool = None
        self.take = take

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        pass

    def forward_extend(self, q, k, v, layer, forward_batch, save_kv_cache=True, **kwargs):
        terms = terms_of(layer, kwargs)
        if k is None:
            raise KVQuantError(f"--kv-quant {NAME}: layer {layer.layer_id} shares another layer's cache; not supported")
        q = q.view(-1, layer.tp_q_head_num, layer.qk_head_dim)
        k = k.view(-1, layer.tp_k_head_num, layer.qk_head_dim)
        v = v.view(-1, layer.tp_v_head_num, layer.v_head_dim)
        read = self.take(layer.layer_id, q, k, v)
        out = q.new_empty(q.shape[0], layer.tp_q_head_num, layer.v_head_dim)
        start = 0
        for n in forward_batch.extend_seq_lens_cpu:
            own = slice(start, start + n)
            mine = read and (read[0][own], read[1][own], *read[2:])
            out[own] = attend(q[own], k[own], v[own], mine, layer.scaling, terms)
            start += n
        return out.flatten(1)


def _batch(runner: Any, ids: list[int], positions: Sequence[int]) -> ForwardBatch:
    """An extend batch of one whole sequence, without cache slots behind it."""
    device, n = runner.device, len(ids)
    length = torch.tensor([n], dtype=torch.int64, device=device)
    where = torch.tensor(positions, dtype=torch.int64, device=device)
    batch = ForwardBatch(
        forward_mode=ForwardMode.EXTEND,
        batch_size=1,
        input_ids=torch.tensor(ids, dtype=torch.int64, device=device),
        req_pool_indices=torch.zeros(1, dtype=torch.int64, device=device),
        seq_lens=length,
        seq_lens_cpu=length.cpu(),
        orig_seq_lens=length.to(torch.int32),
        out_cache_loc=torch.arange(n, device=device),
        seq_lens_sum=n,
        positions=where,
        extend_num_tokens=n,
        extend_seq_lens=length.to(torch.int32),
        extend_prefix_lens=torch.zeros(1, dtype=torch.int32, device=device),
        extend_start_loc=torch.zeros(1, dtype=torch.int32, device=device),
        extend_prefix_lens_cpu=[0],
        extend_seq_lens_cpu=[n],
        extend_logprob_start_lens_cpu=[0],
        return_logprob=False,
        capture_hidden_mode=CaptureHiddenMode.NULL,
        spec_algorithm=runner.spec_algorithm,
    )
    if runner.model_config.model_is_mrope:
        batch.mrope_positions = where.expand(3, n).contiguous()
    return batch


def forward(
    runner: Any, take: Callable, ids: list[int], positions: Sequence[int], answers: torch.Tensor | None = None
) -> Any:
    """One sequence through this rank's part of the model, attention by :class:`CaptureBackend`.

    Returns what the model does, on the last pipeline stage: logits of the places ``answers [N]`` among it.
    """
    pp, batch, extra = get_pp_group(), _batch(runner, ids, positions), {}
    backend = with_states(runner, CaptureBackend(take))
    backend.init_forward_metadata(batch)
    if answers is not None:
        # SGLang gives logits of the last token of each sequence by its lengths on the device, which nothing else reads
        # once metadata is there.
        ends = (answers + 1).diff(prepend=torch.zeros(1, dtype=answers.dtype))
        batch.extend_seq_lens = ends.to(runner.device, torch.int32)
    with torch.inference_mode(), forward_context(ForwardContext(attn_backend=backend)):
        if pp.world_size > 1 and not pp.is_first_rank:
            extra["pp_proxy_tensors"] = PPProxyTensors(pp.recv_tensor_dict())
        out = runner.model.forward(batch.input_ids, batch.positions, batch, **extra)
        if pp.world_size > 1 and not pp.is_last_rank:
            pp.send_tensor_dict(out.tensors)
            return None
    return out


def model_rope(runner: Any) -> list[RopeBlocks]:
    """RoPE pairing of every layer of the model, the same on all ranks: pipeline stages hold disjoint layers.

    ``rotary_dim`` 0 for a layer without keys.
    """
    config = runner.model_config
    here, layers = rope_of(runner.model, config.head_dim), range(config.num_hidden_layers)
    found = reduce(torch.tensor([[here[i].rotary_dim, here[i].neox, 1] if i in here else [0, 0, 0] for i in layers]))
    ranks = found[:, 2].clamp(min=1)  # that hold the layer
    return [RopeBlocks(config.head_dim, int(d // n), bool(x)) for (d, x, _), n in zip(found, ranks, strict=True)]


def model_frequencies(runner: Any) -> list[torch.Tensor | None]:
    """How fast the blocks of every layer rotate, the same on all ranks; None as in :func:`frequencies_of`.

    Zeros for a layer without keys.
    """
    config = runner.model_config
    table = torch.zeros(config.num_hidden_layers, config.head_dim // 2 + 2, dtype=torch.float64)
    for layer, theta in frequencies_of(runner.model, config.head_dim).items():
        table[layer, 0] = 1  # ranks that hold the layer, and those that know its frequencies
        if theta is not None:
            table[layer, 1], table[layer, 2:] = 1, theta
    held, known, theta = reduce(table).split([1, 1, config.head_dim // 2], 1)
    theta /= known.clamp(min=1)
    return [row if ok else None for row, ok in zip(theta, (known == held)[:, 0].tolist(), strict=True)]


def check_rope(
    runner: Any, rope: list[RopeBlocks], theta: list[torch.Tensor | None], token: int
) -> list[torch.Tensor | None]:
    """KVQuantError, on every rank, if the model rotates other channel pairs than ``rope`` says (calibrate.rope_check).

    Returns ``theta`` without the layers whose keys do not rotate by it.
    """
    config = runner.model_config
    probe = Probe(token, config.context_len, has_states(config.hf_config))
    for ids, positions in probe.passes:
        forward(runner, probe.take, ids, positions)
    found = torch.tensor([probe.found(i, r, theta[i]) for i, r in enumerate(rope)], dtype=torch.float64).T.contiguous()
    swings, drifts = reduce(found, torch.distributed.ReduceOp.MAX).tolist()
    if any(r.rotary_dim for r in rope) or rope_parameters(config.hf_config):  # else learned positions may change keys
        try:
            check_swings(swings, rope)
        except ModelError as e:
            raise KVQuantError(f"--kv-quant {NAME}: {e}; serve this model without --kv-quant") from None
    return trusted(theta, drifts, rope, has_mrope(config.hf_config))


def collect_moments(runner: Any, sequences: list[list[int]]) -> tuple[Moments, list[RopeBlocks]]:
    """Moments of the whole model and the RoPE pairing of every packed layer, identical on all ranks.

    runner: a ModelRunner with weights loaded. sequences: token ids, the same on every rank. Raises KVQuantError if the
    pairing is not the model's own.
    """
    rope, heads = model_rope(runner), runner.model_config.get_total_num_kv_heads()
    theta = check_rope(runner, rope, model_frequencies(runner), sequences[0][-1])
    sums, first = MomentSums(len(rope), heads, rope, theta), local_heads(heads).start
    packed = packed_layers(runner.model_config.hf_config)

    def take(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        if layer in packed:
            sums.add(layer, first, q, k, v)

    show = get_parallel().tp_rank == 0 and get_pp_group().is_first_rank
    for ids in tqdm(sequences, desc="Calibrating KV quantization", unit="seq", disable=not show):
        forward(runner, take, ids, range(len(ids)))
    reduce(sums.flat)  # replicated heads are counted once a replica, in the counts too
    try:
        return sums.mean(sum(map(len, sequences)), packed), [rope[layer] for layer in packed]
    except ValueError as e:
        raise KVQuantError(f"--kv-quant {NAME}: {e}; serve this model without --kv-quant") from None
