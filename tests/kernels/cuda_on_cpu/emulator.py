"""Compiles a kernel's text behind ``emulator.h`` and launches it.

>>> kernel = compile(text, "decode")
>>> kernel.launch((splits, heads), shared_bytes, [packed, out, c_int(7), None])
"""

import ctypes
import hashlib
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

HERE = Path(__file__).parent
# Whole numbers wrap and memory that nothing was written to is poison. A pointer's alignment is checked by its type.
FLAGS = (
    "-std=c++17 -O1 -shared -fPIC -march=native -ffp-contract=off -fwrapv -fno-strict-aliasing -fvisibility=hidden "
    "-ftrivial-auto-var-init=pattern -fsanitize=alignment,bounds -fsanitize-undefined-trap-on-error "
    "-U_FORTIFY_SOURCE -Wno-unknown-pragmas -Wno-attributes"
).split()
MOST_PARAMETERS = 64
MOST_SHARED = 232448  # bytes a block can have on sm_90
KINDS = {"p": "a tensor, c_void_p or None", "f": "a ctypes float", "i": "a ctypes integer", "s": "a ctypes Structure"}


class KernelFault(RuntimeError):
    """What a GPU would stop with, hang on or answer with garbage; the message names block, lane and line."""


class Calls(NamedTuple):
    """How often a launch called these, each lane counted."""

    wait_ahead: int
    release_next: int
    prefetch_l2: int


class Buffer(ctypes.Structure):
    _fields_ = [("start", ctypes.c_void_p), ("bytes", ctypes.c_uint64)]


def missing() -> str | None:
    """Why a kernel cannot be compiled here, if so."""
    return None if shutil.which("g++") else "g++ is not installed"


@cache
def _folder() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="cuda_on_cpu_")  # its end is the process's


@cache
def compile(text: str, name: str, flags: tuple[str, ...] = ()) -> "Emulated":
    """``text`` has the kernel ``name``, and nothing of ``emulator.h``. Lines in messages are those of ``text``.

    Once a process for each text. Raises RuntimeError with the compiler's words."""
    key = hashlib.sha256(repr((text, name, flags)).encode()).hexdigest()[:16]
    source = Path(_folder().name) / f"{name}_{key}.cpp"
    source.write_text(f'#include "emulator.h"\n#line 1 "{name}"\n{text}\n#line 1 "launch"\nEMULATE({name})\n')
    library = source.with_suffix(".so")
    command = ["g++", *FLAGS, *flags, f"-I{HERE}", str(source), "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"g++ does not compile {name}:\n{done.stderr}")
    return Emulated(name, ctypes.CDLL(str(library)))


class Emulated:
    """A compiled kernel."""

    def __init__(self, name: str, library: ctypes.CDLL):
        self.name, self.library = name, library
        library.emulator_message.restype = ctypes.c_char_p
        kinds, sizes = ctypes.create_string_buffer(MOST_PARAMETERS), (ctypes.c_int * MOST_PARAMETERS)()
        count = library.emulator_parameters(kinds, sizes, MOST_PARAMETERS)
        if count > MOST_PARAMETERS:
            raise ValueError(f"{name} has {count} parameters, more than {MOST_PARAMETERS}")
        self.parameters = list(zip(kinds.raw[:count].decode(), sizes[:count], strict=True))

    def launch(
        self,
        grid: tuple[int, int],
        shared_bytes: int,
        args: Sequence[Any],
        tensors: Sequence[torch.Tensor] = (),
        backwards: bool = False,
    ) -> Calls:
        """Runs all blocks, one after another, with lanes that take turns from 0 up in even blocks (x + y) and from 31
        down in odd ones, or, ``backwards``, the other way round. A lane that reads shared memory before the meeting
        that it should wait for finds poison in one of the two.

        args: tensors on the CPU, ctypes values (Structures too) or None, as the parameters are.
        tensors: others that pointers within the arguments lead to. Asynchronous copies and prefetches must stay
        within one of all these tensors.

        Raises KernelFault, and TypeError if the arguments do not fit the parameters."""
        if len(args) != len(self.parameters):
            raise TypeError(f"{self.name} has {len(self.parameters)} parameters, not {len(args)}")
        if min(grid) < 1 or grid[1] > 65535 or not 0 <= shared_bytes <= MOST_SHARED:
            raise ValueError(
                f"{self.name}: no GPU launches a grid of {grid} with {shared_bytes} bytes of shared memory"
            )
        values = [_value(i, arg, *self.parameters[i]) for i, arg in enumerate(args)]
        pointers = (ctypes.c_void_p * max(len(values), 1))(*(ctypes.addressof(value) for value in values))
        held = [*(arg for arg in args if isinstance(arg, torch.Tensor)), *tensors]
        buffers = (Buffer * max(len(held), 1))(*(Buffer(tensor.data_ptr(), _extent(tensor)) for tensor in held))
        calls = (ctypes.c_uint64 * len(Calls._fields))()
        failed = self.library.emulator_run(*grid, shared_bytes, backwards, buffers, len(held), pointers, calls)
        if failed:
            raise KernelFault(f"{self.name}, {self.library.emulator_message().decode()}")
        return Calls(*calls)


def _value(index: int, arg: Any, kind: str, size: int) -> Any:
    """The argument as a ctypes value, of the parameter's kind and size."""
    if isinstance(arg, torch.Tensor):
        if arg.device.type != "cpu":
            raise TypeError(f"argument {index} is on {arg.device}: the emulator takes tensors on the CPU")
        value, its = ctypes.c_void_p(arg.data_ptr()), "p"
    elif arg is None or isinstance(arg, ctypes.c_void_p):
        value, its = arg or ctypes.c_void_p(), "p"
    elif isinstance(arg, ctypes.Structure):
        value, its = arg, "s"
    elif isinstance(arg, ctypes._SimpleCData):
        value, its = arg, "f" if isinstance(arg, (ctypes.c_float, ctypes.c_double)) else "i"
    else:
        raise TypeError(f"argument {index} is {arg!r}: give {KINDS[kind]} of {size} bytes")
    if (its, ctypes.sizeof(value)) != (kind, size):
        raise TypeError(f"argument {index} is {value!r}: the parameter takes {KINDS[kind]} of {size} bytes")
    return value


def _extent(tensor: torch.Tensor) -> int:
    """Bytes from a tensor's first element to its last."""
    if not tensor.numel():
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()
