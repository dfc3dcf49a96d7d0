"""What a stranger's task gives back that it should not is one line, and what it forgets to copy is copied."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from harness.data import HistoryItem, Joint, Message, User
from harness.engine.model import LanguageModel
from harness.errors import HarnessError, UsageError
from harness.method import Method
from harness.methods.plain import Plain
from harness.plugins.declared import DECLARED
from harness.plugins.options import build_task
from harness.plugins.registry import task_class
from harness.run.cell import Cell, Settings
from harness.run.contract.tasks import check_task
from harness.run.steps import run_cell
from harness.task import GenerationDefaults, Metric, Sample, Task
from harness.tasks.lamp import Lamp3
from harness.tasks.users import Users


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


def _user(item: Any, **changed: Any) -> Any:
    return _of(item, user=replace(item.example.user, **changed))


def _record(item: Any, **changed: Any) -> Any:
    return _user(item, history=(replace(HistoryItem("r", {"text": "x"}, "x"), **changed),))


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"aggregate": lambda self, samples: 0.5}, r"aggregate returned a float \(0.5\); expected a dict of name -> Metric"),
        ({"aggregate": lambda self, samples: {"mae": 0.5}}, r"aggregate: 'mae' is a float \(0.5\); expected a Metric"),
        ({"aggregate": lambda self, samples: {"mae": Metric("x", 1)}}, "value of 'mae' is a str .*; expected a finite"),
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
        ({"items": _items(lambda i: _of(i, compared="mean"))}, r"compared is a str \('mean'\); expected 'sum' or 'token' or 'char"),
        ({"items": _items(lambda i: _of(i, labels="ab"))}, "labels is a str .*; expected a tuple of texts"),
        ({"items": _items(lambda i: _user(i, pairs=(p for p in ())))}, "its user's pairs are a generator .*; expected a tuple of Lab"),
        ({"items": _items(lambda i: _user(i, pairs=("a",)))}, r"its user's pairs hold a str \('a'\); expected Labelled"),
        ({"items": _items(lambda i: _user(i, history=iter(())))}, "its user's history is a tuple_iterator .*; expected a tuple of"),
        ({"items": _items(lambda i: _record(i, id=7))}, r"its user's history: item 7: id is an int \(7\); expected a text"),
        ({"items": _items(lambda i: _record(i, document=None))}, "history: item 'r': document is None; expected a text"),
        ({"items": _items(lambda i: _record(i, date=2020))}, r"item 'r': date is an int \(2020\); expected a text as in '2014-07-31'"),
        ({"items": _items(lambda i: _record(i, fields={"score": 3}))}, r"item 'r': fields is a dict \({'score': 3}\); expected a dic"),
        ({"grade": lambda self, s: replace(s, response="better")}, r"grade changed response of sample .* a str \('better'\); expect"),
        ({"grade": lambda self, s: replace(s, error="bad")}, "grade changed error of sample .*; expected only parsed, metrics and"),
        ({"grade": lambda self, s: replace(s, user="x")}, "grade changed user of sample"),
        ({"respond": _answers(lambda found: [replace(s, response=None) for s in found])}, "without a response and without an er"),
        ({"respond": _answers(lambda found: [replace(s, error="bad") for s in found]),
          "grade": lambda self, s: replace(s, metrics={"mae": 0.0})}, "which failed, is a dict .*; expected none"),
        ({"generation": lambda self: GenerationDefaults(0)}, "generation returned a GenerationDefaults"),
        ({"items": _items(lambda i: _of(i, user=replace(i.example.user, id="a" + " " * (i.example.id == "200000"))))},
         "items gave users 'a ' and 'a', one but for how it is written"),
        ({"grade": lambda self, s: replace(s, parsed=object())}, "parsed of sample .* is an object"),
        ({"grade": lambda self, s: replace(s, extra={"t": torch.ones(1)})}, "extra 't' of sample .* is a Tensor"),
        ({"aggregate": lambda self, samples: {"a": Metric(1.0, 2, low="x")}}, r"low of 'a' is a str \('x'\)"),
        ({"aggregate": lambda self, samples: {}}, "aggregate returned no metric of 4 answers; expected one at least"),
        ({"aggregate": lambda self, samples: {"a": Metric(math.nan, 2)}}, r"value of 'a' is a float \(nan\); expected a finite"),
        ({"aggregate": lambda self, samples: {"a": Metric(1.0, 2, high=math.inf)}}, r"high of 'a' is a float \(inf\)"),
        ({"aggregate": lambda self, samples: {"a": Metric(1.0, 2, 0.9, 0.1)}}, "low of 'a' is .*; expected no more than high"),
        ({"aggregate": lambda self, samples: {"a": Metric(1.0, -2)}}, "n of 'a' is an int .*; expected how many"),
        ({"aggregate": lambda self, samples: {"a": Metric(1.0, 2, note=5)}}, "note of 'a' is an int"),
        ({"grade": lambda self, s: replace(s, metrics={"mae": math.nan})}, r"'mae' of sample .* is a float \(nan\); expected a fin"),
        ({"grade": lambda self, s: replace(s, metrics={"mae": -math.inf})}, r"metric 'mae' of sample .* is a float \(-inf\)"),
        ({"grade": lambda self, s: replace(s, metrics={"mae": np.float32("nan")})}, "metric 'mae' of sample .* is a float32"),
        ({"fingerprint": lambda self, selection: None}, "fingerprint returned None; expected a text"),
        ({"fingerprint": lambda self, selection: b"abc"}, "fingerprint returned a bytes"),
        ({"fingerprint": lambda self, selection: " "}, "fingerprint returned a str .*; expected a text, as hashlib"),
        ({"describe_data": lambda self: 5}, r"describe_data returned an int \(5\); expected a text"),
        ({"caveats": lambda self, items: "few"}, r"caveats returned a str \('few'\); expected a list of texts"),
        ({"analysis": lambda self, samples: [1]}, "analysis returned a list .*; expected a dict by name"),
        ({"analysis": lambda self, samples: {"t": torch.ones(1)}}, "analysis: 't' is a Tensor"),
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
        (
            lambda *_: (Message("bot", "x"),),  # type: ignore[arg-type]
            r"template function gave Message\(role='bot', content='x'\); expected a role of system, user, assistant and",
        ),
        (lambda *_: (Message("user", None),), "template function gave Message.*; expected a role of .* and a text"),  # type: ignore[arg-type]
        (lambda *_: Joint(()), "template function gave Joint.*; expected a text, or a tuple of one Message"),
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


def test_an_interval_that_says_nothing_is_none_and_a_run_that_failed_whole_needs_no_metric(
    lm: LanguageModel, tmp_path: Path
) -> None:
    one_user = {"aggregate": lambda self, some: {"a": Metric(1.0, len(some), math.nan, math.nan)}}
    found = _run(lm, tmp_path / "one", **one_user)
    assert found.exit_code == 0 and found.record.metrics["a"].interval is None
    failing = _answers(lambda found: [replace(s, response=None, error="failed") for s in found])
    found = _run(lm, tmp_path / "none", respond=failing, aggregate=lambda self, samples: {})
    assert found.exit_code == 3 and found.record.health.errors == 4


@pytest.mark.parametrize(
    ("declared", "words"),
    [
        ({"train_ignores": "size"}, r"train_ignores of class Theirs is a str \('size'\); expected a set of names"),
        ({"ranges": [0, 1]}, "ranges of class Theirs is a list .*; expected a dict by name"),
        ({"version": "1"}, r"version of class Theirs is a str \('1'\); expected a whole number"),
        ({"version": True}, "version of class Theirs is True; expected a whole number"),
        ({"name": None}, "name of class Theirs is None; expected a text"),
        ({"independent": "users"}, r"independent of class Theirs is a str \('users'\); expected 'user' or 'item'"),
        ({"independent": ["user"]}, "independent of class Theirs is a list .*; expected 'user' or 'item'"),
        (
            {"ranges": {"mae": 4}},
            r"ranges of class Theirs is a dict .*; expected a dict by name, of \(least, greatest\)",
        ),
        (
            {"ranges": {"mae": (4, 0)}},
            "ranges of class Theirs is a dict .*; expected a dict by name, of .least, greatest",
        ),
        ({"ranges": {"mae": (0, math.inf)}}, "ranges of class Theirs is a dict .*; expected a dict by name, of .least"),
        ({"per_sample": {"mae": None}}, "per_sample of class Theirs is a dict .*; expected a dict by name, of texts"),
        (
            {"asks": {"tone"}},
            "asks of class Theirs is a set .*; expected a set of names out of 'trait', 'coherence', 'rub",
        ),
        ({"closed": "no"}, r"closed of class Theirs is a str \('no'\); expected True or False"),
        (
            {"__init__": lambda self: setattr(self, "independent", "users")},
            "independent of class Theirs is a str .*; exp",
        ),
    ],
)
def test_what_a_task_says_of_itself_has_the_type_it_should(declared: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=f"task 'theirs': {words}"):
        build_task(type("Theirs", (Lamp3,), declared), "theirs", (), None)


def test_all_that_a_base_declares_of_its_classes_is_checked() -> None:
    for base in (Method, Task):
        named = {name for name, hint in base.__annotations__.items() if str(hint).startswith("ClassVar")}
        assert named == set(DECLARED[base])


def test_what_a_task_of_a_file_says_of_itself_is_checked_wherever_its_class_is_read(
    harness: Callable[[str], Any],
) -> None:
    lines = "from harness.tasks.lamp import Lamp3\nclass Theirs(Lamp3):\n    independent = 'users'\n"
    Path("theirs.py").write_text(lines)
    for command in ("check ./theirs.py", "run --method plain --task ./theirs.py --model tiny --limit 1"):
        done = harness(command)
        assert (
            done.code == 2 and "independent of class Theirs is a str ('users'); expected 'user' or 'item'" in done.err
        )
    with pytest.raises(
        UsageError, match=r"task './theirs.py': independent of class Theirs"
    ):  # as a comparison reads it
        task_class("./theirs.py")


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"answers": "txt"}, "kind 'txt' is not valid; allowed: auto, text, choice, number"),
        ({"measured": "exact"}, "measured is 'exact'; expected a tuple of metrics' names"),
    ],
)
def test_what_ones_own_users_say_of_their_answers_is_checked(said: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        type("Theirs", (Users,), {"read": lambda self: [], **said})()


def _histories(of: Callable[[int], str]) -> Callable[..., Any]:
    """Four items of one user, each with one text as its history."""

    def items(self: Any, selection: Any) -> Any:
        found = []
        for number, item in enumerate(Lamp3.items(self, selection)):
            record = HistoryItem(str(number), {"text": of(number), "score": "3"}, of(number))
            found.append(_of(item, user=User("one", (record,))))
        return found

    return items


def test_unlike_histories_of_one_user_are_said(lm: LanguageModel, tmp_path: Path) -> None:
    note = (
        "1 of 1 users, first 'one', have questions under unlike histories; each is asked under its own, and intervals"
    )
    unlike = _run(lm, tmp_path / "unlike", items=_histories(lambda number: f"text {number}"))
    assert any(line.startswith(note) for line in unlike.record.notes)
    alike = _run(lm, tmp_path / "alike", items=_histories(lambda number: "text"))
    assert not any("unlike" in line for line in alike.record.notes)


@pytest.mark.parametrize("name", ["lamp1", "lamp3", "lamp4", "persona:islam"])
def test_registered_tasks_keep_the_contract_of_a_task(name: str) -> None:
    kept: list[str] = []
    check_task(build_task(task_class(name), name, (), None)[0], say=kept.append)
    assert len(kept) >= 6 and kept[-1].startswith("its metrics: ")
