"""What a cache costs: the formulas, and a toy model that reads exactly and through caches of known faults."""

import math

import pytest
import torch

from sglang_blockgtq.calibrate.quality import (
    ANSWERS,
    CHUNK,
    QUERIES,
    HeldOut,
    Quality,
    Sums,
    attend,
    attention_divergence,
    divergence,
    positions_of,
)
from sglang_blockgtq.kernels.host import attention as host_attention
from sglang_blockgtq.kernels.host.attention import causal_attention
from sglang_blockgtq.kernels.terms import PLAIN, Terms

TOKENS, LAYERS, HEADS, GROUP, DIM, VOCAB = 150, 3, 2, 2, 16, 40
SCALE = 0.7


def kl(p: torch.Tensor, q: torch.Tensor) -> float:
    """Of two distributions, written out."""
    return sum(a * math.log(a / b) for a, b in zip(p.tolist(), q.tolist(), strict=True) if a > 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_divergence(dtype):
    """More rows than are held at once, in the dtype that logits have."""
    generator = torch.Generator().manual_seed(0)
    true, other = (5 * torch.randn(2, CHUNK + 7, VOCAB, generator=generator)).to(dtype)
    found = divergence(true, other)
    want = [kl(a.double().softmax(-1), b.double().softmax(-1)) for a, b in zip(true, other, strict=True)]
    assert found.dtype == torch.float32 and found.tolist() == pytest.approx(want, rel=1e-4)
    assert divergence(other, true).tolist() != pytest.approx(want, rel=0.1)
    assert not divergence(true, true).any()


def test_tokens_that_are_never_answered_cost_nothing():
    """Logits of -inf, as models have them that mask part of their vocabulary."""
    true, other = torch.randn(2, 4, VOCAB, generator=torch.Generator().manual_seed(0))
    want = divergence(true[:, :30], other[:, :30])
    true[:, 30:] = other[:, 30:] = -math.inf
    torch.testing.assert_close(divergence(true, other), want)


def test_divergence_of_next_to_nothing_is_not_negative():
    logits = torch.randn(64, 5000, generator=torch.Generator().manual_seed(0)) * 1e-3
    found = divergence(logits, logits * (1 + 1e-5))
    assert bool((found >= 0).all()) and float(found.max()) < 1e-6
    assert bool(divergence(logits * torch.nan, logits).isnan().all())


def test_attention_divergence():
    generator = torch.Generator().manual_seed(0)
    k, k_read = torch.randn(2, 9, HEADS, DIM, generator=generator)
    positions = torch.tensor([0, 3, 8])
    q = torch.randn(3, HEADS * GROUP, DIM, generator=generator)
    found = attention_divergence(q, k, k_read, positions, SCALE)
    assert found.shape == (3, HEADS * GROUP) and not found[0].any()  # one key has all the attention
    for i, position in enumerate(positions.tolist()):
        for head in range(HEADS * GROUP):
            logits = [x[: position + 1, head // GROUP].double() @ q[i, head].double() * SCALE for x in (k, k_read)]
            assert float(found[i, head]) == pytest.approx(kl(*(x.softmax(-1) for x in logits)), abs=1e-5)
    later = k_read.clone()
    later[4:] = 100  # of the future of the first two
    torch.testing.assert_close(attention_divergence(q[:2], k, later, positions[:2], SCALE), found[:2])


@pytest.mark.parametrize("count", [QUERIES, ANSWERS, 7])
@pytest.mark.parametrize("tokens", [1, 48, 49, 150, 256, 1000, 2047, 2048])
def test_positions_are_spread_evenly_and_end_with_the_last(tokens, count):
    found = positions_of(tokens, count)
    assert found[-1] == tokens - 1 and found[0] >= 0
    assert len(found.diff().unique()) <= 1 and bool((found.diff() > 0).all())
    assert len(found) == tokens if tokens <= count else count <= len(found) < 2 * count


def test_sums():
    """Layer 1 has no keys and does not count."""
    sums = Sums(3)
    sums.add_attention(0, torch.tensor([[1.0, 2.0], [3.0, 6.0]]))
    sums.add_attention(2, torch.tensor([[4.0, 0.0]]))
    sums.add_attention(2, torch.tensor([[8.0, 8.0]]))
    sums.add_answers(torch.tensor([0.5, 1.5, 1.0, 1.0]))
    found = sums.quality(4)
    assert found == Quality(kl=1.0, attention_kl=4.0, worst_layer=2, worst_layer_kl=5.0, tokens=4)
    assert found.to_dict() == {
        "kl": 1.0, "attention_kl": 4.0, "worst_layer": 2, "worst_layer_kl": 5.0, "tokens": 4, "recent": 0
    }  # fmt: skip
    for part in ("KL of the answer 1.0000", "4 held-out tokens", "attention 4.0000", "worst layer 2 5.0000"):
        assert part in found.line()
    sums.add_attention(1, torch.tensor([[math.nan]]))
    assert sums.quality(4).worst_layer == 1


def test_sums_of_ranks_add_up():
    """Layers and answers of a pipeline's stages; heads of a layer that two ranks share count by their number."""
    first, second, whole = Sums(2), Sums(2), Sums(2)
    for sums in (first, whole):
        sums.add_attention(0, torch.tensor([[1.0, 2.0]]))
    for sums in (second, whole):
        sums.add_attention(0, torch.tensor([[6.0]]))
        sums.add_attention(1, torch.tensor([[5.0]]))
        sums.add_answers(torch.tensor([0.25, 0.75]))
    first.flat += second.flat
    assert first.quality(2) == whole.quality(2) == Quality(0.5, 4.0, 1, 5.0, 2)


class Cache:
    """In a PackedLayer's place: gives keys and values back with noise of a size."""

    def __init__(self, key_noise: float = 0.0, value_noise: float = 0.0):
        self.noise = key_noise, value_noise
        self.rows = None

    def new_rows(self, slots, device):
        return torch.full((slots,), -1)

    def bind(self, rows):
        assert self.rows is None
        self.rows = rows

    def unbind(self):
        self.rows = None

    def encode(self, k, v, slots, positions):
        assert k.shape == v.shape == (TOKENS, HEADS, DIM)
        self.rows[slots], self.kept = positions, (k, v)

    def dense(self, slots, positions, dtype):
        assert torch.equal(self.rows[slots], positions) and positions.tolist() == list(range(TOKENS))
        generator = torch.Generator().manual_seed(0)
        return tuple(
            (x + noise * torch.randn(x.shape, generator=generator)).to(dtype)
            for x, noise in zip(self.kept, self.noise, strict=True)
        )


@pytest.fixture
def toy():
    """A model of LAYERS layers of attention; what its attention saw is in ``calls``."""
    generator = torch.Generator().manual_seed(1)
    x0 = torch.randn(TOKENS, HEADS * GROUP * DIM, generator=generator)
    weights = torch.randn(LAYERS, 3, HEADS * GROUP * DIM, HEADS * GROUP * DIM, generator=generator) / 8
    head = torch.randn(HEADS * GROUP * DIM, VOCAB, generator=generator) / 8

    def run(hook, answers):
        x = x0
        for layer in range(LAYERS):
            q, k, v = (x @ w for w in weights[layer])
            q = q.view(TOKENS, HEADS * GROUP, DIM)
            k, v = (y[:, : HEADS * DIM].view(TOKENS, HEADS, DIM) for y in (k, v))
            read = hook(layer, q, k, v)
            run.calls.append((layer, *read[:2]))
            x = x + attend(q, k, v, read, SCALE, PLAIN).flatten(1)
        return (x @ head)[answers]

    run.calls = []
    return run


def cost(toy, caches, layers: int = LAYERS) -> Quality:
    exact = HeldOut(toy, TOKENS, dict.fromkeys(range(LAYERS), (SCALE, PLAIN)), layers)
    found = exact.sums(dict(enumerate(caches))).quality(len(exact.answers))
    assert all(cache.rows is None for cache in caches)
    return found


def test_an_exact_cache_costs_nothing(toy):
    found = cost(toy, [Cache() for _ in range(LAYERS)])
    assert (found.kl, found.attention_kl, found.worst_layer_kl, found.tokens) == (0, 0, 0, TOKENS)


@pytest.mark.parametrize("side", ["key_noise", "value_noise"])
def test_a_worse_cache_costs_more(toy, side):
    mild, bad = (cost(toy, [Cache(**{side: noise}) for _ in range(LAYERS)]) for noise in (0.02, 0.2))
    assert bad.kl > 10 * mild.kl > 0
    if side == "key_noise":
        assert bad.attention_kl > 10 * mild.attention_kl > 0
    else:  # attention is that of exact keys: values change the answer alone
        assert bad.attention_kl == mild.attention_kl == 0


@pytest.mark.parametrize("layer", range(LAYERS))
def test_the_worst_layer_is_the_one_that_was_spoiled(toy, layer):
    caches = [Cache(key_noise=0.02) for _ in range(LAYERS)]
    caches[layer] = Cache(key_noise=0.2)
    found = cost(toy, caches)
    assert found.worst_layer == layer and found.worst_layer_kl > 10 * cost(toy, [Cache(0.02)] * LAYERS).worst_layer_kl
    # Of exact queries and keys: what an earlier layer did to a later one is not the later one's.
    assert found.attention_kl < found.worst_layer_kl / (LAYERS - 0.5)


def test_the_answer_is_read_through_the_cache_at_all_layers(toy):
    """The pass that is compared attends to what the caches hold, of its own keys."""
    exact = HeldOut(toy, TOKENS, dict.fromkeys(range(LAYERS), (SCALE, PLAIN)), LAYERS)
    true, toy.calls = toy.calls, []
    exact.sums({layer: Cache(0.1, 0.1) for layer in range(LAYERS)})
    assert [layer for layer, *_ in toy.calls] == list(range(LAYERS))
    for (_, k, v), (_, true_k, true_v) in zip(toy.calls, true, strict=True):
        assert not torch.equal(k, true_k) and not torch.equal(v, true_v)


def test_the_exact_pass_is_read_once(toy):
    """However many caches are compared with it, and of other models' layers nothing is said."""
    exact = HeldOut(toy, TOKENS, dict.fromkeys(range(LAYERS), (SCALE, PLAIN)), 5)
    costs = [exact.sums({layer: Cache(noise) for layer in range(LAYERS)}) for noise in (0.1, 0.0, 0.1)]
    assert len(toy.calls) == 4 * LAYERS
    first, none, again = (sums.quality(TOKENS) for sums in costs)
    assert first == again and none.kl == 0
    assert costs[0].flat[3:5].tolist() == [[0, 0], [0, 0]]


def test_a_rank_without_answers_adds_none(toy):
    def run(hook, answers):
        toy(hook, answers)

    exact = HeldOut(run, TOKENS, dict.fromkeys(range(LAYERS), (SCALE, PLAIN)), LAYERS)
    flat = exact.sums({layer: Cache(0.1) for layer in range(LAYERS)}).flat
    assert flat[-1].tolist() == [0, 0] and bool((flat[:-1] > 0).all())


@pytest.mark.parametrize(
    "terms", [PLAIN, Terms(window=6), Terms(cap=1.5), Terms(window=3, sinks=torch.ones(4))], ids=str
)
@pytest.mark.parametrize("recent", [0, 1, 5, 40])
def test_the_last_tokens_are_read_as_they_are(terms, recent, monkeypatch):
    """Each query's own, also from one block of queries to the next."""
    monkeypatch.setattr(host_attention, "QUERY_BLOCK", 8)
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(21, 4, DIM, generator=generator)
    k, k_read, v, v_read = torch.randn(4, 21, 2, DIM, generator=generator)
    got = attend(q, k, v, (k_read, v_read, recent), SCALE, terms)
    for i in range(len(q)):
        near = slice(max(i + 1 - recent, 0), i + 1)
        keys, values = (torch.cat([a[: near.start], b[near]]) for a, b in ((k_read, k), (v_read, v)))
        want = causal_attention(q[i : i + 1], keys, values, SCALE, terms)
        torch.testing.assert_close(got[i : i + 1], want)


def test_a_window_takes_its_share_of_the_cost(toy):
    """All of it where it holds everything, part of it where not; what was read exactly is said with the cost."""
    layers = dict.fromkeys(range(LAYERS), (SCALE, PLAIN))

    def beside(recent: int) -> Quality:
        exact = HeldOut(toy, TOKENS, layers, LAYERS, recent)
        return exact.sums({layer: Cache(0.1, 0.1) for layer in range(LAYERS)}).quality(len(exact.answers), recent)

    none, some, every = beside(0), beside(TOKENS // 2), beside(TOKENS)
    assert none.kl > 1.1 * some.kl > 0 and none.attention_kl > 1.1 * some.attention_kl > 0
    assert every.kl < 1e-6 and every.attention_kl == 0
    assert some.recent == TOKENS // 2 and some.line().endswith(f"with the last {TOKENS // 2} tokens exact")
    old = {name: value for name, value in none.to_dict().items() if name != "recent"}
    assert Quality(**old) == none and "exact" not in none.line()
