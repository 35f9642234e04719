"""What several layers have each of their own, found by its address, so that one launch encodes for all of them."""

from __future__ import annotations

import triton
import triton.language as tl

#: The encode kernels' arguments of a layer, in the order of their addresses; scales lie where words do.
FIELDS = ("k", "v", "words", "k_matrix", "k_channels", "k_pack", "v_matrix", "v_channels", "v_pack", "means")
_FIELDS = tl.constexpr(len(FIELDS))


@triton.jit
def _pointer(addresses, i, like):
    """The i-th of some addresses, multiples of 16, as a pointer of the type of ``like``."""
    return tl.multiple_of(tl.load(addresses + i).to(like.dtype), 16)


@triton.jit
def of_layer(
    layers,  # int64 [L, len(FIELDS)]
    layer,
    k,
    v,
    words,
    scales,
    k_matrix,
    k_channels,
    k_pack,
    v_matrix,
    v_channels,
    v_pack,
    means,  # or None
):
    """The same of another layer."""
    at = layers + layer * _FIELDS
    k, v, words, scales = _pointer(at, 0, k), _pointer(at, 1, v), _pointer(at, 2, words), _pointer(at, 2, scales)
    k_matrix, k_channels, k_pack = _pointer(at, 3, k_matrix), _pointer(at, 4, k_channels), _pointer(at, 5, k_pack)
    v_matrix, v_channels, v_pack = _pointer(at, 6, v_matrix), _pointer(at, 7, v_channels), _pointer(at, 8, v_pack)
    if means is not None:
        means = _pointer(at, 9, means)
    return k, v, words, scales, k_matrix, k_channels, k_pack, v_matrix, v_channels, v_pack, means
