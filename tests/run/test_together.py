"""Methods of one grid answer equal batches together, and each one's record is the one it has when run alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness.engine.rows import Pass
from harness.records.store import RunRecord, find_runs, read_samples

FIVE = (
    "--method rag --method cad --method dps --method dola --method cos --set k=2 --set dps.samples=2 --set dps.heads=2 "
    "--fit_split dev:0.1 --task lamp3 --dtype float64 --limit 5 --batch_size 2 --max_new_tokens 6"
)
FAULTY = """
from dataclasses import dataclass
from harness.method import Method
from harness.plan import Plan, Stream

@dataclass(frozen=True)
class Broken:
    def __call__(self, outputs):
        raise ZeroDivisionError("a mix of its own")

@dataclass(frozen=True)
class Faulty(Method):
    where: str = "mix"
    def plan(self, example, shared, personal):
        if self.where == "plan":
            raise ZeroDivisionError("a plan of its own")
        return Plan((Stream(self.retrieval.prompt(example)),), Broken())
"""


def whole(run: RunRecord) -> dict[str, Any]:
    """All of a record and its samples, but for what is measured and what sharing saved."""
    assert run.folder is not None
    measured = ("seconds", "fit_seconds", "effect_seconds", "setup_seconds_per_user", "peak_memory_bytes")
    content = run.model_dump(exclude={"started", "finished", "git_sha", "dirty", "batch_costs", "cost"})
    content["cost"] = {
        k: v for k, v in run.cost.model_dump().items() if k not in measured and not k.startswith("saved_")
    }
    content["batch_costs"] = {
        first: {k: v for k, v in costs.items() if k != "seconds" and not k.startswith("saved_")}
        for first, costs in run.batch_costs.items()
    }
    for name in ("kl_to_base",):  # of sums whose order the neighbours decide
        content["health"][name] = pytest.approx(content["health"][name])
    samples = sorted(read_samples(run.folder), key=lambda sample: sample.id)
    return {**content, "samples": samples}


def runs(folder: str) -> dict[str, RunRecord]:
    return {run.config.method.name: run for run in find_runs(Path(folder))}


def test_every_method_of_a_grid_has_the_record_of_a_run_of_its_own_and_shares_the_prompts(
    harness: Callable[[str], Any], toy: Path
) -> None:
    common = f"{FIVE} --model {toy}"
    done = harness(f"run {common} --output_path together")
    assert done.code in (0, 1), done.err  # the toy may answer alike whatever heads are masked
    options = common.partition("--set k=2")[2]
    for method in ("dps", "dola", "cos"):
        mine = options if method == "dps" else options.replace("--set dps.samples=2 --set dps.heads=2", "")
        alone = harness(f"run --method {method} --set k=2 {mine} --output_path alone")
        assert alone.code in (0, 1), alone.err
    together, apart = runs("together"), runs("alone")
    assert len(together) == 5 and len(apart) == 3
    for method in apart:
        assert whole(together[method]) == whole(apart[method]), method
        assert together[method].cost.saved_flops and apart[method].cost.saved_flops is None
    costs = [run.cost for run in together.values()]
    assert sum(cost.saved_flops or 0 for cost in costs) > 0.3 * sum(cost.flops or 0 for cost in costs)
    assert "rag: " not in done.out and done.out.count("on lamp3 with") == 5


def test_a_grid_that_is_killed_goes_on_and_ends_like_an_unbroken_one(
    harness: Callable[[str], Any], toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = f"run --method rag --method cad --method cos --task lamp3 --set k=1 --model {toy} --limit 6 --batch_size 2"
    line += " --dtype float64 --max_new_tokens 4"
    assert harness(f"{line} --output_path whole").code == 0
    with monkeypatch.context() as patch:
        read = _count_prompt_tokens(patch, stop_at=9)
        assert harness(f"{line} --output_path killed").code == 130
        assert len(read) == 9
    killed = runs("killed")
    assert {run.status for run in killed.values()} == {"interrupted"}
    assert any(0 < len(read_samples(run.folder)) < 6 for run in killed.values() if run.folder)
    assert harness(f"{line} --output_path killed").code == 0
    for method, run in runs("whole").items():
        assert whole(runs("killed")[method]) == whole(run)


@pytest.mark.parametrize("where", ["mix", "plan"])
def test_a_method_that_fails_takes_no_other_of_the_grid_with_it(
    harness: Callable[[str], Any], toy: Path, where: str
) -> None:
    Path("faulty.py").write_text(FAULTY.replace('"mix"\n', f'"{where}"\n'))
    line = f"run --task lamp3 --model {toy} --limit 4 --batch_size 2 --dtype float64 --max_new_tokens 4"
    done = harness(f"{line} --method rag --method ./faulty.py --method cad --set k=1 --output_path grid")
    assert done.code == 1 and f"a {where} of its own" in done.err
    assert harness(f"{line} --method rag --method cad --set k=1 --output_path without").code == 0
    found = runs("grid")
    for method, run in runs("without").items():
        assert whole(found.pop(method)) == whole(run)
    (failed,) = found.values()
    assert (failed.status, failed.error) == ("failed", f"ZeroDivisionError: a {where} of its own")


def test_a_method_that_is_named_twice_runs_once(harness: Callable[[str], Any], toy: Path) -> None:
    line = f"run --method rag --method cad --method rag --task lamp3 --model {toy} --limit 2 --max_new_tokens 2"
    done = harness(line)
    assert done.code == 0, done.err
    assert done.err.count("already there") == 1 and done.out.count("rag on lamp3 with") == 2
    assert len(runs("runs")) == 2


def test_what_stops_a_method_that_is_named_twice_stops_it_once(harness: Callable[[str], Any], toy: Path) -> None:
    counting = "            with open('tries', 'a') as tries:\n                tries.write('x')\n            raise"
    Path("faulty.py").write_text(FAULTY.replace('"mix"\n', '"plan"\n').replace("            raise", counting))
    line = f"--task lamp3 --model {toy} --limit 2 --max_new_tokens 2"
    done = harness(f"run --method ./faulty.py --method ./faulty.py {line}")
    assert done.code == 1 and done.err.count("a plan of its own") == 2
    together = Path("tries").read_text()
    assert harness(f"run --method ./faulty.py {line} --output_path alone").code == 1
    assert Path("tries").read_text() == 2 * together


def _count_prompt_tokens(monkeypatch: pytest.MonkeyPatch, stop_at: int | None = None) -> list[int]:
    """Tokens of every pass over more than one of them; ctrl-C at the given pass."""
    read: list[int] = []
    run = Pass.run

    def counted(self: Pass, ids: Any, *args: Any, **options: Any) -> Any:
        if ids.shape[1] > 1:
            read.append(ids.size)
            if len(read) == stop_at:
                raise KeyboardInterrupt
        return run(self, ids, *args, **options)

    monkeypatch.setattr(Pass, "run", counted)
    return read
