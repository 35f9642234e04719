"""GPU memory of a server while something runs, by NVML: neither GPU memory nor a process for every sample."""

from __future__ import annotations

import os
import threading


def _nvml() -> tuple[list[tuple[int, int | None]], int] | None:
    """(process id, bytes) of everything on the GPUs, and the bytes used on them. None without NVML or a GPU."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()  # counts its calls: cheap after the first
        apps, total = [], 0
        for i in range(pynvml.nvmlDeviceGetCount()):
            device = pynvml.nvmlDeviceGetHandleByIndex(i)
            found = pynvml.nvmlDeviceGetComputeRunningProcesses(device)
            apps += [(process.pid, process.usedGpuMemory) for process in found]
            total += pynvml.nvmlDeviceGetMemoryInfo(device).used
    except pynvml.NVMLError:
        return None
    return apps, total


def of_group(apps: list[tuple[int, int | None]], group: int) -> int | None:
    """Bytes that the processes of a process group hold; None where none of them is listed, as inside containers that
    do not see the host's process ids."""
    total = None
    for pid, held in apps:
        try:
            if held is not None and os.getpgid(pid) == group:
                total = (total or 0) + held
        except ProcessLookupError:
            continue
    return total


def used(group: int) -> tuple[float | None, str]:
    """Bytes, and what they count. None without NVML."""
    if (found := _nvml()) is None:
        return None, "no NVML"
    apps, total = found
    mine = of_group(apps, group)
    return (float(total), "all processes on all GPUs") if mine is None else (float(mine), "processes of the server")


class Sampler:
    """Samples :func:`used` in a thread; ``take()`` gives the peak since the last call."""

    def __init__(self, group: int, every: float = 0.25):
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
