"""Every command that the pages show is understood by the program that it names."""

from __future__ import annotations

import argparse
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("docs/notes/*.md")]
PROGRAMS = ("python ", "make ", "pip ", "pytest ")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def commands() -> list[str]:
    """Those of fenced blocks, line by line, and those in the text."""
    found: dict[str, None] = {}
    for page in PAGES:
        if page.name.startswith("quality_"):
            continue  # written by make quality
        text = page.read_text()
        fence = re.compile(r"^```(?:console|bash)?$(.*?)^```$", re.M | re.S)
        lines = [line for block in fence.findall(text) for line in block.replace("\\\n", " ").splitlines()]
        prose = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
        lines += [" ".join(words.split()) for words in re.findall(r"`([^`]+)`", prose)]
        for line in lines:
            line = line.strip().removeprefix("$ ").partition(" # ")[0]
            line = line.partition(" &")[0].partition(";")[0].replace("$c", "bf16").strip()
            if line.startswith(PROGRAMS):
                found[line] = None
    return list(found)


def test_there_are_commands():
    shown = commands()
    assert len(shown) > 30 and {line.split()[0] + " " for line in shown} == set(PROGRAMS)


class Understood(Exception):
    """The program has parsed its arguments and would begin."""


@pytest.mark.parametrize("line", commands(), ids=lambda line: line)
def test_the_program_understands(line, monkeypatch, tmp_path):
    program, *words = [word for word in shlex.split(line) if word != "..."]
    match program:
        case "make":
            asked = [*words, f"VENV={tmp_path}"]
            subprocess.run(["make", "-n", "-C", str(ROOT), *asked], check=True, stdout=subprocess.DEVNULL)
        case "pip":
            understand_pip(words)
        case "pytest":
            understand_pytest(words)
        case "python":
            monkeypatch.chdir(tmp_path)
            understand_python(words, monkeypatch)


def understand_pip(words: list[str]) -> None:
    """Of a package index nothing is asked: names, versions and extras are those of pyproject.toml."""
    project = PROJECT["project"]
    assert words[0] in ("install", "uninstall")
    for word in words[1:]:
        if word in ("-e", "-y"):
            continue
        name, _, extras = word.rstrip("]").partition("[")
        assert name == "." or name == project["name"] or name in project["dependencies"]
        assert set(filter(None, extras.split(","))) <= project["optional-dependencies"].keys()


def understand_pytest(words: list[str]) -> None:
    marks = {mark.partition(":")[0] for mark in PROJECT["tool"]["pytest"]["ini_options"]["markers"]}
    assert words[0] == "-m" and words[1] in marks and len(words) == 2


def understand_python(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    module, script = (words[1], None) if words[0] == "-m" else (None, ROOT / words[0])
    given = words[2:] if module else words[1:]
    if module == "sglang.launch_server":
        return understand_server(given)
    if script is not None and "argparse" not in script.read_text():
        assert set(given) <= set(re.findall(r"--[a-z]+", script.read_text()))  # a flag or none
        return None
    given = ["cpu" if word == "cuda" else word for word in given]  # there may be none here
    if not any(word.startswith("-") for word in given) and given[:1] != ["inspect"] or given == ["inspect"]:
        given = [*given, "--help"]  # named in a sentence, without what it needs
    parse = argparse.ArgumentParser.parse_args

    def only_parse(self, args=None, namespace=None):
        parse(self, args, namespace)
        raise Understood

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", only_parse)
    monkeypatch.setattr(sys, "argv", [str(script or module), *given])
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True) if module else runpy.run_path(
            str(script), run_name="__main__"
        )
    except Understood:
        pass
    except SystemExit as end:
        assert end.code == 0 and "--help" in given


def understand_server(words: list[str]) -> None:
    """SGLang's own parser with the plugin's options, whose values are checked as at a start."""
    from sglang.srt.server_args import ServerArgs

    from sglang_blockgtq import options

    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    if "--kv-quant" not in parser._option_string_actions:  # as long as nothing has loaded the plugin
        options.add_cli_args(parser)
    args = parser.parse_args(words if "--model-path" in words else ["--model-path", "MODEL", *words])
    asked = {name: getattr(args, name, None) for name in options.FLAGS if name != "kv_quant_table"}
    assert options.parse(asked) is not None


def test_server_options_of_the_manual_exist():
    """What the pages about serving call an option, a program of SGLang's or of this project has."""
    from sglang.srt.server_args import ServerArgs

    from sglang_blockgtq import options

    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    if "--kv-quant" not in parser._option_string_actions:
        options.add_cli_args(parser)
    known = set(parser._option_string_actions)
    others = {"--device", "--dtype", "--help", "--revision", "--png", "--write-docs", "--allocator", "--granularity"}
    others |= {"--out", "--k-bits", "--v-bits"}  # of calibrate and benchmarks.compatibility
    for name in ("README.md", "docs/using.md", "docs/features.md", "docs/compatibility.md", "docs/structure.md"):
        told = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", (ROOT / name).read_text()))
        unknown = {option.rstrip("-") for option in told - known - others if option.rstrip("-") not in known}
        assert not unknown, f"{name}: {unknown}"
