"""The models that are served: folders that the user names, and some that a benchmark makes by itself.

Speed and memory depend on a model's shape, so the known ones are a ``config.json`` with random weights; their
tokenizer is that of the small real model.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from .launch import exit_on_sigterm, missing_plugin

_ROOT = Path(__file__).resolve().parent.parent
_BOTH = {
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "torch_dtype": "bfloat16",
    "use_cache": True,
}
_QWEN2 = _BOTH | {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "use_sliding_window": False,
}
#: as published with Qwen2.5-3B-Instruct, Llama-3.1-8B-Instruct and Qwen2.5-7B-Instruct
SHAPES = {
    "qwen2.5-3b": _QWEN2
    | {
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "vocab_size": 151936,
    },
    "llama-3.1-8b": _BOTH
    | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": False,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 5e5,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
    "qwen2.5-7b": _QWEN2
    | {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
        "vocab_size": 152064,
    },
}
REAL = "smollm2"  # SmolLM2-135M-Instruct, which scripts/get_model.py unpacks
KNOWN = (*SHAPES, REAL)


@dataclass(frozen=True)
class Model:
    """path: a folder or hub name; None for a known name until :func:`ready`. tokenizer: given for random weights,
    since path is then only a config."""

    name: str
    path: str | None
    tokenizer: str | None = None

    @classmethod
    def of(cls, text: str) -> Model:
        """A known NAME, or ``NAME=PATH[,TOKENIZER]``. ArgumentTypeError for anything else."""
        name, given, rest = text.partition("=")
        path, comma, tokenizer = rest.partition(",")
        if not given and name in KNOWN:
            return cls(name, None)
        if not name or not path or (comma and not tokenizer):
            raise argparse.ArgumentTypeError(
                f"{text}: NAME=PATH, NAME=PATH,TOKENIZER or one of {', '.join(KNOWN)} is needed"
            )
        return cls(name, path, tokenizer or None)

    @property
    def args(self) -> list[str]:
        return ["--load-format=dummy", "--tokenizer-path", self.tokenizer] if self.tokenizer else []


def add_models(parser: argparse.ArgumentParser, default: Sequence[str] = ()) -> None:
    """``--model``, a list of :class:`Model`; needed where there is no default."""
    also = f"; default: {' '.join(default)}" if default else ""
    parser.add_argument(
        "--model",
        type=Model.of,
        nargs="+",
        required=not default,
        default=[Model.of(name) for name in default],
        metavar="NAME[=PATH[,TOKENIZER]]",
        help="with TOKENIZER the weights are random, and PATH needs only a config.json. A NAME alone is one of "
        f"{', '.join(SHAPES)}, with random weights, or {REAL}, a small real model{also}",
    )


def check_models(parser: argparse.ArgumentParser, models: list[Model]) -> None:
    """Names say which server a row is of. Ends the program where two are the same."""
    if len({model.name for model in models}) < len(models):
        parser.error("--model: every NAME needs to be another one")


class ModelError(RuntimeError):
    """A model that is known by name could not be made."""


@contextmanager
def ready(models: list[Model]) -> Iterator[list[Model]]:
    """The same with a path each. Configs of known shapes are there as long as the with block.

    Raises ModelError where the small real model, whose tokenizer they need, cannot be had.
    """
    if all(model.path for model in models):
        yield models
        return
    small = small_model()
    with TemporaryDirectory(prefix="models-") as folder:
        yield [model if model.path else _made(model.name, Path(folder), small) for model in models]


def with_ready(
    args: argparse.Namespace,
    argv: list[str] | None,
    server_args: Iterable[str],
    run: Callable[[argparse.Namespace, list[str]], int],
) -> int:
    """What a program's ``run(args, words of its command line)`` returns, with ``args.model`` ready to be served.

    2, with the reason on stderr, where the plugin that server_args ask for or a model cannot be had.
    """
    if why := missing_plugin(server_args):
        print(why, file=sys.stderr)
        return 2
    exit_on_sigterm()
    # Shapes with random weights are served at lengths that their configs do not name.
    os.environ["SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN"] = "1"
    try:
        with ready(args.model) as args.model:
            return run(args, sys.argv[1:] if argv is None else argv)
    except ModelError as e:
        print(e, file=sys.stderr)
        return 2


def _made(name: str, folder: Path, small: str) -> Model:
    if name == REAL:
        return Model(name, small)
    path = folder / name
    path.mkdir()
    (path / "config.json").write_text(json.dumps(SHAPES[name], indent=1) + "\n")
    return Model(name, str(path), small)


def small_model() -> str:
    """Folder of SmolLM2-135M-Instruct; the first time it is downloaded. ModelError if that fails."""
    script = _ROOT / "scripts" / "get_model.py"
    made = subprocess.run([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, check=False)
    if made.returncode:
        raise ModelError(
            "--model: the small real model, whose tokenizer the known shapes have, could not be made (see above); name "
            "folders instead, NAME=CONFIG_FOLDER,TOKENIZER_FOLDER"
        )
    return made.stdout.strip()
