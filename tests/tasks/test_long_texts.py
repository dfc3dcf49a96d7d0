"""LongLaMP and LaMP-QA on small files of the authors' shapes: files, prompts, histories as lessons, what is measured."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from chat_server import Server, serving
from pyarrow import parquet

from harness.errors import DataMissing, UsageError
from harness.method import Retrieval
from harness.plugins.options import build_task
from harness.plugins.registry import task_class
from harness.task import Rating, Sample, Selection, Task

PARTS = {
    "abstract": "abstract_generation",
    "topic": "topic_writing",
    "review": "product_review",
}
USERS = {"abstract": "name", "topic": "author", "review": "reviewerId"}
PROFILES: Mapping[str, Callable[[int], dict[str, Any]]] = {
    "abstract": lambda n: {
        "title": f"title {n}",
        "abstract": " ".join(f"word{n}-{i}" for i in range(748 + n)),
        "year": 2000,
    },
    "topic": lambda n: {"summary": f"summary {n}", "content": f"content {n}", "author": "x"},
    "review": lambda n: {
        "overall": 5.0 - n,
        "summary": f"sum {n}",
        "description": f"thing {n}",
        "reviewText": f"good {n}",
    },
}
INPUTS: Mapping[str, Callable[[int], str]] = {
    "abstract": lambda n: f'Generate an abstract for the title "T{n}" using the following items: 1. word{n % 4}-1 2. b',
    "topic": lambda n: f"Generate the content for a reddit post summary {n}",
    "review": lambda n: f"Generate the review text of thing {n}",
}


def rows(kind: str, count: int = 10) -> list[dict[str, Any]]:
    profile = [PROFILES[kind](n) for n in range(4)]
    return [
        {USERS[kind]: f"user {n % 3}", "input": INPUTS[kind](n), "output": f"a long text {n}", "profile": profile}
        for n in range(count)
    ]


def longlamp_files(folder: Path, kind: str, setting: str = "user") -> Path:
    """As the hub has them: shards of parquet."""
    part = folder / f"{PARTS[kind]}_{setting}"
    part.mkdir(parents=True)
    made = rows(kind)
    for shard, piece in enumerate((made[:6], made[6:])):
        parquet.write_table(pyarrow.Table.from_pylist(piece), part / f"val-0000{shard}-of-00002.parquet")
    (part / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    return folder


def task(name: str, data: Path, *settings: str) -> Task:
    return build_task(task_class(name), name, settings, str(data))[0]


def prompt(example: Any, k: int = 4) -> str:
    (turn,) = Retrieval("profile", k=k).prompt(example).render()
    assert isinstance(turn.content, str)
    return turn.content


OFFICIAL = {"abstract": "4917bda556c87b8f", "topic": "251cd592d0dbe1fc", "review": "9a351ca37e2bebe0"}
"""Hashes of what the authors' code makes of these ten items with four of the history."""


@pytest.mark.parametrize("kind", PARTS)
def test_ten_prompts_of_longlamp_are_those_of_the_authors_code(tmp_path: Path, kind: str) -> None:
    items = task(f"longlamp:{kind}", longlamp_files(tmp_path, kind)).items(Selection())
    prompts = [prompt(item.example) for item in items]
    assert hashlib.sha256(json.dumps(prompts).encode()).hexdigest()[:16] == OFFICIAL[kind]
    assert prompt(items[0].example, k=0) == INPUTS[kind](0)


@pytest.mark.parametrize("kind", PARTS)
def test_shards_are_read_in_order_and_a_history_is_lessons(tmp_path: Path, kind: str) -> None:
    made = task(f"longlamp:{kind}", longlamp_files(tmp_path, kind))
    items = made.items(Selection())
    assert [item.targets[0] for item in items] == [f"a long text {n}" for n in range(10)]
    assert {item.example.user.id for item in items} == {"user 0", "user 1", "user 2"}
    assert len({item.example.id for item in items}) == 10
    pairs = items[0].example.user.pairs
    assert len(pairs) == 4 and len(pairs[2].example.user.history) == 2 and len(pairs[1:3]) == 2
    assert pairs[3].targets[0] == str(
        PROFILES[kind](3)[{"abstract": "abstract", "topic": "content", "review": "reviewText"}[kind]]
    )
    assert pairs[3].example.text.startswith("Generate the review" if kind == "review" else INPUTS[kind](0)[:15])
    assert len(made.items(Selection("train", limit=2))) == 2 and made.fingerprint(Selection()) != made.fingerprint(
        Selection("train")
    )


def test_shards_that_are_not_all_of_one_set_are_refused(tmp_path: Path) -> None:
    folder = longlamp_files(tmp_path, "topic")
    (*others, last) = sorted(folder.rglob("val-*.parquet"))
    kept = last.read_bytes()
    last.unlink()
    with pytest.raises(
        DataMissing, match=rf"has {len(others)} files val-\*-of-.*, which are not all of one set; .*hf download"
    ):
        task("longlamp:topic", folder).items(Selection())
    last.write_bytes(kept)
    (last.parent / "val-00000-of-00001.parquet").write_bytes(kept)
    with pytest.raises(DataMissing, match=r"of-00001 and -of-0000.*not all of one set"):
        task("longlamp:topic", folder).items(Selection())


def test_what_is_searched_with_is_the_list_of_items(tmp_path: Path) -> None:
    item, *_ = task("longlamp:abstract", longlamp_files(tmp_path, "abstract")).items(Selection())
    assert item.example.query == "1. word0-1 2. b"
    (best,) = Retrieval("bm25", k=1).prompt(item.example).items
    assert best.fields["title"] == "title 0"


def test_the_temporal_setting_is_other_files(tmp_path: Path) -> None:
    longlamp_files(tmp_path, "topic", "temporal")
    assert len(task("longlamp:topic", tmp_path, "setting=temporal").items(Selection())) == 10
    with pytest.raises(DataMissing, match=r"has no topic_writing_user/val-\*.parquet.*'hf download LongLaMP/LongLaMP"):
        task("longlamp:topic", tmp_path).items(Selection())


def test_longlamp_is_measured_by_rouge_and_meteor(tmp_path: Path) -> None:
    made = task("longlamp:topic", longlamp_files(tmp_path, "topic"))
    graded = made.grade(Sample("val/1", "user 0", response="a long text", targets=("a long text 0",)))
    assert graded.metrics["rouge1"] == pytest.approx(2 * 3 / 7)
    assert list(made.aggregate([graded])) == ["rouge1", "rougeL", "meteor", "meteor_unsplit"]


def test_the_hub_is_not_asked_where_it_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def offline(*_: object, **__: object) -> None:
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    monkeypatch.delenv("HARNESS_LONGLAMP", raising=False)
    made = build_task(task_class("longlamp:review"), "longlamp:review", [], None)[0]
    with pytest.raises(
        DataMissing, match=r"cannot load LongLaMP/LongLaMP \(product_review_user, val\).*ConnectionError.*hf download"
    ):
        made.items(Selection())


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("val.jsonl", '{"author": "a", "input": "x"}', r"row 1: field output is missing or no text"),
        ("val.jsonl", '{"author": "a", "input": "x", "output": "y"}', "row 1: field profile should be a list"),
        (
            "val.jsonl",
            '{"author": "a", "input": "x", "output": "y", "profile": [{}]}',
            "row 1: field summary or input is missing",
        ),
        ("val.jsonl", "[1]", "row 1: expected an object, found list"),
        ("val.jsonl", "{", "val.jsonl, line 1: not valid JSON"),
        ("val.parquet", "PAR1", "val.parquet is no parquet file"),
    ],
)
def test_rows_that_are_not_as_they_should_be_are_one_line(tmp_path: Path, name: str, content: str, words: str) -> None:
    (tmp_path / "topic_writing_user").mkdir()
    (tmp_path / "topic_writing_user" / name).write_text(content)
    with pytest.raises(DataMissing, match=words) as caught:
        task("longlamp:topic", tmp_path).items(Selection())
    assert "\n" not in str(caught.value)


def test_a_task_that_longlamp_does_not_have_is_named() -> None:
    with pytest.raises(UsageError, match="longlamp has no task 'topics'; did you mean 'topic'"):
        task_class("longlamp:topics")
    with pytest.raises(UsageError, match="say which task, as in longlamp:topic"):
        task_class("longlamp")()


def test_longlamp_runs_from_the_command_line(harness: Callable[[str], Any], toy: Path, tmp_path: Path) -> None:
    longlamp_files(tmp_path, "topic")
    common = f"--task longlamp:topic --model {toy} --data . --limit 3 --max_new_tokens 3 --output_path kept"
    done = harness(f"run --method rag {common} --set k=2")
    assert done.code == 0, done.err
    assert "rouge1" in done.out
    assert "10 items of 3 users" in harness("data check longlamp:topic --data .").out
    assert "LongLaMP/LongLaMP" in harness("data get longlamp:topic").error()


# LaMP-QA


def lampqa_files(folder: Path, count: int = 3) -> Path:
    aspects = [{"aspect": f"aspect {i}", "reason": f"reason {i}", "evidence": f"evidence {i}"} for i in range(2)]
    made = [
        {
            "id": f"q{n}",
            "question": f"How about {n}?",
            "narrative": f"I am told {n}.",
            "profile": [{"id": f"p{i}", "text": f"earlier question {i}", "category": "x"} for i in range(3)],
            "rubric_aspects": aspects[: 1 + n % 2],
        }
        for n in range(count)
    ]
    (folder / "Society_and_Culture_validation.json").write_text(json.dumps(made))
    return folder


def test_each_aspect_is_a_question_to_the_judge_and_their_mean_is_the_score(tmp_path: Path) -> None:
    made = task("lamp_qa", lampqa_files(tmp_path), "category=Society_and_Culture")
    items = made.items(Selection())
    assert [len(item.targets) for item in items] == [1, 2, 1]
    assert "I am told" not in prompt(
        items[0].example
    )  # the narrative is what the judge knows, not what the model reads
    assert "earlier question 2" in prompt(items[0].example) and "earlier" not in prompt(items[0].example, k=0)
    sample = Sample(
        "q1", "q1", response="An answer {aspect}.", targets=items[1].targets, extra={"question": "Q", "narrative": "N"}
    )
    asked = made.to_judge(sample)
    assert list(asked) == ["aspect 1", "aspect 2"]
    assert all(
        word in asked["aspect 2"].prompt for word in ("aspect 1", "reason 1", "evidence 1", "An answer {aspect}.")
    )
    rated = replace(sample, ratings={"aspect 1": Rating("rated", 100.0), "aspect 2": Rating("rated", 50.0)})
    assert made.grade(rated).metrics == {"aspects": 0.75}
    half = made.grade(replace(sample, ratings={"aspect 1": Rating("rated", 100.0)}))
    assert half.metrics == {"aspects": None}
    found = made.aggregate([half, made.grade(rated)])["aspects"]
    assert (found.value, found.n, found.note) == (0.75, 1, "1 of 2 lack a rating and are left out")


def test_lamp_qa_runs_with_a_judge(
    harness: Callable[[str], Any], toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lampqa_files(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    common = f"--task_set category=Society_and_Culture --model {toy} --data . --limit 3 --max_new_tokens 3 --output_path kept"
    with serving(Server()) as server:
        done = harness(f"run --method rag --task lamp_qa {common} --judge openai/m --judge_base_url {server.url}")
    assert done.code == 0, done.err
    assert re.search(r"aspects +[01]\.\d+ .* 3\n", done.out)
