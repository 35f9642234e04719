"""A test-only SGLang plugin: Mamba layers, and the extra buffer of their states, on the CPU.

SGLang has both on accelerators alone. Their kernels are Triton's, and run in its interpreter; what else they ask of a
GPU is answered here.
"""

import importlib.util
from contextlib import nullcontext
from pathlib import Path


def _swift():
    """The interpreter without what it does in vain, as the tests of the CUDA backend have it."""
    file = Path(__file__).parents[1] / "interpreted" / "blockgtq_interpreted.py"
    spec = importlib.util.spec_from_file_location("interpreted", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module._swift()


def register():
    import torch
    from sglang.kernels.ops.mamba import causal_conv1d_triton as triton_conv
    from sglang.srt.arg_groups import mamba_hook
    from sglang.srt.layers.attention.mamba import mamba
    from triton.runtime.autotuner import Autotuner

    run = Autotuner.run

    def run_the_first(self, *args, **kwargs):
        self.configs = self.configs[:1]  # with one there is nothing to time
        return run(self, *args, **kwargs)

    _swift()
    Autotuner.run = run_the_first
    mamba_hook._platform_supports_mamba_cache_extra_buffer = lambda: True
    torch.Tensor.pin_memory = lambda self, *args, **kwargs: self
    torch.cpu.device = lambda index: nullcontext()
    for name in ("causal_conv1d_fn", "causal_conv1d_update"):
        for alias in (name, f"{name}_triton"):
            setattr(mamba, alias, getattr(triton_conv, name))
