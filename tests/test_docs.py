"""What README and docs promise: every command in them works, and the methods that they show are checked and run.

A page is walked from top to bottom in a folder of its own, which holds four published records under results/, and those
that the page names:

- A block of code whose first line is `# name.py` (or, of a csv or jsonl block, whose title is a file name) is a file.
- Lines of `sh` blocks that begin with `harness` run, in this process. Every `harness run` and `harness sweep` gets SMALL
  behind it, and dps is fitted on few samples; nothing else is changed. `# exit 2` behind a command says how it should end.
- So do `python docs/examples/...` lines; a page that names a file of docs/examples finds the folder.
- A block in the language `output` shows the table that the last command before it prints: its columns and rows, not its numbers.
- A block that begins with `# needs ...` needs what the suite has not: its lines are parsed, and the names of methods,
  tasks and options in them are looked up. So are lines that are no `harness` command, but for those of INSTALLS.
"""

from __future__ import annotations

import re
import runpy
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import typer

from harness import errors
from harness.cli.app import app
from harness.errors import EXIT_CODES, HarnessError, gravest
from harness.plugins.options import build_method, build_task
from harness.plugins.registry import method_row, task_class, task_name

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SMALL = "--limit 4 --max_new_tokens 8"
"""What makes a run of a page quick."""
SHARED = ["copy-5966496d", "plain-d51afa98", "rag-89b4ffef", "dps-fd736aeb"]
"""Records of results/tiny/lamp4 that every page finds in its folder."""
FEW = "samples=2"
"""What makes a fit of dps quick, which reads 50 otherwise."""
INSTALLS = ("pip", "git", "cd", "python", "tox", "pytest", "sh", ".", "export", "ray", "cat")
"""First words of lines that are not run: they install or change what the suite runs in."""


class Line(NamedTuple):
    """A command of a page."""

    words: list[str]
    runs: bool
    """Whether it can run here."""
    code: int
    """Exit code it should have."""
    shown: str = ""
    """What the page says that it prints."""


class Page(NamedTuple):
    files: dict[str, str]
    lines: list[Line]


def _blocks(text: str) -> Iterator[tuple[str, str, str]]:
    """Language, title and content of every fenced block."""
    for found in re.finditer(r"^( *)```(\w+)([^\n]*)\n(.*?)^\1```", text, re.DOTALL | re.MULTILINE):
        title = re.search(r'title="([^"]+)"', found[3])
        indent = found[1]
        body = "".join(line.removeprefix(indent) for line in found[4].splitlines(keepends=True))
        yield found[2], title[1] if title else "", body


def _commands(block: str) -> Iterator[tuple[list[str], int]]:
    for line in block.replace("\\\n", " ").splitlines():
        command, _, comment = line.partition("  #") if not line.startswith("#") else ("", "", line)
        ends = re.search(r"exit (\d+)", comment)
        for part in command.split(" && "):
            if part.strip():
                yield shlex.split(part), int(ends[1]) if ends else 0


def read(page: Path) -> Page:
    files: dict[str, str] = {}
    lines: list[Line] = []
    for language, title, body in _blocks(page.read_text(encoding="utf-8")):
        first = re.match(r"# (\S+\.py)\n", body)
        if language == "sh":
            needs = body.startswith("# needs ")
            lines += [Line(words, not needs, code) for words, code in _commands(body)]
        elif language == "output":
            lines[-1] = lines[-1]._replace(shown=body)
        elif first:
            files[first[1]] = body
        elif title:
            files[title] = body
    return Page(files, lines)


def _named(words: list[str], option: str) -> list[str]:
    return [words[i + 1] for i, word in enumerate(words[:-1]) if word in (option, option.replace("_", "-"))]


def parse(words: list[str]) -> None:
    """Raises where click, or the method or task that is named, knows no such command, option or value."""
    command, context, rest = typer.main.get_command(app), None, list(words)
    while hasattr(command, "commands"):
        name, *rest = rest
        context = command.make_context(name, rest[:1], parent=context)
        command = command.commands[rest[0]]
    command.make_context(rest[0], rest[1:], parent=context)
    if words[1] not in ("run", "fit"):
        return
    options = [value for value in _named(words, "--set") if not value.split("=")[0].count(".")]
    methods = [method for method in _named(words, "--method") if not method.endswith(".py")]
    for method in methods:
        row = method_row(method)
        presets = _named(words, "--preset")
        build_method(row.cls, row.name, presets[0] if presets else None, options if len(methods) == 1 else [])
    for task in _named(words, "--task"):
        if not task.startswith((".", "users:")):
            build_task(task_class(task_name(task)), task_name(task), _named(words, "--task_set"), None)


def _small(words: list[str]) -> str:
    """What the command has behind it here."""
    runs, methods = words[1] in ("run", "sweep"), _named(words, "--method")
    fits = "dps" in methods and words[1] in ("run", "fit")
    return " ".join(
        [
            SMALL if runs and "--dry_run" not in words else "",
            f"--set {'dps.' if len(methods) > 1 else ''}{FEW}" if fits else "",
            "--samples 2" if words[1] == "certify" else "",
        ]
    )


def table(text: str) -> list[list[str]]:
    """Of the table in it the names of the columns, and of each row its first cell and how many it has; digits aside."""
    lines = text.splitlines()
    rule = next(number for number, line in enumerate(lines) if line.startswith("---"))
    cells = [re.split(r"\s{2,}", line.strip()) for line in lines[rule + 1 :]]
    rows = [row for row in cells if len(row) > 1]
    firsts = [re.sub(r"\d+", "#", row[0]).replace("thread ", "threads ") for row in rows]
    return [re.split(r"\s{2,}", lines[rule - 1].strip())] + [
        [first, str(len(row))] for first, row in zip(firsts, rows, strict=True)
    ]


def _records(words: list[str]) -> list[str]:
    return [word.removeprefix("results/").rstrip("/") for word in words if word.startswith("results/")]


def test_a_block_is_files_or_commands_and_what_it_needs_is_not_run(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        '```python\n# mine.py\nx = 1\n```\n```csv title="a.csv"\nuser\n```\n'
        "```sh\npip install x && harness list methods\nharness check ./mine.py  # exit 2\n```\n"
        "```sh\n# needs a GPU\nharness run --method dps \\\n    --task lamp4\n```\n"
    )
    assert read(page) == Page(
        {"mine.py": "# mine.py\nx = 1\n", "a.csv": "user\n"},
        [
            Line(["pip", "install", "x"], True, 0),
            Line(["harness", "list", "methods"], True, 0),
            Line(["harness", "check", "./mine.py"], True, 2),
            Line(["harness", "run", "--method", "dps", "--task", "lamp4"], False, 0),
        ],
    )


@pytest.mark.parametrize("line", ["run --method dps --tsak lamp4", "run --method dps --task lamp4 --set gama=1", "rnu"])
def test_a_command_that_is_only_parsed_still_has_to_be_right(line: str) -> None:
    with pytest.raises(Exception, match=r"tsak|gama|rnu"):
        parse(shlex.split(f"harness {line}"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_of_a_page_works(
    page: Path,
    harness: Callable,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    files, lines = read(page)
    cache = tmp_path_factory.getbasetemp() / "docs-cache"  # what pages fit alike is fitted once
    monkeypatch.setenv("HARNESS_CACHE", str(cache))
    for name, content in files.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
    wanted = [f"tiny/lamp4/{record}" for record in SHARED] + [name for line in lines for name in _records(line.words)]
    for name in dict.fromkeys(wanted):
        for found in (ROOT / "results").glob(name):
            if (
                not (tmp_path / "results" / found.relative_to(ROOT / "results")).exists()
                and (found / "run.json").is_file()
            ):
                shutil.copytree(found, tmp_path / "results" / found.relative_to(ROOT / "results"))
    if any("docs/examples/" in word for line in lines for word in line.words):
        shutil.copytree(ROOT / "docs/examples", tmp_path / "docs/examples")
    for words, runs, code, shown in lines:
        if words[0] == "python" and words[1].startswith("docs/examples/"):
            monkeypatch.setattr(sys, "argv", words[1:])
            runpy.run_path(words[1], run_name="__main__")
            continue
        if words[0] != "harness":
            assert words[0] in INSTALLS or not runs, f"{page.name}: {shlex.join(words)} is not run by any test"
            continue
        if not runs:
            parse(words)
            continue
        done = harness(f"{shlex.join(words[1:])} {_small(words)}")
        assert done.code == code, f"{page.name}: {shlex.join(words)}\n{done.err}"
        if shown:
            assert table(done.out) == table(shown), f"{page.name}: {shlex.join(words)}\n{done.out}"


def test_the_page_of_exit_codes_has_every_code_and_what_help_says_of_it() -> None:
    page = (ROOT / "docs/exit-codes.md").read_text(encoding="utf-8")
    shown = {int(code): meaning for code, meaning in re.findall(r"^\| (\d+) \| ([^|]+?) \|", page, re.MULTILINE)}
    assert shown == EXIT_CODES
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, HarnessError)]
    assert {kind.exit_code for kind in kinds} <= set(EXIT_CODES)
    assert "gravest of their codes: 1, then 4, 2 and 3." in page
    assert [gravest(codes) for codes in ([0, 2, 1, 3], [3, 2, 4], [0, 2, 3], [3, 0], [0], [])] == [1, 4, 2, 3, 0, 0]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_method_that_is_shown_is_checked_and_run_on_its_page(page: Path) -> None:
    files, lines = read(page)
    for file in (name for name, text in files.items() if "(Method)" in text):
        for command in ("check", "run"):
            assert any(line.runs and line.words[1:2] == [command] and f"./{file}" in line.words for line in lines), file
