"""GPU memory of a server while something runs, by nvidia-smi: this process takes none itself."""

from __future__ import annotations

import os
import subprocess
import threading

MIB = 1 << 20


def _ask(query: str) -> list[list[str]]:
    command = ["nvidia-smi", query, "--format=csv,noheader,nounits"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [[part.strip() for part in line.split(",")] for line in found.stdout.splitlines() if not found.returncode]


def of_group(apps: list[list[str]], group: int) -> int | None:
    """MiB that the processes of a process group hold; None where none of them is listed, as inside containers that
    do not see the host's process ids."""
    total = None
    for pid, used in apps:
        try:
            if os.getpgid(int(pid)) == group:
                total = (total or 0) + int(used)
        except (ValueError, ProcessLookupError):
            continue
    return total


def used(group: int) -> tuple[float | None, str]:
    """Bytes, and what they count. None without nvidia-smi."""
    if (found := of_group(_ask("--query-compute-apps=pid,used_memory"), group)) is not None:
        return float(found * MIB), "processes of the server"
    devices = [int(row[0]) for row in _ask("--query-gpu=memory.used") if row[0].isdigit()]
    return (float(sum(devices) * MIB), "all processes on the device") if devices else (None, "no nvidia-smi")


class Sampler:
    """Samples :func:`used` in a thread; ``take()`` gives the peak since the last call."""

    def __init__(self, group: int, every: float = 0.5):
        self.group, self.every = group, every
        self._peak: float | None = None
        self._what = "no sample"
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        while not self._stop.is_set():
            value, what = used(self.group)
            with self._lock:
                self._what = what
                if value is not None:
                    self._peak = max(self._peak or 0.0, value)
            if value is None:
                return
            self._stop.wait(self.every)

    def __enter__(self) -> Sampler:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def take(self) -> tuple[float | None, str]:
        with self._lock:
            peak, self._peak = self._peak, None
            return peak, self._what
