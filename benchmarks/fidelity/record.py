"""The record of where the numbers of a CSV come from."""

from __future__ import annotations

import argparse
import hashlib
import platform
import shlex
import subprocess
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch

from sglang_blockgtq.calibrate.model import config_hash
from sglang_blockgtq.calibrate.weights import weights_hash

from .run import Subject, default_text

PATHS = ("model_path", "out", "pictures", "text", "calibration_text")


def command_of(parser: argparse.ArgumentParser, args: argparse.Namespace) -> str:
    """The command line of all that is not a default. Absolute paths are reduced to names."""

    def shown(option: str, value: object) -> str:
        if option in PATHS:
            path = Path(str(value))
            value = path.name if path.is_absolute() else path.as_posix()
        return shlex.quote(f"{value:g}" if isinstance(value, float) else str(value))

    words = [parser.prog]
    for option, value in vars(args).items():
        if value != parser.get_default(option):
            values = [] if value is True else value if isinstance(value, list) else [value]
            words += [f"--{option.replace('_', '-')}", *(shown(option, x) for x in values)]
    return " ".join(words)


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
