"""HiCache in a real server: a prefix that was pushed out comes back from host memory, or from files of another server,
and gives the same answer as from the cache. SGLang's transfer kernels are CUDA; here a plugin copies bytes for them.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from .test_radix import QUANTIZATION, SAME, mean_gap
from .test_windows import LIMIT as WINDOWS

pytestmark = pytest.mark.server

PLUGIN = Path(__file__).parent / "hicache_on_cpu"
PREFIX, SUFFIX, PAGE, POOL = 192, 32, 16, 560  # tokens; two other prompts push the first one out
OTHERS = (1500, 2400)


@pytest.fixture(scope="module")
def serve(launch):
    def start(*args: str, **more):
        path = os.pathsep.join(filter(None, (str(PLUGIN), os.environ.get("PYTHONPATH"))))
        return launch(
            "--dtype=float32",
            f"--page-size={PAGE}",
            f"--max-total-tokens={POOL}",
            "--enable-hierarchical-cache",
            "--enable-cache-report",
            *args,
            env={"PYTHONPATH": path},
            **more,
        )

    return start


def ask(server, ids: list[int]) -> tuple[list[float], dict]:
    """Log-probabilities behind the prefix, and where the prompt's cached tokens came from."""
    meta = server.generate(ids, logprob_start=PREFIX)["meta_info"]
    found = [lp for lp, *_ in meta["input_token_logprobs"] if lp is not None]
    came = meta.get("cached_tokens_details") or {}
    return found, {place: n for place, n in came.items() if isinstance(n, int) and n}


def push_out(server, token_ids) -> None:
    for start in OTHERS:
        server.generate(token_ids[start : start + 400])


def through_host(server, prompt, token_ids):
    """Log-probabilities of a prompt that is cold, cached, and pushed out again; and where it came from at last."""
    cold, came = ask(server, prompt)
    assert came == {}
    from_cache, came = ask(server, prompt)
    assert came == {"device": PREFIX}
    push_out(server, token_ids)
    from_host, came = ask(server, prompt)
    return cold, from_cache, from_host, came


@pytest.mark.parametrize(
    "flags",
    [
        ("--hicache-ratio=4", "--hicache-write-policy=write_back", "--hicache-io-backend=direct"),
        pytest.param(("--hicache-ratio=4",), marks=pytest.mark.long),
        pytest.param(
            ("--hicache-size=1", "--hicache-write-policy=write_through_selective", "--hicache-mem-layout=layer_first"),
            marks=pytest.mark.long,
        ),
    ],
    ids=["write_back", "write_through", "write_through_selective"],
)
def test_from_host_memory(serve, token_ids, flags):
    server = serve(*flags)
    prompt = token_ids[: PREFIX + SUFFIX]
    cold, from_cache, from_host, came = through_host(server, prompt, token_ids)
    assert came == {"host": PREFIX}
    again, came = ask(server, prompt)
    assert came == {"device": PREFIX}
    branch, came = ask(server, token_ids[:PREFIX] + token_ids[1000 : 1000 + SUFFIX])
    assert mean_gap(branch, cold) > 0.5
    server.stop()
    assert mean_gap(from_host, from_cache) < SAME and mean_gap(again, from_cache) < SAME
    assert mean_gap(from_cache, cold) < QUANTIZATION
    assert "HiCache" in server.log.read_text()


def stored(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir() if file.suffix == ".bin"}


@pytest.mark.long
def test_from_files_of_another_server(serve, token_ids, tmp_path):
    """Pages are written while the first server runs. A second with the same table reads them; one with another table
    finds none, and writes its own beside."""
    prompt = token_ids[: PREFIX + SUFFIX]
    flags = (
        "--hicache-ratio=2",
        "--hicache-storage-backend=file",
        f"--file-storage-path={tmp_path}",
        "--hicache-storage-prefetch-policy=wait_complete",
        '--hicache-storage-backend-extra-config={"prefetch_threshold": 16}',
    )
    first = serve(*flags)
    ask(first, prompt)
    from_cache, came = ask(first, prompt)
    assert came == {"device": PREFIX}
    deadline = time.monotonic() + 60
    while len(stored(tmp_path)) < len(prompt) // PAGE and time.monotonic() < deadline:
        time.sleep(0.2)
    table = first.info()["kv_quant"]["table_hash"]
    first.stop()
    pages = stored(tmp_path)
    assert len(pages) >= len(prompt) // PAGE and all(table[:16] in name for name in pages)

    second = serve(*flags)
    from_files, came = ask(second, prompt)
    assert came == {"storage": PREFIX}
    assert second.info()["kv_quant"]["table_hash"] == table
    second.stop()
    assert mean_gap(from_files, from_cache) < SAME

    other = serve(*flags, "--kv-quant-k-bits=4")
    assert other.info()["kv_quant"]["table_hash"] != table
    assert ask(other, prompt)[1] == {}
    other.stop()
    assert stored(tmp_path) > pages


@pytest.mark.long
def test_windows_in_a_pool_of_their_own(serve, mellum, token_ids):
    """Their keys and values, in 16 bits, go to host memory of their own beside the packed ones."""
    server = serve(
        "--hicache-ratio=4", "--kv-quant-k-bits=8", "--kv-quant-v-bits=8", "--max-total-tokens=576", model=mellum
    )
    prompt = token_ids[: PREFIX + SUFFIX]
    cold, from_cache, from_host, came = through_host(server, prompt, token_ids)
    assert came.get("host") == PREFIX
    server.stop()
    assert mean_gap(from_host, from_cache) < SAME and mean_gap(from_cache, cold) < WINDOWS
