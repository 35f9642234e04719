"""What is installed: every folder with code in it."""

import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_every_folder_is_a_listed_package():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {
        ".".join(file.parent.relative_to(ROOT).parts)
        for top in ("sglang_blockgtq", "kernels", "calibrate")
        for file in (ROOT / top).rglob("*.py")
    }
    installed = {name if name.startswith("sglang_blockgtq") else f"sglang_blockgtq.{name}" for name in found}
    assert sorted(installed) == sorted(listed)
