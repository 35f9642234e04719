"""A step's tokens in the rows of every layer by one launch, against a launch for each layer."""

from dataclasses import replace

import pytest
import torch

from sglang_blockgtq.kernels.decode.recent import Recent
from sglang_blockgtq.kernels.device.tables import templates_of
from sglang_blockgtq.kernels.encode import encoder, step
from sglang_blockgtq.kernels.encode.encoder import Encoder
from sglang_blockgtq.kernels.encode.step import StepEncoder
from sglang_blockgtq.kernels.layer import TritonLayer

from .matrix import DEVICE, LARGE, MEANS, OTHER_VALUES, PAGES, TEMPLATE, TEMPLATES, WIDE, Case, data, over

SLOTS, ROOM, WINDOW = 64, 12, 5
#: Rows of a program for each token: 0 by the kernel for a few, 1 and 8 by that for many.
WAYS = {"few": (1 << 30, 0), "many": (0, 1), "spread": (0, 8)}


def layers_of(case: Case) -> list[Encoder]:
    """Encoders of three, with values turned each in another way, and 255 in every byte of their rows."""
    codec, layers = data(case).codec, []
    for i in range(3):
        turned = replace(codec, v_in=codec.v_in.roll(i, 1), v_out=codec.v_out.roll(i, 1))
        layer = TritonLayer(turned, DEVICE, templates_of(codec.layout.k))
        layer.bind(torch.full_like(layer.new_rows(SLOTS, DEVICE), 255))
        layers.append(layer.encoder)
    return layers


def kept(case: Case, batch: int, layers: int) -> tuple[Recent, list[tuple[torch.Tensor, torch.Tensor]], torch.Tensor]:
    """A step's tokens where attention leaves them, NaN elsewhere; themselves, of each layer; and their positions."""
    d, dtype, generator = data(case), getattr(torch, case.dtype), torch.Generator().manual_seed(3)
    v_dim = case.v_dim or case.head_dim
    recent = Recent.of(layers, ROOM, 16, WINDOW, case.heads, case.head_dim, v_dim, dtype, DEVICE)
    recent.bind(20)
    recent.k.fill_(torch.nan)
    recent.v.fill_(torch.nan)
    requests = torch.arange(20, 20 - batch, -1, device=DEVICE) - 9 * (torch.arange(batch, device=DEVICE) % 3 == 2)
    pick = torch.randperm(len(d.k), generator=generator)[:batch].to(DEVICE)
    positions = d.positions[pick]
    recent.begin(requests, positions + 1)
    places, own = recent.step[3, :batch].long(), []
    for i in range(layers):
        k, v = d.k[pick] * (1 + i), d.v[pick] - i
        recent.k[i].flatten(0, 1)[places], recent.v[i].flatten(0, 1)[places] = k, v
        own.append((k, v))
    return recent, own, positions


@pytest.mark.parametrize("way", WAYS)
@over([TEMPLATE, PAGES, WIDE, OTHER_VALUES, TEMPLATES[0], MEANS, LARGE[0]])
def test_every_layer_as_alone(case, way, monkeypatch):
    most, per_token = WAYS[way]
    if per_token > 1 and len(data(case).tables.search) == 1:
        pytest.skip("no search, so no more rows")
    monkeypatch.setattr(step, "FEW_TOKENS", most)
    monkeypatch.setattr(encoder, "FEW_CHANNELS", most)
    for module in (step, encoder):
        monkeypatch.setattr(module, "rows_per_token", lambda *_: per_token)
    batch = 3 if way == "few" and DEVICE == "cpu" else 11
    mine, alone = layers_of(case), layers_of(case)
    recent, own, positions = kept(case, batch, len(mine))
    loc = torch.randperm(SLOTS, generator=torch.Generator().manual_seed(5))[:batch].to(DEVICE)
    StepEncoder(mine, recent)(loc, positions)
    for one, other, (k, v) in zip(mine, alone, own, strict=True):
        other(k, v, loc, positions)
        assert torch.equal(one.rows, other.rows)
    assert not torch.equal(mine[0].rows, mine[1].rows)


def test_layers_of_another_structure_have_a_launch_of_their_own():
    """Of other bits, as a table may give them, and of both at once."""
    other = replace(TEMPLATE, k_bits=4)
    mine, alone = ([*layers_of(TEMPLATE), *layers_of(other)] for _ in range(2))
    recent, own, positions = kept(TEMPLATE, 3, len(mine))
    encode, loc = StepEncoder(mine, recent), torch.tensor([5, 40, 17], device=DEVICE)
    assert [[layers for _, layers in launches] for launches in encode._launches.values()] == [[3, 3]] * 3
    encode(loc, positions)
    for one, two, (k, v) in zip(mine, alone, own, strict=True):
        two(k, v, loc, positions)
        assert torch.equal(one.rows, two.rows)


def test_more_tokens_than_are_kept_are_refused():
    recent, _, _ = kept(TEMPLATE, 3, 3)
    none = torch.zeros(ROOM + 1, dtype=torch.int64, device=DEVICE)
    with pytest.raises(ValueError, match=f"{ROOM + 1} tokens: {ROOM} are kept"):
        StepEncoder(layers_of(TEMPLATE), recent)(none, none)


def test_a_few_tokens_many_and_a_row_for_each_factor():
    """What a step's tokens go to, by their number and that of programs that run at a time."""
    encode = StepEncoder(layers_of(TEMPLATE), kept(TEMPLATE, 3, 3)[0])
    ways = [encode.rows_per_token(n) for n in (1, step.FEW_TOKENS, step.FEW_TOKENS + 1, 352, 353)]
    assert ways == [0, 0, 8, 8, 1]
