"""The folder that a driver and its workers share: the only way they talk, whoever starts the workers.

plan.json               what a worker needs to begin: the command, where data and store are, which session goes on
results/                a file a shard, kept until the driver has its samples in the records; a driver that begins again reads them
SESSION/                of one life of the driver; a worker whose session's folder is gone ends
SESSION/driver.json     rewritten while the driver lives, with how far it is
SESSION/data.json       which cells run, and the fingerprints of their data, once the driver has read it
SESSION/inbox/WORKER/   tasks for a worker, in order
SESSION/events/         what workers have to say
SESSION/beats/          a file a worker, rewritten while it lives, with what it is at
SESSION/cells/          what was fitted and adapted, by cell
logs/                   what workers print

Every file is renamed into place, so a reader sees all of it or nothing, and nothing needs a lock across hosts.
"""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.files.json_files import parse
from harness.records.schema import hash_of, json_value

HIDDEN = ".grid"
"""Below the folder of records: where a command's shared folder lies while it is not finished."""


def put(path: Path, content: Any) -> None:
    """The file holds `content` when this returns. Not forced to the disk: what a power cut takes is computed again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    draft.write_bytes(json.dumps(json_value(content)).encode())
    os.replace(draft, path)


def take(path: Path) -> Any | None:
    """What the file holds; None where there is none, or a power cut left a part of it. Raises OSError where it cannot be read."""
    pauses = iter((0.1, 0.5))
    while True:
        try:
            return parse(path.read_bytes(), surrogates=True)
        except (FileNotFoundError, NotADirectoryError, ValueError):
            return None
        except OSError:  # a shared file system may fail for a moment; what is taken for absent is lost
            pause = next(pauses, None)
            if pause is None:
                raise
            time.sleep(pause)


def names(folder: Path) -> list[str]:
    """Of the files in it, sorted; drafts are none. Raises FileNotFoundError where it is gone."""
    return sorted(entry.name for entry in os.scandir(folder) if not entry.name.startswith("."))


def root_of(records: Path, command: str, options: Mapping[str, Any]) -> Path:
    """Where the same command always has its shared folder."""
    return records / HIDDEN / hash_of({"command": command, **json_value(options)})


@dataclass(frozen=True)
class Session:
    """One life of the driver, as files."""

    root: Path
    name: str

    @property
    def folder(self) -> Path:
        return self.root / self.name

    @property
    def events(self) -> Path:
        return self.folder / "events"

    @property
    def driver(self) -> Path:
        return self.folder / "driver.json"

    @property
    def data(self) -> Path:
        return self.folder / "data.json"

    def inbox(self, worker: str) -> Path:
        return self.folder / "inbox" / worker

    def beat(self, worker: str) -> Path:
        return self.folder / "beats" / f"{worker}.json"

    def learnt(self, job: int, point: int) -> Path:
        return self.folder / "cells" / f"{job}-{point}.json"

    @property
    def results(self) -> Path:
        return self.root / "results"

    def begin(self) -> None:
        for folder in (self.events, self.folder / "inbox", self.folder / "beats", self.folder / "cells", self.results):
            folder.mkdir(parents=True, exist_ok=True)
