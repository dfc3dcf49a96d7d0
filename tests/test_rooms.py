"""The architecture as docs/architecture.md draws it: no circle between files, and rooms that can be looked over."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("harness", "methods", "tasks")
AT_THE_TOP, IN_A_FOLDER, LINES = 25, 15, 450


def _files() -> dict[str, Path]:
    """Module -> file; methods and tasks under the names they are imported by."""
    found = {}
    for room in ROOMS:
        for path in sorted((ROOT / room).rglob("*.py")):
            if path.relative_to(ROOT).parts[:2] in (("harness", "methods"), ("harness", "tasks")):
                continue  # links to the folders themselves
            parts = path.relative_to(ROOT).with_suffix("").parts
            parts = parts if room == "harness" else ("harness", *parts)
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def imports() -> dict[str, set[str]]:
    """Module -> modules of the package it imports, inside functions and for types too."""
    files = _files()
    found: dict[str, set[str]] = {}
    for module, path in files.items():
        names: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module:
                inside = {f"{node.module}.{alias.name}" for alias in node.names}
                names.update(inside & files.keys())
                if not inside <= files.keys():
                    names.add(node.module)
        found[module] = (names & files.keys()) - {module}
    return found


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Modules that import each other, directly or by way of others, in one list each."""
    below: dict[str, set[str]] = {}
    for start in graph:
        seen, waiting = set[str](), [start]
        while waiting:
            new = graph[waiting.pop()] - seen
            seen |= new
            waiting += new
        below[start] = seen
    found = {tuple(sorted(m for m in below[start] if start in below[m])) for start in graph if start in below[start]}
    return [list(circle) for circle in sorted(found)]


def test_a_circle_is_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == [["b", "c"]]


def test_no_file_imports_itself_by_way_of_others() -> None:
    assert circles(imports()) == []


def test_methods_touch_no_hook() -> None:
    for path in sorted((ROOT / "methods").glob("*.py")):
        assert "register_" not in path.read_text(encoding="utf-8"), path.name


def _entries(folder: Path) -> list[str]:
    return [p.name for p in folder.iterdir() if p.name != "__pycache__" and not p.name.startswith(".")]


def test_the_package_can_be_looked_over() -> None:
    assert len(_entries(ROOT / "harness")) <= AT_THE_TOP


@pytest.mark.parametrize("room", ROOMS)
def test_no_folder_holds_more_than_fifteen_files(room: str) -> None:
    folders = [
        ROOT / room,
        *(p for p in (ROOT / room).rglob("*") if p.is_dir() and p.name != "__pycache__" and not p.is_symlink()),
    ]
    for folder in folders:
        if folder in (ROOT / "harness", ROOT / "methods"):  # the vocabulary stands at the top; a method is a file
            continue
        files = [name for name in _entries(folder) if (folder / name).is_file()]
        assert len(files) <= IN_A_FOLDER, f"{folder.relative_to(ROOT)}: {len(files)}"


def test_no_file_is_longer_than_a_reader_holds() -> None:
    longest = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in _files().items()}
    assert {name: lines for name, lines in longest.items() if lines > LINES} == {}
