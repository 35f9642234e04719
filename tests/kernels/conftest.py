from dataclasses import replace

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

from sglang_blockgtq.kernels.cuda import attention as cuda


@pytest.fixture(autouse=True)
def _poisoned(nan_poison):
    """Every kernel test runs on poisoned memory."""


@pytest.fixture(autouse=True)
def _by_triton(monkeypatch):
    """Decode attention is Triton's unless a test says otherwise, on any GPU."""
    monkeypatch.setattr(cuda, "CHOICE", "triton")


class _PatchedOnce:
    """In place of the interpreter's ``_patch_lang``, which goes through all of triton.language again for every function
    that a kernel calls: twice the time of everything else. Here it is done once a launch."""

    def __init__(self):
        self.plain, self.within = interpreter._patch_lang, False

    def __call__(self, fn):
        if self.within:
            return None
        # What a function finds triton.language in: its own is called tl, that of Triton's own functions core.
        both = type("Both", (), {"__globals__": {"tl": tl, "core": tl.core}})
        self.scope, self.within = self.plain(both), True
        return self

    def restore(self):
        self.within = False
        self.scope.restore()


def _rounded(plain):
    """In place of the interpreter's ``_convert_float``, which cuts float32 off where a GPU rounds it to bfloat16."""

    def convert(x, source, target, rounding_mode):
        if (source, target) != (tl.float32, tl.bfloat16):
            return plain(x, source, target, rounding_mode)
        return torch.tensor(x).bfloat16().view(torch.int16).numpy().view(np.uint16)

    return convert


@pytest.fixture(autouse=True)
def _swift(monkeypatch):
    """The interpreter without what it does in vain, and with a GPU's bfloat16."""
    if not torch.cuda.is_available():
        monkeypatch.setattr(interpreter, "_convert_float", _rounded(interpreter._convert_float))
        monkeypatch.setattr(interpreter, "_patch_lang", _PatchedOnce())
        # Each addition and product of integers in 64 bits beside it, for an assertion that it does not make.
        options = replace(interpreter.interpreter_builder.options, sanitize_overflow=False)
        monkeypatch.setattr(interpreter.interpreter_builder, "options", options)
        # After a launch it copies all memory that it was given to where it came from: here the same place.
        monkeypatch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *_: None)


@pytest.fixture
def overflow_is_an_error(monkeypatch, _swift):
    """For tests whose addresses do not fit 32 bits."""
    options = replace(interpreter.interpreter_builder.options, sanitize_overflow=True, debug=True)
    monkeypatch.setattr(interpreter.interpreter_builder, "options", options)


@pytest.fixture
def placeless_products(monkeypatch):
    """A product's row is rounded the same wherever it stands.

    The interpreter multiplies with numpy, whose BLAS on some processors sums a row in one order or another by its place
    in the tile. Summed in float64 and rounded once, that is not seen.
    """
    if torch.cuda.is_available():
        return

    def create_dot(a, b, d, input_precision, max_num_imprecise_acc):
        product = np.matmul(a.data, b.data, dtype=np.float64) + d.data
        return interpreter.TensorHandle(product.astype(d.data.dtype), d.dtype.scalar)

    monkeypatch.setattr(interpreter.interpreter_builder, "create_dot", create_dot)
