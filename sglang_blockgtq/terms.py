"""What a layer of a model served by SGLang has besides keys, values and a scale."""

from __future__ import annotations

from typing import Any

from .kernels.terms import Terms
from .options import NAME, KVQuantError


def terms_of(layer: Any, kwargs: dict[str, Any]) -> Terms:
    """Of a RadixAttention module and what its model passes to it. KVQuantError for what packed attention has not."""
    for name in ("score_mod", "aux_tensors", "q_rope", "k_rope"):
        if kwargs.get(name) is not None:
            raise KVQuantError(
                f"--kv-quant {NAME}: the model's attention uses {name}, which is not supported; "
                "serve this model without --kv-quant"
            )
    left = layer.sliding_window_size
    # SGLang counts the tokens before a query's own.
    window = left + 1 if left is not None and left > -1 else 0
    return Terms(window, float(layer.logit_cap or 0.0), kwargs.get("sinks"))
