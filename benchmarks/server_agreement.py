"""How far the served packed cache is from a 16-bit cache, in log-probability.

Starts each packed setting as a real server, on whatever device there is. The reference is SGLang's stock server
on a GPU; without one, where the stock wheel does not start, transformers in float32:

    python -m benchmarks.server_agreement --model-path MODEL --out benchmarks/results/server_agreement_cpu.csv

Two figures a setting, mean absolute difference of log-probability per token:
    prefix   prompt tokens computed on top of a prefix-cache hit, against the reference's
    decode   tokens the packed server generated greedily, against the reference reading the same tokens
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
from contextlib import ExitStack
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from statistics import fmean

from .launch import Server, ServerError, exit_on_sigterm, missing_plugin, shown, wait_for


def _bits(k: float, v: float) -> list[str]:
    return [f"--kv-quant-k-bits={k:g}", f"--kv-quant-v-bits={v:g}"]


#: name -> extra server arguments
SETTINGS = {
    "auto": [],
    "k8v8": _bits(8, 8),
    "k4v4": _bits(4, 4),
    "k3.5v3.5": _bits(3.5, 3.5),
    "k3v3": _bits(3, 3),
    "k3v3_quantized_chunk": [*_bits(3, 3), "--kv-quant-chunk-attention=quantized"],
    "k3v3_page16": [*_bits(3, 3), "--page-size=16"],
    "k3v3_no_graph": [*_bits(3, 3), "--cuda-graph-backend-decode=disabled", "--cuda-graph-backend-prefill=disabled"],
    "k3v3_uniform": [*_bits(3, 3), "--kv-quant-allocator=uniform"],
    "k3v3_paper": [*_bits(3, 3), "--kv-quant-allocator=paper", "--kv-quant-granularity=block"],
    "k3v3_product": [*_bits(3, 3), "--kv-quant-allocator=product", "--kv-quant-granularity=block"],
    "k2v2": _bits(2, 2),
}
COLUMNS = ("setting", "device", "dtype", "bytes_per_token", "prefix_gap", "decode_gap", "cached_tokens", "generated")


class Transformers:
    """The model in float32, read by transformers."""

    def __init__(self, model: str):
        import torch
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)

    def logprobs(self, ids: list[int], start: int) -> tuple[list[float], int]:
        import torch

        tokens = torch.tensor([ids])
        with torch.inference_mode():
            logprobs = self.model(tokens).logits[0].log_softmax(-1)
        return logprobs[:-1].gather(1, tokens[0, 1:, None])[start:, 0].tolist(), 0


def gap(a: list[float], b: list[float]) -> float:
    assert len(a) == len(b) > 0, (len(a), len(b))
    return fmean(abs(x - y) for x, y in zip(a, b, strict=True))


def measure(server: Server, reference: Server | Transformers, ids: list[int], prefix: int, new: int) -> dict:
    server.generate(ids[:prefix])
    packed, cached = server.logprobs(ids, prefix)
    plain, _ = reference.logprobs(ids, prefix)
    meta = server.generate(ids, new=new)
    generated = [t for _, t, *_ in meta["output_token_logprobs"]]
    decoded = [lp for lp, *_ in meta["output_token_logprobs"]]
    read, _ = reference.logprobs(ids + generated, len(ids) - 1)
    return {
        "prefix_gap": round(gap(packed, plain), 5),
        "decode_gap": round(gap(decoded, read), 5),
        "cached_tokens": cached,
        "generated": len(generated),
    }


def write(out: Path, rows: list[dict], device: str, commit: str | None) -> None:
    """The CSV, and beside it a JSON file that says how it was made."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w", newline="") as f:
        writer = csv.DictWriter(f, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    if commit is None:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    meta = {
        "command": "python -m benchmarks.server_agreement " + shown(" ".join(sys.argv[1:])),
        "commit": commit,
        "device": device,
        "versions": {name: version(name) for name in ("torch", "triton", "sglang")},
    }
    out.with_suffix(".json").write_text(json.dumps(meta, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", required=True)
    parser.add_argument("--text", type=Path, default=Path(str(files("sglang") / "test" / "long_prompt.txt")))
    parser.add_argument("--prompt-tokens", type=int, default=1024)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--together", action="store_true", help="start all servers at once, measure one after another")
    parser.add_argument("--commit", help="commit to record, where there is no git")
    parser.add_argument("--out", type=Path, required=True)
    args, extra = parser.parse_known_args()
    if why := missing_plugin(["--kv-quant=blockgtq"]):
        parser.error(why)

    import torch
    from transformers import AutoTokenizer

    cuda = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if cuda else "cpu"
    ids = AutoTokenizer.from_pretrained(args.model_path)(args.text.read_text())["input_ids"][: args.prompt_tokens]
    prefix = 3 * len(ids) // 4
    common = ["--dtype", args.dtype, "--mem-fraction-static", "0.25", "--max-total-tokens", "16384", *extra]
    rows: list[dict] = []

    def keep(row: dict) -> None:
        rows.append({"device": device, "dtype": args.dtype, **row})
        print(rows[-1], flush=True)
        write(args.out, rows, device, args.commit)  # after every setting: a run cut short keeps what it measured

    def packed(stack: ExitStack, name: str) -> Server:
        return stack.enter_context(Server(args.model_path, *common, "--kv-quant=blockgtq", *SETTINGS[name]))

    exit_on_sigterm()
    with ExitStack() as stack:
        reference: Server | Transformers
        if cuda:
            reference = stack.enter_context(Server(args.model_path, *common, "--attention-backend", "triton"))
        early = {name: packed(stack, name) for name in args.settings} if args.together else {}
        if cuda:
            reference.wait()
            wait_for(early.values(), 900)  # what went wrong is raised below, after the others were measured
            cold, _ = reference.logprobs(ids, prefix)
            reference.generate(ids[:prefix])
            warm, cached = reference.logprobs(ids, prefix)
            keep({"setting": "stock_cold_warm", "prefix_gap": round(gap(cold, warm), 5), "cached_tokens": cached})
        else:
            reference = Transformers(args.model_path)
        failed: list[ServerError] = []
        for name in args.settings:
            with ExitStack() as own:
                try:
                    server = (early[name] if name in early else packed(own, name)).wait()
                    row = measure(server, reference, ids, prefix, args.new_tokens)
                except ServerError as e:
                    failed.append(e)
                    print(f"{name}: {e}", file=sys.stderr, flush=True)
                    continue
                keep({"setting": name, "bytes_per_token": server.info()["kv_quant"]["bytes_per_token"], **row})
    if failed:
        raise SystemExit(f"{len(failed)} of {len(args.settings)} settings were not measured")


if __name__ == "__main__":
    main()
