"""Keys by channel, values by token: KIVI (arXiv 2402.02750, section 4), without its window of exact tokens.

Codes are ``round((x - low) / step)``, clamped to ``0 .. 2^bits - 1``, with a float16 ``low`` and ``step`` a group.
"""

from __future__ import annotations

import torch

GROUP = 32  # tokens of a key group, channels of a value group
SCALE_BYTES = 4  # float16 low and step
_MIN_STEP = 2.0**-24  # the smallest float16 above zero


def _bounds(x: torch.Tensor, dim: int, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Low and step over one dimension, kept, as float16 holds them; returned in float32."""
    low = x.amin(dim, keepdim=True).half().float()
    step = (x.amax(dim, keepdim=True) - low) / ((1 << bits) - 1)
    return low, step.half().float().clamp(min=_MIN_STEP)


def _round(x: torch.Tensor, low: torch.Tensor, step: torch.Tensor, bits: int) -> torch.Tensor:
    return low + ((x - low) / step).round().clamp(0, (1 << bits) - 1) * step


class Kivi:
    """Each channel of a key between its bounds over the 32 tokens around it; values between those of 32 channels.

    Bounds of a group hold all its tokens, so a query sees keys coded with the help of tokens that come after it: better
    than a server could have it, which must keep the last, open group exact. Tokens past the last whole group
    form a shorter one.
    """

    name = "kivi"

    def __init__(self, bits: int, head_dim: int, v_head_dim: int):
        if v_head_dim % GROUP:
            raise ValueError(f"v_head_dim {v_head_dim}: KIVI groups {GROUP} channels of a value; leave {self.name} out")
        self.k_bits = self.v_bits = bits
        self.head_dim, self.v_head_dim = head_dim, v_head_dim
        self.bytes_per_token_head = sum(self.sizes(GROUP))

    def sizes(self, tokens: int) -> tuple[float, float]:
        groups = -(-tokens // GROUP)
        key = self.head_dim * self.k_bits / 8 + self.head_dim * SCALE_BYTES * groups / tokens
        return key, self.v_head_dim * self.v_bits / 8 + self.v_head_dim // GROUP * SCALE_BYTES

    def key_bounds(self, layer: int, groups: list[torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Low and step ``[1, H, D]`` of each group of keys ``[<= 32, H, D]``."""
        return [_bounds(group, 0, self.k_bits) for group in groups]

    def round_trip(
        self, layer: int, k: torch.Tensor, v: torch.Tensor, first: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        groups = k.split(GROUP)
        bounds = self.key_bounds(layer, list(groups))
        keys = [_round(group, *bound, self.k_bits) for group, bound in zip(groups, bounds, strict=True)]
        by_group = v.unflatten(-1, (-1, GROUP))
        values = _round(by_group, *_bounds(by_group, -1, self.v_bits), self.v_bits)
        return torch.cat(keys), values.flatten(-2)


class KiviScaleOnly(Kivi):
    """As the Block-GTQ paper has it (arXiv 2606.24033, "KIVI-ScaleOnly"): no token is ever kept exact.

    The bounds of a group are those of the 32 tokens before it, so every token can be coded as it comes; what lies
    outside is clamped. The first group has the bounds of the calibration text's keys. Values as in KIVI.

    first ``[layers, 2, H, D]``: smallest and largest calibration key, see :func:`key_range`.
    """

    name = "kivi-scale-only"

    def __init__(self, bits: int, head_dim: int, v_head_dim: int, first: torch.Tensor):
        super().__init__(bits, head_dim, v_head_dim)
        self.first = first

    def key_bounds(self, layer: int, groups: list[torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return [_bounds(group, 0, self.k_bits) for group in [self.first[layer], *groups[:-1]]]


def key_range(keys: dict[int, torch.Tensor]) -> torch.Tensor:
    """Smallest and largest key ``[layers, 2, H, D]`` of each channel, from keys ``[T, H, D]`` of layers 0, 1, ..."""
    return torch.stack([torch.stack([keys[i].amin(0), keys[i].amax(0)]) for i in range(len(keys))])
