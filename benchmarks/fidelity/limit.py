"""What no code of so many bits can beat: Shannon's limit, as noise in place of codes.

A Gaussian vector, coded at R bits a channel, keeps an error of at least ``2^(-2R)`` of its energy, and only codes of
endless length come near; a scalar codebook behind a rotation, which is what ships, keeps .118 at two bits where the
limit is .0625 (Cover and Thomas, Elements of Information Theory, chapter 10). Where channels differ and the code knows,
bits go where they help (reverse water-filling). :class:`Limit` returns vectors with just such an error, so a row
says what is left to be gained by any other codebook, lattice or trellis at these bits.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from sglang_blockgtq.kernels.layout import NORM_BYTES


@dataclass(frozen=True)
class Limit:
    """Stands where a coder.Coder does. H heads of D channels.

    enter, back ``[H, D, D]``: to the channels that are coded and back, ``back[h] @ enter[h] = 1``.
    sigma ``[H, D]``: their variances, and what an error in them costs. share ``[H, D]``: of each channel's energy,
    what is lost. bits: of a channel on average.
    """

    enter: torch.Tensor
    back: torch.Tensor
    sigma: torch.Tensor
    share: torch.Tensor
    bits: float
    seed: int = 0

    @property
    def size(self) -> float:
        """Bytes of one vector, with one scale as the codes that ship."""
        return self.bits * self.sigma.shape[-1] / 8 + NORM_BYTES

    def to(self, device: torch.device | str) -> Limit:
        moved = {name: getattr(self, name).to(device) for name in ("enter", "back", "sigma", "share")}
        return replace(self, **moved)

    def round_trip(self, x: torch.Tensor) -> torch.Tensor:
        """``x [T, H, D]`` as an ideal code would read it back, scaled such that sums of many keep their length.

        Each vector's own energy scales its error: the scale is exact, as a norm beside the codes is.
        """
        y = torch.einsum("thd,hed->the", x, self.enter)
        energy = (y.square() / self.sigma).mean(-1, keepdim=True)
        generator = torch.Generator().manual_seed(self.seed)  # of the CPU, so that devices agree
        noise = torch.randn(y.shape, generator=generator, dtype=y.dtype).to(y.device)
        read = y * (1 - self.share) + noise * (energy * self.sigma * self.share * (1 - self.share)).sqrt()
        # Weighed as they count: in balanced channels an error costs sigma times its square.
        kept = (self.sigma.square() * (1 - self.share)).sum(-1) / self.sigma.square().sum(-1)
        return torch.einsum("the,hde->thd", read / kept[:, None], self.back)


def water_filling(strength: torch.Tensor, bits: float) -> torch.Tensor:
    """Share of each channel's energy that is lost at the limit: ``min(1, level / strength)``, the mean of
    ``-log2(share) / 2`` being ``bits``. strength ``[..., D]``, positive."""
    low, high = torch.zeros_like(strength[..., :1]), strength.amax(-1, keepdim=True)
    for _ in range(100):
        level = (low + high) / 2
        spent = -(level / strength).clamp(max=1).log2().mean(-1, keepdim=True) / 2
        low, high = torch.where(spent > bits, level, low), torch.where(spent > bits, high, level)
    return (high / strength).clamp(max=1)


def white(heads: int, dim: int, bits: float, seed: int) -> Limit:
    """All channels alike, as behind a rotation of the whole head."""
    eye, one = torch.eye(dim).expand(heads, -1, -1), torch.ones(heads, dim)
    return Limit(eye, eye, one, one * 4.0**-bits, bits, seed)


def balanced(forward: torch.Tensor, inverse_t: torch.Tensor, sigma: torch.Tensor, bits: float, seed: int) -> Limit:
    """Channels of a balanced transform (see :mod:`.klt`) of one layer, whose errors count ``sigma`` times."""
    share = water_filling(sigma.square(), bits)
    return Limit(forward.float(), inverse_t.mT.contiguous().float(), sigma.float(), share.float(), bits, seed)
