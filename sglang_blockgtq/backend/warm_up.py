"""Kernels compiled before the first request, side by side: the compiler works without the interpreter's lock."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch

from ..kernels.decode.ahead import ahead
from ..kernels.decode.attention import DecodeScratch
from ..kernels.decode.gather import gather_slots
from ..kernels.decode.recent import RecentLayer, RecentRead
from ..kernels.decode.splits import request_block
from ..kernels.decode.tree import Tree
from ..kernels.device.rotate import tokens_of_each_binary
from ..kernels.device.tables import ColumnTables
from ..kernels.encode.encoder import few_tokens, rows_per_token
from ..kernels.layer import TritonLayer
from .buffers import SLOT

#: Most requests of a decode batch that is prepared here. What larger ones need is compiled for their graphs.
MAX_REQUESTS = 512

Job = Callable[[], object]


def batch_sizes(most: int) -> Iterator[int]:
    """One batch size up to ``most`` for each binary of the decode kernel."""
    size = 1
    while size <= min(most, MAX_REQUESTS):
        yield size
        size = request_block(size) + 1


def jobs(
    layer: TritonLayer,
    scratch: DecodeScratch,
    num_heads: int,
    dtype: torch.dtype,
    most: int,
    copies: RecentLayer | None = None,
    rotary: int = 0,
) -> list[Job]:
    """Calls that compile what a step needs for batches of up to ``most`` requests.

    layer: any, since a binary serves all; slot 0 is written, which no request has. num_heads: of the query.
    dtype: the model's. copies: exact ones of its last tokens, of which none is written. rotary: channels whose RoPE the
    model leaves to steps of up to ``copies.recent.room`` requests.
    """
    with_query = (0, num_heads) if layer.fast and copies is None else (0,)
    many, shapes = tokens_of_each_binary(num_heads // layer.heads)[1], (layer, scratch, num_heads, dtype)
    return [
        *(partial(_gather, batch, layer.rows.device, copies) for batch in batch_sizes(most)),
        *(partial(_decode, *shapes, batch, copies=copies, rotary=rotary) for batch in batch_sizes(most)),
        *([partial(_remember, layer, dtype, copies)] if copies else []),
        *([partial(_ahead, layer, num_heads, dtype, many, copies, rotary)] if copies and many <= most else []),
        *([partial(_ahead, layer, num_heads, dtype, 1, copies, 0)] if copies and rotary else []),  # to compare with
        *(partial(_encode, layer, heads, dtype, tokens) for tokens in encoded_at_once(layer) for heads in with_query),
    ]


def verify_jobs(
    layer: TritonLayer,
    scratch: DecodeScratch,
    num_heads: int,
    dtype: torch.dtype,
    most: int,
    q_len: int,
    tree: Tree | None,
    copies: RecentLayer | None = None,
) -> list[Job]:
    """The same for steps that verify q_len tokens of each request, of trees where there is one."""
    shapes = layer, scratch, num_heads, dtype
    return [partial(_decode, *shapes, batch, q_len, tree, copies) for batch in batch_sizes(most)]


def encoded_at_once(layer: TritonLayer) -> set[int]:
    """A number of tokens for each binary of the encode kernels."""
    tables = layer.tables
    if not isinstance(tables, ColumnTables):
        return {1}
    several = most = few_tokens(tables) + 1
    while rows_per_token(tables, most, layer.rows.device) > 1:
        most *= 2
    return {1, several, most}


def _encode(layer: TritonLayer, num_heads: int, dtype: torch.dtype, tokens: int) -> None:
    """With queries where ``num_heads`` is not 0."""
    device = layer.rows.device
    k = torch.zeros(tokens, layer.heads, layer.head_dim, dtype=dtype, device=device)
    v = torch.zeros(tokens, layer.heads, layer.v_head_dim, dtype=dtype, device=device)
    q = torch.zeros(tokens, num_heads, layer.head_dim, dtype=dtype, device=device) if num_heads else None
    zeros = torch.zeros(tokens, dtype=torch.int64, device=device)
    layer.encode(k, v, zeros, zeros, q)


def _ahead(
    layer: TritonLayer, num_heads: int, dtype: torch.dtype, tokens: int, copies: RecentLayer, rotary: int
) -> None:
    q = torch.zeros(tokens, num_heads, layer.head_dim, dtype=dtype, device=layer.rows.device)
    ahead(layer.tables, q, 1, _read(layer, dtype, tokens, copies, rotary), 1.0, 0.0)


def _read(layer: TritonLayer, dtype: torch.dtype, tokens: int, copies: RecentLayer, rotary: int) -> RecentRead:
    """Of a step whose requests are still nobody's, as gathered."""
    k = torch.zeros(tokens, layer.heads, layer.head_dim, dtype=dtype, device=layer.rows.device)
    left = bool(rotary) and tokens <= copies.recent.room
    angles = torch.zeros(tokens, rotary, device=k.device) if left else None
    return copies.read(k, k.new_zeros(tokens, layer.heads, layer.v_head_dim), angles)


def _nobody(batch: int, device: torch.device) -> torch.Tensor:
    """int64 ``[batch]``: the index of what pads a batch, in SGLang's table of requests."""
    return torch.zeros(batch, dtype=torch.int64, device=device)


def _gather(batch: int, device: torch.device, copies: RecentLayer | None) -> None:
    table, slots = torch.zeros(batch, 1, dtype=SLOT, device=device), torch.zeros(batch, dtype=SLOT, device=device)
    requests, recent = _nobody(batch, device), copies.recent if copies else None
    kv_indptr = torch.empty(batch + 1, dtype=torch.int32, device=device)
    gather_slots(table, requests, requests + 1, kv_indptr, slots, recent=recent)


def _remember(layer: TritonLayer, dtype: torch.dtype, copies: RecentLayer) -> None:
    device = layer.rows.device
    k = torch.zeros(1, layer.heads, layer.head_dim, dtype=dtype, device=device)
    v = torch.zeros(1, layer.heads, layer.v_head_dim, dtype=dtype, device=device)
    qo_indptr = torch.arange(2, dtype=torch.int32, device=device)
    copies.remember(k, v, _nobody(1, device), _nobody(1, device).int(), qo_indptr)


def _decode(
    layer: TritonLayer,
    scratch: DecodeScratch,
    num_heads: int,
    dtype: torch.dtype,
    batch: int,
    q_len: int = 1,
    tree: Tree | None = None,
    copies: RecentLayer | None = None,
    rotary: int = 0,
) -> None:
    device, tokens = layer.rows.device, batch * q_len
    q = torch.zeros(tokens, num_heads, layer.head_dim, dtype=dtype, device=device)
    kv_indptr = torch.arange(batch + 1, dtype=torch.int32, device=device) * q_len
    slots = torch.zeros(tokens, dtype=SLOT, device=device)
    rotated = torch.zeros(q.shape, dtype=torch.float32, device=device) if layer.fast and copies is None else None
    bits = None if tree is None else tree.bits[:tokens]
    recent = _read(layer, dtype, tokens, copies, rotary) if copies else None
    layer.decode(q, kv_indptr, slots, 1.0, q_len=q_len, tree=bits, rotated=rotated, scratch=scratch, recent=recent)


def run(todo: Sequence[Job], device: torch.device) -> None:
    """All jobs at a time. The first that fails is the error of all."""

    def on_device(job: Job) -> None:
        torch.cuda.set_device(device)  # a thread starts on the first one
        with torch.inference_mode():
            job()

    with ThreadPoolExecutor(len(todo), thread_name_prefix="compile") as threads:
        for done in [threads.submit(on_device, job) for job in todo]:
            done.result()
    torch.cuda.synchronize(device)
