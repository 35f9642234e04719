"""Block-GTQ packed KV cache for SGLang. Importing this imports neither sglang nor torch."""

__version__ = "0.1.0"
