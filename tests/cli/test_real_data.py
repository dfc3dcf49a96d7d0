"""The command on real LaMP files and a real trained model: exit codes, counts, and metrics that any library confirms.

The model knows no instructions, so scores mean nothing here; its 512 tokens cannot hold every query.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from rouge_score.rouge_scorer import RougeScorer
from sklearn.metrics import accuracy_score, f1_score, mean_absolute_error, root_mean_squared_error

from harness.cli.app import main
from harness.engine.training.train import _School
from harness.fit.kit import ModelKit
from harness.publish.tables.measured import NOT_OFFICIAL
from harness.records.store import RunFolder
from harness.statistics import metrics
from harness.task import Selection
from harness.tasks.lamp import Lamp, Lamp1, Lamp2M, Lamp3, Lamp4, Lamp5, Lamp7
from harness.tasks.lamp_prompts import LABELS

SHARED = Path(os.environ.get("HARNESS_SHARED", "../shared/data")).absolute()
MODEL = SHARED / "stories260K/hf"


class Run(NamedTuple):
    exit_code: int
    record: dict[str, Any]
    samples: list[dict[str, Any]]
    said: str


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Run]:
    """`harness run` with the arguments given, on the real model and data."""
    for folder in (MODEL, SHARED / "lamp"):
        if not folder.is_dir():
            pytest.skip(f"no {folder} (set HARNESS_SHARED)")
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "cache"))

    def harness(*arguments: str) -> Run:
        places = ["--model", str(MODEL), "--data", str(SHARED / "lamp"), "--output_path", str(tmp_path / "results")]
        monkeypatch.setattr("sys.argv", ["harness", "run", *arguments, *places, "--device", "cpu"])
        code: Any = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code or 0
        said = capsys.readouterr()
        (folder,) = {path.parent for path in (tmp_path / "results").glob("*/*/*/run.json")}
        lines = (folder / "samples.jsonl").read_text().splitlines() if (folder / "samples.jsonl").exists() else []
        samples = [json.loads(line) for line in lines]
        return Run(code, json.loads((folder / "run.json").read_text()), samples, said.err)

    return harness


def value(done: Run, name: str) -> float:
    return done.record["metrics"][name]["value"]


def golds(task: str) -> dict[str, str]:
    entries = json.loads((SHARED / f"lamp/{task}/dev_outputs.json").read_text())["golds"]
    return {entry["id"]: entry["output"] for entry in entries}


@pytest.mark.parametrize("cls", [Lamp1, Lamp2M, Lamp3, Lamp4, Lamp5, Lamp7])
def test_tables_know_in_what_these_files_are_less_than_lamps(cls: type[Lamp]) -> None:
    if not (SHARED / "lamp").exists():
        pytest.skip(f"no {SHARED / 'lamp'} (set HARNESS_SHARED)")
    made = cls(str(SHARED / "lamp"))
    said = NOT_OFFICIAL[made.fingerprint(Selection("dev"))]
    provenance = json.loads(made.questions_file("dev").with_name("profile_provenance.json").read_text()).values()
    if any(one.get("heldout") for one in provenance):
        assert said.startswith(f"{cls.name} questions are items of")
    else:
        assert (
            said == f"{sum(one['complete'] for one in provenance)} of {len(provenance)} {cls.name} profiles are whole"
        )


@pytest.mark.parametrize("method", ["plain", "rag", "cad"])
def test_tweets_are_answered_and_scored_as_rouge_score_and_nltk_do(run, method):
    done = run("--method", method, "--task", "lamp7", "--limit", "12", "--max_new_tokens", "12")
    assert done.exit_code == 0
    assert len(done.samples) == 12
    expected, scorer = golds("LaMP_7"), RougeScorer(["rouge1", "rougeL"], use_stemmer=False)
    scores = [scorer.score(expected[s["id"]].strip(), s["response"].strip()) for s in done.samples]
    for name in ("rouge1", "rougeL"):
        assert value(done, name) == pytest.approx(sum(score[name].fmeasure for score in scores) / 12, abs=1e-12)
    if metrics.wordnet_missing():
        assert done.record["metrics"]["meteor_unsplit"]["value"] is None
        assert "apt install wordnet-base" in done.record["metrics"]["meteor_unsplit"]["note"]
        return
    from nltk import word_tokenize
    from nltk.translate.meteor_score import single_meteor_score

    meteors = [
        single_meteor_score(
            word_tokenize(expected[s["id"]].strip(), preserve_line=True),
            word_tokenize(s["response"].strip(), preserve_line=True),
            wordnet=metrics._wordnet(),  # type: ignore[arg-type]
        )
        for s in done.samples
    ]
    assert value(done, "meteor_unsplit") == pytest.approx(sum(meteors) / 12, abs=1e-12)


def test_citations_are_scored_as_scikit_learn_does(run):
    done = run("--method", "rag", "--task", "lamp1", "--limit", "10", "--max_new_tokens", "4")
    assert done.exit_code == 0
    labels, expected = list(LABELS["lamp1"]), golds("LaMP_1")
    answers = [s["response"].strip() if s["response"].strip() in labels else "none" for s in done.samples]
    targets = [expected[s["id"]] for s in done.samples]
    assert value(done, "accuracy") == pytest.approx(accuracy_score(targets, answers))
    assert value(done, "f1") == pytest.approx(
        f1_score(targets, answers, labels=labels, average="macro", zero_division=0)
    )
    assert done.record["health"]["unparsed"] == answers.count("none")


def test_queries_that_do_not_fit_are_counted_and_named_and_the_rest_is_scored(run):
    done = run("--method", "rag", "--task", "lamp3", "--limit", "16", "--max_new_tokens", "4")
    assert done.exit_code == 3
    failed = [s for s in done.samples if s["error"]]
    answered = [s for s in done.samples if not s["error"]]
    assert failed
    assert answered
    assert len(done.samples) == 16
    assert done.record["status"] == "partial"
    assert done.record["health"]["errors"] == len(failed)
    assert f"{len(failed)} samples failed" in done.said
    assert all("never cut" in s["error"] and s["response"] is None and not s["metrics"] for s in failed)
    assert done.record["health"]["dropped_items"] == sum(s["dropped_items"] for s in answered) > 0
    expected = golds("LaMP_3")
    targets = [float(expected[s["id"]]) for s in answered]
    counted = [
        metrics.rating_or_farthest(metrics.parse_rating(s["response"]), gold)
        for s, gold in zip(answered, targets, strict=True)
    ]
    assert done.record["metrics"]["mae"]["n"] == len(answered)
    assert value(done, "mae") == pytest.approx(mean_absolute_error(targets, counted))
    assert value(done, "rmse") == pytest.approx(root_mean_squared_error(targets, counted))


def test_heads_are_found_on_a_share_of_the_users_that_is_left_out_of_the_evaluation(run):
    options = ("--limit", "6", "--max_new_tokens", "4", "--set", "samples=4")
    done = run("--method", "dps", "--task", "lamp1", "--fit_split", "dev:0.2", *options)
    assert done.exit_code == 0
    assert len(done.samples) == 6
    assert done.record["config"]["data"]["fit_split"] == "dev:0.2"


def killed(monkeypatch: pytest.MonkeyPatch, owner: type, name: str, at: int) -> None:
    """Interrupts the call number `at` of a function."""
    function, calls = getattr(owner, name), itertools.count(1)

    def call(*arguments: Any, **options: Any) -> Any:
        if next(calls) == at:
            raise KeyboardInterrupt
        return function(*arguments, **options)

    monkeypatch.setattr(owner, name, call)


@pytest.mark.parametrize(
    ("method", "owner", "name"), [("perfit", _School, "_update"), ("style_vector", ModelKit, "last_tokens")]
)
def test_users_adapted_to_and_killed_on_the_way_answer_as_if_nothing_had_been(
    run, tmp_path, monkeypatch, method, owner, name
):
    options = (
        "--users",
        "6",
        "--fit_split",
        "dev:0.004",
        "--max_new_tokens",
        "8",
        "--batch_size",
        "2",
        "--set",
        "items=3",
    )
    arguments = ("--method", method, "--task", "lamp7", *options)
    whole = run(*arguments)
    assert whole.exit_code == 0 and whole.record["cost"]["stored_bytes_per_user"] > 0
    shutil.rmtree(tmp_path / "results")
    shutil.rmtree(tmp_path / "cache")
    for moment in ((owner, name, 2), (RunFolder, "append", 2)):
        with monkeypatch.context() as patch:
            killed(patch, *moment)
            assert run(*arguments).exit_code == 130
    done = run(*arguments)
    assert done.exit_code == 0 and done.record["status"] == "complete"
    for part in ("metrics", "analysis", "health"):
        assert done.record[part] == whole.record[part]
    assert [(s["id"], s["response"]) for s in done.samples] == [(s["id"], s["response"]) for s in whole.samples]


def test_a_method_that_fits_needs_a_train_split_and_says_how_to_do_without(monkeypatch, tmp_path, capsys):
    if not (SHARED / "lamp").is_dir() or not MODEL.is_dir():
        pytest.skip(f"no {SHARED}/lamp and {MODEL} (set HARNESS_SHARED)")
    arguments = f"run --method dps --task lamp7 --model {MODEL} --data {SHARED}/lamp --output_path {tmp_path}"
    monkeypatch.setattr("sys.argv", ["harness", *arguments.split()])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 4
    assert "--fit_split dev:0.2" in " ".join(capsys.readouterr().err.split())
