"""Runs of equal cost are chosen by cost alone, and said."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness.errors import UsageError
from harness.records.store import RunConfig, RunFolder, RunRecord, find_runs, read_record
from harness.statistics.matched import matched

Harness = Callable[[str], Any]


@pytest.fixture
def save(tmp_path: Path, run_config: Callable[..., RunConfig]) -> Callable[..., Path]:
    def write(method: str, k: int, tokens: int, setup: int = 0, task: str = "lamp4", model: str = "llama3-8b") -> Path:
        config = run_config(method, task, model, options={"k": k})
        record = RunRecord(config=config, status="complete", batches=[["1", "2"]])
        record.cost.prefill_tokens, record.cost.decode_tokens = 2 * tokens - 10, 10
        record.cost.setup_prefill_tokens = 2 * setup
        record.cost.flops = 1e6 * tokens
        with RunFolder.open(tmp_path, config) as folder:
            folder.write(record)
            return folder.path

    return write


def test_of_each_method_the_run_is_taken_whose_cost_lies_closest(save: Callable[..., Path]) -> None:
    rag = [save("rag", k, tokens) for k, tokens in ((1, 100), (4, 410), (8, 820))]
    cad = [save("cad", k, tokens) for k, tokens in ((1, 190), (2, 400))]
    points, said = matched([*rag, *cad], "tokens")
    assert [point.folder for point in points] == [rag[1], cad[1]]
    assert said == "matched by tokens a sample, chosen by cost alone: rag 410, cad 400 (within 2 %)"
    assert [point.folder for point in matched([*rag, *cad], "flops")[0]] == [rag[1], cad[1]]


def test_runs_of_another_task_or_model_are_never_matched(save: Callable[..., Path]) -> None:
    """As a glob finds them: of equal cost, and not to be compared."""
    rag, cad = save("rag", 1, 100), save("cad", 1, 110)
    strangers = [save("cad", 1, 100, task="lamp7"), save("cad", 1, 100, model="qwen2-7b")]
    points, _ = matched([rag, *strangers, cad], "tokens")
    assert [point.folder for point in points] == [rag, cad]
    with pytest.raises(UsageError, match="two methods or more, on one model and task"):
        matched([rag, *strangers], "tokens")


def test_costs_of_other_samples_are_not_matched(save: Callable[..., Path]) -> None:
    """A trial on a few short prompts is as cheap as a run of less history on all, and says nothing of it."""
    rag, cad, trial = save("rag", 4, 400), save("cad", 1, 390), save("cad", 4, 400)
    record = read_record(trial)
    record.batches = [["1"]]
    record.cost.prefill_tokens, record.cost.decode_tokens = 395, 5
    (trial / "run.json").write_text(record.to_json())
    points, _ = matched([rag, trial, cad], "tokens")
    assert [point.folder for point in points] == [rag, cad]


def test_what_is_learnt_of_a_user_is_part_of_a_samples_cost(save: Callable[..., Path]) -> None:
    oppu, rag = save("oppu", 0, 50, setup=350), [save("rag", k, 100 * k) for k in (1, 4)]
    assert [point.cost for point in matched([*rag, oppu], "tokens")[0]] == [400, 400]


def test_a_run_that_was_stopped_before_its_answers_were_counted_has_no_cost(save: Callable[..., Path]) -> None:
    stopped, runs = save("pag", 0, 50, setup=350), [save("rag", 4, 400), save("cad", 1, 390)]
    record = read_record(stopped)
    record.status, record.cost.prefill_tokens, record.cost.decode_tokens = "interrupted", None, None
    (stopped / "run.json").write_text(record.to_json())
    points, _ = matched([stopped, *runs], "tokens")
    assert [point.method for point in points] == ["rag", "cad"]


def test_costs_that_do_not_agree_are_refused_with_the_next_step(save: Callable[..., Path]) -> None:
    runs = [save("rag", 1, 100), save("cad", 1, 200)]
    with pytest.raises(UsageError, match=r"rag 100, cad 200, 2.00 times apart \(allowed: 1.25\)"):
        matched(runs, "tokens")
    with pytest.raises(UsageError, match="needs runs of two methods or more"):
        matched(runs[:1], "tokens")


def test_where_no_costs_agree_the_sweeps_that_make_such_runs_are_printed_and_work(harness: Harness) -> None:
    small = "--task lamp4 --model tiny --limit 3 --max_new_tokens 2"
    assert harness(f"run --method rag --method cad --set rag.k=1 --set cad.k=8 --set cad.alpha=0.3 {small}").code == 0
    compare = "compare 'runs/tiny/lamp4/*' --matched tokens --baseline rag"
    done = harness(compare)
    assert done.code == 2 and "no runs agree in tokens" in done.error()
    assert "'harness compare equal_cost --matched tokens' then chooses" in done.error()
    lines = done.out.splitlines()
    assert [shlex.split(line)[:4] for line in lines] == [["harness", "sweep", "--method", m] for m in ("cad", "rag")]
    assert all("--split train --limit 3 --max_new_tokens 2" in line for line in lines) and "alpha=0.3" in lines[0]
    for line in lines:
        swept = harness(line.removeprefix("harness "))
        assert swept.code == 0, swept.err
    found = harness("compare equal_cost --matched tokens --baseline rag")
    assert found.code == 0 and "matched by tokens a sample, chosen by cost alone" in found.err, found.err


def test_of_a_method_that_answers_several_times_the_number_of_answers_is_varied_too(harness: Harness) -> None:
    best = Path(__file__).parents[2] / "docs/examples/best_of_n.py"
    small = "--task lamp4 --model tiny --limit 2 --max_new_tokens 8"
    assert harness(f"run --method rag --set k=8 {small}").code == 0
    assert harness(f"run --method {best} --set k=1 --set n=2 {small}").code == 0
    done = harness("compare 'runs/tiny/lamp4/*' --matched tokens --baseline rag")
    assert done.code == 2 and "whose k or number of answers you take to" in done.error()
    varied = [shlex.split(line)[-1].split("=")[0] for line in done.out.splitlines()]
    assert sorted(varied) == ["k", "k", "n"]
    (line,) = [line for line in done.out.splitlines() if " 'n=" in line]
    values = shlex.split(line)[-1].removeprefix("n=").split("|")
    assert "--set k=1 " in line and values == sorted(values, key=int) and int(values[-1]) > 2
    swept = harness(line.removeprefix("harness ").replace("./METHOD.py", str(best)))
    assert swept.code == 0, swept.err
    made = find_runs(Path("equal_cost"))
    assert {run.config.method.options["n"] for run in made} == set(map(int, values))
