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


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("--temperature inf", "0, which is greedy, or 0.001 to 1000"),
        ("--temperature 1e-40", "0, which is greedy, or 0.001 to 1000"),
        ("--temperature nan", "'--temperature'"),
        ("--top_p 0", "above 0, up to 1"),
        ("--top_p 1.5", "above 0, up to 1"),
        ("--seed -1", "'--seed'"),
        ("--seed 9223372036854775808", "0 to 9223372036854775807"),
        ("--seed -1 --fit_split dev:0.2", "'--seed'"),
        ("--set k=-1", "k >= 0"),
        ("--set k=0-99", "k=0-99 is not valid"),
        ("--set seed=99999999999999999999", "seed=99999999999999999999 is not valid"),
        ("--fit_split nonsense", "has no split 'nonsense'"),
        ("--batch_size ²", "allowed: auto, or 1 to"),
        ("--method perfit --set rank=0", "int, 1 or more"),
        ("--method perfit --set personal_rank=-2", "int, 1 or more"),
        ("--method oppu --set alpha=inf", "float, -1e+06 or more, up to 1e+06"),
        ("--method cad --set alpha=1e40", "float, -1e+06 or more, up to 1e+06"),
        ("--method dps --set draw=-1", "int, 0 or more"),
        ("--method dps --set gamma=inf", "up to 1e+06 or 'entropy'"),
    ],
)
def test_a_number_that_cannot_be_meant_is_refused_before_a_model_is_loaded(
    harness: Callable, monkeypatch: pytest.MonkeyPatch, options: str, says: str
) -> None:
    monkeypatch.setattr("harness.cli.run.load", None)
    method = "" if "--method" in options else "--method rag"
    done = harness(f"run {method} --task lamp4 {options}")
    assert done.code == 2 and says in done.error()


def test_a_method_made_in_python_has_the_ranges_of_the_command_line() -> None:
    from harness.errors import UsageError
    from harness.methods.perfit import PerFit
    from harness.plugins.options import build_method

    with pytest.raises(UsageError, match=r"rank=0 is not valid; allowed: int, 1 or more"):
        build_method(PerFit, "perfit", None, [], PerFit(rank=0))


@pytest.mark.parametrize("where", ["plan", "import"])
def test_a_method_that_ends_the_program_is_a_failed_run(harness: Callable, tmp_path: Path, where: str) -> None:
    (tmp_path / "mine.py").write_text(
        "import sys\nfrom dataclasses import dataclass\nfrom harness.method import Method\n"
        f"{'sys.exit(0)' if where == 'import' else ''}\n"
        "@dataclass(frozen=True)\nclass Mine(Method):\n    def plan(self, example, shared, personal):\n        sys.exit(0)\n"
    )
    done = harness("run --method ./mine.py --task lamp4 --limit 2")
    assert done.code == (2 if where == "import" else 1)
    assert "sys.exit(0)" in done.error() and not done.out


def test_what_a_file_of_ones_own_raises_is_one_line_that_names_its_place(harness: Callable, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from dataclasses import dataclass\nfrom harness.method import Method\n\n"
        "@dataclass(frozen=True)\nclass Mine(Method):\n    def plan(self, example, shared, personal):\n"
        "        return {}['layer']\n"
    )
    done = harness("run --method ./mine.py --task lamp4 --limit 2 --output_path kept")
    assert done.code == 1 and "mine.py, line 7, in plan: KeyError: 'layer'" in done.error()


def test_a_terminal_that_knows_ascii_alone_is_shown_codes(tmp_path: Path) -> None:
    import os
    import subprocess
    import sys

    root = Path(__file__).resolve().parents[2]
    env = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONPATH": str(root)}
    (one, other, *_) = sorted(path.parent for path in (root / "results/tiny/lamp2m").glob("*/samples.jsonl"))
    command = [sys.executable, "-m", "harness", "compare", str(one), str(other), "--metric", "accuracy"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "\\u2191" in done.stdout and done.stdout.isascii()


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
