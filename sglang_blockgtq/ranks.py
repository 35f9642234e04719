"""What the ranks of a server agree on: world rank 0 decides, and its errors reach all at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from sglang.srt.distributed.parallel_state import get_attn_tp_group, get_pp_group, get_world_group

from .options import NAME, KVQuantError

T = TypeVar("T")


def reduce(
    values: torch.Tensor, op: torch.distributed.ReduceOp.RedOpType = torch.distributed.ReduceOp.SUM
) -> torch.Tensor:
    """``values`` (CPU) over the ranks that hold parts of the model."""
    for group in (get_attn_tp_group(), get_pp_group()):
        if group.world_size > 1:
            torch.distributed.all_reduce(values, op, group=group.cpu_group)
    return values


def from_rank_zero(make: Callable[[], T]) -> T:
    """World rank 0's ``make()`` on every rank; where that fails, KVQuantError with its message on every rank."""
    group = get_world_group()
    value: Any = None
    message: str | None = None
    cause: Exception | None = None
    if group.rank_in_group == 0:
        try:
            value = make()
        except Exception as e:
            said = " ".join(str(e).split()) or "no message"
            message = said if isinstance(e, KVQuantError) else f"--kv-quant {NAME}: {type(e).__name__}: {said}"
            cause = e
    if group.world_size > 1:
        box = [value, message]
        torch.distributed.broadcast_object_list(box, src=group.ranks[0], group=group.cpu_group)
        value, message = box
    if message is not None:
        raise KVQuantError(message) from cause
    return value


def is_rank_zero() -> bool:
    return get_world_group().rank_in_group == 0


def check_ranks(table_hash: str, cell_size: int) -> None:
    """Every rank must serve one table, and all ranks of a pipeline stage take as many bytes a token.

    A collective of the whole world. Raises KVQuantError on all ranks, naming those that differ.
    """
    group = get_world_group()
    if group.world_size == 1:
        return
    found: list = [None] * group.world_size
    mine = (table_hash, get_pp_group().rank_in_group, cell_size)
    torch.distributed.all_gather_object(found, mine, group=group.cpu_group)
    stages: dict[int, tuple[int, int]] = {}
    for rank, (_, stage, size) in enumerate(found):
        stages.setdefault(stage, (rank, size))
    for rank, (table, stage, size) in enumerate(found):
        first, expected = stages[stage]
        if table != found[0][0]:
            ranks = [i for i, (other, *_) in enumerate(found) if other != found[0][0]]
            what = f"table {table[:12]}, rank 0 has {found[0][0][:12]}"
        elif size != expected:
            ranks = [i for i, (_, s, other) in enumerate(found) if s == stage and other != expected]
            what = f"{size} bytes per token, rank {first} has {expected}"
        else:
            continue
        raise KVQuantError(
            f"--kv-quant {NAME}: ranks {', '.join(map(str, ranks))} differ: rank {rank} has {what}; "
            "start all nodes with the same options and versions"
        )
