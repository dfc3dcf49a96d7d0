"""Fetch LaMP's files from their official address, resuming what a broken connection left.

A file grows as `NAME.part` and gets its name when it is whole; `manifest.json` (SHA-256 and size of each file) is
written last, so a file listed there is complete. Addresses: https://lamp-benchmark.github.io/download. Licence of the
data: CC BY-NC-SA 4.0.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.errors import DataMissing, UsageError, did_you_mean
from harness.files import replace_file
from harness.files.json_files import parse
from harness.plugins.registry import task_class
from harness.tasks import TASKS

BASE_URL = "https://ciir.cs.umass.edu/downloads/LaMP"
PARTS = ("train", "dev", "test")

_FOLDERS: Mapping[str, str] = {
    "lamp1": "LaMP_1",
    "lamp2m": "LaMP_2/new",
    "lamp2n": "LaMP_2",
    "lamp3": "LaMP_3",
    "lamp4": "LaMP_4",
    "lamp5": "LaMP_5",
    "lamp7": "LaMP_7",
}
_LAMP6 = (
    "lamp6 cannot be downloaded: its emails are the Avocado Research Email Collection, licensed by the LDC "
    "(catalogue LDC2015T03). With a licence, build the files with data/avocado in github.com/LaMP-Benchmark/LaMP and "
    "give their folder as --data or $HARNESS_DATA"
)
_ATTEMPTS = 5
_TIMEOUT_SECONDS = 30.0
_PAUSE_SECONDS = 1.0
_CHUNK_BYTES = 1 << 16
_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS}

Tick = Callable[[int, int | None], None]
"""Called with the bytes that are there and the bytes there will be."""


def get(
    task: str,
    *,
    split: str = "user",
    parts: Sequence[str] = PARTS,
    dest: Path,
    progress: bool = True,
    base_url: str | None = None,
) -> Path:
    """Downloads a task's questions and golds to `dest`, laid out as on the server; returns the task's folder.

    `dest` is what to give a run as data. Files the manifest vouches for are kept. The golds of the test part are not
    public. Raises UsageError for unknown names, DataMissing where the network or the server has no file.
    """
    folder = _folder(task, split)
    source = f"{(base_url or BASE_URL).rstrip('/')}/{folder}"
    unknown = [part for part in parts if part not in PARTS]
    if unknown:
        raise UsageError(
            f"unknown part {unknown[0]!r}{did_you_mean(unknown[0], PARTS)} Choose from: {', '.join(PARTS)}"
        )
    names = [f"{part}/{part}_questions.json" for part in parts]
    names += [f"{part}/{part}_outputs.json" for part in parts if part != "test"]
    target = Path(dest) / folder
    manifest = target / "manifest.json"
    known: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # without it every file is fetched again
        known = dict(parse(manifest.read_bytes())["files"])
    files = dict(known)
    with _Bars(progress) as bars:
        for name in sorted(names):
            file = target / name
            if not (file.is_file() and known.get(name) == _describe(file)):
                _fetch(f"{source}/{name}", file, bars.add(f"{folder}/{name}"))
            files[name] = _describe(file)
    record = {"task": task, "split": split, "source": source, "files": files}
    replace_file(manifest, (json.dumps(record, indent=1, sort_keys=True) + "\n").encode())
    return target


def _folder(task: str, split: str) -> str:
    if task == "lamp6":
        raise DataMissing(_LAMP6)
    if task.partition(":")[0] in TASKS and (how := task_class(task.partition(":")[0]).how_to_get):
        raise DataMissing(f"{task}: {how}")
    if task not in _FOLDERS:
        raise UsageError(f"unknown task {task!r}{did_you_mean(task, _FOLDERS)} Choose from: {', '.join(_FOLDERS)}")
    if split not in ("user", "time"):
        raise UsageError(f"unknown split {split!r}{did_you_mean(split, ('user', 'time'))} Choose from: user, time")
    if split == "user":
        return _FOLDERS[task]
    if task == "lamp2n":
        raise UsageError("lamp2n has no time split (LaMP made one for the movie tags only); choose 'lamp2m' or 'user'")
    return f"time/{_FOLDERS[task]}"


def _describe(file: Path) -> dict[str, str | int]:
    with file.open("rb") as content:
        return {"sha256": hashlib.file_digest(content, "sha256").hexdigest(), "bytes": file.stat().st_size}


def _fetch(url: str, file: Path, tick: Tick) -> None:
    """Downloads to `file`, going on from what earlier attempts and earlier calls left."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(file.name + ".part")
    problem = ""
    for attempt in range(_ATTEMPTS):
        if attempt:
            time.sleep(_PAUSE_SECONDS * attempt)
        try:
            _receive(url, part, tick)
            break
        except urllib.error.HTTPError as error:
            error.close()
            if error.code == 416:  # what is here is no start of what is there
                part.unlink(missing_ok=True)
            elif error.code < 500:
                raise DataMissing(
                    f"{url} answered {error.code} {error.reason}; see lamp-benchmark.github.io/download"
                ) from None
            problem = f"the server answered {error.code} {error.reason}"
        except urllib.error.URLError as error:
            raise DataMissing(
                f"cannot reach {url} ({error.reason}); run this where there is a network and copy the folder"
            ) from None
        except (OSError, http.client.HTTPException) as error:
            if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
                raise DataMissing(
                    f"cannot write {part} ({error.strerror}); give another --dest, or make room"
                ) from None
            problem = f"the connection broke ({type(error).__name__}: {error})"
    else:
        have = part.stat().st_size if part.is_file() else 0
        raise DataMissing(f"{url}: {problem}, {_ATTEMPTS} times; {have} bytes are kept, run the same command to go on")
    with part.open("rb") as content:
        if content.read(64).lstrip()[:1] not in (b"[", b"{"):
            raise DataMissing(f"{url} sent no JSON (an error or login page?); look at {part} and delete it")
    os.replace(part, file)
    _stamp(part).unlink(missing_ok=True)


def _receive(url: str, part: Path, tick: Tick) -> None:
    """One connection's worth. Goes on from a part only if the server still has the very file it came from."""
    stamp = _stamp(part)
    have = part.stat().st_size if part.is_file() and stamp.is_file() else 0
    request = urllib.request.Request(url)
    if have:
        request.add_header("Range", f"bytes={have}-")
        request.add_header("If-Range", stamp.read_text(encoding="utf-8"))
    with urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS) as response:
        if response.status != 206:
            have = 0
            stamp.unlink(missing_ok=True)
            etag = response.headers.get("ETag", "")
            version = response.headers.get("Last-Modified") if etag.startswith("W/") or not etag else etag
            if version:
                replace_file(stamp, version.encode())
        length = response.headers.get("Content-Length")
        total = None if length is None else have + int(length)
        with part.open("ab" if have else "wb") as out:
            while chunk := response.read(_CHUNK_BYTES):
                out.write(chunk)
                have += len(chunk)
                tick(have, total)
    if total is not None and have < total:
        raise ConnectionError(f"{have} of {total} bytes came")


def _stamp(part: Path) -> Path:
    """Beside a part: the ETag or date of the file it is the start of."""
    return part.with_name(part.name + ".version")


class _Bars:
    """Progress bars on stderr, one a file; nothing where they are not wanted."""

    def __init__(self, shown: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
        self._progress = Progress(*columns, console=Console(stderr=True), disable=not shown)

    def __enter__(self) -> _Bars:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def add(self, name: str) -> Tick:
        bar = self._progress.add_task(name, total=None)
        return lambda have, total: self._progress.update(bar, completed=have, total=total)
