"""Exact keys and values of the last tokens of running requests, read by decode beside packed rows.

Copies are a request's own: position p of it lies at p modulo the places of its row. They begin with the first token of
its last prefill, whose launch notes the position; a decode step adds its token, and one that verifies a chain of drafts
all of them: those that are rejected are written over by the next. So a request never takes another one's copies for its
own, and nothing else has to know of them. From there a step's tokens are encoded, too, of all layers at a time
(:mod:`..encode.step`), for which that of a request without copies is kept behind all rows. Definition:
:func:`..reference.recent_step` and :func:`..reference.recent_attention`; where they are read: :mod:`.ahead`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import triton
import triton.language as tl

from .. import reference
from ..device.dependent import dependent, wait_and_release
from ..device.launch import Launch


@dataclass
class Recent:
    """Of all layers: L layers, R rows of copies with P places each, up to B requests of a step.

    top: the request index whose copies lie in row 0; a request r has row top - r, if that is one of R.
    window: tokens that a step's first query reads exactly, its own among them; each further one reads one more.
    P = window + queries - 1: so the tokens of a step lie beside those that its first query reads.
    room: requests of a step up to which each one's token is kept.
    first int32 ``[R]``: the position from which a row's copies are there. step int32 ``[4, B]``: of a decode step's
    requests the row or -1, the position of the token, how many tokens are exact, that one among them, and the place
    where it is kept, as if rows were one, or -1.
    k ``[L, R + S, P, H, D]``, v ``[L, R + S, P, H, Dv]``: S rows for the tokens of requests without one.
    all_bits int32 ``[B * queries]``: of queries that see every packed row of their request (:mod:`.tree`).
    """

    first: torch.Tensor
    step: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    all_bits: torch.Tensor
    window: int
    room: int
    top: int = 0

    @classmethod
    def of(
        cls,
        layers: int,
        rows: int,
        requests: int,
        window: int,
        heads: int,
        dim: int,
        v_dim: int,
        dtype: torch.dtype,
        device: torch.device | str,
        queries: int = 1,
    ) -> Recent:
        """queries: of each request in a step, at most."""
        ring = window + queries - 1
        held = layers, rows + triton.cdiv(rows, ring), ring, heads
        return cls(
            torch.zeros(rows, dtype=torch.int32, device=device),
            torch.full((4, requests), -1, dtype=torch.int32, device=device),
            torch.zeros(*held, dim, dtype=dtype, device=device),
            torch.zeros(*held, v_dim, dtype=dtype, device=device),
            torch.full((requests * queries,), -1, dtype=torch.int32, device=device),
            window,
            rows,
        )

    @property
    def ring(self) -> int:
        return self.k.shape[2]

    @property
    def queries(self) -> int:
        return self.ring - self.window + 1

    @property
    def rows(self) -> int:
        return len(self.first)

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in (self.first, self.step, self.k, self.v, self.all_bits))

    def bind(self, top: int) -> None:
        """Requests have the indices 1 to ``top`` from now on; 0 is nobody's, and has no copies."""
        if top < self.rows:
            held = top + self.k.shape[1] - self.rows
            self.first, self.k, self.v = self.first[:top], self.k[:, :held], self.v[:, :held]
        self.top = top

    def begin(self, requests: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """A step of requests ``[B]`` with lengths ``[B]``, their first queries' tokens counted: fills ``step`` by
        PyTorch and gives the counts ``[B]`` (:func:`.gather.gather_slots` does it on a GPU)."""
        step = reference.recent_step(self.first, self.top, self.window, self.ring, self.room, requests, lengths)
        self.step[:, : len(requests)] = torch.stack(step)
        return step[2]

    def layer(self, index: int) -> RecentLayer:
        return RecentLayer(self, self.k[index], self.v[index])


@dataclass(frozen=True)
class RecentLayer:
    """One layer's copies: k ``[R + S, P, H, D]``, v ``[R + S, P, H, Dv]``."""

    recent: Recent
    k: torch.Tensor
    v: torch.Tensor

    def remember(
        self,
        k: torch.Tensor,
        v: torch.Tensor,
        requests: torch.Tensor,
        prefix_lens: torch.Tensor,
        qo_indptr: torch.Tensor,
    ) -> None:
        """Of a prefill: copy the last tokens of each request, up to P, and note where its copies begin.

        k ``[T, H, D]``, v ``[T, H, Dv]``: new tokens, a request's one after another as qo_indptr ``[B + 1]`` says, and
        perhaps more. prefix_lens ``[B]``: tokens before them. requests ``[B]``: indices, of which those
        without a row are left out.
        """
        recent, batch = self.recent, len(requests)
        if not batch:
            return
        if not k.is_cuda and not triton.knobs.runtime.interpret:
            reference.remember(recent.first, recent.top, self.k, self.v, k, v, requests, prefix_lens, qo_indptr)
            return
        self._remember(
            (batch, recent.ring, 1),
            k=k,
            v=v,
            requests=requests,
            prefix_lens=prefix_lens,
            qo_indptr=qo_indptr,
            stride_kt=k.stride(0),
            stride_kh=k.stride(1),
            stride_vt=v.stride(0),
            stride_vh=v.stride(1),
        )

    @cached_property
    def _remember(self) -> Launch:
        _, ring, heads, dim = self.k.shape
        v_dim, chained = self.v.shape[3], dependent(self.k.device)
        return Launch(
            remember_kernel,
            first=self.recent.first,
            k_copies=self.k,
            v_copies=self.v,
            top=self.recent.top,
            rows=self.recent.rows,
            RING=ring,
            HEADS=heads,
            DIM=dim,
            V_DIM=v_dim,
            BLOCK=triton.next_power_of_2(heads),
            PADDED=triton.next_power_of_2(dim),
            V_PADDED=triton.next_power_of_2(v_dim),
            DEPENDENT=chained,
            launch_pdl=chained,
            num_warps=4,
        )

    def read(self, k: torch.Tensor, v: torch.Tensor, angles: torch.Tensor | None = None) -> RecentRead:
        """A step's own keys ``[B * q_len, H, D]`` and values ``[B * q_len, H, Dv]`` with the copies. angles: see
        :class:`RecentRead`."""
        return RecentRead(self, k, v, angles)


@dataclass(frozen=True)
class RecentRead:
    """What a decode step reads exactly of one layer, and keeps of its own tokens.

    angles float32 ``[B, R]``: cosines, then sines, of the step's tokens where their keys and queries are still without
    RoPE, of the first R channels; one query of each request. None: they have it.
    """

    copies: RecentLayer
    k: torch.Tensor
    v: torch.Tensor
    angles: torch.Tensor | None = None

    @property
    def all_bits(self) -> torch.Tensor:
        """int32 ``[B * q_len]``, see :class:`Recent`."""
        return self.copies.recent.all_bits[: len(self.k)]

    def check(self, requests: int, q_len: int, heads: int, dim: int, v_dim: int) -> None:
        """ValueError unless these are q_len tokens each of so many requests, and of heads of these sizes."""
        recent, tokens = self.copies.recent, requests * q_len
        held = *self.copies.k.shape[2:], self.copies.v.shape[3]
        if q_len > recent.queries:
            raise ValueError(f"recent: {q_len} tokens of a request, of up to {recent.queries}, for {q_len} queries")
        if self.k.shape != (tokens, heads, dim) or self.v.shape != (tokens, heads, v_dim):
            raise ValueError(
                f"recent: k {tuple(self.k.shape)} and v {tuple(self.v.shape)}: [{tokens}, {heads}, {dim}] and "
                f"[{tokens}, {heads}, {v_dim}] are needed, a token of each query"
            )
        if held != (heads, dim, v_dim) or recent.step.shape[1] < requests:
            room = recent.step.shape[1]
            raise ValueError(f"recent: copies of {held} heads and channels for {room} requests do not fit these rows")
        if self.k.stride(2) != 1 or self.v.stride(2) != 1:
            raise ValueError("recent: k and v: channels must be contiguous")
        if (angles := self.angles) is not None:
            if q_len > 1:
                raise ValueError(f"recent: angles are of steps with one query of a request, not {q_len}")
            fits = angles.dim() == 2 and len(angles) == tokens and angles.shape[1] % 2 == 0 < angles.shape[1] <= dim
            if not fits or angles.dtype != torch.float32 or not angles.is_contiguous():
                raise ValueError(
                    f"recent: angles {angles.dtype} {tuple(angles.shape)}: float32 [{tokens}, an even number of up to "
                    f"{dim} channels] is needed, contiguous"
                )


@triton.jit(do_not_specialize=["top", "rows"], do_not_specialize_on_alignment=["requests", "prefix_lens", "qo_indptr"])
def remember_kernel(
    k,
    v,
    requests,
    prefix_lens,
    qo_indptr,
    first,
    k_copies,
    v_copies,
    top,
    rows,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    RING: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    BLOCK: tl.constexpr,  # HEADS and up, a power of two
    PADDED: tl.constexpr,
    V_PADDED: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """A program takes the token that is ``back`` places before a request's last one."""
    request, back = tl.program_id(0), tl.program_id(1)
    wait_and_release(DEPENDENT)
    row = top - tl.load(requests + request).to(tl.int32)
    before = tl.load(prefix_lens + request).to(tl.int32)
    begin, end = tl.load(qo_indptr + request).to(tl.int64), tl.load(qo_indptr + request + 1).to(tl.int64)
    if (row >= 0) & (row < rows):
        if (back == 0) & (end > begin):
            tl.store(first + row, before)
        token = end - 1 - back
        if token >= begin:
            place = (before + (token - begin).to(tl.int32)) % RING
            head = tl.arange(0, BLOCK)[:, None]
            channel, v_channel = tl.arange(0, PADDED)[None, :], tl.arange(0, V_PADDED)[None, :]
            at = (row.to(tl.int64) * RING + place) * HEADS + head
            mask, v_mask = (head < HEADS) & (channel < DIM), (head < HEADS) & (v_channel < V_DIM)
            key = tl.load(k + token * stride_kt + head * stride_kh + channel, mask=mask)
            tl.store(k_copies + at * DIM + channel, key, mask=mask)
            value = tl.load(v + token * stride_vt + head * stride_vh + v_channel, mask=v_mask)
            tl.store(v_copies + at * V_DIM + v_channel, value, mask=v_mask)
