"""Your own users, from files and data sets: kinds, histories, prompts, metrics, judges, and lines that are not as they should be."""

from __future__ import annotations

import json
import runpy
from collections.abc import Callable, Sequence
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sacrebleu
from chat_server import Server, serving
from sklearn.metrics import f1_score

from harness.errors import DataMissing, UsageError
from harness.plugins import entry_points
from harness.plugins.registry import task_class, task_name
from harness.records.store import find_runs
from harness.run.contract.tasks import check_task
from harness.task import Sample, Selection
from harness.tasks.users import Users

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
LINES: list[dict[str, Any]] = [
    {"user": "ann", "input": "Reply to: lunch?", "target": "Sure!", "history": ["Hi!", {"input": "tea?", "output": "Yes!"}]},
    {"user": "bob", "input": "Reply to: tea?", "target": "No, thank you.", "history": []},
]  # fmt: skip


def write(folder: Path, lines: Sequence[dict[str, Any]], name: str = "mine.jsonl") -> Path:
    (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / name


def task(path: Path, **options: Any) -> Users:
    made = task_class(f"users:{path}")(**options)
    assert isinstance(made, Users)
    return made


def test_a_line_is_an_example_with_its_users_history_and_pairs(tmp_path: Path) -> None:
    ann, bob = task(write(tmp_path, LINES)).items(Selection())
    assert (ann.example.user.id, ann.targets, len(ann.example.user.history)) == ("ann", ("Sure!",), 2)
    (pair,) = ann.example.user.pairs
    assert (pair.example.text, pair.targets, len(pair.example.user.history)) == ("tea?", ("Yes!",), 1)
    (message,) = ann.example.prompt(ann.example.user.history).render()  # type: ignore[misc]
    assert message.content == "What the same person wrote before:\nHi!\n\ntea?\nYes!\n\nReply to: lunch?"
    (plain,) = bob.example.prompt().render()  # type: ignore[misc]
    assert plain.content == "Reply to: tea?"


def test_ones_own_wording_is_a_template_and_part_of_the_fingerprint(tmp_path: Path) -> None:
    path = write(tmp_path, LINES)
    own = task(path, template="{{ history | length }} texts. {{ input }}")
    (item, _) = own.items(Selection())
    (message,) = item.example.prompt(item.example.user.history).render()  # type: ignore[misc]
    assert message.content == "2 texts. Reply to: lunch?"
    assert own.fingerprint(Selection()) != task(path).fingerprint(Selection())
    for wrong in ("{{ inputs }}", "{% if %}", "{{ ''.__class__.__mro__ }}"):
        with pytest.raises(
            UsageError,
            match=r"the template cannot be used \(.*; it may name input, history, summary, choices; items of",
        ):
            task(path, template=wrong)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"template": "{{ history[0].text }} {{ input }}"}, "list object has no element 0.*and there may be none"),
        ({"template": "{{ input }}{{ 1 / 0 }}"}, r"cannot be used \(ZeroDivisionError: division by zero\)"),
        ({"template_without": "{{ input + 1 }}"}, r"cannot be used \(TypeError: "),
        (
            {"rubric": "{% for item in history %}{{ item.text }}{% endfor %}100"},
            "no attribute 'text'.*of history are texts",
        ),
    ],
)
def test_a_template_that_cannot_be_filled_in_is_one_line(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        task(write(tmp_path, LINES), **options)


def test_a_template_that_only_some_examples_can_fill_in_is_one_line(
    harness: Callable[[str], Any], toy: Path, tmp_path: Path
) -> None:
    write(tmp_path, LINES)
    (tmp_path / "mine.jinja").write_text("{{ 1 / (input | length - 16) }} {{ input }}")
    done = harness(f"run --method plain --task ./mine.jsonl --task_set template=mine.jinja --model {toy}")
    assert done.code == 2 and "the template cannot be used (ZeroDivisionError" in done.error()


def test_a_template_file_is_read_as_it_is_or_refused(tmp_path: Path) -> None:
    path, file = write(tmp_path, LINES), tmp_path / "mine.txt"
    file.write_bytes(b"\xef\xbb\xbfSay: {{ input }}")
    assert task(path, template=str(file)).template.source == "Say: {{ input }}"
    file.write_bytes(b"caf\xe9 {{ input }}")
    with pytest.raises(DataMissing, match=r"mine\.txt: byte 3 is no UTF-8; convert the file"):
        task(path, template=str(file))
    with pytest.raises(
        DataMissing, match=r"none\.txt cannot be read .*; give a text, or the path of a file that holds it"
    ):
        task(path, template=str(tmp_path / "none.txt"))


def test_a_history_is_oldest_first_where_all_of_it_has_dates(tmp_path: Path) -> None:
    lines = [
        {"user": "ann", "input": text, "target": f"{text}!", "date": date}
        for text, date in (("new", "2024-05-01"), ("old", "2019-12"), ("first of two", "2020"), ("second", "2020"))
    ]
    made = task(write(tmp_path, lines))
    seen = {
        i.example.text: [record.fields["input"] for record in i.example.user.history] for i in made.items(Selection())
    }
    assert seen == {
        "old": [],
        "first of two": ["old"],
        "second": ["old", "first of two"],
        "new": ["old", "first of two", "second"],
    }
    undated = task(write(tmp_path, [*lines, {"user": "ann", "input": "x", "target": "y"}], "undated.jsonl"))
    assert [len(item.example.user.history) for item in undated.items(Selection())] == [0, 1, 2, 3, 4]
    given = [{"input": "b", "output": "2", "date": "2024-02-01"}, {"input": "a", "output": "1", "date": "2024-01-31"}]
    histories = [LINES[1] | {"history": history} for history in (given, given[::-1])]
    prompts = []
    for number, line in enumerate(histories):
        (item,) = task(write(tmp_path, [line], f"{number}.jsonl")).items(Selection())
        prompts.append(item.example.prompt(item.example.user.history).render())
        assert [len(pair.example.user.history) for pair in item.example.user.pairs] == [0, 1]
    assert prompts[0] == prompts[1]


@pytest.mark.parametrize(
    "item",
    [
        {"input": "lunch?", "target": "No way"},
        {"text": "lunch?", "reply": "No way", "source": "mail"},
        {"question": "lunch?", "label": "No way", "output": "", "gold": None},
        {"input": "lunch?", "text": "lunch?", "output": "No way", "answer": "No way"},
    ],
)
def test_an_item_of_history_may_have_the_names_that_lines_have(tmp_path: Path, item: dict[str, Any]) -> None:
    (read,) = task(write(tmp_path, [LINES[1] | {"history": [item]}])).items(Selection())
    assert dict(read.example.user.history[0].fields) == {"input": "lunch?", "output": "No way"}
    assert read.example.user.pairs[0].targets == ("No way",)


@pytest.mark.parametrize(
    ("item", "words"),
    [
        ({"input": "a", "text": "b", "output": "c"}, "has 'input' and 'text', which are names of one field; leave one"),
        ({"text": "a", "reply": "b", "label": 1}, "has 'reply' and 'label', which are names of one field"),
        ({"text": "a", "reply": ["b"]}, "expected 'reply' of an item of history to be a text"),
        ({"prompt": 5}, "expected 'prompt' of an item of history to be a text"),
    ],
)
def test_an_item_of_history_leaves_no_field_unread(tmp_path: Path, item: dict[str, Any], words: str) -> None:
    with pytest.raises(DataMissing, match=f"line 1: field history: .*{words}"):
        task(write(tmp_path, [LINES[1] | {"history": [item]}])).items(Selection())


def test_ratings_of_a_history_are_read_as_those_of_lines(tmp_path: Path) -> None:
    lines = [{"user": "ann", "text": "a film", "label": 4, "history": [{"text": "a book", "label": 2}]}]
    (item,) = task(write(tmp_path, lines)).items(Selection())
    assert dict(item.example.user.history[0].fields) == {"input": "a book", "output": "2"}


@pytest.mark.parametrize(
    ("dates", "at"),
    [
        (["2024-05-01", "1700000000", "2022-01-01"], "line 2: .*'1700000000' is written in another form than '2024-05-01' of line 1"),
        (["2023", "1700000000"], "line 2: .*'1700000000' .* than '2023' of line 1"),
        (["2023", "5", "2024-05-01"], "line 3: .*'2024-05-01' .* than '5' of line 2"),
        (["1700000000", "1700000000000"], "line 2: .*'1700000000000' .* than '1700000000' of line 1"),
        (["20230101", "20230132"], "line 2: .*'20230132' .* than '2023-01-01' of line 1"),
    ],
)  # fmt: skip
def test_dates_of_a_file_are_written_in_one_form(tmp_path: Path, dates: list[str], at: str) -> None:
    lines = [{"user": "ann", "input": f"{n}", "target": "t", "date": date} for n, date in enumerate(dates)]
    with pytest.raises(DataMissing, match=at):
        task(write(tmp_path, lines)).items(Selection())
    items = [{"text": f"{n}", "date": date} for n, date in enumerate(dates)]
    with pytest.raises(DataMissing, match=r"line 1: field date: .* is written in another form than .* of line 1"):
        task(write(tmp_path, [LINES[1] | {"history": items}])).items(Selection())


@pytest.mark.parametrize(
    ("dates", "order"),
    [
        (["20240501", "2023-12-31", "20230101", "2022"], [3, 2, 1, 0]),
        (["1700000002", "999999999", "1700000001"], [1, 2, 0]),
        (["1200", "3", "10000"], [1, 0, 2]),
    ],
)
def test_dates_of_one_form_sort_a_history(tmp_path: Path, dates: list[str], order: list[int]) -> None:
    history = [{"text": f"{n}", "date": date} for n, date in enumerate(dates)]
    (item,) = task(write(tmp_path, [LINES[1] | {"history": history}])).items(Selection())
    assert [int(record.document) for record in item.example.user.history] == order


@pytest.mark.parametrize("date", ["31-12-2024", "24-05-31", "2024-31-12", "2024-05-31-01", "2024-00", "20230101-05"])
def test_a_date_in_another_order_is_refused(tmp_path: Path, date: str) -> None:
    with pytest.raises(DataMissing, match=r"line 1: field date: .*expected a date as in 2024-05-31, found"):
        task(write(tmp_path, [LINES[1] | {"date": date}])).items(Selection())


def test_fields_without_a_value_and_dates_are_read_from_tables_as_from_lines(tmp_path: Path) -> None:
    import datetime

    import pyarrow
    from pyarrow import parquet

    line = {
        "user": "ann",
        "input": "tea?",
        "target": "No",
        "history": [
            {"input": "lunch?", "output": "Yes", "date": "2024-01-01"},
            {"text": "a text", "date": "2024-01-02"},
        ],
    }
    day = datetime.date(2024, 5, 1)
    rows = [line | {"date": day}, line | {"date": None, "history": None}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "mine.parquet")
    lines = [line | {"date": "2024-05-01"}, {name: line[name] for name in ("user", "input", "target")}]
    read = [task(path).items(Selection()) for path in (tmp_path / "mine.parquet", write(tmp_path, lines))]
    assert read[0] == read[1] and len(read[0][0].example.user.history) == 2
    noon = datetime.datetime(2024, 5, 1, 12)
    parquet.write_table(pyarrow.Table.from_pylist([line | {"date": noon}]), tmp_path / "noon.parquet")
    with pytest.raises(
        DataMissing, match=r"field date: .*expected a date as in 2024-05-31, found '2024-05-01T12:00:00'"
    ):
        task(tmp_path / "noon.parquet").items(Selection())


def test_a_table_of_user_text_and_reply_works_at_once_with_earlier_lines_for_a_history(tmp_path: Path) -> None:
    (tmp_path / "mine.csv").write_bytes(
        '\ufeffuser,text,reply\nann,lunch?,Sure\nbob,tea?,"No,\nthanks"\nann,café?,Yes\n'.encode()
    )
    first, other, second = task(tmp_path / "mine.csv").items(Selection())
    assert [len(i.example.user.history) for i in (first, other, second)] == [0, 0, 1]
    assert second.example.user.history[0].fields == {"input": "lunch?", "output": "Sure"}
    assert (other.targets, second.example.text) == (("No,\nthanks",), "café?")
    named = "who,mail,answered\nann,lunch?,Sure\n"
    (tmp_path / "named.csv").write_text(named)
    columns = {"user_column": "who", "input_column": "mail", "target_column": "answered"}
    (item,) = task(tmp_path / "named.csv", **columns).items(Selection())
    assert (item.example.user.id, item.example.text, item.targets) == ("ann", "lunch?", ("Sure",))


def test_histories_can_lie_in_a_file_of_users_and_parquet_is_read(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    lines = [{"user": "ann", "input": "lunch?", "target": "Sure"}, {"user": "eve", "input": "tea?", "target": "No"}]
    parquet.write_table(pyarrow.Table.from_pylist(lines), tmp_path / "mine.parquet")
    histories = write(tmp_path, [{"user": "ann", "history": ["a", "b"]}], "users.jsonl")
    ann, eve = task(tmp_path / "mine.parquet", histories=str(histories)).items(Selection())
    assert [len(i.example.user.history) for i in (ann, eve)] == [2, 0]


def test_a_field_is_read_from_one_column_on_all_lines(tmp_path: Path) -> None:
    table = tmp_path / "mine.csv"
    table.write_text('user,text,reply,label,past\nann,lunch?,Sure,0,\nbob,tea?,,1,"[""a""]"\n')
    words = r"line 3: field target: column 'reply' is empty or missing here, and 'label' is not taken for it; fill it in, or name"
    with pytest.raises(DataMissing, match=words):
        task(table).items(Selection())
    named = task(table, target_column="label", history_column="past").items(Selection())
    assert [item.targets for item in named] == [("0",), ("1",)]
    assert [len(item.example.user.history) for item in named] == [0, 1]
    with pytest.raises(DataMissing, match=r"line 2: no column 'mail'; it has user, text, reply, label, past"):
        task(table, input_column="mail").items(Selection())
    (tmp_path / "h.csv").write_text('who,past\nann,"[""a"", ""b""]"\n')
    (tmp_path / "lines.csv").write_text("who,text,reply\nann,lunch?,Sure\n")
    options = {"histories": str(tmp_path / "h.csv"), "user_column": "who", "history_column": "past"}
    (item,) = task(tmp_path / "lines.csv", **options).items(Selection())
    assert [dict(record.fields) for record in item.example.user.history] == [{"text": "a"}, {"text": "b"}]


def test_histories_of_one_item_a_line_are_gathered_by_user(tmp_path: Path) -> None:
    (tmp_path / "h.csv").write_text("user,text,reply\nann,a,b\nbob,c,\nann,d,\n")
    (item, _) = task(write(tmp_path, LINES), histories=str(tmp_path / "h.csv")).items(Selection())
    assert [dict(r.fields) for r in item.example.user.history] == [{"input": "a", "output": "b"}, {"text": "d"}]


def test_a_hub_data_set_is_read_from_a_folder_with_its_splits_and_label_names(tmp_path: Path) -> None:
    from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

    kinds = Features({"user": Value("string"), "text": Value("string"), "label": ClassLabel(names=["no", "yes"])})
    rows = {"user": ["ann", "bob"], "text": ["a", "b"], "label": [1, 0]}
    data = Dataset.from_dict(rows, features=kinds)
    DatasetDict({"train": data, "validation": data}).save_to_disk(str(tmp_path / "set"))
    made = task(Path(f"hf:{tmp_path}/set"), kind="choice")
    assert [item.targets for item in made.items(Selection())] == [("yes",), ("no",)]
    assert len(made.items(Selection("train"))) == 2 and made.labels == ("no", "yes")
    with pytest.raises(
        DataMissing, match=r"data set org/none cannot be loaded \(.*save_to_disk\('FOLDER'\) and give hf:"
    ):
        task(Path("hf:org/none")).items(Selection())


@pytest.mark.parametrize("suffix", ["", ".parquet"])
def test_labels_are_named_wherever_a_data_set_has_them(tmp_path: Path, suffix: str) -> None:
    from datasets import ClassLabel, Dataset, Features, List, Value

    label = ClassLabel(names=["no", "yes"])
    said = {"input": Value("string"), "output": label}
    kinds = Features({"user": Value("string"), "text": Value("string"), "label": label, "history": List(said)})
    history = [{"input": "a", "output": 1}, {"input": "b", "output": -1}]
    rows = {"user": ["ann", "bob"], "text": ["c", "d"], "label": [0, 1], "history": [history, []]}
    data, place = Dataset.from_dict(rows, features=kinds), tmp_path / f"set{suffix}"
    data.to_parquet(str(place)) if suffix else data.save_to_disk(str(place))
    first, _ = task(place if suffix else Path(f"hf:{place}"), kind="choice").items(Selection())
    assert first.targets == ("no",)
    assert [dict(r.fields) for r in first.example.user.history] == [{"input": "a", "output": "yes"}, {"text": "b"}]


@pytest.mark.parametrize("label", [None, -1])
def test_a_label_that_is_not_there_is_named(tmp_path: Path, label: int | None) -> None:
    from datasets import ClassLabel, Dataset, Features, Value

    kinds = Features({"user": Value("string"), "text": Value("string"), "label": ClassLabel(names=["no", "yes"])})
    rows = {"user": ["ann", "bob"], "text": ["a", "b"], "label": [1, label]}
    Dataset.from_dict(rows, features=kinds).save_to_disk(str(tmp_path / "set"))
    with pytest.raises(
        DataMissing, match="line 2: field target: Field required; this line has 'split', 'user', 'text'"
    ):
        task(Path(f"hf:{tmp_path}/set")).items(Selection())


def test_a_split_without_answers_is_left_out_and_said_and_one_that_lacks_some_is_not(tmp_path: Path) -> None:
    lines = [{"user": "ann", "text": "a", "label": "yes"}, {"user": "bob", "text": "b", "split": "test"}]
    made = task(write(tmp_path, lines))
    assert [item.targets for item in made.items(Selection())] == [("yes",)]
    assert made.describe_data().endswith("; without split test, which has no targets")
    with pytest.raises(DataMissing, match="no line of split 'test' has a target"):
        made.items(Selection("test"))
    with pytest.raises(DataMissing, match="line 2: field target: Field required"):
        task(write(tmp_path, [*lines, {**lines[1], "label": "no"}])).items(Selection())


def test_names_of_files_say_their_kind_shortly() -> None:
    assert task_name("csv:mine.csv") == "users:mine.csv" and task_name("./mine.jsonl") == "users:./mine.jsonl"
    assert task_name("hf:org/name") == "users:hf:org/name"


def test_a_prompt_without_history_can_have_a_wording_of_its_own(tmp_path: Path) -> None:
    made = task(write(tmp_path, LINES), template="With. {{ input }}", template_without="Without. {{ input }}")
    (item, _) = made.items(Selection())
    prompts = [item.example.prompt(items).render()[0].content for items in ((), item.example.user.history)]  # type: ignore[union-attr, index]
    assert prompts == ["Without. Reply to: lunch?", "With. Reply to: lunch?"]


def test_answers_become_choices_by_option_and_have_a_macro_f1(tmp_path: Path) -> None:
    lines = [{"user": f"u{n}", "text": f"mail {n}", "label": ("spam", "ham")[n % 2]} for n in range(12)]
    made = task(write(tmp_path, lines), kind="choice", compared="token")
    item = made.items(Selection())[0]
    assert item.example.choices == ("ham", "spam") and item.example.compared == "token"
    (message,) = item.example.prompt().render()  # type: ignore[misc]
    assert message.content.endswith("Answer with one of: ham | spam")
    answers = ["ham"] * 4 + ["spam"] * 8
    samples = [
        made.grade(Sample(i.example.id, i.example.user.id, response=a, targets=i.targets))
        for i, a in zip(made.items(Selection()), answers, strict=True)
    ]
    found = made.aggregate(samples)
    golds = [i.targets[0] for i in made.items(Selection())]
    assert found["macro_f1"].value == pytest.approx(f1_score(golds, answers, average="macro"))
    assert found["accuracy"].value == pytest.approx(np.mean([a == g for a, g in zip(answers, golds, strict=True)]))
    with pytest.raises(DataMissing, match="1 different answers are no choices"):
        assert task(write(tmp_path, LINES[:1], "one.jsonl"), kind="choice").labels
    with pytest.raises(DataMissing, match=r"line 1: field target: 'Sure!' is no number \(kind=number\)"):
        task(write(tmp_path, LINES), kind="number").describe_data()


def test_labels_that_differ_in_white_space_are_one(tmp_path: Path) -> None:
    lines = [{"user": f"u{n}", "text": f"{n}", "label": ("no", "yes", "yes ")[n % 3]} for n in range(6)]
    made = task(write(tmp_path, lines), kind="choice")
    assert made.labels == ("no", "yes")
    graded = [
        made.grade(Sample(i.example.id, i.example.user.id, response=i.targets[0].strip(), targets=i.targets))
        for i in made.items(Selection())
    ]
    assert [made.aggregate(graded)[name].value for name in ("accuracy", "macro_f1")] == [1.0, 1.0]


def test_metrics_are_chosen_by_name_and_packages_add_some(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, LINES)
    made = task(path, metrics="chrf,exact")
    graded = made.grade(Sample("1", "ann", response="Sure!", targets=("Sure!",)))
    assert graded.metrics == {"chrf": 1.0, "exact": 1.0} and list(made.aggregate([graded])) == ["chrf", "exact"]
    for name, words in (("rogue1", r"unknown metric 'rogue1'; did you mean 'rouge1'"), ("macro_f1", "of kind choice")):
        with pytest.raises(UsageError, match=words):
            assert task(path, metrics=name).metric_names
    point = EntryPoint("length", "builtins:min", "harness.metrics")
    monkeypatch.setattr(entry_points, "_found", lambda group: {"length": point} if group == "harness.metrics" else {})
    monkeypatch.setattr(EntryPoint, "load", lambda self: lambda answer, golds: float(len(answer)))
    own = task(path, metrics="length")
    graded = own.grade(Sample("1", "ann", response="Sure!", targets=("Sure!",)))
    assert own.aggregate([graded])["length"].value == 5.0


def test_a_rubric_has_a_judge_rate_the_answers(
    harness: Callable[[str], Any], toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, LINES)
    (tmp_path / "rubric.txt").write_text("Mail: {{ input }}\nReply: {{ response }}\nIts writer: {{ target }}")
    made = task(path, rubric=str(tmp_path / "rubric.txt"))
    sample = Sample("1", "ann", response=" Sure ", targets=("Sure!",), extra={"input": "lunch?"})
    (question,) = made.to_judge(sample).values()
    assert question.prompt.startswith("Mail: lunch?\nReply: Sure\nIts writer: Sure!\n\nAnswer with one number from 0")
    common = (
        f"--task users:./mine.jsonl --model {toy} --max_new_tokens 3 --output_path kept --task_set rubric=./rubric.txt"
    )
    refused = harness(f"run --method plain {common} --judge lexicon")
    assert refused.code == 2 and "cannot rate by a rubric" in refused.error() and not Path("kept").exists()
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    with serving(Server()) as server:
        done = harness(f"run --method plain {common} --judge openai/m --judge_base_url {server.url}")
    assert done.code == 0, done.err
    (run,) = find_runs(Path("kept"))
    assert run.metrics["judge"].n == 2 and run.config.judge is not None
    assert harness(f"score {run.folder}").code == 0
    assert "cannot rate by a rubric" in harness(f"score {run.folder} --judge words").error()
    assert "cannot rate by a rubric" in harness(f"judge reliability {run.folder} --judge words").error()
    with pytest.raises(UsageError, match="may name input, response, target, history"):
        task(path, rubric="{{ answer }}")


def test_the_kind_is_read_from_the_lines_and_decides_the_metrics(tmp_path: Path) -> None:
    text = task(write(tmp_path, LINES))
    graded = text.grade(Sample("1", "ann", response="Sure thing", targets=("Sure!", "Of course")))
    assert graded.metrics["rouge1"] == pytest.approx(2 / 3) and graded.metrics["exact"] == 0
    chrf = sacrebleu.sentence_chrf("Sure thing", ["Sure!", "Of course"]).score / 100
    assert graded.metrics["chrf"] == pytest.approx(chrf)
    assert list(text.aggregate([graded])) == ["rouge1", "rougeL", "meteor", "chrf", "bleu", "exact"]
    numbers = task(write(tmp_path, [{"user": "a", "input": "stars?", "target": n} for n in (4, 2.5)], "n.jsonl"))
    assert numbers.kind == "number" and numbers.closed
    found = [numbers.grade(Sample(str(i), str(i), response=r, targets=("4",))) for i, r in enumerate(("3", "x"))]
    mae = numbers.aggregate(found)["mae"]
    assert (mae.value, mae.n, mae.note) == (1.0, 1, "1 of 2 answers are no number and are left out")
    choice = {"user": "a", "input": "which?", "target": "b", "choices": ["a", "b"]}
    chosen = task(write(tmp_path, [choice], "c.jsonl"))
    (item,) = chosen.items(Selection())
    assert (chosen.kind, item.example.choices) == ("choice", ("a", "b"))
    assert chosen.grade(Sample("1", "a", response="b", targets=("b",))).metrics == {"accuracy": 1.0}


def test_an_answer_whose_square_is_no_number_is_no_number(tmp_path: Path) -> None:
    made = task(write(tmp_path, [{"user": "a", "input": "stars?", "target": n} for n in (4, -1e150)]))
    answers = ["1e200", "5" * 160, "1e150"]
    graded = [
        made.grade(Sample(str(n), str(n), response=answer, targets=("-1e150",))) for n, answer in enumerate(answers)
    ]
    assert [sample.parsed for sample in graded] == [None, None, 1e150]
    found = made.aggregate(graded)
    assert (found["rmse"].value, found["rmse"].n) == (pytest.approx(2e150), 1)
    assert found["mae"].note == "2 of 3 answers are no number and are left out"
    assert made.aggregate(graded[:2])["mae"].note == "2 of 2 answers are no number and are left out"
    assert task(write(tmp_path, [{"user": "a", "input": "stars?", "target": 1e200}])).kind == "text"


def test_where_targets_have_letters_that_rouge_does_not_read_chrf_comes_first_and_rouge_says_so(tmp_path: Path) -> None:
    golds = ["спасибо за письмо", "谢谢你", "Größe", "hello friend"]
    lines = [{"user": f"u{n}", "input": gold, "target": gold} for n, gold in enumerate(golds)]
    path, note = write(tmp_path, lines), "3 of 4 targets have letters beyond a to z, which ROUGE does not read; chrf"
    made = task(path)
    graded = [made.grade(Sample(str(n), f"u{n}", response=gold, targets=(gold,))) for n, gold in enumerate(golds)]
    found = made.aggregate(graded)
    assert (
        list(found) == ["chrf", "rouge1", "rougeL", "meteor", "bleu", "exact"]
        and next(iter(graded[0].metrics)) == "chrf"
    )
    assert found["chrf"].value == pytest.approx(1.0) and not found["chrf"].note
    assert [found[name].note.startswith(note) for name in ("rouge1", "rougeL", "exact")] == [True, True, False]
    (said,) = made.caveats(made.items(Selection()))
    assert said.startswith(f"rouge1, rougeL: {note}")
    asked = task(path, metrics="rouge1,exact")
    assert asked.metric_names == ("rouge1", "exact") and len(asked.caveats(asked.items(Selection()))) == 1
    assert not task(path, metrics="chrf").caveats(made.items(Selection()))
    assert task(write(tmp_path, lines[3:])).metric_names[0] == "rouge1"


def test_users_who_have_no_history_in_the_file_of_histories_are_named(
    harness: Callable[[str], Any], toy: Path, tmp_path: Path
) -> None:
    write(tmp_path, [{"user": f"u{n}", "input": "mail?", "target": "hi"} for n in range(7)])
    histories = [{"user": name, "history": ["x"]} for name in ("u0", "U1", "U2")]
    write(tmp_path, [*histories, {"user": "u6", "history": []}], "users.jsonl")
    words, option = "5 of 7 users, first 'u1', have no history in users.jsonl", "--task_set histories=users.jsonl"
    done = harness(f"run --method copy --task ./mine.jsonl {option} --model {toy} --output_path kept")
    (run,) = find_runs(Path("kept"))
    assert done.code == 0 and run.notes == [words] and f"warning: {words}" in done.err
    checked = harness(f"data check ./mine.jsonl {option}")
    assert checked.code == 0 and words in checked.out, checked.err


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"user": None}, "line 2: field user"),
        ({"user": " "}, "line 2: field user: .*it is empty"),
        ({"input": 5}, "line 2: field input: Input should be a valid string, found '5'"),
        ({"target": []}, "line 2: field target: .*it is empty"),
        ({"history": "Hi!"}, "line 2: field history: Input should be a valid list, found 'Hi!'"),
        ({"history": [5]}, "line 2: field history"),
        ({"choices": ["x", "y"]}, "line 1: field choices is missing, which other lines have"),
        ({"target": ["a", " "]}, "line 2: field target: .*it is empty, or a part of it is"),
        ({"history": [{"content": "Hi!"}]}, "line 2: field history: .*expected an item of history to have text"),
        ({"user": "ann "}, "line 2: field user: 'ann ' is 'ann' of line 1 but for how it is written"),
        ({"id": "1"}, "line 2: field id: '1' is taken by line 1"),
        ({"date": "May"}, "line 2: field date: .*expected a date"),
    ],
)
def test_a_line_that_is_not_as_it_should_be_is_named(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    path = write(tmp_path, [LINES[0], LINES[1] | change])
    with pytest.raises(DataMissing, match=f"mine.jsonl, {words}") as caught:
        task(path).items(Selection())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("users", "words"),
    [
        ([1, "1"], "line 2: field user: '1' is 1 of line 1"),
        (["Zo\u00eb", "x", "Zoe\u0308"], "line 3: field user: .* of line 1 but for how"),
        ([True, "a"], "line 1: field user"),
        ([1.5, "a"], "line 1: field user"),
    ],
)
def test_a_user_is_written_in_one_way(tmp_path: Path, users: list[Any], words: str) -> None:
    path = write(tmp_path, [{"user": user, "input": "a", "target": "b"} for user in users])
    with pytest.raises(DataMissing, match=words):
        task(path).items(Selection())


@pytest.mark.parametrize("choices", [["a"], ["a", "a"], ["a", " a"], ["a", ""], []])
def test_choices_that_leave_none_are_refused(tmp_path: Path, choices: list[str]) -> None:
    path = write(tmp_path, [{"user": "u", "input": "x", "target": "a", "choices": choices}])
    with pytest.raises(DataMissing, match="line 1: field choices"):
        task(path).items(Selection())


def test_a_text_that_was_answered_is_what_was_asked_and_histories_of_strangers_are_none(tmp_path: Path) -> None:
    line = {"user": "u", "input": "x", "target": "y", "history": [{"text": "tea?", "output": "Yes!"}]}
    (item,) = task(write(tmp_path, [line])).items(Selection())
    assert dict(item.example.user.history[0].fields) == {"input": "tea?", "output": "Yes!"}
    spelt = write(tmp_path, [{"user": "u", "history": ["a"]}, {"user": "ann ", "history": ["a"]}], "spelt.jsonl")
    with pytest.raises(
        DataMissing, match=r"spelt.jsonl: user 'ann ' is 'ann' of .*mine.jsonl but for how it is written"
    ):
        task(write(tmp_path, [line, line | {"user": "ann"}]), histories=str(spelt)).items(Selection())
    others = write(tmp_path, [{"user": "7", "history": ["a"]}], "others.jsonl")
    with pytest.raises(
        DataMissing, match=r"has the history of no user of .*mine.jsonl; the first there is 'u', here '7'"
    ):
        task(write(tmp_path, [line]), histories=str(others)).items(Selection())


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", b'{"user": 1\n', "line 1: not valid JSON"),
        ("a.jsonl", b"[1]\n", "line 1: expected an object"),
        ("a.jsonl", b"\xff\n", "line 1: byte 0xff is no UTF-8"),
        ("a.jsonl", b"", "has no lines"),
        ("a.json", b"{}", "expected a list of objects"),
        ("a.csv", b"user,text\nann,hi\n", "line 2: field target: Field required"),
        ("a.csv", b'user,text,reply\nann,"a\nb",c\n\nbob,hi\n', "line 5: field target: Field required"),
        ("a.csv", b"user,text,reply,reply\nann,hi,a,b\n", "line 1: column 'reply' stands twice"),
        (
            "a.csv",
            b"user, text,reply\nann,hi,a\n",
            "line 2: field input: Field required; this line has 'user', ' text', 'reply'",
        ),
        ("a.csv", b"user,text,reply\nann,hi, you,c\n", "line 2: more cells than the first line names"),
        ("a.csv", b'user,text,reply\nann,a,b\nbob,"c,d\neve,e,f\n', "line 3: not valid CSV .*is a quote not closed"),
        ("a.csv", b'user,text,reply\nann,"a" or "b",c\n', "line 2: not valid CSV .*or not doubled inside a cell"),
        ("a.jsonl", b'\n\n{"user": 1}\n', "line 3: field input: Field required"),
        ("a.parquet", b"PAR1", "is no parquet file"),
        ("a.jsonl", b"[" * 100_000, "line 1: not valid JSON"),
        ("a.jsonl", b'{"user": "u", "input": "\\ud800", "target": "b"}', "line 1: not valid JSON"),
        ("a.jsonl", b'{"user": "u", "input": "a", "input": "b", "target": "c"}', "line 1: not valid JSON"),
        ("a.csv", b"user,text,reply,history\nu,a,b," + b"[" * 20_000, "line 2: field history"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_line(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataMissing, match=words) as caught:
        task(tmp_path / name).items(Selection())
    assert "\n" not in str(caught.value)


MINE = """
from harness.tasks.users import Users

class Mails(Users):
    \"\"\"Mails of two people.\"\"\"

    name = "mails"

    def read(self):
        return [{"user": f"u{n % 2}", "input": f"mail {n}?", "target": f"reply {n}"} for n in range(4)]
"""


NONE = """
from harness.tasks.users import Users

class Nobody(Users):
    name = "nobody"

    def read(self):
        return [{"user": "ann", "input": "lunch?", "target": "Sure"}]

    def items(self, selection):
        return []
"""


def test_a_task_of_ones_own_is_a_file_of_ten_lines(harness: Callable[[str], Any], toy: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(MINE)
    common = f"--task ./mine.py --model {toy} --max_new_tokens 3 --output_path kept"
    for method in ("plain", "rag"):
        done = harness(f"run --method {method} {common} --limit 3")
        assert done.code == 0, done.err
    rag, plain = sorted(find_runs(Path("kept")), key=lambda run: run.config.method.name, reverse=True)
    assert rag.metrics["rouge1"].n == 3 and rag.config.task.options["source_sha256"]
    compared = harness(f"compare {plain.folder} {rag.folder}")
    assert compared.code == 0, compared.err
    assert harness(f"score {rag.folder}").code == 0
    assert "4 items of 2 users" in harness("data check ./mine.py").out
    checked = harness("check ./mine.py")
    assert checked.code == 0 and checked.out.count("ok  ") == 7, checked.err
    assert "--  not checked: whether train and evaluated items are apart" in checked.out
    leaking = "\n    def respond(self, system, items):\n        for item, sample in zip(items, super().respond(system, items)):\n"
    leaking += "            yield replace(sample, response=item.targets[0])\n"
    (tmp_path / "mine.py").write_text("from dataclasses import replace\n" + MINE + leaking)
    assert "no gold leaks: answers change with the targets" in harness("check ./mine.py").error()
    (tmp_path / "mine.py").write_text(
        MINE + "\n    def items(self, selection):\n        return super().items(type(selection)())\n"
    )
    assert "gave 4 items for --limit 1" in harness("check ./mine.py").error()
    (tmp_path / "mine.py").write_text(MINE.replace('"target"', '"goal"'))
    assert "Mails.read, line 1: field target: Field required" in harness(f"run --method plain {common}").error()
    (tmp_path / "none.py").write_text(NONE)
    assert harness("data check ./none.py").out.splitlines()[1:] == [
        "train: no items",
        "dev: no items",
        "test: no items",
    ]
    (tmp_path / "mine.py").write_text("from harness.task import Task\nclass Half(Task):\n    name = 'half'\n")
    assert (
        "class Half lacks aggregate, fingerprint, generation, grade, items"
        in harness(f"run --method plain {common}").error()
    )


def test_ones_own_users_are_checked_and_run_from_the_command_line(
    harness: Callable[[str], Any], toy: Path, tmp_path: Path
) -> None:
    lines = [{"user": f"u{n % 3}", "text": f"mail {n}, shall we?", "reply": f"reply {n}"} for n in range(6)]
    lines.append(lines[0] | {"user": "u0"})
    write(tmp_path, lines)
    checked = harness("data check mine.jsonl")
    assert checked.code == 0, checked.err
    assert "users: 3 users with 7 lines in mine.jsonl, kind text" in checked.out
    assert "dev: 7 items of 3 users, histories of 0 to 2 items (median 1)" in checked.out
    assert "1 of 7 histories hold the answer (1 the question too): 7" in checked.out
    assert "1 items repeat another one" in checked.out and "3 items have no history" in checked.out
    common = f"--task users:./mine.jsonl --model {toy} --max_new_tokens 3 --output_path kept"
    done = harness(f"run --method rag --set k=1 {common}")
    assert done.code == 0, done.err
    (run,) = find_runs(Path("kept"))
    assert run.metrics["chrf"].n == 7 and run.leaks == {"7": "question"}
    assert harness("run --method plain --task users:./none.jsonl").code == 4
    twice = harness(f"run --method rag --set k=1 --set k=2 {common}")
    assert (
        twice.code == 2
        and "--set k is given as 1 and as 2; give it once; harness sweep --set 'k=1|2' runs both" in twice.error()
    )
    swept = harness(f"sweep --method rag --set k=1|2 --set k=3 {common}")
    assert swept.code == 2 and "--set k is given as 1 and as 3" in swept.error()
    assert "is no file of users" in harness("run --method plain --task users:./mine.txt").error()


def test_a_task_of_each_kind_is_a_few_lines_and_keeps_the_contract(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(EXAMPLES / "support_mails.py"))["main"]("mails.jsonl")
    topics = task_class(str(EXAMPLES / "topics.py"))()
    golds = {"text": "reply", "number": 3}
    kinds = [
        type(kind, (Users,), {"name": kind, "answers": kind, "read": lambda self, gold=gold: _lines(gold)})()
        for kind, gold in golds.items()
    ]
    metrics = {}
    for made in (topics, *kinds):
        kept: list[str] = []
        check_task(made, say=kept.append)
        metrics[made.name] = kept[-1]
    assert metrics["topics"] == "its metrics: macro_f1, accuracy" and metrics["number"] == "its metrics: mae, rmse"
    assert metrics["text"].startswith("its metrics: rouge1, rougeL, meteor")
    (item, *_) = topics.items(Selection())
    assert item.example.choices == ("account", "delivery", "other", "payment", "product")


def _lines(gold: object) -> list[dict[str, Any]]:
    return [{"user": f"u{n}", "input": f"mail {n}", "target": gold, "split": ("train", "dev")[n % 2]} for n in range(8)]
