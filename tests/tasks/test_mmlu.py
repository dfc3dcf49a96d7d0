"""MMLU: the CSVs read as they are, categories and prompts, users, metrics by hand, records and the command line."""

from __future__ import annotations

import csv
import json
import os
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lm_eval
import numpy as np
import pytest
import yaml

from harness.data import Example
from harness.errors import DataMissing, UsageError
from harness.methods.plain import Plain
from harness.plugins.options import build_task
from harness.run.batches import Batching
from harness.run.contract import random_lm
from harness.run.system import ModelSystem
from harness.statistics.intervals import mean_interval
from harness.task import Generation, Sample, Selection
from harness.tasks.mmlu import CATEGORIES, LETTERS, MMLU, SUBJECTS

SHARED = Path(os.environ.get("HARNESS_SHARED", "../shared/data")).absolute()
STORIES = SHARED / "stories260K/hf"
FIVE = "abstract_algebra,high_school_us_history,moral_scenarios,sociology,virology"


@pytest.fixture(autouse=True)
def _no_data_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HARNESS_DATA", raising=False)


@pytest.fixture(scope="session")
def csvs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five subjects of questions of our own, in the original layout."""
    folder = tmp_path_factory.mktemp("mmlu")
    for split, count in (("dev", 5), ("val", 3), ("test", 6)):
        (folder / "data" / split).mkdir(parents=True)
        for subject in FIVE.split(","):
            rows: list[list[Any]] = [
                [f"{split} {n} of {subject}?", n, n + 1, "NA", n + 3, LETTERS[n % 4]] for n in range(count)
            ]
            rows[0][0] = f' Two lines,\nand a "quote" of {subject}? '
            with (folder / "data" / split / f"{subject}_{split}.csv").open("w", newline="") as file:
                csv.writer(file).writerows(rows)
    return folder


def real() -> str:
    if not (SHARED / "mmlu/data").is_dir():
        pytest.skip(f"no {SHARED / 'mmlu/data'} (set HARNESS_SHARED)")
    return str(SHARED / "mmlu")


# Questions and prompts


def test_the_original_files_have_14042_questions_of_57_subjects_in_four_categories() -> None:
    task = MMLU(real())
    items = task.items(Selection("test"))
    assert len(items) == 14_042
    assert len({item.example.id for item in items}) == 14_042
    counts = Counter(item.example.id.partition("/")[0] for item in items)
    assert len(counts) == 57
    assert [sum(counts[s] for s in CATEGORIES[c]) for c in CATEGORIES] == [3153, 4705, 3077, 3107]
    assert len(task.items(Selection("dev"))) == 1_531
    assert len(task.train_items()) == 285


def test_categories_are_lm_evals() -> None:
    folder = Path(lm_eval.__file__).parent / "tasks/mmlu/default"
    tags = {path.stem: yaml.safe_load(path.read_text()).get("tag") for path in folder.glob("mmlu_*.yaml")}
    ours = {f"mmlu_{s}": f"mmlu_{category}_tasks" for category, subjects in CATEGORIES.items() for s in subjects}
    assert ours == tags
    assert len(SUBJECTS) == 57


def test_a_question_is_asked_as_lm_eval_asks_it(csvs: Path) -> None:
    first, second, *_ = MMLU(str(csvs), "virology").items(Selection("test"))
    about = "The following are multiple choice questions (with answers) about virology.\n\n"
    assert first.example.text == (f'{about}Two lines,\nand a "quote" of virology?\nA. 0\nB. 1\nC. NA\nD. 3\nAnswer:')
    assert (first.example.choices, first.targets) == ((" A", " B", " C", " D"), (" A",))
    assert second.targets == (" B",)
    shots = MMLU(str(csvs), "virology", num_fewshot=2).items(Selection("test"))[1].example.text
    assert shots.startswith(f"{about}Two lines")
    assert "C. NA\nD. 4\nAnswer: B\n\ntest 1 of virology?" in shots
    assert shots.count("Answer:") == 3


def test_cloze_asks_as_smollm_is_evaluated_and_shows_no_choices(csvs: Path) -> None:
    first, second, *_ = MMLU(str(csvs), "virology", format="cloze").items(Selection("test"))
    about = "The following are questions about virology.\n"
    assert first.example.text == f'{about}Question:  Two lines,\nand a "quote" of virology? \nAnswer:'
    assert (first.example.choices, first.targets) == ((" 0", " 1", " NA", " 3"), (" 0",))
    assert second.targets == (" 2",)
    shots = MMLU(str(csvs), "virology", num_fewshot=2, format="cloze").items(Selection("test"))[1].example.text
    assert shots.startswith(f"{about}Question:  Two lines")
    assert shots.endswith("Answer: 2\n\nQuestion: test 1 of virology?\nAnswer:")


def test_cloze_under_a_chat_template_is_one_turn_of_the_user_as_lighteval_writes_it(csvs: Path) -> None:
    def first(*settings: str) -> tuple[Example, list[tuple[str, str]]]:
        task, _ = build_task(MMLU, "mmlu", ["subjects=virology", "format=cloze", *settings], str(csvs))
        example = task.items(Selection("test"))[0].example
        content = example.prompt().render().content  # type: ignore[union-attr]
        return example, [("", content)] if isinstance(content, str) else [(turn.role, turn.content) for turn in content]

    (plain, [(_, text)]), (example, turns) = first(), first("apply_chat_template=true")
    assert turns == [("user", text)] and example.choices == plain.choices == (" 0", " 1", " NA", " 3")
    _, turns = first("apply_chat_template=true", "num_fewshot=2", "fewshot_as_multiturn=true")
    assert [role for role, _ in turns] == ["user", "assistant"] * 2 + ["user"]
    assert turns[0][1].startswith("The following are questions about virology.\nQuestion: ")


def test_the_likeliest_text_a_character_wins_in_one_prefill_a_question(csvs: Path) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    lm = random_lm(max_position_embeddings=4096)
    task = MMLU(str(csvs), FIVE, format="cloze")
    items = {item.example.id: item.example for item in task.items(Selection("test"))}
    system = ModelSystem(lm, Plain(), Generation(1), batching=Batching(8))
    samples = [task.grade(sample) for sample in task.respond(system, task.items(Selection("test")))]
    assert system.decoder.cost.prefill_tokens < 1.05 * sum(sample.prompt_tokens for sample in samples)
    asked = [(sample, choice) for sample in samples for choice in items[sample.id].choices]
    requests = [Instance("loglikelihood", {}, (items[s.id].text, choice), 0) for s, choice in asked]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = HFLM(pretrained=lm.model, tokenizer=lm.encoder.tokenizer, batch_size=8, device="cpu")
    found = [logprob for logprob, _ in model.loglikelihood(requests, disable_tqdm=True)]
    assert [v for s in samples for v in s.extra["logprobs"]] == pytest.approx(found, abs=1e-8)
    summed = 0
    for number, sample in enumerate(samples):
        four, choices = found[4 * number : 4 * number + 4], items[sample.id].choices
        per_character = [value / (len(choice) - 1) for value, choice in zip(four, choices, strict=True)]
        assert sample.response == choices[int(np.argmax(per_character))]
        summed += sample.response != choices[int(np.argmax(four))]
    assert summed > 0  # the sum would have chosen another


def test_an_example_of_dev_is_not_among_its_own_examples(csvs: Path) -> None:
    for item in MMLU(str(csvs), "virology", num_fewshot=5).train_items():
        question = item.example.text.rpartition("\n\n")[2]
        assert item.example.text.count(question.partition("\n")[0]) == 1
        assert item.example.text.count("Answer:") == 5


def test_subjects_are_names_and_categories(csvs: Path) -> None:
    assert MMLU(subjects="virology, stem").subjects == sorted([*CATEGORIES["stem"], "virology"])
    assert MMLU().subjects == SUBJECTS
    few = MMLU(str(csvs), "virology,sociology", per_subject=2)
    assert (len(few.items(Selection("test"))), len(few.train_items())) == (4, 10)
    assert len(MMLU(str(csvs), FIVE).items(Selection("test", limit=7))) == 7


@pytest.mark.parametrize(
    ("options", "split", "words"),
    [
        ({"subjects": "virologie"}, "test", "no subject 'virologie'; did you mean 'virology'?"),
        ({"subjects": "virology", "num_fewshot": 9}, "test", "num_fewshot=9 asked for; virology has 5 examples in dev"),
        ({"subjects": "virology"}, "validation", "mmlu has no split 'validation'"),
        ({"subjects": "virology", "users_from": "mmlu"}, "test", "its users are borrowed too"),
    ],
)
def test_a_mistake_says_what_is_allowed(csvs: Path, options: dict[str, Any], split: str, words: str) -> None:
    with pytest.raises(UsageError, match=words.replace("?", r"\?")):
        MMLU(str(csvs), **options).items(Selection(split))


def test_missing_and_damaged_files_are_named(csvs: Path, tmp_path: Path) -> None:
    with pytest.raises(DataMissing, match=r"no folder .*data.tar"):
        MMLU().items(Selection("test"))
    with pytest.raises(DataMissing, match=r"holds no test/virology_test.csv; fetch https"):
        MMLU(str(tmp_path), "virology").items(Selection("test"))
    (tmp_path / "test").mkdir()
    for row in ("question,1,2,3,4\n", "question,1,2,3,4,E\n", 'question,1,2,3,4,""\n'):
        (tmp_path / "test/virology_test.csv").write_text("fine?,1,2,3,4,A\n" + row)
        with pytest.raises(
            DataMissing, match=r"virology_test.csv, row 1: expected question, four choices and a letter"
        ):
            MMLU(str(tmp_path), "virology").items(Selection("test"))
    (tmp_path / "test/virology_test.csv").write_text('fine?,1,2,3,4,A\n"open?,1,2,3,4,A\nlost?,1,2,3,4,A\n')
    with pytest.raises(DataMissing, match=r"virology_test.csv, line 3: not valid CSV .*is a quote not closed"):
        MMLU(str(tmp_path), "virology").items(Selection("test"))
    (tmp_path / "test/virology_test.csv").write_text("")
    with pytest.raises(DataMissing, match=r"virology_test.csv holds no question"):
        MMLU(str(tmp_path), "virology").items(Selection("test"))


def test_a_byte_order_mark_is_no_part_of_the_question_and_other_bytes_are_refused(csvs: Path, tmp_path: Path) -> None:
    source = csvs / "data/test/virology_test.csv"
    (tmp_path / "test").mkdir()
    target = tmp_path / "test/virology_test.csv"
    target.write_bytes(b"\xef\xbb\xbf" + source.read_bytes())
    marked, plain = (
        MMLU(str(folder), subjects="virology").items(Selection("test", limit=1))[0].example.text
        for folder in (tmp_path, csvs)
    )
    assert marked == plain
    target.write_bytes(b"What is a virus?,a,b,c,d,A\r\nIs caf\xe9 one?,a,b,c,d,B\r\n")
    with pytest.raises(DataMissing, match=r"virology_test.csv, row 1, cell 0: byte 0xe9 is no UTF-8"):
        MMLU(str(tmp_path), subjects="virology").items(Selection("test"))
    target.write_bytes("What is a virus?,a,b,c,d,A\n".encode("utf-16"))
    with pytest.raises(DataMissing, match=r"virology_test.csv, row 0, cell 0: byte 0xff is no UTF-8"):
        MMLU(str(tmp_path), subjects="virology").items(Selection("test"))
    target.write_bytes(b'What is a virus?,a,b,c,d,A\n"Is it one?,a,b,c,d,' + b"x" * 140_000)
    with pytest.raises(
        DataMissing, match=r"virology_test.csv, (line 2: not valid CSV .*is a quote not closed|row 1: expected)"
    ):
        MMLU(str(tmp_path), subjects="virology").items(Selection("test"))


def test_the_fingerprint_covers_what_is_read_and_whose_users(csvs: Path) -> None:
    test = Selection("test")
    base = MMLU(str(csvs), "virology").fingerprint(test)
    others = [
        MMLU(str(csvs), "sociology").fingerprint(test),
        MMLU(str(csvs), "virology", num_fewshot=1).fingerprint(test),
        MMLU(str(csvs), "virology", users_seed=1).fingerprint(test),
        MMLU(str(csvs), "virology", users_from="lamp3").fingerprint(test),
        MMLU(str(csvs), "virology").fingerprint(Selection("dev")),
    ]
    assert base == MMLU(str(csvs / "data"), "virology").fingerprint(test)
    assert len({base, *others}) == 6


# Answers and metrics


def test_metrics_are_means_over_questions_with_intervals_over_questions() -> None:
    task = MMLU(subjects="virology,sociology,marketing")
    rng = np.random.default_rng(0)
    samples = [
        task.grade(Sample(f"{subject}/{n}", "u", response=f" {LETTERS[rng.integers(4)]}", targets=(" B",)))
        for subject, count in (("virology", 30), ("sociology", 10), ("marketing", 20))
        for n in range(count)
    ]
    right = {sample.id: float(sample.response == " B") for sample in samples}
    found = task.aggregate([*samples, Sample("virology/99", "u", error="failed")])
    assert found["accuracy"].value == pytest.approx(np.mean(list(right.values())))
    assert found["accuracy"].n == 60
    assert (found["accuracy"].low, found["accuracy"].high) == mean_interval(list(right.values()), list(right))
    other = [value for name, value in right.items() if not name.startswith("sociology")]
    assert (found["accuracy_other"].value, found["accuracy_other"].n) == (pytest.approx(np.mean(other)), 50)
    assert found["accuracy/sociology"].n == 10
    subjects = [found[f"accuracy/{name}"].value for name in ("virology", "sociology", "marketing")]
    macro = found["accuracy_macro"]
    assert macro.value == pytest.approx(np.mean(subjects)) and macro.value != pytest.approx(found["accuracy"].value)
    assert macro.low < macro.value < macro.high and macro.n == 60
    assert list(found)[:3] == ["accuracy", "accuracy_social_sciences", "accuracy_other"]
    assert {sample.parsed for sample in samples} <= set(LETTERS)


def test_a_question_costs_one_row_and_examples_run_once_a_subject(csvs: Path) -> None:
    lm = random_lm(max_position_embeddings=4096)
    spent = {}
    for shots in (0, 5):
        task = MMLU(str(csvs), "virology,sociology", num_fewshot=shots)
        items = task.items(Selection("test"))
        system = ModelSystem(lm, Plain(), Generation(1), batching=Batching(6))
        samples = list(task.respond(system, items))
        spent[shots] = system.decoder.cost.prefill_tokens, sum(sample.prompt_tokens for sample in samples)
        # letters are two bytes long here: the space before them is read once a question
        assert system.decoder.cost.decode_tokens == len(items)
        assert len({i.partition("/")[0] for i in system.batching.planned[0]}) == (1 if shots else 2)
    assert spent[5][0] < 0.4 * spent[5][1]


def test_contexts_that_were_cut_are_in_the_note(csvs: Path) -> None:
    lm = random_lm(max_position_embeddings=64)
    task = MMLU(str(csvs), "virology")
    samples = [
        task.grade(s) for s in task.respond(ModelSystem(lm, Plain(), Generation(1)), task.items(Selection("test")))
    ]
    assert task.aggregate(samples)["accuracy"].note == "6 of 6 contexts cut from the left"
    assert all(sample.cut_tokens > 0 and sample.prompt_tokens == 63 for sample in samples)


# The command line


def _samples(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def test_a_run_evaluates_test_and_records_the_user_of_every_question(harness: Callable, toy: Path, csvs: Path) -> None:
    line = f"run --task mmlu --model {toy} --data {csvs} --task_set subjects={FIVE} --num_fewshot 1"
    done = harness(f"{line} --method plain --method rag --set rag.k=1 --batch_size 7")
    assert done.code == 0, done.err
    folders = {path.parent.name.partition("-")[0]: path.parent for path in Path("runs").glob("*/mmlu/*/run.json")}
    records = {name: json.loads((folder / "run.json").read_text()) for name, folder in folders.items()}
    users = {name: {s["id"]: s["user"] for s in _samples(folder)} for name, folder in folders.items()}
    assert users["plain"] == users["rag"]
    assert len(set(users["plain"].values())) > 20
    for record in records.values():
        assert record["config"]["data"]["split"] == "test"
        assert record["metrics"]["accuracy"]["n"] == 30
        assert len(record["metrics"]) == 1 + 4 + 1 + 5
        assert record["health"]["unparsed"] == 0
    assert records["rag"]["health"]["kl_to_base"] > 0
    assert harness("leaderboard runs --output_path leaderboard.md").code == 0
    assert "accuracy/virology" not in Path("leaderboard.md").read_text()
    assert "accuracy_stem" in Path("leaderboard.md").read_text()


def test_a_killed_run_goes_on_and_ends_with_the_same_metrics(harness: Callable, toy: Path, csvs: Path) -> None:
    line = f"run --task mmlu --method plain --model {toy} --data {csvs} --task_set subjects={FIVE} --batch_size 7"
    assert harness(f"{line} --output_path whole").code == 0
    assert harness(f"{line} --output_path killed").code == 0
    (whole,), (killed,) = (list(Path(name).glob("*/*/*/run.json")) for name in ("whole", "killed"))
    record, lines = (
        json.loads(killed.read_text()),
        killed.with_name("samples.jsonl").read_text().splitlines(keepends=True),
    )
    killed.write_text(json.dumps({**record, "status": "running", "metrics": {}}))
    killed.with_name("samples.jsonl").write_text("".join(lines[:17]) + lines[17][:40])
    assert harness(f"{line} --output_path killed").code == 0
    assert json.loads(killed.read_text())["metrics"] == json.loads(whole.read_text())["metrics"]
    by_id = {sample["id"]: sample for sample in _samples(whole.parent)}
    assert {sample["id"]: sample for sample in _samples(killed.parent)} == by_id


@pytest.mark.parametrize("model", ["stories260K", "tiny"])
def test_five_subjects_run_under_every_kind_of_method(harness: Callable, model: str) -> None:
    data = real()
    if model != "tiny" and not STORIES.is_dir():
        pytest.skip(f"no {STORIES} (set HARNESS_SHARED)")
    methods = "--method plain --method rag --method cad --method dps --set dps.heads=2 --set rag.k=1 --set cad.k=1 --set dps.k=0"
    line = f"--model {'tiny' if model == 'tiny' else STORIES} --data {data} --task_set subjects={FIVE} --task_set per_subject=1"
    done = harness(f"run --task mmlu {methods} {line} --fit_task lamp4 --fit_data lamp-mini --set dps.samples=2 --json")
    assert done.code == 0, done.err
    records = [json.loads(line) for line in done.out.splitlines()]
    assert [record["config"]["method"]["name"] for record in records] == ["plain", "rag", "cad", "dps"]
    for record in records:
        assert (record["status"], record["metrics"]["accuracy"]["n"], record["health"]["errors"]) == ("complete", 5, 0)
        assert record["health"]["noop"] in (None, False)
