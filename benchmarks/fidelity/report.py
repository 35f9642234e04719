"""Tables from the panel's rows: the summary, layers won, the Hadamard counter-claim, ``template`` at others' bytes.

Rows are those of panel.py, measured or read back from the CSV.
"""

from __future__ import annotations

from collections.abc import Iterable
from statistics import fmean

from .lineup import BASELINE, DEFAULT, HADAMARD, PEERS
from .panel import METRICS
from .run import Row

RATIOS = tuple(f"{name}_ratio" for name in METRICS if not METRICS[name])
SUMMARY_FIELDS = (
    *("method", "k_bits", "v_bits", "window", "bytes", "against_bf16", "layers"),
    *METRICS,
    *("at", "against_k_bits", "against_v_bits", "against_bytes"),
    *RATIOS,
    *("wins_mae", "wins_softmax_kl"),
)
WINS_FIELDS = (
    *("method", "k_bits", "v_bits", "window", "bytes", "against", "at", "against_bytes", "layers"),
    *METRICS,
)
COUNTER_FIELDS = (
    *("method", "k_bits", "v_bits", "window", "seed", "bytes", "against", "against_bytes", "layers"),
    *RATIOS,
    *(f"wins_{name}" for name in METRICS),
)
CONTENDERS = (DEFAULT, "product-segment")

Key = tuple[str, float, float, str, int]
Layers = dict[int, Row]


def _number(row: Row, column: str) -> float | None:
    value = row.get(column)
    return None if value in ("", None) else float(value)


def key_of(row: Row) -> Key:
    """(method, K bits, V bits, window, seed)."""
    return (
        str(row["method"]),
        float(row["k_bits"]),
        float(row["v_bits"]),
        str(row.get("window") or ""),
        int(row["seed"]),
    )


def by_config(rows: Iterable[Row]) -> dict[Key, Layers]:
    """Rows by configuration and layer."""
    out: dict[Key, Layers] = {}
    for row in rows:
        out.setdefault(key_of(row), {})[int(row["layer"])] = row
    return out


def size(layers: Layers) -> float:
    """Bytes of K and V of one token and head."""
    return fmean(float(row["k_bytes"]) + float(row["v_bytes"]) for row in layers.values())


def mean(layers: Layers, column: str) -> float | None:
    values = [_number(row, column) for row in layers.values()]
    return None if None in values else fmean(values)


def wins(mine: Layers, base: Layers, column: str) -> int | None:
    """Layers on which ``mine`` is strictly better."""
    if mean(mine, column) is None or mean(base, column) is None:
        return None
    sign = 1 if METRICS[column] else -1
    return sum(sign * (float(mine[i][column]) - float(base[i][column])) > 0 for i in base)


def ratio(mine: Layers, base: Layers, column: str) -> float | None:
    """MAE and output error: mean over layers of the ratio. KL: ratio of the means, as some layers have next to none."""
    a, b = mean(mine, column), mean(base, column)
    if a is None or b is None:
        return None
    if column == "softmax_kl":
        return a / b
    return fmean(float(mine[i][column]) / float(base[i][column]) for i in base)


def _ratios(mine: Layers, base: Layers) -> Row:
    found = {name: ratio(mine, base, name.removesuffix("_ratio")) for name in RATIOS}
    return {name: value for name, value in found.items() if value is not None}


def _label(key: Key) -> Row:
    return dict(zip(("method", "k_bits", "v_bits", "window"), key, strict=False))


def _equal_bytes(
    key: Key, layers: Layers, configs: dict[Key, Layers], name: str = BASELINE
) -> tuple[Key, Layers] | None:
    """The cache ``name`` of as many bytes (see lineup.equal_bits)."""
    row = next(iter(layers.values()))
    k_bits, v_bits = _number(row, "equal_k_bits"), _number(row, "equal_v_bits")
    if k_bits is None:
        return None
    found = (name, k_bits, v_bits, key[3], 0)
    return (found, configs[found]) if found in configs else None


def summary(rows: Iterable[Row]) -> list[Row]:
    """Means over layers, and ratios to uniform widths behind a Haar rotation: at equal code bits, and at equal bytes.

    Two lines a configuration, told apart by ``at``; one where they are the same cache or only one exists.
    Seed 0 only.
    """
    configs = by_config(rows)
    bf16 = next((size(layers) for key, layers in configs.items() if key[0] == "bf16"), None)
    out = []
    for key, mine in sorted(configs.items(), key=lambda item: (item[0][3], item[0][1], size(item[1]), item[0][0])):
        if key[4]:
            continue
        line = {**_label(key), "bytes": size(mine), "layers": len(mine)}
        if bf16:
            line["against_bf16"] = bf16 / size(mine)
        line |= {name: value for name in METRICS if (value := mean(mine, name)) is not None}
        bases = {"bits": (BASELINE, *key[1:4], 0)}
        if equal := _equal_bytes(key, mine, configs):
            bases = {**bases, "bytes": equal[0]} if equal[0] != bases["bits"] else {"bits and bytes": equal[0]}
        lines = []
        for at, other in bases.items():
            if other == key or other not in configs:
                continue
            base = configs[other]
            against = {"at": at, "against_k_bits": other[1], "against_v_bits": other[2], "against_bytes": size(base)}
            won = {f"wins_{name}": wins(mine, base, name) for name in ("mae", "softmax_kl")}
            lines.append({**line, **against, **_ratios(mine, base), **won})
        out += lines or [line]
    return out


def win_rows(rows: Iterable[Row], against: str = BASELINE) -> list[Row]:
    """Layers won by each method against the one named, at equal code bits; for the baseline also at equal bytes."""
    configs = by_config(rows)
    if against not in {key[0] for key in configs}:
        raise ValueError(f"--against {against}: not measured; one of {', '.join(dict.fromkeys(k[0] for k in configs))}")
    out = []
    for key, mine in configs.items():
        if key[4] or key[0] == against:
            continue
        others = {"bits": (against, *key[1:4], 0)}
        if against == BASELINE and (equal := _equal_bytes(key, mine, configs)):
            others["bytes"] = equal[0]
        for at, other in others.items():
            if other in configs:
                base = configs[other]
                won = {name: count for name in METRICS if (count := wins(mine, base, name)) is not None}
                sizes = {"bytes": size(mine), "against_bytes": size(base)}
                out.append({**_label(key), "against": against, "at": at, "layers": len(mine), **sizes, **won})
    return out


def counter_claim(rows: Iterable[Row]) -> list[Row]:
    """``template`` and ``product-segment`` against uniform widths behind a Hadamard rotation at equal bytes, by seed.

    Raises ValueError if the bytes are not equal: then there is nothing to compare.
    """
    configs = by_config(rows)
    out = []
    for key, mine in configs.items():
        base = configs.get((HADAMARD, *key[1:]))
        if key[0] not in CONTENDERS or base is None:
            continue
        if abs(size(mine) - size(base)) > 1e-6:
            raise ValueError(f"{key[0]} takes {size(mine):g} bytes and {HADAMARD} {size(base):g}")
        out.append(_duel(key, mine, HADAMARD, base))
    return out


def peer_rows(rows: Iterable[Row]) -> list[Row]:
    """``template`` at the bytes of each cache of another kind: K and V bits are template's."""
    configs = by_config(rows)
    out = []
    for key, peer in configs.items():
        equal = _equal_bytes(key, peer, configs, DEFAULT) if key[0] in PEERS else None
        if equal:
            out.append(_duel(*equal, f"{key[0]} K{key[1]:g}", peer))
    return out


def _duel(key: Key, mine: Layers, against: str, base: Layers) -> Row:
    """One configuration against another, in every column."""
    label = {**_label(key), "seed": key[4], "against": against, "layers": len(mine)}
    won = {f"wins_{name}": count for name in METRICS if (count := wins(mine, base, name)) is not None}
    return {**label, "bytes": size(mine), "against_bytes": size(base), **_ratios(mine, base), **won}


def text(rows: list[Row], columns: dict[str, str]) -> str:
    """An aligned table. columns: column to heading; the first is left-aligned, an empty cell stays empty."""

    def cell(value: object) -> str:
        return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)

    cells = [list(columns.values()), *([cell(row.get(name)) for name in columns] for row in rows)]
    wide = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    return "\n".join(
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, wide, strict=True)))
        for line in cells
    )
