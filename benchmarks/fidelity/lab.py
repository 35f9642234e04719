"""What the rows of an ablation are measured with: texts, true answers, calibrations; and how one row is measured."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import torch
from transformers import AutoTokenizer

from sglang_blockgtq.calibrate.allocate import ALLOCATORS, Allocator
from sglang_blockgtq.calibrate.build import PAGE, ROTATION_SEED, build_table
from sglang_blockgtq.calibrate.hf import collect
from sglang_blockgtq.calibrate.moments import Moments
from sglang_blockgtq.calibrate.table import AllocationTable
from sglang_blockgtq.calibrate.text import read_text

from . import attention, klt, perplexity, run
from .coder import Cache, Coder, Frame, Side
from .methods import Method
from .model import capture, rotate
from .texts import OTHER_SOURCE, REPORT_LENGTH, evaluation_set, source_path

T = TypeVar("T")
BUCKETS = {"0_2k": (0, 2048), "2_4k": (2048, 4096), "4k_on": (4096, 1 << 30)}  # query positions


@dataclass
class Sample:
    """True attention of one layer: keys, queries at ``positions``, log-probabilities; and both rotated on by SHIFT."""

    q: torch.Tensor  # [N, Hq, D]
    k: torch.Tensor  # [T, H, D]
    log_prob: torch.Tensor  # [H, G, N, T]
    shifted_q: torch.Tensor
    shifted_k: torch.Tensor


def _kl(log_prob: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """``KL(true || approximate)`` per query position ``[N]``, mean over heads."""
    ratio = (log_prob - logits.log_softmax(-1)).nan_to_num_(nan=0.0)  # -inf - -inf, keys ahead
    return (log_prob.exp() * ratio).sum(-1).mean((0, 1))


class Lab:
    """A subject and everything about it that several rows want; each is made when first asked for.

    queries: of each bucket. every: attention of each n-th layer. limit: tokens of a scored sequence, and four times as
    many of the text whose attention is measured; None for all.
    """

    def __init__(
        self,
        subject: run.Subject,
        model_path: str,
        text: Path | None = None,
        calibration_text: str | None = None,
        queries: int = 16,
        every: int = 1,
        limit: int | None = None,
    ):
        self.subject, self.model, self.device = subject, subject.model, subject.device
        self.tokenizer = AutoTokenizer.from_pretrained(model_path)
        self.calibration_text = calibration_text
        self.texts = evaluation_set(self.tokenizer, text or run.default_text(), subject.ids, limit)
        self.attended = subject.ids[: 4 * limit if limit else None]
        self.layers = range(0, len(subject.rope), every)
        self.queries = queries
        self.scale = subject.head_dim**-0.5
        self._hidden: dict[tuple[int, ...], torch.Tensor] = {}
        self._texts: dict[tuple[str, int], list[list[int]]] = {}
        self._moments: dict[tuple[str, int], Moments] = {}
        self._keys: dict[tuple[str, float, int], Side] = {}
        self._once: dict[str, object] = {}
        self._seconds: dict[tuple[str, int], klt.Seconds] = {}

    def record(self) -> dict:
        """What is measured on, for the file beside a CSV."""
        texts = [text.record() for text in self.texts]
        return {
            "texts": texts,
            "scored": sum(text["scored"] for text in texts),
            "attention_tokens": len(self.attended),
            "attention_layers": list(self.layers),
            "queries": {name: len(drawn) for name, drawn in self.positions.items()},
            "report_sequence": REPORT_LENGTH,
            "shift": run.SHIFT,
            "seed": run.SEED,
        }

    # -- measuring ------------------------------------------------------------------------------------------------

    @cached_property
    def positions(self) -> dict[str, list[int]]:
        """Query positions of each bucket that the text reaches into."""
        out = {}
        for name, (start, stop) in BUCKETS.items():
            choices = range(max(start, attention.FIRST_QUERY), min(stop, len(self.attended)))
            if len(choices) >= self.queries:
                out[name] = sorted(random.Random(f"{run.SEED}/{start}").sample(choices, self.queries))
        return out

    @cached_property
    def samples(self) -> dict[int, Sample]:
        drawn = [p for bucket in self.positions.values() for p in bucket]
        got = capture(self.model, self.attended, drawn)
        out = {}
        for layer in self.layers:
            q, k = got.q[layer], got.k[layer]
            log_prob = attention.causal_logits(q, k, got.positions, self.scale).log_softmax(-1)
            shifted = (rotate(x, self.subject.rope[layer], self.inv_freq, run.SHIFT) for x in (q, k))
            out[layer] = Sample(q, k, log_prob, *shifted)
        return out

    @torch.inference_mode()
    def attention_kl(self, cache: Cache) -> dict[str, float]:
        """Mean KL of attention with coded keys, by bucket and over all, and over all after the shift."""
        if cache.keys.exact:
            return dict.fromkeys([*self.positions, "all", "shift"], 0.0)
        positions = torch.tensor([p for b in self.positions.values() for p in b], device=self.device)
        plain, shifted = [], []
        for layer, s in self.samples.items():
            for q, k, first, sums in ((s.q, s.k, 0, plain), (s.shifted_q, s.shifted_k, run.SHIFT, shifted)):
                read = cache.read_keys(layer, k, first)
                sums.append(_kl(s.log_prob, attention.causal_logits(q, read, positions, self.scale)))
        by_bucket = torch.stack(plain).mean(0).view(len(self.positions), -1).mean(-1).tolist()
        out = dict(zip(self.positions, by_bucket, strict=True))
        return out | {"all": float(torch.stack(plain).mean()), "shift": float(torch.stack(shifted).mean())}

    def answers(self, method: Method | None, sequences: Sequence[Sequence[int]]) -> perplexity.Score:
        """Perplexity and KL of the answer over some sequences; None is the model's own cache."""
        score = perplexity.Score()
        for ids in map(tuple, sequences):
            if ids not in self._hidden:
                self._hidden[ids] = perplexity.hidden_states(self.model, list(ids), None)
            true = self._hidden[ids]
            hidden = true if method is None else perplexity.hidden_states(self.model, list(ids), method)
            perplexity.add_score(score, self.model, list(ids), hidden, true)
        return score

    def text_scores(self, method: Method | None) -> dict[str, perplexity.Score]:
        """By the name of the text."""
        return {text.name: self.answers(method, text.sequences) for text in self.texts}

    # -- calibrating ----------------------------------------------------------------------------------------------

    def once(self, name: str, make: Callable[[], T]) -> T:
        """What ``make`` gives, made when it is first asked for under this name."""
        if name not in self._once:
            self._once[name] = make()
        return self._once[name]

    @property
    def inv_freq(self) -> torch.Tensor:
        return run.inv_freq(self.model)

    def calibration(self, text: str = "default", tokens: int = 2048) -> list[list[int]]:
        """Sequences of at most 2,048 tokens. text: ``default`` or ``source``."""
        if text == "default" and tokens == self.subject.moments.tokens:
            return self.subject.calibration_ids
        if (text, tokens) not in self._texts:
            whole = read_text(self.calibration_text) if text == "default" else source_path(OTHER_SOURCE).read_text()
            ids = self.tokenizer.encode(whole[: 16 * tokens], add_special_tokens=False)[:tokens]
            if len(ids) < tokens:
                raise ValueError(f"calibration text {text}: {len(ids)} tokens, {tokens} are needed")
            self._texts[text, tokens] = [ids[i : i + 2048] for i in range(0, tokens, 2048)]
        return self._texts[text, tokens]

    def moments(self, text: str = "default", tokens: int = 2048) -> Moments:
        if (text, tokens) == ("default", self.subject.moments.tokens):
            return self.subject.moments
        if (text, tokens) not in self._moments:
            sequences = self.calibration(text, tokens)
            self._moments[text, tokens] = collect(self.model, sequences, self.subject.rope, progress=False)
        return self._moments[text, tokens]

    def seconds(self, text: str = "default", tokens: int = 2048) -> klt.Seconds:
        if (text, tokens) not in self._seconds:
            sequences = self.calibration(text, tokens)
            self._seconds[text, tokens] = klt.seconds(self.model, self.subject.rope, self.inv_freq, sequences)
        return self._seconds[text, tokens]

    @cached_property
    def sensitivity(self) -> klt.Sensitivity:
        return klt.sensitivity(self.model, self.subject.rope, self.inv_freq, self.calibration())

    @cached_property
    def output_metric(self) -> torch.Tensor:
        layers, heads = self.subject.moments.k.shape[:2]
        return klt.output_metric(self.model, layers, heads, self.seconds().v.shape[-1])

    # -- sides ----------------------------------------------------------------------------------------------------

    def frame(self, page: int) -> Frame:
        return Frame(page, self.subject.rope, self.inv_freq)

    def table(
        self,
        name: str,
        k_bits: float,
        v_bits: float,
        seed: int = 0,
        moments: Moments | None = None,
        rule: Allocator | None = None,
        page: int = PAGE,
    ) -> AllocationTable:
        """rule: in place of the allocator's own. page: positions of a page of keys' means."""
        options = {"k_bits": k_bits, "v_bits": v_bits, "seed": ROTATION_SEED + seed, "rule": rule, "page": page}
        return build_table(moments or self.subject.moments, self.subject.rope, **options, **run.rule_named(name))

    def ruled_keys(self, name: str, bits: float, seed: int, gains: bool = True, page: int = PAGE, **change) -> Side:
        """Keys of an allocator, of which something is changed (see calibrate.allocate.Allocator), or without gains."""
        table = self.table(name, bits, 2, seed, rule=replace(ALLOCATORS[name], **change), page=page)
        return self.of_table(table if gains else without_gains(table))[0]

    def of_table(self, table: AllocationTable) -> tuple[Side, Side]:
        """Keys and values as a table has them."""
        codecs = [table.layer_codec(i) for i in range(table.header.layers)]
        keys = [Coder.of_keys(codec).to(self.device) for codec in codecs]
        values = [Coder.of_values(codec).to(self.device) for codec in codecs]
        head = table.header
        return Side(head.k_bits, keys, head.head_dim), Side(head.v_bits, values, head.v_head_dim)

    def keys(self, name: str, bits: float, seed: int = 0, moments: Moments | None = None) -> Side:
        """moments: in place of the subject's."""
        if moments is not None:
            return self.of_table(self.table(name, bits, 2, seed, moments))[0]
        if (name, bits, seed) not in self._keys:
            self._keys[name, bits, seed] = self.of_table(self.table(name, bits, 2, seed))[0]
        return self._keys[name, bits, seed]

    def values(self, bits: float, seed: int = 0, name: str = "template") -> Side:
        """As they ship: a rotation, one width."""
        return self.of_table(self.table(name, 2, bits, seed))[1]

    def exact(self) -> Side:
        return Side(16, [None] * len(self.subject.rope), self.subject.head_dim)

    def key_transform(
        self, page: int | None, centred: bool, metric: str, calibration: tuple[str, int], weighted: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Balanced KLT of keys. page: as in Frame; None for keys after RoPE, averaged over far positions.

        metric: ``logit`` (moment of queries over relative offsets) or ``answer`` (Fisher information, before RoPE).
        """
        if metric == "answer" and page != 1:
            raise ValueError(f"page = {page}: the metric of the answer is known before RoPE only")
        got = self.seconds(*calibration)
        s_k = self.sensitivity.k_moment if weighted else got.k
        if centred:
            s_k = s_k - got.k_mean[..., :, None] * got.k_mean[..., None, :]
        s_q = self.sensitivity.k if metric == "answer" else got.q
        # Where a query meets the key: its offset, or with pages its distance from the page's first token.
        far = 4 * klt.OFFSETS if page is None else klt.OFFSETS
        within = far if page is None else max(page, 1)
        k, q = [], []
        for layer, rope in enumerate(self.subject.rope):
            k.append(klt.rotated_mean(s_k[layer], rope, self.inv_freq, within))
            # A gradient before RoPE is already averaged over the offsets that attention had.
            q.append(s_q[layer] if metric == "answer" else klt.rotated_mean(s_q[layer], rope, self.inv_freq, far))
        return klt.balanced(torch.stack(k), torch.stack(q))

    def klt_keys(
        self,
        bits: float,
        page: int | None = 1,
        *,
        seed: int = 0,
        centred: bool = False,
        metric: str = "logit",
        calibration: tuple[str, int] = ("default", 2048),
        allocator: str = "template",
        weighted: bool = False,
        unbiased: bool = False,
    ) -> Side:
        """Keys behind a balanced KLT in a frame, whole segments of 16 channels, one norm. Options: as of klt_values."""
        which = page, centred, metric, calibration, weighted
        transform = self.once(f"keys {which}", lambda: self.key_transform(*which))
        coders = klt.coders(transform, klt.segment_widths(transform[2], bits, allocator), self.device, seed, unbiased)
        mean = self.seconds(*calibration).k_mean.float().to(self.device) if centred else None
        return Side(bits, coders, self.subject.head_dim, self.frame(page or 0), mean)

    def klt_values(
        self,
        bits: float,
        *,
        seed: int = 0,
        centred: bool = False,
        metric: str = "output",
        weighted: bool = False,
        flat: bool = False,
        unbiased: bool = False,
    ) -> Side:
        """Values behind a balanced KLT.

        metric: ``plain``, ``output`` (W_o) or ``answer`` (Fisher information). weighted: moments of values by what an
        error costs there. flat: one width, all channels rotated together. unbiased: see klt.coders.
        """
        transform = self.value_transform(centred, metric, weighted)
        sigma = transform[2]
        widths = torch.full_like(sigma, bits).long() if flat else klt.segment_widths(sigma, bits)
        coders = klt.coders(transform, widths, self.device, seed, unbiased)
        mean = self.seconds().v_mean.float().to(self.device) if centred else None
        return Side(bits, coders, sigma.shape[-1], None, mean)

    def value_transform(
        self, centred: bool = False, metric: str = "output", weighted: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Balanced KLT of values. Options: as of klt_values."""
        got = self.seconds()
        s_v = self.sensitivity.v_moment if weighted else got.v
        if centred:
            s_v = s_v - got.v_mean[..., :, None] * got.v_mean[..., None, :]
        eye = torch.eye(s_v.shape[-1], dtype=s_v.dtype).expand_as(s_v)
        weight = {"plain": lambda: eye, "output": lambda: self.output_metric, "answer": lambda: self.sensitivity.v}
        return self.once(f"values {centred, metric, weighted}", lambda: klt.balanced(s_v, weight[metric]()))


def without_gains(table: AllocationTable) -> AllocationTable:
    """The same table with one static gain for all channels of a head in place of one for each width."""
    gain, weight = table.tensors["k_gain"], table.tensors["k_weight"]
    flat = gain.square().mean(-1, keepdim=True).sqrt().expand_as(gain)
    weight = weight / gain.square()
    weight = weight / weight.mean(-1, keepdim=True)
    return replace(table, tensors={**table.tensors, "k_gain": flat.contiguous(), "k_weight": weight}).sealed()


def by_token(side: Side) -> Side:
    """The same, with the mean taken off only where that is better."""
    return replace(side, by_token=True)


def without_mean(moments: Moments, taken: bool = False) -> Moments:
    """Of a table without page means. taken: energies less the mean before RoPE, which is taken off elsewhere."""
    k = moments.k - moments.mean.square().sum(-1) if taken else moments.k
    return replace(moments, k=k, mean=None)


def centred_values(lab: Lab, side: Side) -> Side:
    """The same codec on values less their static mean."""
    return replace(side, mean=lab.seconds().v_mean.float().to(lab.device))


def with_rule(side: Side, rule: str, search: Sequence[float] | None = None) -> Side:
    """The same codec under another scale rule."""
    change = {"scale_rule": rule} | ({} if search is None else {"scale_search": tuple(search)})
    return replace(side, coders=[replace(c, **change) for c in side.coders])


def in_frame(lab: Lab, side: Side, page: int, centred: bool = False) -> Side:
    """The same codec in another frame, the mean taken off if asked."""
    mean = lab.seconds().k_mean.float().to(lab.device) if centred else None
    return replace(side, frame=lab.frame(page), mean=mean)
