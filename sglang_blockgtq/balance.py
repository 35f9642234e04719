"""How memory is shared between packed rows and what SGLang keeps beside them."""

from __future__ import annotations

import logging

from .calibrate.table import AllocationTable
from .options import NAME
from .ranks import is_rank_zero

logger = logging.getLogger(__name__)


def compression(table: AllocationTable) -> float:
    """How many times smaller a packed token is than one in bf16."""
    return table.header.bf16_bytes_per_token_head / table.bytes_per_token_head()


def scale_default(option: str, factor: float, why: str) -> None:
    """Multiply SGLang's default of a scheduling option, whose number is made for 16-bit keys and values, and say so."""
    from sglang.srt.runtime_context import get_context, get_schedule

    default = getattr(get_schedule(), option)
    value = float(f"{default * factor:.4g}")
    get_context().override(f"{NAME}.scale_default", **{option: value})
    if is_rank_zero():
        logger.info("%s: --%s %g in place of %g: %s", NAME, option.replace("_", "-"), value, default, why)
