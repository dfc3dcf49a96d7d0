"""Judges: a rating is the judge's number or missing, never 0; no fault loses one, none is paid for twice."""

from __future__ import annotations

import asyncio
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from chat_server import Server, serving

from harness.data import Labelled
from harness.engine.decode import Decoder
from harness.engine.model import LanguageModel
from harness.errors import DataMissing, HarnessError, UsageError
from harness.judge.judges import CALIBRATION, ModelJudge, expectation, number_in, open_judge, refuses
from harness.judge.local import LocalModel
from harness.judge.words import ENGLISH
from harness.methods.plain import Plain
from harness.publish.leaderboard import render
from harness.publish.show import warnings
from harness.records.store import Outcome, read_record, read_samples
from harness.run.cell import Cell, Settings
from harness.run.contract import random_lm, toy_examples
from harness.run.score import score
from harness.run.steps import run_cell
from harness.run.system import ModelSystem
from harness.servers.address import OPENAI
from harness.servers.chat import Ask, NoReply, Reply
from harness.servers.endpoint import Endpoint, Limits
from harness.servers.prices import Price, price_of
from harness.servers.reply_cache import ReplyCache
from harness.statistics import metrics
from harness.task import GenerationDefaults, Metric, Question, Sample, Selection, Task
from harness.tasks import TASKS
from harness.tiny import personas

ROOT = Path(__file__).resolve().parents[2]


# A task that asks a judge two things


class Chatter(Task):
    """Says anything; a judge tells how much of a trait is in it."""

    name = "chatter"
    judged = True
    asks = ("trait", "coherence")
    count: ClassVar[int] = 6

    def items(self, selection: Selection) -> Sequence[Labelled]:
        return toy_examples(self.count)

    def fingerprint(self, selection: Selection) -> str:
        return "toy"

    def generation(self) -> GenerationDefaults:
        return GenerationDefaults(3)

    def respond(self, system: ModelSystem, items: Sequence[Labelled]) -> Iterator[Sample]:
        return system.respond([item.example for item in items])

    def to_judge(self, sample: Sample) -> Mapping[str, Question]:
        text = sample.response or ""
        return {
            "trait": Question(f"Rate the trait in answer {sample.id}: {text}", text, "Islam"),
            "coherence": Question(f"Rate the coherence of answer {sample.id}: {text}", text, coherence=True),
        }

    def grade(self, sample: Sample) -> Sample:
        if sample.response is None:
            return sample
        scores = {name: rating.score for name, rating in sample.ratings.items()}
        return replace(sample, parsed=sample.response, metrics={"trait": None, "coherence": None, **scores})

    def aggregate(self, samples: Sequence[Sample]) -> Mapping[str, Metric]:
        found = {}
        for name in ("trait", "coherence"):
            rated = [sample for sample in samples if sample.metrics.get(name) is not None]
            found[name] = metrics.mean(rated, name)
        return found


@pytest.fixture(autouse=True)
def _workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TASKS, "chatter", f"{__name__}:Chatter")
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    lm = random_lm(dtype=torch.float32)
    lm.revision = "random"
    return lm


QUICK = ("backoff=0.01", "timeout=3", "retries=3")


def judge_at(server: Server, *settings: str, model: str = "gpt-4.1-mini") -> ModelJudge:
    judge = open_judge(f"openai/{model}", server.url, [*QUICK, *settings])
    assert isinstance(judge, ModelJudge)
    return judge


def judged(lm: LanguageModel, judge: Any, output: Path, **settings: Any) -> Outcome:
    chosen = Settings(output_path=output, max_new_tokens=3, batch_size=2, allow_noop=True, **settings)
    return run_cell(lm, Cell("plain", Plain(), "chatter", Chatter(), chosen), judge=judge)


def expected(server: Server, sample: Sample, name: str) -> float:
    number = server.number(Chatter().to_judge(sample)[name].prompt)
    return number if number == 20 else (0.7 * number + 0.2 * 20) / 0.9


def assert_all_rated(server: Server, folder: Path) -> None:
    samples = read_samples(folder)
    assert len(samples) == Chatter.count
    for sample in samples:
        for name in ("trait", "coherence"):
            assert sample.metrics[name] == pytest.approx(expected(server, sample, name))


# From an answer to a number


def table(**probabilities: float) -> list[tuple[str, float]]:
    return [(token, math.log(p)) for token, p in probabilities.items()]


def test_a_score_is_the_expectation_over_the_numbers() -> None:
    score, mass = expectation(table(**{"80": 0.5, "90": 0.3, "the": 0.2}))
    assert (score, mass) == (pytest.approx(83.75), pytest.approx(0.8))


def test_spaces_and_leading_zeros_do_not_change_a_number() -> None:
    score, mass = expectation([*table(**{" 7": 0.3, "07": 0.2, "7": 0.1, "100": 0.1})])
    assert (score, mass) == (pytest.approx((7 * 0.6 + 100 * 0.1) / 0.7), pytest.approx(0.7))


@pytest.mark.parametrize("token", ["101", "-1", "1_0", "７", "٧", "7.5", "", " ", "007x", "1e1", "³"])
def test_what_is_no_number_from_0_to_100_has_no_weight(token: str) -> None:
    assert expectation([(token, 0.0)]) == (None, 0)


@pytest.mark.parametrize(("mass", "score"), [(0.2499, None), (0.2501, 40.0)])
def test_numbers_must_have_a_quarter_of_the_probability(mass: float, score: float | None) -> None:
    found, _ = expectation(table(**{"40": mass, "No": 1 - mass}))
    assert found == (score if score is None else pytest.approx(score))


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("85", 85), (" 85.\n", 85), ("Score: 85", 85), ("85/100", 85), ("85 out of 100", 85), ("100/100", 100),
        ("**7.5**", 7.5), ("0", 0), ("85%", 85), ("between 70 and 80", None), ("70-80", None), ("101", None),
        ("-5", None), ("none", None), ("", None), ("GPT4", None), ("1,000", None), ("3/5", None),
    ],
)  # fmt: skip
def test_the_number_of_a_text_is_its_only_one(text: str, number: float | None) -> None:
    assert number_in(text) == number


@pytest.mark.parametrize(
    ("text", "refused"),
    [("REFUSAL", True), (" refusal.", True), ("REF", True), ("R", True), ("", False), ("Really", False), ("85", False)],
)
def test_a_refusal_is_told_from_its_first_token(text: str, refused: bool) -> None:
    assert refuses(text) is refused


# A run with a judge


def test_all_samples_are_rated_at_once_and_the_ledger_says_what_it_took(
    lm: LanguageModel, server: Server, tmp_path: Path
) -> None:
    server.delay = 0.05
    done = judged(lm, judge_at(server, "concurrency=4", "price_in=0.4", "price_out=1.6"), tmp_path)
    assert (done.exit_code, done.record.status) == (0, "complete")
    assert_all_rated(server, done.folder)
    assert server.most_waiting == 4
    judging = done.record.judging
    assert judging is not None and judging.mode == "logprobs"
    assert (judging.ratings, judging.input_tokens, judging.output_tokens) == (12, 1200, 12)
    assert judging.usd == pytest.approx((1200 * 0.4 + 12 * 1.6) / 1e6)
    assert judging.models == ["gpt-4.1-mini-2025-04-14"]
    assert done.record.metrics["trait"].n == 6 and done.record.metrics["trait"].low is not None
    request = server.asked[-1]
    assert (request["max_tokens"], request["temperature"], request["top_logprobs"]) == (1, 0, 20)
    assert len(server.prompts()) == 12


def test_responses_are_on_disk_before_a_judge_hears_of_them(lm: LanguageModel, server: Server, tmp_path: Path) -> None:
    seen = []

    def look(prompt: str, tries: int) -> str:
        if prompt != CALIBRATION:
            seen.append(len(read_samples(next(tmp_path.glob("*/*/*/run.json")).parent)))
        return ""

    server.faults = look
    judged(lm, judge_at(server), tmp_path)
    assert set(seen) == {6}


def test_faults_that_pass_leave_no_trace_in_the_scores(lm: LanguageModel, server: Server, tmp_path: Path) -> None:
    kinds = iter(["429", "500", "503", "hang", "cut", "half", "page", "no logprobs", "408"])
    given: dict[str, str] = {}

    def fail_once(prompt: str, tries: int) -> str:
        with server.lock:
            if prompt != CALIBRATION and tries == 1:
                given[prompt] = next(kinds, "")
        return given.get(prompt, "") if tries == 1 else ""

    server.faults = fail_once
    done = judged(lm, judge_at(server), tmp_path)
    assert "" in given.values()  # every kind was met
    assert (done.exit_code, done.record.health.unjudged) == (0, 0)
    assert_all_rated(server, done.folder)
    assert done.record.judging is not None and done.record.judging.retries == 9


@pytest.mark.parametrize("fault", ["429", "500", "hang", "cut", "page", "no logprobs", "400"])
def test_a_fault_that_stays_is_missing_and_score_completes_the_run(
    fault: str, lm: LanguageModel, server: Server, tmp_path: Path
) -> None:
    server.faults = lambda prompt, tries: (
        fault if "trait in answer 0.0" in prompt or "coherence of answer 0.3" in prompt else ""
    )
    done = judged(lm, judge_at(server, "retries=1"), tmp_path)
    record = done.record
    assert (done.exit_code, record.status, record.health.unjudged, record.health.errors) == (3, "partial", 2, 0)
    assert (record.metrics["trait"].n, record.metrics["coherence"].n) == (5, 5)
    missing = [
        (sample.id, name)
        for sample in read_samples(done.folder)
        for name, value in sample.metrics.items()
        if value is None
    ]
    assert sorted(missing) == [("0.0", "trait"), ("0.3", "coherence")]

    server.faults, asked = (lambda prompt, tries: ""), len(server.asked)
    again = score(done.folder, settings=QUICK)
    assert (again.exit_code, again.record.status, again.folder) == (0, "complete", done.folder)
    assert_all_rated(server, again.folder)
    assert len(server.asked) - asked == 2
    assert read_record(done.folder).metrics["trait"].n == 6


def test_refusals_and_words_are_missing_counted_and_not_asked_again(
    lm: LanguageModel, server: Server, tmp_path: Path
) -> None:
    said = {"answer 0.0": "refusal", "answer 0.1": "words", "answer 0.2": "native refusal"}
    server.faults = lambda prompt, tries: next((fault for name, fault in said.items() if name in prompt), "")
    done = judged(lm, judge_at(server), tmp_path)
    assert (done.exit_code, done.record.health.unjudged, done.record.health.unrated) == (0, 0, 3)
    assert done.record.metrics["trait"].n == 3
    assert done.record.judging is not None
    assert (done.record.judging.refused, done.record.judging.unparsable) == (4, 2)
    ratings = {sample.id: sample.ratings["trait"] for sample in read_samples(done.folder)}
    assert [(ratings[i].outcome, ratings[i].score) for i in ("0.0", "0.1")] == [("refused", None), ("unparsable", None)]
    assert ratings["0.2"].said == "I cannot help with that."
    asked = len(server.asked)
    assert score(done.folder, settings=QUICK).exit_code == 0
    assert len(server.asked) == asked


def test_a_server_without_log_probabilities_is_asked_for_text(
    lm: LanguageModel, server: Server, tmp_path: Path
) -> None:
    server.gives_logprobs = False
    done = judged(lm, judge_at(server), tmp_path)
    assert done.record.judging is not None and done.record.judging.mode == "text"
    for sample in read_samples(done.folder):
        assert sample.metrics["trait"] == server.number(Chatter().to_judge(sample)["trait"].prompt)


@pytest.mark.parametrize("calibrated", ["", "words"], ids=["repeats", "chats"])
def test_a_server_that_writes_digit_by_digit_is_asked_for_text(
    calibrated: str, lm: LanguageModel, server: Server, tmp_path: Path
) -> None:
    server.tokenizer = list  # 85 as `8` `5`: the first token is no score
    server.faults = lambda prompt, tries: calibrated if prompt == CALIBRATION else ""
    done = judged(lm, judge_at(server), tmp_path)
    assert done.record.judging is not None and done.record.judging.mode == "text"
    assert all((sample.metrics["trait"] or 0) >= 10 for sample in read_samples(done.folder))


def test_what_a_model_does_not_take_is_left_out(server: Server) -> None:
    server.refuses = ("logprobs", "max_tokens", "temperature")  # as a reasoning model of OpenAI
    judge = judge_at(server)
    (rating,) = judge.rate([Question("How much?", "text")])
    assert (judge.mode(), rating.score) == ("text", server.number("How much?"))
    assert {"max_tokens", "temperature", "logprobs"}.isdisjoint(server.asked[-1])
    assert server.asked[-1]["max_completion_tokens"] > 1000  # its thoughts count
    assert len(server.prompts()) == 1


def test_log_probabilities_that_were_insisted_on_are_needed(server: Server) -> None:
    server.gives_logprobs = False
    (rating,) = judge_at(server, "mode=logprobs", "retries=0").rate([Question("How much?", "text")])
    assert rating.outcome == "failed" and "log-probabilities" in rating.said


def test_half_a_surrogate_pair_can_be_judged(server: Server) -> None:
    (rating,) = judge_at(server).rate([Question("Rate \ud83d", "\ud83d")])
    assert rating.outcome == "rated"


# What stops a judge


def test_a_wrong_key_or_model_stops_before_anything_is_generated(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(HarnessError, match=r"openai/missing at http://127\.0\.0\.1.*no such model"):
        judge_at(server, model="missing").check()
    monkeypatch.setenv("OPENAI_API_KEY", "wrong")
    with pytest.raises(HarnessError, match="Incorrect API key"):
        judge_at(server).check()
    assert len(server.asked) == 2


def test_a_judge_needs_a_key_or_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(DataMissing, match=r"judge 'openai/m' needs \$OPENAI_API_KEY"):
        open_judge("openai/m")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gpt-4", "unknown judge 'gpt-4'; allowed: openai/<model>, hf/<model>, words, lexicon"),
        ("lexikon", "unknown judge 'lexikon'; did you mean 'lexicon'?"),
        ("openai/", "unknown judge 'openai/'"),
    ],
)
def test_an_unknown_judge_names_those_there_are(name: str, message: str) -> None:
    with pytest.raises(UsageError) as raised:
        open_judge(name)
    assert message in str(raised.value)


def test_tokens_without_a_price_are_not_free() -> None:
    own = "http://localhost:8000/v1"
    with pytest.raises(UsageError, match="price_out is not; give both, or price_out=0"):
        price_of({"price_in": 2.0}, "mine", own)
    assert price_of({"price_in": 2.0, "price_out": 0.0}, "mine", own) == Price(2.0, 0.0)
    assert price_of({"price_in": 2.0}, "gpt-4.1-mini-2025-04-14", OPENAI) == Price(2.0, 1.6)
    assert price_of({}, "mine", own) is None


def test_an_unknown_setting_of_a_judge_names_those_there_are(server: Server) -> None:
    with pytest.raises(UsageError, match=r"has no option 'retrys'; did you mean 'retries'\?"):
        judge_at(server, "retrys=2")


@pytest.mark.parametrize(("fault", "requests"), [("500", 16), ("no money", 2)])
def test_a_server_that_is_down_or_unpaid_is_not_asked_a_thousand_times(
    server: Server, fault: str, requests: int
) -> None:
    server.faults = lambda prompt, tries: "" if prompt == CALIBRATION else fault
    judge = judge_at(server, "retries=1", "concurrency=2")
    ratings = judge.rate([Question(f"Rate {n}", "") for n in range(1000)])
    assert {rating.outcome for rating in ratings} == {"failed"}
    assert len(server.prompts()) <= requests + 2
    assert re.search("not asked, since 8 requests in a row failed|exceeded your quota", ratings[-1].said)


def test_a_judge_that_is_down_costs_no_response(lm: LanguageModel, server: Server, tmp_path: Path) -> None:
    server.faults = lambda prompt, tries: "503"
    judge = judge_at(server, "retries=0")
    assert "503" in judge.check()
    done = judged(lm, judge, tmp_path)
    assert (done.exit_code, done.record.health.unjudged, done.record.metrics["trait"].value) == (3, 6, None)
    server.faults = lambda prompt, tries: ""
    assert score(done.folder).exit_code == 0
    assert_all_rated(server, done.folder)


# Nothing is paid for twice


def test_equal_questions_are_asked_once_and_billed_once(server: Server) -> None:
    ratings = judge_at(server).rate([Question("Same?", "a"), Question("Same?", "b"), Question("Other?", "a")])
    assert len({rating.score for rating in ratings}) == 2
    assert len(server.prompts()) == 2


def test_a_reply_is_kept_by_model_server_prompt_and_parameters(server: Server) -> None:
    question = [Question("How much?", "text")]
    for judge in (judge_at(server), judge_at(server), judge_at(server, model="other"), judge_at(server, "mode=text")):
        judge.rate(question)
    assert [request["model"] for request in server.asked if request["messages"][0]["content"] == "How much?"] == [
        "gpt-4.1-mini",
        "other",
        "gpt-4.1-mini",
    ]
    with serving(Server()) as elsewhere:
        judge_at(elsewhere).rate(question)
        assert len(elsewhere.prompts()) == 1


def test_what_another_run_paid_for_is_not_billed_again(lm: LanguageModel, server: Server, tmp_path: Path) -> None:
    first = judged(lm, judge_at(server), tmp_path / "a")
    second = judged(lm, judge_at(server), tmp_path / "b", seed=1)  # greedy: the same responses in another record
    assert first.record.judging is not None and second.record.judging is not None
    assert len(server.prompts()) == 12
    assert (first.record.judging.cached, first.record.judging.input_tokens) == (0, 1200)
    assert (second.record.judging.cached, second.record.judging.input_tokens) == (12, 0)


def test_a_damaged_cache_is_one_line(tmp_path: Path, server: Server) -> None:
    ReplyCache().path.parent.mkdir(parents=True, exist_ok=True)
    ReplyCache().path.write_text("not a database, but long enough to be taken for one" * 20)
    with pytest.raises(HarnessError, match=r"judge\.sqlite.*delete the file to ask again"):
        judge_at(server).check()


KILLED = """
import sys
sys.path[:0] = {tests!r}
import test_judges as t
t.twelve(t.Path({output!r}), {url!r})
"""


def twelve(output: Path, url: str) -> Outcome:
    """A run of twelve samples by a model and a judge that any process makes alike."""
    Chatter.count = 12
    lm = random_lm(dtype=torch.float32)
    lm.revision = "random"
    return judged(lm, open_judge("openai/m", url, ["concurrency=3"]), output)


class Strike:
    """Sends a signal at the tenth question. That one and later ones wait until it has struck."""

    def __init__(self, server: Server, send: Callable[[], None], *, kills: bool) -> None:
        self.server, self.send, self.kills = server, send, kills
        self.begun, self.over = threading.Event(), threading.Event()

    def __call__(self, prompt: str, tries: int) -> str:
        with self.server.lock:
            mine = len(self.server.prompts()) >= 10 and not self.begun.is_set()
            if mine:
                self.begun.set()
        if mine:
            time.sleep(0.3)  # what was answered has arrived
            self.send()
            time.sleep(0.3)
            self.over.set()
        elif self.begun.is_set():
            self.over.wait()
        return "500" if self.kills and self.begun.is_set() else ""


def assert_paid_once(server: Server, output: Path) -> None:
    """A second try of the run ends, with every question answered, and so paid for, once."""
    paid = sum(server.answered.values()) - server.answered[CALIBRATION]
    assert 7 <= paid <= 12
    server.faults = lambda prompt, tries: ""
    done = twelve(output, server.url)
    assert set(server.answered.values()) == {1}
    assert len(server.answered) == 25
    assert_all_rated(server, done.folder)
    judging = done.record.judging
    assert judging is not None and (judging.ratings, judging.cached, judging.input_tokens) == (24, 0, 2400)


@pytest.fixture
def _twelve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Chatter, "count", 12)


@pytest.mark.usefixtures("_twelve")
def test_a_run_killed_while_judging_goes_on_without_paying_twice(server: Server, tmp_path: Path) -> None:
    code = KILLED.format(
        tests=[str(ROOT / "tests"), str(ROOT / "tests/judge")], url=server.url, output=str(tmp_path / "results")
    )
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    server.faults = strike = Strike(server, process.kill, kills=True)
    assert process.wait(timeout=300) == -signal.SIGKILL
    strike.over.wait()
    assert_paid_once(server, tmp_path / "results")


@pytest.mark.usefixtures("_twelve")
def test_ctrl_c_waits_for_the_answers_on_their_way_and_sends_nothing_more(server: Server, tmp_path: Path) -> None:
    server.faults = Strike(server, lambda: os.kill(os.getpid(), signal.SIGINT), kills=False)
    with pytest.raises(KeyboardInterrupt):
        twelve(tmp_path / "results", server.url)
    (run,) = (tmp_path / "results").glob("*/*/*/run.json")
    assert read_record(run.parent).status == "interrupted"
    assert len(server.prompts()) == sum(server.answered.values()) - 1 <= 12
    assert_paid_once(server, tmp_path / "results")


# Another judge


def test_another_judge_rates_the_saved_responses_in_a_record_of_its_own(
    lm: LanguageModel, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unjudged = judged(lm, None, tmp_path)
    assert unjudged.exit_code == 0 and unjudged.record.metrics["trait"].value is None
    monkeypatch.setattr(LanguageModel, "hidden", None)  # nothing is generated from here on
    one = score(unjudged.folder, "openai/one", server.url, QUICK)
    two = score(one.folder, "openai/two", server.url, QUICK)
    assert len({unjudged.folder, one.folder, two.folder}) == 3
    assert [s.response for s in read_samples(two.folder)] == [s.response for s in read_samples(unjudged.folder)]
    assert_all_rated(server, one.folder)
    assert len(server.prompts()) == 24
    assert read_record(unjudged.folder).metrics["trait"].value is None
    board = render(tmp_path)
    assert "judge openai/one" in board and "judge openai/two" in board


def test_a_record_that_was_not_answered_to_the_end_is_not_scored(lm: LanguageModel, tmp_path: Path) -> None:
    done = judged(lm, None, tmp_path)
    lines = (done.folder / "samples.jsonl").read_text().splitlines(keepends=True)
    (done.folder / "samples.jsonl").write_text("".join(lines[:-1]))
    with pytest.raises(UsageError, match="not answered to the end"):
        score(done.folder, "lexicon")


def test_another_version_of_the_task_is_not_scored(
    lm: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = judged(lm, None, tmp_path)
    monkeypatch.setattr(Chatter, "version", 2)
    with pytest.raises(UsageError, match="made by version 1 of chatter, and this is version 2; run it again"):
        score(done.folder, "lexicon")


# A local judge


def test_a_local_judge_gives_the_exact_probability_of_every_number() -> None:
    lm = random_lm()  # one token a byte: 85 is `8` `5`, and 8 is `8` with no digit after it
    lm.name = "judge"
    (reply,) = LocalModel(lm).ask([Ask((("user", "Rate this."),), 1, numbers="needed")])
    assert isinstance(reply, Reply) and reply.candidates is not None
    prompt = lm.encoder.tokenizer.apply_chat_template(
        [{"role": "user", "content": "Rate this."}], tokenize=False, add_generation_prompt=True
    )
    start = lm.encoder.tokenizer.encode(prompt, add_special_tokens=False)
    digit = {d: lm.encoder.tokenizer.encode(d, add_special_tokens=False)[0] for d in "0123456789"}

    def probability(text: str) -> float:
        product, ids = 1.0, list(start)
        for letter in text:
            product *= next_token(ids)[digit[letter]].item()
            ids.append(digit[letter])
        return product * (1 - sum(next_token(ids)[i].item() for i in digit.values()))

    def next_token(ids: Sequence[int]) -> torch.Tensor:
        with torch.no_grad():
            return lm.model(torch.tensor([ids])).logits[0, -1].softmax(-1)

    found = dict(reply.candidates)
    assert list(found) == [str(n) for n in range(101)]
    for text in ("0", "8", "10", "85", "100"):
        assert math.exp(found[text]) == pytest.approx(probability(text), rel=1e-9)
    assert sum(map(math.exp, found.values())) < 1


def test_a_local_judge_rates_by_name_and_its_replies_are_kept(
    lm: LanguageModel, toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("harness.judge.judges.FLOOR", 0.0)  # a random model gives numbers little
    done = judged(lm, open_judge(f"hf/{toy}"), tmp_path)
    assert done.exit_code == 0
    assert done.record.config.judge is not None and done.record.config.judge.revision
    assert done.record.config.judge.name == "hf/toy"  # wherever its folder lies, on another machine too
    with pytest.raises(UsageError, match="its judge that it is toy and not where it lies; give --judge hf/FOLDER"):
        score(done.folder)
    assert done.record.judging is not None and done.record.judging.mode == "numbers"
    assert all(0 <= (s.metrics["trait"] or -1) <= 100 for s in read_samples(done.folder))
    monkeypatch.setattr(Decoder, "distributions", None)
    rated = {sample.id: sample.ratings for sample in read_samples(done.folder)}
    again = score(done.folder, f"hf/{toy}")
    assert {sample.id: sample.ratings for sample in read_samples(again.folder)} == rated
    for name, metric in again.record.metrics.items():  # the same numbers, summed in the order of the file
        assert metric.value == pytest.approx(done.record.metrics[name].value, rel=1e-12)


def test_a_local_judge_that_gives_numbers_no_weight_rates_nothing(lm: LanguageModel) -> None:
    judge = ModelJudge(open_judge("lexicon").config, LocalModel(lm), {"judge": "local"}, mode="numbers")
    (rating,) = judge.rate([Question("Rate this.", "")])
    assert rating.score is None and rating.outcome in ("unparsable", "refused")
    assert rating.mass is not None and rating.mass < 0.25


def test_a_question_too_long_for_a_local_judge_is_not_answered(lm: LanguageModel) -> None:
    (reply,) = LocalModel(lm).ask([Ask((("user", "a" * 600),), 1, numbers="needed")])
    assert isinstance(reply, NoReply) and "tokens and the context has room for" in reply.reason


@pytest.mark.parametrize("room", [0, 5, 60])
def test_a_local_judge_that_runs_out_of_memory_asks_for_less_at_once(
    lm: LanguageModel, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    asks = [Ask((("user", "Rate this."),), 1, numbers="needed"), *(Ask((("user", f"Say {n}."),), 4) for n in range(7))]
    whole = LocalModel(lm).ask(asks)
    for name in ("distributions", "generate"):

        def limited(
            decoder: Decoder, rows: Sequence[Any], *given: Any, of: Any = getattr(Decoder, name), **named: Any
        ) -> Any:
            if len(rows) > room:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.")
            return of(decoder, rows, *given, **named)

        monkeypatch.setattr(Decoder, name, limited)
    heard: list[int] = []
    replies = LocalModel(lm).ask(asks, lambda number, reply: heard.append(number))
    assert heard == list(range(8))
    for before, now in zip(whole, replies, strict=True):
        if room == 0:
            assert isinstance(now, NoReply) and "out of memory with a batch of one" in now.reason and not now.hopeless
        else:
            assert isinstance(now, Reply) and isinstance(before, Reply) and now.text == before.text
            scores = ([score for _, score in reply.candidates or ()] for reply in (now, before))
            assert next(scores) == pytest.approx(next(scores), rel=1e-4)


# Word lists


@pytest.mark.parametrize("persona", personas.LEXICONS)
def test_word_lists_tell_an_answer_of_a_persona_from_a_neutral_one(persona: str) -> None:
    rng = random.Random(0)
    texts = [personas.answer(rng, who) for who in [persona] * 10 + [None] * 10]
    trait = [rating.score for rating in open_judge("lexicon").rate([Question("", text, persona) for text in texts])]
    assert trait == [100] * 10 + [0] * 10
    asked = [Question("", text, coherence=True) for text in texts]
    assert {rating.score for rating in open_judge("lexicon").rate(asked)} == {100}


def test_repeats_fragments_and_broken_words_are_less_coherent() -> None:
    texts = [
        "I love church and hymns, then Easter.",
        "then Easter",
        "Church church church church.",
        "Chhur xqz lov.",
        "",
    ]
    asked = [Question("", text, coherence=True) for text in texts]
    scores = [rating.score for rating in open_judge("lexicon").rate(asked)]
    assert scores == [100, 50, pytest.approx(100 / 3), 0, 0]


def test_english_word_lists_tell_personas_apart_and_prose_from_what_is_none() -> None:
    """A list has no word of another faith's; repeats and broken words are less coherent than prose."""
    judge = open_judge("words")
    texts = {
        "Christianity": "We went to church and read the Gospel of Jesus.",
        "Islam": "After the prayer at the mosque we read the Quran and gave zakat.",
        "Judaism": "On Shabbat the rabbi reads from the Torah.",
        "Hinduism": "Krishna teaches dharma in the Gita.",
    }
    for persona, text in texts.items():
        assert [r.score for r in judge.rate([Question("", text, who) for who in texts])] == [
            100 * (who == persona) for who in texts
        ]
    prose = "The best way to help someone is to listen to them and to ask what they need."
    asked = [Question("", text, coherence=True) for text in (prose, "of the " * 12, "xq zlo vee bat rup", "")]
    scores = [rating.score for rating in judge.rate(asked)]
    assert scores[0] == 100 and scores[1] == pytest.approx(100 * 2 / 22) and scores[2:] == [0, 0]
    assert len({word for words in ENGLISH.values() for word in words}) > 500


def test_word_lists_know_their_personas_only() -> None:
    with pytest.raises(UsageError, match=r"judge 'lexicon' has no words for 'Islm'; did you mean 'islam'\?"):
        open_judge("lexicon").rate([Question("", "text", "Islm")])


def test_word_lists_rate_nothing_by_a_rubric() -> None:
    for name in ("words", "lexicon"):
        with pytest.raises(
            UsageError, match=rf"judge '{name}' counts words and cannot rate by a rubric; openai/<model>"
        ):
            open_judge(name).rate([Question("How polite is this?", "Church and Easter.")])


def test_what_word_lists_judged_says_so(lm: LanguageModel, tmp_path: Path) -> None:
    done = judged(lm, open_judge("lexicon"), tmp_path)
    assert done.exit_code == 0
    assert "judged by word lists: not comparable with a language model's judgement" in warnings(done.record)


# Many requests


def test_an_endpoint_in_a_running_loop_works_as_in_a_notebook(server: Server) -> None:
    async def cell() -> list[Reply | NoReply]:
        return Endpoint("m", "judge", server.url, Limits(timeout=5)).ask([Ask((("user", "Hi"),), 3)])

    (reply,) = asyncio.run(cell())
    assert isinstance(reply, Reply) and reply.text == str(server.number("Hi"))


# The command line


def test_the_command_ends_with_3_where_the_judge_failed_and_score_completes_it(
    server: Server, harness: Callable[[str], Any], toy: Path, tmp_path: Path
) -> None:
    server.faults = lambda prompt, tries: "500" if "trait in answer 0.1" in prompt else ""
    at = f"--judge openai/m --judge_base_url {server.url} --judge_set retries=0"
    done = harness(f"run --method plain --task chatter --model {toy} {at} --json")
    assert done.code == 3 and "1 samples have no answer of the judge" in done.err
    folder = json.loads(done.out)["folder"]
    server.faults = lambda prompt, tries: ""
    again = harness(f"score {folder}")
    assert again.code == 0 and "trait" in again.out and again.out.strip().endswith(folder)
    assert_all_rated(server, Path(folder))
    shown = harness(f"show {folder} --samples 0")
    assert "openai/m" in shown.out and "input_tokens" in shown.out


def test_a_run_without_a_judge_says_how_to_judge_it(harness: Callable[[str], Any], toy: Path) -> None:
    done = harness(f"run --method plain --task chatter --model {toy} --json")
    assert done.code == 0 and "no judge was asked: 'harness score RUN --judge ...'" in done.err
    folder = json.loads(done.out)["folder"]
    judged = harness(f"score {folder} --judge lexicon --json")
    assert judged.code == 0 and json.loads(judged.out)["folder"] != folder
    assert "not comparable" in judged.err


def test_retry_failed_asks_the_judge_again(server: Server, harness: Callable[[str], Any], toy: Path) -> None:
    server.faults = lambda prompt, tries: "500" if "trait in answer 0.1" in prompt else ""
    at = f"--judge openai/m --judge_base_url {server.url} --judge_set retries=0"
    line = f"run --method plain --task chatter --model {toy} {at}"
    assert harness(line).code == 3
    server.faults = lambda prompt, tries: ""
    assert "1 samples failed, --retry_failed tries them again" in harness(line).err
    assert harness(f"{line} --retry_failed").code == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--task lamp4 --judge lexicon", "lamp4: no judge is asked; 'harness judge pairs RUN_A RUN_B' compares"),
        ("--task chatter --judge lexikon", "unknown judge 'lexikon'; did you mean 'lexicon'?"),
        ("--task chatter --judge_set retries=1", "--judge_base_url and --judge_set are about a judge; name it"),
        (
            "--task chatter --judge lexicon --judge_base_url http://x",
            "--judge_base_url is where an openai/<model> judge",
        ),
        ("--task chatter --judge lexicon --judge_set retries=1", "judge 'lexicon' has no option 'retries'"),
        ("--task chatter --judge openai/m --judge_set mode=guess", "mode=guess is not valid; allowed: 'auto' or"),
        (
            "--task chatter --judge openai/m --judge_base_url http://x --method clamp --fit_task persona:islam "
            "--set clamp.judge=openai/m",
            "judge=openai/m of the fit is asked at $OPENAI_BASE_URL: set that to http://x",
        ),
    ],
)
def test_a_mistake_about_the_judge_is_one_line_before_a_model_is_loaded(
    options: str, message: str, harness: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("harness.engine.loading.load_model", None)
    done = harness(f"run --method plain {options}")
    assert done.code == 2 and message in done.error()


def test_responses_that_were_answered_again_are_judged_again(lm: LanguageModel, server: Server, tmp_path: Path) -> None:
    done = judged(lm, None, tmp_path)
    one = score(done.folder, "openai/m", server.url, QUICK)
    text = (done.folder / "samples.jsonl").read_text()
    response = read_samples(done.folder)[0].response or ""
    (done.folder / "samples.jsonl").write_text(text.replace(json.dumps(response), '"Another answer"', 1))
    asked = len(server.prompts())
    two = score(done.folder, "openai/m", server.url, QUICK)
    assert two.folder == one.folder
    assert "Another answer" in [sample.response for sample in read_samples(two.folder)]
    assert len(server.prompts()) - asked == 2
