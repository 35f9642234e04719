"""The rows of the ablation: each a name and a recipe. Those of one group change one thing about the same cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from sglang_blockgtq.calibrate.allocate import PAPER_RATE, per_head
from sglang_blockgtq.calibrate.moments import Moments

from . import budgets
from .coder import Cache, Side, mixed
from .hadamard import SEED as HADAMARD_SEED
from .hadamard import with_hadamard
from .lab import Lab, by_token, centred_values, in_frame, with_rule, without_mean
from .methods import Cast, Method

GROUPS = ("reference", "baseline", "frame", "values", "best", "structure", "score", "scale", "protect", "calibration")
PAIRS = ((4, 4), (4, 3), (3, 3), (3, 2), (2, 2))
TIGHT = ((3, 3), (3, 2), (2, 2))
BETWEEN = ((4.5, 4), (3.5, 3), (2.5, 2))  # what half a bit for keys alone brings
BASELINES = ("uniform-haar", "uniform-hadamard", "paper", "paper-segment", "product-segment", "template")
#: Of the frames and the values, those whose rotation is repeated.
REPEATED = (
    *("KLT before RoPE", "KLT, page of 16", "KLT, page of 64", "KLT before RoPE, less the mean, first 4 exact"),
    *("KLT before RoPE, mean by token", "template, mean by token", "template, first 4 exact"),
    *("length kept", "unbiased", "mean by token, unbiased", "KLT, W_o", "unbiased, first 4 exact"),
)
BUDGET_BITS = tuple(2 + i / 2 for i in range(7))  # 2 to 5, which every head dimension has in columns


@dataclass(frozen=True)
class Recipe:
    """One row. make: from the lab and the number of the rotation. seeded: worth repeating with other rotations."""

    group: str
    name: str
    k_bits: float
    v_bits: float
    make: Callable[[Lab, int], Method | None]
    seeded: bool = True

    @property
    def label(self) -> str:
        return f"{self.group}: {self.name} K{self.k_bits:g}V{self.v_bits:g}"


def _of_table(lab: Lab, name: str, k: float, v: float, seed: int) -> tuple[Side, Side]:
    if name in ("uniform-haar", "uniform-hadamard"):
        table = lab.table("uniform", k, v, seed)
        return lab.of_table(table if name == "uniform-haar" else with_hadamard(table, HADAMARD_SEED + seed))
    return lab.of_table(lab.table(name, k, v, seed))


def _of_tables(name: str, k: float, v: float) -> Callable[[Lab, int], Cache]:
    return lambda lab, seed: Cache(name, *_of_table(lab, name, k, v, seed))


def _cache(name: str, keys: Callable[[Lab, int], Side], values: Callable[[Lab, int], Side], sink: int = 0):
    return lambda lab, seed: Cache(name, keys(lab, seed), values(lab, seed), sink)


def _exact(lab: Lab, seed: int) -> Side:
    return lab.exact()


def _template(bits: float) -> Callable[[Lab, int], Side]:
    return lambda lab, seed: lab.keys("template", bits, seed)


def _no_page_mean(lab: Lab, bits: float, seed: int, taken: bool = False) -> Side:
    """Shipped keys without page means; ``taken``: allocated to what is left of keys less their mean before RoPE."""
    return lab.keys("template", bits, seed, without_mean(lab.subject.moments, taken))


def _mean_by_token(bits: float) -> Callable[[Lab, int], Side]:
    """Shipped keys less the mean of all blocks, turned to each token's own position, where that is better."""
    return _by_token(lambda lab, seed: in_frame(lab, _no_page_mean(lab, bits, seed, True), 0, True))


def _values(bits: float) -> Callable[[Lab, int], Side]:
    return lambda lab, seed: lab.values(bits, seed)


def _klt(bits: float, page: int | None = 1, **options) -> Callable[[Lab, int], Side]:
    return lambda lab, seed: lab.klt_keys(bits, page, seed=seed, **options)


def _klt_values(bits: float, **options) -> Callable[[Lab, int], Side]:
    return lambda lab, seed: lab.klt_values(bits, seed=seed, **options)


def _by_token(side: Callable[[Lab, int], Side]) -> Callable[[Lab, int], Side]:
    return lambda lab, seed: by_token(side(lab, seed))


def _reference() -> Iterator[Recipe]:
    def cast(name: str, dtype: torch.dtype):
        return lambda lab, seed: Cast(name, dtype, lab.subject.head_dim, lab.subject.head_dim)

    yield Recipe("reference", "float32", 32, 32, lambda lab, seed: None, False)
    # Through the hook and back: what is left is the measurement's own noise.
    yield Recipe("reference", "float32 through the hook", 16, 16, _cache("exact", _exact, _exact), False)
    yield Recipe("reference", "bf16", 16, 16, cast("bf16", torch.bfloat16), False)
    yield Recipe("reference", "fp8_e4m3", 8, 8, cast("fp8_e4m3", torch.float8_e4m3fn), False)


def _baseline() -> Iterator[Recipe]:
    for pair in PAIRS:
        for name in BASELINES:
            yield Recipe("baseline", name, *pair, _of_tables(name, *pair))
    for pair in BETWEEN:
        yield Recipe("baseline", "template", *pair, _of_tables("template", *pair))


def _frame() -> Iterator[Recipe]:
    """Keys in other frames at the bytes of ``template``; values as they ship.

    A static mean makes a large vector of a small one, as a sink's key is: so it is also tried with these kept exact.
    ``template`` in another frame, or less a mean by token, has no page means.
    """

    def framed(bits: float, page: int) -> Callable[[Lab, int], Side]:
        return lambda lab, seed: in_frame(lab, _no_page_mean(lab, bits, seed), page)

    for k, v in TIGHT:
        rows: dict[str, tuple] = {
            "KLT before RoPE": (_klt(k),),
            "KLT before RoPE, unbiased": (_klt(k, unbiased=True),),
            "KLT before RoPE, less the mean": (_klt(k, centred=True),),
            "KLT before RoPE, first 4 exact": (_klt(k), 4),
            "KLT before RoPE, less the mean, first 1 exact": (_klt(k, centred=True), 1),
            "KLT before RoPE, less the mean, first 4 exact": (_klt(k, centred=True), 4),
            "KLT before RoPE, less the mean, unbiased, first 4 exact": (_klt(k, centred=True, unbiased=True), 4),
            "KLT, page of 16": (_klt(k, 16),),
            "KLT, page of 64": (_klt(k, 64),),
            "KLT, page of 16, less the mean, first 4 exact": (_klt(k, 16, centred=True), 4),
            "KLT, page of 64, less the mean, first 4 exact": (_klt(k, 64, centred=True), 4),
            "KLT before RoPE, mean by token": (_by_token(_klt(k, centred=True)),),
            "KLT, page of 16, mean by token": (_by_token(_klt(k, 16, centred=True)),),
            "template, mean by token": (_mean_by_token(k),),
            "template before RoPE": (framed(k, 1),),
            "template, page of 16": (framed(k, 16),),
            "template, first 4 exact": (_template(k), 4),
            "KLT after RoPE, averaged over 32K": (_klt(k, None),),
            "KLT before RoPE, product-segment": (_klt(k, allocator="product"),),
            "KLT before RoPE, metric of the answer": (_klt(k, metric="answer"),),
            "KLT before RoPE, weighted": (_klt(k, weighted=True),),
        }
        for name, (keys, *sink) in rows.items():
            yield Recipe("frame", name, k, v, _cache(name, keys, _values(v), *sink), name in REPEATED)
    yield Recipe("frame", "KLT before RoPE", 4, 4, _cache("KLT before RoPE", _klt(4), _values(4)))


def _with_rule(bits: float, rule: str) -> Callable[[Lab, int], Side]:
    """Values behind a rotation under one of the scale rules (kernels.format.codec.SCALE_RULES)."""
    return lambda lab, seed: with_rule(lab.values(bits, seed), rule)


def _less_mean(values: Callable[[Lab, int], Side]) -> Callable[[Lab, int], Side]:
    return lambda lab, seed: centred_values(lab, values(lab, seed))


def _hadamard_values(bits: float) -> Callable[[Lab, int], Side]:
    """As they ship, but behind a Hadamard matrix."""
    return lambda lab, seed: lab.of_table(with_hadamard(lab.table("template", 2, bits, seed), HADAMARD_SEED + seed))[1]


def _value_rows() -> Iterator[Recipe]:
    """Values alone at two bits, keys exact; then the best of it beside the keys that ship."""

    less_mean, unbiased = _less_mean(_values(2)), _with_rule(2, "unbiased")

    def by_layer(lab: Lab, seed: int) -> Side:
        sides = {bits: lab.values(bits, seed) for bits in (1.5, 2.0, 2.5, 3.0)}
        sizes = {bits: side.sizes[0] for bits, side in sides.items()}
        cost = budgets.cost_at(lab.once("value cost", lambda: budgets.measured_cost(lab, sides[2.0], True)), 2, sizes)
        return mixed([sides[b] for b in budgets.spend(cost, sizes, len(cost) * sizes[2.0])])

    rows: dict[str, tuple] = {
        "length kept": (_with_rule(2, "norm"),),
        "unbiased": (unbiased,),
        "less the mean": (less_mean,),
        "Hadamard": (_hadamard_values(2),),
        "KLT, plain": (_klt_values(2, metric="plain"),),
        "KLT, W_o": (_klt_values(2),),
        "KLT, W_o, less the mean": (_klt_values(2, centred=True),),
        "KLT, answer": (_klt_values(2, metric="answer"),),
        "KLT, answer, less the mean": (_klt_values(2, metric="answer", centred=True),),
        "KLT, plain, one width, unbiased": (_klt_values(2, metric="plain", flat=True, unbiased=True),),
        "KLT, W_o, weighted, unbiased": (_klt_values(2, weighted=True, unbiased=True),),
        "KLT, answer, weighted, unbiased": (_klt_values(2, metric="answer", weighted=True, unbiased=True),),
        "bits by layer, measured": (by_layer,),
        "mean by token": (_by_token(less_mean),),
        "mean by token, unbiased": (_by_token(_less_mean(unbiased)),),
        "first 1 exact": (_values(2), 1),
        "first 4 exact": (_values(2), 4),
        "unbiased, first 4 exact": (unbiased, 4),
        "less the mean, first 4 exact": (less_mean, 4),
        "less the mean, unbiased, first 4 exact": (_less_mean(unbiased), 4),
        "KLT, W_o, less the mean, unbiased, first 4 exact": (_klt_values(2, centred=True, unbiased=True), 4),
    }
    for name, (values, *sink) in rows.items():
        yield Recipe("values", name, 16, 2, _cache(name, _exact, values, *sink), name in REPEATED)
    for name, rule in (("length kept", "norm"), ("unbiased", "unbiased")):
        yield Recipe("values", name, 16, 3, _cache(name, _exact, _with_rule(3, rule)))


def _best() -> Iterator[Recipe]:
    """Keys and values improved together: first what the kernels that ship can read, then what other frames add."""
    for k, v in TIGHT:
        values = _with_rule(v, "unbiased")
        v_by_token = _by_token(_less_mean(values))

        def row(name: str, keys: Callable[[Lab, int], Side], sink: int, k=k, v=v, values=values) -> Recipe:
            return Recipe("best", name, k, v, _cache(name, keys, values, sink))

        both = _klt(k, centred=True, unbiased=True)
        yield row("template, unbiased V", _template(k), 0)
        yield row("template, Hadamard V", _template(k), 0, values=_hadamard_values(v))
        yield row("template, unbiased V, first 4 exact", _template(k), 4)
        yield row("template, mean by token, K and unbiased V", _mean_by_token(k), 0, values=v_by_token)
        alone = _by_token(_klt(k, centred=True))
        yield row("KLT before RoPE, mean by token, K and unbiased V", alone, 0, values=v_by_token)
        in_pages = _by_token(_klt(k, 16, centred=True))
        yield row("KLT, page of 16, mean by token, K and unbiased V", in_pages, 0, values=v_by_token)
        yield row("KLT before RoPE, unbiased K and V", _klt(k, unbiased=True), 0)
        yield row("KLT before RoPE, mean by token, unbiased K and V", _by_token(both), 0)
        yield row("KLT before RoPE less the mean, unbiased V, first 1 exact", _klt(k, centred=True), 1)
        yield row("KLT before RoPE less the mean, unbiased V, first 4 exact", _klt(k, centred=True), 4)
        yield row("KLT before RoPE less the mean, unbiased K and V, first 4 exact", both, 4)
        yield row("KLT, page of 16, less the mean, unbiased V, first 4 exact", _klt(k, 16, centred=True), 4)


def _product_by_4(moments: Moments, bits: float) -> torch.Tensor:
    """The product score with the paper's ``4^-b`` in place of what the codebooks measure."""
    return per_head(moments, bits, moments.q * moments.k, PAPER_RATE)


def _structure() -> Iterator[Recipe]:
    """What belongs to a key beside its widths: means, scales, balance, gains; and the rate that widths are given by."""
    changes: dict[str, tuple[str, dict]] = {
        "template, no page mean": ("template", {"means": False}),
        "template, page mean of 64 tokens": ("template", {"page": 64}),
        "template, page mean of 4096 tokens": ("template", {"page": 4096}),
        # Rows that hold several scales hold no means.
        "template, no page mean, a scale for each width": ("template", {"means": False, "norms": "group"}),
        "template, not balanced": ("template", {"balance": False}),
        "template, no static gains": ("template", {"gains": False}),
        "product": ("product", {}),
        "product, one scale": ("product", {"norms": "one"}),
        "product, 4^-b": ("product", {"widths": _product_by_4}),
    }
    for k, v in ((3, 3), (2, 2)):
        for name, (base, change) in changes.items():
            keys = lambda lab, seed, k=k, base=base, change=change: lab.ruled_keys(base, k, seed, **change)  # noqa: E731
            yield Recipe("structure", name, k, v, _cache(name, keys, _values(v)), False)


def _scored(name: str, bits: float) -> Callable[[Lab, int], Side]:
    """The shipped keys, widths by the Fisher information of each block in place of the query's energy."""

    def make(lab: Lab, seed: int) -> Side:
        return lab.keys(name, bits, seed, replace(lab.subject.moments, q=lab.sensitivity.k_blocks))

    return make


def _score() -> Iterator[Recipe]:
    for k, v in TIGHT:
        for name in ("template", "product-segment"):
            label = f"{name}, score of the answer"
            yield Recipe("score", label, k, v, _cache(label, _scored(name, k), _values(v)), False)


def _scale() -> Iterator[Recipe]:
    """The scale rule of keys."""
    rules = {
        "length kept": ("norm", None),
        "unbiased": ("unbiased", None),
        "norm-corrected, no search": ("norm", (1.0,)),
    }
    for bits in (3, 2):
        for name, (rule, search) in rules.items():
            keys = lambda lab, seed, b=bits, r=rule, s=search: with_rule(lab.keys("template", b, seed), r, s)  # noqa: E731
            yield Recipe("scale", name, bits, bits, _cache(name, keys, _values(bits)), False)


def _key_sizes(lab: Lab, seed: int) -> dict[float, Side]:
    return {bits: lab.keys("template", bits, seed) for bits in (*BUDGET_BITS, 8.0)}


def _by_layer(
    lab: Lab, seed: int, cost: Sequence[float], bits: float, fixed: dict[int, float] | None = None, spare: float = 0.0
) -> Side:
    """Keys at a mean of ``bits``, less ``spare`` bytes in all, spent on layers by what each costs."""
    sides = _key_sizes(lab, seed)
    sizes = {b: side.sizes[0] for b, side in sides.items()}
    total = len(cost) * sizes[bits] - spare
    chosen = budgets.spend(budgets.cost_at(cost, 3, list(sizes)), sizes, total, fixed)
    return mixed([sides[b] for b in chosen])


def _protected(layers: Sequence[int], bits: int, equal: bool) -> Callable[[Lab, int], Cache]:
    """K and V of some layers at 8 bits; ``equal``: the other layers' keys pay for it, evenly."""

    def make(lab: Lab, seed: int) -> Cache:
        count = len(lab.subject.rope)
        own = {i % count for i in layers}
        values = [lab.values(8 if i in own else bits, seed) for i in range(count)]
        if not equal:
            return Cache(
                "", mixed([lab.keys("template", 8 if i in own else bits, seed) for i in range(count)]), mixed(values)
            )
        spare = sum(mixed(values).sizes) - sum(lab.values(bits, seed).sizes)
        flat = [1.0] * count
        return Cache("", _by_layer(lab, seed, flat, bits, dict.fromkeys(own, 8.0), spare), mixed(values))

    return make


def _protect() -> Iterator[Recipe]:
    for k, v in ((3, 3), (2, 2)):
        for sink in (1, 4):
            name = f"first {sink} exact"
            yield Recipe("protect", name, k, v, _cache(name, _template(k), _values(v), sink), False)
    for name, layers in (("first layer", (0,)), ("last layer", (-1,)), ("first and last layer", (0, -1))):
        yield Recipe("protect", f"{name} at 8 bits, more bytes", 3, 3, _protected(layers, 3, False), False)
        yield Recipe("protect", f"{name} at 8 bits", 3, 3, _protected(layers, 3, True), False)

    def measured(lab: Lab, seed: int, bits: float) -> Side:
        cost = lab.once("key cost", lambda: budgets.measured_cost(lab, lab.keys("template", 3)))
        return _by_layer(lab, seed, cost, bits)

    def predicted(lab: Lab, seed: int, bits: float) -> Side:
        cost = lab.sensitivity.k_blocks * lab.subject.moments.k
        return _by_layer(lab, seed, cost.sqrt().sum(-1).square().sum(-1).tolist(), bits)

    for bits in (3, 2.5):
        v = 3 if bits == 3 else 2
        for name, keys in (("K bits by layer, measured", measured), ("K bits by layer, predicted", predicted)):
            side = lambda lab, seed, f=keys, b=bits: f(lab, seed, b)  # noqa: E731
            yield Recipe("protect", name, bits, v, _cache(name, side, _values(v)), False)
        yield Recipe("protect", "the same bits in all layers", bits, v, _cache("", _template(bits), _values(v)), False)


def frequency_prior(lab: Lab) -> Moments:
    """Energies from RoPE alone, no calibration: a slow block has a little more than a fast one.

    What matters is the order; the slope is kept small, since gains follow from it and a wrong one clips.
    """
    own = lab.subject.moments
    period = 2 * torch.pi / lab.inv_freq.double().cpu()
    energy = torch.ones_like(own.k)
    energy[..., : len(period)] = (period / period[0]) ** 0.1
    return Moments(energy, energy.clone(), own.v, 0)


def _calibration() -> Iterator[Recipe]:
    for bits in (3, 2):
        for text, tokens in (("default", 512), ("default", 8192), ("source", 2048)):
            name = f"{text} text, {tokens} tokens"
            values = _values(bits)
            keys = lambda lab, seed, b=bits, w=(text, tokens): lab.keys("template", b, seed, lab.moments(*w))  # noqa: E731
            yield Recipe("calibration", f"template, {name}", bits, bits, _cache(name, keys, values), False)
            keys = _klt(bits, calibration=(text, tokens))
            yield Recipe(
                "calibration", f"KLT before RoPE, {name}", bits, bits, _cache(name, keys, _values(bits)), False
            )
        keys = lambda lab, seed, b=bits: lab.keys("template", b, seed, frequency_prior(lab))  # noqa: E731
        yield Recipe("calibration", "template, no text", bits, bits, _cache("", keys, _values(bits)), False)


def recipes() -> list[Recipe]:
    """All rows, the most telling first within a group."""
    makers = (_reference, _baseline, _frame, _value_rows, _best, _structure, _score, _scale, _protect, _calibration)
    return [recipe for maker in makers for recipe in maker()]
