"""Codec, byte layout and attention kernels of the packed KV cache. Needs only torch and triton.

Installed as ``sglang_blockgtq.kernels``. Python started in a clone's root would also find this
folder as the top-level name ``kernels``, which belongs to the Hugging Face package that
transformers and SGLang import; then it hands that name over.
"""

if __name__ == "kernels":
    import importlib.util
    import sys
    from importlib.machinery import PathFinder
    from pathlib import Path

    _here = Path(__file__).resolve().parent.parent
    _spec = PathFinder.find_spec(__name__, [p for p in sys.path if Path(p or ".").resolve() != _here])
    if _spec is None or _spec.loader is None:
        # Not installed: whoever found this folder asks for a version next, and must find it too old.
        __version__ = "0"
    else:
        _module = importlib.util.module_from_spec(_spec)
        sys.modules[__name__] = _module
        _spec.loader.exec_module(_module)
