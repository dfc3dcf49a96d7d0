"""A mix that knows ids and step, and plans that are answered several times: by hand, by the contract, and on the command line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from harness.engine import decode
from harness.engine.decode import Decoder
from harness.errors import HarnessError, UsageError
from harness.methods.plain import Plain
from harness.mix import First
from harness.plan import Draws, Generated, MostCommon, MostLikely, Place, Plan, Stream
from harness.plugins.options import build_method
from harness.plugins.registry import method_class
from harness.records.store import find_runs, read_samples
from harness.run.contract import check_method, random_lm, toy_examples
from harness.run.sizes import sizes_of
from harness.run.system import ModelSystem
from harness.task import Generation

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
BIAS, BEST = EXAMPLES / "copy_bias.py", EXAMPLES / "best_of_n.py"


@pytest.fixture(scope="module")
def lm() -> Any:
    return random_lm()


def made(file: Path, *settings: str) -> Any:
    return build_method(method_class(str(file)), file.stem, None, settings)


@pytest.mark.parametrize(
    ("file", "settings"),
    [
        (BIAS, ("strength=2",)),
        (BIAS, ("strength=2", "first_only=true")),
        *((BEST, ("n=3", f"choose={how}")) for how in ("alike", "likely", "common")),
    ],
)
def test_the_examples_keep_the_contract(lm: Any, file: Path, settings: tuple[str, ...]) -> None:
    kept: list[str] = []
    check_method(made(file, *settings), lm=lm, say=kept.append)
    assert ("of several responses it chooses the same one alone and in a batch" in kept) == (file == BEST)


def test_a_placed_mix_gets_each_rows_own_prompt_and_step(lm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where positions are scored in chunks: the bias is on the first position alone, whatever chunk it is in."""
    plans = [made(BIAS, "strength=3", "first_only=true").plan(i.example, None, None) for i in toy_examples(3)]
    bare = [Plan(plan.streams) for plan in plans]
    decoder = Decoder(lm)
    asked, plain = ([decoder.prepare(str(n), p, 8) for n, p in enumerate(some)] for some in (plans, bare))
    ids = [g.ids for g in decoder.generate(asked, max_new_tokens=4)]
    whole = decoder.distributions(asked, ids)
    monkeypatch.setattr(decode, "_LOGITS_BYTES", 1)
    for request, p, q, again in zip(
        asked, whole, decoder.distributions(plain, ids), decoder.distributions(asked, ids), strict=True
    ):
        by_hand = q[0].clone()
        by_hand[sorted(set(request.prompts[0].encoded.ids))] += 3
        torch.testing.assert_close(p[0], by_hand.log_softmax(-1))
        torch.testing.assert_close(p[1:], q[1:])
        torch.testing.assert_close(again, p)


def test_a_place_says_what_stands_before_a_token() -> None:
    place = Place(((1, 2), (3,)), ((4, 5, 6), (7,)), first=1)
    assert (place.before(0, 0), place.before(0, 2), place.before(1, 0)) == ((1, 2, 4), (1, 2, 4, 5, 6), (3, 7))


def test_the_chosen_response_is_one_of_the_drawn_and_draws_differ(lm: Any) -> None:
    method = made(BEST, "n=4", "choose=likely")
    examples = [item.example for item in toy_examples(3)]
    for sample in ModelSystem(lm, method, Generation(6)).answer(examples):
        assert sample.response in sample.extra["drawn"] and len(set(sample.extra["drawn"])) > 1
    few, more = (
        ModelSystem(lm, made(BEST, f"n={n}"), Generation(6)).answer(examples)[0].extra["drawn"] for n in (2, 4)
    )
    assert more[:2] == few, "the first draws do not depend on how many there are"


def test_who_chooses_is_worked_by_hand() -> None:
    drawn = [
        Generated((1, 2), (-1.0, -3.0), "No.", "stop"),
        Generated((1,), (-1.5,), "Yes ", "stop"),
        Generated((2,), (-4.0,), "yes", "stop"),
    ]
    assert MostLikely()(drawn) == 1 and MostCommon()(drawn) == 1
    assert MostCommon()(drawn[:2]) == 0


def test_a_choice_that_is_none_of_the_responses_is_one_line(lm: Any) -> None:
    example = toy_examples(1)[0].example

    class Wrong:
        def __call__(self, drawn: object) -> int:
            return 7

    class Chooses(method_class("plain")):  # type: ignore[misc]
        def plan(self, example: Any, shared: Any, personal: Any) -> Plan:
            return Plan((Stream(example.prompt()),), draws=Draws(2, Wrong()))

    with pytest.raises(HarnessError, match=r"Wrong chose an int \(7\); expected the place of a response, 0 to 1"):
        ModelSystem(lm, Chooses(), Generation(2)).answer([example])


def test_a_run_and_a_sweep_of_draws_give_the_same_answers(harness: Callable[[str], Any], toy: Path) -> None:
    common = f"--method {BEST} --task lamp4 --model {toy} --limit 3 --max_new_tokens 4 --output_path kept"
    assert harness(f"run {common} --set n=2").code == 0
    (run,) = find_runs(Path("kept"))
    before = {sample.id: sample.response for sample in read_samples(run.folder)}
    swept = harness(f"sweep {common.replace('kept', 'swept')} --set 'n=1|2'")
    assert swept.code == 0, swept.err
    after = {r.config.method.options["n"]: r for r in find_runs(Path("swept"))}
    assert {s.id: s.response for s in read_samples(after[2].folder)} == before
    assert all(len(s.extra["drawn"]) == 1 for s in read_samples(after[1].folder))


# Whether draws did anything


@dataclass(frozen=True)
class Draw(Plain):
    """Answers with one of two responses, drawn at a temperature."""

    number: int = 0
    temperature: float = 1.0
    mix: ClassVar[Any] = First()

    def plan(self, example: Any, shared: Any, personal: Any) -> Plan:
        return Plan((Stream(example.prompt()),), self.mix, draws=Draws(2, Number(self.number), self.temperature))


@dataclass(frozen=True)
class Number:
    number: int

    def __call__(self, drawn: object) -> int:
        return self.number


@dataclass(frozen=True)
class NoBias:
    """A bias of 0: what rounding leaves of it is no change."""

    def __call__(self, outputs: Any) -> torch.Tensor:
        logp: torch.Tensor = outputs[0].logits.log_softmax(-1)
        return (logp + 0.0).log_softmax(-1)


@pytest.mark.parametrize("mix", [First(), NoBias()])
@pytest.mark.parametrize(("temperature", "nothing"), [(1.0, False), (0.001, True)])
def test_draws_are_compared_with_what_the_model_answers_without_them(
    mix: Any, temperature: float, nothing: bool
) -> None:
    """Their log-probabilities are the model's own: what they change is which response is given."""
    lm = random_lm(dtype=torch.float32)
    examples = [item.example for item in toy_examples(4)]
    system = ModelSystem(lm, type("Mixed", (Draw,), {"mix": mix})(number=1, temperature=temperature), Generation(6))
    effect = system.effect(examples, [sample.response or "" for sample in system.answer(examples)])
    assert effect is not None and (effect.changed_tokens, effect.nothing("float32")) == (0, nothing)
    assert effect.kl_nats < 1e-9 and (effect.identical == 1) == nothing


def test_a_check_of_draws_says_that_it_did_not_compare_them(lm: Any) -> None:
    skipped: list[str] = []
    check_method(Draw(), lm=lm, skip=skipped.append)
    assert any("its plans draw from the unedited model" in line for line in skipped)


def test_each_response_that_is_drawn_takes_a_row(lm: Any) -> None:
    examples = [item.example for item in toy_examples(1)]
    assert sizes_of(ModelSystem(lm, Draw(), Generation(6)), examples)[0].rows == 2
    choices = [replace(example, choices=("a", "b")) for example in examples]
    assert sizes_of(ModelSystem(lm, Draw(), Generation(6)), choices)[0].rows == 1


@pytest.mark.parametrize(
    ("count", "temperature"), [(0, 1.0), (10**9, 1.0), (2.5, 1.0), ("2", 1.0), (2, 0), (2, "1"), (2, float("nan"))]
)
def test_draws_that_are_none_are_one_line(count: Any, temperature: Any) -> None:
    with pytest.raises(UsageError, match=r"responses at temperature .*: allowed are 1 to 10000, at 0.001 to 1000"):
        Draws(count, MostCommon(), temperature)
