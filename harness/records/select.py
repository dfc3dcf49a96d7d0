"""Which records a command is about: a folder, a record, a hash or a glob; `results/` and `runs/` where nothing is said.

`results/` holds published records, `runs/` one's own. A record that is in both is read once, from `results/`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeAlias

from harness.errors import DataMissing, UsageError

PUBLISHED, OWN = Path("results"), Path("runs")
Places: TypeAlias = Path | Sequence[Path]
"""Folders that hold records, or are one."""
LEVELS = ("", "*/", "*/*/", "*/*/*/")
"""Where below a folder a record may be: `<model>/<task>/<method>-<hash>`, or part of the way down."""


def places_of(places: Places) -> list[Path]:
    return [places] if isinstance(places, Path) else list(places)


def said(places: Places) -> str:
    """The places as a message names them."""
    return " and ".join(place.as_posix() for place in places_of(places))


def select(wanted: Sequence[str | os.PathLike[str]] = ()) -> list[Path]:
    """The places that `wanted` names. Raises DataMissing where one names nothing, UsageError for a file or a URL."""
    if not wanted:
        return [PUBLISHED, OWN]
    return [place for one in wanted for place in _places(os.fspath(one))]


def record_folders(places: Places) -> list[Path]:
    """The folders of all records at or below `places`, each record once."""
    found: dict[tuple[str, ...], Path] = {}
    for place in places_of(places):
        files = sorted(file for level in LEVELS for file in place.glob(f"{level}run.json"))
        for file in files:
            found.setdefault(file.parent.resolve().parts[-3:], file.parent)
    return list(found.values())


def find_records(wanted: Sequence[str | os.PathLike[str]]) -> list[Path]:
    """The folders of all records that `wanted` name, in its order, each once. Raises DataMissing where one names none."""
    found: dict[Path, Path] = {}
    for one in wanted:
        folders = record_folders(select([one]))
        if not folders:
            raise DataMissing(_nothing(os.fspath(one)))
        for folder in folders:
            found.setdefault(folder.resolve(), folder)
    return list(found.values())


def find_run(wanted: str | os.PathLike[str]) -> Path:
    """The folder of the one record that `wanted` names. Raises UsageError where that is several, DataMissing where none."""
    found = record_folders(select([wanted]))
    if len(found) == 1:
        return found[0]
    if found:
        some = ", ".join(map(str, found[:8])) + (", ..." if len(found) > 8 else "")
        raise UsageError(f"{wanted} is {len(found)} records; name one: {some}")
    raise DataMissing(_nothing(os.fspath(wanted)))


def _places(wanted: str) -> list[Path]:
    path = Path(wanted)
    if "://" in wanted:
        raise UsageError(f"{wanted} is a URL; records are read from folders: download it and give the folder")
    if os.path.isfile(path):
        raise UsageError(f"{wanted} is a file; give the folder that holds it, as in {path.parent}")
    if os.path.isdir(path):
        return [path]
    found = list(dict.fromkeys(folder for folder in _below(wanted) if folder.is_dir()))
    if not found:
        raise DataMissing(_nothing(wanted))
    return found


def _below(wanted: str) -> Iterator[Path]:
    """What a glob, a hash, or a name without its hash may be."""
    if Path(wanted).is_absolute():
        starts, pattern = [Path("/")], wanted.lstrip("/")
    else:
        starts, pattern = [Path(), *(root / level for root in (PUBLISHED, OWN) for level in LEVELS)], wanted
    patterns = [pattern, f"{pattern}-" + "[0-9a-f]" * 8]
    if re.fullmatch(r"[0-9a-f]{4,8}", wanted):
        patterns.append(f"*-{wanted}*")
    for start in starts:
        root = next((root for root in (PUBLISHED, OWN) if root in (start, *start.parents)), start)
        level = start.relative_to(root).as_posix()
        for each in patterns:
            with suppress(OSError, ValueError):  # too long for a name, or as `a**` no pattern: nothing is called so
                yield from sorted(root.glob(each if level == "." else f"{level}/{each}"))


def _nothing(wanted: str) -> str:
    return (
        f"{wanted} holds no run.json and names no record of {said(select())}; give a folder like "
        "results/tiny/lamp4/dps-1a2b3c4d, a hash, or a glob"
    )
