"""A layer of the cache as one object: its layout, its rows, and what writes and reads them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from functools import partial
from itertools import pairwise

import torch

from . import reference
from .any_layout.encode import AnyEncoder
from .any_layout.tables import AnyTables
from .decode.attention import DecodeScratch, decode_attention
from .decode.recent import RecentRead
from .device.tables import MAX_POSITIONS, ColumnTables, difference, overwrite
from .encode.encoder import Encoder
from .format.codec import LayerCodec
from .format.layout import CodeLayout, gather_rows, num_slots, scatter_rows
from .host.decode import HostReader
from .host.encode import MOST_TOKENS, HostEncoder
from .terms import PLAIN, Terms
from .unpack.task import UnpackTask
from .unpack.unpacker import Unpacker


class PackedLayer(ABC):
    """Rows ``[slots, row_bytes]`` uint8 of one layer. T tokens, H KV heads, Hq query heads, D and Dv channels.

    Made before the cache is sized, with everything but its rows; :meth:`bind` gives it those.
    """

    rows: torch.Tensor
    interleaved = False  # rows of neighbouring slots; else they lie one after another

    def __init__(self, codec: LayerCodec):
        self.layout = codec.layout
        self.heads, self.head_dim, self.v_head_dim = codec.layout.heads, codec.head_dim, codec.v_head_dim
        self.has_means = codec.mean is not None

    @property
    @abstractmethod
    def table_bytes(self) -> int:
        """Bytes of everything but the rows."""

    def new_rows(self, slots: int, device: torch.device | str) -> torch.Tensor:
        """Zeros for at least ``slots`` slots: what pads a batch reads slot 0, where a NaN scale would spread."""
        return torch.zeros(num_slots(slots), self.layout.row_bytes, dtype=torch.uint8, device=device)

    def bind(self, rows: torch.Tensor) -> None:
        """Write to and read from ``rows`` of :meth:`new_rows` from now on."""
        self.rows = rows

    def unbind(self) -> None:
        """Let go of the rows."""
        del self.rows

    @abstractmethod
    def differs(self, other: PackedLayer) -> str:
        """Why this layer cannot :meth:`adopt` what ``other`` has; "" where it can."""

    @abstractmethod
    def adopt(self, other: PackedLayer) -> None:
        """Write and read rows by ``other``'s tables from now on. What was written before can't be read any more.

        Whatever a captured graph reads stays where it is.
        """

    @abstractmethod
    def encode(
        self,
        k: torch.Tensor,
        v: torch.Tensor,
        loc: torch.Tensor,
        positions: torch.Tensor | None = None,
        q: torch.Tensor | None = None,
    ) -> torch.Tensor | None:
        """Post-RoPE keys ``[T, H, D]`` and values ``[T, H, Dv]`` into the rows ``loc [T]``.

        positions ``[T]``: the tokens', needed where keys have page means. The step's queries ``q [T, Hq, D]`` may be
        rotated in the same launch: then they are returned, for decode.
        """

    @abstractmethod
    def decode(
        self,
        q: torch.Tensor,
        kv_indptr: torch.Tensor,
        kv_indices: torch.Tensor,
        sm_scale: float,
        *,
        q_len: int = 1,
        tree: torch.Tensor | None = None,
        terms: Terms = PLAIN,
        rotated: torch.Tensor | None = None,
        recent: RecentRead | None = None,
        scratch: DecodeScratch | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention ``[B * q_len, Hq, Dv]`` of q_len queries ``q [B * q_len, Hq, D]`` per request over the rows of its
        slots, their own the last. tree, recent: see :func:`.decode.attention.decode_attention`."""

    @abstractmethod
    def dense(
        self, slots: torch.Tensor, positions: torch.Tensor | None = None, dtype: torch.dtype = torch.float32
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys ``[N, H, D]`` and values ``[N, H, Dv]`` that the rows at ``slots [N]``, of ``positions [N]``, hold."""

    @abstractmethod
    def gather(self, slots: torch.Tensor) -> torch.Tensor:
        """Rows ``[N, row_bytes]`` at ``slots [N]``, bytes in a row's own order."""

    @abstractmethod
    def scatter(self, slots: torch.Tensor, rows: torch.Tensor) -> None:
        """Write ``rows [N, row_bytes]``, bytes in a row's own order, at ``slots [N]``."""


class TritonLayer(PackedLayer):
    """Rows that Triton kernels read: in columns and interleaved where they can be, else of any layout."""

    def __init__(
        self,
        codec: LayerCodec,
        device: torch.device | str,
        templates: tuple[CodeLayout, ...],
        positions: int = MAX_POSITIONS,
    ):
        """templates: layouts of the whole model's keys, so that one binary of each kernel serves all layers.
        positions: most that a request may have.
        """
        super().__init__(codec)
        self.fast = self.interleaved = codec.layout.in_columns
        of_columns = partial(ColumnTables.of, templates=templates, positions=positions)
        self.tables = of_columns(codec, device) if self.fast else AnyTables.of(codec, device)
        self.unpacker = Unpacker(self.tables)

    @property
    def table_bytes(self) -> int:
        return self.tables.nbytes + self.unpacker.nbytes

    def bind(self, rows: torch.Tensor) -> None:
        super().bind(rows)
        tables = self.tables
        self.encoder = Encoder(tables, rows) if isinstance(tables, ColumnTables) else AnyEncoder(tables, rows)
        self.unpacker.bind(rows)

    def unbind(self) -> None:
        super().unbind()
        del self.encoder
        self.unpacker.unbind()

    def _parts(self):
        return self.tables, self.unpacker.k, self.unpacker.v

    def differs(self, other):
        pairs = zip(self._parts(), other._parts(), strict=True)
        return next((name for mine, theirs in pairs if (name := difference(mine, theirs))), "")

    def adopt(self, other):
        for mine, theirs in zip(self._parts(), other._parts(), strict=True):
            overwrite(mine, theirs)

    def encode(self, k, v, loc, positions=None, q=None):
        encoder = self.encoder
        if isinstance(encoder, AnyEncoder):
            encoder(k, v, loc, positions)
            return None
        rotated = None if q is None else torch.empty(q.shape, dtype=torch.float32, device=q.device)
        encoder(k, v, loc, positions, q, rotated)
        return rotated

    def decode(self, q, kv_indptr, kv_indices, sm_scale, **options):
        return decode_attention(self.tables, q, self.rows, kv_indptr, kv_indices, sm_scale, **options)[0]

    def dense(self, slots, positions=None, dtype=torch.float32):
        k = torch.empty(len(slots), self.heads, self.head_dim, dtype=dtype, device=self.rows.device)
        v = torch.empty(len(slots), self.heads, self.v_head_dim, dtype=dtype, device=self.rows.device)
        self.unpacker(UnpackTask(slots, k, v, positions=positions))
        return k, v

    def gather(self, slots: torch.Tensor) -> torch.Tensor:
        return gather_rows(self.layout, self.rows, slots.long())

    def scatter(self, slots: torch.Tensor, rows: torch.Tensor) -> None:
        scatter_rows(self.layout, self.rows, slots.long(), rows)


class TorchLayer(PackedLayer):
    """Rows one after another, written and read by PyTorch: for hosts without a GPU."""

    def __init__(self, codec: LayerCodec):
        super().__init__(codec)
        self.codec = codec
        self.reader = HostReader(codec) if codec.layout.in_columns else None
        self.encoder = HostEncoder(codec) if codec.layout.in_columns else None

    def differs(self, other):
        mine, theirs = self.layout.row_bytes, other.layout.row_bytes
        return "" if mine == theirs else f"{theirs} bytes, not {mine}"

    def adopt(self, other):
        self.codec, self.reader, self.encoder = other.codec, other.reader, other.encoder
        self.layout, self.has_means = other.layout, other.has_means

    @property
    def table_bytes(self) -> int:
        return sum(x.nbytes for x in vars(self.codec).values() if isinstance(x, torch.Tensor))

    def encode(self, k, v, loc, positions=None, q=None):
        if self.encoder is not None and len(k) <= MOST_TOKENS:
            rows = self.encoder(k, v, positions)
        else:
            rows = reference.encode(self.codec, k, v, positions)
        self.scatter(loc, rows)

    def decode(
        self,
        q,
        kv_indptr,
        kv_indices,
        sm_scale,
        *,
        q_len=1,
        tree=None,
        terms=PLAIN,
        rotated=None,
        recent=None,
        scratch=None,
        out=None,
    ):
        """kv_indices: also a slice, of one request's neighbouring slots."""
        rows = self.gather(kv_indices)
        if recent is not None:
            return self._decode_beside(recent, q, rows, kv_indptr, sm_scale, terms, q_len)
        if self.reader is None:
            options = {"q_len": q_len, "terms": terms, "tree": tree}
            return reference.decode_attention(self.codec, q, rows, kv_indptr, sm_scale, **options)[0].to(q.dtype)
        out = q.new_empty(*q.shape[:2], self.v_head_dim) if out is None else out
        for i, which in enumerate(reference.seen_rows(kv_indptr, q_len, tree)):
            seen = rows[which]
            out[i] = self.reader.attend(q[i], seen, sm_scale, terms) if len(seen) else 0
        return out

    def _decode_beside(self, recent, q, rows, kv_indptr, sm_scale, terms, q_len):
        """The queries of each request over its packed rows and its exact tokens."""
        if (angles := recent.angles) is not None:
            q, k = reference.apply_rope(q, angles), reference.apply_rope(recent.k, angles)
            recent = replace(recent, k=k, angles=None)
        copies, plain = recent.copies, replace(terms, sinks=None)
        own = recent.k, recent.v, copies.k, copies.v, copies.recent.step[:, : len(kv_indptr) - 1]
        exact = reference.recent_attention(q, *own, sm_scale, plain, q_len)
        if self.reader is None:
            options = {"q_len": q_len, "terms": plain, "tree": recent.all_bits}
            packed = reference.decode_attention(self.codec, q, rows, kv_indptr, sm_scale, **options)
        else:
            packed = (
                q.new_zeros(*q.shape[:2], self.v_head_dim, dtype=torch.float32),
                torch.full_like(exact[1], -torch.inf),
            )
            for request, (begin, end) in enumerate(pairwise(kv_indptr.tolist())):
                for i in range(request * q_len, (request + 1) * q_len) if begin < end else ():
                    packed[0][i], packed[1][i] = self.reader.attend_with_lse(q[i], rows[begin:end], sm_scale, plain)
        out, lse = reference.merge_states(*packed, *exact)
        return terms.with_sinks(out, lse).to(q.dtype)

    def dense(self, slots, positions=None, dtype=torch.float32):
        rows, read = self.gather(slots), self.reader.dense if self.reader else partial(reference.decode, self.codec)
        k, v = read(rows, positions)
        return k.to(dtype), v.to(dtype)

    def gather(self, slots: torch.Tensor | slice) -> torch.Tensor:
        """A slice of neighbouring slots costs no copy."""
        return self.rows[slots] if isinstance(slots, slice) else self.rows.index_select(0, slots)

    def scatter(self, slots: torch.Tensor, rows: torch.Tensor) -> None:
        self.rows[slots.long()] = rows
