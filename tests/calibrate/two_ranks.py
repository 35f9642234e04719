"""One of two ranks, run as a program: ``two_ranks.py RANK FOLDER``. Prints what each step ended with, as JSON."""

from __future__ import annotations

import json
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))

import loaded  # noqa: E402

from sglang_blockgtq import capture, obtain  # noqa: E402
from sglang_blockgtq.calibrate.moments import Moments  # noqa: E402
from sglang_blockgtq.calibrate.rope import RopeBlocks  # noqa: E402
from sglang_blockgtq.calibrate.table import AllocationTable  # noqa: E402
from sglang_blockgtq.options import KVQuantError, KVQuantOptions  # noqa: E402

RANK, FOLDER = int(sys.argv[1]), Path(sys.argv[2])
RIGHT, WRONG = (32, True), (32, False)


def ends(call) -> str:
    try:
        value = call()
    except KVQuantError as e:
        return f"KVQuantError: {e}"
    if isinstance(value, tuple) and isinstance(value[0], AllocationTable):
        return f"{value[1]} {value[0].header.table_hash} {value[0].computed_hash() == value[0].header.table_hash}"
    return str(value)


def only_rank_zero(value):
    """Ends the program where anybody else asks."""
    assert RANK == 0
    return value


class Bytes:
    def encode(self, text, add_special_tokens=True):
        return list(text.encode())


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{FOLDER / 'rendezvous'}", rank=RANK, world_size=2, timeout=timedelta(seconds=60)
    )
    both, alone = loaded.group(2, RANK, dist.group.WORLD), loaded.group()
    patch = pytest.MonkeyPatch()
    out = {}

    loaded.install(patch, both, both, alone)
    out["equal"] = ends(lambda: obtain.check_ranks("aaa", 8))
    out["hash"] = ends(lambda: obtain.check_ranks("aab"[RANK:], 8))
    out["size"] = ends(lambda: obtain.check_ranks("aaa", 8 + RANK))
    loaded.install(patch, both, alone, both)
    out["stages"] = ends(lambda: obtain.check_ranks("aaa", 8 + RANK))

    # A wrong pairing on one rank of a pipeline's or of a tensor-parallel group's is an error on both.
    loaded.install(patch, both, both, alone)
    true = [RIGHT, RIGHT if RANK == 0 else WRONG]  # as if rank 1 had other weights
    runner = loaded.runner(true, [RIGHT, RIGHT])
    out["pairing"] = ends(lambda: capture.collect_moments(runner, [[1] * 70]))
    runner = loaded.runner([RIGHT] * 2, [RIGHT] * 2)
    runner.model.layers[1].qkv.weight.data[200] = float("nan") if RANK else 0.0
    out["nan"] = ends(lambda: capture.collect_moments(runner, [[1] * 70]))

    # What only rank 0 does: reads, builds, keeps. Its errors are everybody's.
    runner = loaded.runner([RIGHT] * 2, [RIGHT] * 2, model_path=str(FOLDER))
    draw = torch.Generator().manual_seed(0)
    energies = [torch.rand(2, 2, 16, generator=draw, dtype=torch.float64) + 0.1 for _ in range(2)]
    moments = Moments(*energies, energies[0][..., 0], 2048), [RopeBlocks(32, 32)] * 2
    patch.setattr(capture, "collect_moments", lambda *_: moments)
    patch.setattr("sglang.srt.utils.hf_transformers_utils.get_tokenizer", lambda *_, **__: only_rank_zero(Bytes()))
    options = KVQuantOptions(cache_dir=str(FOLDER / "cache"))
    for name in ("made", "cached"):
        out[name] = ends(lambda: obtain.obtain_table(runner, options))
    out["no text"] = ends(
        lambda: obtain.obtain_table(runner, KVQuantOptions(calibration_text=str(FOLDER / "none"), cache_dir="/x"))
    )
    out["no table"] = ends(lambda: obtain.obtain_table(runner, KVQuantOptions(table=str(FOLDER / "none"))))

    def broken(*_, **__):
        only_rank_zero(None)
        raise MemoryError("no room")

    patch.setattr(obtain, "build_table", broken)
    other = KVQuantOptions(cache_dir=str(FOLDER / "other"))
    out["not built"] = ends(lambda: obtain.obtain_table(runner, other))
    print(json.dumps(out))


if __name__ == "__main__":
    main()
