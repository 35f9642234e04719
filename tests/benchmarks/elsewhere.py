"""A device that is not there: tensors on the CPU that claim to be on a GPU, and refuse to be mixed with others.

What PyTorch would refuse on a machine with a GPU is refused here: an operation between the two places, other than with
a number or by an index from the CPU. So a forgotten ``device=`` shows without a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.overrides import TorchFunctionMode

DEVICE = torch.device("cuda", 0)
CPU = torch.device("cpu")


def is_away(tensor: torch.Tensor) -> bool:
    return getattr(tensor, "_away", False)


def send(tensor: torch.Tensor) -> torch.Tensor:
    tensor._away = True
    return tensor


def send_module(module: torch.nn.Module) -> torch.nn.Module:
    for tensor in [*module.parameters(), *module.buffers()]:
        send(tensor)
    return module


def _tensors(value: object) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


class Elsewhere(TorchFunctionMode):
    """Within it, ``torch.device("cuda")`` can be asked for."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", str(func))
        if func == torch.Tensor.device.__get__:
            return DEVICE if is_away(args[0]) else CPU
        if func == torch.Tensor.is_cuda.__get__:
            return is_away(args[0])
        if func == torch.Tensor.numpy and is_away(args[0]):
            raise TypeError("numpy() of a tensor that is not on the CPU")
        place = None
        if kwargs.get("device") is not None:
            place = torch.device(kwargs.pop("device"))
        elif func == torch.Tensor.cpu:
            place = CPU
        elif func == torch.Tensor.to:
            kept = []
            for arg in args[1:]:
                if isinstance(arg, (str, torch.device)):
                    place = torch.device(arg)
                elif isinstance(arg, torch.Tensor):
                    place = DEVICE if is_away(arg) else CPU
                    kept.append(arg.dtype)
                else:
                    kept.append(arg)
            args = (args[0], *kept)
            if not kept and not kwargs:
                func, args = torch.Tensor.view_as, (args[0], args[0])
        every = list(_tensors([args, kwargs]))
        checked = every
        if name == "__getitem__":
            checked = [args[0], *(t for t in _tensors(args[1]) if is_away(t))]
        elif name == "__setitem__":
            checked = [args[0], *(t for t in _tensors(args[1]) if is_away(t)), *_tensors(args[2])]
        away = any(map(is_away, every))
        if place is None and any(map(is_away, checked)):
            here = [tuple(t.shape) for t in checked if t.dim() and not is_away(t)]
            if here:
                there = [tuple(t.shape) for t in checked if is_away(t)]
                raise RuntimeError(f"{name}: {here} on the CPU, {there} on {DEVICE}")
        out = func(*args, **kwargs)
        if place is not None and isinstance(out, torch.Tensor) and any(out is t for t in every):
            out = out.view_as(out)  # so that the original stays where it was
        if place.type == "cuda" if place is not None else away:
            for tensor in _tensors(out):
                send(tensor)
        return out
