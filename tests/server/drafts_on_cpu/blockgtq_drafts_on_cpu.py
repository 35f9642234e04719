"""A test-only SGLang plugin: speculative decoding on the CPU.

SGLang's kernels for drafts come with a GPU, but for those that it has in Triton for XPUs, which run in Triton's
interpreter.
"""

import importlib
import importlib.util
from pathlib import Path


def _swift():
    """The interpreter without what it does in vain, as the tests of the CUDA backend have it."""
    file = Path(__file__).parents[1] / "interpreted" / "blockgtq_interpreted.py"
    spec = importlib.util.spec_from_file_location("interpreted", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module._swift()


def register():
    from sglang.srt import utils

    _swift()
    real = utils.is_xpu
    utils.is_xpu = lambda: True
    try:
        importlib.import_module("sglang.kernels.ops.speculative.reconstruct_tree")
    finally:
        utils.is_xpu = real
    for name in ("kernels.ops.speculative.cache_locs", "kernels.ops.speculative.spec_tree"):
        importlib.import_module(f"sglang.{name}")._is_xpu = True
    importlib.import_module("sglang.srt.speculative.eagle_utils")._is_xpu = True
