"""Launches beside those of the current stream."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Aside:
    """A second stream, in a captured graph, too. Without a GPU launches come one after another."""

    def __init__(self, device: torch.device | str):
        self.stream = torch.cuda.Stream(device) if torch.device(device).type == "cuda" else None

    @contextmanager
    def launches(self) -> Iterator[None]:
        """What is launched within waits for what the current stream has so far, and runs beside what it gets next."""
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            yield

    def join(self) -> None:
        """What the current stream gets next waits for the launches aside. Until then their tensors are kept."""
        if self.stream is not None:
            torch.cuda.current_stream().wait_stream(self.stream)
