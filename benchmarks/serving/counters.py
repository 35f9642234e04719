"""What SGLang counts by itself: Prometheus text, memory and start-up times of /server_info, speeds in its log."""

from __future__ import annotations

import re
from statistics import median

from ..launch import Server

GB = 1 << 30  # SGLang's "GB" in /server_info


def total(text: str, name: str) -> float:
    """Sum of a counter over its labels. A counter that never counted is absent, which is 0."""
    pattern = rf"^{re.escape(name)}(?:\{{[^\n]*\}})?\s+([\d.eE+-]+)$"
    return sum(float(value) for value in re.findall(pattern, text, re.MULTILINE))


def retracted(server: Server) -> float:
    """Requests that were pushed out of the running batch because the cache was full, since start."""
    return total(server.metrics(), "sglang:num_retracted_requests_total")


def decoding(log: str) -> tuple[int, float] | None:
    """The most requests that a step of this part of a log decoded, and tokens/s with so many: the median of the lines
    that tell of them. None where no line does."""
    lines = re.findall(r"Decode batch.*#running-req: (\d+),.*gen throughput \(token/s\): ([\d.]+)", log)
    most = max((int(requests) for requests, _ in lines), default=0)
    speeds = [float(speed) for requests, speed in lines if int(requests) == most]
    return (most, median(speeds)) if speeds else None


def state(info: dict) -> dict:
    """The scheduler's own report; empty where there is none."""
    return (info.get("internal_states") or [{}])[0]


def pool_bytes(info: dict) -> float | None:
    """Bytes of the cache: exactly for a packed one, else as SGLang rounds it."""
    if packed := info.get("kv_quant"):
        return float(packed["pool_bytes"])
    found = state(info).get("memory_usage", {}).get("kvcache")
    return None if found is None else found * GB


def request_table(info: dict) -> tuple[float, float] | None:
    """Bytes of SGLang's ``req_to_token``, and of one request's row in it.

    It has a row for each request that may run and one more, of 4 bytes a token of the context and 4 tokens. How many
    may run grows with the tokens that fit, so it is larger beside a packed cache: gigabytes where the context is long.
    """
    server = state(info)
    rows, context = server.get("effective_max_running_requests_per_dp"), server.get("context_length")
    if not rows or not context:
        return None
    row = 4.0 * (context + 4)
    return (rows + 1) * row, row
