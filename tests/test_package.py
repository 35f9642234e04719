"""What is installed: every folder with code in it, and a wheel that works by itself."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CODE = ("sglang_blockgtq", "kernels", "calibrate")


def installed_as(file: Path) -> str:
    """Where a file of the clone lies in the wheel."""
    path = file.relative_to(ROOT).as_posix()
    return path if path.startswith("sglang_blockgtq/") else f"sglang_blockgtq/{path}"


def test_the_package_says_the_version_of_the_project():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert f'__version__ = "{version}"' in (ROOT / "sglang_blockgtq" / "__init__.py").read_text()


def test_every_folder_is_a_listed_package():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {
        installed_as(file).rpartition("/")[0].replace("/", ".") for top in CODE for file in (ROOT / top).rglob("*.py")
    }
    assert sorted(found) == sorted(listed)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Made as ``python -m build --wheel`` makes it, of a copy: a build leaves files behind."""
    pytest.importorskip("setuptools", minversion="77")
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, source)
    for top in CODE:
        shutil.copytree(ROOT / top, source / top, ignore=shutil.ignore_patterns("__pycache__"))
    make = f"from setuptools import build_meta; build_meta.build_wheel({str(out)!r})"
    run = subprocess.run([sys.executable, "-c", make], cwd=source, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    (wheel,) = out.glob("*.whl")
    return wheel


def test_a_wheel_has_all_code_and_nothing_else(wheel):
    files = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    code = {installed_as(file) for top in CODE for file in (ROOT / top).rglob("*") if file.is_file()}
    assert files == {name for name in code if "__pycache__" not in name}


def test_a_wheel_is_typed_and_says_its_licence(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert all(f"sglang_blockgtq/{part}py.typed" in names for part in ("", "kernels/", "calibrate/"))
    assert {name.rpartition("/")[2] for name in names if ".dist-info/licenses/" in name} == {"LICENSE", "NOTICE"}


# What the extras plot and test bring counts as missing: a server needs none of it.
SAY = """
import json, pkgutil, sys
sys.modules |= dict.fromkeys(("matplotlib", "hypothesis", "mypy", "pytest"))
import sglang_blockgtq
from importlib.metadata import version
from sglang.srt.plugins import load_plugins
from sglang.srt.plugins.hook_registry import HookRegistry
load_plugins()
from sglang_blockgtq import calibrate, kernels
files = [x.__file__ for x in (sglang_blockgtq, calibrate, kernels)]
for module in pkgutil.walk_packages(sglang_blockgtq.__path__, "sglang_blockgtq."):
    if module.name.rpartition(".")[2] not in ("__main__", "fingerprint"):
        __import__(module.name)
print(json.dumps([files, version("sglang-blockgtq"), sorted(HookRegistry._hooks)]))
"""


def test_an_unpacked_wheel_registers_the_plugin_without_the_extras(wheel, tmp_path):
    target = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(target)
    env = {**os.environ, "PYTHONPATH": str(target), "PYTHONSAFEPATH": "1", "SGLANG_PLUGINS": "blockgtq"}
    run = subprocess.run([sys.executable, "-c", SAY], cwd=tmp_path, capture_output=True, text=True, env=env)
    assert run.returncode == 0, run.stderr
    files, version, hooks = json.loads(run.stdout.splitlines()[-1])
    assert all(Path(file).is_relative_to(target) for file in files)
    assert version == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert "sglang.srt.server_args.ServerArgs.from_cli_args" in hooks
