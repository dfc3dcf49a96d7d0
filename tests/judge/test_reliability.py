"""How far a judge agrees with itself, with another judge and with people."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness.errors import UsageError
from harness.judge.pairwise_record import Look, Opinion, Pair, PairConfig, PairRecord, write
from harness.judge.reliability import alpha, of_comparisons
from harness.records.schema import JudgeConfig, MetricValue, RunConfig
from harness.records.store import find_runs
from harness.task import Rating


def test_alpha_is_the_packages_and_missing_where_nothing_is_expected() -> None:
    # by hand: two items, ratings 1 2 and 4 4; observed (1 - 2)^2 alone, expected over all pairs of the four values
    values = [1.0, 2.0, 4.0, 4.0]
    observed = 2 * (1 - 2) ** 2 / 1 / 4
    expected = sum((x - y) ** 2 for x in values for y in values) / (4 * 3)
    assert alpha([[1, 4], [2, 4]], "interval") == pytest.approx(1 - observed / expected)
    assert alpha([[1, 2], [1, 2]], "interval") == 1 and alpha([[1, None], [None, 2]], "interval") is None
    assert alpha([[3, 3], [3, 3]], "nominal") is None


@pytest.fixture
def compared(tmp_path: Path, run_config: Callable[..., RunConfig]) -> Callable[..., Path]:
    """Writes a comparison of rag and cad: winners by pair, of a judge or of people."""

    def save(winners: str, judge: str | None, *, swapped: bool = False) -> Path:
        runs = (run_config("cad"), run_config("rag")) if swapped else (run_config("rag"), run_config("cad"))
        side = {"r": "b" if swapped else "a", "c": "a" if swapped else "b", "t": "tie"}
        pairs = []
        for number, letter in enumerate(winners):
            opinion = Opinion(
                side[letter],
                None,
                *(dict.fromkeys(("relevance", "fluency", "style", "alignment", "factuality"), 3.0),) * 2,
            )
            pair = Pair(str(number), f"u{number}", f"p{number}", "a")
            if judge:
                pair.looks = [Look(first, Rating("rated"), opinion) for first in ("a", "b")]
            else:
                pair.votes = {"ann": opinion, "bob": opinion}
            pairs.append(pair)
        config = PairConfig(
            runs=runs,
            count=len(pairs),
            seed=0,
            profile_items=0,
            evaluator="judge" if judge else "human",
            judge=JudgeConfig(name=judge) if judge else None,
        )
        both = {"orders_agree": MetricValue(value=0.8, n=5)} if judge else {}
        record = PairRecord(config=config, annotators=[] if judge else ["ann", "bob"], metrics={"both": both})
        folder = tmp_path / f"{judge}{swapped}"
        write(folder, record, pairs)
        return folder

    return save


def test_judges_and_people_agree_on_the_run_that_wins_whichever_side_it_was(compared: Callable[..., Path]) -> None:
    found = of_comparisons([compared("rrct", "x"), compared("rrcc", "y", swapped=True), compared("rrct", None)])
    values = {(one.what, one.of): one.value.value for one in found}
    assert values["the same winner", "x and y"] == 0.75
    assert values["the same winner", "x and 2 people"] == 1 and values["alpha of winners", "x and 2 people"] == 1
    assert values["position bias: both orders name one winner", "x"] == 0.8


def test_comparisons_of_other_runs_are_refused(
    compared: Callable[..., Path], run_config: Callable[..., RunConfig]
) -> None:
    one, other = compared("r", "x"), compared("r", None)
    changed = json.loads((other / "pairs.json").read_text())
    changed["config"]["runs"][0]["sampling"]["seed"] = 5
    (other / "pairs.json").write_text(json.dumps(changed))
    with pytest.raises(UsageError, match="of different runs"):
        of_comparisons([one, other])


def test_the_command_asks_a_runs_judge_again(harness: Callable[[str], Any], toy: Path) -> None:
    done = harness(
        f"run --method plain --task persona:religion --task_set prompts=tiny --model {toy} --limit 4 --max_new_tokens 4 "
        "--judge lexicon --output_path kept --allow_noop"
    )
    assert done.code == 0, done.err
    (run,) = find_runs(Path("kept"))
    asked = harness(f"judge reliability {run.folder} --limit 6")
    assert asked.code == 0, asked.err
    assert "lexicon, twice" in asked.out and "the same rating" in asked.out and "1.000" in asked.out
    assert "asks no judge" in harness(f"judge reliability {_plain(harness, toy)} --judge lexicon").error()


def _plain(harness: Callable[[str], Any], toy: Path) -> Path:
    harness(f"run --method plain --task lamp4 --model {toy} --limit 1 --max_new_tokens 1 --output_path other")
    (run,) = find_runs(Path("other"))
    assert run.folder is not None
    return run.folder
