"""Kernels compiled before the first request, side by side: the compiler works without the interpreter's lock."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch

from ..kernels.attention import DecodeScratch, decode_attention
from ..kernels.encode import Encoder
from ..kernels.gather import gather_slots
from ..kernels.splits import request_block

SLOT = torch.int32  # of a decode step's slots
#: Most requests of a decode batch that is prepared here. What larger ones need is compiled for their graphs.
MAX_REQUESTS = 512

Job = Callable[[], object]


def batch_sizes(most: int) -> Iterator[int]:
    """One batch size up to ``most`` for each binary of the decode kernel."""
    size = 1
    while size <= min(most, MAX_REQUESTS):
        yield size
        size = request_block(size) + 1


def jobs(encoder: Encoder, scratch: DecodeScratch, num_heads: int, dtype: torch.dtype, most: int) -> list[Job]:
    """Calls that compile what a step needs for batches of up to ``most`` requests, no kernel twice.

    encoder: of any layer, since a binary serves all; slot 0 is written, which no request has. num_heads: of the query.
    dtype: the model's.
    """
    return [
        *(partial(_gather, batch, encoder.rows.device) for batch in batch_sizes(most)),
        *(partial(_decode, encoder, scratch, num_heads, dtype, batch) for batch in batch_sizes(most)),
        *(
            partial(_encode, encoder, heads, dtype, tokens)
            for tokens in {1, encoder.few_tokens + 1}
            for heads in (0, num_heads)
        ),
    ]


def _encode(encoder: Encoder, num_heads: int, dtype: torch.dtype, tokens: int) -> None:
    """With queries where ``num_heads`` is not 0."""
    tables, device = encoder.tables, encoder.rows.device
    k = torch.zeros(tokens, tables.heads, tables.k.dim, dtype=dtype, device=device)
    v = torch.zeros(tokens, tables.heads, tables.v.dim, dtype=dtype, device=device)
    q = torch.zeros(tokens, num_heads, tables.k.dim, dtype=dtype, device=device) if num_heads else None
    turned = None if q is None else torch.empty_like(q, dtype=torch.float32)
    encoder(k, v, torch.zeros(tokens, dtype=torch.int64, device=device), q, turned)


def _gather(batch: int, device: torch.device) -> None:
    table, slots = torch.zeros(batch, 1, dtype=SLOT, device=device), torch.zeros(batch, dtype=SLOT, device=device)
    requests = torch.zeros(batch, dtype=torch.int64, device=device)
    kv_indptr = torch.empty(batch + 1, dtype=torch.int32, device=device)
    gather_slots(table, requests, requests + 1, kv_indptr, slots)


def _decode(encoder: Encoder, scratch: DecodeScratch, num_heads: int, dtype: torch.dtype, batch: int) -> None:
    tables, device = encoder.tables, encoder.rows.device
    q = torch.zeros(batch, num_heads, tables.k.dim, dtype=dtype, device=device)
    kv_indptr = torch.arange(batch + 1, dtype=torch.int32, device=device)
    slots = torch.zeros(batch, dtype=SLOT, device=device)
    decode_attention(tables, q, encoder.rows, kv_indptr, slots, 1.0, turned=q.float(), scratch=scratch)


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
