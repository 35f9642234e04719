"""Values far beyond what calibration saw: their scales saturate, and what decode makes of them stays finite."""

from dataclasses import replace

import pytest
import torch

from sglang_blockgtq.kernels import reference
from sglang_blockgtq.kernels.any_layout import attention as any_layout
from sglang_blockgtq.kernels.any_layout.tables import AnyTables
from sglang_blockgtq.kernels.decode import kernel
from sglang_blockgtq.kernels.decode.attention import decode_attention
from sglang_blockgtq.kernels.encode import encoder
from sglang_blockgtq.kernels.format.codec import V_SCALE_MAX
from sglang_blockgtq.kernels.format.layout import gather_rows, scatter_rows

from .matrix import (
    DEVICE,
    LARGE,
    MEANS,
    PAGES,
    PRODUCT,
    TEMPLATE,
    TOLERANCE,
    Case,
    assert_same,
    data,
    encoder_of,
    over,
)

TOKENS = 5
OUTLIER = 2  # the token whose value is one
TIMES = 5000.0  # the values' rms in calibration
CASES = [TEMPLATE, PAGES, MEANS, PRODUCT, LARGE[0], LARGE[2], LARGE[8], LARGE[-1]]


def keys_and_values(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    d = data(case)
    k, v = d.k[:TOKENS], d.v[:TOKENS].clone()
    stored = torch.einsum("hd,hed->he", v[OUTLIER].double(), d.codec.v_in.double())
    v[OUTLIER] *= TIMES / stored.square().mean(-1, keepdim=True).sqrt().to(v.dtype)
    assert bool(v.isfinite().all())
    return k, v


def value_scales(case: Case, rows: torch.Tensor) -> torch.Tensor:
    """``[T, H]``."""
    return reference.scales_of(data(case).codec, rows)[..., -1]


@over(CASES)
def test_encode_stores_the_largest_scale(case, monkeypatch):
    """Exactly, as the reference does; 65504 would be what a float16 holds."""
    d, (k, v) = data(case), keys_and_values(case)
    slots = torch.arange(TOKENS, device=DEVICE)
    want = value_scales(case, reference.encode(d.codec, k, v, slots))
    for few in (0, 1 << 30):  # channels that go to the kernel for a few tokens
        monkeypatch.setattr(encoder, "FEW_CHANNELS", few)
        rows = torch.zeros_like(d.rows)
        encoder_of(d.tables, rows)(k, v, slots, slots)
        got = value_scales(case, gather_rows(d.codec.layout, rows, slots))
        for scales in (got, want):
            assert bool((scales[OUTLIER] == V_SCALE_MAX).all())
            assert bool((scales[torch.arange(TOKENS) != OUTLIER] < 10).all())
        if isinstance(d.tables, AnyTables):
            break


@over(CASES)
def test_decode_of_such_a_value_is_finite(case):
    """Alone, and among others with nearly all of the probability."""
    d, (k, v) = data(case), keys_and_values(case)
    slots = torch.arange(TOKENS, device=DEVICE)
    packed = reference.encode(d.codec, k, v, slots)
    rows = torch.zeros_like(d.rows)
    scatter_rows(d.codec.layout, rows, slots, packed)
    # Two requests: that token, and all of them; a query's product with its key is 1, and with the others 0.
    indptr, order = torch.tensor([0, 1, 1 + TOKENS], device=DEVICE), torch.tensor([OUTLIER, *range(TOKENS)])
    keys, _ = reference.decode(d.codec, packed, slots)
    q = torch.linalg.pinv(keys.permute(1, 0, 2).double())[..., OUTLIER].repeat_interleave(case.group, 0)
    q, sm_scale = q.expand(2, -1, -1).to(d.q.dtype), 12.0
    want = reference.decode_attention(d.codec, q, packed[order], indptr, sm_scale)
    assert float(want[0].abs().max()) > 500
    half = [replace(d.tables, levels=d.tables.half_levels)] if isinstance(d.tables, AnyTables) else []
    for tables in (d.tables, *half):  # a GPU's operands, in the interpreter too
        got = decode_attention(tables, q, rows, indptr, slots[order], sm_scale)
        assert bool(got[0].isfinite().all())
        assert_same(got, want, max(3e-3 if half else 0.0, TOLERANCE[DEVICE][case.dtype]))


@pytest.mark.parametrize("module", [kernel, any_layout])
def test_the_largest_scale_fits_what_decode_makes_of_it(module):
    """A probability of 1, lifted, times the scale: the interpreter holds in float32 what a GPU has in float16. The room
    above is what a probability exceeds 1 by where logits are large and rounded."""
    lifted = torch.tensor(1.02 * 2.0**module._LIFT.value, dtype=torch.float16)
    assert float(torch.tensor(V_SCALE_MAX).half()) == V_SCALE_MAX
    assert bool((lifted * torch.tensor(V_SCALE_MAX, dtype=torch.float16)).isfinite())
