"""CSV files, and the record of where their numbers come from."""

from __future__ import annotations

import csv
import hashlib
import platform
import subprocess
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch

from sglang_blockgtq.calibrate.model import config_hash
from sglang_blockgtq.calibrate.weights import weights_hash

from .run import Row, Subject, default_text


def write_csv(rows: Iterable[Row], path: Path, fields: Sequence[str]) -> None:
    """One line per row, six significant digits, empty where a column does not apply."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, fields, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})


def read_csv(path: Path) -> list[Row]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def commit() -> str:
    """Commit of the working tree, with ``-dirty`` where tracked or new files differ; "" outside git."""
    root = Path(__file__).resolve().parents[2]
    git = ["git", "-C", str(root)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changes = subprocess.run(
            [*git, "status", "--porcelain", "--", "kernels", "calibrate", "benchmarks/fidelity"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""
    return head + ("-dirty" if changes.strip() else "")


def sources(model_path: str, calibration_text: str | None, subject: Subject) -> dict:
    """Model and calibration, by name and hash."""
    return {
        "model": {
            "name": Path(model_path).name,
            "config_hash": config_hash(subject.model.config),
            "weights_hash": weights_hash(model_path),
            "dtype": "float32",
        },
        "calibration": {
            "text": Path(calibration_text).name if calibration_text else "pydoc_data.topics",
            "tokens": subject.moments.tokens,
            "ids_sha256": subject.calibration_hash,
        },
    }


def text_source(path: Path | None) -> dict[str, str]:
    """Name and hash of the evaluation text, None being the default."""
    data = (path or default_text()).read_bytes()
    return {
        "text": path.name if path else "sglang/test/long_prompt.txt",
        "sha256": hashlib.sha256(data).hexdigest(),
    }


def machine(device: str = "cpu") -> dict:
    """Versions, architecture and, if it is no CPU, what the figures were computed on."""
    # SGLang only brings the default evaluation text: a run without it has another.
    versions = {name: version(name) for name in ("torch", "transformers", "sglang") if find_spec(name)}
    out = {"versions": {"python": platform.python_version(), **versions}, "machine": platform.machine()}
    if torch.device(device).type == "cuda":
        out["device"] = torch.cuda.get_device_name(device)
    return out
