"""--kv-quant-check-rows in the real server: no alarm while rows are as written, and the end of it when one is not."""

from __future__ import annotations

import json

import psutil
import pytest
import requests

pytestmark = pytest.mark.server

LAYER, POSITION, BYTE, PREFIX = 17, 40, 5, 96


def test_a_spoiled_row_ends_the_server(launch, token_ids, tmp_path):
    spoil = tmp_path / "spoil"
    server = launch(
        "--dtype=float32", "--max-total-tokens=600", "--kv-quant-check-rows=200",
        env={"BLOCKGTQ_SPOIL": str(spoil)}, record="spoiler",
    )  # fmt: skip
    assert server.info()["kv_quant"]["check_rows"] == 200
    prompt = token_ids[:PREFIX]
    for start in (200, 900, 200, 500):  # hits, evictions, and decode steps on top of both
        server.generate(prompt + token_ids[start : start + 200], 6)
    server.flush()
    assert "rows of each layer compared: all are as written" in server.log.read_text()

    server.generate(prompt, 4)
    spoil.write_text(json.dumps([LAYER, POSITION, BYTE]))
    with pytest.raises(requests.RequestException):
        server.generate(prompt + token_ids[300:320], 4)
    (spoiled,) = tmp_path.iterdir()
    says = f"the row at slot {spoiled.suffix[1:]} of layer {LAYER} is not what was written for the token at position"
    psutil.Process(server.process.pid).wait(60)
    assert f"{says} {POSITION}; answers from this cache cannot be trusted" in server.log.read_text()
