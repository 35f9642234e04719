"""The loop: one pool per shape, one subject per method, one row per case."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import groupby

import torch

from .cases import COPY, COPY_KERNEL, Case, Method, Row
from .data import Pool
from .record import Table
from .subjects import Subject, WrongResult, make_subject
from .timing import Launch, Timing

#: (launch, bytes of a call, windows, seconds) as timing.measure
Timer = Callable[[Launch, float, int, float], Timing]
MOST_SECONDS = 0.25  # of replays for one variant
LEAST_SECONDS = 0.01
_SHARE = 0.4  # of the time left that replays may take; the rest is compiling, encoding and capturing


def copy_row(copy: Timing, num_bytes: int) -> Row:
    row = Row("", 1, 0, COPY_KERNEL, COPY.name, COPY.k_bits, COPY.v_bits)
    row.us, row.bytes, row.timed, row.note = copy.us, num_bytes, copy.timed, "device to device, read + written"
    return row


def _label(case: Case) -> str:
    bits = f" K{case.method.k_bits:g}V{case.method.v_bits:g}" if case.method.allocator else ""
    return f"{case.shape.name} {case.kernel} {case.batch}x{case.context} {case.index} {case.method.name}{bits}"


def _why(error: Exception) -> str:
    """One line for the note of a row."""
    if isinstance(error, torch.OutOfMemoryError):
        return "not measured: does not fit in GPU memory"
    if isinstance(error, ImportError):
        return f"not measured: {error}"
    if isinstance(error, NotImplementedError | WrongResult):
        return str(error)
    lines = str(error).strip().splitlines() or [""]
    return f"not measured: {type(error).__name__}: {lines[0][:160]}"


def measure_case(subject: Subject, case: Case, timer: Timer | None, seconds: float) -> Row:
    """Check and time every variant of a case, keep the fastest; what goes wrong becomes the row's note."""
    row, timings, errors, failed = case.row(), {}, [], {}
    try:
        row.bytes, variants, count = subject.num_bytes(case), subject.variants(case), subject.windows(case)
    except Exception as e:
        row.note = _why(e)
        return row
    for variant in variants:
        try:
            error = subject.error(case, variant)
            launch = subject.launch(case, variant)
            if timer is None:
                launch(0)  # compiles what a timed run needs
                timings[variant] = None
            else:
                timings[variant] = timer(launch, row.bytes, count, seconds)
            errors.append(error)
        except Exception as e:
            failed[variant] = _why(e)
    row.rel_error = max(errors, default=None)
    if timer is None and timings:
        row.note = "; ".join(["checked", *failed.values()])
    elif not timings:
        row.note = "; ".join(dict.fromkeys(failed.values()))
    else:
        name = min(timings, key=lambda n: timings[n].us)
        best = timings.pop(name)
        row.us, row.timed = best.us, best.timed
        row.page = name if isinstance(name, int) else None
        others = {**{n: f"{t.us:.4g} us" for n, t in timings.items()}, **failed}
        shown = [f"{'page ' if isinstance(n, int) else ''}{n}: {text}" for n, text in others.items()]
        row.note = "; ".join(filter(None, [best.note, name if isinstance(name, str) else "", *shown]))
    return row


def run(
    chosen: list[Case],
    table: Table,
    device: torch.device | str,
    *,
    deadline: float,
    pool_tokens: int,
    timer: Timer | None,
    subject_of: Callable[[Method, Pool], Subject] = make_subject,
) -> bool:
    """Measure every case into ``table``. False if a result was wrong or time ran out.

    deadline: ``time.monotonic()`` after which nothing more is timed, and rows say so.
    timer: None checks and compiles only.
    """
    done, ok, begun = 0, True, time.monotonic()
    for shape, of_shape in groupby(chosen, key=lambda c: c.shape):
        pool = None
        for method, group in groupby(of_shape, key=lambda c: c.method):
            subject, failed = None, ""
            for case in group:
                now = time.monotonic()
                if now > deadline:
                    ok, row = False, case.row(note="not measured: the time budget was spent")
                else:
                    if subject is None and not failed:
                        try:
                            pool = pool or Pool(shape, pool_tokens, device)
                            subject = subject_of(method, pool)
                        except Exception as e:
                            failed = _why(e)
                    if subject is None:
                        row = case.row(note=failed)
                    else:
                        share = _SHARE * (deadline - now) / (2 * (len(chosen) - done))
                        row = measure_case(subject, case, timer, min(MOST_SECONDS, max(LEAST_SECONDS, share)))
                ok = ok and "not timed" not in row.note
                done += 1
                table.add(row)
                shown = f"{row.us:.1f} us {row.gbps:.0f} GB/s" if row.us else ""
                ratio = f" {row.ratio_to_best_bf16:.2f}x" if row.ratio_to_best_bf16 else ""
                took = time.monotonic() - begun
                print(f"[{done}/{len(chosen)} {took:.0f} s] {_label(case)}: {shown}{ratio} {row.note}", flush=True)
            if subject is not None:
                subject.close()
            if pool is not None and method.name.endswith("fp8"):
                pool.drop_fp8()
        del pool
    return ok
