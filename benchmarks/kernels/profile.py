"""What a kernel waits for: ``python -m benchmarks.kernels.profile --out FILE.csv --only GLOB --lengths BxN``.

Runs one call of each case under Nsight Compute (``ncu``, which must be on the PATH) and keeps, of every kernel of that
call, how busy the schedulers, the pipes and the memory were, and what a warp waited for when it could not issue.
Columns: shape, batch, context, method, kernel, metric, unit, value; metrics have Nsight Compute's names. Beside the
CSV, a JSON says how it was made, and with ``--source`` a file for each case has its instructions with their samples.
"""

from __future__ import annotations

import argparse
import csv
import io
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from . import cases, record
from .__main__ import lengths

SECTIONS = ("SpeedOfLight", "ComputeWorkloadAnalysis", "SchedulerStats", "WarpStateStats", "InstructionStats")
SECTIONS += ("LaunchStats", "Occupancy", "MemoryWorkloadAnalysis", "SourceCounters")
#: of the hundreds of metrics of these sections
KEPT = re.compile(
    r"gpu__time_duration\.sum|sm__cycles_active\.avg|launch__(registers_per_thread|grid_size|block_size)"
    r"|sm__warps_active\.avg\.per_cycle_active|smsp__inst_executed\.(sum|avg\.per_cycle_active)"
    r"|smsp__issue_active\.avg\.(per_cycle_active|pct)|smsp__warps_(active|eligible)\.avg\.per_cycle_active"
    r"|s?m(sp)?__(inst_executed|inst_issued|pipe)_?\w*pipe\w*\.avg\.pct_of_peak_sustained_active"
    r"|sm__inst_executed_pipe_\w+\.(sum|avg\.pct_of_peak_sustained_active)|sm__pipe_\w+\.avg\.pct_of_peak_sustained_active"
    r"|smsp__average_warps?_(latency_)?issue_stalled_\w+_per_issue_active\.ratio"
    r"|smsp__average_warp_latency_per_inst_issued\.ratio"
    r"|dram__bytes_read\.sum(\.per_second)?|dram__throughput\.avg\.pct_of_peak_sustained_elapsed"
    r"|lts__throughput\.avg\.pct_of_peak_sustained_elapsed|l1tex__throughput\.avg\.pct_of_peak_sustained_active"
)
COLUMNS = ("shape", "batch", "context", "method", "kernel", "metric", "unit", "value")


def read_metrics(text: str) -> Iterator[tuple[str, str, str, str]]:
    """(kernel, metric, unit, value) of what ``ncu --csv --page raw`` prints, a line of units below its header."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    if not lines:
        return
    rows = csv.DictReader(io.StringIO("\n".join(lines)))
    units = next(rows, {})
    for row in rows:
        for name, value in row.items():
            if name and value and KEPT.fullmatch(name):
                yield row["Kernel Name"].split("(")[0], name, units.get(name) or "", value.replace(",", "")


def profile(case: cases.Case, pool_tokens: int, report: Path) -> str:
    """What ncu says of one case. RuntimeError with its words if it fails."""
    child = [sys.executable, "-m", "benchmarks.kernels.profile", "--child", "--pool-tokens", str(pool_tokens)]
    child += ["--only", case.key, "--lengths", f"{case.batch}x{case.context}", "--out", "-"]
    sections = [word for name in SECTIONS for word in ("--section", name)]
    command = ["ncu", "--profile-from-start", "off", "--clock-control", "none", "--import-source", "no", *sections]
    done = subprocess.run([*command, "-f", "-o", str(report), *child], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"ncu ended with {done.returncode}: {(done.stdout + done.stderr)[-2000:]}")
    return page(report, "raw")


def page(report: Path, kind: str) -> str:
    command = ["ncu", "--import", str(report), "--page", kind, "--csv", "--print-units", "base"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def run_case(case: cases.Case, pool_tokens: int) -> None:
    """In ncu's child: one call of the case between the profiler's start and stop."""
    import torch

    from .data import Pool
    from .subjects import make_subject

    subject = make_subject(case.method, Pool(case.shape, pool_tokens, "cuda"))
    launch = subject.launch(case, subject.variants(case)[0])
    count = max(1, subject.windows(case))
    for i in range(3):
        launch(i % count)
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    launch(3 % count)
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernels.profile",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, help="CSV to write; a .json of the same name tells how")
    add(
        "--only",
        nargs="+",
        metavar="GLOB",
        help="cases by SHAPE/KERNEL/METHOD, as in 'qwen2.5-3b/decode/template-k3v3'",
    )
    add("--lengths", nargs="+", type=lengths, metavar="BxN", help="e.g. 1x128K 8x32K")
    add("--pool-tokens", type=int, default=1 << 19, help="tokens of the pools (default 524288)")
    add("--source", action="store_true", help="write each kernel's instructions with their samples, too")
    add("--commit", help="commit to record, where there is no git")
    add("--child", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    try:
        chosen = [c for c in cases.cases(args.only, args.lengths) if c.index == cases.SHUFFLED]
    except ValueError as e:
        print(e, file=sys.stderr)
        return 2
    if args.child:
        run_case(chosen[0], args.pool_tokens)
        return 0
    if shutil.which("ncu") is None:
        print("benchmarks.kernels.profile needs ncu of Nsight Compute on the PATH", file=sys.stderr)
        return 2
    args.out.parent.mkdir(parents=True, exist_ok=True)
    rows, failed = [], 0
    for case in chosen:
        report = args.out.with_name(f"{case.shape.name}_{case.method.key}_{case.batch}x{case.context}.ncu-rep")
        try:
            found = list(read_metrics(profile(case, args.pool_tokens, report)))
            if args.source:
                report.with_suffix(".source.csv").write_text(page(report, "source"))
        except (RuntimeError, subprocess.CalledProcessError) as e:
            print(f"{case.key} {case.batch}x{case.context}: {e}", file=sys.stderr)
            failed += 1
            continue
        report.unlink()
        where = (case.shape.name, case.batch, case.context, case.method.key)
        rows += [dict(zip(COLUMNS, (*where, *values), strict=True)) for values in found]
        print(f"{case.key} {case.batch}x{case.context}: {len(found)} values", flush=True)
        with args.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    made = record.provenance(sys.argv[1:] if argv is None else argv, args.commit, "benchmarks.kernels.profile")
    made["timing"] = {
        "ncu": "one call of each case, kernel by kernel, counters read over several replays; clocks as found"
    }
    record.write_json(args.out, made)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
