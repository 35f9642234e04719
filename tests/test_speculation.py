"""Speculative decoding: what a target and its draft are given."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from sglang.srt.runtime_context import get_context
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

from sglang_blockgtq import plugin, preflight, runtime
from sglang_blockgtq.conflicts import SPECULATION
from sglang_blockgtq.kernels.decode.tree import Tree
from sglang_blockgtq.options import KVQuantError, KVQuantOptions
from sglang_blockgtq.speculation import Verification, draft_bytes_per_token


class Model(SimpleNamespace):
    """A draft's ModelConfig: 4 KV heads of 64 channels, values of 32."""

    dtype, head_dim, v_head_dim = torch.bfloat16, 64, 32

    def get_num_kv_heads(self, ranks: int) -> int:
        return max(1, 4 // ranks)


def configurator(
    algorithm: str | None, layers: int | None = 3, ranks: int = 1, draft: bool = True, heads: int | None = None
) -> SimpleNamespace:
    """What sizes a target's cache, whose own layers are not looked at. heads: that the target's checkpoint holds."""
    aux = SimpleNamespace(
        eagle_draft_num_layers=layers, draft_kv_num_layers=heads, draft_model_config=Model() if draft else None
    )
    return SimpleNamespace(
        server_args=SimpleNamespace(_kvq=KVQuantOptions()),
        is_draft_worker=False,
        spec_algorithm=SpeculativeAlgorithm.from_string(algorithm),
        spec_aux_config=aux,
        model_config=Model(),
        draft_attn_tp_size=ranks,
    )


def test_a_drafts_cache_is_counted_as_what_it_is(monkeypatch):
    """16 bits, the draft's heads, and its layers: not a share of the packed target's."""
    with get_context().override_server_args():
        of_layer = 4 * (64 + 32) * 2
        assert draft_bytes_per_token(configurator("STANDALONE")) == 3 * of_layer
        assert draft_bytes_per_token(configurator("EAGLE", layers=1, draft=False)) == of_layer
        assert draft_bytes_per_token(configurator("NEXTN", layers=None, heads=1)) == of_layer
        assert draft_bytes_per_token(configurator("EAGLE3", ranks=2)) == 3 * of_layer // 2
        assert draft_bytes_per_token(configurator("NGRAM")) == draft_bytes_per_token(configurator("EAGLE", None)) == 0
        get_context().override("test", speculative_draft_kv_cache_dtype="fp8_e4m3")
        assert draft_bytes_per_token(configurator("EAGLE")) == 3 * of_layer // 2

        monkeypatch.setattr(runtime, "current", lambda: SimpleNamespace(counted_bytes_per_token=500))
        for given, cell in (
            (configurator("STANDALONE"), 500 + 3 * of_layer // 2),
            (configurator("NGRAM"), 500),
            (configurator(None), 7),
            (SimpleNamespace(server_args=SimpleNamespace(), is_draft_worker=False), 7),
        ):
            sized = SimpleNamespace(_cell_size=7)
            plugin._add_draft_cache(None, sized, given)
            assert sized._cell_size == cell


def test_a_draft_gets_a_backend_of_sglangs(monkeypatch):
    def chosen(**given):
        return preflight.defaults({"device": "cuda", **given}.get)

    assert chosen() == {"attention_backend": "blockgtq"}
    for capability, name in (((9, 0), "fa3"), ((8, 0), "triton")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda capability=capability: capability)
        assert chosen(speculative_algorithm="EAGLE")["speculative_draft_attention_backend"] == name
    own = chosen(speculative_algorithm="EAGLE", speculative_draft_attention_backend="flashinfer")
    assert "speculative_draft_attention_backend" not in own
    assert chosen(speculative_algorithm="NGRAM", device="cpu")["speculative_draft_attention_backend"] == "triton"


def verification(algorithm: str | None, tokens: int, topk: int = 1) -> Verification | None:
    runner = SimpleNamespace(
        spec_algorithm=SpeculativeAlgorithm.from_string(algorithm),
        decode_num_tokens_per_req=lambda: tokens,
        device="cpu",
    )
    with get_context().override_server_args(speculative_eagle_topk=topk):
        return Verification.of(runner, 3)


@pytest.mark.parametrize("algorithm", sorted({"STANDALONE", "EAGLE", "EAGLE3"} & set(SPECULATION)))
def test_drafts_are_chains_or_trees(algorithm):
    assert verification(None, 1) is None
    chain, tree = verification(algorithm, 4), verification(algorithm, 5, topk=2)
    assert (chain.q_len, chain.tree, chain.full_mask) == (4, None, False)
    assert (tree.q_len, len(tree.tree.bits), tree.full_mask) == (5, 15, False)
    with pytest.raises(KVQuantError, match="--speculative-num-draft-tokens 33: .*at most 32"):
        verification(algorithm, 33)


def test_what_reads_trees_is_compiled_early():
    """With a mask of the right size, whatever it is of: nothing is left of what was there."""
    for made in (verification("EAGLE", 5, topk=2), Verification(5, Tree.of(3, 5, "cpu"), full_mask=True)):
        made.tree.bits.fill_(-1)
        made.warm_up(2, 64, 999)
        assert made.tree.bits.tolist() == [0] * 10 + [-1] * 5
