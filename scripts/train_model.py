"""Train a small language model with heads of 128 channels, on text that Python packages bring along.

    python scripts/train_model.py --out FOLDER --minutes 12

For judging a cache where no other model with such heads is at hand: its queries and keys have the structure that
training gives them, under RoPE and grouped queries, which no generator has. 27 million parameters, 4 query and 2 KV
heads, contexts of 4,096 tokens, trained for as long as it is allowed to. FOLDER gets a Hugging Face model and
tokenizer, held-out text (``heldout.txt``, from files that it never saw) and ``training.json``: how, and how well.
``--prepare`` first, on a machine with the text, and only the training is left for the one with the GPU.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tokenizers import ByteLevelBPETokenizer
from tqdm import tqdm
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SUFFIXES = {".py", ".pyi", ".txt", ".md", ".rst"}
END = "<|end|>"
VOCABULARY = 8192  # fits 16 bits
MAX_FILE_BYTES = 400_000  # larger ones are mostly tables
TOKENIZER_BYTES = 30_000_000  # of text that the vocabulary is made from
SHARD = "14MB"
PREPARED = "tokens.npz"


def text_files(folders: list[Path], held_out: int) -> Iterator[tuple[str, bool]]:
    """(text, is it held out) of every distinct text file below the folders, in the order of their hashes."""
    files = sorted(
        (hashlib.sha256(data).hexdigest(), data)
        for folder in folders
        for file in folder.rglob("*")
        if file.suffix in SUFFIXES and file.is_file() and 200 <= file.stat().st_size <= MAX_FILE_BYTES
        for data in [file.read_bytes()]
    )
    last = ""
    for digest, data in files:
        if digest != last:
            last = digest
            text = data.decode("utf-8", errors="ignore")
            yield text, int(digest[:8], 16) % held_out == 0


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    sample, size = [], 0
    for text in texts:
        sample.append(text)
        size += len(text)
        if size > TOKENIZER_BYTES:
            break
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(sample, vocab_size=VOCABULARY, special_tokens=[END], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token=END, bos_token=END)


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str], most: int) -> np.ndarray:
    """All texts one after another, uint16, each behind an end token; no more than ``most`` tokens."""
    parts, total, end = [], 0, np.array([tokenizer.eos_token_id], dtype=np.uint16)
    for start in tqdm(range(0, len(texts), 256), desc="encoding", mininterval=10):
        for ids in tokenizer._tokenizer.encode_batch(texts[start : start + 256]):
            parts += [end, np.array(ids.ids, dtype=np.uint16)]
            total += 1 + len(ids.ids)
        if total >= most:
            break
    return np.concatenate(parts)[:most]


def make_model(args: argparse.Namespace, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=args.hidden,
        intermediate_size=args.hidden * 11 // 4,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        head_dim=args.head_dim,
        max_position_embeddings=2 * args.context,
        rope_theta=args.rope_theta,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(args.seed)
    return LlamaForCausalLM(config)


def batch_of(tokens: torch.Tensor, args: argparse.Namespace, generator: torch.Generator) -> torch.Tensor:
    """``[batch, context]`` windows of the text at random places."""
    starts = torch.randint(0, len(tokens) - args.context, (args.batch,), generator=generator)
    return torch.stack([tokens[s : s + args.context] for s in starts.tolist()])


def loss_of(model: LlamaForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    with torch.autocast(ids.device.type, torch.bfloat16):
        return model(input_ids=ids, labels=ids, use_cache=False).loss


def train(
    model: LlamaForCausalLM, tokens: torch.Tensor, args: argparse.Namespace, device: torch.device
) -> tuple[int, list]:
    """Until ``args.minutes`` are over; the learning rate falls with the time that is left. Returns steps and log."""
    generator = torch.Generator().manual_seed(args.seed)
    decayed = [p for p in model.parameters() if p.dim() > 1]
    groups = [
        {"params": decayed, "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0},
    ]
    torch.backends.cuda.enable_cudnn_sdp(False)  # fails where cuDNN is older than this PyTorch's
    optimizer = torch.optim.AdamW(groups, lr=args.rate, betas=(0.9, 0.95), fused=device.type == "cuda")
    started, log, step, shown = time.monotonic(), [], 0, 0.0
    model.train()
    while (part := (time.monotonic() - started) / (60 * args.minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = args.rate * min(1.0, (step + 1) / 200) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * part)))
        loss = loss_of(model, batch_of(tokens, args, generator).to(device, torch.int64))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if step == 1 or time.monotonic() - shown > 15:
            shown = time.monotonic()
            log.append({"seconds": round(shown - started, 1), "step": step, "loss": round(loss.item(), 4)})
            print(log[-1], flush=True)
    return step, log


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, tokens: torch.Tensor, context: int, device: torch.device) -> float:
    """Mean over up to 32 windows, one after another."""
    model.eval()
    windows = [tokens[i : i + context] for i in range(0, len(tokens) - context + 1, context)][:32]
    return sum(float(loss_of(model, w[None].to(device, torch.int64))) for w in windows) / max(1, len(windows))


def default_folders() -> list[Path]:
    """The standard library and where packages are installed."""
    paths = sysconfig.get_paths()
    return list(dict.fromkeys(Path(paths[name]) for name in ("stdlib", "purelib", "platlib")))


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, required=True)
    add("--prepare", action="store_true", help="only tokenize, for a training elsewhere: it takes what is in --out")
    add("--minutes", type=float, default=12, help="of training alone (default 12)")
    add("--text", type=Path, nargs="+", default=default_folders(), help="folders of text (default: installed packages)")
    add("--tokens", type=int, default=150_000_000, help="most tokens of text (default 150 million)")
    add("--held-out", type=int, default=100, help="one file in so many is kept from training (default 100)")
    add("--layers", type=int, default=8)
    add("--hidden", type=int, default=512)
    add("--heads", type=int, default=4)
    add("--kv-heads", type=int, default=2)
    add("--head-dim", type=int, default=128)
    add("--context", type=int, default=4096)
    add("--batch", type=int, default=16)
    add("--rate", type=float, default=1.5e-3)
    add("--rope-theta", type=float, default=10_000.0)
    add("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    missing = [str(folder) for folder in args.text if not folder.is_dir()]
    if missing:
        parser.error(f"--text {' '.join(missing)}: no such folder")
    if args.heads % args.kv_heads:
        parser.error(f"--kv-heads {args.kv_heads}: {args.heads} heads are no multiple of it")
    return args


def prepare(args: argparse.Namespace) -> str | None:
    """Put tokenizer, tokens and held-out text to ``args.out``. Returns what is wrong with the text, if anything."""
    train_texts, held_out = [], []
    for text, out in text_files(args.text, args.held_out):
        (held_out if out else train_texts).append(text)
    # Files come in the order of their hashes: the first ones are a fair sample.
    if not train_texts or not held_out:
        return f"{len(train_texts)} files to train on and {len(held_out)} held out are too few"
    tokenizer = make_tokenizer(train_texts)
    tokens = encode(tokenizer, train_texts, args.tokens)
    unseen = encode(tokenizer, held_out, args.tokens // args.held_out + args.context)
    if min(len(tokens), len(unseen)) <= args.context:
        return f"{len(tokens)} and {len(unseen)} tokens do not fill a context of {args.context}"
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(args.out)
    (args.out / "heldout.txt").write_text("\n\n".join(held_out)[:4_000_000])
    np.savez_compressed(args.out / PREPARED, tokens=tokens, unseen=unseen, files=len(train_texts))
    return None


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.prepare or not (args.out / PREPARED).exists():
        if wrong := prepare(args):
            print(f"--text: {wrong}", file=sys.stderr)
            return 2
    if args.prepare:
        return 0
    tokenizer = AutoTokenizer.from_pretrained(args.out)
    with np.load(args.out / PREPARED) as prepared:
        tokens, unseen = (torch.from_numpy(prepared[name]) for name in ("tokens", "unseen"))
        files = int(prepared["files"])
    model = make_model(args, tokenizer).to(device)
    steps, log = train(model, tokens, args, device)
    loss = held_out_loss(model, unseen, args.context, device)
    model.to(torch.bfloat16).save_pretrained(args.out, max_shard_size=SHARD)
    record = {
        "command": "python scripts/train_model.py " + " ".join(argv if argv is not None else sys.argv[1:]),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "parameters": sum(p.numel() for p in model.parameters()),
        "files": files,
        "tokens": len(tokens),
        "tokens_seen": steps * args.batch * args.context,
        "held_out_loss": round(loss, 4),
        "log": log,
    }
    (args.out / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    print(f"{record['parameters'] / 1e6:.1f} million parameters, held-out loss {loss:.3f}, in {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
