"""Launching a Triton kernel again without asking again which binary it needs.

``kernel[grid](...)`` looks at every argument at every launch: types, alignments, values that it specialises on, the
compile-time constants. For kernels of 40 to 70 arguments, nearly all of them a layer's own tables or the same in all
layers of a step, that takes the host longer than a GPU needs for the work. Here the former are looked at once
(:class:`Launch`), the latter once a step (:class:`Arguments`), and at a launch only what is left.

What is asked of an argument is what Triton specialises on for CUDA (``specialize_impl`` of its JIT): dtype and, to 16
bytes, address of a tensor; type of an integer and whether it is 1 or a multiple of 16; neither of the latter where the
kernel declares ``do_not_specialize``. Equal answers mean an equal binary. Unequal ones may, too: Triton then finds it
again. What Triton asks, and how its binaries are started, belongs to no interface, so only the versions in
:data:`KNOWN` are treated so; with any other one every launch is Triton's own.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from functools import cache
from itertools import count
from typing import Any

import torch
import triton
from triton import knobs
from triton.runtime import driver

KNOWN = ("3.8",)  # versions of Triton, major and minor
_DIVISOR = 16  # of an address in bytes, or of an integer
_I32, _I64 = 1 << 31, 1 << 63
_numbers: dict[Hashable, int] = {}
_counter = count(1)


class Arguments:
    """Some arguments of ``kernel``, by name, looked at once for many launches.

    Tensors, None and plain numbers; compile-time constants, too. A tensor is kept alive, and read where it lay when
    this was made. TypeError for anything else.
    """

    def __init__(self, kernel: Any, **values: Any):
        self.kernel, self.values = kernel, values
        self.placed: list[tuple[int, Any]] = []
        self.answers = 0  # equal numbers, equal answers
        if _known(kernel):
            answers = _look(_questions(kernel), values, self.placed)
            self.answers = _numbers.setdefault((kernel, answers), next(_counter))


class Launch:
    """``kernel`` with some arguments bound; called with a grid of three and the others.

    bound: also the compiler's options (num_warps, num_stages, maxnreg), and constants of any type. A bound tensor is
    kept as in :class:`Arguments`. given: those looked at before, by whoever shares them between launches of this
    kernel; each of the others, given by name, costs some tenths of a microsecond a launch.

    The first launch for each set of answers is Triton's own, with its checks and its compiling; the others start the
    binary which that one returned, on the current device and stream and with the launch hooks that are set. What
    Triton takes from its environment for compiling (debug, instrumentation) stays as it was at that first launch. In
    the interpreter and with an unknown Triton every launch is Triton's own. It raises TypeError for arguments that are
    missing or given twice.
    """

    def __init__(self, kernel: Any, **bound: Any):
        self.kernel, self.bound = kernel, bound
        self.binaries: dict[tuple, triton.compiler.CompiledKernel] = {}
        self._none = Arguments(kernel)
        self._fast = _known(kernel)
        if self._fast:
            self._questions = _questions(kernel)
            self._args = [_passed(bound.get(name)) for name in kernel.arg_names]

    def __call__(self, grid: tuple[int, int, int], given: Arguments | None = None, **free: Any) -> None:
        given = given or self._none
        if given.kernel is not self.kernel:
            raise ValueError(f"arguments of {given.kernel}: those of {self.kernel} are needed")
        if not self._fast:
            self.kernel[grid](**self.bound, **given.values, **free)
            return
        placed = given.placed.copy()
        device = driver.active.get_current_device()
        key = device, given.answers, _look(self._questions, free, placed)
        binary = self.binaries.get(key)
        if binary is None:
            self.binaries[key] = self.kernel[grid](**self.bound, **given.values, **free)
            return
        args = self._args.copy()
        for place, x in placed:
            args[place] = x
        _start(binary, grid, device, args)


def _known(kernel: Any) -> bool:
    """Whether launches of this kernel can be started here: not in the interpreter, nor by an unknown Triton."""
    known = triton.__version__.startswith(tuple(f"{version}." for version in KNOWN))
    return known and isinstance(kernel, triton.runtime.JITFunction)


@cache
def _questions(kernel: triton.runtime.JITFunction) -> dict[str, tuple[int, bool, bool, bool]]:
    """Of each argument: its place, is it a constant, is its value specialised on, is its alignment."""
    return {
        p.name: (
            p.num,
            p.is_constexpr,
            not p.do_not_specialize,
            not (p.do_not_specialize or p.do_not_specialize_on_alignment),
        )
        for p in kernel.params
    }


def _look(questions: Mapping[str, tuple], values: Mapping[str, Any], placed: list[tuple[int, Any]]) -> tuple:
    """The answers for some arguments, which are put to their places."""
    answers: list[Any] = []
    for name, x in values.items():
        place, constant, specialized, aligned = questions[name]
        if constant:
            answers += name, type(x), x
        elif type(x) is int:
            # i32, i64 or u64; "1" because a dictionary takes 1 for True
            answers += name, (x < _I64) + (-_I32 <= x < _I32)
            if specialized:
                answers.append("1" if x == 1 else x % _DIVISOR == 0)
        elif isinstance(x, torch.Tensor):
            # Passed as an address: for a tensor the driver is asked whose memory it is, at every launch. As Triton's
            # own launch has asked, a tensor from elsewhere must not have the answers of one from here.
            address = x.data_ptr()
            answers += name, x.dtype, x.get_device(), aligned and address % _DIVISOR == 0
            x = address
        elif x is None or type(x) in (bool, float):
            answers += name, type(x)
        else:
            raise TypeError(f"{name}: {type(x).__name__} can only be bound to the launch")
        placed.append((place, x))
    return tuple(answers)


def _passed(x: Any) -> Any:
    return x.data_ptr() if isinstance(x, torch.Tensor) else x


def _start(binary: triton.compiler.CompiledKernel, grid: tuple[int, int, int], device: int, args: list[Any]) -> None:
    """What ``binary[grid](*args)`` does, without describing a launch to no hooks."""
    stream = driver.active.get_current_stream(device)
    enter, leave = _set(knobs.runtime.launch_enter_hook), _set(knobs.runtime.launch_exit_hook)
    described = None if enter is None else binary.launch_metadata(grid, stream, *args)
    binary.run(*grid, stream, binary.function, binary.packed_metadata, described, enter, leave, *args)


def _set(hook: Any) -> Any:
    """The hook, or None for a chain without one."""
    return hook if getattr(hook, "calls", True) else None
