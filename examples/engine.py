"""``sgl.Engine`` with a packed KV cache, in a program of its own.

usage: python examples/engine.py MODEL
"""

from __future__ import annotations

import argparse

import sglang as sgl


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder, or a name on the Hugging Face hub")
    parser.add_argument("--cache-dir", help="where the table is kept (default: --kv-quant-cache-dir's)")
    options = parser.parse_args()
    engine = sgl.Engine(
        model_path=options.model,
        kv_quant="blockgtq",
        kv_quant_k_bits=4,
        kv_quant_v_bits="3.5",
        kv_quant_cache_dir=options.cache_dir,
        max_total_tokens=1000,
        mem_fraction_static=0.3,
    )
    info = engine.get_server_info()["kv_quant"]
    print(f"{info['pool']}: K {info['k_bits']} bits, V {info['v_bits']} bits,", end=" ")
    print(f"{info['bytes_per_token_head']:g} bytes per token and head")
    prompt = "The capital of France is"
    print(prompt + engine.generate(prompt, {"max_new_tokens": 3, "temperature": 0})["text"])
    engine.shutdown()


if __name__ == "__main__":  # SGLang starts processes that import this file
    main()
