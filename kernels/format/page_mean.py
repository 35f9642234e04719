"""What the keys of a head have in common, held as a mean per page of positions (docs/format.md, rows version 3).

A model's key bias and its outliers lie in blocks that RoPE turns slowly. Within a page of positions such a block
hardly turns, so the mean key, turned to the page's first position, can be taken off before a key is coded:
``k - R_p mean``. It is static, so a row still depends on the token and its position alone. Not every key is like the
mean: those that are, are flagged. A flagged key is coded as ``R_p mean - k`` and has a negative scale, so that readers
multiply by the scale as ever, and its sign is the flag. They add ``q . R_p mean``, one number for each query and page,
to the logits of flagged keys.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

#: Tokens of a page are a multiple of it, so that no tile of a kernel lies in two pages.
PAGE_UNIT = 64
SLOW = 2.0  # radians within a page: most that a block with a mean rotates
SCALE_MIN = 2.0**-24  # of a flagged key: the least that float16 holds


@dataclass(frozen=True)
class PageMean:
    """Of one layer. H KV heads, B = D / 2 blocks, P = ``page`` positions.

    mean ``[H, B, 2]`` float32: at position 0, zero in blocks that turn too fast to have one.
    theta ``[B]`` float64: radians a position, 0 for channels without RoPE.
    pairs ``[B, 2]`` int64: the channels of each block.
    """

    page: int
    mean: torch.Tensor
    theta: torch.Tensor
    pairs: torch.Tensor

    def __post_init__(self) -> None:
        if self.page <= 0 or self.page & (self.page - 1) or self.page % PAGE_UNIT:
            raise ValueError(f"page = {self.page}: a power of two of at least {PAGE_UNIT} positions is needed")

    def to(self, device: torch.device | str) -> PageMean:
        return PageMean(self.page, *(x.to(device) for x in (self.mean, self.theta, self.pairs)))

    def turns(self, pages: torch.Tensor) -> torch.Tensor:
        """Cosines and sines ``[N, 2, B]`` float32 of the turn from position 0 to the first of each of ``pages [N]``."""
        angle = (pages.double() * self.page)[:, None] * self.theta
        return torch.stack([angle.cos(), angle.sin()], 1).float()

    def of_pages(self, pages: torch.Tensor) -> torch.Tensor:
        """``[N, H, D]`` float32 for each of ``pages [N]``, in the channels of a key."""
        (x, y), (cos, sin) = self.mean.unbind(-1), self.turns(pages)[:, :, None].unbind(1)
        out = torch.empty(len(pages), len(self.mean), 2 * len(self.theta), device=self.mean.device)
        out[..., self.pairs] = torch.stack([x * cos - y * sin, y * cos + x * sin], -1)
        return out

    def first_pages(self, pages: int) -> torch.Tensor:
        """:meth:`of_pages` of a request's first ``pages``."""
        return self.of_pages(torch.arange(pages, device=self.theta.device))

    def at(self, positions: torch.Tensor | None) -> torch.Tensor:
        """``[T, H, D]`` float32 for each of ``positions [T]``. ValueError without them."""
        if positions is None:
            raise ValueError("positions: needed, since keys are less the means of their pages")
        pages, index = (positions // self.page).unique(return_inverse=True)
        return self.of_pages(pages)[index]


def residual(y: torch.Tensor, mean: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What is coded for keys ``y [T, H, D]`` whose pages' means are ``mean [T, H, D]``, and their flags ``[T, H]``.

    Both in stored channels, float32. Flagged are keys whose energy falls, weighted by ``weight [H, D]`` as the codes'
    errors are (LayerCodec.k_weight).
    """
    flags = (weight.double() * mean.double() * (2 * y.double() - mean.double())).sum(-1) > 0
    return torch.where(flags[..., None], mean - y, y), flags


def signed(scale: torch.Tensor, flags: torch.Tensor) -> torch.Tensor:
    """float16 scales with a sign for their flags: of flagged keys, none is zero."""
    return torch.where(flags, -scale.clamp(min=SCALE_MIN), scale)
