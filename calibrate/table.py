"""AllocationTable: everything that turns keys and values of a model into rows, as one safetensors file."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import product
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..kernels.codec import LayerCodec
from ..kernels.layout import CodeLayout, RowLayout, uniform_layout
from ..kernels.tables import templates_of
from .rope import RopeBlocks

FORMAT_VERSION = 2
_METADATA_KEY = "blockgtq"


class TableError(ValueError):
    """A table that cannot be used; the message says why and what would work."""


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
    layers: int
    kv_heads: int
    head_dim: int
    v_head_dim: int
    rope: tuple[tuple[int, bool], ...]  # per layer (rotary_dim, neox)
    granularity: str = "block"  # what gets a width of its own: "block", or for paper and product "slot"
    weights_hash: str = ""  # "" when the weights could not be fingerprinted
    format_version: int = FORMAT_VERSION
    table_hash: str = ""  # over all tensors and this header without the hash

    def to_json(self) -> str:
        values = asdict(self)
        if self.granularity == "block":
            del values["granularity"]  # so that tables from before there was a choice are what they were
        return json.dumps(values, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> TableHeader:
        data = json.loads(text)
        data["scale_search"] = tuple(data["scale_search"])
        data["rope"] = tuple((int(d), bool(neox)) for d, neox in data["rope"])
        return cls(**data)


@dataclass(frozen=True)
class AllocationTable:
    """Widths, channel order, rotations, codebooks and gains of every layer and KV head.

    tensors (L layers, H KV heads of the whole model, B blocks, D head_dim):
        widths      [L, H, B] uint8    bits per channel of each RoPE block, by block index
        order       [L, H, B] int16    blocks in stored order, widest first
        norm_index  [L, H, D] uint8    which scale a stored channel uses
        group       [L, H, D] uint8    which rotation group a stored channel belongs to
        balance     [L, H, B] float32  factor on the key's block (the query's is divided by it)
        k_gain      [L, H, D] float32  static gain of each stored channel after rotation
        k_weight    [L, H, D] float32  energy of each transformed query channel (scale rule)
        v_gain      [L, H]    float32  static gain of the value vector
        codebooks   [9, 256]  float32  row b: the 2^b levels
        rotation.N  [N, N]    float32  one rotation for every group of N channels
        v_rotation  [Dv, Dv]  float32
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
        """The distinct layouts of all key heads, in one order for every rank and layer."""
        shape = self.tensors["widths"].shape[:2]
        return templates_of(self.k_layout(*at) for at in product(*map(range, shape)))

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
            levels=t["codebooks"],
            scale_rule=head.scale_rule,
            scale_search=head.scale_search,
        )

    def computed_hash(self) -> str:
        """sha256 over the header (without its hash) and every tensor's name, dtype, shape and bytes."""
        header = json.loads(self.header.to_json())
        header["table_hash"] = ""
        digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
        for name in sorted(self.tensors):
            tensor = self.tensors[name].contiguous()
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def sealed(self) -> AllocationTable:
        """The same table with its hash filled in."""
        header = TableHeader(**{**asdict(self.header), "table_hash": self.computed_hash()})
        return AllocationTable(header, self.tensors)

    def save(self, path: str | os.PathLike) -> None:
        """Write atomically: a reader sees the whole file or none."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            contiguous = {name: tensor.contiguous() for name, tensor in self.tensors.items()}
            save_file(contiguous, scratch, metadata={_METADATA_KEY: self.header.to_json()})
            os.replace(scratch, path)
        finally:
            scratch.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike) -> AllocationTable:
        """Read and verify a table. Raises TableError naming the file and what is wrong with it."""
        if not Path(path).is_file():
            raise TableError(f"table {path}: no such file; make one with python -m sglang_blockgtq.calibrate")
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except (SafetensorError, OSError) as e:
            raise TableError(f"table {path}: damaged or not a safetensors file ({e}); make it again") from e
        if _METADATA_KEY not in metadata:
            raise TableError(f"table {path}: a safetensors file, but not an allocation table")
        try:
            version = json.loads(metadata[_METADATA_KEY]).get("format_version")
        except (ValueError, AttributeError) as e:
            raise TableError(f"table {path}: its header is not readable JSON ({e}); make it again") from e
        if version != FORMAT_VERSION:
            raise TableError(
                f"table {path}: format version {version}, this build reads version {FORMAT_VERSION}; "
                "make it again or install the matching sglang-blockgtq"
            )
        try:
            table = cls(TableHeader.from_json(metadata[_METADATA_KEY]), tensors)
        except (KeyError, TypeError, ValueError) as e:
            raise TableError(f"table {path}: its header is incomplete ({e!r}); make it again") from e
        found = table.computed_hash()
        if found != table.header.table_hash:
            raise TableError(
                f"table {path}: contents hash to {found[:12]}, the header says {table.header.table_hash[:12]}; "
                "the file was changed or damaged, make it again"
            )
        return table
