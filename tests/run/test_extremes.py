"""Options at their ends and beyond: each is refused in one line with a documented exit code, or runs and gives numbers.

Every option of every registered method and task is given numbers and words that do not belong there. Those that a method
takes and that only a model can refuse, or bear, are run.
"""

from __future__ import annotations

import inspect
import json
import typing
from pathlib import Path

import pytest

from harness.engine.model import LanguageModel
from harness.errors import HarnessError
from harness.fit.artifacts import ArtifactStore
from harness.fit.kit import ModelKit
from harness.method import Method
from harness.methods import METHODS
from harness.plugins.options import _allowed, build_method, build_task
from harness.plugins.registry import method_class, task_class
from harness.run.contract import _learnt, toy_examples
from harness.run.system import ModelSystem
from harness.task import Generation
from harness.tasks import TASKS

NUMBERS = ("0", "-1", "1000000", "9" * 20, "9" * 5000, "nan", "-inf", "1e400", "0-99", "²")
WORDS = ("", "none", "x", "9-3", "-1,2", "99,nan", "../x", "\x1b[31m", "\ud800")


def refused(act: typing.Callable[[], object], *, codes: typing.Collection[int] = (2, 4)) -> str:
    """The line; empty where it was taken. Any other error goes on."""
    try:
        act()
    except HarnessError as error:
        line, code = str(error), error.exit_code
    else:
        return ""
    assert code in codes and line.strip() and "\n" not in line, line
    return line


@pytest.mark.parametrize("name", METHODS)
def test_an_option_is_refused_in_one_line_or_is_a_value_that_a_record_holds(name: str, tmp_path: Path) -> None:
    cls = method_class(name)
    (tmp_path / "x").mkdir()

    def made(option: str, text: str) -> Method:
        method = build_method(cls, name, None, [f"{option}={text}"])
        value = method.__dict__.get(option, getattr(method.retrieval, option, None))
        assert json.loads(json.dumps(value, allow_nan=False)) == (list(value) if isinstance(value, tuple) else value)
        if type(value) is int:
            assert abs(value) < 2**63 and float(text) == value
        return method

    for option in _allowed(cls):
        for text in (*NUMBERS, *WORDS):
            refused(lambda option=option, text=text: made(option, text))  # type: ignore[misc]


@pytest.mark.parametrize("name", [name for name in TASKS if name != "lm_eval"])
def test_an_option_of_a_task_is_refused_in_one_line_or_taken(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HARNESS_DATA", raising=False)
    cls = task_class(name)
    for option in inspect.signature(cls).parameters:
        for text in (*NUMBERS, *WORDS) if option != "data" else ():
            refused(lambda option=option, text=text: build_task(cls, name, [f"{option}={text}"], None))  # type: ignore[misc]


MUCH = str(2**62)
BORNE = {
    "copy": (f"words={MUCH}",),
    "rag": (f"k={MUCH}", "k=0"),
    "cad": ("alpha=1000000",),
    "dps": (
        f"heads={MUCH}",
        f"samples={MUCH}",
        "clusters=1000000",
        f"screen={MUCH}",
        "gamma=1000000",
        "temperature=1e-30",
    ),
    "decore": (f"heads={MUCH}", "alpha=1000000", "cap=0"),
    "dola": ("layers=99", "layers=-1", "strength=1000000"),
    "cos": ("lam=-1000000",),
    "pag": (f"profile_items={MUCH}", f"profile_tokens={MUCH}"),
    "persona_vector": ("layer=99", "layer=-1", "coefficient=-1000000", f"pairs={MUCH}"),
    "clamp": ("band=9-3", "band=99", "band=0-99", "band=0.9-0.1", "peaks=99", "peaks=1,1,1", "coefficient=1000000"),
    "perfit": ("rank=100000", "personal_rank=100000", "layers=99", "layers=0,0", f"items={MUCH}", f"batch_size={MUCH}"),
    "reft": ("rank=100000", "layers=-1", "positions=f99999999+l99999999", "lr=1e30"),
    "lora_c": ("rank=100000", "alpha=-1000000", "targets=nothing_of_the_kind", "targets=,", "epochs=0"),
    "oppu": ("rank=100000", "personal_targets=nothing"),
    "style_vector": ("layer=99", "layer=-1", "strength=1000000", f"items={MUCH}", f"negative_tokens={MUCH}"),
}
"""What a method takes by itself; the model decides."""
QUICK = {
    "dps": ("samples=2", "heads=2"),
    "decore": ("heads=2", "samples=2", "needle_tokens=64", "depths=2"),
    "perfit": ("rank=2", "personal_rank=1", "collective_epochs=1", "epochs=1"),
    "reft": ("rank=2", "epochs=1"),
    "lora_c": ("rank=2", "epochs=1"),
    "oppu": ("rank=2", "collective_epochs=1", "epochs=1"),
    "pag": ("profile_tokens=4",),
    "style_vector": ("negative_tokens=4",),
    "persona_vector": ("rollouts=1",),
    "clamp": ("rollouts=1", "band=1"),
}


@pytest.mark.parametrize(
    ("name", "setting"), [(name, setting) for name, several in BORNE.items() for setting in several]
)
def test_what_only_the_model_can_refuse_runs_or_is_one_line(
    name: str, setting: str, lm: LanguageModel, tmp_path: Path
) -> None:
    option = setting.partition("=")[0]
    settings = [*(own for own in QUICK.get(name, ()) if not own.startswith(f"{option}=")), setting]
    train, test = toy_examples(4, seed=1), toy_examples(2, seed=2)

    def run() -> None:
        method = build_method(method_class(name), name, None, settings)
        shared, personal = _learnt(method, ModelKit(lm, max_new_tokens=2, store=ArtifactStore(tmp_path)), train, test)
        states = {item.example.user.id: state for item, state in zip(test, personal, strict=True)}
        system = ModelSystem(lm, method, Generation(2), shared=shared, personal=states)
        samples = list(system.respond([item.example for item in test]))
        assert all(sample.error is not None or isinstance(sample.response, str) for sample in samples)

    refused(run, codes=(1, 2))
