"""AllocationTable: everything that turns keys and values of a model into rows, as one safetensors file."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from ..kernels.device.tables import templates_of
from ..kernels.format.codec import LayerCodec
from ..kernels.format.layout import CodeLayout, RowLayout, uniform_layout
from ..kernels.format.page_mean import PageMean
from ..kernels.layer import PackedLayer, TorchLayer, TritonLayer
from .files import file_problem
from .quality import Quality
from .rope import RopeBlocks
from .validate import TableError, check_fields, validate

FORMAT_VERSION = 4
AGAIN = "make it again with python -m sglang_blockgtq.calibrate"
_METADATA_KEY = "blockgtq"


@dataclass(frozen=True)
class TableHeader:
    """What a table was made for and how. Serialised as JSON in the file's metadata."""

    model_id: str  # the path or name the model was loaded from; informative
    config_hash: str  # see calibrate.model.config_hash; must match the served model
    text_hash: str  # sha256 of the calibration token ids
    tokens: int
    k_bits: float
    v_bits: float
    allocator: str
    scale_rule: str
    scale_search: tuple[float, ...]
    layers: int  # with keys and values, in the model's order; a hybrid model has others between them
    kv_heads: int
    head_dim: int
    v_head_dim: int
    rope: tuple[tuple[int, bool], ...]  # per layer (rotary_dim, neox)
    granularity: str = "segment"  # what gets a width of its own; "block" only for paper and product
    page: int = 0  # positions of a page of keys' means; 0: keys are coded as they are
    weights_hash: str = ""  # "" when the weights could not be fingerprinted
    quality: dict[str, Any] | None = None  # what it costs: fields of calibrate.quality.Quality; None: not measured
    format_version: int = FORMAT_VERSION
    table_hash: str = ""  # over all tensors and this header without the hash

    @property
    def kl(self) -> float | None:
        """Of the answer, nats a token; None where it was not measured."""
        return None if self.quality is None else self.quality["kl"]

    @property
    def bf16_bytes_per_token_head(self) -> int:
        """Of a key and a value that are not packed."""
        return 2 * (self.head_dim + self.v_head_dim)

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> TableHeader:
        """Raises TableError for another version and for missing or unknown fields; values are left to validate()."""
        try:
            data = json.loads(text)
        except ValueError as e:
            raise TableError(f"its header is not readable JSON ({e})") from None
        check_version(data)
        check_fields(data, [f.name for f in fields(cls)])
        return cls(**{name: _with_tuples(value) for name, value in data.items()})


def _with_tuples(value: Any) -> Any:
    return tuple(map(_with_tuples, value)) if isinstance(value, list) else value


def check_version(header: Any) -> None:
    """TableError for a header, as read from JSON, of another format version than this build's."""
    version = header.get("format_version") if isinstance(header, dict) else None
    if not isinstance(version, int) or isinstance(version, bool):
        raise TableError(f"its header has no format version ({version!r} is no whole number)")
    if version < FORMAT_VERSION:
        raise TableError(
            f"format version {version} holds other tensors than version {FORMAT_VERSION}, which this build reads"
        )
    if version > FORMAT_VERSION:
        raise TableError(
            f"format version {version} is of a newer sglang-blockgtq, this build reads version {FORMAT_VERSION}"
        )


@dataclass(frozen=True)
class AllocationTable:
    """Widths, channel order, rotations and gains of every layer and KV head.

    tensors (L layers, H KV heads of the whole model, B blocks, D head_dim):
        widths      [L, H, B] uint8    bits per channel of each RoPE block, by block index
        order       [L, H, B] int16    blocks in stored order, widest first
        norm_index  [L, H, D] uint8    which scale a stored channel uses
        group       [L, H, D] uint8    which rotation group a stored channel belongs to
        balance     [L, H, B] float32  factor on the key's block (the query's is divided by it)
        k_gain      [L, H, D] float32  static gain of each stored channel after rotation
        k_weight    [L, H, D] float32  energy of each transformed query channel (scale rule)
        v_gain      [L, H]    float32  static gain of the value vector
        rotation.N  [N, N]    float32  one rotation for every group of N channels
        v_rotation  [Dv, Dv]  float32
    and where header.page is not 0 (kernels.format.page_mean):
        mean        [L, H, B, 2] float32  of keys, at a page's first position, before RoPE; 0 in fast blocks
        theta       [L, B]    float64  radians a position of each block
    """

    header: TableHeader
    tensors: dict[str, torch.Tensor] = field(repr=False)

    @cached_property
    def v_layout(self) -> CodeLayout:
        return uniform_layout(self.header.v_head_dim, self.header.v_bits)

    def k_layout(self, layer: int, head: int) -> CodeLayout:
        """Code layout of one key head."""
        order = self.tensors["order"][layer, head].long()
        widths = self.tensors["widths"][layer, head][order].repeat_interleave(2)
        return CodeLayout(tuple(widths.tolist()), tuple(self.tensors["norm_index"][layer, head].tolist()))

    def row_layout(self, layer: int, heads: slice = slice(None)) -> RowLayout:
        """Row of one layer for a rank's KV heads. Sizes are maxima over all heads of the layer."""
        every = tuple(self.k_layout(layer, h) for h in range(self.header.kv_heads))
        full = RowLayout.of(every, self.v_layout)
        return RowLayout(every[heads], self.v_layout, full.k_code_bytes, full.k_norms)

    @cached_property
    def k_templates(self) -> tuple[CodeLayout, ...]:
        """The distinct layouts in columns of all key heads, in one order for every rank and layer."""
        shape = self.tensors["widths"].shape[:2]
        layouts = (self.k_layout(*at) for at in product(*map(range, shape)))
        return templates_of(layout for layout in layouts if layout.columns is not None)

    def bytes_per_token_head(self) -> float:
        """Mean over layers of bytes per token and KV head, scales included, row padding not."""
        return sum(self.row_layout(i).head_bytes for i in range(self.header.layers)) / self.header.layers

    def layer_codec(self, layer: int, heads: slice = slice(None)) -> LayerCodec:
        """Codec of one layer for a rank's KV heads (a slice of the model's heads)."""
        t, head = self.tensors, self.header
        rotary_dim, neox = head.rope[layer]
        pairs = RopeBlocks(head.head_dim, rotary_dim, neox).channels()
        row = self.row_layout(layer, heads)
        k_in, q_in = [], []
        for h in range(head.kv_heads)[heads]:
            order = t["order"][layer, h].long()
            channels = pairs[order].flatten()
            balance = t["balance"][layer, h][order].double().repeat_interleave(2)
            gain = t["k_gain"][layer, h].double()
            rotation = torch.zeros(head.head_dim, head.head_dim, dtype=torch.float64)
            start = 0
            for size in t["group"][layer, h].long().bincount().tolist():
                stop = start + size
                rotation[start:stop, start:stop] = t[f"rotation.{size}"].double()
                start = stop
            permuted = torch.zeros_like(rotation)
            permuted[:, channels] = rotation
            by_channel = torch.zeros_like(balance)
            by_channel[channels] = balance
            k_in.append(permuted * by_channel / gain[:, None])
            q_in.append(permuted / by_channel * gain[:, None])
        v_gain = t["v_gain"][layer, heads].double()[:, None, None]
        v_rotation = t["v_rotation"].double()
        return LayerCodec(
            layout=row,
            k_in=torch.stack(k_in).float(),
            q_in=torch.stack(q_in).float(),
            v_in=(v_rotation / v_gain).float(),
            v_out=(v_rotation.T * v_gain).float(),
            k_weight=t["k_weight"][layer, heads].clone(),
            scale_rule=head.scale_rule,
            scale_search=head.scale_search,
            mean=self.page_mean(layer, heads),
        )

    def page_mean(self, layer: int, heads: slice = slice(None)) -> PageMean | None:
        """Of one layer's keys, for a rank's KV heads."""
        t, head = self.tensors, self.header
        if not head.page:
            return None
        rotary_dim, neox = head.rope[layer]
        pairs = RopeBlocks(head.head_dim, rotary_dim, neox).channels()
        return PageMean(head.page, t["mean"][layer, heads], t["theta"][layer], pairs)

    def computed_hash(self) -> str:
        """sha256 over the header (without its hash) and every tensor's name, dtype, shape and bytes."""
        header = json.loads(self.header.to_json())
        header["table_hash"] = ""
        digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
        for name in sorted(self.tensors):
            tensor = self.tensors[name].contiguous()
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def sealed(self) -> AllocationTable:
        """The same table with its hash filled in."""
        header = TableHeader(**{**asdict(self.header), "table_hash": self.computed_hash()})
        return AllocationTable(header, self.tensors)

    def with_quality(self, quality: Quality | None) -> AllocationTable:
        """The same table with what it costs in its header, sealed."""
        found = None if quality is None else quality.to_dict()
        return replace(self, header=replace(self.header, quality=found)).sealed()

    def save(self, path: str | os.PathLike) -> None:
        """Write atomically: a reader sees the whole file or none. Raises OSError, and leaves nothing behind then."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        # Random, not a process id: machines and containers may share the folder.
        scratch = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
        contiguous = {name: tensor.contiguous() for name, tensor in self.tensors.items()}
        try:
            # Not safetensors' own writing of files, which leaves them readable to this user alone.
            scratch.write_bytes(save(contiguous, metadata={_METADATA_KEY: self.header.to_json()}))
            os.replace(scratch, path)
        finally:
            scratch.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike) -> AllocationTable:
        """Read and verify a table. Raises TableError naming the file, what is wrong with it, and what to do."""
        if problem := file_problem(path):
            raise TableError(f"table {path}: {problem}; make one with python -m sglang_blockgtq.calibrate")
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except (SafetensorError, OSError) as e:
            raise TableError(f"table {path}: damaged or not a safetensors file ({e}); {AGAIN}") from e
        if _METADATA_KEY not in metadata:
            raise TableError(f"table {path}: a safetensors file, but not an allocation table; {AGAIN}")
        try:
            table = cls(TableHeader.from_json(metadata[_METADATA_KEY]), tensors)
            found = table.computed_hash()
            if found != table.header.table_hash:
                said = str(table.header.table_hash)[:12]
                raise TableError(f"contents hash to {found[:12]}, the header says {said}: it was changed or damaged")
            validate(table)
        except TableError as e:
            raise TableError(f"table {path}: {e}; {AGAIN}") from e
        return table


def layers_of(
    table: AllocationTable, heads: slice, layer_ids: Iterable[int], device: torch.device | str, positions: int
) -> dict[int, PackedLayer]:
    """Layers by id, for a rank's KV heads, all but their rows. positions: most that a request may have."""
    if torch.device(device).type != "cuda":
        return {i: TorchLayer(table.layer_codec(i, heads)) for i in layer_ids}
    # The whole model's templates, so that one binary of each kernel serves all layers.
    return {i: TritonLayer(table.layer_codec(i, heads), device, table.k_templates, positions) for i in layer_ids}
