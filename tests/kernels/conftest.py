import numpy as np
import pytest
import torch
from triton.runtime import interpreter


@pytest.fixture(autouse=True)
def _poisoned(nan_poison):
    """Every kernel test runs on poisoned memory."""


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
