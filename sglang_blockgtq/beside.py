"""A ModelRunner with some of its parts exchanged."""

from __future__ import annotations

from typing import Any


class Beside:
    """A ModelRunner, but for what is given here; what is set on it stays here, too."""

    def __init__(self, runner: Any, **given: Any):
        self.__dict__.update(given, _runner=runner)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)
