"""LaMP: official prompts and metrics, files in every layout, and errors that name the record."""

from __future__ import annotations

import json
import math
import os
import pickle
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from sklearn.metrics import f1_score, mean_absolute_error, root_mean_squared_error

from harness.data import Example, HistoryItem
from harness.errors import DataMissing, UsageError
from harness.statistics import metrics
from harness.task import Sample, Selection
from harness.tasks import TASKS, lamp_files, lamp_prompts
from harness.tasks.lamp import Lamp, Lamp1, Lamp2M, Lamp2N, Lamp3, Lamp4, Lamp5, Lamp6, Lamp7
from harness.tasks.lamp_export import export_lamp

SHARED = Path(os.environ.get("HARNESS_SHARED", "../shared/data"))
CLASSES: tuple[type[Lamp], ...] = (Lamp1, Lamp2M, Lamp2N, Lamp3, Lamp4, Lamp5, Lamp6, Lamp7)
HEADLINE = "Generate a headline for the following article: "


@pytest.fixture(autouse=True)
def _no_data_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HARNESS_DATA", raising=False)


def question(ident: str = "1", profile: object = (), **changed: object) -> dict[str, Any]:
    return {"id": ident, "input": f"{HEADLINE}A dog ran.", "profile": list(profile)} | changed  # type: ignore[call-overload]


def item(ident: str, **changed: object) -> dict[str, Any]:
    return {"id": ident, "text": f"text {ident}", "title": f"title {ident}"} | changed


def write(folder: Path, questions: object, golds: object = None, split: str = "dev", task: str = "LaMP_4") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    if golds is None and isinstance(questions, list):
        golds = [{"id": entry["id"], "output": "A title"} for entry in questions if "id" in entry]
    (folder / f"{split}_questions.json").write_text(json.dumps(questions))
    (folder / f"{split}_outputs.json").write_text(json.dumps({"task": task, "golds": golds}))
    return folder


def load(folder: Path, task: type[Lamp] = Lamp4, **options: str):
    return task(data=str(folder), **options).items(Selection())


# Prompts


def records(*fields: dict[str, str]) -> list[HistoryItem]:
    return [HistoryItem(str(i), texts, "") for i, texts in enumerate(fields)]


@pytest.mark.parametrize(
    ("task", "text", "items", "prompt"),
    [
        ("lamp1", 'the title "T", which? [1]: "A" [2]: "B"', [{"title": "P"}, {"title": "Q"}],
         'the title, and "P", and "Q" "T", which? [1]: "A" [2]: "B"'),
        ("lamp2n", "X", [{"text": "a", "category": "crime"}, {"text": "b", "category": "travel"}],
         'the category for the article: "a" is "crime" , and the category for the article: "b" is "travel" . X'),
        ("lamp2m", "X", [{"description": "{a}", "tag": "action"}], 'the tag for the movie: "{a}" is "action" . X'),
        ("lamp3", "X", [{"text": "a", "score": "2"}], '2 is the score for "a" . X'),
        ("lamp4", "{text}", [{"text": "a", "title": "t"}], '"t" is the title for "a" . {text}'),
        ("lamp5", "X", [{"abstract": "a", "title": "t"}], '"t" is a title for "a" . Following the given patterns X'),
        ("lamp6", "X", [{"text": "a", "title": "t"}], '"t" is the title for "a" . X'),
        ("lamp7", "X", [{"text": "a"}, {"text": "b"}],
         '"a" , and "b"  are written by a person. Following the given patterns X'),
    ],
)  # fmt: skip
def test_prompts_are_the_official_ones_stray_spaces_included(task, text, items, prompt):
    assert lamp_prompts.prompt_text(task, text, records(*items)) == prompt
    assert lamp_prompts.prompt_text(task, text, []) == text


def test_titles_with_quotes_do_not_break_the_citation_query():
    text = lamp_prompts.FRAMES["lamp1"].format(title='On "x"', first='A "quoted" one', second="B [1]: c")
    assert lamp_prompts.query("lamp1", text) == 'A "quoted" one B [1]: c'


@pytest.mark.parametrize("task", CLASSES, ids=lambda task: task.name)
def test_a_frame_holds_the_text_and_the_query_finds_it(task):
    if task is not Lamp1:
        frame = lamp_prompts.frame(task.name, "an input without a colon")
        assert lamp_prompts.recognise(frame) == task.name
        assert lamp_prompts.query(task.name, frame.replace("{text}", "review: of {x}: y")) == "review: of {x}: y"


# Items


@pytest.mark.parametrize("task", CLASSES, ids=lambda task: task.name)
def test_without_data_the_synthetic_users_are_read_and_named(task):
    lamp = task()
    items = lamp.items(Selection(limit=20))
    assert len(items) == 20
    assert "lamp-mini (synthetic" in lamp.describe_data()
    assert lamp.train_items()[0].example.id != items[0].example.id
    assert all(item.example.query in item.example.text for item in items if task is not Lamp1)
    assert all(item.targets and item.example.user.history for item in items)
    dates = [record.date for record in items[0].example.user.history]
    assert dates == sorted(dates)
    with pytest.raises(UsageError, match="train, dev, test"):
        lamp.items(Selection(split="valid"))


def test_synthetic_users_written_as_files_are_the_same_items(tmp_path):
    from harness.tiny import lamp_mini

    lamp_mini.write(tmp_path)
    for task in CLASSES:
        assert load(tmp_path, task) == task().items(Selection())


@pytest.mark.parametrize("layout", ["LaMP_4/dev", "LaMP_4", "dev", "."])
def test_files_are_found_in_every_layout(tmp_path, layout, monkeypatch):
    write(tmp_path / layout, [question()])
    assert len(load(tmp_path)) == 1
    monkeypatch.setenv("HARNESS_DATA", str(tmp_path))
    assert len(Lamp4().items(Selection())) == 1
    assert str(tmp_path) in Lamp4().describe_data()
    assert "synthetic" in Lamp4(data="lamp-mini").describe_data()


def test_the_two_lamp2_tasks_are_told_apart_by_their_wording(tmp_path):
    movies = [question(input=lamp_prompts.FRAMES["lamp2m"].format(labels="action", text="A film."))]
    news = [question(input=lamp_prompts.FRAMES["lamp2n"].format(labels="crime", text="News."))]
    write(tmp_path / "LaMP_2/new/dev", movies, [{"id": "1", "output": "action"}], task="LaMP_2")
    write(tmp_path / "LaMP_2/dev", news, [{"id": "1", "output": "crime"}], task="LaMP_2")
    assert load(tmp_path, Lamp2M)[0].example.query == "A film."
    assert load(tmp_path, Lamp2N)[0].example.query == "News."
    assert load(tmp_path / "LaMP_2", Lamp2M)[0].targets == ("action",)
    with pytest.raises(DataMissing, match=r"dev_questions.json: record 0 \(id '1'\): field 'input'.*found lamp2n"):
        load(tmp_path / "LaMP_2/dev", Lamp2M)
    write(tmp_path / "odd", [question(input="Which one?")], [{"id": "1", "output": "action"}], task="LaMP_2")
    with pytest.raises(DataMissing, match="found none: 'Which one"):
        load(tmp_path / "odd", Lamp2M)
    assert DataMissing.exit_code == 4


def test_time_split_orders_history_by_date_and_takes_user_ids(tmp_path):
    late, early = item("a", date="2015-10-02"), item("b", date="2015-9-30")
    write(tmp_path / "time/LaMP_4/dev", [question(profile=[late, early], user_id=77)])
    (entry,) = load(tmp_path, split_by="time")
    assert entry.example.user.id == "77"
    assert [record.id for record in entry.example.user.history] == ["b", "a"]
    assert entry.example.user.history[0].fields.keys() == {"text", "title"}


def active(tmp_path: Path, split: str) -> list[str]:
    task = Lamp4(data=str(tmp_path), split_by="time", most_active=2)
    return [item.example.user.id for item in task.items(Selection(split))]


def test_the_most_active_users_are_evaluated_and_the_train_split_is_the_others(tmp_path):
    def asked(ident: str, user: str, items: int) -> dict[str, Any]:
        return question(ident, [item(f"{ident}{n}", date="2015-01-01") for n in range(items)], user_id=user)

    write(
        tmp_path / "time/LaMP_4/dev", [asked("1", "a", 1), asked("2", "b", 3), asked("3", "c", 2), asked("4", "b", 1)]
    )
    write(tmp_path / "time/LaMP_4/train", [asked("5", "a", 9), asked("6", "b", 1), asked("7", "d", 0)], split="train")
    assert active(tmp_path, "dev") == ["b", "c", "b"]
    assert active(tmp_path, "train") == ["a", "d"]
    with pytest.raises(UsageError, match="most_active=0 leaves nobody"):
        Lamp4(most_active=0)


def test_without_a_train_split_the_dev_users_who_are_not_evaluated_can_be_it(tmp_path):
    write(tmp_path / "LaMP_4", [question(str(n), [item(f"{n}{i}") for i in range(n)]) for n in (1, 4, 2, 3)])
    task = Lamp4(data=str(tmp_path), most_active=2, train_from="dev")
    assert [entry.example.id for entry in task.items(Selection("dev"))] == ["4", "3"]
    assert [entry.example.id for entry in task.train_items()] == ["1", "2"]
    with pytest.raises(UsageError, match="give most_active=100 or so"):
        Lamp4(data=str(tmp_path), train_from="dev")


def test_users_whose_profile_is_a_part_of_lamps_can_be_left_out(tmp_path):
    folder = write(tmp_path / "LaMP_4", [question(str(n), [item(f"{n}{i}") for i in range(n)]) for n in (1, 4, 2, 3)])
    some = {"data": str(tmp_path), "complete": True}
    with pytest.raises(DataMissing, match=r"profile_provenance\.json cannot be read"):
        Lamp4(**some).items(Selection())
    about = {"1": {"complete": True}, "4": {"complete": False}, "2": {"complete": True}, "3": {"complete": True}}
    (folder / "profile_provenance.json").write_text(json.dumps(about))
    assert [entry.example.id for entry in Lamp4(**some).items(Selection(limit=2))] == ["1", "2"]
    few = Lamp4(**some, most_active=1, train_from="dev")
    assert [[e.example.id for e in few.items(Selection(split))] for split in ("dev", "train")] == [["3"], ["1", "2"]]
    before = Lamp4(**some).fingerprint(Selection())
    assert before != Lamp4(data=str(tmp_path)).fingerprint(Selection())
    (folder / "profile_provenance.json").write_text(json.dumps({**about, "4": {"complete": True}}))
    assert before != Lamp4(**some).fingerprint(Selection())
    with pytest.raises(DataMissing, match="LaMP's own files"):
        Lamp4(complete=True).items(Selection())
    (folder / "profile_provenance.json").write_text(json.dumps({**about, "4": {"complete": "false"}}))
    with pytest.raises(DataMissing, match=r"provenance\.json: complete of '4' is 'false'; expected true or false"):
        Lamp4(**some).items(Selection())


def test_oppus_files_are_the_same_users_as_lamps(tmp_path):
    users = [
        {"user_id": 7, "profile": [item("a"), item("b")], "query": [question("1"), question("2")]},
        {"user_id": 8, "profile": [item("c")], "query": [question("3")]},
    ]
    for user in users:
        user["query"] = [{"id": q["id"], "input": q["input"], "gold": f"gold {q['id']}"} for q in user["query"]]
    folder = tmp_path / "data/news_headline"
    folder.mkdir(parents=True)
    (folder / "user_top_100_history.json").write_text(json.dumps(users[:1]))
    (folder / "user_others.json").write_text(json.dumps(users[1:]))
    for data in (tmp_path / "data", folder):
        first, second = load(data)
        assert first.example.user.id == "7" and second.targets == ("gold 2",)
        assert first.example.user.history is second.example.user.history
        (other,) = Lamp4(data=str(data)).items(Selection("train"))
        assert (other.example.user.id, other.targets) == ("8", ("gold 3",))
    del users[0]["query"][0]["gold"]
    (folder / "user_top_100_history.json").write_text(json.dumps(users))
    with pytest.raises(
        DataMissing, match=r"history.json: user 0 \(user_id 7\): a query should have id, input and gold"
    ):
        load(folder)
    (folder / "user_top_100_history.json").write_text(json.dumps({"golds": []}))
    with pytest.raises(DataMissing, match="expected a list of users, found dict"):
        load(folder)


@pytest.mark.parametrize("kind", [Lamp1, Lamp2M, Lamp2N, Lamp3])
def test_labels_can_be_scored_in_place_of_written_and_graded_the_same(kind):
    written, scored = kind(), kind(answers="scored")
    (one,), (other,) = (made.items(Selection("dev", limit=1)) for made in (written, scored))
    assert (other.example.choices, other.example.compared) == (lamp_prompts.LABELS[kind.name], "character")
    assert other.example.prompt() == one.example.prompt() and other.targets == one.targets
    sample = Sample("0", "u", response=one.targets[0], targets=one.targets)
    assert scored.grade(sample) == written.grade(sample)


def test_what_has_no_labels_cannot_be_scored():
    with pytest.raises(
        UsageError, match=r"answers=scored needs labels .* lamp4 has texts; allowed for: lamp1, lamp2n, "
    ):
        Lamp4(answers="scored")


def test_user_split_has_a_user_a_question_in_file_order(tmp_path):
    write(tmp_path, [question("5", [item("b"), item("a")])])
    (entry,) = load(tmp_path)
    assert entry.example.user.id == "5"
    assert [record.id for record in entry.example.user.history] == ["b", "a"]
    assert entry.example.user.history[0].document == "title b text b"


def test_an_empty_profile_is_a_plain_prompt(tmp_path):
    write(tmp_path, [question()])
    (entry,) = load(tmp_path)
    assert entry.example.user.history == ()
    assert entry.example.prompt().render()[0].content == f"{HEADLINE}A dog ran."


def test_selection_cuts_users_first_then_items(tmp_path):
    write(tmp_path, [question(str(i), user_id=f"u{i % 3}") for i in range(9)])

    def ids(**selection: Any) -> str:
        chosen = Lamp4(data=str(tmp_path)).items(Selection(**selection))
        return "".join(labelled.example.id for labelled in chosen)

    assert ids() == "012345678"
    assert ids(users=2) == "013467"
    assert ids(users=2, limit=3) == "013"
    assert ids(exclude_users=frozenset({"u0"}), users=1) == "147"
    assert ids(limit=0) == ""


def test_the_fingerprint_is_of_the_bytes(tmp_path):
    write(tmp_path, [question()])
    first = Lamp4(data=str(tmp_path)).fingerprint(Selection())
    assert first == Lamp4(data=str(tmp_path)).fingerprint(Selection(limit=1))
    write(tmp_path, [question()], [{"id": "1", "output": "Another title"}])
    assert Lamp4(data=str(tmp_path)).fingerprint(Selection()) != first
    assert Lamp4().fingerprint(Selection()) == Lamp4().fingerprint(Selection())
    assert Lamp4().fingerprint(Selection()) != Lamp4().fingerprint(Selection(split="train"))


# Pairs


def test_a_pair_sees_the_items_before_it_only(tmp_path):
    write(tmp_path, [question(profile=[item(x) for x in "abc"])])
    user = load(tmp_path)[0].example.user
    assert [pair.targets for pair in user.pairs] == [("title a",), ("title b",), ("title c",)]
    for i, pair in enumerate(user.pairs):
        assert pair.example.text == f"{HEADLINE}text {'abc'[i]}"
        assert pair.example.user.history == user.history[:i]
    assert user.pairs[-1] == user.pairs[2]
    assert user.pairs[1:] == [user.pairs[1], user.pairs[2]]
    assert pickle.loads(pickle.dumps(user)).pairs[0] == user.pairs[0]
    with pytest.raises(IndexError):
        user.pairs[3]


@pytest.mark.parametrize("task", CLASSES, ids=lambda task: task.name)
def test_pairs_speak_the_frame_of_the_question(task):
    example = task().items(Selection(limit=1))[0].example
    assert len(example.user.pairs) == (0 if task is Lamp1 else len(example.user.history))
    if task is Lamp7:
        assert {pair.example.text for pair in example.user.pairs} == {"Write a tweet."}
        assert [pair.targets[0] for pair in example.user.pairs] == [r.fields["text"] for r in example.user.history]
        return
    for pair in example.user.pairs:
        assert pair.example.text.removesuffix(pair.example.query) == example.text.removesuffix(example.query)
        assert (
            pair.targets[0] not in pair.example.text.removeprefix(example.text.removesuffix(example.query))
            or task is Lamp3
        )


# What is wrong with a file


@pytest.mark.parametrize(
    ("broken", "named"),
    [
        (["x"], r"record 0 \(id None\): expected an object, found str"),
        ({}, "expected a list of questions, found dict"),
        ([question(), {"input": "x", "profile": []}], r"record 1 \(id None\): field 'id' .* found nothing"),
        ([question(input=None)], r"record 0 \(id '1'\): field 'input' should be a str, found NoneType"),
        ([question(profile=[]) | {"profile": "x"}], "field 'profile' should be a list, found str"),
        ([question(), question()], "record 1 .*field 'id' is taken"),
        ([question(profile=["x"])], r"record 0 \(id '1'\): profile item 0 is str"),
        ([question(profile=[item("a"), item("b", title=None)])], "profile item 1: field 'title' .* found NoneType"),
        ([question(profile=[{"id": "a", "title": "t"}])], "profile item 0: field 'text' should be text, found nothing"),
        ([question(profile=[item("a", date="May 3")])], "field 'date' is 'May 3', expected YYYY-MM-DD"),
        ([question(user_id=None)], "record 0 .*field 'user_id' names nobody: None"),
        ([question(user_id=" ")], "field 'user_id' names nobody: ' '"),
        ([question(user_id=True)], "field 'user_id' names nobody: True"),
        ([question(id=True)], "field 'id' should be a str, found bool"),
        ([question(user_id="5"), question(id="2")], "record 1 .*field 'user_id' is in some records and not in others"),
        ([question(input=lamp_prompts.FRAMES["lamp7"])], "should be a lamp4 question, found lamp7"),
    ],
)  # fmt: skip
def test_a_malformed_record_is_named(tmp_path, broken, named):
    write(tmp_path, broken, [{"id": "1", "output": "A title"}])
    with pytest.raises(DataMissing, match=rf"dev_questions.json: .*{named}") as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("outputs", "named"),
    [
        ({"task": "LaMP_4", "golds": []}, r"dev_questions.json: record 0 \(id '1'\): dev_outputs.json has no gold"),
        ({"task": "LaMP_4"}, "dev_outputs.json: field 'golds' is missing"),
        ({"task": "LaMP_7", "golds": []}, "dev_outputs.json: field 'task' is 'LaMP_7', expected 'LaMP_4'"),
        ({"task": "LaMP_4", "golds": [{"id": "1"}]}, "dev_outputs.json: record 0 should have fields 'id' and 'output'"),
        ({"task": "LaMP_4", "golds": [{"id": "1", "output": None}]}, "dev_outputs.json: record 0 should have fields"),
        ({"task": "LaMP_4", "golds": [{"id": None, "output": "a"}]}, "dev_outputs.json: record 0 should have fields"),
        ({"task": "LaMP_4", "golds": [{"id": "1", "output": "a"}, {"id": 1, "output": "b"}]},
         "dev_outputs.json: record 1: field 'id' is 1, taken by an earlier, other gold"),
        ([], "dev_outputs.json: field 'golds' is missing"),
    ],
)  # fmt: skip
def test_golds_that_do_not_fit_are_named(tmp_path, outputs, named):
    write(tmp_path, [question()])
    (tmp_path / "dev_outputs.json").write_text(json.dumps(outputs))
    with pytest.raises(DataMissing, match=named):
        load(tmp_path)


def test_a_gold_that_is_no_label_is_named(tmp_path):
    text = lamp_prompts.FRAMES["lamp2m"].format(labels="", text="x")
    write(tmp_path, [question(input=text)], [{"id": "1", "output": "tragedy"}], task="LaMP_2")
    with pytest.raises(DataMissing, match=r"record 0 \(id '1'\): field 'output' is 'tragedy', not a label of lamp2m"):
        load(tmp_path, Lamp2M)


def test_a_truncated_file_is_named(tmp_path):
    write(tmp_path, [question()])
    (tmp_path / "dev_questions.json").write_text('[{"id": "1", "inp')
    with pytest.raises(DataMissing, match=r"dev_questions.json is not valid JSON .*line 1.*truncated"):
        load(tmp_path)
    (tmp_path / "dev_questions.json").write_bytes(b"[\xff\xfe\xe9")
    with pytest.raises(DataMissing, match=r"dev_questions.json is not valid JSON .*fetch it again") as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)
    write(tmp_path, [question()])
    (tmp_path / "dev_outputs.json").write_bytes((tmp_path / "dev_outputs.json").read_bytes()[:-3])
    with pytest.raises(DataMissing, match=r"dev_outputs.json is not valid JSON .*truncated"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["dev_questions.json", "dev_outputs.json"])
def test_a_file_that_cannot_be_read_is_named(tmp_path, monkeypatch, name):
    write(tmp_path, [question()])
    opened = Path.open

    def refuse(self, *mode, **named):
        if self.name == name:
            raise PermissionError(13, "Permission denied", str(self))
        return opened(self, *mode, **named)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(DataMissing, match=rf"{name} cannot be read \(Permission denied\)"):
        load(tmp_path)


def test_a_split_that_is_not_there_says_where_it_was_looked_for_and_what_to_do(tmp_path):
    with pytest.raises(DataMissing, match=r"LaMP_4/dev/dev_questions.json.*'harness data get lamp4 --split user'"):
        load(tmp_path)
    with pytest.raises(DataMissing, match=r"time/LaMP_4.*--split time"):
        load(tmp_path, split_by="time")
    with pytest.raises(DataMissing, match="the folder does not exist"):
        load(tmp_path / "nowhere")
    with pytest.raises(DataMissing, match=r"'harness data get lamp6 --split user' says how to get its licensed emails"):
        load(tmp_path, Lamp6)
    write(tmp_path, [question()])
    (tmp_path / "dev_outputs.json").unlink()
    with pytest.raises(DataMissing, match=r"no dev_outputs.json beside it"):
        load(tmp_path)


# Large files


@pytest.fixture
def large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of 9 users' questions that counts as large, written long ago; two of their histories fit in memory."""
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "cache"))
    asked = [question(str(n), [item(f"é{n}{i}") for i in range(n)]) for n in range(9)]
    folder = write(tmp_path / "data", asked)
    monkeypatch.setattr("harness.files.json_lists.WINDOW", 50)
    monkeypatch.setattr(lamp_files, "KEPT", sum(len(json.dumps(one)) for one in asked[:2]))
    monkeypatch.setattr(lamp_files, "LARGE", 100)
    for file in folder.iterdir():
        os.utime(file, (1_000_000_000, 1_000_000_000))
    return folder


def test_a_large_file_has_the_items_of_a_small_one_and_its_histories_lie_in_it(large, monkeypatch):
    items = load(large)
    assert [type(one.example.user.history) is tuple for one in items] == [True] * 2 + [False] * 7
    again = load(large)
    assert items == again and again == items
    last = items[8].example.user
    assert len(last.history) == 8 and last.history[::-1][0].id == "é87" and next(iter(last.history)).id == "é80"
    assert repr(last.history) == "<8 items>"
    assert pickle.loads(pickle.dumps(last)) == last
    assert last.pairs[7].example.user.history == last.history[:7]
    monkeypatch.setattr(lamp_files, "KEPT", 10**9)
    assert load(large) == items
    assert type(load(large)[8].example.user.history) is tuple


def test_of_a_large_file_that_was_checked_only_the_records_asked_for_are_read(large, monkeypatch):
    whole = Lamp4(data=str(large)).fingerprint(Selection())
    read: list[str] = []

    def spied(self, asked, read_record=lamp_files.QuestionFile._read):
        read.append(asked.id)
        return read_record(self, asked)

    monkeypatch.setattr(lamp_files.QuestionFile, "_read", spied)
    monkeypatch.setattr(lamp_files, "elements", None)
    again = Lamp4(data=str(large))
    assert [one.example.id for one in again.items(Selection(limit=2))] == ["0", "1"]
    assert again.fingerprint(Selection()) == whole
    assert read == ["0", "1"]
    (most,) = Lamp4(data=str(large), most_active=1).items(Selection())
    assert (most.example.id, read[2:]) == ("8", ["8"])
    assert not load(large)[8].example.user.history[:0]


def test_a_large_file_is_checked_again_where_it_or_what_was_kept_has_changed(large, tmp_path):
    whole = Lamp4(data=str(large)).fingerprint(Selection())
    (kept,) = (tmp_path / "cache/lamp").iterdir()
    kept.write_text("[")
    assert Lamp4(data=str(large)).fingerprint(Selection()) == whole
    late = Lamp4(data=str(large))
    items = late.items(Selection())
    file = large / "dev_questions.json"
    file.write_text(file.read_text().replace("A dog ran", "A cat ran", 1))
    with pytest.raises(DataMissing, match="was written while it was read; run the command again"):
        list(items[7].example.user.history)
    assert Lamp4(data=str(large)).fingerprint(Selection()) != whole
    assert (
        len(list((tmp_path / "cache/lamp").iterdir())) == 1
    )  # written just now: the next writing may have this time too
    os.utime(file, (1_000_000_001, 1_000_000_001))
    (large / "dev_outputs.json").write_text(json.dumps({"task": "LaMP_4", "golds": []}))
    with pytest.raises(DataMissing, match="has no gold"):
        load(large)


def test_a_large_file_is_checked_whole_whatever_is_asked_for(large):
    file = large / "dev_questions.json"
    broken = json.loads(file.read_text())
    file.write_text(json.dumps([*broken, broken[0]]))
    with pytest.raises(DataMissing, match=r"record 9 \(id '0'\): field 'id' is taken"):
        Lamp4(data=str(large)).items(Selection(limit=1))


def test_oppus_questions_of_a_user_share_a_history_that_lies_in_its_file(large):
    asked = [{"id": str(n), "input": f"{HEADLINE}A dog ran.", "gold": f"gold {n}"} for n in range(3)]
    users = [
        {"user_id": n, "profile": [item(f"{n}{i}") for i in range(20)], "query": query}
        for n, query in enumerate((asked[:2], asked[2:]))
    ]
    folder = large / "news_headline"
    folder.mkdir()
    (folder / "user_top_100_history.json").write_text(json.dumps(users))
    os.utime(folder / "user_top_100_history.json", (1_000_000_000, 1_000_000_000))
    for _ in range(2):
        items = load(folder)
        asked_of = [(one.example.user.id, one.targets) for one in items]
        assert asked_of == [("0", ("gold 0",)), ("0", ("gold 1",)), ("1", ("gold 2",))]
        assert items[0].example.user.history is items[1].example.user.history


def test_the_time_split_insists_on_users_and_dates(tmp_path):
    write(tmp_path, [question()])
    with pytest.raises(DataMissing, match="field 'user_id' is missing"):
        load(tmp_path, split_by="time")
    write(tmp_path, [question(user_id="u", profile=[item("a")])])
    with pytest.raises(DataMissing, match="field 'date' should be text"):
        load(tmp_path, split_by="time")
    with pytest.raises(UsageError, match="split_by='date'"):
        Lamp4(split_by="date")


# Grades


def graded(task: Lamp, answers: Iterable[tuple[str | None, str]]) -> list[Sample]:
    return [
        task.grade(
            Sample(str(i), f"u{i}", response=answer, targets=(gold,), error="failed" if answer is None else None)
        )
        for i, (answer, gold) in enumerate(answers)
    ]


def test_classification_equals_scikit_learn_and_lenient_stands_beside():
    answers = [
        ("comedy", "comedy"),
        ("Comedy!", "comedy"),
        ("action", "fantasy"),
        ("no idea", "classic"),
        (None, "classic"),
    ]
    task = Lamp2M()
    samples = graded(task, answers)
    result = task.aggregate(samples)
    labels = list(lamp_prompts.LABELS["lamp2m"])
    golds = [gold for _, gold in answers[:4]]
    official = f1_score(golds, ["comedy", "?", "action", "?"], labels=labels, average="macro", zero_division=0)
    lenient = f1_score(golds, ["comedy", "comedy", "action", "?"], labels=labels, average="macro", zero_division=0)
    assert result["accuracy"].value == 0.25
    assert result["accuracy_lenient"].value == 0.5
    assert result["f1"].value == pytest.approx(official)
    assert result["f1_lenient"].value == pytest.approx(lenient)
    assert result["accuracy"].n == 4
    assert "2 of 4 unparsed" in result["accuracy"].note
    assert [sample.parsed for sample in samples[:4]] == ["comedy", None, "action", None]
    assert samples[4].metrics == {}


def test_ratings_follow_the_official_rule_and_odd_ones_are_counted():
    answers = [("4", "5"), ("good", "2"), ("nan", "3"), ("7", "5"), ("2 stars", "2"), ("inf", "4")]
    task = Lamp3()
    samples = graded(task, answers)
    result = task.aggregate(samples)
    counted, golds = [4, 5, 5, 7, 5, 1], [5, 2, 3, 5, 2, 4]
    assert result["mae"].value == pytest.approx(mean_absolute_error(golds, counted))
    assert result["rmse"].value == pytest.approx(root_mean_squared_error(golds, counted))
    assert result["mae"].higher_is_better is False
    assert "4 of 6 unparsed" in result["mae"].note
    assert "1 outside 1 to 5" in result["rmse"].note
    assert [sample.parsed for sample in samples] == [4, None, None, 7, None, None]
    assert result["mae_lenient"].value == pytest.approx(mean_absolute_error(golds, [4, 5, 5, 1, 2, 1]))


def test_generation_is_the_plain_mean_of_rouge_and_meteor_or_says_why_not(monkeypatch):
    answers = [("A dog runs", "A dog ran"), ("Cats", "Dogs "), ("  ", "Dogs")]
    task = Lamp4()
    result = task.aggregate(graded(task, answers))
    rouges = [metrics.rouge(answer.strip(), gold.strip()) for answer, gold in answers]
    assert result["rouge1"].value == pytest.approx(sum(rouge.rouge1 for rouge in rouges) / 3)
    assert result["rougeL"].value == pytest.approx(sum(rouge.rougeL for rouge in rouges) / 3)
    assert (result["meteor"].value is None) == bool(metrics.wordnet_missing())
    assert result["meteor"].note == metrics.wordnet_missing()
    monkeypatch.setattr(metrics, "meteor", lambda response, target: metrics.Meteor(None, 0.5))
    result = task.aggregate(graded(task, answers))
    assert (result["meteor"].value, result["meteor_unsplit"].value) == (None, 0.5)
    assert "3 answers or golds need NLTK's punkt_tab" in result["meteor"].note


@pytest.mark.parametrize("task", CLASSES, ids=lambda task: task.name)
def test_no_sample_is_no_number(task):
    result = task().aggregate([Sample("1", "u", error="failed")])
    assert all(metric.value is None and metric.note for metric in result.values())


@pytest.mark.parametrize("task", CLASSES, ids=lambda task: task.name)
def test_gold_answers_are_perfect_and_metrics_are_json(task):
    lamp = task()
    samples = graded(lamp, [(item.targets[0], item.targets[0]) for item in lamp.items(Selection(limit=30))])
    for name, metric in lamp.aggregate(samples).items():
        if metric.value is not None and not name.startswith(("f1", "meteor")):
            assert metric.value == (0 if name.startswith(("mae", "rmse")) else 1)
        if metric.low is not None and metric.high is not None and metric.value is not None:
            assert metric.low <= metric.value + 1e-12
            assert metric.value <= metric.high + 1e-12
        assert all(number is None or math.isfinite(number) for number in (metric.value, metric.low, metric.high))
    json.dumps([[sample.metrics, sample.parsed, sample.extra] for sample in samples], allow_nan=False)


def test_answers_get_the_targets_of_their_items():
    class Echo:
        def respond(self, examples: Iterable[Example]) -> Iterator[Sample]:
            for example in reversed(list(examples)):
                yield Sample(example.id, example.user.id, response=example.id)

    items = Lamp4().items(Selection(limit=3))
    samples = list(Lamp4().respond(Echo(), items))  # type: ignore[arg-type]
    assert {sample.id: sample.targets for sample in samples} == {item.example.id: item.targets for item in items}


# The test split and the official evaluator


def test_the_test_split_needs_no_golds_and_is_answered_but_not_scored(tmp_path):
    write(tmp_path, [question()], split="test")
    (tmp_path / "test_outputs.json").unlink()
    lamp = Lamp4(data=str(tmp_path))
    (entry,) = lamp.items(Selection(split="test"))
    assert entry.targets == ()
    sample = lamp.grade(Sample("1", "1", response="A title"))
    assert sample.metrics == {}
    assert lamp.aggregate([sample])["rouge1"].value is None


def test_answers_are_written_as_the_official_evaluator_reads_them(tmp_path):
    samples = [Sample("1", "u", response="one"), Sample("2", "u", response="zwei, ☕")]
    export_lamp("lamp2m", samples, tmp_path / "answers.json")
    assert json.loads((tmp_path / "answers.json").read_text(encoding="utf-8")) == {
        "task": "LaMP_2",
        "golds": [{"id": "1", "output": "one"}, {"id": "2", "output": "zwei, ☕"}],
    }
    with pytest.raises(UsageError, match="1 of 2 samples have no answer"):
        export_lamp("lamp4", [samples[0], replace(samples[1], response=None)], tmp_path / "answers.json")


# Real files


@pytest.mark.parametrize("task", [Lamp1, Lamp2M, Lamp3, Lamp4, Lamp5, Lamp7], ids=lambda task: task.name)
def test_real_files_load_and_every_query_is_found_by_its_frame(task):
    folder = SHARED / "lamp"
    if not folder.is_dir():
        pytest.skip(f"no LaMP files in {folder} (set HARNESS_SHARED)")
    items = load(folder, task)
    assert (
        len(items) == {"lamp1": 250, "lamp2m": 192, "lamp3": 52, "lamp4": 1925, "lamp5": 498, "lamp7": 1500}[task.name]
    )
    assert all(lamp_prompts.recognise(entry.example.text) == task.name for entry in items)
    assert all(entry.example.query and entry.example.query != entry.example.text for entry in items)
    assert all(len(entry.example.user.history) >= 4 for entry in items)
    if task is Lamp2M:
        with pytest.raises(DataMissing, match="should be a lamp2n question, found lamp2m"):
            load(folder, Lamp2N)


def test_every_registered_lamp_task_is_a_class_of_its_name_and_none_imports_torch():
    for name, target in TASKS.items():
        if name.startswith("lamp"):
            module, _, attribute = target.partition(":")
            assert getattr(import_module(module), attribute).name == name
    code = "import sys, harness.tasks.lamp, harness.cli.fetch.download; assert not {'torch', 'nltk', 'sklearn'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(metrics.__file__).parents[1])


def test_records_of_complete_profiles_are_read_without_their_files():
    task = Lamp7(complete=True)
    sample = task.grade(Sample("1", "u", response="a tweet", targets=("a tweet",)))
    assert task.aggregate([sample])["rouge1"].value == 1.0
    with pytest.raises(DataMissing, match="give their folder as --data"):
        task.items(Selection())
