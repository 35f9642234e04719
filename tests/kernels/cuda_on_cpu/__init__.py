"""A CUDA kernel's own text on a CPU: compiled as C++, its lanes as fibers, with a fault where a GPU would have one."""

from .emulator import Calls, Emulated, KernelFault, compile, missing

__all__ = ["Calls", "Emulated", "KernelFault", "compile", "missing"]
