"""Tables with a correct hash that make no sense: each is refused with what is wrong."""

from dataclasses import replace

import pytest
import torch

from sglang_blockgtq.calibrate.build import build_table
from sglang_blockgtq.calibrate.rope import RopeBlocks
from sglang_blockgtq.calibrate.table import AllocationTable, TableError
from sglang_blockgtq.calibrate.validate import validate
from sglang_blockgtq.kernels.device.tables import MAX_TEMPLATES

RULES = ("uniform", "template", "paper", "product", "paper-block", "product-block")


def built(moments, rule: str, **kw):
    allocator, _, granularity = rule.partition("-")
    rope = [RopeBlocks(64, 64)] * moments.layers
    names = {"allocator": allocator, "granularity": granularity or "segment"}
    return build_table(moments, rope, **{"k_bits": 3, "v_bits": 3, **names, **kw})


@pytest.fixture
def refused(make_moments, tmp_path):
    """Saves a changed table under a hash that is right, and returns why it is refused."""

    def refused(rule="template", bias=None, **changes) -> str:
        table = built(make_moments(bias=bias), rule)
        tensors = {name: tensor.clone() for name, tensor in table.tensors.items()}
        header = table.header
        for name, change in changes.items():
            name = name.replace("rotation_", "rotation.")
            if hasattr(header, name):
                header = replace(header, **{name: change})
            elif change is None:
                del tensors[name]
            elif callable(change):
                change(tensors[name])
            else:
                tensors[name] = change
        path = tmp_path / "t.safetensors"
        AllocationTable(header, tensors).sealed().save(path)
        with pytest.raises(TableError) as e:
            AllocationTable.load(path)
        message = str(e.value)
        assert message.startswith(f"table {path}: ") and "\n" not in message
        assert message.endswith("; make it again with python -m sglang_blockgtq.calibrate")
        return message.removeprefix(f"table {path}: ").rpartition("; ")[0]

    return refused


@pytest.mark.parametrize("rule", RULES)
def test_what_calibration_makes_is_sound(make_moments, rule):
    validate(built(make_moments(), rule))
    for base in (1e4, 1e8):
        validate(built(make_moments(bias=0.9, base=base), rule))
    validate(built(make_moments(spread=6, bias=0.5), rule, k_bits=2))
    dead = make_moments()
    dead.q[0, 0], dead.k[0, 1], dead.v[1, 1] = 0, 0, 0
    validate(built(dead, rule))
    dead.q[:], dead.k[:], dead.v[:] = 0, 0, 0
    validate(built(dead, rule))


@pytest.mark.parametrize(
    "name, value, says",
    [
        ("k_bits", float("nan"), "k_bits = nan is not within 1 to 8"),
        ("k_bits", "3", "k_bits = '3' is not within 1 to 8"),
        ("v_bits", 9.0, "v_bits = 9.0 is not within 1 to 8"),
        ("v_bits", float("inf"), "v_bits = inf is not within 1 to 8"),
        ("layers", 0, "layers = 0 is no whole number of at least 1"),
        ("layers", 2.0, "layers = 2.0 is no whole number of at least 1"),
        ("kv_heads", True, "kv_heads = True is no whole number of at least 1"),
        ("tokens", "many", "tokens = 'many' is no whole number of at least 1"),
        ("head_dim", 40, "in its header, head_dim 40 is not supported"),
        ("v_head_dim", 1 << 30, "is not supported"),
        ("allocator", "best", "allocator = 'best' is none of uniform, paper, product, template"),
        ("allocator", None, "allocator = None is none of"),
        ("granularity", "head", "granularity = 'head' is none of block, segment"),
        ("granularity", "block", "granularity block: has no effect on the allocator template"),
        ("scale_rule", "lsq", "scale_rule = 'lsq' is none of norm, unbiased"),
        ("scale_search", (), "scale_search = () is no list of positive numbers"),
        ("scale_search", (1.0, float("nan")), "is no list of positive numbers"),
        ("scale_search", 1.0, "is no list of positive numbers"),
        ("rope", ((64, True),), "is no list of one pairing for each of 2 layers"),
        ("rope", None, "is no list of one pairing for each of 2 layers"),
        ("rope", ((64, True), (64,)), "rope of layer 1 = (64,) is no pair"),
        ("rope", ((64, True), (True, 64)), "rope of layer 1 = (True, 64) is no pair"),
        ("rope", ((64, True), (66, True)), "rotary_dim 66 of head_dim 64"),
        ("config_hash", None, "config_hash = None is no text"),
        ("model_id", 7, "model_id = 7 is no text"),
        ("layers", 3, "is no list of one pairing for each of 3 layers"),
        ("kv_heads", 3, "tensor widths is [2, 2, 32] torch.uint8, its header asks for [2, 3, 32] torch.uint8"),
        ("v_head_dim", 96, "tensor v_rotation is [64, 64] torch.float32, its header asks for [96, 96]"),
        ("k_bits", 2.0, "layer 0, KV head 0: widths spend more than the 64 bits of k_bits = 2"),
    ],
)
def test_header_fields(refused, name, value, says):
    assert says in refused(**{name: value})


def put(value, at=(1, 0, 3)):
    def change(tensor):
        tensor[at] = value

    return change


@pytest.mark.parametrize("name", ["balance", "k_gain", "v_gain"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, -1.0, 1e-30])
def test_gains(refused, name, value):
    at = (1, 0) if name == "v_gain" else (1, 0, 3)
    assert refused(**{name: put(value, at)}) == f"layer 1, KV head 0: {name} is not within 1e-18 to 1e+18"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_weights(refused, value):
    assert refused(k_weight=put(value)) == "layer 1, KV head 0: k_weight is not within 0 to 1e+18"


def test_weights_of_nothing(refused):
    assert refused(k_weight=put(0.0, (1, 0))) == "layer 1, KV head 0: k_weight is 0 throughout"


@pytest.mark.parametrize("value", [0, 9, 255])
def test_widths(refused, value):
    assert refused(widths=put(value)) == "layer 1, KV head 0: widths are not all within 1 to 8 bits"


@pytest.mark.parametrize("value", [-1, 32, 5])
def test_order(refused, value):
    def change(order):
        order[1, 0, 3] = value if value != 5 else order[1, 0, 4]

    assert refused(order=change) == "layer 1, KV head 0: order is no permutation of the blocks"


def test_widths_rise_in_stored_order(refused):
    def change(order):
        order[0, 1] = order[0, 1].flip(0)

    assert refused(order=change) == "layer 0, KV head 1: widths increase in stored order"


COST = {"kl": 0.01, "attention_kl": 0.02, "worst_layer": 1, "worst_layer_kl": 0.03, "tokens": 256}


@pytest.mark.parametrize(
    "quality",
    [
        {},
        [],
        0.01,
        "good",
        *({name: value for name, value in COST.items() if name != left_out} for left_out in COST),
        *({**COST, name: float("nan")} for name in COST),
        {**COST, "kl": float("inf")},
        {**COST, "kl": "0.01"},
        {**COST, "kl": None},
        {**COST, "tokens": True},
        {**COST, "novel": 1.0},
    ],
)
def test_costs(refused, quality):
    assert "is not made of the numbers attention_kl, kl, recent, tokens, worst_layer, worst_layer_kl" in refused(
        quality=quality
    )


def test_costs_that_are_sound(make_moments):
    table = built(make_moments(), "template")
    for quality in (None, COST, {**COST, "kl": 0, "worst_layer": 0}, {**COST, "recent": 8}):
        validate(AllocationTable(replace(table.header, quality=quality), table.tensors))


MEAN_TENSORS = ("mean", "theta")


@pytest.mark.parametrize("page", [500, 32, 63, 96, -64, 1, True, False, 512.0, "512", None, float("nan")])
def test_pages_that_fit_no_tiles(refused, page):
    assert refused(bias=0.5, page=page) == (f"page = {page!r} is neither 0 nor a power of two of at least 64 positions")


def test_a_page_and_its_tensors_belong_together(refused):
    assert refused(bias=0.5, page=0) == "it has the unknown tensor mean, theta"
    assert refused(page=512) == "it has no tensor mean, theta"
    for name in MEAN_TENSORS:
        assert refused(bias=0.5, **{name: None}) == f"it has no tensor {name}"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 65_505.0, -65_536.0])
def test_means_that_float16_does_not_hold(refused, value):
    says = refused(bias=0.5, mean=put(value, (1, 0, 31, 1)))
    assert says == "layer 1, KV head 0: mean is not within what float16 holds (65504)"


def test_the_largest_mean_there_is(make_moments):
    table = built(make_moments(bias=0.5), "template")
    table.tensors["mean"][1, 0, 31] = 65_504.0
    validate(table)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3.2, -3.2])
def test_frequencies(refused, value):
    assert (
        refused(bias=0.5, theta=put(value, (1, 3))) == "layer 1, KV head 0: theta is not within pi radians a position"
    )


def test_a_mean_in_a_fast_block(refused):
    says = "layer 1, KV head 1: a block with a mean rotates by more than 2 radians within a page of {} positions"
    assert refused(bias=0.5, mean=put(1e-3, (1, 1, 3, 0))) == says.format(512)
    # Slow within a page of 512, fast within one of 4,096.
    assert refused(bias=0.5, page=4096).endswith("rotates by more than 2 radians within a page of 4096 positions")
    assert refused(bias=0.5, theta=put(-0.5, (1, 31))).startswith("layer 1, KV head 0: a block with a mean rotates")


def test_shapes_and_types_of_means(refused):
    for name, wrong in (
        ("mean", torch.zeros(2, 2, 32)),
        ("mean", torch.zeros(2, 2, 32, 2).half()),
        ("theta", torch.zeros(2, 2, 32).double()),
        ("theta", torch.zeros(2, 32)),
    ):
        says = refused(bias=0.5, **{name: wrong})
        assert says.startswith(f"tensor {name} is {list(wrong.shape)} {wrong.dtype}, its header asks for")


def test_means_of_rows_that_are_not_in_columns(refused):
    """They have no room for a flag."""
    assert "columns" in refused(bias=0.5, v_bits=2.7)


def swap(*at):
    """Exchange two stored channels' values."""

    def change(tensor):
        tensor[1, 0, list(at)] = tensor[1, 0, list(at[::-1])]

    return change


def test_groups_and_scales(refused):
    numbered = "layer 1, KV head 0: group does not number its rotation groups 0, 1, ... in stored order"
    assert refused(group=put(1, (1, 0, 0))) == numbered
    assert refused(group=put(200, (1, 0, slice(32, None)))) == numbered
    assert refused(group=swap(0, 63)) == numbered

    def odd(group):
        group[1, 0] = torch.arange(64) >= 33

    assert refused(group=odd) == "layer 1, KV head 0: group divides a block"
    norms = "layer 1, KV head 0: norm_index is neither 0 throughout nor group"
    assert refused(norm_index=put(1)) == norms
    assert refused("product-block", norm_index=swap(0, 63)) == norms


def test_tensors_that_are_missing_or_more(refused):
    for name in ("widths", "order", "norm_index", "group", "balance", "k_gain", "k_weight", "v_gain", "v_rotation"):
        assert refused(**{name: None}) == f"it has no tensor {name}"
    assert refused(rotation_16=None) == "it has no tensor rotation.16"
    assert refused(rotation_20=torch.eye(20)) == "it has the unknown tensor rotation.20"
    assert refused(codebooks=torch.zeros(9, 256)) == "it has the unknown tensor codebooks"
    assert refused(novel=torch.tensor(1.0)) == "it has the unknown tensor novel"


def test_shapes_and_types(refused):
    says = "tensor k_gain is [2, 2, 32] torch.float32, its header asks for [2, 2, 64] torch.float32"
    assert refused(k_gain=torch.ones(2, 2, 32)) == says
    assert "tensor widths is [2, 2, 32] torch.int64" in refused(widths=torch.ones(2, 2, 32, dtype=torch.long))
    assert "tensor v_gain is [2, 2] torch.float16" in refused(v_gain=torch.ones(2, 2).half())
    assert "tensor rotation.16 is [16]" in refused(rotation_16=torch.ones(16))


@pytest.mark.parametrize("name", ["rotation_16", "v_rotation"])
@pytest.mark.parametrize("value", [0.1, float("nan")])
def test_rotations(refused, name, value):
    says = refused(**{name: put(value, (0, 0))})
    assert says.startswith(f"tensor {name.replace('_16', '.16')} is not orthogonal")


def test_rotations_may_be_rounded(make_moments, tmp_path):
    table = built(make_moments(), "template")
    rounded = {name: x.half().float() if "rotation" in name else x for name, x in table.tensors.items()}
    AllocationTable(table.header, rounded).sealed().save(tmp_path / "t.safetensors")
    assert AllocationTable.load(tmp_path / "t.safetensors")


def test_more_layouts_than_kernels_have_loops_for(make_moments, tmp_path):
    """Each in columns, so that the fast kernels would be asked to read it."""
    table = built(make_moments(layers=3), "template")
    tensors = {name: tensor.clone() for name, tensor in table.tensors.items()}
    kinds = ((6, 3, 2, 1), (5, 4, 2, 1), (5, 3, 3, 1), (5, 3, 2, 2), (4, 4, 3, 1), (4, 4, 2, 2))
    tensors["order"][:] = torch.arange(32)
    tensors["group"][:] = 0
    tensors["widths"] = torch.tensor(kinds, dtype=torch.uint8).repeat_interleave(8, -1).view(3, 2, 32)
    tensors = {name: x for name, x in tensors.items() if not name.startswith("rotation.")}
    tensors["rotation.64"] = torch.eye(64)
    path = tmp_path / "t.safetensors"
    AllocationTable(table.header, tensors).sealed().save(path)
    with pytest.raises(TableError, match=f"keys have 6 layouts in columns; up to {MAX_TEMPLATES} can be served"):
        AllocationTable.load(path)
    tensors["widths"][2] = tensors["widths"][1]
    AllocationTable(table.header, tensors).sealed().save(path)
    assert len(AllocationTable.load(path).k_templates) == MAX_TEMPLATES
