"""A device that somebody names on a command line."""

from __future__ import annotations

import argparse

import torch


def device(text: str) -> str:
    """A torch device that is there, for argparse."""
    try:
        torch.empty(0, device=text)
    except (RuntimeError, AssertionError) as e:
        reason = str(e).split("\n")[0]
        raise argparse.ArgumentTypeError(f"{text!r}: {reason}; cpu works everywhere") from None
    return text
