"""Speculative decoding: a draft proposes tokens, and the target verifies them over packed rows in one step.

What the target's step reads is in :mod:`.backend.cuda`; rows of rejected tokens are written over by the next step, and
those of an accepted branch are moved as they are. A draft model keeps a 16-bit cache of SGLang's own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .kernels.decode.tree import MAX_Q_LEN, Tree
from .options import NAME, KVQuantError


def draft_backend(device: str | None) -> str:
    """SGLang's attention backend for a draft model, whose own default would be the target's: ours."""
    if device != "cpu" and torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9:
        return "fa3"
    return "triton"


def check_speculation(config: Any, algorithm: str | None) -> None:
    """Models whose drafts would be verified in more than packed rows. config: Hugging Face's. Raises KVQuantError."""
    from .calibrate.model import has_states, windows_apart
    from .conflicts import type_of

    others = {"layers with states": has_states, "windows in a pool of their own": windows_apart}
    other = next((what for what, has in others.items() if has(config)), None)
    if algorithm is not None and other is not None:
        raise KVQuantError(
            f"--speculative-algorithm {algorithm}: not with --kv-quant {NAME} for {type_of(config)}: drafts beside its "
            f"{other} are not tested; serve without speculation"
        )


def draft_bytes_per_token(configurator: Any) -> int:
    """Bytes a token of the draft model's cache on this rank, 0 without a draft model. configurator: of the target's
    cache."""
    from sglang.srt.mem_cache.kv_cache_dtype import configure_kv_cache_dtype
    from sglang.srt.runtime_context import get_spec
    from sglang.srt.speculative.dflash_utils import dflash_draft_cell_size_per_token

    algorithm, aux = configurator.spec_algorithm, configurator.spec_aux_config
    # Of heads in the target's own checkpoint SGLang counts none where the target's config does not say how many.
    layers = aux.eagle_draft_num_layers or aux.draft_kv_num_layers
    if not (algorithm.is_eagle() or algorithm.is_standalone()) or not layers:
        return 0
    model = aux.draft_model_config or configurator.model_config
    _, dtype = configure_kv_cache_dtype(
        server_args_kv_cache_dtype="auto",
        speculative_draft_kv_cache_dtype=get_spec().speculative_draft_kv_cache_dtype,
        model=None,
        model_dtype=model.dtype,
        is_draft_worker=True,
        is_dflash=False,
        speculative_draft_attention_backend=get_spec().speculative_draft_attention_backend,
    )
    return dflash_draft_cell_size_per_token(
        draft_model_config=model,
        draft_num_layers=int(layers),
        draft_kv_cache_dtype=dtype,
        tp_size=configurator.draft_attn_tp_size,
    )


def trees(algorithm: Any) -> bool:
    """Whether drafts of SGLang's SpeculativeAlgorithm are trees; else they are chains, or there are none."""
    from sglang.srt.runtime_context import get_spec

    return algorithm.is_speculative() and (algorithm.is_ngram() or get_spec().speculative_eagle_topk > 1)


def _ngram_masks_are_full() -> bool:
    from sglang.srt.speculative.ngram_worker import USE_FULL_MASK

    return USE_FULL_MASK


@dataclass(frozen=True)
class Verification:
    """How a target verifies. q_len: tokens of each request, the one before the drafts among them. tree: None where
    every draft is a chain. full_mask: whether SGLang's mask is also of what lies before the tree."""

    q_len: int
    tree: Tree | None
    full_mask: bool

    @classmethod
    def of(cls, runner: Any, requests: int) -> Verification | None:
        """For up to ``requests`` of a ModelRunner; None without speculation. Raises KVQuantError."""
        algorithm = runner.spec_algorithm
        if not algorithm.is_speculative():
            return None
        q_len = runner.decode_num_tokens_per_req()
        if q_len > MAX_Q_LEN:
            raise KVQuantError(
                f"--speculative-num-draft-tokens {q_len}: not with --kv-quant {NAME}: at most {MAX_Q_LEN} are verified "
                "at a time"
            )
        tree = Tree.of(requests, q_len, runner.device) if trees(algorithm) else None
        return cls(q_len, tree, full_mask=algorithm.is_ngram() and _ngram_masks_are_full())

    def warm_up(self, requests: int, page: int, nowhere: int) -> None:
        """Compile what reads the trees of so many requests, if there are any."""
        if self.tree is None:
            return
        lengths = torch.zeros(requests, dtype=torch.int64, device=self.tree.bits.device)
        mask = torch.zeros(requests * self.q_len**2, dtype=torch.uint8, device=lengths.device)  # nothing lies before
        self.tree.read(mask, lengths, self.q_len, self.full_mask, page, nowhere)

    def read(self, forward_batch: Any, page: int, nowhere: int) -> None:
        """The step's trees. page, nowhere: see :meth:`.kernels.decode.tree.Tree.read`."""
        spec = forward_batch.spec_info
        if self.tree is None or spec is None or spec.draft_token is None:
            return  # a graph's capture has none
        requests = len(spec.draft_token) // self.q_len  # without those that fill a graph
        lengths = forward_batch.seq_lens[:requests]
        self.tree.read(spec.custom_mask, lengths, self.q_len, self.full_mask, page, nowhere)
