"""Records that an older version made get the metrics of this one, from their samples and without a model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from harness.records.store import find_runs, read_record
from harness.statistics.compare import compare

RESULTS = Path(__file__).resolve().parents[2] / "results"


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A record with samples, as a version wrote it that gave accuracy an interval of no width."""
    source = next(
        r for r in find_runs(RESULTS, task="lamp2m", method="plain") if (r.folder / "samples.jsonl").is_file()
    )
    folder = tmp_path / "results" / source.folder.relative_to(RESULTS)
    shutil.copytree(source.folder, folder)
    content = json.loads((folder / "run.json").read_text())
    content["metrics"]["accuracy"] |= {"low": 0.5, "high": 0.5}
    (folder / "run.json").write_text(json.dumps(content))
    return folder


def test_intervals_are_computed_again_and_nothing_else_moves(harness, old: Path) -> None:
    before = read_record(old)
    samples = (old / "samples.jsonl").read_bytes()
    assert harness("recompute --check").code == 5
    done = harness("recompute")
    assert done.code == 0 and done.out.startswith("changed ") and "->" not in done.out and "1 changed" in done.err
    after = read_record(old)
    assert after.metrics["accuracy"].low < after.metrics["accuracy"].value < after.metrics["accuracy"].high
    after.metrics["accuracy"] = before.metrics["accuracy"]
    assert after == before
    assert (old / "samples.jsonl").read_bytes() == samples and not (old / "lock").exists()
    assert harness("recompute --check").out == ""


def test_a_value_that_moves_is_named(harness, old: Path) -> None:
    content = json.loads((old / "run.json").read_text())
    content["metrics"]["accuracy"]["value"] = 0.5
    (old / "run.json").write_text(json.dumps(content))
    assert "accuracy 0.5000 -> " in harness("recompute").out


def test_a_record_that_cannot_be_recomputed_is_named_and_left_alone(harness, old: Path) -> None:
    (old / "samples.jsonl").unlink()
    before = (old / "run.json").read_bytes()
    done = harness("recompute")
    assert done.code == 0 and done.out.startswith("no samples ") and (old / "run.json").read_bytes() == before
    assert harness("recompute nowhere").code == 4


def test_a_record_of_another_version_of_its_task_is_a_failure_that_names_it(harness, old: Path) -> None:
    content = json.loads((old / "run.json").read_text())
    content["config"]["task"]["version"] = 7
    (old / "run.json").write_text(json.dumps(content))
    done = harness("recompute")
    assert done.code == 1 and done.out.startswith("failed ") and "version 7 of lamp2m" in done.out


GRADES = """
from dataclasses import replace
from harness.task import Metric
from harness.tasks.lamp import Lamp4

class Mine(Lamp4):
    def grade(self, sample):
        return replace(sample, parsed=sample.response, metrics={{"points": {points}}})

    def aggregate(self, samples):
        return {{"points": Metric(samples[0].metrics["points"], len(samples))}}

    def analysis(self, samples):
        return {{}}
"""


def test_a_record_is_not_graded_by_another_file_than_made_it(harness, toy: Path) -> None:
    """Its name says by which file its numbers are."""
    Path("mine.py").write_text(GRADES.format(points=1.0))
    run = harness(f"run --method copy --task ./mine.py:Mine --model {toy} --limit 6 --output_path out")
    (record,) = find_runs(Path("out"))
    assert run.code == 0 and record.metrics["points"].value == 1.0, run.err
    before = (record.folder / "run.json").read_bytes()
    assert harness(f"score {record.folder}").code == 0
    Path("mine.py").write_text(GRADES.format(points=2.0))
    for command in (f"score {record.folder}", "recompute out", f"certify {record.folder}"):
        done = harness(command)
        assert done.code in (1, 2) and "has changed since; run it again, or put the file back" in done.out + done.err
        assert read_record(record.folder).metrics["points"].value == 1.0
    assert json.loads((record.folder / "run.json").read_bytes())["config"] == json.loads(before)["config"]


NUMBERS = "user,text,reply\nann,a b,1\nann,c d,2\nben,e f,0\nben,g h,3\n"
CHOICES = "".join(
    f'{{"user": "{user}", "input": "pick", "target": "red", "choices": ["red", "blue"], "history": ["x"]}}\n'
    for user in ("ann", "ben", "cho")
)


@pytest.mark.parametrize(
    ("given", "content", "options", "edited", "change"),
    [
        ("csv:mine.csv", NUMBERS, "", "mine.csv", (",0\n", ",zero\n")),
        ("users:./mine.jsonl", CHOICES, "", "mine.jsonl", ('"blue"]', '"blue", "green"]')),
        ("users:./mine.jsonl", CHOICES, "--task_set rubric=./rubric.txt", "rubric.txt", ("polite", "rude")),
    ],
)
def test_a_record_is_not_graded_over_other_data_than_was_answered(
    harness, toy: Path, given: str, content: str, options: str, edited: str, change: tuple[str, str]
) -> None:
    """Its fingerprint says of which data its numbers are."""
    Path(given.partition(":")[2]).write_text(content)
    Path("rubric.txt").write_text("How polite is this? {{ response }}")
    run = harness(f"run --method copy --task {given} {options} --model {toy} --output_path out")
    (record,) = find_runs(Path("out"))
    assert run.code == 0, run.err
    assert harness(f"score {record.folder}").code == 0
    kept, file = [(record.folder / name).read_bytes() for name in ("run.json", "samples.jsonl")], Path(edited)
    was = file.read_text()
    file.write_text(was.replace(*change))
    judge = "--judge openai/gpt-x --judge_base_url http://127.0.0.1:1" if options else ""
    for command, code in ((f"score {record.folder} {judge}", 2), ("recompute out", 1), (f"certify {record.folder}", 2)):
        done = harness(command)
        said = done.out + done.err
        assert done.code == code and f"{edited} has changed since" in said and "put the file back" in said, said
        assert "Traceback" not in said
    if edited != "rubric.txt":  # the rubric's text is read when the task is made
        file.unlink()
        assert (harness(f"score {record.folder}").code, harness("recompute out").code) == (4, 1)
    assert [(record.folder / name).read_bytes() for name in ("run.json", "samples.jsonl")] == kept
    file.write_text(was)
    assert harness(f"score {record.folder}").code == 0 and harness("recompute out").code == 0


def test_a_folder_of_data_is_held_against_the_record_only_where_it_is_given(harness, toy: Path) -> None:
    """Samples hold all that LaMP's grading reads, and the folder that a run read may be elsewhere."""
    assert harness(f"run --method copy --task lamp3 --model {toy} --limit 4 --output_path out").code == 0
    (record,) = find_runs(Path("out"))
    Path("other").mkdir()
    asked = "What is the score of the following review on a scale of 1 to 5? review: a"
    item = {"id": "1", "input": asked, "profile": [{"id": "2", "text": "b", "score": "5"}]}
    Path("other/dev_questions.json").write_text(json.dumps([item]))
    Path("other/dev_outputs.json").write_text(json.dumps({"task": "LaMP_3", "golds": [{"id": "1", "output": "4"}]}))
    assert harness(f"score {record.folder}").code == 0
    done = harness(f"score {record.folder} --data other")
    assert done.code == 2 and "read other data (lamp3: lamp-mini" in done.err and "--data" in done.err


RENAMED = """
from harness.tasks.users import Users

class Mine(Users):
    name = "mine"
    measured = ("exact",)

    def __init__(self, flavour="a"):
        super().__init__()

    def read(self):
        return [{"user": f"u{n}", "input": f"mail {n}", "target": "hi"} for n in range(2)]
"""


def test_a_record_whose_task_has_other_options_now_is_one_line_and_stops_no_other(harness, toy: Path) -> None:
    Path("mine.py").write_text(RENAMED)
    for method in ("copy", "copy --set words=1"):
        done = harness(f"run --method {method} --task ./mine.py --task_set flavour=b --model {toy} --output_path out")
        assert done.code == 0, done.err
    a, b = (run.folder for run in find_runs(Path("out")))
    assert harness(f"score {a}").code == 0
    assert harness(f"run --method copy --task lamp2m --limit 2 --model {toy} --output_path out").code == 0
    Path("mine.py").write_text(RENAMED.replace("flavour", "taste"))
    words = (
        "task 'mine' has other options now than in the record: taste now, flavour=b there; put its file back, or run"
    )
    for command in (f"score {a}", f"certify {a}", f"judge export {a} {b} --output_path pairs"):
        done = harness(command)
        assert done.code == 2 and words in done.error(), command
    done = harness("recompute out")
    assert done.code == 1 and done.out.count(words) == 2 and "2 failed, 1 same" in done.err
    compared = compare([a, b])
    assert any(words in note for note in compared.notes)
    assert harness(f"compare {a} {b} --details").code == 0 and harness(f"show {a}").code == 0
    assert harness("report out --output_path page").code == 0
    assert words[len("task 'mine' ") :] in "".join(path.read_text() for path in Path("page/data").rglob("*.js"))
