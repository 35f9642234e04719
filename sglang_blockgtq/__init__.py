"""Block-GTQ packed KV cache for SGLang. Importing this imports neither sglang nor torch."""

from pathlib import Path

__version__ = "0.2.0"

_here = Path(__file__).resolve().parent
if not (_here / "kernels").is_dir() and (_here.parent / "kernels" / "format").is_dir():
    # Imported from a clone's root, where kernels/ and calibrate/ lie beside this folder, not in it.
    __path__.append(str(_here.parent))
