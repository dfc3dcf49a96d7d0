"""How far a grid is, read from its folder: `harness grid status FOLDER`."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from harness.errors import DataMissing
from harness.grid.folder import HIDDEN, names, take
from harness.grid.worker import PATIENCE_SECONDS


def grids(folder: Path) -> list[Path]:
    """The grids that are not finished, in a folder of records, of one record, or the grid's own.

    Raises DataMissing where there is none.
    """
    if (folder / "plan.json").is_file():
        return [folder]
    for place in (folder, *folder.resolve().parents[:3]):
        found = sorted(path.parent for path in (place / HIDDEN).glob("*/plan.json"))
        if found:
            return found
    raise DataMissing(
        f"{folder}: no grid is unfinished here; give the --output_path of a command that ran --on something"
    )


def status(root: Path) -> Iterator[str]:
    """Lines that say how far the grid in `root` is, and what goes on with it."""
    plan = take(root / "plan.json") or {}
    seen = take(root / str(plan.get("session")) / "driver.json")
    yield str(plan.get("line", root))
    if seen is None or not _lives(seen):
        results = root / "results"
        kept = len(names(results)) if results.is_dir() else 0
        yield f"not running; {kept} answered shards wait to be taken into the records"
        yield f"it goes on with: {plan.get('line', 'the same command')}"
        return
    done, everything = seen["samples"]
    yield f"{done} of {everything} samples answered, {seen['failed_samples']} failed"
    yield (
        f"shards: {seen['done']} done, {seen['running']} running, {seen['waiting_batches']} batches waiting; "
        f"{seen['workers']} workers of {plan['workers']}"
    )
    left = seen["seconds_left"]
    yield f"time left: {'not known yet' if left is None else duration(left)}"


def _lives(driver: Mapping[str, Any]) -> bool:
    """Whether the driver that wrote this goes on, as far as this machine can know."""
    if driver["host"] == socket.gethostname():
        try:
            os.kill(driver["pid"], 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass
    return bool(time.time() - driver["time"] < PATIENCE_SECONDS)


def duration(seconds: float) -> str:
    """`2 h 5 min`, `40 s`."""
    minutes = round(seconds / 60)
    if minutes < 1:
        return f"{round(seconds)} s"
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"
