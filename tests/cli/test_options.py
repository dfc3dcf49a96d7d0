"""Options are declared once: help shows them under headings, and every spelling of one is the same option."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest

from harness.cli.app import app
from harness.cli.declarations import HEADINGS, declared
from harness.run.cell import Settings

COMMANDS = ["", "run", "fit", "sweep", "score", "compare", "table", "report", "judge pairs", "judge export", "data get"]


def test_the_help_of_run_groups_its_options_under_headings(harness: Callable) -> None:
    text = harness("run --help").out
    places = [text.index(f"\n{heading}:\n") for heading in HEADINGS]
    assert places == sorted(places)
    assert text.index("--temperature") > text.index("Sampling:") > text.index("--limit") > text.index("Data:")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_80_columns_and_cuts_no_sentence(harness: Callable, command: str) -> None:
    lines = harness(f"{command} --help").out.splitlines()
    assert max(map(len, lines)) <= 80
    assert not [line for line in lines if line.endswith("...") and "Usage" not in line]


def test_help_shows_one_spelling_of_an_option(harness: Callable) -> None:
    text = "".join(harness(f"{command} --help").out for command in COMMANDS)
    assert "--fit_split" in text and "--fit-split" not in text
    assert "--output_path" in text and "--output " not in text and "--path " not in text


@pytest.mark.parametrize("spelling", ["--output_path", "--output-path", "--output", "--path"])
def test_older_names_of_the_output_path_still_work(harness: Callable, tmp_path: Path, spelling: str) -> None:
    assert harness(f"leaderboard {spelling} {tmp_path / 'board.md'}").code == 0
    assert (tmp_path / "board.md").is_file()


def test_an_options_default_is_the_one_of_the_settings_it_fills() -> None:
    own = {"split", "batch_size"}  # of which a command line says more than the settings hold
    settings = {f.name: f.default for f in fields(Settings) if f.name not in own}
    assert {name: option.default for name, (_, option) in declared().items() if name in settings} == settings


def test_commands_that_share_an_option_have_it_from_its_declaration() -> None:
    names = set(declared())
    by_command = {
        c.callback.__name__: inspect.signature(c.callback).parameters for c in app.registered_commands if c.callback
    }
    for command in ("run", "fit", "sweep", "score"):
        written = inspect.getsource(next(c.callback for c in app.registered_commands if c.callback.__name__ == command))  # type: ignore[union-attr,arg-type]
        assert names & set(by_command[command])
        head = written.partition('"""')[0]
        assert not [name for name in names if f"\n    {name}:" in head]
