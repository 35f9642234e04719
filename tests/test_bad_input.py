"""Every refused option: one line that names the option, the value and what would work."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from sglang.srt.plugins import load_plugins


@pytest.fixture(scope="module", autouse=True)
def plugins():
    import sglang.srt.entrypoints.engine  # noqa: F401  the plugin gives Engine its options when it is loaded

    load_plugins()


LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "torch_dtype": "bfloat16",
}


@pytest.fixture
def model(tmp_path):
    """A folder with only a config: none of these starts may get as far as the weights."""

    def make(**changes) -> str:
        folder = tmp_path / "model"
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps({**LLAMA, **changes}))
        return str(folder)

    return make


def refusal(model_path: str, *flags: str, **engine) -> str:
    """The message of a refused start, which must be the same from the command line and from Engine."""
    import sglang as sgl
    from sglang.srt.server_args import prepare_server_args

    from sglang_blockgtq.options import KVQuantError

    with pytest.raises(SystemExit) as exit:
        prepare_server_args(["--model-path", model_path, "--kv-quant", "blockgtq", *flags])
    message = str(exit.value.code)
    assert message.startswith("error: ") and "\n" not in message
    with pytest.raises(KVQuantError) as raised:
        sgl.Engine(model_path=model_path, kv_quant="blockgtq", **engine)
    assert f"error: {raised.value}" == message
    return message


@pytest.mark.parametrize("option", ["k", "v"])
def test_bits(model, option):
    for value in ("0", "9", "nan", "three", "-1", "inf"):
        message = refusal(model(), f"--kv-quant-{option}-bits={value}", **{f"kv_quant_{option}_bits": value})
        assert f"--kv-quant-{option}-bits {value}" in message and "from 1 to 8" in message


def test_what_a_cache_may_cost(model):
    for value in ("0", "-1", "nan", "x", "inf", ""):
        message = refusal(model(), f"--kv-quant-max-kl={value}", kv_quant_max_kl=value)
        assert message.startswith(f"error: --kv-quant-max-kl {value}: a number above 0 is needed, in nats a token")


def test_rows_to_check(model):
    for value in ("x", "-1", "2.5", "100000"):
        message = refusal(model(), f"--kv-quant-check-rows={value}", kv_quant_check_rows=value)
        assert f"--kv-quant-check-rows {value}: a whole number up to 65536 is needed" in message
    both = {"kv_quant_check_rows": 8, "enable_hierarchical_cache": True}
    message = refusal(model(), "--kv-quant-check-rows=8", "--enable-hierarchical-cache", **both)
    assert "--kv-quant-check-rows 8: HiCache keeps no checksums" in message


def test_exact_tokens(model):
    for value in ("x", "-1", "2.5", "65"):
        message = refusal(model(), f"--kv-quant-exact-recent={value}", kv_quant_exact_recent=value)
        assert f"--kv-quant-exact-recent {value}: a whole number up to 64 is needed, e.g. 32, or 0 for none" in message
    both = {"kv_quant_exact_recent": 8, "speculative_algorithm": "NGRAM"}
    message = refusal(model(), "--kv-quant-exact-recent=8", "--speculative-algorithm=NGRAM", **both)
    assert "--kv-quant-exact-recent 8: not with --speculative-algorithm NGRAM: trees of drafts are" in message
    given = "--speculative-algorithm=EAGLE", "--speculative-eagle-topk=2"
    both = {"kv_quant_exact_recent": 8, "speculative_algorithm": "EAGLE", "speculative_eagle_topk": 2}
    message = refusal(model(), "--kv-quant-exact-recent=8", *given, **both)
    assert "--kv-quant-exact-recent 8: not with --speculative-algorithm EAGLE --speculative-eagle-topk 2" in message
    both = {"kv_quant_exact_recent": 4, "kv_quant_chunk_attention": "quantized"}
    message = refusal(model(), "--kv-quant-exact-recent=4", "--kv-quant-chunk-attention=quantized", **both)
    assert "--kv-quant-exact-recent 4: --kv-quant-chunk-attention quantized reads all tokens as" in message


def test_ranges_of_bits(model):
    for value in ("3", "5-4", "9-10", "", "2-4-6", "-2", "low-high", "nan-4", "2-nan"):
        message = refusal(model(), f"--kv-quant-bits-range={value}", kv_quant_bits_range=value)
        assert message.startswith(f"error: --kv-quant-bits-range {value}: ")
        assert message.endswith("LOW-HIGH is needed, from 2 to 8, e.g. 2-4")
    message = refusal(model(), "--kv-quant-bits-range", "4.5-5", kv_quant_bits_range="4.5-5")
    assert "--kv-quant-bits-range 4.5-5: holds none of K 2 V 2, K 2.5 V 2, " in message
    for other, given in (("k_bits", "4"), ("v_bits", "4"), ("preset", "balanced")):
        flags = "--kv-quant-bits-range", "2-4", f"--kv-quant-{other.replace('_', '-')}", given
        message = refusal(model(), *flags, kv_quant_bits_range="2-4", **{f"kv_quant_{other}": given})
        assert message == "error: --kv-quant-bits-range 2-4: has no effect without --kv-quant-preset auto"


@pytest.mark.parametrize("option", ["k_bits", "v_bits"])
def test_bits_beside_a_preset_that_chooses_them(model, option):
    flag = f"--kv-quant-{option.replace('_', '-')}"
    engine = {"kv_quant_preset": "auto", f"kv_quant_{option}": 4}
    message = refusal(model(), "--kv-quant-preset", "auto", flag, "4", **engine)
    assert message.startswith(f"error: {flag} 4: --kv-quant-preset auto chooses bits; leave one of both out")
    assert "--kv-quant-bits-range" in message


CONFLICTS = [
    ("kv_cache_dtype", "fp8_e4m3", "leave it at auto"),
    ("attention_backend", "triton", "leave it out"),
    ("prefill_attention_backend", "triton", "leave the option out"),
    ("decode_attention_backend", "triton", "leave the option out"),
    ("hicache_storage_backend", "mooncake", "use file"),
    ("hicache_mem_layout", "page_head", "use page_first"),
    ("hicache_io_backend", "kernel_ascend", "use kernel"),
    ("enable_lmcache", True, "LMCache"),
    ("radix_cache_backend", "flexkv", "FlexKV"),
    ("enable_unified_memory", True, "unified memory"),
    ("enable_page_major_kv_layout", True, "token-major"),
    ("enable_kv_cache_sharding", True, "dense K and V"),
    ("disaggregation_mode", "prefill", "one server that does both"),
    ("speculative_algorithm", "DFLASH", "NGRAM, STANDALONE, EAGLE, EAGLE3, NEXTN"),
    ("speculative_draft_attention_backend", "blockgtq", "16-bit cache"),
    ("enable_multi_layer_eagle", True, "several draft models"),
    ("dcp_size", 2, "--tp-size"),
    ("kv_canary", "raise", "--kv-quant-check-rows compares packed rows"),
    ("enable_deterministic_inference", True, "depends on the batch"),
    ("enable_torch_compile", True, "leave the option out"),
    ("enable_nvidia_megakernel", True, "dense K and V"),
    ("prefill_only_disable_kv_cache", True, "no cache to pack"),
    ("cuda_graph_backend_prefill", "full", "breakable"),
    ("skip_tokenizer_init", True, "--kv-quant-table"),
    ("checkpoint_engine_wait_weights_before_ready", True, "--kv-quant-table"),
    ("device", "npu", "cuda and cpu"),
]


@pytest.mark.parametrize(
    ("option", "value"),
    [("pp_size", 2), ("enable_lora", True), ("skip_tokenizer_init", True), ("speculative_algorithm", "NGRAM")],
)
def test_recalibration_beside_other_features(model, option, value):
    flag = "--" + option.replace("_", "-")
    given = (flag,) if value is True else (flag, str(value))
    asked = {"kv_quant_table": __file__, "kv_quant_recalibrate": "flush", option: value}
    message = refusal(model(), f"--kv-quant-table={__file__}", "--kv-quant-recalibrate=flush", *given, **asked)
    assert f"{flag}{'' if value is True else f' {value}'}: not with --kv-quant-recalibrate flush: " in message
    assert message.endswith("; leave --kv-quant-recalibrate out")


def test_recalibration_at_another_time(model):
    message = refusal(model(), "--kv-quant-recalibrate=always", kv_quant_recalibrate="always")
    assert message == "error: --kv-quant-recalibrate always: unknown; choose one of never, flush"


@pytest.mark.parametrize(("option", "value", "hint"), CONFLICTS, ids=lambda x: str(x))
def test_unsupported_features(model, option, value, hint):
    flag = "--" + option.replace("_", "-")
    given = (flag,) if value is True else (flag, str(value))
    message = refusal(model(), *given, **{option: value})
    assert flag in message and hint in message
    assert value is True or str(value) in message


def test_a_prefill_graph_asked_for_in_json(model):
    full = {"prefill": {"backend": "full"}}
    message = refusal(model(), "--cuda-graph-config", json.dumps(full), cuda_graph_config=full)
    assert "--cuda-graph-config prefill.backend=full: not with" in message and "breakable" in message


@pytest.mark.parametrize(
    "name", ["SGLANG_ENABLE_POST_CAPTURE_KV_SIZING", "SGLANG_ENABLE_METADATA_GLUE_GRAPH", "SGLANG_USE_HND_KVCACHE"]
)
def test_variables_of_sglang(model, monkeypatch, name):
    monkeypatch.setenv(name, "1")
    message = refusal(model())
    assert message.startswith(f"error: {name}: not with --kv-quant blockgtq: ") and "unset it" in message


def test_quantization_param_path(model, tmp_path):
    scales = tmp_path / "scales.json"
    scales.write_text("{}")
    message = refusal(model(), "--quantization-param-path", str(scales), quantization_param_path=str(scales))
    assert "fp8" in message


@pytest.mark.parametrize(
    ("changes", "hint"),
    [
        ({"head_dim": 40}, "multiples of 16 from 32 to 256"),
        ({"head_dim": 512}, "multiples of 16 from 32 to 256"),
        ({"kv_lora_rank": 64}, "MLA"),
        ({"is_encoder_decoder": True}, "encoder-decoder"),
        ({"attention_chunk_size": 64}, "in chunks"),
        ({"global_head_dim": 64}, "heads of different sizes"),
        ({"architectures": ["Gemma3ForConditionalGeneration"]}, "in both directions"),
        (
            {"quantization_config": {"quant_method": "fp8", "kv_cache_scheme": {"type": "float", "num_bits": 8}}},
            "fp8 cache",
        ),
        ({"layer_types": ["chunked_attention", "full_attention"]}, "with chunked_attention layers"),
        ({"layer_types": ["linear_attention", "linear_attention"]}, "no layer has attention"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_unsupported_models(model, changes, hint):
    message = refusal(model(**changes))
    assert hint in message and "without --kv-quant" in message


def test_states_on_a_cpu(model, monkeypatch):
    from sglang.srt import utils
    from sglang.srt.server_args import prepare_server_args
    from triton import knobs

    monkeypatch.setattr(utils, "cpu_has_amx_support", lambda: False)
    monkeypatch.setattr(knobs.runtime, "interpret", False)
    hybrid = model(architectures=["Lfm2ForCausalLM"], model_type="lfm2", layer_types=["conv", "full_attention"])
    message = refusal(hybrid, "--device", "cpu", device="cpu")
    assert "--device cpu" in message and "model type lfm2" in message and "TRITON_INTERPRET=1" in message
    monkeypatch.setattr(knobs.runtime, "interpret", True)
    prepare_server_args(["--model-path", hybrid, "--device", "cpu", "--kv-quant", "blockgtq"])


def test_mamba_beside_attention_with_graphs_of_a_prefill(model):
    falcon = model(architectures=["FalconH1ForCausalLM"], model_type="falcon_h1")
    message = refusal(falcon, "--device", "cuda", device="cuda")
    assert "model type falcon_h1" in message and "add --cuda-graph-backend-prefill disabled" in message


NGRAM = ("--speculative-algorithm", "NGRAM", "--device", "cpu")
NGRAM_ENGINE = {"speculative_algorithm": "NGRAM", "device": "cpu"}


def test_drafts_on_a_plain_cpu(model, monkeypatch):
    from sglang.srt.server_args import prepare_server_args
    from triton import knobs

    monkeypatch.setattr(knobs.runtime, "interpret", False)
    assert "SGLANG_USE_CPU_ENGINE=1" in refusal(model(), *NGRAM, **NGRAM_ENGINE)
    monkeypatch.setattr(knobs.runtime, "interpret", True)
    prepare_server_args(["--model-path", model(), "--kv-quant", "blockgtq", *NGRAM])


def test_drafts_with_host_memory(model, monkeypatch):
    from triton import knobs

    monkeypatch.setattr(knobs.runtime, "interpret", True)
    flags = "--speculative-algorithm", "EAGLE", "--enable-hierarchical-cache", "--device", "cuda"
    engine = {"speculative_algorithm": "EAGLE", "enable_hierarchical_cache": True, "device": "cuda"}
    assert "--enable-hierarchical-cache: host memory for a draft's cache" in refusal(model(), *flags, **engine)


def test_drafts_beside_states(model):
    hybrid = model(architectures=["Lfm2ForCausalLM"], model_type="lfm2", layer_types=["conv", "full_attention"])
    assert "layers with states" in refusal(hybrid, *NGRAM, **NGRAM_ENGINE)


def test_hicache_beside_states_of_one_token_pages(model, monkeypatch):
    """Whole pages are moved. LFM2 has no extra buffer of states; Qwen3-Next has, unless another strategy is given."""
    from types import SimpleNamespace

    from sglang_blockgtq.options import KVQuantError
    from sglang_blockgtq.preflight import _check_pages

    def config(architecture: str) -> SimpleNamespace:
        named = {"architectures": [architecture], "model_type": "its type", "layer_types": ["conv"]}
        return SimpleNamespace(**named, get_text_config=lambda: SimpleNamespace(**named))

    lfm2, next_ = config("Lfm2ForCausalLM"), config("Qwen3NextForCausalLM")
    on = {"enable_hierarchical_cache": True}
    assert _check_pages(next_, on.get) is None and _check_pages(lfm2, {}.get) is None
    for served, given in ((lfm2, {}), (next_, {"mamba_radix_cache_strategy": "no_buffer"})):
        strategy = given.get("mamba_radix_cache_strategy", "auto")
        with pytest.raises(KVQuantError, match=f"its type with --mamba-radix-cache-strategy {strategy}: .* one token"):
            _check_pages(served, (on | given).get)


def test_windows_without_their_pool(model):
    kinds = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 64, "num_hidden_layers": 2}
    mellum = model(architectures=["MellumForCausalLM"], model_type="mellum", **kinds)
    message = refusal(mellum, "--disable-hybrid-swa-memory", disable_hybrid_swa_memory=True)
    assert "model type mellum" in message and "leave --disable-hybrid-swa-memory out" in message


def test_another_models_pool_of_windows(model):
    message = refusal(model(is_hybrid_swa=True, hybrid_layer_pattern=[1, 0]))
    assert "model type llama" in message and "supported for gpt_oss, mellum, mimo_v2_flash" in message


def test_files(model, tmp_path):
    """What is no file is told by its kind, and nobody waits for a pipe's other end."""
    os.mkfifo(tmp_path / "pipe")
    for option, hint in (("table", "sglang_blockgtq.calibrate"), ("calibration_text", "UTF-8 text file")):
        flag = "--kv-quant-" + option.replace("_", "-")
        for value, problem in (
            (tmp_path / "none", "no such file"),
            (tmp_path, "a folder, not a file"),
            (tmp_path / "pipe", "a pipe or device"),
            ("/dev/null", "a pipe or device"),
            ("", "empty"),
        ):
            message = refusal(model(), f"{flag}={value}", **{f"kv_quant_{option}": str(value)})
            assert message.startswith(f"error: {flag} {value or repr('')}: {problem}") and hint in message


def test_calibration_text(model, tmp_path):
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    message = refusal(model(), "--kv-quant-calibration-text", str(empty), kv_quant_calibration_text=str(empty))
    assert "blank" in message


def test_cache_dir(model, tmp_path):
    message = refusal(model(), "--kv-quant-cache-dir", "", kv_quant_cache_dir="")
    assert message.startswith("error: --kv-quant-cache-dir '': empty; name a folder")
    file = tmp_path / "file"
    file.touch()
    message = refusal(model(), "--kv-quant-cache-dir", str(file), kv_quant_cache_dir=str(file))
    assert f"--kv-quant-cache-dir {file}: not a folder" in message


def test_calibration_tokens(model, tmp_path):
    for value in ("100", "many", "0"):
        message = refusal(model(), "--kv-quant-calibration-tokens", value, kv_quant_calibration_tokens=value)
        assert f"--kv-quant-calibration-tokens {value}" in message and "2048" in message
    # More than any tokenizer makes of the text: told without one, and without reading the weights.
    value = "100000000"
    message = refusal(model(), "--kv-quant-calibration-tokens", value, kv_quant_calibration_tokens=value)
    assert f"--kv-quant-calibration-tokens {value}: the built-in text has" in message
    text = tmp_path / "text.txt"
    text.write_text("words " * 100)
    given = ["--kv-quant-calibration-tokens", "4096", "--kv-quant-calibration-text", str(text)]
    message = refusal(model(), *given, kv_quant_calibration_tokens=4096, kv_quant_calibration_text=str(text))
    assert f"--kv-quant-calibration-tokens 4096: {text} has 600 bytes" in message


def test_more_tokens_than_a_tokenizer_makes_of_the_built_in_text(model):
    """Fewer than the text has bytes, so only the model's tokenizer tells."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(model())
    message = refusal(model(), "--kv-quant-calibration-tokens", "400000", kv_quant_calibration_tokens=400000)
    assert "--kv-quant-calibration-tokens 400000: the calibration text has only" in message


def test_allocator_and_chunk_attention(model):
    message = refusal(model(), "--kv-quant-allocator", "best", kv_quant_allocator="best")
    assert "--kv-quant-allocator best" in message and "template" in message
    message = refusal(model(), "--kv-quant-granularity", "head", kv_quant_granularity="head")
    assert "--kv-quant-granularity head" in message and "block, segment" in message
    for value in ("slot", "segment", "block"):
        message = refusal(model(), "--kv-quant-granularity", value, kv_quant_granularity=value)
        assert f"--kv-quant-granularity {value}: has no effect on --kv-quant-allocator template" in message
        assert "--kv-quant-allocator paper or product" in message
    message = refusal(model(), "--kv-quant-preset", "fast", kv_quant_preset="fast")
    assert "--kv-quant-preset fast" in message and "auto, quality, balanced, compact" in message
    message = refusal(model(), "--kv-quant-chunk-attention", "exact", kv_quant_chunk_attention="exact")
    assert "raw, quantized" in message
    message = refusal(model(), "--kv-quant-decode-kernel", "fast", kv_quant_decode_kernel="fast")
    assert "auto, triton, cuda" in message
    message = refusal(model(), "--kv-quant-decode-kernel", "cuda", kv_quant_decode_kernel="cuda")
    assert "--kv-quant-decode-kernel cuda: not on --device cpu: it is a kernel for Hopper" in message


@pytest.mark.parametrize(
    "head_dim, bits, says",
    [
        (
            64,
            "2.3",
            "--kv-quant-k-bits 2.3 gives the 4 segments of head_dim 64 9 bits, which fill no 16-bit words; 2 and",
        ),
        (80, "3", "2.8 and 3.2 work, or --kv-quant-granularity block takes any"),
    ],
)
def test_segments_that_do_not_fit(model, head_dim, bits, says):
    """Found out from the config alone."""
    for granularity in ({}, {"granularity": "slot"}):
        given = {"allocator": "product", "k-bits": bits, **granularity}
        flags = [part for name, value in given.items() for part in (f"--kv-quant-{name}", value)]
        engine = {f"kv_quant_{name.replace('-', '_')}": value for name, value in given.items()}
        message = refusal(model(head_dim=head_dim), *flags, **engine)
        assert message.startswith("error: --kv-quant-granularity segment: ") and says in message


def test_options_are_not_abbreviated(model, tmp_path):
    """SGLang's parser takes any beginning of a flag; --kv-quant-k must not pass for --kv-quant-k-bits."""
    from sglang.srt.server_args import prepare_server_args

    start = ["--model-path", model(), "--kv-quant", "blockgtq"]
    config = tmp_path / "server.yaml"
    config.write_text("kv-quant-k: 2\n")
    for given in (["--kv-quant-k", "2"], ["--kv-quant-k=2"], ["--config", str(config)]):
        with pytest.raises(SystemExit) as exit:
            prepare_server_args([*start, *given])
        assert exit.value.code == "error: --kv-quant-k: these options are not abbreviated; write --kv-quant-k-bits"
    with pytest.raises(SystemExit) as exit:
        prepare_server_args([*start, "--kv-quant-c=raw"])
    assert "--kv-quant-calibration-text or" in exit.value.code and "--kv-quant-chunk-attention" in exit.value.code
    # SGLang's own flags keep theirs, and so does a value that looks like one of ours.
    args = prepare_server_args(["--model-pat", model(), "--served-model-name=--kv-quant-k", "--dev", "cpu"])
    assert args.device == "cpu" and args.served_model_name == "--kv-quant-k"


def test_options_without_kv_quant(model):
    from sglang.srt.server_args import prepare_server_args

    with pytest.raises(SystemExit) as exit:
        prepare_server_args(["--model-path", model(), "--kv-quant-k-bits", "2"])
    assert "--kv-quant-k-bits 2" in str(exit.value.code) and "--kv-quant blockgtq" in str(exit.value.code)
    with pytest.raises(SystemExit) as exit:
        prepare_server_args(["--model-path", model(), "--kv-quant", "gguf"])
    assert "--kv-quant gguf" in str(exit.value.code)


class TestTables:
    @pytest.fixture
    def table(self, tmp_path):
        """A sound table for another model (its config hash fits nothing)."""
        import torch

        from sglang_blockgtq.calibrate.build import build_table
        from sglang_blockgtq.calibrate.moments import Moments
        from sglang_blockgtq.calibrate.rope import RopeBlocks

        moments = Moments(torch.rand(2, 2, 32).double(), torch.rand(2, 2, 32).double(), torch.ones(2, 2).double(), 2048)
        made = build_table(
            moments, [RopeBlocks(64, 64)] * 2, k_bits=3, v_bits=3, config_hash="other", model_id="other/m"
        )
        path = tmp_path / "table.safetensors"
        made.save(path)
        return path

    def message(self, model, path, *flags, **engine):
        return refusal(model(), "--kv-quant-table", str(path), *flags, kv_quant_table=str(path), **engine)

    def test_another_model(self, model, table):
        message = self.message(model, table)
        assert "another model (other/m)" in message and str(table) in message

    @pytest.mark.parametrize("keep", [0, 4, 100, -1])
    def test_truncated(self, model, table, keep):
        table.write_bytes(table.read_bytes()[:keep])
        assert re.search("damaged|not a safetensors", self.message(model, table))

    def test_changed(self, model, table):
        data = bytearray(table.read_bytes())
        data[-5] ^= 1
        table.write_bytes(bytes(data))
        assert "hash" in self.message(model, table)

    def test_newer_version(self, model, table):
        from dataclasses import replace

        from sglang_blockgtq.calibrate.table import FORMAT_VERSION, AllocationTable

        loaded = AllocationTable.load(table)
        AllocationTable(replace(loaded.header, format_version=99), loaded.tensors).sealed().save(table)
        message = self.message(model, table)
        assert "version 99" in message and f"version {FORMAT_VERSION}" in message

    def test_calibration_options_beside_a_table(self, model, table):
        message = self.message(
            model, table, "--kv-quant-calibration-tokens", "4096", kv_quant_calibration_tokens="4096"
        )
        assert "already calibrated" in message

    def test_bits_to_choose_beside_a_table(self, model, table):
        message = self.message(model, table, "--kv-quant-preset", "auto", kv_quant_preset="auto")
        assert "--kv-quant-preset auto: a table has its own bits; leave it or --kv-quant-table out" in message
        message = self.message(model, table, "--kv-quant-bits-range", "2-4", kv_quant_bits_range="2-4")
        assert "--kv-quant-bits-range 2-4: has no effect without --kv-quant-preset auto" in message

    def test_an_older_version(self, model, table):
        """Of keys without means: the reason, not a wrong cache."""
        from dataclasses import replace

        from sglang_blockgtq.calibrate.table import AllocationTable

        loaded = AllocationTable.load(table)
        AllocationTable(replace(loaded.header, format_version=3), loaded.tensors).sealed().save(table)
        message = self.message(model, table)
        assert "format version 3 holds other tensors than version 4" in message and "make it again" in message

    def for_this_model(self, model, table, override="{}"):
        """The table under the hash of the model, as ``--json-model-override-args`` changes it; the server's config."""
        from dataclasses import replace

        from sglang.srt.configs.model_config import ModelConfig

        from sglang_blockgtq.calibrate.model import config_hash
        from sglang_blockgtq.calibrate.table import AllocationTable

        config, loaded = ModelConfig(model(), model_override_args=override).hf_config, AllocationTable.load(table)
        AllocationTable(replace(loaded.header, config_hash=config_hash(config)), loaded.tensors).sealed().save(table)
        return config

    @pytest.mark.parametrize(
        "scaling", [{"rope_type": "default", "rope_theta": 5e5}, {"rope_type": "linear", "factor": 2}]
    )
    def test_another_theta_or_scaling(self, model, table, scaling):
        """Means are turned by the frequencies of the model that the table was made for: a scheduler refuses others."""
        from sglang_blockgtq.obtain import load_named_table
        from sglang_blockgtq.options import KVQuantError, KVQuantOptions

        options = KVQuantOptions(**dict.fromkeys(("k_bits", "v_bits", "allocator", "granularity")), table=str(table))
        override = json.dumps({"rope_parameters": {"rope_theta": 10000.0, **scaling}})
        scaled = self.for_this_model(model, table, override)
        assert load_named_table(options, scaled).header.layers == 2
        plain = self.for_this_model(model, table)
        assert load_named_table(options, plain).header.layers == 2
        with pytest.raises(KVQuantError, match="made for another model"):
            load_named_table(options, scaled)

    def test_another_theta_is_found_out_before_a_process_starts(self, model, table):
        override = json.dumps({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}})
        self.for_this_model(model, table)
        given = {"json_model_override_args": override}
        message = self.message(model, table, "--json-model-override-args", override, **given)
        assert f"--kv-quant-table {table}: made for another model (other/m)" in message
        # And one that was made for what is served is not refused for what is not: the next complaint is another.
        self.for_this_model(model, table, override)
        flags = "--json-model-override-args", override, "--kv-quant-k-bits", "2"
        assert "--kv-quant-k-bits 2.0: the table" in self.message(model, table, *flags, **given, kv_quant_k_bits="2")

    def test_other_bits(self, model, table):
        self.for_this_model(model, table)
        message = self.message(model, table, "--kv-quant-k-bits", "2", kv_quant_k_bits="2")
        assert "--kv-quant-k-bits 2" in message and "3.0" in message


def test_exit_code_of_the_real_commands(model):
    """The whole way through the real entry points, at once."""
    serve = [str(Path(sys.executable).with_name("sglang")), "serve"]
    flags = ["--model-path", model(), "--kv-quant", "blockgtq", "--enable-lmcache"]
    runs = [
        subprocess.Popen([*command, *flags], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, cwd=model())
        for command in ([sys.executable, "-m", "sglang.launch_server"], serve)
    ]
    for run in runs:
        said = run.communicate(timeout=300)[1]
        assert run.returncode != 0
        assert said.strip().splitlines()[-1].startswith("error: --enable-lmcache: not with --kv-quant")


def test_model_without_rope_gets_uniform_bits_and_a_notice(caplog):
    from sglang_blockgtq.calibrate.rope import RopeBlocks
    from sglang_blockgtq.obtain import effective_rule
    from sglang_blockgtq.options import KVQuantOptions

    segments = KVQuantOptions(allocator="product", granularity="segment")
    none = {"allocator": "uniform", "granularity": "segment"}
    assert effective_rule([RopeBlocks(64, 0)], segments) == none and caplog.text
    assert effective_rule([RopeBlocks(64, 64)], segments) == {"allocator": "product", "granularity": "segment"}
    caplog.clear()
    options = KVQuantOptions(allocator="template")
    assert effective_rule([RopeBlocks(64, 0), RopeBlocks(64, 0)], options) == none
    assert "no layer of this model has RoPE" in caplog.text
    caplog.clear()
    assert effective_rule([RopeBlocks(64, 64), RopeBlocks(64, 0)], options)["allocator"] == "template"
    assert not caplog.text
