"""An object of SGLang's with some of its parts exchanged."""

from __future__ import annotations

from typing import Any


class Beside:
    """``thing``, but for what is given here; what is set on it stays here, too."""

    def __init__(self, thing: Any, **given: Any):
        self.__dict__.update(given, _thing=thing)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._thing, name)
