"""A test-only SGLang plugin: speculative decoding on the CPU.

SGLang's kernels for drafts come with a GPU, but for those that it has in Triton for XPUs, which run in Triton's
interpreter: beside blockgtq_interpreted, which makes that swift.
"""

import importlib


def register():
    from sglang.srt import utils

    real = utils.is_xpu
    utils.is_xpu = lambda: True
    try:
        importlib.import_module("sglang.kernels.ops.speculative.reconstruct_tree")
    finally:
        utils.is_xpu = real
    for name in ("kernels.ops.speculative.cache_locs", "kernels.ops.speculative.spec_tree"):
        importlib.import_module(f"sglang.{name}")._is_xpu = True
    importlib.import_module("sglang.srt.speculative.eagle_utils")._is_xpu = True
