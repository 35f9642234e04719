"""Whether a table makes sense: every field and tensor, beyond what a correct hash says."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import torch

from ..kernels.device.tables import MAX_TEMPLATES
from ..kernels.format.codebook import MAX_BITS, MIN_BITS
from ..kernels.format.codec import SCALE_MAX, SCALE_RULES
from ..kernels.format.page_mean import PAGE_UNIT, SLOW
from .allocate import ALLOCATORS, block_budget
from .rope import RopeBlocks, check_head_dim
from .segments import GRANULARITIES, rule_of

if TYPE_CHECKING:
    from .table import AllocationTable, TableHeader

#: Balance and gains are divided by one another in float32; calibration stays far within (see build.FLOOR).
GAINS = (1e-18, 1e18)
#: Of calibrate.quality.Quality; the last may be missing.
QUALITY_FIELDS = {"kl", "attention_kl", "worst_layer", "worst_layer_kl", "tokens", "recent"}
ORTHOGONAL_TOLERANCE = 1e-3  # of an element of R R^T


class TableError(ValueError):
    """A table that cannot be used; the message says why and what would work."""


def _require(good: bool, message: str) -> None:
    if not good:
        raise TableError(message)


def check_fields(header: Any, names: Collection[str]) -> None:
    """TableError unless a header, as read from JSON, has all ``names`` and no others."""
    _require(isinstance(header, dict), "its header is no JSON object")
    unknown, missing = sorted(header.keys() - set(names)), sorted(set(names) - header.keys())
    _require(not unknown, f"its header has the unknown field {', '.join(unknown)}")
    _require(not missing, f"its header lacks {', '.join(missing)}")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def validate_header(header: TableHeader) -> None:
    """TableError for a field of a wrong type or out of range."""
    for name in ("model_id", "config_hash", "text_hash", "weights_hash", "table_hash"):
        value = getattr(header, name)
        _require(isinstance(value, str), f"{name} = {value!r} is no text")
    for name in ("tokens", "layers", "kv_heads", "head_dim", "v_head_dim"):
        value = getattr(header, name)
        _require(_is_count(value), f"{name} = {value!r} is no whole number of at least 1")
    for name in ("k_bits", "v_bits"):
        value = getattr(header, name)
        _require(_is_number(value) and MIN_BITS <= value <= MAX_BITS, f"{name} = {value!r} is not within 1 to 8")
    for name, known in (("allocator", ALLOCATORS), ("granularity", GRANULARITIES), ("scale_rule", SCALE_RULES)):
        value = getattr(header, name)
        _require(isinstance(value, str) and value in known, f"{name} = {value!r} is none of {', '.join(known)}")
    quality = header.quality
    _require(
        quality is None
        or isinstance(quality, dict)
        and quality.keys() | {"recent"} == QUALITY_FIELDS
        and all(map(_is_number, quality.values())),
        f"quality = {str(quality)[:80]} is not made of the numbers {', '.join(sorted(QUALITY_FIELDS))}",
    )
    search, rope = header.scale_search, header.rope
    _require(
        isinstance(search, tuple) and len(search) > 0 and all(_is_number(x) and x > 0 for x in search),
        f"scale_search = {search!r} is no list of positive numbers",
    )
    _require(
        isinstance(rope, tuple) and len(rope) == header.layers,
        f"rope = {str(rope)[:80]} is no list of one pairing for each of {header.layers} layers",
    )
    try:
        rule_of(header.allocator, header.granularity)
        for dim in (header.head_dim, header.v_head_dim):
            check_head_dim(dim)
        for layer, pairing in enumerate(rope):
            _require(
                isinstance(pairing, tuple) and [type(x) for x in pairing] == [int, bool],
                f"rope of layer {layer} = {pairing!r} is no pair of rotary_dim and whether pairs are neox",
            )
            RopeBlocks(header.head_dim, *pairing)
    except TableError:
        raise
    except ValueError as e:
        raise TableError(f"in its header, {e}") from None


def _check_shape(table: AllocationTable, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    found = table.tensors[name]
    _require(
        tuple(found.shape) == shape and found.dtype == dtype,
        f"tensor {name} is {list(found.shape)} {found.dtype}, its header asks for {list(shape)} {dtype}",
    )


def _check_heads(good: torch.Tensor, message: str) -> None:
    """TableError naming the first layer and head that is not ``good [L, H]``."""
    if not bool(good.all()):
        layer, head = (~good).nonzero()[0].tolist()
        raise TableError(f"layer {layer}, KV head {head}: {message}")


def _check_rotation(name: str, matrix: torch.Tensor) -> None:
    error = float((matrix.double() @ matrix.double().T - torch.eye(len(matrix))).abs().max())
    _require(error <= ORTHOGONAL_TOLERANCE, f"tensor {name} is not orthogonal (off by {error:.2g})")  # NaN, too


def _is_page(page: Any) -> bool:
    whole = isinstance(page, int) and not isinstance(page, bool)
    return whole and (page == 0 or (page >= PAGE_UNIT and page & (page - 1) == 0))


def _check_page_means(table: AllocationTable) -> None:
    head, t = table.header, table.tensors
    shape, blocks = (head.layers, head.kv_heads), head.head_dim // 2
    _check_shape(table, "mean", (*shape, blocks, 2), torch.float32)
    _check_shape(table, "theta", (head.layers, blocks), torch.float64)
    mean, theta = t["mean"], t["theta"]
    small = mean.abs() <= SCALE_MAX  # NaN fails this, and what follows
    _check_heads(small.all(-1).all(-1), f"mean is not within what float16 holds ({SCALE_MAX:g})")
    turning = (theta.abs() <= math.pi)[:, None].expand(*shape, blocks)
    _check_heads(turning.all(-1), "theta is not within pi radians a position")
    fast = (theta.abs() * head.page > SLOW + 1e-6)[:, None, :, None]
    slow = ~((mean != 0) & fast).any(-1).any(-1)
    _check_heads(
        slow, f"a block with a mean rotates by more than {SLOW:g} radians within a page of {head.page} positions"
    )


def validate(table: AllocationTable) -> None:
    """TableError that says what is wrong with the first senseless thing found, in one line without the file's name."""
    head, t = table.header, table.tensors
    validate_header(head)
    shape, blocks = (head.layers, head.kv_heads), head.head_dim // 2
    parts = {
        "widths": (blocks, torch.uint8),
        "order": (blocks, torch.int16),
        "norm_index": (head.head_dim, torch.uint8),
        "group": (head.head_dim, torch.uint8),
        "balance": (blocks, torch.float32),
        "k_gain": (head.head_dim, torch.float32),
        "k_weight": (head.head_dim, torch.float32),
    }
    _require(
        _is_page(head.page), f"page = {head.page!r} is neither 0 nor a power of two of at least {PAGE_UNIT} positions"
    )
    of_page = {"mean", "theta"} if head.page else set()
    fixed = {*parts, "v_gain", "v_rotation", *of_page}
    missing = sorted(fixed - t.keys())
    _require(not missing, f"it has no tensor {', '.join(missing)}")
    for name, (size, dtype) in parts.items():
        _check_shape(table, name, (*shape, size), dtype)
    _check_shape(table, "v_gain", shape, torch.float32)
    _check_shape(table, "v_rotation", (head.v_head_dim, head.v_head_dim), torch.float32)
    if head.page:
        _check_page_means(table)

    widths, order, group = t["widths"].int(), t["order"].long(), t["group"].long()
    usable = ((widths >= MIN_BITS) & (widths <= MAX_BITS)).all(-1)
    _check_heads(usable, f"widths are not all within {MIN_BITS} to {MAX_BITS} bits")
    budget = block_budget(blocks, head.k_bits)
    _check_heads(widths.sum(-1) <= budget, f"widths spend more than the {budget} bits of k_bits = {head.k_bits:g}")
    _check_heads((order.sort(-1).values == torch.arange(blocks)).all(-1), "order is no permutation of the blocks")
    stored = widths.gather(-1, order)
    _check_heads((stored.diff(dim=-1) <= 0).all(-1), "widths increase in stored order")
    steps = group.diff(dim=-1)
    counted = (group[..., 0] == 0) & ((steps == 0) | (steps == 1)).all(-1)
    _check_heads(counted, "group does not number its rotation groups 0, 1, ... in stored order")
    _check_heads((group[..., ::2] == group[..., 1::2]).all(-1), "group divides a block")
    norm = t["norm_index"].long()
    _check_heads((norm == 0).all(-1) | (norm == group).all(-1), "norm_index is neither 0 throughout nor group")
    for name in ("balance", "k_gain", "v_gain", "k_weight"):
        low, high = (0.0, GAINS[1]) if name == "k_weight" else GAINS
        good = (t[name] >= low) & (t[name] <= high)  # NaN fails both
        _check_heads(good if good.dim() == 2 else good.all(-1), f"{name} is not within {low:g} to {high:g}")
    _check_heads((t["k_weight"] > 0).any(-1), "k_weight is 0 throughout")

    sizes = torch.zeros(*shape, head.head_dim, dtype=torch.long).scatter_add_(-1, group, torch.ones_like(group))
    rotations = {f"rotation.{n}": n for n in sizes[sizes > 0].unique().tolist()}
    missing, extra = sorted(rotations.keys() - t.keys()), sorted(t.keys() - fixed - rotations.keys())
    _require(not missing, f"it has no tensor {', '.join(missing)}")
    _require(not extra, f"it has the unknown tensor {', '.join(extra)}")
    for name, n in rotations.items():
        _check_shape(table, name, (n, n), torch.float32)
    for name in ("v_rotation", *rotations):
        _check_rotation(name, t[name])
    _require(
        len(table.k_templates) <= MAX_TEMPLATES,
        f"its keys have {len(table.k_templates)} layouts in columns; up to {MAX_TEMPLATES} can be served",
    )
    _require(
        not head.page or all(table.row_layout(layer).in_columns for layer in range(head.layers)),
        f"page = {head.page}, and its rows are not in columns, which means of keys need",
    )
