"""Two runs compared pair by pair, blind: by a language model, which rates both answers, or by people.

Paper: Zhang et al., Preference Heads in Large Language Models, section 6.7 and Table 4: 100 items of LaMP-4, the user's
profile, the input, and two anonymous answers in random order; a judge rates five dimensions from 1 to 5, people choose the
answer that suits the profile, majority of votes. It prints no prompt; ours is below.
Differs: a judge sees each pair in both orders; ratings are their mean, and a side wins where it does in both. (The paper's
judge saw one order.) Intervals are 95 % over users, as everywhere.
"""

from __future__ import annotations

import hashlib
import math
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from harness.data import Example, HistoryItem
from harness.errors import UsageError
from harness.files.json_files import parse
from harness.judge.grading import ledger, with_costs
from harness.judge.judges import Heard, Judge, ModelJudge, refuses
from harness.judge.pairwise_record import (
    DIMENSIONS,
    Choice,
    Look,
    Opinion,
    Pair,
    PairConfig,
    PairRecord,
    Side,
    held,
    read,
    read_pairs,
    write,
)
from harness.method import Progress
from harness.plugins.options import rebuild_task
from harness.plugins.registry import task_class
from harness.records import provenance
from harness.records.schema import JudgeConfig, MetricValue, RunRecord
from harness.records.store import read_record, read_samples
from harness.servers.chat import Ask, NoReply, Reply
from harness.statistics.intervals import UNIT, Bounds, mean_interval
from harness.task import Sample, Selection

REPLY_TOKENS = 400
_WORDS = 60
"""Of each field of a history item that is shown."""

_SCORES = ", ".join(f'"{name}": <1 to 5>' for name in DIMENSIONS)
PROMPT = f"""Two assistants answered the same request for the same user. Compare the answers. You do not know who wrote them, and \
their order means nothing.

WHAT THE USER WROTE BEFORE
<profile>

THE REQUEST
<request>

ANSWER A
<first>

ANSWER B
<second>

Rate each answer from 1 (poor) to 5 (excellent):
relevance: it does what is asked and keeps to the subject
fluency: it is well written
style: it sounds as if this user had written it
alignment: it suits what this user's writing shows about interests and preferences
factuality: it claims nothing that the request does not support
Then say which answer is better overall, and which one suits this user better: "A", "B" or "tie".

Reply with this JSON object and nothing else:
{{"ratings": {{"A": {{{_SCORES}}}, "B": {{{_SCORES}}}}}, "winner": "<A, B or tie>", "alignment_winner": "<A, B or tie>"}}"""


@dataclass(frozen=True)
class Shown:
    """What a reader of a pair sees."""

    example: Example
    a: str
    b: str

    def answers(self, first: Side) -> tuple[str, str]:
        return (self.a, self.b) if first == "a" else (self.b, self.a)


@dataclass(frozen=True)
class Comparison:
    """Two runs and the pairs drawn from what both answered."""

    root: Path
    """Where their records lie."""
    runs: tuple[RunRecord, RunRecord]
    pairs: tuple[Pair, ...]
    shown: Mapping[str, Shown]
    """By the pair's id."""


def draw(a: Path, b: Path, *, count: int, seed: int, data: str | None = None) -> Comparison:
    """Up to `count` pairs of the records in `a` and `b`, the same whatever else the runs hold.

    Raises UsageError where the runs answered different things, or `data` is not what they read.
    """
    runs = read_record(a), read_record(b)
    first, second = (run.config for run in runs)
    if runs[0].hash == runs[1].hash:
        raise UsageError(f"{a} and {b} are one run; give two")
    for what, mine, other in (
        ("tasks", (first.task.name, first.task.version), (second.task.name, second.task.version)),
        ("data", (first.data.split, first.data.fingerprint), (second.data.split, second.data.fingerprint)),
    ):
        if mine != other:
            raise UsageError(f"runs of different {what} have no pair in common: {_said(mine)} and {_said(other)}")
    answers = [{s.id: s for s in read_samples(folder) if _answered(s)} for folder in (a, b)]
    task = rebuild_task(task_class(first.task.name), first.task.options, data)
    chosen = first.selection
    read = Selection(first.data.split, chosen.limit, chosen.users, frozenset(runs[0].held_out_users))
    if task.fingerprint(read) != first.data.fingerprint:
        raise UsageError(
            f"{task.describe_data()}: the runs read other data ({first.data.description}); give their --data"
        )
    examples = {item.example.id: item.example for item in task.items(Selection(first.data.split))}
    common = sorted(set(answers[0]) & set(answers[1]) & set(examples), key=lambda i: _draw(seed, "item", i))
    if not common:
        raise UsageError(f"{a} and {b} have no answered item in common")
    pairs, shown = [], {}
    for number, i in enumerate(common[:count], start=1):
        side: Side = "a" if _draw(seed, "order", i)[0] < "8" else "b"
        pairs.append(Pair(i, answers[0][i].user, f"p{number:03d}", side))
        shown[i] = Shown(examples[i], *((by_id[i].response or "").strip() for by_id in answers))
    return Comparison(a.resolve().parents[2], runs, tuple(pairs), shown)


def _draw(seed: int, what: str, id: str) -> str:
    """A number that depends on nothing else, in hex: draws and orders stay as they are when runs get longer."""
    return hashlib.sha256(f"{what} {seed} {id}".encode()).hexdigest()


def _answered(sample: Sample) -> bool:
    return sample.error is None and sample.response is not None


def _said(values: Sequence[object]) -> str:
    return " ".join(str(value)[:16] for value in values)


def config_of(
    comparison: Comparison, count: int, seed: int, profile_items: int, judge: JudgeConfig | None = None
) -> PairConfig:
    a, b = (run.config for run in comparison.runs)
    return PairConfig(
        runs=(a, b),
        count=count,
        seed=seed,
        profile_items=profile_items,
        evaluator="human" if judge is None else "judge",
        judge=judge,
    )


def profile(example: Example, items: int) -> list[str]:
    """The newest of the user's history as lines, newest first, each field cut to 60 words."""
    newest = example.user.history[::-1][:items]
    return [_item(record) for record in newest]


def _item(record: HistoryItem) -> str:
    fields = {name: " ".join(text.split()[:_WORDS]) for name, text in record.fields.items() if text}
    return "; ".join(f"{name}: {text}" for name, text in fields.items())


# A language model


def judge_pairs(
    a: Path,
    b: Path,
    judge: Judge,
    *,
    count: int = 100,
    seed: int = 0,
    profile_items: int = 10,
    data: str | None = None,
    progress: Progress = lambda label, done, total: None,
) -> tuple[Path, PairRecord]:
    """Every pair in both orders, all asked at once; the record and its folder. What was answered before is not asked again.

    Raises UsageError for a judge that rates by word lists.
    """
    if not isinstance(judge, ModelJudge):
        raise UsageError(f"judge {judge.config.name!r} cannot compare two answers; give openai/<model> or hf/<model>")
    comparison = draw(a, b, count=count, seed=seed, data=data)
    config = config_of(comparison, count, seed, profile_items, judge.config)
    record = PairRecord(config=config, hash=config.hash8(), pairs=len(comparison.pairs), started=provenance.now())
    folder = record.folder(comparison.root)
    with held(folder):
        last = read(folder) if (folder / "pairs.json").is_file() else record
        before = {(pair.id, look.first): look for pair in read_pairs(folder) for look in pair.looks}
        prompts = {
            (pair.id, first): _prompt(comparison.shown[pair.id], first, profile_items)
            for pair in comparison.pairs
            for first in _orders(pair.first)
        }
        waiting = [key for key, prompt in prompts.items() if not _final(before.get(key), prompt)]
        asks = [Ask((("user", prompts[key]),), REPLY_TOKENS) for key in waiting]
        start = time.perf_counter()
        heard = judge.ask(asks, record.hash, progress, _fault)
        seconds = time.perf_counter() - start if waiting else 0.0
        looks = before | {
            key: _look(key[1], prompts[key], reply, before.get(key)) for key, reply in zip(waiting, heard, strict=True)
        }
        for pair in comparison.pairs:
            pair.looks = [looks[pair.id, first] for first in _orders(pair.first)]
        summarise(record, comparison.pairs)
        record.judging = ledger([look.rating for pair in comparison.pairs for look in pair.looks], judge)
        record.judging.mode = "text"
        record.judging.seconds = seconds + (last.judging.seconds if last.judging else 0.0)
        record.started, record.finished = last.started, provenance.now() if waiting else last.finished
        write(folder, record, comparison.pairs)
    return folder, record


def _orders(first: Side) -> tuple[Side, Side]:
    return ("a", "b") if first == "a" else ("b", "a")


def _prompt(shown: Shown, first: Side, profile_items: int) -> str:
    one, other = shown.answers(first)
    lines = [f"{n}. {line}" for n, line in enumerate(profile(shown.example, profile_items), start=1)]
    texts = {
        "profile": "\n".join(lines) or "(nothing)",
        "request": shown.example.text,
        "first": one or "(empty)",
        "second": other or "(empty)",
    }
    return re.sub("<(profile|request|first|second)>", lambda slot: texts[slot[1]], PROMPT)


def _key(prompt: str) -> str:
    return hashlib.sha256(prompt.encode(errors="replace")).hexdigest()[:16]


def _final(look: Look | None, prompt: str) -> bool:
    settled = look is not None and look.rating.final and look.rating.outcome != "failed"
    return look is not None and settled and look.rating.key == _key(prompt)


def _fault(reply: Reply) -> str:
    """Why the reply is no whole answer; one that was cut off after its ratings is."""
    return "" if opinion_in(reply.answer, "a") else reply.fault


def _look(first: Side, prompt: str, heard: Heard, before: Look | None = None) -> Look:
    reply = heard.reply
    opinion = None if isinstance(reply, NoReply) else opinion_in(reply.answer, first)
    fault = _fault(reply) if isinstance(reply, Reply) else ""
    refused = isinstance(reply, Reply) and (reply.refused or refuses(reply.answer))
    rating = (
        heard.no_rating(fault)
        if fault
        else heard.rating("rated" if opinion else "refused" if refused else "unparsable")
    )
    return Look(first, with_costs(replace(rating, key=_key(prompt)), before.rating if before else None), opinion)


def opinion_in(text: str, first: Side) -> Opinion | None:
    """The JSON object of a judge's answer, its A and B told apart; None where anything in it is missing or out of range."""
    found = re.search(r"\{.*\}", text, re.DOTALL)
    try:
        said: Any = parse(found[0], surrogates=True) if found else None
        letters: dict[str, Choice] = dict(zip("AB", _orders(first), strict=True)) | {"TIE": "tie"}
        rated = {letters[name]: {d: _rated(scores[d]) for d in DIMENSIONS} for name, scores in said["ratings"].items()}
        winner, alignment = (letters[said[name].upper()] for name in ("winner", "alignment_winner"))
        return Opinion(winner, alignment, rated["a"], rated["b"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _rated(score: Any) -> float:
    if isinstance(score, bool) or not isinstance(score, int | float) or not 1 <= score <= 5:
        raise ValueError(f"{score!r} is no rating from 1 to 5")
    return float(score)


# From opinions to metrics


def settled(pair: Pair) -> Opinion | None:
    """What both orders say: mean ratings, and a winner where they agree on it; None where one of them says nothing."""
    opinions = [look.opinion for look in pair.looks if look.opinion]
    if len(opinions) < 2:
        return None
    one, other = opinions
    return Opinion(
        one.winner if one.winner == other.winner else "tie",
        one.alignment_winner if one.alignment_winner == other.alignment_winner else "tie",
        {d: (one.a[d] + other.a[d]) / 2 for d in DIMENSIONS},
        {d: (one.b[d] + other.b[d]) / 2 for d in DIMENSIONS},
    )


def summarise(record: PairRecord, pairs: Sequence[Pair]) -> None:
    """Fill in what a judge's opinions come to."""
    found = [(pair, opinion) for pair in pairs if (opinion := settled(pair))]
    users = [pair.user for pair, _ in found]
    record.compared = len(found)
    record.failed = sum(
        any(look.rating.outcome == "failed" or not look.rating.final for look in pair.looks) for pair in pairs
    )
    record.status = "partial" if record.failed else "complete"
    opinions = [opinion for _, opinion in found]
    record.metrics = shares(opinions, users)
    for d in DIMENSIONS:
        a, b = [opinion.a[d] for opinion in opinions], [opinion.b[d] for opinion in opinions]
        record.metrics["a"][d], record.metrics["b"][d] = mean(a, users, (1, 5)), mean(b, users, (1, 5))
        record.metrics["b-a"][d] = mean([y - x for x, y in zip(a, b, strict=True)], users, (-4, 4))
    looked = [(look, look.opinion) for pair, _ in found for look in pair.looks if look.opinion]
    same = [float(len({look.opinion.winner for look in pair.looks if look.opinion}) == 1) for pair, _ in found]
    decided = [float(o.winner == look.first) for look, o in looked if o.winner != "tie"]
    by_user = [pair.user for pair, _ in found for look in pair.looks if look.opinion and look.opinion.winner != "tie"]
    record.metrics["both"] |= {"orders_agree": mean(same, users), "first_wins": mean(decided, by_user)}


def shares(opinions: Sequence[Opinion], users: Sequence[str]) -> dict[str, dict[str, MetricValue]]:
    """How often each side wins, and how often neither does."""
    found: dict[str, dict[str, MetricValue]] = {"a": {}, "b": {}, "both": {}, "b-a": {}}
    for name, choices in (
        ("win", [opinion.winner for opinion in opinions]),
        ("alignment_win", [opinion.alignment_winner for opinion in opinions]),
    ):
        voted = [(choice, user) for choice, user in zip(choices, users, strict=True) if choice is not None]
        of = [user for _, user in voted]
        won = {side: [float(choice == side) for choice, _ in voted] for side in ("a", "b", "tie")}
        found["a"][name], found["b"][name] = mean(won["a"], of), mean(won["b"], of)
        found["both"][name.replace("win", "tie")] = mean(won["tie"], of)
        found["b-a"][name] = mean([y - x for x, y in zip(won["a"], won["b"], strict=True)], of, (-1, 1))
    return found


def mean(values: Sequence[float], users: Sequence[str], bounds: Bounds = UNIT) -> MetricValue:
    if not values:
        return MetricValue(value=None, n=0, note="no pair has an opinion")
    low, high = (None if math.isnan(end) else end for end in mean_interval(values, users, bounds))
    return MetricValue(value=sum(values) / len(values), n=len(values), low=low, high=high)
