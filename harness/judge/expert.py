"""ExPerT: what an answer and the user's own text speak about, aspect by aspect, and whether content and manner agree.

Paper: Salemi, Killingback and Zamani, ExPerT: Effective and Explainable Evaluation of Personalized Long-Form Text Generation,
2501.14956. Code read: the package expert-score 0.0.1 (alirezasalemi7/ExPerT). A language model lists the aspects of the answer
and of the reference, each with its sentences; looks for each aspect's counterpart in the other list; and says of each two that
belong together whether their sentences agree in content, and in style. Recall is over the reference's aspects, precision over the
answer's, and each score the harmonic mean of both:
    content, style, both, either, average (half a point for content, half for style)
Differs from that code: prompts are ours, shorter, and ask for a counterpart's number instead of its title; a reply that cannot be
read is asked for once (there: up to 100 times at rising temperature) and then counts as no counterpart, as there, and is counted;
an answer or reference whose aspects cannot be read is missing. The package itself needs vLLM to be imported at all.
Of both texts the first 512 words are read.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

from harness.errors import UsageError
from harness.files import replace_file, writing
from harness.files.json_files import parse
from harness.judge.grading import ledger
from harness.judge.judges import Heard, Judge, ModelJudge
from harness.judge.pairwise import mean
from harness.method import Progress
from harness.plugins.options import rebuild_task
from harness.plugins.registry import task_class
from harness.records.schema import Judging, MetricValue, hash_of, json_value
from harness.records.store import read_record, read_samples, safe_name
from harness.servers.chat import Ask, NoReply
from harness.task import Sample, Selection

Side: TypeAlias = Literal["reference", "answer"]
SCORES = ("content", "style", "both", "either", "average")
WORDS = 512
TOKENS = {"aspects": 2048, "match": 128, "agree": 128}

ASPECTS = """A person made the request below, and a text was written for it. List the aspects of the text: single points, ideas or \
judgements that it makes, each once, all of them. Give each a title of a few words, one sentence that describes it, and the \
sentences of the text that show it, word for word, at least one.

REQUEST
<request>

TEXT
<text>

Reply with a JSON list and nothing else: [{"aspect": "<title>", "description": "<sentence>", "evidence": ["<sentence>", ...]}, ...]"""
MATCH = """Here is one aspect of a text, and a numbered list of aspects of another text. Which one of the list is about the same thing?

ASPECT
<one>

LIST
<list>

Reply with a JSON object and nothing else: {"match": <number of the best one, 0 where none is>, "reason": "<short>"}"""
CONTENT = """Two texts speak about the aspect below. Do these sentences of theirs say the same about it: the same ideas, meaning and \
emphasis? Other wording alone is no difference.

ASPECT
<one>

SENTENCES OF THE FIRST
<first>

SENTENCES OF THE SECOND
<second>

Reply with a JSON object and nothing else: {"agree": <true or false>, "reason": "<short>"}"""
STYLE = """Are these two groups of sentences written in the same manner? Look at tone, choice of words, build of sentences and \
flow, not at what they say.

FIRST
<first>

SECOND
<second>

Reply with a JSON object and nothing else: {"agree": <true or false>, "reason": "<short>"}"""


@dataclass(frozen=True)
class Aspect:
    aspect: str
    description: str
    evidence: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.aspect}: {self.description}"


@dataclass
class Found:
    """What became of one aspect."""

    aspect: Aspect
    match: int | None = None
    """Place of its counterpart in the other list."""
    content: bool = False
    style: bool = False


@dataclass
class Judged:
    """One sample: the aspects of both texts, and what they come to. One entry of expert.json."""

    id: str
    user: str
    reference: list[Found] = field(default_factory=list)
    answer: list[Found] = field(default_factory=list)
    scores: dict[str, float] = field(default_factory=dict)
    """Empty where the sample is missing."""
    unread: int = 0
    """Replies that could not be read and counted as no counterpart or no agreement."""
    problem: str = ""
    """Why it is missing."""

    def side(self, side: Side) -> list[Found]:
        return self.reference if side == "reference" else self.answer


def scores(reference: Sequence[Found], answer: Sequence[Found]) -> dict[str, float]:
    """The five F1 values of two lists of aspects; 0 where one of them is empty."""
    found = {}
    for name in SCORES:
        recall, precision = (_share(side, name) for side in (reference, answer))
        found[name] = 2 * recall * precision / (recall + precision) if recall + precision else 0.0
    return found


def _share(side: Sequence[Found], name: str) -> float:
    def worth(one: Found) -> float:
        content, style = one.match is not None and one.content, one.match is not None and one.style
        each = {"content": content, "style": style, "both": content and style, "either": content or style}
        return (content + style) / 2 if name == "average" else float(each[name])

    return sum(map(worth, side)) / len(side) if side else 0.0


def judge_run(
    run: Path,
    judge: Judge,
    *,
    limit: int | None = None,
    data: str | None = None,
    progress: Progress = lambda label, done, total: None,
) -> tuple[Path, dict[str, Any]]:
    """Every answered sample with a reference, judged; what was found lies in expert.json of the folder that is given back.

    Replies are kept one by one as they arrive: what stops in between is gone on with. Raises UsageError for a judge that rates by
    word lists, a run without references, or `data` that it did not read.
    """
    if not isinstance(judge, ModelJudge):
        raise UsageError(f"judge {judge.config.name!r} cannot list aspects; give openai/<model> or hf/<model>")
    record = read_record(run)
    read = record.config
    task = rebuild_task(task_class(read.task.name), read.task.options, data)
    chosen = Selection(read.data.split, read.selection.limit, read.selection.users, frozenset(record.held_out_users))
    if task.fingerprint(chosen) != read.data.fingerprint:
        raise UsageError(f"{task.describe_data()}: the run read other data ({read.data.description}); give its --data")
    requests = {item.example.id: item.example.text for item in task.items(Selection(read.data.split))}
    samples = [
        s for s in read_samples(run) if s.error is None and s.response is not None and s.targets and s.id in requests
    ]
    if not samples:
        raise UsageError(f"{run} has no answered sample with a reference, so there is nothing to compare")
    rounds = _Rounds(judge, record.hash, progress)
    start = time.perf_counter()
    judged = rounds.judged(samples[:limit], requests)
    judging = ledger([heard.rating("rated") for heard in rounds.heard], judge)
    judging.mode, judging.seconds = "text", time.perf_counter() - start
    return _write(run, record.hash, judge, judged, judging)


class _Rounds:
    """The questions, round by round: each round's are all asked at once."""

    def __init__(self, judge: ModelJudge, payer: str, progress: Progress) -> None:
        self.judge, self.payer, self.progress = judge, payer, progress
        self.heard: list[Heard] = []

    def judged(self, samples: Sequence[Sample], requests: Mapping[str, str]) -> list[Judged]:
        made = {sample.id: Judged(sample.id, sample.user) for sample in samples}
        texts: dict[tuple[str, Side], str] = {}
        for sample in samples:
            texts[sample.id, "reference"] = " ".join(sample.targets[0].split()[:WORDS])
            texts[sample.id, "answer"] = " ".join((sample.response or "").split()[:WORDS])
        self._aspects(made, {key: text for key, text in texts.items() if text}, requests)
        whole = [one for one in made.values() if not one.problem]
        self._matches(whole)
        self._agreements(whole)
        for one in whole:
            if not one.problem:
                one.scores = scores(one.reference, one.answer)
        return list(made.values())

    def _aspects(
        self, made: Mapping[str, Judged], texts: Mapping[tuple[str, Side], str], requests: Mapping[str, str]
    ) -> None:
        keys = list(texts)
        prompts = [_filled(ASPECTS, request=requests[i], text=texts[i, side]) for i, side in keys]
        for (i, side), said in zip(keys, self._ask(prompts, "aspects", _aspects_in), strict=True):
            if isinstance(said, list):
                made[i].side(side)[:] = [Found(aspect) for aspect in said]
            else:
                made[i].problem = said if isinstance(said, str) else f"no aspects of the {side} in the judge's reply"

    def _matches(self, judged: Sequence[Judged]) -> None:
        asked: list[tuple[Judged, Found, int]] = []
        prompts = []
        for one in judged:
            for mine, other in ((one.reference, one.answer), (one.answer, one.reference)):
                for found in mine if other else ():
                    listed = "\n".join(f"{n}. {each.aspect}" for n, each in enumerate(other, start=1))
                    asked.append((one, found, len(other)))
                    prompts.append(_filled(MATCH, one=str(found.aspect), list=listed))
        for (one, found, count), said in zip(asked, self._ask(prompts, "match", _match_in), strict=True):
            if isinstance(said, str):
                one.problem = said
            elif said is None or not 0 <= said <= count:
                one.unread += 1
            elif said:
                found.match = said - 1

    def _agreements(self, judged: Sequence[Judged]) -> None:
        asked: list[tuple[Judged, Found, Literal["content", "style"]]] = []
        prompts = []
        for one in judged:
            for mine, other in ((one.reference, one.answer), (one.answer, one.reference)):
                for found in mine:
                    if found.match is not None:
                        first, second = ("\n".join(a.evidence) for a in (found.aspect, other[found.match].aspect))
                        words = {"one": str(found.aspect), "first": first, "second": second}
                        prompts += [_filled(CONTENT, **words), _filled(STYLE, **words)]
                        asked += [(one, found, "content"), (one, found, "style")]
        for (one, found, what), said in zip(asked, self._ask(prompts, "agree", _agreement_in), strict=True):
            if isinstance(said, str):
                one.problem = said
            elif said is None:
                one.unread += 1
            elif what == "content":
                found.content = said
            else:
                found.style = said

    def _ask(self, prompts: Sequence[str], what: str, read: Callable[[str], Any]) -> list[Any]:
        """What `read` makes of each reply: None where it cannot be read, words where none came."""
        asks = [Ask((("user", prompt),), TOKENS[what]) for prompt in prompts]
        heard = self.judge.ask(
            asks, self.payer, self.progress, lambda reply: "" if read(reply.answer) is not None else reply.fault
        )
        self.heard += heard
        return [
            f"no reply: {one.reply.reason}" if isinstance(one.reply, NoReply) else read(one.reply.answer)
            for one in heard
        ]


def _aspects_in(text: str) -> list[Aspect] | None:
    """None where the reply is no list of aspects, or one has no evidence."""
    said = _json(text, "[", "]")
    try:
        found = [Aspect(each["aspect"], each["description"], tuple(each["evidence"])) for each in said]
        if any(isinstance(each["evidence"], str) for each in said):  # would be its letters
            return None
    except (TypeError, KeyError):
        return None
    whole = all(a.evidence and all(isinstance(s, str) for s in (a.aspect, a.description, *a.evidence)) for a in found)
    return found if found and whole else None


def _match_in(text: str) -> int | None:
    said = _json(text, "{", "}")
    number = said.get("match") if isinstance(said, Mapping) else None
    return number if isinstance(number, int) and not isinstance(number, bool) else None


def _agreement_in(text: str) -> bool | None:
    said = _json(text, "{", "}")
    agree = said.get("agree") if isinstance(said, Mapping) else None
    return agree if isinstance(agree, bool) else None


def _json(text: str, opens: str, closes: str) -> Any:
    """The value between the first `opens` and the last `closes`; None where that is no JSON."""
    start, end = text.find(opens), text.rfind(closes)
    try:
        return parse(text[start : end + 1], surrogates=True) if 0 <= start < end else None
    except ValueError:
        return None


def _filled(prompt: str, **words: str) -> str:
    return re.sub(r"<(request|text|one|list|first|second)>", lambda slot: words.get(slot[1], slot[0]), prompt)


def _write(
    run: Path, run_hash: str, judge: ModelJudge, judged: Sequence[Judged], judging: Judging
) -> tuple[Path, dict[str, Any]]:
    done = [one for one in judged if one.scores]
    users = [one.user for one in done]
    metrics: dict[str, MetricValue] = {name: mean([one.scores[name] for one in done], users) for name in SCORES}
    config = {"run": run_hash, "judge": judge.config.model_dump(mode="json", exclude={"base_url"}), "version": 1}
    content = {
        "config": config,
        "metrics": {name: value.model_dump(mode="json") for name, value in metrics.items()},
        "samples": len(judged),
        "missing": sum(not one.scores for one in judged),
        "unread": sum(one.unread for one in judged),
        "judging": judging.model_dump(mode="json"),
        "judged": [asdict(one) for one in judged],
    }
    folder = run.parent / f"expert-{safe_name(run.name)}-{hash_of(config)}"
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(folder / "expert.json", f"{json.dumps(json_value(content), indent=1)}\n".encode())
    return folder, content
