"""Launching a Triton kernel again without asking again which binary it needs.

``kernel[grid](...)`` looks at every argument at every launch: types, alignments, values that it specialises on, the
compile-time constants. For kernels with 40 to 70 arguments, nearly all of them a layer's own tables, that takes the
host longer than a GPU needs for the work. :class:`Launch` looks at a layer's own arguments once, and at each launch
only at those that change.

What it asks of them is what Triton specialises on (``specialize_impl`` of its JIT): dtype and, to 16 bytes, address
of a tensor; type of an integer and whether it is 1 or a multiple of 16; neither of the latter where the kernel
declares ``do_not_specialize``. Equal answers mean an equal binary. Unequal ones may, too: Triton then finds it again.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from triton import knobs
from triton.runtime import driver

_DIVISOR = 16  # of an address in bytes, or of an integer
_I32, _I64 = 1 << 31, 1 << 63


class Launch:
    """``kernel`` with some arguments bound; called with a grid of three and the other arguments, by name.

    bound: also compile-time constants and the compiler's options (num_warps, num_stages, maxnreg). A bound tensor is
    kept alive and read where it lay when it was bound. An argument that is not bound costs some tenths of a
    microsecond a launch, a bound one next to nothing.

    The first launch for each set of answers is Triton's own, with its checks and its compiling; the others start the
    binary which that one returned, on the current device and stream and with the launch hooks that are set. What
    Triton takes from its environment for compiling (debug, instrumentation) stays as it was at that first launch. In
    the interpreter every launch is Triton's own. TypeError if an argument is missing, unknown, or neither a tensor, None
    nor a plain number.
    """

    def __init__(self, kernel: Any, **bound: Any):
        self.kernel, self.bound = kernel, bound
        self.binaries: dict[tuple, triton.compiler.CompiledKernel] = {}
        self._compiled = isinstance(kernel, triton.runtime.JITFunction)
        if self._compiled:
            free = [p for p in kernel.params if p.name not in bound]
            self._names = [p.name for p in free]
            self._free = [(p.num, p.is_constexpr, not p.do_not_specialize, _aligned(p)) for p in free]
            self._args = [_passed(bound.get(name)) for name in kernel.arg_names]

    def __call__(self, grid: tuple[int, int, int], **free: Any) -> None:
        if not self._compiled:
            self.kernel[grid](**self.bound, **free)
            return
        device = driver.active.get_current_device()
        key, args = [device], self._args.copy()
        for (place, constant, specialized, aligned), x in zip(self._free, self._values(free), strict=True):
            if constant:
                key += type(x), x
            elif x is None:
                key.append(None)
            elif isinstance(x, torch.Tensor):
                # Passed as an address: for a tensor the driver is asked whose memory it is, at every launch. As
                # Triton's own launch has asked, a tensor from elsewhere must not have the key of one from here.
                address = x.data_ptr()
                key += x.dtype, x.get_device(), aligned and address % _DIVISOR == 0
                x = address
            elif type(x) is int:
                key.append((x < _I64) + (-_I32 <= x < _I32))
                if specialized:
                    key.append("1" if x == 1 else x % _DIVISOR == 0)
            elif type(x) in (bool, float):
                key.append(type(x))
            else:
                raise TypeError(f"{self.kernel.arg_names[place]}: {type(x).__name__} can only be bound")
            args[place] = x
        key = tuple(key)
        binary = self.binaries.get(key)
        if binary is None:
            self.binaries[key] = self.kernel[grid](**self.bound, **free)
        else:
            _start(binary, grid, device, args)

    def _values(self, free: dict[str, Any]) -> list[Any]:
        """In the kernel's order."""
        try:
            values = [free[name] for name in self._names]
        except KeyError as e:
            raise TypeError(f"argument {e} is missing: {self._names} are not bound") from None
        if len(free) > len(values):
            raise TypeError(f"arguments {sorted(free.keys() - set(self._names))}: only {self._names} are not bound")
        return values


def _aligned(param: Any) -> bool:
    return not (param.do_not_specialize or param.do_not_specialize_on_alignment)


def _passed(x: Any) -> Any:
    return x.data_ptr() if isinstance(x, torch.Tensor) else x


def _start(binary: triton.compiler.CompiledKernel, grid: tuple[int, int, int], device: int, args: list[Any]) -> None:
    """What ``binary[grid](*args)`` does, without describing a launch to no hooks."""
    stream = driver.active.get_current_stream(device)
    enter, leave = (_set(hook) for hook in (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook))
    described = None if enter is None else binary.launch_metadata(grid, stream, *args)
    binary.run(*grid, stream, binary.function, binary.packed_metadata, described, enter, leave, *args)


def _set(hook: Any) -> Any:
    """The hook, or None for a chain without one."""
    return hook if getattr(hook, "calls", True) else None
