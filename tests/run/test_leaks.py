"""Histories that hold the answer are counted and named, and train items that are evaluated too are refused."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.data import Example, HistoryItem, Labelled, User
from harness.engine.model import LanguageModel
from harness.errors import UsageError
from harness.fit.artifacts import ArtifactStore
from harness.method import Fitted, Method
from harness.methods.plain import Plain
from harness.plan import Plan, Stream
from harness.records.store import find_runs, read_samples
from harness.run.cell import Cell, Settings
from harness.run.contract import ToyTemplate
from harness.run.leaks import leak_of, leaks, unlike_histories
from harness.run.steps import run_cell
from harness.task import Selection
from harness.tasks.lamp import Lamp3, Lamp4, Lamp7

SHARED = Path(os.environ.get("HARNESS_SHARED", "../shared/data")).absolute()
needs_lamp = pytest.mark.skipif(not (SHARED / "lamp").is_dir(), reason=f"no lamp in {SHARED} (set HARNESS_SHARED)")


def item(
    history: Sequence[dict[str, str]], *, gold: str = "Dogs run, fast!", query: str = "a dog ran far", **changed: Any
) -> Labelled:
    records = tuple(HistoryItem(str(n), fields, " ".join(fields.values())) for n, fields in enumerate(history))
    example = Example("1", User("u", records), f"Title: {query}", query, ToyTemplate())
    return Labelled(replace(example, **changed), (gold,))


@pytest.mark.parametrize(
    ("history", "kind"),
    [
        ([], None),
        ([{"text": "a cat sat still", "title": "Cats sit"}], None),
        ([{"text": "a cat sat still", "title": " Dogs run, fast! "}], "answer"),
        ([{"text": "a cat sat still", "title": "dogs run  fast"}], "near"),
        ([{"text": "A dog ran far.", "title": "dogs run, fast!"}], "question"),
        ([{"text": "a dog ran far", "title": "Another headline"}], None),
        ([{"title": "dogs run fast"}, {"title": "Dogs run, fast!"}, {"title": "Cats"}], "answer"),
        ([{"title": "Dogs run, fast! And cats sit"}], None),
        ([{"title": f"Dogs {' ' * 99} run, _fast_"}], "near"),
        ([{"title": "\uff24ogs run, fa\u200dst"}], None),
        ([{"title": "\uff24ogs\u200b run, fast"}], "near"),
    ],
)
def test_a_history_holds_the_answer_with_its_question_word_for_word_or_nearly(history: Any, kind: str | None) -> None:
    assert leak_of(item(history), closed=False) == kind


def test_letters_that_look_alike_are_alike_and_numbers_are_texts() -> None:
    assert leak_of(item([{"title": "Caf\u00e9 ol\u00e9"}], gold="Cafe\u0301 ole\u0301!"), closed=False) == "near"
    rated = item([{"title": "a"}], gold="5")
    history = (HistoryItem("0", {"score": 5}, ""),)  # type: ignore[dict-item]
    user = replace(rated.example.user, history=history)
    assert leak_of(replace(rated, example=replace(rated.example, user=user)), closed=False) == "answer"


def test_a_label_of_a_short_list_gives_nothing_away_unless_its_question_is_there_too() -> None:
    other, same = {"text": "a cat sat still", "tag": "comedy"}, {"text": "A dog ran far", "tag": "comedy"}
    for closed, choices in ((True, ()), (False, ("comedy", "action"))):
        assert leak_of(item([other], gold="comedy", choices=choices), closed=closed) is None
        assert leak_of(item([other, same], gold="comedy", choices=choices), closed=closed) == "question"


@needs_lamp
def test_the_leaks_of_lamps_dev_users_are_counted() -> None:
    headline, tweet = (
        Counter(leaks(task, task.items(Selection("dev"))).values())
        for task in (Lamp4(str(SHARED / "lamp")), Lamp7(str(SHARED / "lamp")))
    )
    # 3 users have the article with its headline, 11 the headline; 14 the tweet; and some it but for case or punctuation
    assert headline == {"question": 3, "answer": 8, "near": 1}
    assert tweet == {"answer": 14, "near": 4}


def _write(folder: Path, golds: Sequence[str]) -> None:
    """Four LaMP-4 questions; the first user's history has the gold headline."""
    asked = [
        {
            "id": str(n),
            "input": f"Generate a headline for the following article: Article {n} is long.",
            "profile": [{"id": f"{n}{i}", "text": f"text {n} {i}", "title": f"title {n} {i}"} for i in range(2)],
        }
        for n in range(4)
    ]
    folder.mkdir(parents=True)
    (folder / "dev_questions.json").write_text(json.dumps(asked))
    answers = [{"id": str(n), "output": gold} for n, gold in enumerate(golds)]
    (folder / "dev_outputs.json").write_text(json.dumps({"task": "LaMP_4", "golds": answers}))


def test_a_run_names_its_leaks_and_exclude_leaks_makes_another_record_without_them(
    harness: Callable[[str], Any], toy: Path, tmp_path: Path
) -> None:
    _write(tmp_path / "data", ["title 0 1", "b", "c", "TITLE 3, 0"])
    line = f"run --method rag --task lamp4 --data data --model {toy} --max_new_tokens 2 --set k=1 --output_path kept"
    done = harness(line)
    assert (
        "2 of 4 histories hold the answer (1 the answer word for word, 1 it but for case and punctuation)" in done.err
    )
    (whole,) = find_runs(Path("kept"))
    assert (whole.health.leaks, whole.leaks) == (2, {"0": "answer", "3": "near"})
    done = harness(f"{line} --exclude_leaks")
    assert "hold the answer" not in done.err
    (kept,) = [run for run in find_runs(Path("kept")) if run.hash != whole.hash]
    assert kept.config.selection.exclude_leaks and kept.health.leaks == 0
    assert kept.folder is not None and {sample.id for sample in read_samples(kept.folder)} == {"1", "2"}
    assert kept.metrics["rouge1"].n == 2


def test_a_control_is_answered_on_the_same_items_and_counts_the_histories_it_gave(
    tmp_path: Path,
) -> None:
    _write(tmp_path / "data", ["title 0 1", "b", "c", "d"])
    task = Lamp4(str(tmp_path / "data"))
    cell = Cell("plain", Plain(), "lamp4", task, Settings(control="wrong_user", output_path=tmp_path))
    assert leaks(task, cell.own_items) and not leaks(task, cell.items)
    without = replace(cell, settings=replace(cell.settings, exclude_leaks=True))
    assert [i.example.id for i in without.items] == [i.example.id for i in without.own_items] == ["1", "2", "3"]


# Fitted on what is evaluated


@dataclass(frozen=True)
class Reader(Method):
    """Fits on the train split and learns nothing."""

    def fit(self, kit: Any, train: Sequence[Labelled]) -> Fitted:
        return Fitted({"count": torch.tensor([len(train)])})

    def plan(self, example: Example, shared: Fitted | None, personal: Fitted | None) -> Plan:
        return Plan((Stream(example.prompt()),))


class _Deaf(Lamp3):
    """Gives the dev items whatever split is asked for, under the ids `rename` makes of theirs."""

    rename: Callable[[str], str] = staticmethod(lambda name: name)
    user: Callable[[str], str] = staticmethod(lambda name: name)
    write: Callable[[str], str] = staticmethod(lambda text: text)

    def items(self, selection: Selection) -> Sequence[Labelled]:
        found = super().items(replace(selection, split="dev"))
        if selection.split != "train":
            return found
        return [replace(i, example=self._renamed(i.example)) for i in found]

    def _renamed(self, example: Example) -> Example:
        found = replace(example, id=self.rename(example.id), user=replace(example.user, id=self.user(example.user.id)))
        return replace(found, text=self.write(found.text))


@pytest.mark.parametrize("ids", ["same", "other ids", "other ids and users", "written otherwise"])
def test_items_that_are_fitted_on_and_evaluated_are_refused(lm: LanguageModel, tmp_path: Path, ids: str) -> None:
    changed: dict[str, Any] = {"same": {}, "other ids": {"rename": staticmethod("train/{}".format)}}.get(
        ids, {"rename": staticmethod("train/{}".format), "user": staticmethod("reader {}".format)}
    )
    if ids == "written otherwise":
        changed["write"] = staticmethod(lambda text: f"{text.upper()} \n")
    task = type("Deaf", (_Deaf,), changed)()
    cell = Cell("reader", Reader(), "lamp3", task, Settings(limit=4, output_path=tmp_path))
    with pytest.raises(
        UsageError, match=r"lamp3: . of 4 evaluated items.*fit on other items: .*--fit_split SPLIT:SHARE"
    ):
        run_cell(lm, cell, store=ArtifactStore(tmp_path / "store"))
    assert not (tmp_path / "store").exists()
    apart = replace(cell, settings=replace(cell.settings, fit_split="dev:0.2", max_new_tokens=2))
    assert run_cell(lm, apart, store=ArtifactStore(tmp_path / "store")).record.status == "complete"


@pytest.mark.parametrize("method", ["dps", "lora_c", "oppu", "perfit", "decore", "clamp", "persona_vector"])
def test_no_method_that_fits_is_fitted_on_what_is_evaluated(method: str, tmp_path: Path) -> None:
    from harness.plugins.registry import method_class

    cell = Cell(method, method_class(method)(), "lamp3", _Deaf(), Settings(limit=4))
    with pytest.raises(UsageError, match="are also fitted on"):
        _ = cell.shared_with_fit


class _Endless(Lamp3):
    ignored = "limit"

    def items(self, selection: Selection) -> Sequence[Labelled]:
        given: dict[str, Any] = {self.ignored: frozenset() if self.ignored == "exclude_users" else None}
        return super().items(replace(selection, **given))


@pytest.mark.parametrize(
    ("ignored", "settings", "words"),
    [
        (
            "limit",
            {"limit": 2},
            "gave 200 items for --limit 2; it keeps to the selection where it returns selection.of",
        ),
        ("users", {"users": 3}, "gave items of 200 users for --users 3"),
        ("exclude_users", {"fit_split": "dev:0.2"}, "who is held out for fitting"),
    ],
)
def test_a_selection_that_a_task_ignores_is_refused(ignored: str, settings: dict[str, Any], words: str) -> None:
    task = type("Endless", (_Endless,), {"ignored": ignored})()
    with pytest.raises(UsageError, match=f"task lamp3: items .*{words}"):
        _ = Cell("reader", Reader(), "lamp3", task, Settings(**settings)).items


def test_a_history_that_answers_another_question_of_its_user_is_found_where_the_user_is_learnt_from_it() -> None:
    asked = item([{"text": "a cat sat still"}], gold="Cats sit.")
    other = item([{"text": "Cats sit."}, {"text": "a cow"}], gold="Cows lie.")
    longer = item([{"text": "a cow"}, {"text": "a cat sat still"}])
    assert unlike_histories([asked, longer]) == {}
    found = unlike_histories([longer, asked, other])
    assert [(one.example.user.history, one.targets) for one in found["u"]] == [
        (asked.example.user.history, other.targets)
    ]
    swapped = unlike_histories([other, item([{"text": "a cow"}], gold="Cats sit.", id="2"), asked])
    assert [one.example.user.history[0].document for one in swapped["u"]] == ["a cow"]
    learnt = unlike_histories([asked, item([{"text": "x"}, {"text": "y"}], gold="a cat sat still", id="2")])["u"]
    assert leaks(Lamp4(), learnt) == {"2": "answer"}
