"""Engine features this cache does not serve, each refused at start-up with its reason.

What the user typed is checked before anything is loaded (check_user_args), what SGLang makes of it once it
has (check_resolved), and the model by its config (check_config) and its loaded layers (check_runner, check_layers).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from .options import BY_SEGMENTS, NAME, KVQuantError, KVQuantOptions, flag


@dataclass(frozen=True)
class Refusal:
    """An option value that is refused."""

    option: str  # ServerArgs field, or an environment variable of SGLang
    refuses: Callable[[Any], bool]
    reason: str
    instead: str
    part: Callable[[Any], Any] = lambda value: value  # of the value: what ``refuses`` sees and the message shows

    @property
    def is_variable(self) -> bool:
        return self.option.isupper()

    @property
    def flag(self) -> str:
        return self.option if self.is_variable else "--" + self.option.replace("_", "-")


def _set(value: Any) -> bool:
    return bool(value)


def _above_one(value: Any) -> bool:
    return value is not None and int(value) > 1


def _prefill_graph(config: Any) -> str:
    """The prefill part of a --cuda-graph-config, as typed (a dict) or as resolved."""
    phase = config.get("prefill") if isinstance(config, dict) else getattr(config, "prefill", None)
    backend = phase.get("backend") if isinstance(phase, dict) else getattr(phase, "backend", None)
    return f"prefill.backend={backend}"


#: Speculative algorithms that are served. Others verify drafts of several lengths in a batch, or share the target's
#: cache with their draft.
SPECULATION = ("NGRAM", "STANDALONE", "EAGLE", "EAGLE3", "NEXTN")
_LEAVE_OUT = "leave the option out"
_NO_FULL_GRAPH = "prefill attention over packed rows runs between graph segments"
_OTHER_GRAPH = "use breakable (the default) or disabled"

STORAGE = Refusal(
    "hicache_storage_backend",
    lambda v: v not in (None, "file"),
    "no other storage was tried with packed pages, and some want keys and values apart",
    "use file, or leave the option out",
)

REFUSALS = (
    Refusal(
        "kv_cache_dtype",
        lambda v: v not in (None, "auto"),
        "the cache is packed codes and has no dtype of its own",
        "leave it at auto, or drop --kv-quant to use that dtype",
    ),
    Refusal(
        "attention_backend",
        lambda v: v not in (None, NAME),
        "packed rows can be read only by their own kernels",
        f"leave it out; {NAME} is set for you",
    ),
    Refusal("prefill_attention_backend", lambda v: v not in (None, NAME), "it cannot read packed rows", _LEAVE_OUT),
    Refusal("decode_attention_backend", lambda v: v not in (None, NAME), "it cannot read packed rows", _LEAVE_OUT),
    STORAGE,
    Refusal(
        "hicache_mem_layout",
        lambda v: v in ("page_head", "page_first_kv_split"),
        "a packed row is not cut by heads, nor into keys and values",
        "use page_first (the default), layer_first or page_first_direct",
    ),
    Refusal(
        "hicache_io_backend",
        lambda v: v not in (None, "kernel", "direct"),
        "its kernels are for another accelerator",
        "use kernel (the default) or direct",
    ),
    Refusal("enable_lmcache", _set, "LMCache copies dense K and V", _LEAVE_OUT),
    Refusal("enable_flexkv", _set, "FlexKV copies dense K and V", _LEAVE_OUT),
    Refusal("radix_cache_backend", lambda v: v == "flexkv", "FlexKV copies dense K and V", _LEAVE_OUT),
    Refusal("enable_hisparse", _set, "HiSparse keeps its own pool layout", _LEAVE_OUT),
    Refusal("enable_unified_memory", _set, "the unified memory pool has its own row layout", _LEAVE_OUT),
    Refusal("enable_unified_cache_external_linker", _set, "the external linker copies dense K and V", _LEAVE_OUT),
    Refusal("enable_page_major_kv_layout", _set, "packed rows are token-major", _LEAVE_OUT),
    Refusal("enable_kv_cache_sharding", _set, "shards are cut from dense K and V", _LEAVE_OUT),
    Refusal(
        "disaggregation_mode",
        lambda v: v not in (None, "null"),
        "the transfer between them knows keys and values apart, and its handshake no table",
        "run one server that does both",
    ),
    Refusal("enable_pdmux", _set, "it builds several attention backends over one pool", _LEAVE_OUT),
    Refusal(
        "speculative_algorithm",
        lambda v: v is not None and v.upper() not in SPECULATION,
        "its drafts share the target's cache or differ in length within a batch",
        f"use one of {', '.join(SPECULATION)}",
    ),
    Refusal(
        "speculative_draft_attention_backend",
        lambda v: v == NAME,
        "a draft model has a 16-bit cache of SGLang's own",
        "leave it out, or name one of SGLang's backends",
    ),
    Refusal("speculative_adaptive", _set, "verification has buffers of one draft length", _LEAVE_OUT),
    Refusal("enable_multi_layer_eagle", _set, "several draft models are not tested beside packed rows", _LEAVE_OUT),
    Refusal("dcp_size", _above_one, "decode context parallelism splits dense K and V", "use --tp-size"),
    Refusal("attn_cp_size", _above_one, "context parallelism splits dense K and V", "use --tp-size"),
    Refusal("prefill_only_disable_kv_cache", _set, "there would be no cache to pack", "drop --kv-quant"),
    Refusal(
        "kv_canary",
        lambda v: v not in (None, "none"),
        "the canary reads dense K and V",
        "leave it at none; --kv-quant-check-rows compares packed rows",
    ),
    Refusal(
        "enable_deterministic_inference",
        _set,
        "where decode splits a request, and which kernel encodes a token, depends on the batch",
        "drop one of the two",
    ),
    Refusal("rl_on_policy_target", _set, "it needs deterministic attention", "drop one of the two"),
    Refusal("enable_two_batch_overlap", _set, "two-batch overlap over packed rows is not tested", _LEAVE_OUT),
    Refusal("dllm_algorithm", _set, "diffusion language models attend in both directions", "drop --kv-quant"),
    Refusal(
        "enable_torch_compile",
        _set,
        "SGLang compiles decode with attention in it, whose launches go around PyTorch; that was never run",
        _LEAVE_OUT,
    ),
    Refusal("enable_nvidia_megakernel", _set, "its kernels read dense K and V", _LEAVE_OUT),
    Refusal("enable_amd_monokernel", _set, "its kernels read dense K and V", _LEAVE_OUT),
    Refusal(
        "quantization_param_path",
        _set,
        "scales for an fp8 cache mean nothing to packed codes",
        "leave it out, or drop --kv-quant and use --kv-cache-dtype fp8_e4m3",
    ),
    Refusal("cuda_graph_backend_prefill", lambda v: v == "full", _NO_FULL_GRAPH, _OTHER_GRAPH),
    Refusal("cuda_graph_config", lambda v: v == "prefill.backend=full", _NO_FULL_GRAPH, _OTHER_GRAPH, _prefill_graph),
    Refusal("encoder_only", _set, "an encoder has no decode cache", "drop --kv-quant"),
    Refusal(
        "SGLANG_ENABLE_POST_CAPTURE_KV_SIZING", _set, "packed pools are sized before graphs are captured", "unset it"
    ),
    Refusal(
        "SGLANG_ENABLE_METADATA_GLUE_GRAPH",
        _set,
        "a graph of what prepares a step would leave out what the host does then for drafts' trees and checks of rows",
        "unset it",
    ),
    Refusal("SGLANG_USE_HND_KVCACHE", _set, "packed rows have their own layout", "unset it"),
)

#: Refused only when the table has to be computed: one file then serves every replica.
NEEDS_TABLE = (
    Refusal(
        "enable_dp_attention",
        _set,
        "calibration runs one batch, and such groups exchange theirs in every layer",
        "give a table with --kv-quant-table",
    ),
    Refusal(
        "attn_dp_size",
        _above_one,
        "calibration runs one batch, and such groups exchange theirs in every layer",
        "give a table with --kv-quant-table",
    ),
    Refusal(
        "skip_tokenizer_init",
        _set,
        "calibration text needs the tokenizer",
        "give a table with --kv-quant-table",
    ),
    Refusal(
        "startup_weight_load_mode",
        lambda v: v == "overlap",
        "weights are not there yet when calibration runs",
        "give a table with --kv-quant-table",
    ),
    Refusal(
        "checkpoint_engine_wait_weights_before_ready",
        _set,
        "weights are not there yet when calibration runs",
        "give a table with --kv-quant-table",
    ),
)

#: Refused only with --kv-quant-recalibrate flush.
RECALIBRATION = tuple(
    replace(refusal, instead=f"leave {flag('recalibrate')} out")
    for refusal in (
        *(r for r in NEEDS_TABLE if r.option in ("enable_dp_attention", "attn_dp_size", "skip_tokenizer_init")),
        Refusal("pp_size", _above_one, "stages hear of a flush one after another, and calibrate together", ""),
        Refusal("enable_lora", _set, "adapters are in the layers that calibration would run", ""),
        Refusal("enable_hierarchical_cache", _set, "stored pages are named by the table of the start", ""),
        Refusal("speculative_algorithm", _set, "a draft's weights would be others, too; nobody tried it", ""),
    )
)


def _check(get: Callable[[str], Any], asked: KVQuantOptions, resolved: str = "") -> None:
    from sglang.srt.environ import envs

    refusals = REFUSALS if asked.table is not None else REFUSALS + NEEDS_TABLE
    for refusal in refusals if asked.recalibrate == "never" else refusals + RECALIBRATION:
        value = getattr(envs, refusal.option).get() if refusal.is_variable else get(refusal.option)
        value = refusal.part(value)
        if refusal.refuses(value):
            shown = refusal.flag if value is True else f"{refusal.flag} {value}"
            where = f"--kv-quant {NAME}" if refusal not in RECALIBRATION else f"{flag('recalibrate')} flush"
            raise KVQuantError(f"{shown}{resolved}: not with {where}: {refusal.reason}; {refusal.instead}")
    device = get("device")
    if device is not None and str(device).split(":")[0] not in ("cuda", "cpu"):
        raise KVQuantError(
            f"--device {device}{resolved}: not with --kv-quant {NAME}: kernels exist for cuda and cpu; use one"
        )
    if get("enable_hierarchical_cache"):
        _check_hicache(device, get("page_size"), resolved)


#: Devices that SGLang's kernels move rows to and from host memory of.
HICACHE_DEVICES = ("cuda",)
#: Tokens of a page where HiCache is on and none are given; SGLang's default is 1.
HICACHE_PAGE = 64


def chosen_device(given: Any) -> tuple[str, str]:
    """What --device is, given or by SGLang's choice, and its type."""
    import torch

    device = str(given or ("cuda" if torch.accelerator.is_available() else "cpu"))
    return device, device.split(":")[0]


def _check_hicache(given: Any, page_size: int | None, resolved: str) -> None:
    device, kind = chosen_device(given)
    if kind not in HICACHE_DEVICES:
        raise KVQuantError(
            f"--enable-hierarchical-cache{resolved}: not with --kv-quant {NAME} on --device {device}: SGLang moves "
            f"rows to host memory with kernels for {' and '.join(HICACHE_DEVICES)}; leave the option out"
        )
    if page_size is not None:
        check_page(page_size)


def check_page(page_size: int) -> None:
    """Of what HiCache moves: whole blocks of interleaved rows. Raises KVQuantError."""
    from .kernels.format.layout import BLOCK_SLOTS

    if page_size % BLOCK_SLOTS:
        raise KVQuantError(
            f"--page-size {page_size}: not with --enable-hierarchical-cache and --kv-quant {NAME}: pages are moved, "
            f"and packed rows lie interleaved in blocks of {BLOCK_SLOTS} tokens; use --page-size {HICACHE_PAGE}"
        )


def check_checksums(asked: KVQuantOptions, get: Callable[[str], Any]) -> None:
    """Rows that something else than the pool brings back have none. Raises KVQuantError."""
    if asked.check_rows and get("enable_hierarchical_cache"):
        raise KVQuantError(
            f"--kv-quant-check-rows {asked.check_rows}: HiCache keeps no checksums of the rows that it brings back; "
            "leave it or --enable-hierarchical-cache out"
        )


def check_decode_kernel(asked: KVQuantOptions, get: Callable[[str], Any]) -> None:
    """Raises KVQuantError without a GPU that the kernel for Hopper could run on."""
    device, kind = chosen_device(get("device"))
    if asked.decode_kernel == "cuda" and kind != "cuda":
        raise KVQuantError(
            f"{flag('decode_kernel')} cuda: not on --device {device}: it is a kernel for Hopper GPUs; use triton"
        )


def check_recent(asked: KVQuantOptions, get: Callable[[str], Any]) -> None:
    """Raises KVQuantError where exact tokens are asked for beside trees of drafts."""
    algorithm, topk = get("speculative_algorithm"), get("speculative_eagle_topk")
    if not asked.exact_recent or algorithm is None:
        return
    ngram = algorithm.upper() == "NGRAM"
    if ngram or (topk or 1) > 1:
        branches = "" if ngram else f" --speculative-eagle-topk {topk}"
        raise KVQuantError(
            f"{flag('exact_recent')} {asked.exact_recent}: not with --speculative-algorithm {algorithm}{branches}: "
            "trees of drafts are verified over packed rows alone; leave one of both out, or draft chains"
        )


def check_user_args(get: Callable[[str], Any], asked: KVQuantOptions) -> None:
    """Refuse conflicting options. ``get(field)`` gives the user's value or None. Raises KVQuantError."""
    _check(get, asked)
    check_decode_kernel(asked, get)
    check_recent(asked, get)


def check_resolved(server_args: Any = None) -> None:
    """Refuse what SGLang, the model or a variable turned on though nobody typed the option. Raises KVQuantError.

    server_args: resolved, and carrying the options; by default this process's published configuration.
    """
    from sglang.srt.arg_groups.overrides import resolution_result
    from sglang.srt.runtime_context import get_context

    if server_args is None:
        server_args, get = get_context().server_args, get_context().config_leaf
    else:
        get = partial(resolution_result, server_args)
    _check(get, KVQuantOptions.required_of(server_args), resolved=" (as SGLang resolves the arguments)")


def refuse_model(what: str, reason: str) -> KVQuantError:
    return KVQuantError(f"--kv-quant {NAME}: {what}: {reason}; serve this model without --kv-quant")


def type_of(config: Any) -> str:
    """Of a Hugging Face config, for messages."""
    return f"model type {getattr(config, 'model_type', 'unknown')}"


def check_config(config: Any) -> None:
    """What a Hugging Face config tells of a model that cannot be served. Raises KVQuantError."""
    from .calibrate.supported import unsupported

    if what := unsupported(config):
        raise KVQuantError(f"--kv-quant {NAME}: {what}; serve this model without --kv-quant")
    if kv_scheme := _checkpoint_kv_scheme(config):
        raise refuse_model(f"checkpoint with {kv_scheme}", "its scales are made for an fp8 cache")


def check_granularity(config: Any, options: KVQuantOptions) -> None:
    """Segments must fit the heads of a model that will be calibrated. Raises KVQuantError."""
    from .calibrate.model import head_dim, text_config
    from .calibrate.segments import check_segments

    by_segments = options.allocator in BY_SEGMENTS and options.granularity == "segment"
    if getattr(text_config(config), "num_attention_heads", None) and by_segments and options.k_bits is not None:
        try:
            check_segments(head_dim(config), options.k_bits)
        except ValueError as e:
            raise KVQuantError(str(e)) from None


def _checkpoint_kv_scheme(config: Any) -> str | None:
    """How a quantized checkpoint says that it brings KV-cache scales, or None."""
    quant = getattr(config, "quantization_config", None) or {}
    quant = quant if isinstance(quant, dict) else getattr(quant, "to_dict", dict)()
    for key in ("kv_cache_scheme", "kv_cache_quant_algo"):
        value = quant.get(key) or (quant.get("quantization") or {}).get(key)
        if value:
            return f"{key} {value if isinstance(value, str) else 'set'}"
    return None


def check_runner(runner: Any) -> None:
    """What the loaded model runner tells beyond :func:`check_config`. Raises KVQuantError."""
    import torch

    if runner.use_mla_backend:  # SGLang knows MLA by the architecture's name
        raise refuse_model("MLA attention", "it keeps one latent vector, not keys and values")
    if runner.kv_cache_dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise refuse_model(f"cache dtype {runner.kv_cache_dtype} from the checkpoint", "its scales are for fp8")
    if runner.device.split(":")[0] == "cuda" and torch.version.hip:
        raise KVQuantError(f"--kv-quant {NAME}: ROCm is not supported; use an NVIDIA GPU or --device cpu")


def check_layers(layers: list[Any], head_dim: int) -> None:
    """RadixAttention modules of the loaded model. head_dim: by its config. Raises KVQuantError."""
    from sglang.srt.layers.radix_attention import AttentionType

    if not layers:
        raise refuse_model("no attention layer found", "the model does not use SGLang's RadixAttention")
    for layer in layers:
        where = f"layer {layer.layer_id}"
        if layer.is_cross_attention or layer.attn_type != AttentionType.DECODER:
            raise refuse_model(f"{where} attends as {layer.attn_type}", "only causal self-attention is supported")
        if layer.xai_temperature_len > 0:
            raise refuse_model(f"{where} scales logits by position", "xAI temperature scaling is not supported")
        if layer.k_scale is not None or layer.v_scale is not None:
            raise refuse_model(f"{where} has fp8 KV scales", "packed codes carry their own scales")
    shapes = {(x.tp_q_head_num, x.tp_k_head_num, x.tp_v_head_num, x.qk_head_dim, x.v_head_dim) for x in layers}
    if len(shapes) > 1:
        raise refuse_model(f"layers of different shapes {sorted(shapes)}", "all layers must have the same heads")
    if layers[0].qk_head_dim != head_dim:
        found = f"heads of {layers[0].qk_head_dim} channels where the config says {head_dim}"
        raise refuse_model(found, "the model does not follow its config")
    if layers[0].tp_k_head_num != layers[0].tp_v_head_num:
        raise refuse_model("different numbers of key and value heads", "they must be equal")
