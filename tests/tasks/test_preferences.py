"""PrefEval and PersonaMem on small files of the authors' shapes: prompts, choices, what is read of answers, what a judge is asked."""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from chat_server import Server, serving

from harness.data import Message
from harness.errors import DataMissing, UsageError
from harness.method import Retrieval
from harness.plugins.options import build_task
from harness.plugins.registry import task_class
from harness.task import Rating, Sample, Selection, Task

WHOLE = Retrieval("profile", k=1000)


def prefeval_files(folder: Path, count: int = 10) -> Path:
    """`benchmark_dataset` with one topic, made up."""
    base = [
        {"preference": f"I dislike thing {n}.", "question": f"What about {n}?", "explanation": "."}
        for n in range(count)
    ]
    options = [[f"option {n} {way}" for way in ("good", "bad", "worse", "worst")] for n in range(count)]
    chosen = [
        {
            "query": f"query {n}",
            "assistant_options": f"1. x 2. y {n}",
            "user_selection": f"x {n}",
            "assistant_acknowledgment": "ok",
        }
        for n in range(count)
    ]
    talk = [{str(t): {"user": f"u{t} {n}", "assistant": f"a{t} {n}"} for t in range(2)} for n in range(count)]
    between = [{"conversation": [{"role": r, "content": f"{r} {n}"} for r in ("user", "assistant")]} for n in range(5)]
    files: Mapping[str, Any] = {
        "explicit_preference/pets.json": base,
        "mcq_options/pets.json": [
            {**row, "classification_task_options": four} for row, four in zip(base, options, strict=True)
        ],
        "implicit_preference/choice-based/pets.json": [
            {**row, "conversation": turns} for row, turns in zip(base, chosen, strict=True)
        ],
        "implicit_preference/persona-driven/pets.json": [
            {**row, "persona": "p", "conversation": turns} for row, turns in zip(base, talk, strict=True)
        ],
        "filtered_inter_turns.json": between,
    }
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(content))
    return folder


def task(name: str, data: Path, *settings: str) -> Task:
    return build_task(task_class(name), name, settings, str(data))[0]


def shown(task: Task, number: int = 0) -> tuple[Message, ...]:
    """The official prompt of an item: all of the history."""
    turns = WHOLE.prompt(task.items(Selection())[number].example).render()
    assert isinstance(turns, tuple)
    return turns


def digest(prompts: Sequence[Sequence[Message]]) -> str:
    turns = [[[turn.role, turn.content] for turn in prompt] for prompt in prompts]
    return hashlib.sha256(json.dumps(turns).encode()).hexdigest()[:16]


@pytest.mark.parametrize(
    ("form", "roles"), [("explicit", 2), ("choice", 4), ("persona", 4)], ids=["explicit", "choice", "persona"]
)
def test_a_preference_is_history_and_what_is_talked_about_in_between_stands_behind_it(
    tmp_path: Path, form: str, roles: int
) -> None:
    asked = task("prefeval", prefeval_files(tmp_path), f"form={form}", "turns=3")
    (item, *_) = asked.items(Selection())
    turns = shown(asked)
    assert [turn.role for turn in turns] == ["system", *["user", "assistant"] * (roles // 2 + 3), "user"]
    assert turns[roles + 1].content == "user 0" and turns[-1].content.startswith("What about 0?")
    assert len(item.example.user.history) == roles // 2 + 3
    (system, question) = item.example.prompt().render()
    assert (system.role, question) == ("system", turns[-1])  # who does not know the user is asked the same
    newest = Retrieval("recency", k=1).prompt(item.example).render()
    assert [turn.content for turn in newest[1:-1]] == ["user 2", "assistant 2"]


OFFICIAL = {"explicit": "42b58f38220e41dc", "choice": "6f27d2a2e0b4dd38", "persona": "42e2499673df7806"}
"""Hashes of what the authors' code makes of these ten items (its chat form, three turns between, options shuffled by its seed)."""


@pytest.mark.parametrize("form", OFFICIAL)
def test_ten_prompts_are_those_of_the_authors_code(tmp_path: Path, form: str) -> None:
    asked = task("prefeval", prefeval_files(tmp_path), f"form={form}", "turns=3")
    assert digest([shown(asked, n) for n in range(10)]) == OFFICIAL[form]


def test_the_right_option_is_the_one_that_keeps_to_the_preference(tmp_path: Path) -> None:
    asked = task("prefeval", prefeval_files(tmp_path), "remind=true")
    for item in asked.items(Selection()):
        letter = item.targets[0][len("<choice>")]
        good = next(line for line in item.example.text.splitlines() if line.endswith("good"))
        assert good.startswith(f"{letter}. ") and item.targets[0] in item.example.choices
        assert "consistent with my preference" in item.example.text
    letters = {item.targets[0] for item in asked.items(Selection())}
    assert len(letters) > 1
    sample = Sample("pets/0", "pets/0", response=asked.items(Selection())[0].targets[0])
    graded = asked.grade(replace(sample, targets=asked.items(Selection())[0].targets))
    assert graded.metrics == {"correct": 1.0} and asked.aggregate([graded])["accuracy"].value == 1
    wrong = asked.grade(replace(graded, response="I cannot choose"))
    assert (wrong.parsed, wrong.metrics) == (None, {"correct": 0.0})


def test_a_judge_reads_answers_for_four_questions_and_followed_is_helpful_and_not_violated(tmp_path: Path) -> None:
    asked = task("prefeval_generation", prefeval_files(tmp_path))
    about = {"preference": "I dislike {answer}.", "question": "What now?"}
    sample = Sample("pets/0", "pets/0", response="Try this {question}.", extra=about)
    questions = asked.to_judge(sample)
    assert list(questions) == ["acknowledged", "hallucinated", "violated", "helpful"]
    assert (
        "I dislike {answer}." in questions["violated"].prompt and "Try this {question}." in questions["violated"].prompt
    )
    for violated, helpful, followed in ((10, 90, 1.0), (80, 90, 0.0), (10, 20, 0.0), (80, 20, 0.0)):
        scores = {"acknowledged": 0, "hallucinated": 0, "violated": violated, "helpful": helpful}
        rated = replace(sample, ratings={name: Rating("rated", float(score)) for name, score in scores.items()})
        assert asked.grade(rated).metrics["followed"] == followed
    unrated = asked.grade(replace(sample, ratings={"helpful": Rating("unparsable")}))
    assert unrated.metrics["followed"] is None
    found = asked.aggregate([unrated, asked.grade(rated)])["followed"]
    assert (found.value, found.n, found.note) == (0.0, 1, "1 of 2 have no rating and are left out")


def test_prefeval_runs_with_and_without_a_judge(
    harness: Callable[[str], Any], toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    prefeval_files(tmp_path / "data", 3)
    common = "--data data --limit 3 --output_path kept"
    chosen = harness(f"run --method rag --task prefeval --model tiny --set retriever=profile {common}")
    assert chosen.code == 0, chosen.err
    assert "accuracy" in chosen.out
    answered = f"run --method plain --task prefeval_generation --model {toy} --max_new_tokens 3 {common}"
    assert "no judge was asked" in harness(answered).out
    with serving(Server(writes=lambda prompt: "80")) as server:
        judged = harness(f"{answered} --judge openai/m --judge_base_url {server.url}")
    assert judged.code == 0, judged.err
    assert re.search(r"followed +[01]\.\d+ .* 3\n", judged.out) and "hallucinated" in judged.out


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda root: (root / "mcq_options/pets.json").write_text("[]"),
            "mcq_options/pets.json has 0 rows, the preferences",
        ),
        (
            lambda root: (root / "explicit_preference/pets.json").write_text(json.dumps([{"question": "x"}] * 10)),
            "field preference is missing",
        ),
        (lambda root: (root / "filtered_inter_turns.json").write_text("[]"), "has 0 exchanges; turns=3 were asked for"),
    ],
)
def test_files_of_prefeval_that_are_not_whole_are_one_line(
    tmp_path: Path, change: Callable[[Path], object], words: str
) -> None:
    change(prefeval_files(tmp_path))
    with pytest.raises(DataMissing, match=words):
        task("prefeval", tmp_path, "turns=3").items(Selection())


def test_what_prefeval_does_not_have_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataMissing, match=r"no data given; the LICENSE file of github.com/amazon-science/PrefEval"):
        build_task(task_class("prefeval"), "prefeval", [], None)[0].items(Selection())
    with pytest.raises(UsageError, match="has no topic 'pests'; did you mean 'pets'"):
        task("prefeval", prefeval_files(tmp_path), "topic=pests").items(Selection())
    with pytest.raises(UsageError, match="has no split 'train'; it has dev alone"):
        task("prefeval", tmp_path).items(Selection("train"))


# PersonaMem


TURNS = [
    ("system", "Persona: Ann"),
    ("user", "I like tea."),
    ("assistant", "Noted."),
    ("user", "And milk."),
    ("user", "Not now."),
]


def personamem_files(folder: Path, count: int = 10) -> Path:
    turns = [{"role": role, "content": content} for role, content in TURNS]
    (folder / "shared_contexts_32k.jsonl").write_text(json.dumps({"c1": turns}) + "\n")
    with (folder / "questions_32k.csv").open("w", newline="") as file:
        names = "persona_id question_id question_type topic user_question_or_message correct_answer all_options"
        writer = csv.DictWriter(file, [*names.split(), "shared_context_id", "end_index_in_shared_context"])
        writer.writeheader()
        for n in range(count):
            options = str([f"({letter}) It's {letter} {n}." for letter in "abcd"])
            row = [n % 2, f"q{n}", f"type{n % 2}", "tea", f"What, {n}?", f"({'abcd'[n % 4]})", options, "c1", n % 5 + 1]
            writer.writerow(dict(zip(writer.fieldnames, row, strict=True)))
    return folder


def test_a_question_sees_its_context_up_to_its_index_with_system_turns_written_into_the_next(tmp_path: Path) -> None:
    asked = task("personamem", personamem_files(tmp_path))
    items = asked.items(Selection())
    assert [len(item.example.user.history) for item in items[:5]] == [1, 2, 2, 3, 4]
    turns = shown(asked, 4)
    assert [turn.role for turn in turns] == ["user", "assistant", "user"]
    assert turns[0].content == "[System]: Persona: Ann\nI like tea."
    assert turns[2].content.startswith("And milk.\nNot now.\nWhat, 4?\n\nFind the most appropriate")
    assert turns[2].content.endswith("""\n\n["(a) It's a 4.", "(b) It's b 4.", "(c) It's c 4.", "(d) It's d 4."]""")
    assert items[4].example.choices == ("(a)", "(b)", "(c)", "(d)") and items[4].targets == ("(a)",)


def test_ten_prompts_of_personamem_are_those_of_the_authors_code(tmp_path: Path) -> None:
    asked = task("personamem", personamem_files(tmp_path))
    assert digest([shown(asked, n) for n in range(10)]) == "6e924aa9153cca23"


@pytest.mark.parametrize(
    ("said", "correct"),
    [
        ("(b)", 1.0),
        ("I think <final_answer> (b)</final_answer>", 1.0),
        ("(a) is wrong. <final_answer>(b)", 1.0),
        ("<final_answer>(a), (b)", 0.0),
        ("<final_answer>none; but b", 1.0),
        ("nothing", 0.0),
    ],
)
def test_a_reply_is_read_as_the_official_code_reads_it(tmp_path: Path, said: str, correct: float) -> None:
    asked = task("personamem", personamem_files(tmp_path), "answer=text")
    graded = asked.grade(Sample("q1", "1", response=said, targets=("(b)",)))
    assert graded.metrics == {"correct": correct}
    assert not asked.items(Selection())[0].example.choices
    assert list(asked.aggregate([graded])) == ["accuracy", "accuracy/type1"]


def test_files_of_personamem_that_are_not_whole_are_one_line(tmp_path: Path) -> None:
    personamem_files(tmp_path)
    path = tmp_path / "questions_32k.csv"
    path.write_text(path.read_text().replace(",c1,", ",c2,", 1))
    with pytest.raises(DataMissing, match=r"row 1: shared_contexts_32k.jsonl has no context 'c2' up to 1"):
        task("personamem", tmp_path).items(Selection())
    with pytest.raises(DataMissing, match=r"has no questions_128k.csv; .*'hf download bowen-upenn/PersonaMem"):
        task("personamem", tmp_path, "size=128k").items(Selection())


def test_a_quote_that_is_not_closed_swallows_no_questions_of_personamem(tmp_path: Path) -> None:
    path = personamem_files(tmp_path) / "questions_32k.csv"
    path.write_text(path.read_text() + '"open,a,b\n' + "lost,a,b\n")
    with pytest.raises(DataMissing, match=r"questions_32k.csv, line \d+: not valid CSV .*is a quote not closed"):
        task("personamem", tmp_path).items(Selection())


def test_personamem_runs(harness: Callable[[str], Any], toy: Path, tmp_path: Path) -> None:
    personamem_files(tmp_path)
    done = harness(f"run --method rag --task personamem --model {toy} --data . --limit 4 --output_path kept --set k=2")
    assert done.code == 0, done.err
    assert "accuracy/type0" in done.out
