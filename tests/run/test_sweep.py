"""A sweep answers all points in shared batches, and each point's record is the one it has when run alone."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness.engine.decode import Decoder
from harness.engine.flops import Cost
from harness.errors import UsageError
from harness.records.store import Outcome, RunRecord, find_runs, read_samples
from harness.run.sweep import RESAMPLES, peak, points
from harness.run.together import plus, shares
from harness.task import Sample

TRAIT = {
    "instruction": [{"pos": "Be a pirate.", "neg": "Be plain."}],
    "questions": ["How are you?", "Who are you?"],
    "eval_questions": ["Where?", "When is it?", "Why?"],
    "eval_prompt": "Q {question} A {answer}: 0 to 100, or REFUSAL",
}


@pytest.fixture
def command(tmp_path: Path, toy: Path) -> str:
    (tmp_path / "pirate.json").write_text(json.dumps(TRAIT))
    return (
        f"--method persona_vector --task persona:./pirate.json --model {toy} --dtype float64 --max_new_tokens 5 "
        "--temperature 1 --task_set rollouts=2 --set rollouts=2 --batch_size 4"
    )


def test_ranges_and_alternatives_vary_and_the_rest_is_the_same_for_all() -> None:
    found = points(["layer=0..2", "scale=unit", "coefficient=1|2"])
    assert list(found)[:3] == ["layer=0 coefficient=1", "layer=0 coefficient=2", "layer=1 coefficient=1"]
    assert found["layer=2 coefficient=2"] == ["layer=2", "scale=unit", "coefficient=2"] and len(found) == 6
    paths = points(["heads_file=../h.json", "adapters=../a|b..c", "k=1|2"])  # not every `..` is of a range
    assert next(iter(paths.values())) == ["heads_file=../h.json", "adapters=../a", "k=1"] and len(paths) == 4
    wrongs = (
        ["layer=1"],
        ["layer=3..1"],
        ["layer=0.."],
        ["layer=0..²"],
        ["k=0..999999999"],
        ["k=0..99", "layer=0..999"],
    )
    for wrong in (*wrongs, [f"layer=0..{'9' * 5000}"]):
        with pytest.raises(UsageError):
            points(wrong)


def test_a_point_of_a_sweep_is_the_record_it_is_alone_and_takes_fewer_passes(
    harness: Callable[[str], Any], command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = _count_generations(monkeypatch)
    done = harness(f"sweep {command} --set layer=0..2 --output_path swept")
    assert done.code == 0, done.err
    in_sweep = len(passes)
    alone = harness(f"run {command} --set layer=1 --output_path alone")
    assert alone.code == 0, alone.err
    (one,) = find_runs(Path("alone"))
    assert one.folder is not None
    (swept,) = [run for run in find_runs(Path("swept")) if run.hash == one.hash]
    assert swept.folder is not None
    assert _answers(swept) == _answers(one)
    assert _costs(swept) == _costs(one)
    assert swept.cost.saved_flops and swept.cost.saved_forward_passes and one.cost.saved_flops is None
    assert (swept.batches, swept.health.edits_decode) == (one.batches, one.health.edits_decode)
    assert len(find_runs(Path("swept"))) == 3
    assert in_sweep < 3 * (len(passes) - in_sweep)


def test_a_killed_sweep_goes_on_and_ends_with_an_unbroken_ones_samples(
    harness: Callable[[str], Any], command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert harness(f"sweep {command} --set layer=0..1 --output_path whole").code == 0
    passes = _count_generations(monkeypatch, stop_at=2)
    assert harness(f"sweep {command} --set layer=0..1 --output_path killed").code == 130
    assert {run.status for run in find_runs(Path("killed"))} == {"interrupted"}
    passes.clear()
    _count_generations(monkeypatch)
    assert harness(f"sweep {command} --set layer=0..1 --output_path killed").code == 0
    for a, b in zip(find_runs(Path("whole")), find_runs(Path("killed")), strict=True):
        assert (a.hash, a.status, b.status) == (b.hash, "complete", "complete")
        assert _answers(a) == _answers(b)
        assert _costs(a) == _costs(b)


@pytest.mark.parametrize(
    "line",
    [
        "--method cad --task lamp4 --set alpha=0|0.5|1 --set k=1 --batch_size 3",
        "--method dola --task lamp3 --set layers=0,1|0,2 --set k=1 --batch_size 2",
        "--method lora_p --task lamp3 --set rank=1|2 --set epochs=1 --set items=2 --batch_size 3",
        "--method cad --task mmlu --data mmlu --task_set subjects=virology --set alpha=0|0.5|1 --set k=1 --batch_size 3",
    ],
)
def test_the_cost_of_a_point_is_that_of_a_run_whatever_the_method(
    harness: Callable[[str], Any], toy: Path, line: str
) -> None:
    Path("mmlu/test").mkdir(parents=True)
    rows = [f"Question {'long ' * n}{n}?,a,b,c,d,{'ABCD'[n % 4]}" for n in range(7)]
    Path("mmlu/test/virology_test.csv").write_text("\n".join(rows) + "\n")
    common = f"{line} --model {toy} --dtype float64 --limit 5 --max_new_tokens 6"
    done = harness(f"sweep {common} --output_path swept")
    assert done.code == 0, done.err
    varied = next(part for part in line.split() if "|" in part)
    key, _, values = varied.partition("=")
    for value in values.split("|"):
        alone = harness(f"run {common.replace(varied, f'{key}={value}')} --output_path alone --allow_noop")
        assert alone.code == 0, alone.err
    for one, swept in zip(find_runs(Path("alone")), find_runs(Path("swept")), strict=True):
        assert one.hash == swept.hash
        assert _answers(swept) == _answers(one)
        assert _costs(swept) == _costs(one)


def test_the_table_and_the_json_show_every_point(harness: Callable[[str], Any], command: str) -> None:
    done = harness(f"sweep {command} --set layer=0|2 --json")
    (line,) = done.out.splitlines()
    content = json.loads(line)
    assert list(content["points"]) == ["layer=0", "layer=2"]
    assert "layer=2" in harness(f"sweep {command} --set layer=0|2").out
    assert "lowest" in json.loads(harness(f"sweep {command} --set layer=0|2 --lowest --json").out)


@pytest.mark.parametrize(
    ("line", "names", "same"),
    [
        ("--method rag --set k=1|01|2", ["k=1", "k=01", "k=2"], "k=01 is the same record as k=1"),
        (
            "--method dps --set screen=auto|all --set samples=2 --set heads=2 --fit_split dev:0.1",
            ["screen=auto", "screen=all"],
            "screen=all is the same record as screen=auto",
        ),
    ],
)
def test_points_that_are_one_record_run_once_and_are_both_shown(
    harness: Callable[[str], Any], toy: Path, line: str, names: list[str], same: str
) -> None:
    done = harness(f"sweep {line} --task lamp3 --model {toy} --limit 4 --max_new_tokens 2 --json")
    assert done.code == 0, done.err
    content = json.loads(done.out)
    assert list(content["points"]) == names and content["points"][names[0]] == content["points"][names[1]]
    assert len(find_runs(Path("runs"))) == len(names) - 1 and same in done.err
    found = content["lowest"]
    assert names[1] not in {found["point"], found["low"], found["high"], *found["wins"]}


def test_where_less_is_better_the_lowest_point_is_named(harness: Callable[[str], Any], toy: Path) -> None:
    line = f"sweep --method cad --set k=1 --set alpha=0|4 --task lamp3 --limit 6 --max_new_tokens 2 --model {toy}"
    content = json.loads(harness(f"{line} --json").out)
    errors = {name: point["mae"]["value"] for name, point in content["points"].items()}
    assert "peak" not in content and content["lowest"]["metric"] == "mae"
    assert errors[content["lowest"]["point"]] == min(errors.values())


def test_shares_of_a_cost_add_up() -> None:
    cost = Cost(10, 11, 12, 13, 14, 15)
    parts = shares(cost, 4)
    total = Cost()
    for part in parts:
        total = plus(total, part)
    assert total == cost and max(p.forward_passes for p in parts) - min(p.forward_passes for p in parts) <= 3


@pytest.fixture
def swept(
    tmp_path: Path, run_config: Callable[..., Any], run_record: Callable[..., RunRecord]
) -> Callable[[dict[str, list[float | None]]], dict[str, Outcome]]:
    """Points by name, each with the trait score of every question."""

    def make(scores: dict[str, list[float | None]]) -> dict[str, Outcome]:
        outcomes = {}
        for name, values in scores.items():
            (tmp_path / name).mkdir()
            lines = [json.dumps({"id": str(i), "user": f"q{i}", "metrics": {"trait": v}}) for i, v in enumerate(values)]
            (tmp_path / name / "samples.jsonl").write_text("\n".join(lines) + "\n")
            outcomes[name] = Outcome(run_record(run_config()), tmp_path / name, 0)
        return outcomes

    return make


def test_the_peak_comes_with_where_it_lies_when_questions_are_drawn_again(swept: Callable[..., Any]) -> None:
    outcomes = swept({"a": [1.0, 9.0, 1.0, 2.0], "b": [3.0, 3.0, 3.0, 3.0], "c": [0.0, 0.0, 0.0, 0.0]})
    found = peak(outcomes, "trait")
    assert found is not None
    assert (found.point, found.low, found.high) == ("a", "a", "b")
    assert set(found.wins) == {"a", "b"} and sum(found.wins.values()) == pytest.approx(1)
    assert all(round(share * RESAMPLES) > 100 for share in found.wins.values())
    assert peak(outcomes, "coherence") is None
    lowest = peak(outcomes, "trait", lowest=True)
    assert lowest is not None and (lowest.point, lowest.wins) == ("c", {"c": 1.0})


def test_the_peak_of_independent_items_is_that_of_drawn_items_whoever_asks_them(
    tmp_path: Path, swept: Callable[..., Any]
) -> None:
    """As of MMLU's questions, which one user may ask."""
    outcomes = swept({"a": [1.0, 9.0, 1.0, 2.0], "b": [3.0, 3.0, 3.0, 3.0]})
    by_user = peak(outcomes, "trait")
    for name in outcomes:
        file = tmp_path / name / "samples.jsonl"
        lines = [json.loads(line) | {"user": "none"} for line in file.read_text().splitlines()]
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert peak(outcomes, "trait", independent="item") == by_user
    certain = peak(outcomes, "trait")
    assert certain is not None and certain.wins == {"a": 1.0}


def test_points_whose_answers_have_other_metrics_are_shown_by_those_they_share(
    harness: Callable[[str], Any], toy: Path
) -> None:
    Path("vary.py").write_text(
        "from harness.task import Metric\nfrom harness.tasks.users import Users\n"
        "class Vary(Users):\n"
        "    def read(self):\n"
        "        return [{'user': f'u{i % 3}', 'input': f'lunch {i}?', 'target': 'Sure!'} for i in range(6)]\n"
        "    def aggregate(self, samples):\n"
        "        return {f'share_{samples[0].response}': Metric(1.0, len(samples))}\n"
        "class Shared(Vary):\n"
        "    def aggregate(self, samples):\n"
        "        return super().aggregate(samples) | {'answered': Metric(1.0, len(samples))}\n"
    )
    Path("say.py").write_text(
        "from dataclasses import dataclass\nfrom harness.method import Method\nfrom harness.plan import Plan, Stream\n"
        "@dataclass(frozen=True)\nclass Say(Method):\n    answer: str = 'yes'\n"
        "    def plan(self, example, shared, personal):\n"
        "        return Plan((Stream(example.prompt()),), answer=self.answer)\n"
    )
    tasks = "--task ./vary.py:Shared --task ./vary.py:Vary"
    done = harness(f"sweep --method ./say.py {tasks} --model {toy} --set 'answer=yes|no'")
    assert done.code == 0, done.err
    _, some, none = re.split(r"(?m)^.* on .* with .*$", done.out)
    assert "answered" in some and "share_" not in some + none
    assert "answer=no" in none and "peaks" not in none


def test_where_all_points_are_equal_the_peak_may_lie_at_any(swept: Callable[..., Any]) -> None:
    found = peak(swept({"a": [0.0, 0.0], "b": [0.0, 0.0], "c": [0.0, 0.0]}), "trait")
    assert found is not None and (found.low, found.high) == ("a", "c")


@pytest.mark.parametrize(("lowest", "point"), [(False, "a"), (True, "b")])
def test_an_answer_that_no_judge_rated_is_left_out_of_the_peak(
    swept: Callable[..., Any], lowest: bool, point: str
) -> None:
    outcomes = swept({"a": [9.0, None, 9.0, 9.0], "b": [5.0, 5.0, None, 5.0], "c": [6.0, 6.0, 6.0, 6.0]})
    found = peak(outcomes, "trait", lowest=lowest)
    assert found is not None and (found.point, found.low, found.high) == (point, point, point)
    assert peak(outcomes | swept({"d": [None] * 4}), "trait") is None
    assert peak(outcomes | swept({"e": [1.0] * 3}), "trait") is None


def _costs(run: RunRecord) -> dict[str, Any]:
    """Of the record and of its batches, but for what is measured and what sharing saved."""
    measured = ("seconds", "fit_seconds", "effect_seconds", "setup_seconds_per_user", "peak_memory_bytes")
    whole = {k: v for k, v in run.cost.model_dump().items() if k not in measured and not k.startswith("saved_")}
    batches = {
        first: {k: v for k, v in costs.items() if k != "seconds" and not k.startswith("saved_")}
        for first, costs in run.batch_costs.items()
    }
    return {**whole, "batches": batches}


def _answers(run: RunRecord) -> dict[str, tuple[str | None, dict[str, float | None]]]:
    assert run.folder is not None
    samples: list[Sample] = read_samples(run.folder)
    return {sample.id: (sample.response, sample.metrics) for sample in samples}


def _count_generations(monkeypatch: pytest.MonkeyPatch, stop_at: int | None = None) -> list[int]:
    """Rows of each batch that is generated while answering; ctrl-C at the given one."""
    counted: list[int] = []
    original = getattr(Decoder.generate, "original", Decoder.generate)

    def generate(self: Decoder, requests: Any, **options: Any) -> Any:
        if type(self) is not Decoder:  # what counts a batch's cost computes nothing
            return original(self, requests, **options)
        counted.append(len(requests))
        if len(counted) == stop_at:
            raise KeyboardInterrupt
        return original(self, requests, **options)

    generate.original = original  # type: ignore[attr-defined]
    monkeypatch.setattr(Decoder, "generate", generate)
    return counted
