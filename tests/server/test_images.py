"""A model with images and M-RoPE (Qwen2.5-VL) in a real server: an image's tokens have three positions, the text after
it others than its indices.

SGLang's vision tower computes the image, transformers says what the answers are. Weights are random.
"""

from __future__ import annotations

import base64
import io
import re
from statistics import fmean

import pytest
import requests
import torch
from PIL import Image

pytestmark = pytest.mark.server

SIZE = 224, 168  # pixels: 8 times 6 tokens
BEFORE, AFTER, NEW = 60, 70, 6  # tokens of text around an image, and tokens that are generated
#: Mean |difference of log-probability| to transformers, nats: of a cold prompt, whose attention is exact, and over rows
#: of eight bits. Measured: 1e-6 and 0.013; with the index as position 1, with another image 0.28.
EXACT, LIMIT = 1e-4, 0.03


@pytest.fixture(scope="module")
def qwen(smollm2, tmp_path_factory) -> str:
    """Heads of 128 channels, keys with a bias."""
    from transformers import (
        AutoTokenizer,
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLProcessor,
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
    )

    folder = str(tmp_path_factory.mktemp("model") / "qwen")
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    names = "vision_start", "vision_end", "image_pad", "video_pad"
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<|{name}|>" for name in names]})
    tokens = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in names}
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 512,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    vision = {
        "depth": 2,
        "hidden_size": 160,
        "num_heads": 2,
        "intermediate_size": 128,
        "out_hidden_size": 512,
        "fullatt_block_indexes": [1],
    }
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        vision_start_token_id=tokens["vision_start"],
        vision_end_token_id=tokens["vision_end"],
        image_token_id=tokens["image_pad"],
        video_token_id=tokens["video_pad"],
    )
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(config)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 or name.endswith("k_proj.bias"):
            parameter.data.normal_(0, 0.5 if name.endswith("bias") else 0.06)
    model.save_pretrained(folder)
    parts = Qwen2VLImageProcessor(), tokenizer, Qwen2VLVideoProcessor()
    Qwen2_5_VLProcessor(*parts, chat_template="{{ messages }}").save_pretrained(folder)
    return folder


class Reference:
    """What transformers says. A prompt is text with one image in it."""

    def __init__(self, folder: str):
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self.processor = AutoProcessor.from_pretrained(folder)
        self.model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()

    def logprobs(
        self, prompt: str, image: Image.Image, more: list[int] | None = None, by_index: bool = False
    ) -> tuple[list[int], list[float]]:
        """Token ids, and log-probabilities of all but the first. more: tokens behind the prompt. by_index: with one
        position a token, its index."""
        inputs = self.processor(text=[prompt], images=[image], return_tensors="pt")
        more = torch.tensor([more or []], dtype=torch.int64)
        zeros, ones = torch.zeros_like(more), torch.ones_like(more)
        for name, end in (("input_ids", more), ("attention_mask", ones), ("mm_token_type_ids", zeros)):
            inputs[name] = torch.cat([inputs[name], end], 1)
        (ids,) = inputs["input_ids"]
        if by_index:
            inputs["position_ids"] = torch.arange(len(ids)).expand(3, 1, -1)
        with torch.inference_mode():
            logprobs = self.model(**inputs).logits[0, :-1].log_softmax(-1)
        return ids.tolist(), logprobs.gather(1, ids[1:, None])[:, 0].tolist()


def picture(seed: int) -> Image.Image:
    """Colours in blocks of 28 pixels, one for each token."""
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(256, (SIZE[1] // 28, SIZE[0] // 28, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(blocks.numpy()).resize(SIZE, Image.Resampling.NEAREST)


def ask(server, prompt: str, image: Image.Image, start: int, new: int = 1) -> tuple[list[float], dict]:
    """Log-probabilities of the prompt's tokens after ``start``, and what else the server tells."""
    png = io.BytesIO()
    image.save(png, "PNG")
    body = {
        "text": prompt,
        "image_data": [base64.b64encode(png.getvalue()).decode()],
        "sampling_params": {"max_new_tokens": new, "temperature": 0, "ignore_eos": True},
        "return_logprob": True,
        "logprob_start_len": start,
    }
    response = requests.post(f"{server.url}/generate", json=body, timeout=600)
    response.raise_for_status()
    meta = response.json()["meta_info"]
    return [lp for lp, *_ in meta["input_token_logprobs"] if lp is not None], meta


def gap(a: list[float], b: list[float]) -> float:
    return fmean(abs(x - y) for x, y in zip(a, b, strict=True))


def test_text_after_an_image(launch, qwen, token_ids):
    server = launch(
        "--dtype=float32",
        "--max-total-tokens=1000",
        "--skip-server-warmup",
        "--kv-quant-k-bits=8",
        "--kv-quant-v-bits=8",
        model=qwen,
    )
    assert server.info()["kv_quant"]["page"] == 0
    log = server.log.read_text(errors="replace")
    assert "(template without page means)" in log
    assert re.search(r"keys of layers \[0, 1\] do not rotate by one angle a position \(M-RoPE\)", log)

    reference, image, other = Reference(qwen), picture(1), picture(2)
    text = [reference.processor.tokenizer.decode(x) for x in (token_ids[:BEFORE], token_ids[BEFORE : BEFORE + AFTER])]
    prompt = "<|vision_start|><|image_pad|><|vision_end|>".join(text)
    ids, want = reference.logprobs(prompt, image)
    pad = reference.model.config.image_token_id
    first, after = ids.index(pad), len(ids) - ids[::-1].index(pad)
    assert after - first == 48 and len(ids) > after + AFTER - 10
    start = after + 4  # of what is compared: a few tokens that follow the image stay cached
    want = want[start:]
    assert gap(want, reference.logprobs(prompt, image, by_index=True)[1][start:]) > 20 * LIMIT
    other_want = reference.logprobs(prompt, other)[1][start:]
    assert gap(want, other_want) > 5 * LIMIT

    cold, meta = ask(server, prompt, image, start, NEW)
    assert meta["cached_tokens"] == 0 and meta["prompt_tokens"] == len(ids) and gap(cold, want) < EXACT
    steps, answer = zip(*((lp, token) for lp, token, *_ in meta["output_token_logprobs"]), strict=True)
    assert len(answer) == NEW
    assert gap(steps, reference.logprobs(prompt, image, list(answer))[1][len(ids) - 1 :]) < LIMIT

    again, meta = ask(server, prompt, image, start)
    assert meta["cached_tokens"] == start and gap(again, want) < LIMIT  # what comes before the first that is asked for
    found, meta = ask(server, prompt, other, start)
    assert meta["cached_tokens"] == first and gap(found, other_want) < LIMIT
    server.stop()
