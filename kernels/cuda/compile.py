"""CUDA C to a cubin: NVRTC, and a folder of cubins on disk.

PyTorch brings NVRTC and loads it; no toolkit, no headers and no compiler are needed.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import uuid
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import torch
from triton import knobs

#: Lines of NVRTC's log that an error shows.
_LOG_LINES = 20


def unavailable() -> str | None:
    """Why nothing can be compiled here, or None if it can."""
    try:
        _nvrtc()
    except RuntimeError as error:
        return str(error)
    return None


def joined(texts: Mapping[str, str]) -> str:
    """One text of several, by their names, in order. Errors name the text and the line in it."""
    return "".join(f'#line 1 "{name}"\n{text}\n' for name, text in texts.items())


def compile(
    text: str,
    name: str,
    *,
    defines: Mapping[str, int | str] | None = None,
    capability: tuple[int, int] | None = None,
    registers: int | None = None,
    options: Sequence[str] = (),
) -> bytes:
    """The cubin of a CUDA C text, from the cache folder or compiled.

    name: what errors call the text. defines: macros and their values. capability: of the device, its current one by
    default. registers: at most so many a thread; NVRTC ignores it where there are launch bounds, as in
    KERNEL (define MIN_BLOCKS). options: more of NVRTC's.

    RuntimeError: NVRTC is not there, or does not compile the text; then with the beginning of its log.
    """
    major, minor = torch.cuda.get_device_capability() if capability is None else capability
    every = [f"--gpu-architecture=sm_{major}{minor}{'a' if major >= 9 else ''}", "--std=c++17", "--disable-warnings"]
    every += [f"--define-macro={macro}={value}" for macro, value in (defines or {}).items()]
    every += [] if registers is None else [f"--maxrregcount={registers}"]
    every += options
    key = hashlib.sha256("\0".join([text, name, *every, *map(str, _nvrtc_version())]).encode()).hexdigest()
    path = Path(knobs.cache.dir, "blockgtq", f"{key}.cubin")
    cubin = _read(path)
    if cubin is None:
        cubin = _build(text, name, every)
        _write(path, cubin)
    return cubin


def _read(path: Path) -> bytes | None:
    """What _write wrote; None if it is not there or not whole."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    cubin, digest = data[:-32], data[-32:]
    return cubin if hashlib.sha256(cubin).digest() == digest else None


def _write(path: Path, cubin: bytes) -> None:
    """The cubin and its sha256 behind it, which tools for cubins do not mind. A folder that cannot be written is left:
    the next start compiles again."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.{uuid.uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(cubin + hashlib.sha256(cubin).digest())
        os.replace(partial, path)
    except OSError:
        try:
            partial.unlink(missing_ok=True)
        except OSError:
            pass


@cache
def _nvrtc() -> ctypes.CDLL:
    """NVRTC as PyTorch has loaded it. RuntimeError if there is none."""
    if torch.version.cuda is None:
        raise RuntimeError(f"NVRTC is not available: PyTorch {torch.__version__} is built without CUDA")
    name = f"libnvrtc.so.{torch.version.cuda.split('.')[0]}"
    try:
        return ctypes.CDLL(name)
    except OSError as error:
        raise RuntimeError(f"NVRTC, {name} of the package nvidia-cuda-nvrtc, is not available: {error}") from error


@cache
def _nvrtc_version() -> tuple[int, int]:
    major, minor = ctypes.c_int(), ctypes.c_int()
    _check_nvrtc(_nvrtc().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
    return major.value, minor.value


def _check_nvrtc(result: int) -> None:
    if result:
        named = _nvrtc().nvrtcGetErrorString
        named.restype = ctypes.c_char_p
        raise RuntimeError(f"NVRTC: {named(result).decode()}")


def _build(text: str, name: str, options: Sequence[str]) -> bytes:
    """Compile with NVRTC."""
    library, program, size = _nvrtc(), ctypes.c_void_p(), ctypes.c_size_t()
    created = library.nvrtcCreateProgram(ctypes.byref(program), text.encode(), f"{name}.cu".encode(), 0, None, None)
    _check_nvrtc(created)
    try:
        given = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        if library.nvrtcCompileProgram(program, len(given), given):
            _check_nvrtc(library.nvrtcGetProgramLogSize(program, ctypes.byref(size)))
            log = ctypes.create_string_buffer(size.value)
            _check_nvrtc(library.nvrtcGetProgramLog(program, log))
            lines = [line for line in log.value.decode(errors="replace").splitlines() if line.strip()]
            raise RuntimeError("\n".join([f"NVRTC does not compile {name}:", *lines[:_LOG_LINES]]))
        _check_nvrtc(library.nvrtcGetCUBINSize(program, ctypes.byref(size)))
        cubin = ctypes.create_string_buffer(size.value)
        _check_nvrtc(library.nvrtcGetCUBIN(program, cubin))
        return cubin.raw
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))
