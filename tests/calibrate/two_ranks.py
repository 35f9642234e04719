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

from sglang_blockgtq import capture, obtain, ranks  # noqa: E402
from sglang_blockgtq.calibrate.moments import Moments  # noqa: E402
from sglang_blockgtq.calibrate.quality import Sums  # noqa: E402
from sglang_blockgtq.calibrate.rope import RopeBlocks  # noqa: E402
from sglang_blockgtq.calibrate.table import layers_of  # noqa: E402
from sglang_blockgtq.choose import Choice, choose  # noqa: E402
from sglang_blockgtq.options import KVQuantError, KVQuantOptions  # noqa: E402

RANK, FOLDER = int(sys.argv[1]), Path(sys.argv[2])
RIGHT, WRONG = (32, True), (32, False)


def ends(call) -> str:
    try:
        value = call()
    except KVQuantError as e:
        return f"KVQuantError: {e}"
    if isinstance(value, Choice):
        header = value.table.header
        quality = json.dumps(header.quality, sort_keys=True)
        return f"{value.origin} {header.table_hash} {value.table.computed_hash() == header.table_hash} {quality}"
    return str(value)


def served(runner, options):
    return choose(runner, options, lambda table: layers_of(table, slice(None), (0, 1), "cpu", 1024))


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
    out["equal"] = ends(lambda: ranks.check_ranks("aaa", 8))
    out["hash"] = ends(lambda: ranks.check_ranks("aab"[RANK:], 8))
    out["size"] = ends(lambda: ranks.check_ranks("aaa", 8 + RANK))
    loaded.install(patch, both, alone, both)
    out["stages"] = ends(lambda: ranks.check_ranks("aaa", 8 + RANK))

    # A wrong pairing on one rank of a pipeline's or of a tensor-parallel group's is an error on both.
    loaded.install(patch, both, both, alone)
    true = [RIGHT, RIGHT if RANK == 0 else WRONG]  # as if rank 1 had other weights
    runner = loaded.runner(true, [RIGHT, RIGHT])
    out["pairing"] = ends(lambda: capture.collect_moments(runner, [[1] * 70]))
    runner = loaded.runner([RIGHT] * 2, [RIGHT] * 2)
    runner.model.layers[1].qkv.weight.data[200] = float("nan") if RANK else 0.0
    out["nan"] = ends(lambda: capture.collect_moments(runner, [[1] * 70]))

    # Each rank has read another text, which adds up to both.
    texts = [[(7 * i + 3) % 256 for i in range(70)], [(5 * i + 1) % 256 for i in range(50)]]
    loaded.install(patch, alone, alone, alone)
    want = capture.collect_moments(loaded.runner([RIGHT] * 2, [RIGHT] * 2), texts)[0]
    loaded.install(patch, both, both, alone)
    found = capture.collect_moments(loaded.runner([RIGHT] * 2, [RIGHT] * 2), [texts[RANK]])[0]
    out["moments"] = {
        name: float((getattr(found, name) - getattr(want, name)).abs().max() / getattr(want, name).abs().max())
        for name in ("q", "k", "v", "mean", "theta")
    }
    sums = Sums(2)
    sums.add_attention(RANK, torch.tensor([[1.0 + RANK, 3.0 + RANK]]))
    if RANK == 1:
        sums.add_answers(torch.tensor([0.25, 0.75]))
    ranks.reduce(sums.flat)
    out["quality"] = sums.quality(2).to_dict()

    # Frequencies are the model's only where every rank that holds the layer knows them.
    runner = loaded.runner([RIGHT] * 2, [RIGHT] * 2)
    if RANK == 1:
        runner.model.layers[1].rotary_emb.cos_sin_cache[600:] = 0
    out["known"] = [x is not None for x in capture.model_frequencies(runner)]
    loaded.install(patch, both, alone, both)
    runner.model.layers = runner.model.layers[RANK : RANK + 1]  # a stage of a pipeline
    out["stage frequencies"] = [x if x is None else x.tolist() for x in capture.model_frequencies(runner)]
    out["true frequencies"] = loaded.theta_of(32).tolist()
    loaded.install(patch, both, both, alone)
    runner = loaded.runner([RIGHT] * 2, [RIGHT] * 2)
    with patch.context() as within:
        if RANK == 1:  # keys rotate otherwise there
            within.setattr(loaded, "theta_of", lambda dim, right=loaded.theta_of: right(dim) / 3)
        out["drift"] = bool(capture.collect_moments(runner, [texts[0]])[0].theta.isnan().all())

    # What only rank 0 does: reads, builds, keeps. Its errors are everybody's.
    runner = loaded.runner([RIGHT] * 2, [RIGHT] * 2, model_path=str(FOLDER))
    draw = torch.Generator().manual_seed(0)
    energies = [torch.rand(2, 2, 16, generator=draw, dtype=torch.float64) + 0.1 for _ in range(2)]
    moments = Moments(*energies, energies[0][..., 0], 2048), [RopeBlocks(32, 32)] * 2
    patch.setattr(capture, "collect_moments", lambda *_: moments)
    patch.setattr("sglang.srt.utils.hf_transformers_utils.get_tokenizer", lambda *_, **__: only_rank_zero(Bytes()))
    options = KVQuantOptions(cache_dir=str(FOLDER / "cache"))
    for name in ("made", "cached"):
        out[name] = ends(lambda: served(runner, options))
    out["no text"] = ends(lambda: served(runner, KVQuantOptions(calibration_text=str(FOLDER / "none"), cache_dir="/x")))
    out["no table"] = ends(lambda: served(runner, KVQuantOptions(table=str(FOLDER / "none"))))

    def broken(*_, **__):
        only_rank_zero(None)
        raise MemoryError("no room")

    patch.setattr(obtain, "build_table", broken)
    other = KVQuantOptions(cache_dir=str(FOLDER / "other"))
    out["not built"] = ends(lambda: served(runner, other))
    print(json.dumps(out))


if __name__ == "__main__":
    main()
