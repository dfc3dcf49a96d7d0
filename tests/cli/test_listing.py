"""What a newcomer types first: lists, one method, help, a record; all in 80 columns."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import typer

from harness.cli.app import app
from harness.cli.commands import CHOICES, completing
from harness.cli.declarations import DTYPES
from harness.cli.listing import LISTS
from harness.engine.loading import DTYPES as ENGINE
from harness.engine.loading import load_model
from harness.methods import METHODS
from harness.plugins.registry import method_class
from harness.publish.show import metrics_table
from harness.records.store import MetricValue, find_runs
from harness.run.system import COMPARING
from harness.statistics.formats import FORMATS
from harness.tasks import TASKS


@pytest.mark.parametrize("what", [*LISTS, *(f"methods {name}" for name in METHODS)])
def test_every_list_fits_80_columns(harness: Callable, what: str) -> None:
    done = harness(f"list {what}")
    assert done.code == 0 and max(map(len, done.out.splitlines())) <= 80


def test_every_task_has_a_description(harness: Callable) -> None:
    lines = harness("list tasks").out.splitlines()
    for name in TASKS:
        assert next(line for line in lines if line.startswith(f"{name} ")).removeprefix(name).strip()


def test_a_method_is_explained_option_by_option(harness: Callable) -> None:
    said = harness("list methods dps").out
    for field in fields(method_class("dps")):
        assert field.name == "retrieval" or f"--set {field.name}=" in said
    assert "--preset released: gamma=entropy" in said
    assert "K, the number of preference heads" in said and "Items asked for; the same for every user." in said
    assert harness("list tasks lamp4").code == 2


def test_help_has_the_exit_codes(harness: Callable) -> None:
    said = harness("--help").out
    for code, meaning in ((0, "complete"), (3, "some samples failed"), (130, "interrupted")):
        assert any(line.split()[:1] == [str(code)] and meaning in line for line in said.splitlines())


@pytest.mark.parametrize("command", ["--help", "run --help", "list methods"])
def test_what_a_newcomer_types_first_loads_no_heavy_library(command: str) -> None:
    code = (
        f"import sys; sys.argv = ['harness', *{command.split()}]; from harness.cli.app import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'transformers', 'pandas', 'lm_eval', 'scipy', 'openai'}\n"
        "print('loaded:', sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "loaded: []", done.stdout + done.stderr


def test_a_shell_completes_commands_options_and_names() -> None:
    def offered(words: str) -> str:
        given = {
            "_HARNESS_COMPLETE": "complete_bash",
            "COMP_WORDS": words,
            "COMP_CWORD": str(len(words.split(" ")) - 1),
        }
        code = [sys.executable, "-m", "harness"]
        return subprocess.run(code, env={**os.environ, **given}, capture_output=True, text=True).stdout

    assert "leaderboard" in offered("harness lea").split()
    assert "--max_new_tokens" in offered("harness run --max").split()
    assert offered("harness run --method dp").split() == ["dps"]
    assert offered("harness run --method dps --preset r").split() == ["released"]
    assert offered("harness table perfit-1 dps-").split() == [f"dps-{number}" for number in range(1, 6)]


@pytest.mark.parametrize(
    ("what", "typed", "names"),
    [
        (("figures", "all"), "al", ["all"]),
        (("controls",), "w", ["wrong_user"]),
        (("dtypes",), "b", ["bfloat16"]),
        (("tasks", "wordnet"), "w", ["wordnet"]),
        (("formats", "latex"), "", ["terminal", "md", "csv", "json", "latex"]),
        (("presets",), "", []),
    ],
)
def test_a_shell_is_offered_what_an_option_may_be(what: tuple[str, ...], typed: str, names: list[str]) -> None:
    context = typer.Context(typer.main.get_command(app), info_name="harness")
    assert completing(*what)(context, typed) == names


def test_the_words_offered_are_those_that_are_taken() -> None:
    assert DTYPES == get_args(get_type_hints(load_model)["dtype"]) == ("auto", *ENGINE)
    assert set(CHOICES["formats"]) == set(FORMATS)


def test_a_note_of_several_metrics_stands_once_below_them(run_config: Callable, run_record: Callable) -> None:
    record = run_record(run_config("rag"), rouge1=0.5)
    for name in ("meteor", "meteor_unsplit"):
        record.metrics[name] = MetricValue(value=None, n=0, note="METEOR needs WordNet; " + "a hint " * 20)
    said = metrics_table(record)
    assert max(map(len, said.splitlines())) <= 80
    assert said.count("METEOR needs WordNet") == 1 and "- meteor, meteor_unsplit: METEOR" in said


def test_show_has_the_question_and_says_health_and_cost_in_words(harness: Callable, toy: Path) -> None:
    harness(f"run --method plain --method rag --task lamp4 --model {toy} --limit 2 --max_new_tokens 2")
    one, two = find_runs(Path("runs"))
    said = harness(f"show {one.hash} {two.hash} --samples 1").out
    assert max(map(len, said.splitlines())) <= 80
    assert "question" in said and "Generate a headline" not in said.partition("question")[0]
    assert "tokens read," in said and "of the first answers are those without the method" in " ".join(said.split())
    assert "forward_passes" not in said and "noop" not in said
    assert said.count("- unsplit: every text is taken as one sentence") == 1 and "lenient" not in said


def test_a_sample_calls_a_number_as_the_metrics_do(harness: Callable) -> None:
    folder = next((Path(__file__).parents[2] / "results" / "tiny" / "lamp2m").glob("plain-*"))
    said = harness(f"show {folder} --samples 1").out
    of_sample = said.partition("sample ")[2]
    assert re.search(r"accuracy [01]\.000, accuracy_lenient [01]\.000", of_sample) and "correct" not in of_sample
    assert "- lenient: the answer is searched for a label" in said


def test_a_run_says_the_running_mean_of_the_main_metric(
    monkeypatch: pytest.MonkeyPatch, harness: Callable, toy: Path
) -> None:
    from harness.run.console import Terminal

    said: list[tuple[str, float]] = []
    monkeypatch.setattr(Terminal, "mean", lambda self, label, name, value: said.append((name, value)))
    harness(f"run --method rag --task lamp4 --model {toy} --limit 4 --batch_size 2 --max_new_tokens 2")
    (run,) = find_runs(Path("runs"))
    assert [name for name, _ in said] == ["rouge1", "rouge1"]
    assert said[-1][1] == pytest.approx(run.metrics["rouge1"].value)


def test_a_run_names_its_comparison_with_the_unedited_model_and_how_far_it_is(
    monkeypatch: pytest.MonkeyPatch, harness: Callable, toy: Path
) -> None:
    from harness.run.console import Terminal

    seen: list[tuple[str, int, int]] = []
    monkeypatch.setattr(Terminal, "progress", lambda self, *given: seen.append(given))
    run = f"run --method rag --task lamp4 --model {toy} --limit 3 --max_new_tokens 2"
    harness(run)
    assert [one for one in seen if one[0] == COMPARING] == [(COMPARING, done, 3) for done in range(4)]
    seen.clear()
    harness(f"{run} --effect_samples 0 --output_path none")
    assert seen and COMPARING not in {label for label, _, _ in seen}


def test_the_bar_of_a_job_that_is_done_makes_room_unless_it_came_to_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    from harness.run.console import Terminal

    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    console = Terminal()
    for label in ("rag: measuring prompts", "rag: answering", "plain: answering"):
        if label == "rag: answering":
            console.mean(label, "rouge1", 0.25)
        console.progress(label, 4, 4)
    shown = {one.description: one.visible for one in console._bars.tasks}
    console.close()
    assert shown == {"rag: measuring prompts": False, "rag: answering": True, "plain: answering": True}


def test_a_terminal_shows_pace_and_mean_beside_the_bar(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from harness.run.console import Terminal

    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    console = Terminal()
    for done in (1, 2, 4):
        console.mean("answering", "rouge1", 0.25)
        console.progress("answering", done, 8)
    console.close()
    assert "rouge1 0.2500" in capsys.readouterr().err
