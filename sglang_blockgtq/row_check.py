"""--kv-quant-check-rows: rows that attention reads are compared with checksums from when they were written.

What SGLang's --kv-canary does over dense keys and values: it cannot read rows that lie interleaved. A difference ends
the server, on a GPU a step later: there it is found within the step's graph.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from .kernels.checksum import Checksums, Difference
from .options import NAME

if TYPE_CHECKING:
    from .kernels.layer import PackedLayer

logger = logging.getLogger(__name__)

SUM_BYTES = 4  # of a row


class DamagedRow(RuntimeError):
    """A row is not what was written for its token: answers that read it would be wrong."""


class RowCheck:
    """Of a pool's layers, by id and in the model's order, whose rows are there.

    count: rows that are compared at each step, in all layers.
    """

    def __init__(self, layers: Mapping[int, PackedLayer], count: int):
        self.ids, self.count = list(layers), count
        self.sums = Checksums(list(layers.values()))
        found = self.sums.found
        self._seen = torch.zeros(1, dtype=torch.int64, pin_memory=True) if found.is_cuda else found

    def wrote(self, layer_id: int, forward_batch: Any) -> None:
        """After each layer's tokens of a step; checksums are taken after the last."""
        if layer_id == self.ids[-1]:
            self.sums.write(forward_batch.out_cache_loc, forward_batch.positions)

    def sample(self, kv_indptr: torch.Tensor, kv_indices: torch.Tensor, *, fresh: int) -> None:
        """Compare some of the rows that the step reads: the requests' slots, each from position 0 on. fresh: the last
        of each that are yet to be written."""
        self.sums.sample(kv_indptr, kv_indices, self.count, fresh=fresh)

    def warm_up(self, requests: int, ahead: int) -> None:
        """Compile what steps of up to so many requests need. Slot 0 is written, which no request has. ahead: tokens of
        a request that are verified, 0 without drafts."""
        indptr, none = (torch.zeros(n, dtype=torch.int64, device=self.sums.sums.device) for n in (requests + 1, 1))
        self.sums.write(none, none)
        for slot, fresh in {(torch.int32, 1), (torch.int32, ahead or 1), (torch.int64, 0)}:
            self.sums.sample(indptr.int(), none.to(slot), self.count, fresh=fresh)

    def poll(self) -> None:
        """Raise DamagedRow for what was found, on a GPU up to the step before: it is not waited for."""
        if found := Checksums.unpacked(int(self._seen)):
            raise self._damaged(found)
        if self._seen is not self.sums.found:
            self._seen.copy_(self.sums.found, non_blocking=True)

    def compare_cached(self, tree_cache: Any) -> None:
        """Every row that a radix tree holds. Raises DamagedRow."""
        core = getattr(tree_cache, "tree_core", None)
        if core is None:  # without a radix cache no row outlives its request
            return
        held = core.walk_for_kv_canary(unlocked_only=False, swa_resident_only=False)
        if wrong := self.sums.differences(held.slot_indices, held.positions):
            raise self._damaged(wrong[0], f", one of {len(wrong)} such rows")
        logger.info("%s: %d rows of each layer compared: all are as written", NAME, len(held.slot_indices))

    def _damaged(self, found: Difference, more: str = "") -> DamagedRow:
        return DamagedRow(
            f"{NAME}: the row at slot {found.slot} of layer {self.ids[found.layer]} is not what was written for the "
            f"token at position {found.position}{more}; answers from this cache cannot be trusted"
        )
