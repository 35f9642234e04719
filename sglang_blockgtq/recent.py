"""--kv-quant-exact-recent: a running request's last tokens, kept exactly beside their rows.

Rows are what is cached, shared and moved. The copies are a request's own, at its index in SGLang's table of requests:
they begin with the first token of its last prefill, and each decode step adds its token. Definition:
:func:`.kernels.reference.recent_step`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from .calibrate import RECENT
from .kernels.decode.recent import Recent
from .options import NAME, KVQuantError, KVQuantOptions, flag
from .ranks import from_rank_zero, is_rank_zero
from .runtime import elements
from .speculation import trees
from .terms import terms_of

if TYPE_CHECKING:
    from .kernels.layer import PackedLayer

logger = logging.getLogger(__name__)

#: Requests that have copies at a time, and the share of the device's memory that these take at most. Of requests
#: beyond, each token is exact in its own step alone.
MOST_REQUESTS, MOST_MEMORY = 256, 0.02
#: Tokens where the user names no number: the first that leaves copies for every request, else the last.
WINDOWS = RECENT, RECENT // 2, RECENT // 4


def resolve(options: KVQuantOptions, runner: Any, attention: Sequence[Any], requests: int) -> KVQuantOptions:
    """The options with a number of exact tokens, 0 where the server cannot have them and nobody asked for some.

    attention: the RadixAttention modules whose rows are packed. requests: that run at a time. Raises KVQuantError.
    """
    windowed = next((x.layer_id for x in attention if terms_of(x, {}).window), None)
    if trees(runner.spec_algorithm):
        why = "trees of drafts are verified over packed rows alone; --speculative-eagle-topk 1 makes chains"
    elif windowed is not None:
        why = f"layer {windowed} has a window, which counts packed tokens"
    elif options.chunk_attention == "quantized":
        why = f"with {flag('chunk_attention')} quantized every token is read as it is stored"
    else:
        if options.exact_recent is not None:
            return options
        window = from_rank_zero(lambda: default_window(runner, elements(attention), requests))
        return replace(options, exact_recent=window)
    if options.exact_recent:
        raise KVQuantError(f"{flag('exact_recent')} {options.exact_recent}: {why}; leave the option out")
    if options.exact_recent is None and is_rank_zero():
        logger.info("%s: no token is read exactly: %s", NAME, why)
    return replace(options, exact_recent=0)


def default_window(runner: Any, numbers: int, requests: int) -> int:
    """How many tokens are exact where the user says nothing. numbers: of a token's keys and values in all layers."""
    wanted = min(requests, MOST_REQUESTS)
    return next((w for w in WINDOWS if fitting(runner, numbers, w) >= wanted), WINDOWS[-1])


def fitting(runner: Any, numbers: int, window: int) -> int:
    """Requests whose copies, and their steps' own tokens beside, fit into :data:`MOST_MEMORY`."""
    held = numbers * runner.dtype.itemsize * (window + queries_of(runner))
    return int(MOST_MEMORY * memory_of(runner.device) / held)


def queries_of(runner: Any) -> int:
    """Of a request in a step: one, or a chain of drafts with the token before it."""
    return runner.decode_num_tokens_per_req() if runner.spec_algorithm.is_speculative() else 1


def new_copies(options: KVQuantOptions, runner: Any, layers: Sequence[PackedLayer], requests: int) -> Recent | None:
    """Room for the copies of up to ``requests`` requests; None where no token is read exactly."""
    if not options.exact_recent:
        return None
    first, window = layers[0], options.exact_recent
    numbers = len(layers) * first.heads * (first.head_dim + first.v_head_dim)
    rows = max(1, min(requests, MOST_REQUESTS, fitting(runner, numbers, window)))
    if requests > rows and is_rank_zero():
        logger.info(
            "%s: the last %d tokens of %d requests at a time are read exactly, of others the last one",
            NAME,
            window,
            rows,
        )
    return Recent.of(
        len(layers),
        rows,
        requests,
        window,
        first.heads,
        first.head_dim,
        first.v_head_dim,
        runner.dtype,
        runner.device,
        queries=queries_of(runner),
    )


def memory_of(device: torch.device | str) -> int:
    """Bytes of all memory there, taken or not."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def refuse_beams(recent: Recent) -> str:
    """What a request for beams is told: beams take each other's tokens over in SGLang's table, with the slots of their
    rows, while copies are of a request."""
    return (
        f"Beam search is not supported with {flag('exact_recent')} {recent.window}; "
        f"start the server with {flag('exact_recent')} 0 for it."
    )
