"""What a stranger's task gives back that it should not is one line, and what it forgets to copy is copied."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.engine.model import LanguageModel
from harness.errors import HarnessError, UsageError
from harness.methods.plain import Plain
from harness.plugins.options import build_task
from harness.plugins.registry import task_class
from harness.run.cell import Cell, Settings
from harness.run.contract.tasks import check_task
from harness.run.steps import run_cell
from harness.task import GenerationDefaults, Metric, Sample
from harness.tasks.lamp import Lamp3


def _run(lm: LanguageModel, tmp_path: Path, **changed: Callable[..., Any]) -> Any:
    task = type("Theirs", (Lamp3,), changed)()
    settings = Settings(limit=4, batch_size=2, max_new_tokens=2, output_path=tmp_path)
    return run_cell(lm, Cell("plain", Plain(), "lamp3", task, settings))


def _answers(change: Callable[[list[Sample]], Sequence[Any]]) -> Callable[..., Any]:
    def respond(self: Any, system: Any, items: Any) -> Any:
        yield from change(list(system.respond([item.example for item in items])))

    return respond


def _items(change: Callable[[Any], Any]) -> Callable[..., Any]:
    return lambda self, selection: [change(item) for item in Lamp3.items(self, selection)]


def _of(item: Any, **changed: Any) -> Any:
    return replace(item, example=replace(item.example, **changed))


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"aggregate": lambda self, samples: 0.5}, r"aggregate returned a float \(0.5\); expected a dict of name -> Metric"),
        ({"aggregate": lambda self, samples: {"mae": 0.5}}, r"aggregate: 'mae' is a float \(0.5\); expected a Metric"),
        ({"aggregate": lambda self, samples: {"mae": Metric("x", 1)}}, "value of 'mae' is a str .*; expected a number"),
        ({"grade": lambda self, sample: None}, "grade returned None; expected the Sample with its metrics"),
        ({"grade": lambda self, sample: 1.0}, "grade returned a float"),
        ({"grade": lambda self, sample: replace(sample, id="x")}, "grade returned sample 'x' for"),
        ({"grade": lambda self, s: replace(s, metrics={"mae": "1"})}, "metric 'mae' of sample .* is a str"),
        ({"grade": lambda self, s: replace(s, metrics=[1.0])}, "grade: metrics is a list .*; expected a dict by name"),
        ({"respond": _answers(lambda found: found[:3])}, "respond gave no sample for 1 of 4 items, first"),
        ({"respond": _answers(lambda found: [found[0], found[0]])}, "yielded sample .* a second time"),
        ({"respond": _answers(lambda found: [replace(found[0], id="x")])}, "yielded sample 'x' which is none of its items"),
        ({"respond": _answers(lambda found: [replace(s, batch=-1) for s in found])}, "in batch -1, where it was not planned"),
        ({"respond": _answers(lambda found: [found[0], found[2]])}, "before batch 0 was whole"),
        ({"respond": _answers(lambda found: ["an answer"])}, "respond yielded a str .*; expected a Sample"),
        ({"respond": _answers(lambda found: [replace(s, targets=("x",)) for s in found])}, r"with targets \('x',\); expected"),
        ({"respond": lambda self, system, items: None}, "respond returned None; expected an iterator of Sample"),
        ({"items": lambda self, selection: "items"}, "items returned a str"),
        ({"items": _items(lambda item: item.example)}, r"items hold an Example .*; expected Labelled\(example, targets\) alone"),
        ({"items": _items(lambda i: replace(i, targets="gold"))}, r"targets is a str \('gold'\); expected a tuple of texts"),
        ({"items": _items(lambda i: replace(i, targets=(5,)))}, "targets is a tuple .*; expected a tuple of texts"),
        ({"items": _items(lambda i: _of(i, choices="ab"))}, "choices is a str .*; expected a tuple of texts"),
        ({"items": _items(lambda i: _of(i, id=5))}, "id of example 5 is an int"),
        ({"items": _items(lambda i: _of(i, user=replace(i.example.user, id=None)))}, "user id of example .* is None"),
        ({"items": _items(lambda i: _of(i, user=replace(i.example.user, history="ab")))}, "history is a str .*; expected a tuple"),
        ({"grade": lambda self, s: replace(s, parsed=object())}, "parsed of sample .* is an object"),
        ({"grade": lambda self, s: replace(s, extra={"t": torch.ones(1)})}, "extra 't' of sample .* is a Tensor"),
        ({"aggregate": lambda self, samples: {"a": Metric(1.0, 2, low="x")}}, r"low of 'a' is a str \('x'\)"),
        ({"generation": lambda self: GenerationDefaults(2.5)}, "generation returned a GenerationDefaults"),
        ({"generation": lambda self: 16}, "generation returned an int .*; expected GenerationDefaults"),
    ],
)  # fmt: skip
def test_what_a_task_gives_back_that_is_not_what_belongs_there_is_one_line(
    changed: dict[str, Any], words: str, lm: LanguageModel, tmp_path: Path
) -> None:
    with pytest.raises(HarnessError, match=f"task lamp3: .*{words}") as caught:
        _run(lm, tmp_path, **changed)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (lambda *_: 5, "template function gave 5; expected a text"),
        (lambda *_: (), r"template function gave \(\); expected a text"),
        (
            lambda *_: [{"role": "user", "content": "x"}],
            "template function gave .*; expected a text, or a tuple of one Message",
        ),
        (lambda *_: "half \ud800 of one", "a prompt holds half a character .*; mend it in the data"),
    ],
)
def test_what_a_template_gives_that_is_no_prompt_is_one_line(
    template: Any, words: str, lm: LanguageModel, tmp_path: Path
) -> None:
    with pytest.raises(HarnessError, match=words):
        _run(lm, tmp_path, items=_items(lambda i: _of(i, template=template)))


def test_a_metric_that_is_true_or_false_is_a_number(lm: LanguageModel, tmp_path: Path) -> None:
    right = {
        "grade": lambda self, s: replace(s, metrics={"right": s.id != ""}),
        "aggregate": lambda self, some: {"right": Metric(1.0, len(some))},
    }
    for _ in range(2):  # and what is on disk can be read
        assert _run(lm, tmp_path, **right).exit_code == 0


def test_targets_that_a_task_does_not_copy_are_copied(lm: LanguageModel, tmp_path: Path) -> None:
    ours = _run(lm, tmp_path / "ours").record
    theirs = _run(lm, tmp_path / "theirs", respond=_answers(lambda found: found)).record
    assert theirs.metrics == ours.metrics and theirs.metrics["mae"].n == 4


def test_a_task_without_a_function_it_needs_is_one_line() -> None:
    class Half(Lamp3):
        @abstractmethod
        def extra(self) -> None: ...

    with pytest.raises(UsageError, match="task 'half': class Half lacks extra"):
        build_task(Half, "half", (), None)


@pytest.mark.parametrize("name", ["lamp1", "lamp3", "lamp4", "persona:islam"])
def test_registered_tasks_keep_the_contract_of_a_task(name: str) -> None:
    kept: list[str] = []
    check_task(build_task(task_class(name), name, (), None)[0], say=kept.append)
    assert len(kept) >= 6 and kept[-1].startswith("its metrics: ")
