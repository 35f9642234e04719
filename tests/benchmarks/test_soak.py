"""The soak: what it asks, what it makes of a server's answers, and that it fails where something is wrong."""

from __future__ import annotations

import json
import random
import re
import time
import zlib
from collections import Counter
from types import SimpleNamespace

import pytest
from stand_in import JsonServer

from benchmarks.soak import __main__ as program
from benchmarks.soak.client import Client, WrongAnswer, follows, named
from benchmarks.soak.plan import Plan, PlanError
from benchmarks.soak.replay import Bound, Replay
from benchmarks.soak.session import GRAMMARS, Answer, Reading, Session, Turn

PLAN = Plan.of(context=768, turns=30, parallel=4, sessions=8)
TEXTS = {"regex": "Yes, since it is late now.", "json_schema": '{"tool": "read", "line": 3}'}
NOISE = 0.01
LAST = 255  # id of the vocabulary


class Fake(JsonServer):
    """A token's log-probability depends on all tokens before it. fault: what is wrong with the server."""

    def __init__(self, fault: str = ""):
        super().__init__()
        self.fault, self.log, self.random, self.answers = fault, "", random.Random(0), 0
        self.http.handle_error = lambda *_: None  # clients give up
        self.process, self.start_s = SimpleNamespace(poll=lambda: 9 if fault == "dead" else None), 1.0

    def reply(self, path, body):
        if path.startswith("/flush_cache"):
            self.log += "x] blockgtq: 30 rows of each layer compared: all are as written\n"
            self.log += f"x] blockgtq_soak: {99 if self.fault == 'slots' else 100} of 100 slots are free\n"
            return {}
        if path != "/generate":
            return {}
        time.sleep(0.002 + 0.1 * (self.random.random() < 0.02))
        sampling = body["sampling_params"]
        found = [self._answer(body, sampling) for _ in range(sampling.get("n", 1))]
        return found if len(found) > 1 else found[0]

    def _answer(self, body, sampling):
        ids, self.answers = body["input_ids"], self.answers + 1
        new = sampling["max_new_tokens"] - (self.fault == "short")
        tokens, grammar = [self.random.randrange(50) for _ in range(new)], next((g for g in TEXTS if g in sampling), "")
        lps = self._logprobs(ids + tokens)
        made = [lp + self.random.uniform(-NOISE, NOISE) for lp in lps[len(ids) :]]
        if self.fault == "row" and self.answers % 10 == 0:
            made[-1] -= 2
        reason = "abort" if "rid" in body and self.random.random() < 0.7 else "stop" if grammar else "length"
        read = list(zip(lps, named(ids, LAST), strict=False)) if "logprob_start_len" in body else []
        meta = {"output_token_logprobs": list(zip(made, tokens, strict=True)), "finish_reason": {"type": reason}}
        meta |= {"input_token_logprobs": read, "cached_tokens": 7 * (not read or self.fault == "cached")}
        text = TEXTS.get(grammar, "") + "!" * (self.fault == "grammar")
        return {"text": text, "meta_info": meta | {"num_retractions": int(self.random.random() < 0.1)}}

    @staticmethod
    def _logprobs(ids):
        out, hash_ = [None], zlib.crc32(bytes(ids[:1]))
        for token in ids[1:]:
            hash_ = zlib.crc32(bytes([token]), hash_)
            out.append(-NOISE - hash_ % 1000 / 500)
        return out

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()

    def wait(self):
        return self

    def output(self):
        return self.log + ("pool memory leak detected! x\n" if self.fault == "leak" else "")

    def info(self):
        return {"kv_quant": {"k_bits": 8, "v_bits": 8, "allocator": "template", "bytes_per_token": 1}}


@pytest.fixture
def soak(monkeypatch, tmp_path, capsys):
    """A run of some seconds against a stand-in: exit code, record, what it printed."""
    import transformers

    tokenizer = SimpleNamespace(from_pretrained=lambda *_: lambda text: {"input_ids": [*text.encode()[:20_000]]})
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=LAST + 1))
    monkeypatch.setattr(transformers, "AutoTokenizer", tokenizer)
    monkeypatch.setattr(transformers, "AutoConfig", SimpleNamespace(from_pretrained=lambda *_: config))
    monkeypatch.setattr(program, "missing_plugin", lambda args: None)
    monkeypatch.setattr(program, "exit_on_sigterm", lambda: None)

    def soak(fault="", seconds=1.5):
        monkeypatch.setattr(program, "Server", lambda *args, **kwargs: Fake(fault))
        out = tmp_path / "out" / "soak.json"
        sizes = ["--sessions=8", "--parallel=4", "--device=cpu", f"--minutes={seconds / 60}", f"--out={out}"]
        code = program.main(["--model=/models/x", "--commit=c", *sizes])
        return code, json.loads(out.read_text()), capsys.readouterr()

    return soak


def test_a_sound_server_passes_in_time(soak):
    begin = time.monotonic()
    code, record, printed = soak(seconds=6)
    assert (code, record["failures"]) == (0, []), printed.err
    assert time.monotonic() - begin < 12
    found = record["found"]
    assert all(found[name] for name in program.MUST_HAPPEN)
    assert found["answers replayed"] == found["answers"] - found["answers by a grammar"]
    assert found["gap, nats"]["max"] <= NOISE and found["worst token, nats"] <= NOISE
    assert record["commit"] == "c" and record["command"].startswith("python -m benchmarks.soak --model=x")
    assert record["plan"]["pool"] == PLAN.pool
    assert record["server_env"] == {"SGLANG_CLIP_MAX_NEW_TOKENS_ESTIMATION": "22"}
    assert "passed" in printed.out and "turns" in printed.out


@pytest.mark.parametrize(
    "fault, says",
    [
        ("row", "token .* generated at -.*, read at"),
        ("slots", "99 of 100 slots were free after a flush"),
        ("leak", "pool memory leak detected"),
        ("short", "tokens where .* were asked for"),
        ("cached", "a cold prompt of .* tokens: 7 were cached"),
        ("grammar", "does not follow"),
        ("dead", "the server ended with 9"),
    ],
)
def test_what_is_wrong_is_a_failure(soak, fault, says):
    code, record, printed = soak(fault)
    assert code == 1 and "failed" in printed.out
    assert any(re.search(says, text) for text in record["failures"]), record["failures"]


def test_what_never_happened_is_a_failure():
    run = SimpleNamespace(server=Fake(), errors=[], replay=Replay("", Bound(1, 1)), flushes=0)
    found = dict.fromkeys(program.MUST_HAPPEN, 3)
    assert program.failures(run, found) == []
    assert program.failures(run, found | {"rows compared": None}) == []  # nobody asked for checksums
    assert program.failures(run, found | {"retractions": 0}) == ["nothing is shown of retractions: there were none"]


def test_tokens_that_are_far_too_often_are_a_failure():
    """Whatever each of them is allowed."""
    run = SimpleNamespace(server=Fake(), errors=[], replay=Replay("", program.BOUNDS["4"]), flushes=0)
    found, run.replay.tokens = dict.fromkeys(program.MUST_HAPPEN, 3), 1_000_000
    run.replay.far[2.0] = 32
    assert program.failures(run, found) == []
    run.replay.far[2.0] = 33
    assert program.failures(run, found) == ["33 of 1000000 tokens are farther than 2 nats from their cold reading"]


def test_sizes_follow_the_context():
    for context in (768, 4096, 32768):
        plan = Plan.of(context, 30, 12, 24)
        step = (context - plan.system) // 30
        assert plan.essay == (step, 3 * step) and plan.answer[1] < plan.essay[0]
        assert 1.25 < plan.pool / (4 * plan.system + 12 * (context - plan.system) / 2) < 1.35
        assert plan.pool > context + plan.essay[1]  # one request always fits
    with pytest.raises(PlanError, match="--context 300: .* at least 564 are needed, or fewer --turns"):
        Plan.of(300, 30, 4, 8)
    with pytest.raises(PlanError, match="--parallel 9"):
        Plan.of(768, 30, 9, 8)


@pytest.mark.parametrize("context, parallel, sessions", [(576, 6, 12), (768, 12, 24), (4096, 32, 64)])
def test_a_rush_outgrows_the_cache(context, parallel, sessions):
    """More often than not, even where those that are aborted or end early hold nothing and nobody takes their place."""
    plan, text, outgrown = Plan.of(context, 30, parallel, sessions), [*range(8 * context)], 0
    for seed in range(10):
        live = sorted((Session(i, seed, plan, text, midway=True) for i in range(sessions)), key=lambda x: len(x.ids))
        turns = [session.turn(rush=True) for session in live[:parallel]]
        shared = plan.system * (parallel - len({session.ids[0] for session in live[:parallel]}))
        assert sum(len(turn.ids) for turn in turns) - shared < 0.9 * plan.pool
        turns = [turn for turn in turns if turn.kind in ("plain", "several")]
        held = [sum(len(x.ids) + n * x.n for x in turns if n < x.new) - shared for n in range(0, context, 8)]
        outgrown += max(held) > plan.pool
    assert outgrown > 5


def test_sessions_share_prompts_and_are_the_same_for_a_seed():
    text = [*range(3000)]
    ids = [Session(i, 0, PLAN, text).ids for i in range(30)]
    assert len({tuple(x) for x in ids}) == 4 and {len(x) for x in ids} == {PLAN.system}
    one, same, other = (Session(3, seed, PLAN, text) for seed in (0, 0, 1))
    assert [one.turn() for _ in range(9)] == [same.turn() for _ in range(9)] != [other.turn() for _ in range(9)]
    kinds = Counter(one.turn().kind for _ in range(500))
    assert set(kinds) == {"plain", "abort", "timeout", "several", "grammar"} and kinds["plain"] > 250


def test_a_session_keeps_its_answers_in_their_places():
    session = Session(0, 0, PLAN, [*range(3000)])
    while not session.over:
        turn = session.turn()
        session.keep(turn, [7] * turn.new, [-1.0] * turn.new)
    assert len(session.ids) <= PLAN.context and 20 <= session.turns <= 30
    assert len(session.answers) == session.turns
    reading = session.reading()
    assert all(reading.ids[a.start :][: len(a.tokens)] == a.tokens for a in reading.answers)
    assert {a.logprobs is None for a in reading.answers} == {True, False}
    assert {a.how for a in reading.answers} > {
        "plain, temperature 0, 0 retractions",
        "several, temperature 1, 0 retractions",
    }


def test_the_stock_cache_is_a_control():
    """On a GPU, where it is served without the plugin's cache; what it has no rows of is not asked for."""
    packed, stock = (
        program.server_arguments(program.parse(["--model=m", "--out=o", "--device=cuda", f"--bits={n}"]))
        for n in (8, 16)
    )
    assert [x for x in packed if x not in stock] == [x for x in packed if "kv-quant" in x] != []
    assert [x for x in packed if x in stock] == stock


def test_answers_are_compared_token_by_token():
    ids, read = [*range(30)], [-1.0] * 29
    right, wrong = Answer(5, ids[5:15], [-1.1] * 10), Answer(20, ids[20:30], [-1.0] * 9 + [-1.6], "plain")
    replay = Replay("", Bound(0.2, 0.3))
    replay.compare(Reading(ids, [right, Answer(16, ids[16:18], None)], 1), read)
    assert not replay.outliers and replay.gaps == [pytest.approx(0.1)] and replay.tokens == 10
    replay.compare(Reading(ids, [wrong], 2), read)
    said = "session 2, 10 tokens from 20 on (plain): token 9 generated at -1.600, read at -1.000"
    assert replay.outliers == [said] and replay.far == {0.5: 1} and not replay.likely and not replay.shown
    replay.compare(Reading(ids, [Answer(5, ids[5:15], [-1.25] * 10, "plain")], 3), read)
    assert replay.outliers[1:] == ["session 3, 10 tokens from 5 on (plain): 0.250 nats a token"]
    replay.compare(Reading(ids, [Answer(5, ids[5:15], [-0.1] + [-1.0] * 9)], 3), read)
    assert replay.far == {0.5: 2} and replay.likely == {0.5: 1}
    replay.compare(Reading(ids, [Answer(20, ids[20:30], [-1.0] * 9 + [-5.5], "several")], 4), read)
    said = "session 4, 10 tokens from 20 on (several): token 9 generated at -5.500, read at -1.000"
    assert replay.shown == [f"{said}, and then at nan; up to it {[*range(13, 30)]}"]
    assert Bound(1, 0.3).allows(-8.0, -8.8) and not Bound(1, 0.3).allows(-0.2, -0.6)  # the likelier, the nearer


def test_a_token_that_is_shown_is_read_again(monkeypatch):
    asked, ids = [], [*range(30)]
    monkeypatch.setattr(Client, "read", lambda _, ids: asked.append(len(ids)) or [-1.0] * (len(ids) - 2) + [-2.5])
    replay = Replay("", Bound(1, 9))
    replay.read([Reading(ids, [Answer(20, ids[20:29], [-1.0] * 8 + [-7.5], "plain")], 1)], 1)
    assert asked == [30, 29] and [text["again"] for text in replay.texts] == [-2.5]
    assert "token 8 generated at -7.500, read at -1.000, and then at -2.500; up to it" in replay.shown[0]


def test_the_last_id_of_a_vocabulary_has_another_name():
    """SGLang's own function names it 0 in a prompt, which is no loss; a wrong name of any other token is one."""
    from sglang.srt.managers.scheduler_components.logprob_result_processor import SchedulerLogprobResultProcessor

    ids = [7, LAST - 1, LAST, 3]
    processor = SchedulerLogprobResultProcessor(model_config=SimpleNamespace(vocab_size=LAST + 1))
    request = SimpleNamespace(
        origin_input_ids=ids, logprob_start_len=0, logprob=SimpleNamespace(), is_prefill_only=False
    )
    processor._process_input_token_logprobs(request, [-1.0] * 4)
    assert request.logprob.input_token_logprobs_idx == named(ids, LAST) == [7, LAST - 1, 0, 3]
    with Fake() as fake:
        assert len(Client(fake.url, LAST).read(ids)) == 3
        with pytest.raises(WrongAnswer, match=f"1 of another token, the first at 1 of 0 in place of {LAST}"):
            Client(fake.url).read(ids)
    replay = Replay("", Bound(1, 1), LAST)
    replay.compare(Reading(ids, [], 1), [-1.0] * 3)
    assert replay.renamed == 1


def test_grammars():
    for grammar, text in TEXTS.items():
        assert follows(grammar, text) and not follows(grammar, text + "!") and not follows(grammar, "")
    assert not follows("json_schema", '{"tool": "eat", "line": 3}')
    body = Turn("grammar", [1], 60, 0.0, "regex").body()
    assert body["sampling_params"]["regex"] == GRAMMARS["regex"] and not body["sampling_params"]["ignore_eos"]


def test_an_error_of_the_server_is_no_answer():
    with Fake() as fake:
        fake.status = 500
        with pytest.raises(WrongAnswer, match="status 500"):
            Client(fake.url).read([1, 2])


@pytest.mark.parametrize(
    "argv, says",
    [
        (["--context=300"], "--context 300"),
        (["--minutes=0"], "--minutes 0.0: a number above 0"),
        (["--bound=0.1"], "two numbers of nats above 0"),
    ],
)
def test_bad_options_say_what_would_work(argv, says, capsys):
    with pytest.raises(SystemExit):
        program.main(["--model=x", "--out=x.json", *argv])
    assert says in capsys.readouterr().err
