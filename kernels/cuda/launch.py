"""Functions of cubins, launched through the driver.

A launch costs the host little: arguments and configuration are two packed structs, written in place.
"""

from __future__ import annotations

import ctypes
import struct
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch

#: Dynamic shared memory that a function may have without being allowed it, with its static one.
_SHARED_BYTES = 48 * 1024

_THREADS = 32

#: CUlaunchConfig of cuda.h: grid, block, shared bytes, stream, attributes and how many of them count; padded.
_CONFIG = struct.Struct("@7IPPI0P")

#: CUlaunchAttribute of cuda.h: id, then a union of 64 bytes at byte 8. Here programmaticStreamSerializationAllowed = 1.
_ATTRIBUTE = struct.pack("@I4xi60x", 6, 1)

# CUfunction_attribute of cuda.h.
_STATIC_SHARED, _LOCAL, _REGISTERS, _MAX_DYNAMIC_SHARED = 1, 3, 4, 8

#: PyTorch's own, which it may take away: handle of a device's current stream.
_raw_stream: Any = getattr(torch._C, "_cuda_getCurrentRawStream", None)


def unavailable(device: torch.device) -> str | None:
    """Why kernels can't be launched on a device, or None if they can."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (9, 0):
        return f"{device} is no CUDA device of compute capability 9.0 or more"
    if _raw_stream is None:
        return f"PyTorch {torch.__version__} does not tell its current stream"
    try:
        _driver()
    except RuntimeError as error:
        return str(error)
    return None


@cache
def _driver() -> ctypes.CDLL:
    """The driver's library. RuntimeError if there is none, or an old one."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise RuntimeError(f"libcuda.so.1, the driver's library, is not available: {error}") from error
    if not hasattr(library, "cuLaunchKernelEx"):
        raise RuntimeError("the driver is too old: it has no cuLaunchKernelEx")
    return library


def _check(result: int, what: str) -> None:
    """RuntimeError with the driver's name of an error."""
    if result:
        name = ctypes.c_char_p()
        _driver().cuGetErrorName(result, ctypes.byref(name))
        raise RuntimeError(f"{what}: {name.value.decode() if name.value else f'CUDA error {result}'}")


@cache
def _primary(index: int) -> ctypes.c_void_p:
    """A device's primary context, which PyTorch uses; never given back."""
    torch.cuda.init()
    context = ctypes.c_void_p()
    _check(_driver().cuDevicePrimaryCtxRetain(ctypes.byref(context), index), f"context of cuda:{index}")
    return context


@contextmanager
def _context(index: int) -> Iterator[None]:
    """With the device's primary context as the current one."""
    _check(_driver().cuCtxPushCurrent_v2(_primary(index)), f"context of cuda:{index}")
    try:
        yield
    finally:
        _driver().cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))


class Arguments:
    """A kernel's arguments in one packed struct.

    types: a letter of :mod:`struct` for each, laid out as C does: P pointer, q and Q 64 bits with and without a sign,
    i and I 32 bits, f float32. ValueError for another letter.
    """

    def __init__(self, types: str) -> None:
        if other := set(types) - set("PqQiIf"):
            raise ValueError(f"types={types!r}: {''.join(sorted(other))!r} is none of P q Q i I f")
        self.types, packed = types, struct.Struct("@" + types)
        self.offsets = [struct.calcsize(f"@{types[:n]}0{letter}") for n, letter in enumerate(types)]
        self.sizes = [struct.calcsize(letter) for letter in types]
        self.values = ctypes.create_string_buffer(max(packed.size, 1))
        base = ctypes.addressof(self.values)
        #: Address of each, void* [arguments].
        self.addresses = (ctypes.c_void_p * max(len(types), 1))(*(base + offset for offset in self.offsets))
        self._pack = packed.pack_into

    def write(self, args: Sequence[int | float]) -> None:
        """TypeError unless there is one number for each type, and it fits."""
        try:
            self._pack(self.values, 0, *args)
        except struct.error as error:
            raise TypeError(f"arguments of the types {self.types!r}: {error}") from None


class Attributes(NamedTuple):
    """What a function takes: registers a thread, bytes of local memory a thread (spilled registers are there), bytes
    of static shared memory a block."""

    registers: int
    local_bytes: int
    shared_bytes: int


class Kernel:
    """A function of a cubin, loaded on a device, so that a captured graph may launch it from the first time on.

    It is launched with its device the current one.

    name: ``extern "C"``. types: of its parameters, see :class:`Arguments`. RuntimeError: the driver does not load it,
    or its parameters lie elsewhere.
    """

    def __init__(self, cubin: bytes, name: str, types: str, device: torch.device | int) -> None:
        index = device if isinstance(device, int) else device.index
        self.name, self.device = name, torch.cuda.current_device() if index is None else index
        self.arguments = Arguments(types)
        if _raw_stream is None:
            raise RuntimeError(f"PyTorch {torch.__version__} does not tell its current stream")
        library = _driver()
        self._module, self._function = ctypes.c_void_p(), ctypes.c_void_p()
        with _context(self.device):
            loaded = library.cuModuleLoadData(ctypes.byref(self._module), cubin)
            _check(loaded, f"loading the cubin of {name} on cuda:{self.device}")
            found = library.cuModuleGetFunction(ctypes.byref(self._function), self._module, name.encode())
            _check(found, f"function {name} of its cubin")
            if hasattr(library, "cuFuncLoad"):  # since CUDA 12.4; modules are loaded lazily
                _check(library.cuFuncLoad(self._function), f"loading {name} on cuda:{self.device}")
            self._check_parameters(library)
        #: Dynamic shared memory that a launch may ask for.
        self._dynamic = _SHARED_BYTES - self._attribute(_STATIC_SHARED)
        self._attributes = ctypes.create_string_buffer(_ATTRIBUTE, len(_ATTRIBUTE))
        self._attributes_at = ctypes.addressof(self._attributes)
        self._config = ctypes.create_string_buffer(_CONFIG.size)
        self._config_at = ctypes.byref(self._config)
        self._launch = library.cuLaunchKernelEx
        self._lock = threading.Lock()  # of what a launch writes its arguments to

    def _check_parameters(self, library: ctypes.CDLL) -> None:
        if not hasattr(library, "cuFuncGetParamInfo"):  # since CUDA 12.4
            return
        offset, size = ctypes.c_size_t(), ctypes.c_size_t()
        found: list[tuple[int, int]] = []
        info = library.cuFuncGetParamInfo
        info.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_void_p]
        while not info(self._function, len(found), ctypes.byref(offset), ctypes.byref(size)):
            found.append((offset.value, size.value))
        expected = list(zip(self.arguments.offsets, self.arguments.sizes, strict=True))
        if found != expected:
            raise RuntimeError(
                f"{self.name} has parameters at (offset, bytes) {found}, but types={self.arguments.types!r} "
                f"puts them at {expected}"
            )

    def launch(self, grid: tuple[int, int], shared_bytes: int, args: Sequence[int | float], *, dependent: bool) -> None:
        """On the current stream, with blocks of one warp.

        grid: blocks in x and y. shared_bytes: dynamic, a block. args: a number for each of the types, pointers as
        ``data_ptr()``. dependent: it may start while the kernel ahead ends (programmatic stream serialization), and
        waits for it by itself.

        TypeError: args do not fit the types. RuntimeError: the driver refuses.
        """
        x, y = grid
        with self._lock:
            self.arguments.write(args)
            if shared_bytes > self._dynamic:
                self._allow(shared_bytes)
            stream = _raw_stream(self.device)
            _CONFIG.pack_into(
                self._config, 0, x, y, 1, _THREADS, 1, 1, shared_bytes, stream, self._attributes_at, dependent
            )
            result = self._launch(self._config_at, self._function, self.arguments.addresses, None)
        if result:
            _check(result, f"launch of {self.name}, grid {x} x {y}, {shared_bytes} bytes of shared memory")

    def attributes(self) -> Attributes:
        """Registers and memory that it takes."""
        return Attributes(self._attribute(_REGISTERS), self._attribute(_LOCAL), self._attribute(_STATIC_SHARED))

    def occupancy(self, shared_bytes: int) -> int:
        """Blocks that a multiprocessor holds at a time. shared_bytes: dynamic, a block."""
        if shared_bytes > self._dynamic:
            self._allow(shared_bytes)
        blocks = ctypes.c_int()
        with _context(self.device):
            result = _driver().cuOccupancyMaxActiveBlocksPerMultiprocessor(
                ctypes.byref(blocks), self._function, _THREADS, ctypes.c_size_t(shared_bytes)
            )
        _check(result, f"occupancy of {self.name} with {shared_bytes} bytes of shared memory")
        return blocks.value

    def _attribute(self, attribute: int) -> int:
        value = ctypes.c_int()
        with _context(self.device):
            result = _driver().cuFuncGetAttribute(ctypes.byref(value), attribute, self._function)
        _check(result, f"attribute {attribute} of {self.name}")
        return value.value

    def _allow(self, shared_bytes: int) -> None:
        """More dynamic shared memory than a function has by itself."""
        with _context(self.device):
            result = _driver().cuFuncSetAttribute(self._function, _MAX_DYNAMIC_SHARED, shared_bytes)
        _check(result, f"{shared_bytes} bytes of shared memory for {self.name}")
        self._dynamic = shared_bytes
