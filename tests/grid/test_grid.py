"""A run on workers is the run in one process: the same bytes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from left_behind import none_left, records, same

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")

Harness = Callable[[str], Any]
TRAIT = {
    "instruction": [{"pos": "Be a pirate.", "neg": "Be plain."}],
    "questions": ["How are you?", "Who are you?"],
    "eval_questions": ["Where?", "When is it?", "Why?"],
    "eval_prompt": "Q {question} A {answer}: 0 to 100, or REFUSAL",
}


def test_two_processes_write_the_bytes_of_one_for_plain_and_fitted_methods(harness: Harness, command: str) -> None:
    methods = "--method plain --method dps --set dps.samples=3"
    one = harness(f"run {methods} {command} --output_path one")
    assert one.code == 0, one.err
    (Path("cache") / "artifacts").rename("kept")  # the workers fit anew
    two = harness(f"run {methods} {command} --output_path two --on local:2")
    assert two.code == 0, two.err
    same("one", "two")
    assert not (Path("two") / ".grid").exists()
    for _, run in records("two").values():
        assert {costs["worker"] for costs in run.batch_costs.values()} <= {0, 1}
        assert set(run.hardware["workers"]) <= {"0", "1"}
    assert [line for line in two.out.splitlines() if not line.startswith("two")] == [
        line for line in one.out.splitlines() if not line.startswith("one")
    ]


def test_a_sweep_and_a_task_with_choices_are_the_same_on_workers(harness: Harness, forked: Any, toy: Path) -> None:
    Path("pirate.json").write_text(json.dumps(TRAIT))
    persona = (
        f"--method persona_vector --task persona:./pirate.json --model {toy} --max_new_tokens 5 --temperature 1 "
        "--task_set rollouts=2 --set rollouts=2 --batch_size 2 --set layer=0..1"
    )
    folder = Path("mmlu/data")
    for split, count in (("dev", 5), ("test", 9)):
        (folder / split).mkdir(parents=True)
        rows = [f"Question {n}?,a{n},b{n},c{n},d{n},{'ABCD'[n % 4]}" for n in range(count)]
        (folder / split / f"virology_{split}.csv").write_text("\n".join(rows) + "\n")
    mmlu = f"--method rag --task mmlu --data mmlu --task_set subjects=virology --model {toy} --batch_size 3"
    for where, on in (("one", ""), ("two", "--on local:2")):
        swept = harness(f"sweep {persona} --output_path {where} {on}")
        assert swept.code == 0, swept.err
        asked = harness(f"run {mmlu} --allow_noop --output_path {where} {on}")
        assert asked.code == 0, asked.err
    same("one", "two")


def test_cells_that_are_one_record_run_once_on_workers(harness: Harness, forked: Any, command: str) -> None:
    for line in ("run --method plain --method plain", "sweep --method rag --set k=1|01 --task lamp2m"):
        done = harness(f"{line} {command} --on local:2")
        assert done.code == 0, done.err
    assert len(records("runs")) == 2 and not (Path("runs") / ".grid").exists()


def test_users_adapted_to_in_parts_are_the_same_on_workers(
    harness: Harness, forked: Any, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("harness.fit.states.USERS_AT_ONCE", 3)
    perfit = f"run --method perfit --set ablation=stage2_p --set epochs=1 --set items=1 {command}"
    one = harness(f"{perfit} --output_path one")
    assert one.code == 0, one.err
    (Path("cache") / "artifacts").rename("kept")  # the workers adapt anew
    two = harness(f"{perfit} --output_path two --on local:2")
    assert two.code == 0, two.err
    same("one", "two")


def test_fit_on_workers_keeps_what_fit_here_would(harness: Harness, forked: Any, toy: Path) -> None:
    fit = f"fit --method dps --set samples=3 --task lamp2m --model {toy} --dtype float64"
    there = harness(f"{fit} --on local:2")
    (Path("cache") / "artifacts").rename("kept")
    here = harness(fit)
    assert there.code == here.code == 0, there.err + here.err
    first, second = (json.loads(done.out) for done in (there, here))
    assert first["key"] == second["key"] and first.keys() == second.keys()
    tensors = "tensors.safetensors"
    assert (Path("kept") / first["key"] / tensors).read_bytes() == (Path(second["folder"]) / tensors).read_bytes()


def test_workers_begin_before_the_data_is_read_and_are_gone_where_it_cannot_be(
    harness: Harness, forked: Any, toy: Path
) -> None:
    Path("empty").mkdir()
    done = harness(f"run --method plain --task lamp4 --data empty --model {toy} --on local:2")
    alone = harness(f"run --method plain --task lamp4 --data empty --model {toy}")
    assert (done.code, done.err) == (alone.code, alone.err) and done.code == 4
    assert forked().pids.keys() == {0, 1}
    none_left(forked().pids.values())
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("on", "says"),
    [
        ("local", "names no number of workers; give it as in local:2"),
        ("local:0", "names no number of workers"),
        ("local:²", "names no number of workers"),
        ("slurm:workers=²", "workers=² is no number"),
        ("mars:2", "is no place to run; allowed: local:N"),
        ("slurm:gpu", "'gpu' is no KEY=VALUE"),
        ("slurm:workers=x", "workers=x is no number"),
    ],
)
def test_a_place_that_is_none_is_refused_before_a_model_is_loaded(harness: Harness, on: str, says: str) -> None:
    done = harness(f"run --method plain --task lamp2m --limit 5 --on {on}")
    assert done.code == 2 and says in done.error()


def test_a_plan_says_shards_hours_operations_and_memory_and_how_to_start(harness: Harness, toy: Path) -> None:
    done = harness(
        f"grid plan --method rag --method plain --task lamp2m --model {toy} --limit 20 --batch_size 4 --on workers:2"
    )
    assert done.code == 0, done.err
    assert done.out.count("20 samples in 5 batches, about 2 shards") == 2
    for word in ("operations", "hours", "memory a worker", "start it: harness run --method rag"):
        assert word in done.out
    dry = harness(f"run --method plain --task lamp2m --model {toy} --limit 20 --batch_size 4 --on local:2 --dry_run")
    assert dry.code == 0 and "on 2 workers: 20 samples in 5 batches" in dry.out
    assert not Path("runs").exists()


def test_a_plan_repeats_no_credentials_of_a_server(harness: Harness, toy: Path) -> None:
    url = "http://me:hunter2hunter2@127.0.0.1:9/v1?api_key=sesame12345"
    done = harness(
        f"grid plan --method plain --task persona:islam --model {toy} --judge openai/some --judge_base_url {url} --on workers:2"
    )
    said = done.out + done.err
    assert "start it: harness run" in said, said
    assert "hunter2" not in said and "sesame" not in said


def _planned(done: Any) -> str:
    """The command that the plan says starts it."""
    assert done.code == 0, done.err
    start = done.out.splitlines()[-1]
    assert start.startswith("start it: harness ")
    return start.removeprefix("start it: harness ")


def test_the_plan_of_a_sweep_starts_a_sweep_whose_workers_anybody_starts(
    harness: Harness, forked: Any, command: str
) -> None:
    sweep = f"--method rag --set 'k=1|2' {command} --limit 8"
    plan = harness(f"grid plan sweep {sweep} --output_path two --on workers:2")
    start = _planned(plan)
    assert "8 samples of each of 2 points in 4 batches, about 2 shards" in plan.out
    two = harness(start)
    assert two.code == 0, two.err
    assert "start each worker, i from 0 to 1: " in two.err and "harness grid worker" in two.err
    assert harness(f"sweep {sweep} --output_path one").code == 0
    same("one", "two")
    none_left(forked().pids.values())


def test_the_plan_of_a_fit_starts_a_fit_whose_workers_anybody_starts(harness: Harness, forked: Any, toy: Path) -> None:
    fit = f"--method dps --set samples=3 --task lamp2m --model {toy} --dtype float64"
    plan = harness(f"grid plan fit {fit} --on workers:1")
    start = _planned(plan)
    for word in ("one worker fits; fitting reads 3 items", "operations", "hours", "memory a worker"):
        assert word in plan.out
    done = harness(start)
    assert done.code == 0 and "--rank i/1" in done.err, done.err
    again = harness(f"grid plan fit {fit} --on workers:1")
    assert f"it is fitted already: {json.loads(done.out)['key']}" in again.out
    none_left(forked().pids.values())


def test_a_plan_takes_the_options_of_its_command_and_no_others(harness: Harness, toy: Path) -> None:
    assert "--limit" in harness(f"grid plan fit --method dps --task lamp2m --model {toy} --limit 3 --on ray").error()
    assert "has nothing to fit" in harness(f"grid plan fit --method rag --task lamp2m --model {toy} --on ray").error()
    assert "nothing varies" in harness("grid plan sweep --method rag --task lamp2m --set k=1 --on ray").error()
    assert "give the workers" in harness("grid plan run --method rag --task lamp2m").error()
