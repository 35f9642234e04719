"""How many of a request's last tokens are read exactly, as an option of programs."""

from __future__ import annotations

import argparse

from . import MOST_RECENT, RECENT


def exact_recent(text: str) -> int:
    """The value of ``--exact-recent``. argparse.ArgumentTypeError for what no server keeps."""
    if not text.isdecimal() or int(text) > MOST_RECENT:
        raise argparse.ArgumentTypeError(f"{text!r}: a whole number up to {MOST_RECENT} is needed, e.g. {RECENT}")
    return int(text)
