"""Whatever runs on a benchmark runs on one's own users: every method, a control, a sweep, compare, the tables and the report."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import harness as door
from harness.methods import METHODS
from harness.plugins.registry import method_class
from harness.records.store import find_runs

QUICK: dict[str, dict[str, object]] = {
    "persona_vector": {"rollouts": 1, "samples": 2},
    "clamp": {"rollouts": 1, "samples": 2},
}
"""Options that make a method's fit short."""


@pytest.fixture(scope="module")
def mails(tmp_path_factory: pytest.TempPathFactory, toy: Path) -> Iterator[tuple[Path, Any]]:
    """A file of ten users, four of them to fit on, and a model; records and states lie beside the file."""
    folder = tmp_path_factory.mktemp("mails")
    lines = [
        {
            "user": f"u{n}",
            "input": f"mail {n}?",
            "target": f"{'yes' if n % 2 else 'no'} {n}",
            "history": [
                {"input": f"old {n}{i}?", "output": f"said {n}{i}", "date": f"2024-01-0{i + 1}"}
                for i in range(1 + n % 3)
            ],
            "split": "train" if n < 4 else "dev",
        }
        for n in range(10)
    ]
    (folder / "mine.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("HARNESS_CACHE", str(folder / "cache"))
        yield folder, door.load(str(toy))


@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_on_ones_own_users(
    mails: tuple[Path, Any], method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, lm = mails
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HARNESS_CACHE", str(folder / "cache"))
    known = method_class(method)().options()
    quick = {name: value for name, value in {"k": 1, **QUICK.get(method, {})}.items() if name in known}
    run = door.evaluate(
        method,
        "./mine.jsonl",
        lm,
        users=2,
        max_new_tokens=2,
        set=quick,
        task_set={"metrics": ["rouge1", "chrf"]},
        allow_noop=True,
    )
    assert run.record.status == "complete" and run.metrics["rouge1"].n == 2


def test_controls_sweeps_comparisons_tables_and_the_report_take_them(
    mails: tuple[Path, Any], toy: Path, harness: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = mails
    monkeypatch.chdir(folder)
    common = f"--task ./mine.jsonl --model {toy} --max_new_tokens 2 --task_set metrics=chrf,exact --output_path kept"
    for command in (
        f"run --method plain --method rag --set rag.k=1 {common}",
        f"run --method rag --set k=1 {common} --control wrong_user",
        f"sweep --method cad --set 'alpha=0|1' {common}",
        "leaderboard kept",
        "report kept --output_path page",
        "table --missing --records kept",
    ):
        done = harness(command)
        assert done.code == 0, f"{command}: {done.err}"
    of = {run.config.method.name: run for run in find_runs(Path("kept")) if run.config.selection.control == "none"}
    assert harness(f"compare --control wrong_user {of['rag'].folder}").code == 0
    compared = harness(f"compare {of['plain'].folder} {of['rag'].folder} --details")
    assert compared.code == 0 and "Gain against the length of the user" in " ".join(compared.out.split()), compared.out
    assert "users:./mine.jsonl" in Path("page/data/runs.js").read_text()
