"""The CSV and, beside it, the JSON that says how it was made."""

from __future__ import annotations

import csv
import datetime
import json
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from . import timing
from .cases import FIELDS, Row, fill_ratios

PACKAGES = ("torch", "triton", "flashinfer-python", "sglang-kernel", "sglang")
_MEASURED = ("kernels", "calibrate", "benchmarks/kernels")


class Table:
    """Rows, written to a file after each one, so that a run cut short leaves what it measured."""

    def __init__(self, path: Path):
        self.path, self.rows = path, []
        path.parent.mkdir(parents=True, exist_ok=True)

    def add(self, row: Row) -> None:
        self.rows.append(row)
        fill_ratios(self.rows)
        scratch = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        with scratch.open("w", newline="") as file:
            writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
            writer.writeheader()
            for r in self.rows:
                writer.writerow({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in r.fields().items()})
        scratch.replace(self.path)


def commit() -> str:
    """Commit of the working tree, with ``-dirty`` where measured files differ; "" outside git."""
    git = ["git", "-C", str(Path(__file__).resolve().parents[2])]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run(
            [*git, "status", "--porcelain", "--", *_MEASURED], capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""
    return head + ("-dirty" if changed.strip() else "")


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "cuda": torch.version.cuda or ""}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = ""
    return found


def provenance(arguments: list[str], head: str | None = None, program: str = "benchmarks.kernels") -> dict:
    """What someone needs to make the same file again."""
    gpu = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
    shown = [Path(a).as_posix() if not Path(a).is_absolute() else Path(a).name for a in arguments]
    return {
        "command": " ".join([f"python -m {program}", *shown]),
        "commit": head if head is not None else commit(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "gpu": gpu.name if gpu else "",
        "multiprocessors": gpu.multi_processor_count if gpu else 0,
        "versions": _versions(),
        "timing": {
            "us": f"median over {timing.MIN_REPLAYS} to {timing.MAX_REPLAYS} replays of a CUDA graph, per call",
            "data": f"a graph's calls read disjoint data, {timing.COLD_BYTES // 10**6} MB of them "
            f"or {timing.MAX_CALLS} calls, behind one index",
            "packed": "query's rotation, attention, merge of splits, output's rotation; scratch memory made once",
            "flashinfer": "BatchDecodeWithPagedKVCacheWrapper, tensor cores, planned once; fastest page size",
            "fa3": "flash_attn_with_kvcache, splits by its own rule, scheduler metadata made once; "
            "fastest page size; an fp8 query is cast beforehand",
            "encode": "bf16: fastest of the ways to write that cache; 64 tokens come from L2, as after a projection",
        },
    }


def write_json(out: Path, values: dict) -> None:
    out.with_suffix(".json").write_text(json.dumps(values, indent=2) + "\n")
