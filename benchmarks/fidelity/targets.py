"""What the results must show, computed from the CSV's rows; and the summary a person reads."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import fmean

Row = dict[str, str | int | float]

BASELINE = "uniform"
CONTENDERS = ("paper", "product", "template")
KL_RATIO = 0.37  # softmax KL of template over uniform's, at most, at the same bytes
PPL_MARGIN = 0.005  # K8V8 against the unquantized cache
FAR = 4096  # "beyond": windows that start here or later


@dataclass
class Target:
    text: str
    value: str
    holds: bool


def is_attention(row: Row) -> bool:
    """Attention rows have a layer; perplexity rows have none (an empty column in the CSV)."""
    return row.get("layer") not in ("", None)


def select(rows: Iterable[Row], method: str, bits: float, shift: int = 0, start: int = 0) -> list[Row]:
    """Attention rows of one method at K ``bits``, from windows that start at ``start`` or later."""
    return [
        row
        for row in rows
        if is_attention(row)
        and row["method"] == method
        and float(row["k_bits"]) == bits
        and int(row["shift"]) == shift
        and int(str(row["window"]).split("-")[0]) >= start
    ]


def mean(rows: Iterable[Row], column: str) -> float:
    """Mean of a column; every window has equally many queries."""
    return fmean(float(row[column]) for row in rows)


def by_layer(rows: Iterable[Row], column: str) -> dict[int, float]:
    """Mean over windows, per layer."""
    layers: dict[int, list[float]] = {}
    for row in rows:
        layers.setdefault(int(row["layer"]), []).append(float(row[column]))
    return {layer: fmean(values) for layer, values in sorted(layers.items())}


def perplexity_row(rows: Iterable[Row], method: str, k_bits: float, v_bits: float) -> Row:
    for row in rows:
        if not is_attention(row) and row["method"] == method:
            if (float(row["k_bits"]), float(row["v_bits"])) == (k_bits, v_bits):
                return row
    raise ValueError(f"no perplexity row of {method} at K {k_bits} V {v_bits}")


def _mae(rows: list[Row], bits: int, method: str) -> Target:
    base = by_layer(select(rows, BASELINE, bits), "mae")
    mine = by_layer(select(rows, method, bits), "mae")
    ratios = [mine[layer] / base[layer] for layer in base]
    won = sum(r < 1 for r in ratios)
    return Target(
        f"K{bits}: {method}'s logit MAE below uniform's on every layer",
        f"{won}/{len(ratios)} layers, ratio mean {fmean(ratios):.3f}, worst {max(ratios):.3f}",
        won == len(ratios) > 0,
    )


def _kl(rows: list[Row], label: str, pick: Callable[[str], list[Row]]) -> Target:
    mine, base = pick("template"), pick(BASELINE)
    ratio = mean(mine, "softmax_kl") / mean(base, "softmax_kl")
    a, b = by_layer(mine, "softmax_kl"), by_layer(base, "softmax_kl")
    worst = max(a[layer] / b[layer] for layer in b)
    mine_bytes, base_bytes = (float(x[0]["bytes_per_token_head"]) for x in (mine, base))
    return Target(
        f"K3: template's softmax KL at most {KL_RATIO} of uniform's at its bytes, {label}",
        f"{ratio:.3f} (worst layer {worst:.2f}) at {mine_bytes:g} and {base_bytes:g} bytes",
        ratio <= KL_RATIO and mine_bytes == base_bytes,
    )


def check(rows: list[Row], shift: int) -> list[Target]:
    """All targets. ``shift``: the position shift whose rows are held to them."""
    out = [_mae(rows, bits, method) for bits in (2, 3) for method in CONTENDERS]
    out.append(_kl(rows, "all queries", lambda m: select(rows, m, 3)))
    out.append(_kl(rows, f"queries from {FAR} on", lambda m: select(rows, m, 3, start=FAR)))
    out.append(_kl(rows, f"shifted by {shift}", lambda m: select(rows, m, 3, shift=shift)))
    ppl = float(perplexity_row(rows, "template", 8, 8)["ppl"])
    for method, bits in (("fp32", 32), ("bf16", 16)):
        true = float(perplexity_row(rows, method, bits, bits)["ppl"])
        gap = ppl / true - 1
        out.append(
            Target(
                f"K8V8: perplexity within {PPL_MARGIN:.1%} of {method}",
                f"{ppl:.4f} against {true:.4f}: {gap:+.3%}",
                abs(gap) <= PPL_MARGIN,
            )
        )
    return out


def summary(rows: list[Row]) -> str:
    """Two aligned tables: attention means over layers and windows, then perplexity."""
    lines = [f"{'method':<16}{'K':>4}{'V':>4}{'bytes':>8}{'shift':>7}{'MAE':>9}{'KL':>10}{'top-10':>8}"]
    groups: dict[tuple, list[Row]] = {}
    for row in filter(is_attention, rows):
        groups.setdefault((float(row["k_bits"]), int(row["shift"]), row["method"]), []).append(row)
    for (bits, shift, method), group in sorted(groups.items(), key=lambda g: g[0][:2]):
        size = float(group[0]["bytes_per_token_head"])
        lines.append(
            f"{method:<16}{bits:>4g}{float(group[0]['v_bits']):>4g}{size:>8.1f}{shift:>7}{mean(group, 'mae'):>9.4f}"
            f"{mean(group, 'softmax_kl'):>10.5f}{mean(group, 'top10_overlap'):>8.3f}"
        )
    lines += ["", f"{'method':<16}{'K':>4}{'V':>4}{'bytes':>8}{'ppl':>9}{'final KL':>10}"]
    for row in rows:
        if not is_attention(row):
            size = float(row["bytes_per_token_head"])
            lines.append(
                f"{row['method']:<16}{float(row['k_bits']):>4g}{float(row['v_bits']):>4g}{size:>8.1f}"
                f"{float(row['ppl']):>9.3f}{float(row['kl_final']):>10.5f}"
            )
    return "\n".join(lines)
