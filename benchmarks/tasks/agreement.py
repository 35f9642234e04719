"""Does the emulation of benchmarks.fidelity say of a text what the real server says of it?

    python -m benchmarks.tasks.agreement --model-path MODEL --out benchmarks/results/emulation_cpu.csv

Both read one text with the same allocation table, every token its own position included from the packed cache: the
emulation is transformers in float32 with keys and values after a round trip through the codec, the server runs with
--kv-quant-chunk-attention=quantized. Log-probabilities are compared token by token: gap is their mean absolute
difference, beside what either differs from the same model without quantization.
"""

from __future__ import annotations

import argparse
import csv
import json
import shlex
import sys
import tempfile
from math import exp
from pathlib import Path
from statistics import fmean

from ..launch import Server, ServerError, exit_on_sigterm, missing_plugin, shown
from ..server_agreement import gap
from ..server_steps import provenance

SETTINGS = {"k4v4": (4, 4), "k3v3": (3, 3), "k3v2": (3, 2), "k2v2": (2, 2)}
COLUMNS = (
    *("setting", "k_bits", "v_bits", "device", "dtype", "tokens", "ppl", "ppl_emulation", "ppl_server"),
    *("gap", "gap_largest", "emulation_to_unquantized", "server_to_unquantized"),
)


def of_hidden(model, ids: list[int], hidden) -> list[float]:
    """Log-probability of every token but the first."""
    import torch

    with torch.inference_mode():
        logprobs = model.get_output_embeddings()(hidden).float().log_softmax(-1)
    return logprobs[:-1].gather(1, torch.tensor(ids)[1:, None])[:, 0].tolist()


def served(model: str, table: Path, ids: list[int], args: list[str], log: Path | None = None) -> list[float]:
    """Log-probabilities of a text that nothing is cached of. ServerError."""
    options = ["--kv-quant=blockgtq", f"--kv-quant-table={table}", "--kv-quant-chunk-attention=quantized", *args]
    with Server(model, *options, log=log) as server:
        values, cached = server.wait().logprobs(ids, 0)
    if cached:
        raise ServerError(f"{cached} tokens of a fresh prompt came from the cache")
    return values


def row(true: list[float], emulation: list[float], server: list[float]) -> dict:
    """Figures of one setting."""
    return {
        "tokens": len(true),
        "ppl": exp(-fmean(true)),
        "ppl_emulation": exp(-fmean(emulation)),
        "ppl_server": exp(-fmean(server)),
        "gap": gap(emulation, server),
        "gap_largest": max(abs(a - b) for a, b in zip(emulation, server, strict=True)),
        "emulation_to_unquantized": gap(emulation, true),
        "server_to_unquantized": gap(server, true),
    }


def write(out: Path, rows: list[dict], meta: dict) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w", newline="") as f:
        writer = csv.DictWriter(f, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in r.items()} for r in rows)
    out.with_suffix(".json").write_text(json.dumps(meta, indent=1) + "\n")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tasks.agreement",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model-path", required=True, help="model folder")
    add("--out", type=Path, required=True, help="CSV to write; a .json of the same name tells how")
    add("--settings", nargs="+", choices=SETTINGS, default=["k4v4", "k3v3"])
    add("--tokens", type=int, default=512, help="of the text (default 512)")
    add("--text", type=Path, help="default: the report that comes with SGLang")
    add(
        "--dtype",
        default="float32",
        help="of the server (default float32); bfloat16 differs for itself",
    )
    add("--server-args", type=shlex.split, default=[], metavar="ARGS", help='for every server: --server-args="--a --b"')
    add("--log-dir", type=Path, help="keep the servers' logs here")
    add("--commit", help="commit to record, where there is no git")
    args = parser.parse_args(argv)
    if why := missing_plugin(["--kv-quant=blockgtq"]):
        parser.error(why)
    exit_on_sigterm()

    from sglang_blockgtq.calibrate.build import build_table
    from sglang_blockgtq.calibrate.model import config_hash
    from sglang_blockgtq.calibrate.text import TextError

    from ..fidelity import perplexity, run
    from ..fidelity.methods import Packed

    words = sys.argv[1:] if argv is None else argv
    meta = provenance("python -m benchmarks.tasks.agreement " + shown(shlex.join(words)), args.commit)
    device = meta["gpu"].get("name", "cpu")
    try:
        subject = run.load(args.model_path, args.text)
    except TextError as e:
        parser.error(str(e))
    ids, identity = subject.ids[: args.tokens], config_hash(subject.model.config)
    hidden = perplexity.hidden_states(subject.model, ids, None)
    true = of_hidden(subject.model, ids, hidden)
    rows: list[dict] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in args.settings:
            bits = SETTINGS[name]
            table = build_table(subject.moments, subject.rope, k_bits=bits[0], v_bits=bits[1], config_hash=identity)
            file = Path(folder) / f"{name}.safetensors"
            table.save(file)
            emulation = of_hidden(subject.model, ids, perplexity.hidden_states(subject.model, ids, Packed(table)))
            log = args.log_dir / f"{name}.log" if args.log_dir else None
            small = ["--mem-fraction-static=0.25", f"--max-total-tokens={4 * len(ids) + 1024}"]
            small += [f"--kv-quant-k-bits={bits[0]}", f"--kv-quant-v-bits={bits[1]}"]
            options = [f"--dtype={args.dtype}", *small, *args.server_args]
            server = served(args.model_path, file, ids, options, log)
            about = {"setting": name, "k_bits": bits[0], "v_bits": bits[1], "device": device, "dtype": args.dtype}
            rows.append(about | row(true, emulation, server))
            print(" ".join(f"{k}={v:.5g}" if isinstance(v, float) else f"{k}={v}" for k, v in rows[-1].items()))
            write(args.out, rows, meta)
    return 0


if __name__ == "__main__":
    sys.exit(main())
