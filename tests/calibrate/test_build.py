"""From moments to codecs: exact inverses, statistics, layouts, and positions far beyond the calibration's."""

from dataclasses import replace

import pytest
import torch

from sglang_blockgtq.calibrate.build import build_table, haar_rotation
from sglang_blockgtq.calibrate.moments import Moments, MomentSums
from sglang_blockgtq.calibrate.rope import RopeBlocks
from sglang_blockgtq.kernels.format.layout import CodeLayout
from sglang_blockgtq.kernels.reference import round_trip

ROPES = {
    "neox": RopeBlocks(64, 64, neox=True),
    "interleaved": RopeBlocks(64, 64, neox=False),
    "neox_partial": RopeBlocks(64, 16, neox=True),
    "interleaved_partial": RopeBlocks(64, 32, neox=False),
    "none": RopeBlocks(64, 0),
}


RULES = ("uniform", "template", "product", "paper-block", "product-block")


def build(moments, rope="neox", rule="template", k_bits=3, v_bits=3, **kw):
    """rule: an allocator, or one with its granularity."""
    blocks = ROPES[rope] if isinstance(rope, str) else rope
    allocator, _, granularity = rule.partition("-")
    options = {"allocator": allocator, "granularity": granularity or "segment", **kw}
    return build_table(moments, [blocks] * moments.layers, k_bits=k_bits, v_bits=v_bits, **options)


def sample(moments: Moments, rope: RopeBlocks, tokens=8_000, seed=0):
    """Gaussian q, k ``[T, H, D]`` of layer 0 with exactly the block energies of ``moments`` in expectation."""
    generator = torch.Generator().manual_seed(seed)
    pairs = rope.channels()
    out = []
    for energy in (moments.q[0], moments.k[0]):
        x = torch.zeros(tokens, moments.heads, rope.head_dim, dtype=torch.float64)
        noise = torch.randn(tokens, *energy.shape, 2, generator=generator, dtype=torch.float64)
        x[..., pairs] = noise * (energy / 2).sqrt()[..., None]
        out.append(x)
    return out


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("rope", ROPES)
def test_query_and_key_transforms_are_inverse(make_moments, rope, rule):
    table = build(make_moments(), rope, rule)
    for layer in range(2):
        codec = table.layer_codec(layer)
        eye = torch.eye(64).expand(2, -1, -1)
        product = torch.einsum("hed,hef->hdf", codec.q_in.double(), codec.k_in.double()).float()
        torch.testing.assert_close(product, eye, atol=2e-5, rtol=0)
        product = torch.einsum("hde,hef->hdf", codec.v_out.double(), codec.v_in.double()).float()
        torch.testing.assert_close(product, eye, atol=2e-5, rtol=0)


@pytest.mark.parametrize("rule", RULES)
def test_logits_are_preserved(make_moments, rule):
    moments = make_moments()
    q, k = sample(moments, ROPES["interleaved_partial"], tokens=200)
    codec = build(moments, "interleaved_partial", rule).layer_codec(0)
    logits = torch.einsum("thd,shd->hts", q, k)
    inside = torch.einsum(
        "the,she->hts",
        torch.einsum("thd,hed->the", q, codec.q_in.double()),
        torch.einsum("thd,hed->the", k, codec.k_in.double()),
    )
    torch.testing.assert_close(inside, logits, rtol=0, atol=1e-5 * float(logits.abs().max()))


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("rule", ["product-block", "product", "template"])
def test_gains_flatten_keys_and_weights_are_query_energies(make_moments, rule, rope):
    """On data with the calibrated energies every transformed key channel has unit variance; the pairing matters."""
    moments = make_moments()
    codec = build(moments, rope, rule).layer_codec(0)
    q, k = sample(moments, ROPES[rope])
    key_energy = torch.einsum("thd,hed->the", k, codec.k_in.double()).square().mean(0)
    groups = codec.layout.k[0].groups
    for h in range(2):
        for start, stop, _ in codec.layout.k[h].groups:
            # A rotation makes channels of a group equal only on average over rotations: test the mean.
            assert float(key_energy[h, start:stop].mean()) == pytest.approx(1, rel=0.05)
    assert len(groups) > 1
    query_energy = torch.einsum("thd,hed->the", q, codec.q_in.double()).square().mean(0)
    query_energy /= query_energy.mean(-1, keepdim=True)
    for h in range(2):
        for start, stop, _ in codec.layout.k[h].groups:
            weight = codec.k_weight[h, start:stop]
            assert float(weight.max()) == pytest.approx(float(weight.min()))
            assert float(query_energy[h, start:stop].mean()) == pytest.approx(float(weight.mean()), rel=0.05)


@pytest.mark.parametrize("rule", ["paper-block", "product-block", "product", "template"])
def test_blocks_are_stored_widest_first_then_by_score(make_moments, rule):
    moments = make_moments()
    table = build(moments, rule=rule, k_bits=2.5)
    order, widths = table.tensors["order"].long(), table.tensors["widths"].int()
    assert torch.equal(order.sort(-1).values, torch.arange(32).expand_as(order))
    stored = widths.gather(-1, order)
    assert (stored[..., 1:] <= stored[..., :-1]).all()
    score = (moments.q * moments.k).gather(-1, order)
    same = stored[..., 1:] == stored[..., :-1]
    assert (score[..., 1:] <= score[..., :-1])[same].all()


@pytest.mark.parametrize("bits", [3, 2.5])
def test_uniform_keeps_the_models_order_under_one_rotation(make_moments, bits):
    table = build(make_moments(), "neox", "uniform", k_bits=bits)
    assert torch.equal(table.tensors["order"].long(), torch.arange(32).expand(2, 2, -1))
    assert (table.tensors["group"] == 0).all()
    codec = table.layer_codec(1)
    by_block = torch.stack([torch.arange(32), torch.arange(32) + 32], -1).flatten()
    gain = table.tensors["k_gain"][1, :, :1, None]
    torch.testing.assert_close(
        codec.k_in[..., by_block] * gain, haar_rotation(64).float().expand(2, -1, -1), atol=1e-6, rtol=1e-5
    )
    assert table.k_layout(0, 0).num_norms == 1


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("k_bits, v_bits", [(2, 2), (3, 2), (3, 3), (4, 4), (2.5, 3.5)])
def test_all_heads_take_the_same_bytes(make_moments, rule, k_bits, v_bits):
    table = build(make_moments(heads=4, blocks=64), RopeBlocks(128, 128), rule, k_bits, v_bits)
    for layer in range(2):
        row = table.row_layout(layer)
        assert {head.code_bytes for head in row.k} == {int(64 * k_bits) * 2 // 8}
        assert row.v.code_bytes == int(64 * v_bits) * 2 // 8
    one_scale = 16 * (k_bits + v_bits) + 4
    if rule.endswith("-block"):
        assert table.bytes_per_token_head() > one_scale
    else:
        assert table.bytes_per_token_head() == one_scale
        assert table.row_layout(0).uniform_heads == (rule != "product")


@pytest.mark.parametrize("rule", RULES)
def test_a_ranks_heads_are_a_slice_of_the_models(make_moments, rule):
    table = build(make_moments(heads=4), rule=rule)
    whole, part = table.layer_codec(1), table.layer_codec(1, slice(2, 4))
    for name in ("k_in", "q_in", "v_in", "v_out", "k_weight"):
        assert torch.equal(getattr(part, name), getattr(whole, name)[2:4])
    assert part.layout.k == whole.layout.k[2:4]
    assert part.layout.head_bytes == whole.layout.head_bytes


@pytest.mark.parametrize("rule", RULES)
def test_dead_blocks_and_heads_stay_finite(make_moments, rule):
    moments = make_moments()
    moments.q[0, 0, :5] = 0
    moments.k[0, 0, 3:9] = 0
    moments.q[0, 1], moments.k[0, 1], moments.v[0, 1] = 0, 0, 0
    moments.k[1] = 0
    table = build(moments, rule=rule)
    for name, tensor in table.tensors.items():
        assert torch.isfinite(tensor.float()).all(), name
    for layer in range(2):
        codec = table.layer_codec(layer)
        error = torch.einsum("hed,hef->hdf", codec.q_in.double(), codec.k_in.double()) - torch.eye(64)
        torch.testing.assert_close(error.diagonal(dim1=1, dim2=2), torch.zeros(2, 64).double(), atol=1e-4, rtol=0)
        # Off the diagonal, balancing a dead block costs float32 digits; what counts is the logit of real energies.
        q_rms, k_rms = (x[layer].sqrt().repeat(1, 2) for x in (moments.q, moments.k))
        size = (q_rms * k_rms).sum(-1).max().clamp(min=1e-3)
        assert float((error * q_rms[:, :, None] * k_rms[:, None]).abs().max()) < 1e-5 * float(size)
    q, k = (x.float() for x in sample(moments, ROPES["neox"], tokens=200))
    v = torch.randn(200, 2, 64, generator=torch.Generator().manual_seed(0)) * (moments.v[0] > 0)[:, None]
    k_hat, v_hat = round_trip(table.layer_codec(0), k, v)
    exact, error = (torch.einsum("thd,shd->hts", q, x) for x in (k, k - k_hat))
    assert float(error.square().mean()) < 0.1 * float(exact.square().mean())
    assert float((v - v_hat).square().mean()) < 0.1 * float(v.square().mean())
    assert (k_hat[:, 1] == 0).all()
    assert (v_hat[:, 1] == 0).all()
    nothing = round_trip(table.layer_codec(1), torch.zeros_like(k), torch.zeros_like(v))
    assert all((x == 0).all() for x in nothing)


def test_a_dead_value_head_that_comes_alive_is_stored(make_moments):
    """Its gain may not be so small that live values leave the range of a stored scale."""
    moments = make_moments(heads=4)
    moments.v[1, 2] = 0
    table = build(moments)
    gain = table.tensors["v_gain"]
    assert float(gain[1, 2]) == pytest.approx(1e-3 * float((moments.v / 64).sqrt().mean()), rel=1e-6)
    alive = torch.ones_like(gain, dtype=torch.bool)
    alive[1, 2] = False
    torch.testing.assert_close(gain[alive].double(), (moments.v / 64).sqrt()[alive], rtol=1e-6, atol=0)
    v = torch.randn(100, 4, 64, generator=torch.Generator().manual_seed(0)) * gain.mean()
    v_hat = round_trip(table.layer_codec(1), torch.zeros_like(v), v)[1][:, 2]
    assert float((v_hat - v[:, 2]).square().mean()) < 0.2 * float(v[:, 2].square().mean())


@pytest.mark.parametrize("rule", RULES)
def test_a_dead_key_head_that_comes_alive_is_stored(make_moments, rule):
    moments = make_moments(heads=4)
    loud = moments.k[1, 2].clone()
    moments.k[1, 2] = 0
    codec = build(moments, rule=rule).layer_codec(1)
    came_alive = Moments(moments.q[1:], torch.where(moments.k[1:] == 0, loud, moments.k[1:]), moments.v[1:], 2048)
    k = sample(came_alive, ROPES["neox"], tokens=200)[1].float()
    k_hat = round_trip(codec, k, torch.zeros_like(k))[0][:, 2]
    assert float((k_hat - k[:, 2]).square().mean()) < 0.5 * float(k[:, 2].square().mean())


def test_tables_are_sealed_and_reproducible(make_moments):
    table, again = build(make_moments()), build(make_moments())
    assert table.header.table_hash == table.computed_hash() == again.header.table_hash
    assert len(table.header.table_hash) == 64
    hashes = {
        table.header.table_hash,
        build(make_moments(), k_bits=4).header.table_hash,
        build(make_moments(), v_bits=2).header.table_hash,
        build(make_moments(seed=1)).header.table_hash,
        build(make_moments(), "interleaved").header.table_hash,
        build(make_moments(), model_id="another").header.table_hash,
    }
    assert len(hashes) == 6


def test_rotation_is_orthogonal_and_seeded():
    for n in (4, 24, 128):
        q = haar_rotation(n)
        torch.testing.assert_close(q @ q.T, torch.eye(n, dtype=torch.float64), atol=1e-12, rtol=0)
        assert torch.equal(q, haar_rotation(n))
        assert not torch.equal(q, haar_rotation(n, seed=1))


@pytest.mark.parametrize("bits", [0, 0.99, 8.01, 9, -3, float("nan"), float("inf"), "3", None])
@pytest.mark.parametrize("side", ["k_bits", "v_bits"])
def test_unusable_bits(make_moments, side, bits):
    with pytest.raises(ValueError, match=rf"{side} = {bits}: an average between 1 and 8 bits"):
        build(make_moments(), **{side: bits})


def test_unknown_allocator(make_moments):
    with pytest.raises(ValueError, match="allocator = best: choose one of uniform, paper, product, template"):
        build(make_moments(), rule="best")


@pytest.mark.parametrize("head_dim", [16, 24, 40, 100, 272])
def test_unsupported_head_dim(make_moments, head_dim):
    with pytest.raises(ValueError, match=f"head_dim {head_dim} is not supported; multiples of 16 from 32 to 256"):
        build(make_moments(blocks=head_dim // 2), RopeBlocks(head_dim, head_dim))


@pytest.mark.parametrize("head_dim", [32, 80, 96, 112, 192, 256])
@pytest.mark.parametrize("bits", [2, 2.9, 3])
def test_supported_head_dims(make_moments, head_dim, bits):
    table = build(make_moments(1, 1, blocks=head_dim // 2), RopeBlocks(head_dim, head_dim), k_bits=bits)
    blocks = head_dim // 2
    unit = blocks // 8 if blocks % 64 == 0 else 8  # templates are made of whole ones
    assert table.k_layout(0, 0).code_bytes == 2 * (int(blocks * bits) // unit * unit) // 8


def rotate(x, positions, inverse_frequency):
    """Neox RoPE of ``[T, H, D]`` at positions ``[T]``."""
    angle = positions.double()[:, None, None] * inverse_frequency
    a, b = x.chunk(2, -1)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


@pytest.fixture(scope="module")
def structured():
    """Pre-RoPE q, k ``[T, 2, 64]`` as attention heads have them: uneven blocks, means, shared directions."""
    generator = torch.Generator().manual_seed(3)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    tokens, heads, dim = 1024, 2, 64
    size = torch.exp(0.8 * randn(heads, dim // 2)).repeat(1, 2)
    mean, mix = 1.5 * randn(heads, dim), randn(heads, dim, dim) / dim**0.5
    k = (mean + torch.einsum("thd,hde->the", randn(tokens, heads, dim), mix + torch.eye(dim))) * size
    q = (mean + torch.einsum("thd,hde->the", randn(tokens, heads, dim), mix + torch.eye(dim))) * size
    return 0.35 * q, k


def attention_kl(q, k, k_hat):
    """Mean softmax KL(exact || quantized) of the last 256 queries, causal."""
    start = q.shape[0] - 256
    mask = torch.arange(q.shape[0])[None] > torch.arange(start, q.shape[0])[:, None]

    def log_prob(keys):
        logits = torch.einsum("thd,shd->hts", q[start:], keys) / q.shape[-1] ** 0.5
        return logits.masked_fill(mask, -torch.inf).log_softmax(-1).masked_fill(mask, 0.0)

    exact, approximate = log_prob(k), log_prob(k_hat)
    return float(((exact.exp() * (exact - approximate)).masked_fill(mask, 0.0)).sum(-1).mean())


def shifted_kl(codec, q, k, shift):
    positions = torch.arange(q.shape[0]) + shift
    inverse_frequency = 10_000.0 ** (-torch.arange(32, dtype=torch.float64) / 32)
    q, k = rotate(q, positions, inverse_frequency), rotate(k, positions, inverse_frequency)
    read = round_trip(codec, k.float(), torch.zeros_like(k, dtype=torch.float32), positions)[0]
    return attention_kl(q, k, read.double())


def test_template_is_as_good_thirty_thousand_positions_on(structured):
    """A permutation of blocks cannot learn positions. A KLT of the same keys does, which shows the test can tell."""
    q, k = structured
    inverse_frequency = 10_000.0 ** (-torch.arange(32, dtype=torch.float64) / 32)
    positions = torch.arange(q.shape[0])
    rope = ROPES["neox"]
    sums = MomentSums(1, 2, [rope])
    turned_q, turned_k = (rotate(x, positions, inverse_frequency) for x in (q, k))
    sums.add(0, 0, turned_q, turned_k, k)
    codec = build(sums.mean(q.shape[0]), rope).layer_codec(0)
    near, far = shifted_kl(codec, q, k, 0), shifted_kl(codec, q, k, 30_000)
    print("KL", near, far)
    # Other keys are rounded there: over eight such shifts the KL is within 12 % of the smallest, in no order.
    assert far == pytest.approx(near, rel=0.15)

    # The control: balanced KLT fitted to the same post-RoPE moments, under the same widths.
    k_in, q_in = [], []
    layout = codec.layout.k[0]
    for h in range(2):
        s_q, s_k = (torch.einsum("td,te->de", x[:, h], x[:, h]) / x.shape[0] for x in (turned_q, turned_k))
        root = torch.linalg.cholesky(s_q)
        values, vectors = torch.linalg.eigh(root.T @ s_k @ root)
        forward = torch.flip(vectors, [1]).T @ root.T  # decorrelates k where q is white
        gain = torch.cat([values.flip(0)[a:b].mean().sqrt().expand(b - a) for a, b, _ in layout.groups])
        rotation = torch.block_diag(*(haar_rotation(b - a) for a, b, _ in layout.groups))
        forward = rotation @ forward / gain[:, None]
        k_in.append(forward)
        q_in.append(torch.linalg.inv(forward).T)
    klt = replace(codec, k_in=torch.stack(k_in).float(), q_in=torch.stack(q_in).float())
    print("KLT", shifted_kl(klt, q, k, 0), shifted_kl(klt, q, k, 30000))
    assert shifted_kl(klt, q, k, 30_000) > 1.25 * shifted_kl(klt, q, k, 0) > 1.25 * near


def test_page_means_are_as_good_wherever_pages_lie(structured):
    """Across the borders of pages, thirty thousand positions on, and better than the same widths without them."""
    q, k = structured
    theta = 10_000.0 ** (-torch.arange(32, dtype=torch.float64) / 32)
    k = k + 10 * (theta * 512 <= 2).double().repeat(2)  # a bias in slow blocks, as models with QKV bias have it
    rope, positions = ROPES["neox"], torch.arange(q.shape[0])
    turned_q, turned_k = (rotate(x, positions, theta) for x in (q, k))
    codecs = []
    for known in ([theta], None):
        sums = MomentSums(1, 2, [rope], known)
        sums.add(0, 0, turned_q, turned_k, k)
        codecs.append(build(sums.mean(q.shape[0]), rope).layer_codec(0))
    means, plain = codecs
    assert means.mean.page == 512 and plain.mean is None and means.layout.head_bytes == plain.layout.head_bytes
    costs = [shifted_kl(means, q, k, shift) for shift in (0, 200, 30_000)]
    print("KL", costs, shifted_kl(plain, q, k, 0))
    assert max(costs) < 1.25 * min(costs)  # a key at the border of a page is farthest from its mean
    assert max(costs) < 0.5 * min(shifted_kl(plain, q, k, shift) for shift in (0, 30_000))


def test_template_beats_uniform_at_equal_bytes(structured):
    q, k = structured
    sums = MomentSums(1, 2, [ROPES["neox"]])
    sums.add(0, 0, q, k, k)
    template, uniform = (build(sums.mean(q.shape[0]), rule=a).layer_codec(0) for a in ("template", "uniform"))
    assert template.layout.head_bytes == uniform.layout.head_bytes
    assert shifted_kl(template, q, k, 5_000) < 0.7 * shifted_kl(uniform, q, k, 5_000)


def test_partial_rotary_table_has_layers_of_both_kinds(make_moments):
    """A layer without RoPE beside one with it, as in SmolLM3."""
    rope = [RopeBlocks(64, 64), RopeBlocks(64, 0)]
    table = build_table(make_moments(), rope, k_bits=3, v_bits=3)
    assert table.header.rope == ((64, True), (0, True))
    assert isinstance(table.k_layout(1, 0), CodeLayout)
    assert not torch.equal(table.layer_codec(0).k_in, table.layer_codec(1).k_in)
