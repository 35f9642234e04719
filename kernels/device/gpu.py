"""What a launch asks of its GPU."""

from __future__ import annotations

from functools import cache

import torch


@cache
def multiprocessors(device: torch.device) -> int:
    """How many a device has. The interpreter has one; a few splits make its tests worth something."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
