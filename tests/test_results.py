"""The commands that make the published records: each can be given, and asks for something else than the others."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import typer

from harness.cli.app import app
from harness.publish.leaderboard import Ranking, rankings
from harness.records.store import MetricValue, find_runs
from harness.run.cell import Settings, grid
from harness.run.sweep import points

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> list[list[str]]:
    """The words of every command of `results/make.sh smollm2-135m`, noted down instead of run."""
    folder = tmp_path_factory.mktemp("made")
    rates = folder / "smollm2-135m.log" / "rates"
    rates.mkdir(parents=True)
    for task in ("lamp4", "lamp7"):
        for method in ("reft", "lora_p", "lora_c", "perfit", "oppu", "style_vector"):
            point = "layer=20 strength=0.5" if method == "style_vector" else "lr=0.001"
            (rates / f"{method}-{task}").write_text(json.dumps({"peak": {"point": point}}))
    kept = folder / "kept"
    kept.mkdir()
    note = folder / "note.py"
    note.write_text("import json, os, sys\nopen(f'kept/{os.getpid()}', 'w').write(json.dumps(sys.argv[1:]))\n")
    note.write_text(note.read_text().replace("kept/", f"{kept}/"))
    lines = (ROOT / "results/smollm2-135m.txt").read_text().splitlines()
    without_sweeps = [str(n) for n, line in enumerate(lines, 1) if line and line[0] != "#" and ">$rates" not in line]
    of_sweeps = [str(n) for n, line in enumerate(lines, 1) if ">$rates" in line]
    environment = {**os.environ, "OUTPUT": str(folder), "HARNESS": f"{sys.executable} -S {note}", "JOBS": "2"}
    for numbers in (without_sweeps, of_sweeps):  # the noted sweeps leave no rates behind, so they come last
        made = {**environment, "LINES": " ".join(numbers)}
        done = subprocess.run(
            ["sh", "results/make.sh", "smollm2-135m"], cwd=ROOT, env=made, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(file.read_text()) for file in kept.iterdir()]


def test_every_command_that_makes_the_records_of_a_real_model_can_be_given(commands: list[list[str]]) -> None:
    asked: Counter[str] = Counter()
    for words in commands:
        command = typer.main.get_command(app).get_command(None, words[0])  # type: ignore[attr-defined]
        given = command.make_context(words[0], words[1:]).params
        settings = points(given["set"]) if words[0] == "sweep" else {"": given["set"]}
        for name, chosen in settings.items():
            for cell in grid(
                given["method"], given["task"], Settings(), chosen, given["task_set"], fit_task=given["fit_task"]
            ):
                rest = [
                    given.get(key)
                    for key in ("control", "limit", "split", "fit_split", "fit_task", "judge", "task_set")
                ]
                asked[
                    json.dumps([name, cell.method.options(), cell.method_name, cell.task_name, rest], default=str)
                ] += 1
    assert max(asked.values()) == 1 and len(asked) > 400


def test_every_line_of_the_list_is_a_command(commands: list[list[str]]) -> None:
    lines = (ROOT / "results/smollm2-135m.txt").read_text().splitlines()
    assert len(commands) == sum(bool(line) and line[0] != "#" and line != "wait" for line in lines)
    assert {words[0] for words in commands} == {"run", "sweep"}


def _rows(text: str) -> list[list[str]]:
    """The cells of every row of a page's tables, heads left out."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if not line.startswith("| method")]


def _printed(metric: MetricValue) -> str:
    return f"{metric.value:.3f}" + (f" [{metric.low:.3f}, {metric.high:.3f}]" if metric.interval else "")


@pytest.fixture(scope="module")
def ranked() -> dict[str, Ranking]:
    """Title -> ranking, of the published records."""
    return {ranking.title: ranking for ranking in rankings(find_runs(ROOT / "results"))}


def test_the_page_of_paired_differences_has_the_rankings_it_is_quoted_for_with_the_records_numbers(
    ranked: dict[str, Ranking],
) -> None:
    sections = (ROOT / "results/smollm2-135m/comparisons.md").read_text("utf-8").split("\n## ")[1:]
    by_title = {section.partition("\n")[0]: section for section in sections}
    quoted = ("lamp4 · --limit 200 only", "lamp7 · complete=true · --limit 400 only")
    assert {f"smollm2-135m · {task}" for task in quoted} <= set(by_title)
    for title, section in by_title.items():
        found = {
            (row.label, _printed(row.run.metrics[ranked[title].metric]), str(row.run.metrics[ranked[title].metric].n))
            for row in ranked[title].rows
        }
        assert {(label, value, n) for label, value, n, *_ in _rows(section)} == found, title


@pytest.mark.parametrize("task", ["lamp4", "lamp7", "lamp2m"])
def test_the_tables_of_the_embedded_model_say_what_its_records_say(ranked: dict[str, Ranking], task: str) -> None:
    text = (ROOT / "results/README.md").read_text("utf-8")
    table = text[text.index(f"| {task}: ") :].partition("\n\n")[0]
    printed = {name: value for name, value, *_ in _rows(table)[1:]}
    ceiling = next(row for row in ranked[f"tiny · {task}"].rows).run.analysis["ceiling"]
    seen = {
        "habits known": "known",
        "all items seen": "all",
        **{f"{n} item{'s' * (n != 1)} seen": str(n) for n in (0, 1, 5)},
    }
    expected = {f"ceiling, {words}": f"{ceiling[key]:.3f}" for words, key in seen.items()}
    for title, whose in ((f"tiny · {task}", ""), (f"tiny · {task} · --control wrong_user", ", wrong user")):
        expected |= {
            f"`{row.run.config.method.name}`{whose}": _printed(row.run.metrics[ranked[title].metric])
            for row in ranked[title].rows
            if not row.variant
        }
    shown = {name: re.sub(r"\b0\.", ".", expected[name]) for name in printed if "random heads" not in name}
    assert {name: printed[name] for name in shown} == shown and len(shown) > 15


REAL = {
    "LaMP-1": 'lamp1 · answers="scored" · --limit 100 only',
    "LaMP-2M": 'lamp2m · answers="scored" · --limit 100 only',
    "LaMP-3": 'lamp3 · answers="scored"',
    "LaMP-4": "lamp4 · --limit 200 only",
    "LaMP-5": "lamp5 · --limit 40 only",
    "LaMP-7": "lamp7 · complete=true · --limit 400 only",
}
"""The rankings of the real users' tables."""
STARS = "LaMP-3"
METHODS = {"copy", "plain", "rag", "pag", "cad", "cos", "dola", "decore", "dps"}


@pytest.mark.parametrize(
    ("page", "begins", "columns"),
    [
        ("README.md", "| Method |", {"Headlines": "LaMP-4", "Tweets": "LaMP-7"}),
        ("results/README.md", "| | LaMP-1, pairs", {}),
    ],
)
def test_the_tables_of_real_users_say_what_the_records_say(
    ranked: dict[str, Ranking], page: str, begins: str, columns: dict[str, str]
) -> None:
    text = (ROOT / page).read_text("utf-8")
    head, *rows = text[text.index(begins) :].partition("\n\n")[0].splitlines()
    names = [cell.strip() for cell in head.strip("|").split("|")]
    said = {row[0].strip("`"): dict(zip(names[1:], row[1:], strict=True)) for row in _rows("\n".join(rows))}
    for name in names[1:]:
        task = columns.get(name, name.partition(",")[0])
        if task not in REAL:
            continue  # what a method does, what it costs
        ranking = ranked[f"smollm2-135m · {REAL[task]}"]
        found = {row.run.config.method.name: row.run.metrics[ranking.metric] for row in ranking.rows if not row.variant}
        places = 2 if task == STARS else 3
        expected = {method: f"{metric.value:.{places}f}".removeprefix("0") for method, metric in found.items()}
        shown = {method: cells[name] for method, cells in said.items() if method in METHODS and cells[name]}
        assert shown == {method: value for method, value in expected.items() if method in METHODS}, (page, name)
