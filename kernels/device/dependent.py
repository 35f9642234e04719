"""Programmatic dependent launch: a kernel starts while the one before it ends, on Hopper and later.

What a program reads before :func:`wait_and_release` must have been complete before the kernel *ahead* of it began:
tables, and lengths. Every kernel waits before it lets the next one start, so that this holds along a chain of them.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl


@triton.jit
def wait_and_release(DEPENDENT: tl.constexpr):
    """Wait until the kernel ahead is complete and its writes are seen; from then on the next one may start."""
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def prefetch(pointers):
    """Have the cache of all multiprocessors fetch what lies at these addresses. Asked for before the wait, it comes as
    the kernel ahead runs; what that kernel still writes there is not lost, for it writes to the same cache."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [pointers.to(tl.int64)], tl.int32, is_pure=False, pack=1
    )


@cache
def dependent(device: torch.device) -> bool:
    """Whether kernels on this device are launched so: both the constant DEPENDENT and the option launch_pdl."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
