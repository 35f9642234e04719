"""The CUDA decode kernel against the reference: on a GPU, and its own text on a CPU (cuda_on_cpu)."""

import ctypes
from functools import cache

import pytest
import torch

from sglang_blockgtq.kernels import reference
from sglang_blockgtq.kernels.cuda import attention as cuda
from sglang_blockgtq.kernels.cuda import source
from sglang_blockgtq.kernels.cuda.operands import MAX_BITS, integers_per_level, signed_bytes
from sglang_blockgtq.kernels.decode.attention import decode_attention
from sglang_blockgtq.kernels.decode.splits import num_splits
from sglang_blockgtq.kernels.device.tables import ColumnTables
from sglang_blockgtq.kernels.format.codebook import boundaries, codebook_table, levels
from sglang_blockgtq.kernels.terms import PLAIN, Terms

from . import cuda_on_cpu
from .matrix import (
    DEVICE,
    IN_COLUMNS,
    LARGE,
    MEAN_CASES,
    MEANS,
    OTHER_HEADS,
    TEMPLATE,
    TEMPLATES,
    Case,
    assert_same,
    data,
    decode_queries,
    make_codec,
    over,
    relative_error,
)
from .test_attention import scratch_of, two_branches, with_q_len

_TYPES = {"P": ctypes.c_void_p, "i": ctypes.c_int, "f": ctypes.c_float}
TOLERANCE = {"float32": 3e-3, "float16": 3e-3, "bfloat16": 8e-3}


@cache
def expected(case: Case, q_len: int = 1, terms: Terms = PLAIN, tree: torch.Tensor | None = None):
    """The reference's answer from the numbers that bytes stand for."""
    d, q = data(case), decode_queries(case, q_len)
    levels = codebook_table(q.device)
    exact = levels.clone()
    for bits in range(1, MAX_BITS + 1):
        levels[bits, : 1 << bits] = torch.tensor(signed_bytes(bits)) / integers_per_level(bits)
    try:
        return reference.decode_attention(d.codec, q, d.packed, d.kv_indptr, d.sm_scale, q_len, terms, tree)
    finally:
        levels.copy_(exact)


@pytest.mark.parametrize("bits, error", [(1, 1e-6), (2, 1e-6), (3, 0.0014), (4, 0.0032)])
def test_bytes_stand_for_levels(bits, error):
    """Root mean squares over N(0, 1)."""
    exact = levels(bits)
    edges = boundaries(exact)
    x = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    code = torch.bucketize(x, edges)
    numbers = torch.tensor(signed_bytes(bits), dtype=torch.float64) / integers_per_level(bits)
    assert relative_error(numbers[code], exact[code]) < error


def served(cases: list[Case]) -> list[Case]:
    return [case for case in cases if case.v_bits <= 4 and case.allocator != "paper"]


class _OnCpu:
    """A compiled kernel in place of that of a GPU. tensors: all that it may read and write."""

    tensors: list[torch.Tensor] = []

    def __init__(self, shape: source.Shape, _device: torch.device):
        self.emulated = cuda_on_cpu.compile(source.source(shape), "decode")

    def launch(self, grid, shared_bytes, args, *, dependent):
        typed = [_TYPES[t](x or None) if t == "P" else _TYPES[t](x) for t, x in zip(cuda._TYPES, args, strict=True)]
        calls = self.emulated.launch(grid, shared_bytes, typed, self.tensors)
        assert calls.wait_ahead == calls.release_next > 0


@pytest.fixture(autouse=True)
def _emulated(monkeypatch):
    monkeypatch.setattr(cuda, "CHOICE", "cuda")
    if DEVICE == "cuda":
        return
    if reason := cuda_on_cpu.missing():
        pytest.skip(reason)
    monkeypatch.setattr(cuda, "device_lacks", lambda device: None)
    monkeypatch.setattr(cuda, "multiprocessors", lambda device: 3)
    monkeypatch.setattr(cuda, "kernel_of", _OnCpu)
    monkeypatch.setattr(cuda, "_launches", {})
    attend = cuda.attend

    def watched(tables, *args):
        mine = [x for x in (*vars(tables).values(), *args) if isinstance(x, torch.Tensor)]
        _OnCpu.tensors = mine + ([tables.means.stored] if tables.means else [])
        return attend(tables, *args)

    monkeypatch.setattr(cuda, "attend", watched)


def decode(case: Case, q_len: int = 1, target: int = 8, **options):
    d, q = data(case), decode_queries(case, q_len)
    assert cuda.lacks(d.tables) is None
    scratch = scratch_of(case, q_len, num_splits(len(case.lengths), target), torch.float16)
    return decode_attention(
        d.tables,
        q,
        d.rows,
        d.kv_indptr,
        d.kv_indices,
        d.sm_scale,
        q_len=q_len,
        target=target,
        scratch=scratch,
        **options,
    )


@pytest.mark.parametrize("choice, dim, v_bits, rows, expected", [
    ("auto", 128, 3, 4, True), ("auto", 128, 4, 1, True), ("auto", 256, 3, 8, True),
    ("auto", 128, 3, 5, False), ("auto", 256, 3, 9, False), ("auto", 64, 3, 4, False),
    ("auto", 128, 2, 4, False), ("auto", 128, 5, 4, False),
    ("cuda", 64, 2, 32, True), ("cuda", 128, 5, 4, False), ("triton", 128, 3, 4, False),
])  # fmt: skip
def test_which_kernel_serves(choice, dim, v_bits, rows, expected, monkeypatch):
    monkeypatch.setattr(cuda, "CHOICE", choice)
    monkeypatch.setattr(cuda, "device_lacks", lambda device: None)
    assert cuda.serves(ColumnTables.of(make_codec(Case("uniform", 3, v_bits, dim, 1, 2))), rows) is expected


@over(served([*IN_COLUMNS, *OTHER_HEADS, *LARGE]))
def test_decode_matches_reference(case):
    for target in (1, 8) if case not in LARGE else (1, 9, 1000, sum(case.lengths) + 5):
        assert_same(decode(case, target=target), expected(case), TOLERANCE[case.dtype])


def test_more_requests_than_lanes():
    """Their lengths do not fit a warp's registers; some are empty, and some are cut."""
    case = Case("template", 3, 3, 32, 1, 2, lengths=tuple(n % 3 * 17 for n in range(70)))
    for target in (70, 90):
        assert_same(decode(case, target=target), expected(case), TOLERANCE[case.dtype])


@with_q_len((TEMPLATE, 2), (TEMPLATE, 8), (TEMPLATES[1], 3), (MEANS, 4), (LARGE[0], 8), (LARGE[7], 3), (LARGE[8], 3))
def test_several_queries_of_a_request(case, q_len):
    assert_same(decode(case, q_len), expected(case, q_len), TOLERANCE[case.dtype])


@with_q_len((TEMPLATE, 12), (TEMPLATES[1], 3), (MEANS, 4), (LARGE[0], 32), (LARGE[8], 8))
def test_trees(case, q_len):
    tree = two_branches(case, q_len)
    for terms in (PLAIN, Terms(20, 2.0)):
        want = expected(case, q_len, terms, tree)
        assert_same(decode(case, q_len, tree=tree, terms=terms), want, 2 * TOLERANCE[case.dtype])


@with_q_len((TEMPLATE, 1), (MEAN_CASES[1], 1), (TEMPLATE, 3), (MEANS, 3), (LARGE[0], 1), (LARGE[8], 3))
def test_windows_and_caps(case, q_len):
    sinks = torch.linspace(-2, 3, case.heads * case.group, device=DEVICE)
    for terms in (Terms(1), Terms(70, 2.0, sinks), Terms(cap=0.5)):
        want = expected(case, q_len, terms)
        for target in (1, 8):
            assert_same(decode(case, q_len, terms=terms, target=target), want, 2 * TOLERANCE[case.dtype])
