"""The Python door: the same records, numbers and errors as the command line."""

from __future__ import annotations

import re
import subprocess
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest

import harness as door
from harness.cli.declarations import NEEDED, _fits, _in_words, checked, declared
from harness.method import Retrieval
from harness.methods.cad import CAD
from harness.methods.rag import RAG
from harness.records.store import read_record, read_samples
from harness.run.console import Notebook, terminal_or_notebook

PAGE = Path(__file__).resolve().parents[2] / "docs" / "python.md"
LITTLE: dict[str, Any] = {"limit": 4, "max_new_tokens": 2}
FLAGS = "--limit 4 --max_new_tokens 2"


@pytest.fixture
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "cache"))
    return tmp_path


def test_import_harness_takes_no_time_and_loads_neither_torch_nor_pandas() -> None:
    code = (
        "import time; start = time.perf_counter(); import harness, sys; spent = time.perf_counter() - start; "
        "assert spent < 0.1, spent; print([n for n in ('torch', 'pandas', 'typer', 'numpy') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_name_of_the_door_is_there() -> None:
    assert set(door.__all__) <= set(dir(door))
    assert all(getattr(door, name) for name in door.__all__)
    with pytest.raises(AttributeError, match="no attribute 'evalute'"):
        door.evalute  # noqa: B018


def test_evaluate_makes_the_record_the_command_makes(harness: Callable, toy: Path) -> None:
    run = door.evaluate("cad", "lamp4", str(toy), set={"alpha": 0.25}, **LITTLE)
    said = harness(f"run --method cad --task LaMP-4 --model {toy} --set alpha=0.25 {FLAGS}")
    assert f"already there: {run.folder}" in said.err
    assert str(run) == said.out.rstrip()


def test_a_method_that_is_a_value_makes_the_record_of_its_options(there: Path, toy: Path) -> None:
    named = door.evaluate("cad", "lamp4", str(toy), set={"alpha": 0.25, "k": 2}, **LITTLE)
    value = door.evaluate(CAD(retrieval=Retrieval(k=2), alpha=0.25), "lamp4", str(toy), **LITTLE)
    assert value.folder == named.folder


def test_a_method_of_ones_own_is_recorded_with_its_source(there: Path, toy: Path) -> None:
    run = door.evaluate(Mine(), "lamp4", str(toy), **LITTLE)
    assert run.record.config.method.name == "mine"
    assert len(run.record.config.method.options["source_sha256"]) == 16


@dataclass(frozen=True)
class Mine(RAG):
    """A method that is not registered."""


@dataclass(frozen=True)
class Ends(RAG):
    """A method that ends the program."""

    def plan(self, *args: object) -> NoReturn:  # type: ignore[override]
        sys.exit(0)


def test_a_method_that_ends_the_program_is_an_error_and_the_notebook_goes_on(there: Path, toy: Path) -> None:
    with pytest.raises(door.HarnessError, match=r"ended the program with sys.exit\(0\); that is no result"):
        door.evaluate(Ends(), "lamp4", str(toy), **LITTLE)


def test_metrics_have_values_and_intervals_and_samples_are_a_frame(there: Path, toy: Path) -> None:
    run = door.evaluate("rag", "lamp4", str(toy), **LITTLE)
    metric = run.metrics["rouge1"]
    assert metric.interval == (metric.low, metric.high)
    assert list(run.samples["id"]) == [sample.id for sample in read_samples(run.folder)]
    assert run.samples["rouge1"].mean() == pytest.approx(metric.value)


def test_a_loaded_model_is_used_as_it_is(there: Path, toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lm = door.load(str(toy))
    capsys.readouterr()
    run = door.evaluate("plain", "lamp4", lm, **LITTLE)
    assert "loading" not in capsys.readouterr().err
    assert run.folder == door.evaluate("plain", "lamp4", str(toy), **LITTLE).folder


ERRORS = {
    "run --method dsp --task lamp4": {"method": "dsp"},
    "run --method rag --task lamp44": {"method": "rag", "task": "lamp44"},
    "run --method dps --task lamp4 --set gama=1": {"method": "dps", "set": {"gama": 1}},
    "run --method rag --task lamp4 --control wrong_usr": {"method": "rag", "control": "wrong_usr"},
    "run --method rag --task lamp4 --batch_size 0": {"method": "rag", "batch_size": 0},
    "run --method rag --task lamp4 --judge_base_url http://x": {"method": "rag", "judge_base_url": "http://x"},
    "run --method rag --task lamp4 --model ./none": {"method": "rag", "model": "./none"},
}


@pytest.mark.parametrize("command", ERRORS)
def test_errors_have_the_text_and_code_of_the_command(harness: Callable, command: str) -> None:
    done = harness(command)
    with pytest.raises(door.HarnessError) as raised:
        door.evaluate(**{"task": "lamp4", **ERRORS[command]})
    assert " ".join(str(raised.value).split()) == done.error().removeprefix("harness: ")
    assert raised.value.exit_code == done.code


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"limits": 3}, "unknown option 'limits'; did you mean 'limit'? allowed: judge, "),
        ({"contol": "none"}, "unknown option 'contol'; did you mean 'control'?"),
        ({"on": "local:2"}, "unknown option 'on'; the command 'harness run' alone has --on; allowed: "),
        ({"limit": "2"}, "limit='2' is not valid; allowed: a whole number or None"),
        ({"limit": 2.5}, "limit=2.5 is not valid; allowed: a whole number or None"),
        ({"limit": True}, "limit=True is not valid"),
        ({"max_new_tokens": 3.0}, "max_new_tokens=3.0 is not valid; allowed: a whole number or None"),
        ({"seed": 1.5}, "seed=1.5 is not valid; allowed: a whole number"),
        ({"temperature": "0"}, "temperature='0' is not valid; allowed: a number"),
        ({"exclude_leaks": "no"}, "exclude_leaks='no' is not valid; allowed: True or False"),
        ({"preset": None}, "preset=None is not valid; allowed: a text or a list of texts"),
        ({"control": None}, "control=None is not valid; allowed: 'none' or 'wrong_user' or 'shuffled'"),
        ({"control": "shufled"}, "unknown control 'shufled'; did you mean 'shuffled'?"),
        ({"fit_split": 0.2}, "fit_split=0.2 is not valid; allowed: a text or None"),
        ({"batch_size": None}, "batch_size=None is not valid; allowed: a whole number or 'auto'"),
        ({"set": "gamma=1"}, "set='gamma=1' is not valid; allowed: a dict or a list of texts"),
        ({"set": ["gamma=1", 2]}, "set=['gamma=1', 2] is not valid"),
        ({"output_path": None}, "output_path=None is not valid; allowed: a text or a path"),
    ],
)
def test_an_option_that_is_none_or_of_another_type_is_one_line(
    there: Path, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(door.HarnessError, match=re.escape(words)) as caught:
        door.evaluate("plain", "lamp2m", **options)
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value) and not list(there.glob("runs"))
    if "unknown option" in words:
        with pytest.raises(door.HarnessError, match="unknown option"):
            door.load("tiny", **options)


def test_every_type_of_an_option_can_be_given_and_said() -> None:
    given: Any = {
        "limit": np.int64(2),
        "temperature": np.float32(0.5),
        "data": Path("x"),
        "batch_size": "auto",
        "set": {"k": 3},
    }
    found: Any = checked(given)
    assert found == given and type(found["limit"]) is int and type(found["temperature"]) is float
    for name, (kind, option) in declared().items():
        assert option.default is NEEDED or _fits(option.default, kind), name
        assert option.default is NEEDED or _in_words(kind), name


def test_records_compare_and_table_are_frames(there: Path, toy: Path) -> None:
    plain, rag = (door.evaluate(name, "lamp4", str(toy), **LITTLE) for name in ("plain", "rag"))
    every = door.records()
    assert list(every["method"]) == ["plain", "rag"]
    assert every.loc[1, "options"]["k"] == 5 and every.loc[1, "rouge1"] == rag.metrics["rouge1"].value
    assert every.loc[0, "cost.flops"] == plain.record.cost.flops
    compared = door.compare(plain, rag, metric="rouge1")
    assert compared["difference"].iloc[0] == pytest.approx(rag.metrics["rouge1"].value - plain.metrics["rouge1"].value)
    assert "published" in set(door.table("dps-1")["source"])
    assert door.read(rag.folder).record == read_record(rag.folder)


def test_the_page_on_python_runs_as_it_stands(there: Path) -> None:
    namespace: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL):
        exec(compile(block, str(PAGE), "exec"), namespace)
    assert namespace["one_item"].record.config.method.options["k"] == 1


def test_a_notebook_shows_a_bar_that_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []

    class Handle:
        def update(self, html: str) -> None:
            shown.append(html)

    def display(html: str, display_id: bool) -> Handle:
        shown.append(html)
        return Handle()

    shell = type("ZMQInteractiveShell", (), {})()
    ipython, module = types.ModuleType("IPython"), types.ModuleType("IPython.display")
    ipython.get_ipython = lambda: shell  # type: ignore[attr-defined]
    module.HTML, module.display = str, display  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    console = terminal_or_notebook()
    assert isinstance(console, Notebook)
    console.progress("answering", 1, 4)
    console.progress("answering", 2, 4)
    assert [re.findall(r"\d+/\d+", html) for html in shown] == [["1/4"], ["2/4"]]
