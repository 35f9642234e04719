"""Exact keys and values of the last tokens of running requests, read by decode beside packed rows.

Copies are a request's own: position p of it lies at p modulo the window. They begin with the first token of its last
prefill, whose launch notes the position; a decode step adds its token. So a request never takes another one's copies
for its own, and nothing else has to know of them. From there a step's tokens are encoded, too, of all layers at a time
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
    """Of all layers: L layers, R rows of copies, up to B requests of a step, W tokens each.

    top: the request index whose copies lie in row 0; a request r has row top - r, if that is one of R.
    room: requests of a step up to which each one's token is kept.
    first int32 ``[R]``: the position from which a row's copies are there. step int32 ``[4, B]``: of a decode step's
    requests the row or -1, the position of the token, how many tokens are exact, that one among them, and the place
    where it is kept, as if rows were one, or -1.
    k ``[L, R + S, W, H, D]``, v ``[L, R + S, W, H, Dv]``: S rows for the tokens of requests without one.
    """

    first: torch.Tensor
    step: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
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
    ) -> Recent:
        held = layers, rows + triton.cdiv(rows, window), window, heads
        return cls(
            torch.zeros(rows, dtype=torch.int32, device=device),
            torch.full((4, requests), -1, dtype=torch.int32, device=device),
            torch.zeros(*held, dim, dtype=dtype, device=device),
            torch.zeros(*held, v_dim, dtype=dtype, device=device),
            rows,
        )

    @property
    def window(self) -> int:
        return self.k.shape[2]

    @property
    def rows(self) -> int:
        return len(self.first)

    @property
    def nbytes(self) -> int:
        return self.first.nbytes + self.step.nbytes + self.k.nbytes + self.v.nbytes

    def bind(self, top: int) -> None:
        """Requests have the indices 1 to ``top`` from now on; 0 is nobody's, and has no copies."""
        if top < self.rows:
            held = top + self.k.shape[1] - self.rows
            self.first, self.k, self.v = self.first[:top], self.k[:, :held], self.v[:, :held]
        self.top = top

    def begin(self, requests: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """A decode step of requests ``[B]`` with lengths ``[B]``, their tokens' own counted: fills ``step`` by PyTorch
        and gives the counts ``[B]`` (:func:`.gather.gather_slots` does it on a GPU)."""
        step = reference.recent_step(self.first, self.top, self.window, self.room, requests, lengths)
        self.step[:, : len(requests)] = torch.stack(step)
        return step[2]

    def layer(self, index: int) -> RecentLayer:
        return RecentLayer(self, self.k[index], self.v[index])


@dataclass(frozen=True)
class RecentLayer:
    """One layer's copies: k ``[R + S, W, H, D]``, v ``[R + S, W, H, Dv]``."""

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
        """Of a prefill: copy the last tokens of each request, up to W, and note where its copies begin.

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
            (batch, recent.window, 1),
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
        _, window, heads, dim = self.k.shape
        v_dim, chained = self.v.shape[3], dependent(self.k.device)
        return Launch(
            remember_kernel,
            first=self.recent.first,
            k_copies=self.k,
            v_copies=self.v,
            top=self.recent.top,
            rows=self.recent.rows,
            WINDOW=window,
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

    def read(self, k: torch.Tensor, v: torch.Tensor) -> RecentRead:
        """A decode step's own keys ``[B, H, D]`` and values ``[B, H, Dv]`` with the copies."""
        return RecentRead(self, k, v)


@dataclass(frozen=True)
class RecentRead:
    """What a decode step reads exactly of one layer, and keeps of its own tokens."""

    copies: RecentLayer
    k: torch.Tensor
    v: torch.Tensor

    @property
    def step(self) -> torch.Tensor:
        """int32 ``[4, B]``, see :class:`Recent`."""
        return self.copies.recent.step[:, : len(self.k)]

    def check(self, requests: int, heads: int, dim: int, v_dim: int) -> None:
        """ValueError unless these are of so many requests and of heads of these sizes."""
        held = *self.copies.k.shape[2:], self.copies.v.shape[3]
        if self.k.shape != (requests, heads, dim) or self.v.shape != (requests, heads, v_dim):
            raise ValueError(
                f"recent: k {tuple(self.k.shape)} and v {tuple(self.v.shape)}: [{requests}, {heads}, {dim}] and "
                f"[{requests}, {heads}, {v_dim}] are needed, a token of each request"
            )
        if held != (heads, dim, v_dim) or self.copies.recent.step.shape[1] < requests:
            room = self.copies.recent.step.shape[1]
            raise ValueError(f"recent: copies of {held} heads and channels for {room} requests do not fit these rows")
        if self.k.stride(2) != 1 or self.v.stride(2) != 1:
            raise ValueError("recent: k and v: channels must be contiguous")


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
    WINDOW: tl.constexpr,
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
            place = (before + (token - begin).to(tl.int32)) % WINDOW
            head = tl.arange(0, BLOCK)[:, None]
            channel, v_channel = tl.arange(0, PADDED)[None, :], tl.arange(0, V_PADDED)[None, :]
            at = (row.to(tl.int64) * WINDOW + place) * HEADS + head
            mask, v_mask = (head < HEADS) & (channel < DIM), (head < HEADS) & (v_channel < V_DIM)
            key = tl.load(k + token * stride_kt + head * stride_kh + channel, mask=mask)
            tl.store(k_copies + at * DIM + channel, key, mask=mask)
            value = tl.load(v + token * stride_vt + head * stride_vh + v_channel, mask=v_mask)
            tl.store(v_copies + at * V_DIM + v_channel, value, mask=v_mask)
