"""How far apart a cache and exact attention are about tokens that a server samples: what a soak has to expect.

``python -m benchmarks.fidelity tails --model-path MODEL --out tails.csv``
Texts begin as the evaluation's and go on as the model does at temperature 1, never ending; *plain* ones go on as they
are. At each place every token of the vocabulary counts with its probability through the cache, so nothing is left to
chance: ``beyond_X`` is how many of a million sampled tokens are expected to be more than X nats from what exact
attention says of them. ``largest`` is the difference of any token of the vocabulary at any place.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch

from sglang_blockgtq.calibrate import RECENT
from sglang_blockgtq.calibrate.device import device

from . import perplexity, run
from .exact import Exact
from .lab import Lab
from .methods import Method
from .peers import Caches, Entry, sequences
from .record import command_of, commit, machine, sources
from .rows import write_csv

BITS, WINDOWS = (4, 3), (RECENT, 0)
BEYOND = 0.5, 1, 2, 4, 8, 16  # nats
PLACES = 64  # whose logits are held at once
FIELDS = (
    *("model", "text", "method", "k_bits", "v_bits", "exact_recent", "tokens", "kl"),
    *(f"beyond_{nats:g}" for nats in BEYOND),
    "largest",
)


@torch.inference_mode()
def sampled(model, texts: list[list[int]], prompt: int, seed: int = 0) -> list[list[int]]:
    """Texts of the same lengths that begin with ``prompt`` tokens of these, then the model's own at temperature 1."""
    torch.manual_seed(seed)
    new = len(texts[0]) - prompt
    start = torch.tensor([ids[:prompt] for ids in texts], device=model.device)
    out = model.generate(
        start,
        attention_mask=torch.ones_like(start),
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=new,
        min_new_tokens=new,
        eos_token_id=None,
        pad_token_id=0,
    )
    return out.tolist()


@torch.inference_mode()
def tail(model, texts: list[list[int]], exactly: list[torch.Tensor], prompt: int, method: Method | None) -> run.Row:
    """tokens, kl, beyond_X and largest of all places behind the prompts. exactly: the texts' hidden states, without a
    cache's error."""
    head = model.get_output_embeddings()
    beyond = torch.zeros(len(BEYOND), dtype=torch.float64)
    kl = largest = tokens = 0.0
    for ids, true in zip(texts, exactly, strict=True):
        read = perplexity.hidden_states(model, ids, method)
        for start in range(prompt - 1, len(ids) - 1, PLACES):
            part = slice(start, min(start + PLACES, len(ids) - 1))
            exact, through = (head(hidden[part]).float().log_softmax(-1) for hidden in (true, read))
            gap, share = (through - exact).abs(), through.exp()
            beyond += torch.stack([(share * (gap > nats)).double().sum() for nats in BEYOND]).cpu()
            kl += float((exact.exp() * (exact - through)).double().sum())
            largest, tokens = max(largest, float(gap.max())), tokens + len(gap)
    rates = {f"beyond_{nats:g}": 1e6 * float(x) / tokens for nats, x in zip(BEYOND, beyond, strict=True)}
    return {"tokens": int(tokens), "kl": kl / tokens, **rates, "largest": largest}


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m benchmarks.fidelity tails", description=__doc__)
    p.add_argument("--model-path", required=True, help="model folder")
    p.add_argument("--name", help="of the model in the CSV; default: its folder's")
    p.add_argument("--out", required=True, type=Path, help="CSV, a row as soon as it is measured; a .json tells how")
    p.add_argument("--device", type=device, default="cpu", help="cpu (default), cuda, cuda:1, ...")
    p.add_argument("--length", type=int, default=768, help="tokens of a text (default 768)")
    p.add_argument("--prompt", type=int, default=256, help="tokens that it begins with (default 256)")
    p.add_argument("--texts", type=int, default=4, help="the report, then Python sources (default 4)")
    p.add_argument("--text", type=Path, help="evaluation text; default: the report that comes with SGLang")
    p.add_argument("--calibration-text", help="calibration text; default: that of the server")
    return p


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if not 0 < args.prompt < args.length:
        parser().error(f"--prompt {args.prompt} --length {args.length}: a text is longer than what it begins with")
    head, begun = commit(), time.perf_counter()  # now: the tree may change during a long run
    subject = run.load(args.model_path, args.text, args.calibration_text, args.device)
    lab = Lab(subject, args.model_path, args.text, args.calibration_text)
    name, caches = args.name or Path(args.model_path).resolve().name, Caches(lab)
    try:
        plain = sequences(lab, args.length, args.texts)
    except ValueError as e:
        parser().error(str(e))
    rows: list[run.Row] = []
    for kind, texts in (("sampled", sampled(subject.model, plain, args.prompt)), ("plain", plain)):
        exactly = [perplexity.hidden_states(subject.model, ids, None) for ids in texts]
        for bits in BITS:
            for recent in WINDOWS:
                entry = Entry("template", bits, bits, (Exact(recent=recent),) * 2)
                found = tail(subject.model, texts, exactly, args.prompt, caches.method(entry))
                row: run.Row = {"model": name, "text": kind, "method": entry.name, "k_bits": bits, "v_bits": bits}
                rows.append(row | {"exact_recent": recent} | found)
                write_csv(rows, args.out, FIELDS)
                print(f"{kind} K{bits}V{bits}, {recent} exact: {found}", flush=True)
    record = {"name": name, "command": command_of(parser(), args), "commit": head}
    record |= sources(args.model_path, args.calibration_text, subject) | machine(args.device)
    seconds = round(time.perf_counter() - begun, 1)
    args.out.with_suffix(".json").write_text(json.dumps({"runs": [record | {"seconds": seconds}]}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
