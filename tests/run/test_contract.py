"""Every registered method keeps the contract, and what a stranger's method gives back that it should not is one line."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import torch
from torch import Tensor

from harness.data import Example, Labelled, User
from harness.edits import AddVector
from harness.engine.model import LanguageModel
from harness.errors import HarnessError, UsageError
from harness.fit.artifacts import ArtifactStore
from harness.method import Fitted, Method, Retrieval
from harness.methods import METHODS
from harness.methods.plain import Plain
from harness.mix import Contrast
from harness.plan import ALL, Draws, LoRA, Plan, Site, Stream, StreamOutput
from harness.plugins.options import build_method
from harness.plugins.registry import method_class
from harness.run.cell import Cell, Settings
from harness.run.contract import check_method, random_lm
from harness.run.steps import run_cell
from harness.tasks.lamp import Lamp3

SMALL: Mapping[str, Sequence[str]] = {
    "dps": ("samples=2", "heads=2"),
    "decore": ("heads=2", "samples=2"),
    "oppu": ("rank=2", "collective_epochs=1", "epochs=1"),
    "cope": ("rank=2", "collective_epochs=1", "epochs=1"),
    "rspg": ("samples=2", "items=2", "least=1"),
    "perfit": ("rank=2", "personal_rank=1", "collective_epochs=1", "epochs=1"),
    "lora_c": ("rank=2", "epochs=1"),
    "lora_p": ("rank=2", "epochs=1"),
    "reft": ("rank=2", "epochs=1"),
    "pag": ("profile_tokens=4",),
    "style_vector": ("negative_tokens=4",),
    "persona_vector": ("rollouts=1", "coefficient=2"),
    "clamp": ("rollouts=1", "band=1"),
    "dola": ("layers=0,1,2",),
}
"""Options that make a check quick; where a method has none here it is checked as it is by default."""


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    lm = random_lm()
    lm.revision = "random"
    return lm


@pytest.fixture(autouse=True)
def _no_cache_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("name", METHODS)
def test_every_registered_method_keeps_the_contract(name: str, lm: LanguageModel) -> None:
    kept: list[str] = []
    skipped: list[str] = []
    method = build_method(method_class(name), name, None, SMALL.get(name, ()))
    check_method(method, lm=lm, say=kept.append, skip=skipped.append)
    assert len(kept) + len(skipped) == (
        4 if name == "copy" else 8
    )  # an answer that needs no model has no passes to check
    assert [line.partition(":")[0] for line in skipped if line.startswith("whether it fires")] == (
        ["whether it fires"] if name in ("plain", "rag", "rspg", "pag") else []
    )


@dataclass(frozen=True)
class Mine(Method):
    """Plans what `made` makes of an example's stream."""

    made: ClassVar[Any] = None

    def plan(self, example: Example, shared: Fitted | None, personal: Fitted | None) -> Any:
        return self.made(Stream(example.prompt()))


def mine(made: Callable[[Stream], Any]) -> Method:
    return type("Mine", (Mine,), {"made": staticmethod(made)})()


@dataclass
class Unhashable:
    weight: float = 1.0

    def __call__(self, outputs: Sequence[StreamOutput]) -> Tensor:
        return outputs[0].logits.log_softmax(-1)


@dataclass(frozen=True)
class Bias:
    """A number a token, added to the logits."""

    values: tuple[float, ...] = (0.0,) * 259

    def __call__(self, outputs: Sequence[StreamOutput]) -> Tensor:
        logits = outputs[0].logits
        return (logits + logits.new_tensor(self.values)).log_softmax(-1)


@dataclass(frozen=True)
class Flat:
    def __call__(self, outputs: Sequence[StreamOutput]) -> Any:
        return outputs[0].logits.log_softmax(-1).sum(-1)


@dataclass(frozen=True)
class Odds:
    """Probabilities in place of their logarithms; of nothing at all with weight 0."""

    weight: float = 1.0

    def __call__(self, outputs: Sequence[StreamOutput]) -> Tensor:
        odds = outputs[0].logits.softmax(-1)
        return odds if self.weight else odds.mul(0).log()


PLANS: Mapping[str, tuple[Callable[[Stream], Any], str]] = {
    "tuple": (lambda s: (s,), r"plan returned a tuple \(.*; expected a Plan, as in Plan\(\(Stream\(prompt\),\)\)"),
    "none": (lambda s: None, "plan returned None; expected a Plan"),
    "text for a stream": (lambda s: Plan(("hello",)), r"a stream is a str \('hello'\); expected a Stream"),  # type: ignore[arg-type]
    "one stream": (lambda s: Plan(s), "streams is a Stream .*; expected a tuple of Stream"),  # type: ignore[arg-type]
    "text for a prompt": (lambda s: Plan((Stream("hi"),)), "prompt is a str .*; expected a Prompt"),  # type: ignore[arg-type]
    "no edit": (lambda s: Plan((Stream(s.prompt, (1,)),)), r"edits of a stream hold an int \(1\); expected Edit"),  # type: ignore[arg-type]
    "edit of other values": (
        lambda s: Plan((Stream(s.prompt, (AddVector(Site(0, "block_out"), torch.ones(32), "strong"),)),)),  # type: ignore[arg-type]
        r"edit AddVector at Site\(layer=0, part='block_out'\): its values cannot be used \(",
    ),
    "texts for a history": (
        lambda s: Plan((Stream(replace(s.prompt, items=("a", "b"))),)),  # type: ignore[arg-type]
        r"items of a prompt are a tuple \(\('a', 'b'\)\); expected a tuple of HistoryItem",
    ),
    "an iterator of a history": (
        lambda s: Plan((Stream(replace(s.prompt, items=reversed(s.prompt.items))),)),  # type: ignore[arg-type]
        "items of a prompt are a reversed .*; expected a tuple of HistoryItem",
    ),
    "no part of a block": (
        lambda s: Plan((Stream(s.prompt, (AddVector(Site(0, "blok"), torch.ones(32)),)),)),  # type: ignore[arg-type]
        "part 'blok' does not exist; parts: block_in",
    ),
    "summary": (
        lambda s: Plan((Stream(replace(s.prompt, summary=None)),)),  # type: ignore[arg-type]
        "summary of a prompt is None; expected a text",
    ),
    "edit of complex numbers": (
        lambda s: Plan((Stream(s.prompt, (AddVector(Site(0, "block_out"), torch.ones(32) * 1j),)),)),
        "edit AddVector at .*: its values cannot be used .ValueError: complex numbers",
    ),
    "edit of a class": (
        lambda s: Plan((Stream(s.prompt, (AddVector(Site(0.0, "block_out"), torch.ones(32)),)),)),  # type: ignore[arg-type]
        "block 0.0 does not exist; this model has blocks 0 to",
    ),
    "list of edits": (
        lambda s: Plan((Stream(s.prompt, []),)),
        "edits of a stream is a list .*expected a tuple of Edit",
    ),  # type: ignore[arg-type]
    "no mix": (lambda s: Plan((s,), 0.5), r"mix is a float \(0.5\); expected a value that is called"),  # type: ignore[arg-type]
    "mix class": (lambda s: Plan((s,), Contrast), "mix is a type .*; expected a value that is called"),  # type: ignore[arg-type]
    "lambda": (
        lambda s: Plan((s,), lambda o: o[0].logits.log_softmax(-1)),
        "mix is the function .*<lambda>, made anew",
    ),
    "unhashable": (
        lambda s: Plan((s,), Unhashable()),
        "mix Unhashable cannot be hashed .*; make it a frozen dataclass",
    ),
    "unhashable choice": (lambda s: Plan((s,), draws=Draws(2, Unhashable())), "choose Unhashable cannot be hashed"),  # type: ignore[arg-type]
    "probabilities": (
        lambda s: Plan((s,), Odds()),
        r"mix Odds returned no log-probabilities: .*; end it with .log_softmax",
    ),
    "nothing possible": (
        lambda s: Plan((s,), Odds(0.0)),
        "mix Odds returned no log-probabilities: .* is inf away from 0",
    ),
    "flat": (lambda s: Plan((s,), Flat()), r"mix Flat returned a tensor \[.*; expected log-probabilities \["),
}


@pytest.mark.parametrize("name", PLANS)
def test_what_is_no_plan_is_one_line_in_a_check_and_in_a_run(name: str, lm: LanguageModel, tmp_path: Path) -> None:
    made, words = PLANS[name]
    with pytest.raises(HarnessError, match=words) as caught:
        check_method(mine(made), lm=lm)
    assert "plan is pure" not in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(HarnessError, match=words):
        run_cell(lm, _cell(mine(made), tmp_path))


def _cell(method: Method, tmp_path: Path, **settings: Any) -> Cell:
    return Cell("mine", method, "lamp3", Lamp3(), Settings(limit=2, max_new_tokens=2, output_path=tmp_path, **settings))


def test_a_mix_that_is_another_value_in_each_plan_is_said_to_be_so(lm: LanguageModel) -> None:
    mix = partial(lambda weight, o: o[0].logits.log_softmax(-1), 1.0)
    with pytest.raises(HarnessError, match=r"gave mixes that are not equal, .*; make the mix a frozen dataclass"):
        check_method(mine(lambda s: Plan((s,), partial(mix))), lm=lm)


@dataclass(frozen=True)
class Adapting(Plain):
    states: ClassVar[Any] = None

    def adapt(self, kit: Any, users: Sequence[User], shared: Fitted | None) -> Any:
        return self.states(users)


@dataclass(frozen=True)
class Fitting(Plain):
    state: ClassVar[Any] = None

    def fit(self, kit: Any, train: Sequence[Labelled]) -> Any:
        return self.state


def _like(cls: type[Method], **given: Any) -> Method:
    return type(cls.__name__, (cls,), given)()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"identity": lambda self: ["k"]}, "identity returned a list .*; expected a dict by name"),
        ({"analysis": lambda self, shared, personal: None}, "analysis returned None; expected a dict by name"),
        ({"analysis": lambda self, shared, personal: {"a": object()}}, "analysis: 'a' is an object"),
        (
            {"state": Fitted(), "review": lambda self, s: "ok"},
            r"review returned a str \('ok'\)",
        ),
    ],
)
def test_what_a_method_says_of_itself_that_is_no_such_thing_is_one_line(
    given: dict[str, Any], words: str, lm: LanguageModel, tmp_path: Path
) -> None:
    method = type("Theirs", (Fitting if "state" in given else Plain,), given)()
    with pytest.raises(HarnessError, match=f"method Theirs: {words}"):
        run_cell(lm, _cell(method, tmp_path), store=ArtifactStore(tmp_path / "store"))


def test_names_of_options_that_are_one_text_are_no_names() -> None:
    theirs = type("Theirs", (Plain,), {"decode_only": "k"})
    with pytest.raises(
        UsageError, match=r"method 'theirs': decode_only of class Theirs is a str \('k'\); expected a set"
    ):
        build_method(theirs, "theirs", None, ())


@dataclass(frozen=True)
class Worded(Plain):
    presets: ClassVar[Any] = {"typo": {"mode": "loud"}}
    mode: Literal["calm", "strong"] = "calm"


def test_a_word_of_an_option_is_one_of_those_that_its_type_lists_whoever_gives_it() -> None:
    says = "method 'worded': mode=loud is not valid; allowed: 'calm' or 'strong'"
    for preset, made in (("typo", None), (None, Worded(mode="loud"))):  # type: ignore[arg-type]
        with pytest.raises(UsageError, match=says):
            build_method(Worded, "worded", preset, (), made)
    with pytest.raises(UsageError, match="retriever=bm26 is not valid; allowed: 'bm25' or"):
        build_method(Worded, "worded", None, (), Worded(retrieval=Retrieval("bm26")))  # type: ignore[arg-type]
    assert build_method(Worded, "worded", None, ("mode=strong",)) == Worded(mode="strong")


def test_presets_that_are_no_options_by_name_are_refused() -> None:
    with pytest.raises(UsageError, match=r"presets of class Theirs is a dict .*; expected a dict by name, of options"):
        build_method(type("Theirs", (Plain,), {"presets": {"released": 5}}), "theirs", "released", ())


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (
            _like(Adapting, states=staticmethod(lambda users: [Fitted(cost={"seconds": "fast"}) for _ in users])),
            r"adapt: cost\['seconds'\] is a str \('fast'\); expected a finite int or float; leave out what is not known",
        ),
        (
            _like(Adapting, states=staticmethod(lambda users: [Fitted(cost={"flops": None}) for _ in users])),
            r"adapt: cost\['flops'\] is None; expected a finite int or float",
        ),
        (
            _like(Adapting, states=staticmethod(lambda users: [Fitted(notes=(1,)) for _ in users])),  # type: ignore[arg-type]
            r"adapt: notes is a tuple \(\(1,\)\); expected a list of texts",
        ),
        (
            _like(Adapting, states=staticmethod(lambda users: [])),
            "adapt returned 0 states for . users; expected a list of . states, one a user",
        ),
        (
            _like(Adapting, states=staticmethod(lambda users: {u.id: Fitted() for u in users})),
            "adapt returned a dict .*expected a list of",
        ),
        (_like(Adapting, states=staticmethod(lambda users: None)), "adapt returned None; expected a list of"),
        (
            _like(Adapting, states=staticmethod(lambda users: ["x" for _ in users])),
            "adapt returned a str .*; expected a Fitted",
        ),
        (_like(Fitting, state={"vector": 1}), "fit returned a dict .*; expected a Fitted of named tensors"),
        (_like(Fitting, state=Fitted({"v": [1.0]})), r"fit: tensors\['v'\] is a list .*; expected a torch.Tensor"),
        (
            _like(Fitting, state=Fitted({"v": torch.eye(2).to_sparse()})),
            r"fit: tensors\['v'\] is a Tensor .*; expected a dense",
        ),
        (
            _like(Fitting, state=Fitted({}, {"a": float("nan")})),
            r"fit: meta\['a'\] is a float \(nan\); expected what JSON",
        ),
        (
            _like(Fitting, state=Fitted({}, {"a": torch.ones(1)})),
            r"fit: meta\['a'\] is a Tensor .*; expected what JSON",
        ),
        (_like(Fitting, state=Fitted([torch.ones(1)])), "fit: tensors is a list .*; expected a dict by name"),  # type: ignore[arg-type]
    ],
)
def test_states_that_are_none_are_one_line(method: Method, words: str, lm: LanguageModel, tmp_path: Path) -> None:
    with pytest.raises(HarnessError, match=words):
        check_method(method, lm=lm)
    with pytest.raises(HarnessError, match=words):
        run_cell(lm, _cell(method, tmp_path), store=ArtifactStore(tmp_path / "store"))


def test_tensors_that_share_their_memory_are_kept_each(tmp_path: Path) -> None:
    whole = torch.arange(4.0)
    kept = ArtifactStore(tmp_path).put("k", Fitted({"a": whole, "b": whole, "c": whole[1:3]}), {}).tensors
    assert {name: value.tolist() for name, value in kept.items()} == {"a": [0, 1, 2, 3], "b": [0, 1, 2, 3], "c": [1, 2]}


# What does not fit the model


def _edited(vector: Tensor, where: Any = ALL) -> Callable[[Stream], Plan]:
    return lambda s: Plan((replace(s, edits=(AddVector(Site(1, "block_out"), vector, where=where),)),))


def _adapted(name: str, rank: int = 1) -> Callable[[Stream], Plan]:
    return lambda s: Plan((replace(s, adapters=(LoRA("x", {name: (torch.ones(rank, 32), torch.ones(32, 1))}),)),))


@dataclass(frozen=True)
class Shrinks(AddVector):
    @classmethod
    def bind(cls, edits: Any, like: Tensor) -> Any:
        return lambda x: x[:, :1]


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (lambda s: Plan(()), r"a plan has \(\) for its streams; expected at least one"),
        (_edited(torch.ones(31)), "edit AddVector does not fit the model at block_out of block 1, whose .* tokens, 32"),
        (
            lambda s: Plan((replace(s, edits=(Shrinks(Site(1, "block_out"), torch.ones(32)),)),)),
            r"edit Shrinks does not fit .*: it gave \[",
        ),
        (_edited(torch.ones(32), lambda p, layout: p[:1] > 0), "where .* gave a ndarray bool .* for positions"),
        (_edited(torch.ones(32), lambda p, layout: p), "where .* gave a ndarray int64 .* for positions"),
        (_adapted("nothing"), "adapter 'x' names 'nothing', which is no linear module of random-llama"),
        (_adapted("model.layers.0.self_attn.q_proj", 2), r"adapter 'x' is of shapes \[\[2, 32\], \[32, 1\]\] at model"),
    ],
)
def test_a_plan_that_does_not_fit_the_model_is_one_line(
    made: Callable[[Stream], Any], words: str, lm: LanguageModel, tmp_path: Path
) -> None:
    with pytest.raises(HarnessError, match=words):
        run_cell(lm, _cell(mine(made), tmp_path))


# Methods that change the mix alone


def test_a_mix_that_holds_a_number_a_token_is_checked_on_the_models_vocabulary(lm: LanguageModel) -> None:
    kept: list[str] = []
    bias = Bias(tuple(3.0 * (token % 7) for token in range(lm.vocabulary)))
    check_method(mine(lambda s: Plan((s,), bias)), lm=lm, say=kept.append)
    assert any(line.startswith("it fires") for line in kept)


def test_a_mix_of_no_strength_is_caught_and_one_of_some_has_a_divergence(lm: LanguageModel, tmp_path: Path) -> None:
    with pytest.raises(HarnessError, match="changed nothing is caught"):
        check_method(mine(lambda s: Plan((s,), Bias())), lm=lm)
    nothing = run_cell(lm, _cell(mine(lambda s: Plan((s,), Bias())), tmp_path / "nothing"))
    assert (nothing.exit_code, nothing.record.health.noop) == (1, True)
    assert nothing.record.health.kl_to_base == pytest.approx(0, abs=1e-12)
    bias = Bias(tuple(3.0 * (token % 7) for token in range(lm.vocabulary)))
    some = run_cell(lm, _cell(mine(lambda s: Plan((s,), bias)), tmp_path / "some"))
    assert some.exit_code == 0 and (some.record.health.kl_to_base or 0) > 0.01


def test_a_run_that_compares_no_answers_with_the_unedited_model_says_so(lm: LanguageModel, tmp_path: Path) -> None:
    """What a method changed is then unknown, and answers and metrics are the same."""
    cell = _cell(mine(lambda s: Plan((s,), Bias())), tmp_path / "off")
    off = run_cell(lm, replace(cell, settings=replace(cell.settings, effect_samples=0)))
    assert (off.exit_code, off.record.health.noop, off.record.cost.effect_seconds) == (0, None, None)
    assert any("--effect_samples 0" in note for note in off.record.notes)
    few = run_cell(lm, replace(cell, settings=replace(cell.settings, output_path=tmp_path / "few", effect_samples=1)))
    assert few.record.health.noop and few.record.metrics == off.record.metrics


# Files


BODY = "from harness.plan import Plan, Stream\nfrom harness.method import Method\nfrom dataclasses import dataclass\n"
PLAN = "    def plan(self, example, shared, personal):\n        return Plan((Stream(example.prompt()),))\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (f"class Mine(Method):\n    alpha: float = 1.0\n{PLAN}", "alpha would be lost; put @dataclass(frozen=True) before class Mine"),
        (f"class Mine(Method):\n    def __init__(self):\n        pass\n{PLAN}", "is no dataclass: a constructor of its own"),
        ("@dataclass(frozen=True)\nclass Mine(Method):\n    alpha: float = 1.0\n", "class Mine lacks plan; a method has at least"),
        (f"@dataclass(frozen=True, kw_only=True)\nclass Mine(Method):\n    alpha: float\n{PLAN}", "option 'alpha' has no default"),
        (f"@dataclass\nclass Mine(Method):\n    alpha: float = 1.0\n{PLAN}", "cannot inherit non-frozen dataclass"),
    ],
)  # fmt: skip
def test_a_class_that_is_no_method_is_one_line(harness: Callable[[str], Any], text: str, words: str) -> None:
    Path("mine.py").write_text(BODY + text)
    for line in ("check ./mine.py", "run --method ./mine.py --task lamp3"):
        done = harness(line)
        assert done.code == 2
        assert words.replace("(", ".").replace(")", ".") in done.error().replace("(", ".").replace(")", ".")


def test_a_check_says_what_it_did_not_check(harness: Callable[[str], Any]) -> None:
    done = harness("check rag")
    assert done.code == 0
    assert "--  not checked: whether it fires: its plans are a prompt for the unedited model" in done.out
    assert "ok  it fires" not in done.out


def test_a_method_is_checked_on_the_first_blocks_of_a_model_of_ones_own(
    harness: Callable[[str], Any], toy: Path
) -> None:
    done = harness(f"check rag --model {toy} --blocks 1")
    assert done.code == 0 and "ok  the model is left as found" in done.out
    nothing = harness("check rag --blocks 1")
    assert nothing.code == 2 and "--blocks and --model_path are about a model; name it: --model NAME" in nothing.error()


# Before a user's state is there


def test_a_dry_run_says_nothing_of_a_mix_that_is_not_known_before_the_users_states(
    harness: Callable[[str], Any], toy: Path
) -> None:
    line = f"run --method lora_p --task lamp3 --model {toy} --limit 2 --set rank=1 --set epochs=1 --set items=2 --max_new_tokens 2"
    out = harness(f"{line} --dry_run").out
    assert "not adapted yet" in out and "mix not known before that is learnt" in out
    assert re.search(r"adapting reads 4 items of 2 users of about \d+ tokens in 3 passes \(1 epochs, ", out)
    two = harness(f"{line} --dry_run --set oppu.collective_epochs=2 --method oppu").out.partition("\noppu on")[2]
    assert "in 6 passes (2 epochs, " in two
    assert "First()" not in out and "adapters" not in out.partition("---")[2]
    assert harness(f"{line} --allow_noop").code == 0
    again = harness(f"{line} --dry_run").out
    assert "1 adapters" in again and "--- mix First()" in again and "not adapted" not in again


def test_an_option_that_a_record_cannot_hold_is_one_line(lm: LanguageModel, tmp_path: Path) -> None:
    method = _like(Plain)
    object.__setattr__(method, "retrieval", replace(method.retrieval, seed=torch.ones(1)))  # type: ignore[type-var]
    with pytest.raises(UsageError, match=r"option seed is a Tensor .*; expected a number, a text, or a list of them"):
        run_cell(lm, _cell(method, tmp_path))


def test_an_instance_is_its_options(lm: LanguageModel) -> None:
    assert replace(Plain(), retrieval=replace(Plain().retrieval, k=2)).options()["k"] == 2
    with pytest.raises(UsageError):
        method_class("no_such_method")


class ByItsFirstName(Plain):
    def plan(self, example: Example, shared: Fitted | None, personal: Fitted | None) -> Plan:
        return Plan((Stream(self.context.prompt(example)),))


def test_a_method_that_says_context_retrieves_as_one_that_says_retrieval(lm: LanguageModel) -> None:
    check_method(ByItsFirstName(), lm=lm)
