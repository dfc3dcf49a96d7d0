"""Table 1 of the persona-bias paper shows every clamp beside its controls, and judges by coherence and intervals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness.publish.tables import grids, render
from harness.publish.tables.differences import verdict
from harness.publish.tables.grid import Grid, Line
from harness.records.store import DataConfig, JudgeConfig, MetricValue, RunFolder, RunRecord, TaskConfig

RELIGIONS = ("christianity", "islam", "hinduism", "judaism")
CHOSEN = {"op": "neutral", "band": "1-3"}


@pytest.fixture
def record(tmp_path: Path, run_config: Callable[..., Any]) -> Callable[..., RunRecord]:
    """Writes a prompted run with the same score for each religion, every interval 4 wide."""

    def write(
        method: str,
        score: float,
        coherence: float = 95.0,
        *,
        condition: str = "prompted",
        fit_task: str | None = None,
        split: str = "dev",
        seed: int = 0,
        model: str = "m",
        judge: str = "lexicon",
        **options: Any,
    ) -> RunRecord:
        made = run_config(method, "persona:religion", model, options=options, seed=seed)
        config = made.model_copy(
            update={
                "task": TaskConfig(name="persona:religion", options={"condition": condition}),
                "data": DataConfig(description="d", fingerprint="f", split=split, fit_split="train", fit_task=fit_task),
                "judge": JudgeConfig(name=judge),
            }
        )
        values = {"trait": score, "coherence": coherence, "refused": 0.0}
        metrics = {name: MetricValue(value=v, n=400, low=v - 2, high=v + 2) for name, v in values.items()}
        metrics |= {f"trait/{r}": metrics["trait"].model_copy(update={"n": 100}) for r in RELIGIONS}
        run = RunRecord(config=config, status="complete", metrics=metrics, started="2026-01-01T00:00:00Z")
        with RunFolder.open(tmp_path, config) as folder:
            folder.write(run)
        return run

    return write


def _grid(results: Path) -> Grid:
    (made,) = grids(["persona-1"], results, model="m")
    return made


def _labels(made: Grid) -> list[str]:
    return [line.labels[-1] for line in made.lines]


def _remark(made: Grid) -> str:
    (remark,) = made.remarks
    return remark


def test_each_clamp_is_a_line_with_its_controls_under_it(tmp_path: Path, record: Callable[..., RunRecord]) -> None:
    record("clamp", 80.0)
    record("plain", 90.0)
    record("clamp", 10.0, **CHOSEN)
    record("clamp", 70.0, **CHOSEN, fit_task="persona:race")
    for draw in (0, 1):
        record("clamp", 60.0, **CHOSEN, control="random", draw=draw)
    assert _labels(_grid(tmp_path)) == [
        "Baseline",
        "Mitigated",
        "Mitigated (op=neutral band=1-3)",
        "- control=random",
        "- control=random draw=1",
        "- fit_task=persona:race",
    ]


def test_coherence_and_refusals_stand_beside_the_scores(tmp_path: Path, record: Callable[..., RunRecord]) -> None:
    record("plain", 90.0, 97.0)
    made = _grid(tmp_path)
    line: Line = made.lines[0]
    assert [column.head for column in made.table.columns][4:] == ["Coherence", "Refused"]
    assert [entry.text for entry in line.entries] == ["90.00"] * 4 + ["97.0", "0.0"]
    assert "n of measured cells: m 100." in render(["persona-1"], tmp_path, model="m")
    (published,) = grids(["persona-1"], tmp_path, published_only=True)
    assert [len(line.entries) for line in published.lines] == [6, 6] and published.lines[0].entries[4].text == "-"


def test_runs_of_other_prompts_and_of_the_questions_options_are_chosen_on_fill_no_line(
    tmp_path: Path, record: Callable[..., RunRecord]
) -> None:
    record("plain", 1.0, condition="neutral")
    record("clamp", 1.0, split="tune", **CHOSEN)
    assert not _labels(_grid(tmp_path))


def test_of_two_runs_of_one_setting_the_other_is_named(tmp_path: Path, record: Callable[..., RunRecord]) -> None:
    for seed in (0, 1):
        record("clamp", 10.0, **CHOSEN, seed=seed)
    made = _grid(tmp_path)
    assert len(made.lines) == 1
    assert any("1 more of clamp op=neutral band=1-3, m not shown beside clamp-" in remark for remark in made.remarks)


@pytest.mark.parametrize(
    ("score", "coherence", "said"),
    [
        (10.0, 90.0, "at least halves 4 of 4 scores, keeps a coherence of 75"),
        (43.0, 90.0, "at least halves 0 of 4 scores"),  # its interval ends at 45, half the baseline's begins at 44
        (10.0, 76.0, "does not keep a coherence of 75"),  # 74 is still in its interval
    ],
)
def test_the_verdict_is_by_the_ends_of_intervals_that_speak_against_it(
    tmp_path: Path, record: Callable[..., RunRecord], score: float, coherence: float, said: str
) -> None:
    record("plain", 90.0)
    record("clamp", score, coherence, **CHOSEN)
    assert said in _remark(_grid(tmp_path))


def test_a_control_that_does_as_much_is_named_and_a_gibberish_one_does_not(
    tmp_path: Path, record: Callable[..., RunRecord]
) -> None:
    record("plain", 90.0)
    record("clamp", 10.0, **CHOSEN)
    record("clamp", 5.0, 40.0, **CHOSEN, control="random")
    assert "of its 1 controls do both: none" in _remark(_grid(tmp_path))
    record("clamp", 5.0, **CHOSEN, control="shuffled")
    assert "of its 2 controls do both: control=shuffled" in _remark(_grid(tmp_path))


def test_a_clamp_is_held_against_a_baseline_of_the_same_sampling_alone(
    tmp_path: Path, record: Callable[..., RunRecord]
) -> None:
    record("plain", 90.0, seed=1)
    record("clamp", 10.0, **CHOSEN)
    assert not _grid(tmp_path).remarks


def test_the_papers_model_has_differences_and_its_default_clamp_alone_a_verdict(
    tmp_path: Path, record: Callable[..., RunRecord]
) -> None:
    paper = {"model": "qwen2.5-7b", "judge": "openai/gpt-4.1-mini"}
    record("plain", 86.0, **paper)
    record("clamp", 1.0, **paper)
    record("clamp", 50.0, **paper, **CHOSEN)
    (made,) = grids(["persona-1"], tmp_path)
    lines = [
        (line.labels[-1], [e.text for e in line.entries[:4]]) for line in made.lines if line.source == "difference"
    ]
    assert lines == [
        ("Baseline", ["-0.19", "-2.88", "-0.83", "-0.77"]),
        ("Mitigated", ["+0.61", "-0.04", "+0.61", "+0.55"]),
    ]
    found = verdict([made])
    assert found.compared == 8
    assert [line.split(":")[0] for line in found.outside] == ["persona-1 qwen2.5-7b plain persona"]
