"""What command lines share: how options are read, and how errors name them."""

from __future__ import annotations

import argparse

from . import MOST_RECENT, RECENT


def exact_recent(text: str) -> int:
    """The value of ``--exact-recent``. argparse.ArgumentTypeError for what no server keeps."""
    if not text.isdecimal() or int(text) > MOST_RECENT:
        raise argparse.ArgumentTypeError(f"{text!r}: a whole number up to {MOST_RECENT} is needed, e.g. {RECENT}")
    return int(text)


def own_options(error: Exception) -> str:
    """The message with a program's own option names: the server's without their prefix."""
    return str(error).replace("--kv-quant-", "--")
