"""Files and folders that are there whole or not at all.

What is being written lies beside its place as `.NAME.<random>.draft`, locked by its writer, so that what a killed process
left is told from what is still being written, and removed by whoever writes there next. Links that lie where a file is to
be written are never followed.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from harness.errors import HarnessError
from harness.files.locks import open_plain, same, try_lock

_DAY = 86400.0
"""Seconds after which a draft is nobody's, where locks cannot tell."""
LONGEST = 180
"""Bytes of a name; file systems take 255, and a draft's name is longer."""


def replace_file(path: Path, content: bytes) -> None:
    """A reader sees the old content or the new, and the new is on disk when this returns.

    Raises HarnessError where the system refuses it; then the old content is still there.
    """
    with replacing_file(path) as (_, file):
        write_all(file, content)


@contextmanager
def replacing_file(path: Path) -> Iterator[tuple[Path, int]]:
    """An empty file to fill, by name or as it is open, which takes the place of `path` when the block ends."""
    with writing(path):
        _sweep(path.parent, path.name)
        draft, file = _new_file(path)
        try:
            yield draft, file
            os.fsync(file)
            os.replace(draft, path)
        except BaseException:
            draft.unlink(missing_ok=True)
            raise
        finally:
            os.close(file)


@contextmanager
def replacing_folder(target: Path, *, drafts: Path | None = None, keep: bool = False) -> Iterator[Path]:
    """A new folder to fill, which takes the place of `target` when the block ends, and vanishes where it raises.

    With `keep` a folder that is there by then stays, and the new one vanishes. `drafts` is a folder for drafts alone, in the
    same file system, where it lies meanwhile. Raises HarnessError where the system refuses it.
    """
    place = drafts or target.parent
    with writing(target):
        place.mkdir(parents=True, exist_ok=True)
        _restore(target, place)
        _sweep(place, "" if drafts else target.name)
        draft, lock = _new_folder(place, target.name)
    try:
        with writing(target):
            yield draft
            _swap(draft, target, place, keep=keep)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
        os.close(lock)


def append(path: Path, content: bytes) -> None:
    """Add to a file; it is on disk when this returns, and none of it is where this raises. No link is followed."""
    with writing(path):
        file = open_plain(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, links=1000)
        try:
            before = os.fstat(file).st_size
            try:
                write_all(file, content)
                os.fsync(file)
            except OSError:
                os.ftruncate(file, before)
                raise
        finally:
            os.close(file)


def write_all(file: int, content: bytes) -> None:
    while content:
        content = content[os.write(file, content) :]


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """An operating system's refusal (full disk, no permission) as one line for the user."""
    try:
        yield
    except OSError as error:
        why = error.strerror or str(error)
        raise HarnessError(f"cannot write {path}: {why}; nothing saved before is lost") from error


def _start(name: str) -> str:
    return os.fsdecode(os.fsencode(name)[:LONGEST])


def _draft_name(name: str) -> str:
    return f".{_start(name)}.{secrets.token_hex(4)}.draft"


def _new_file(path: Path) -> tuple[Path, int]:
    while True:
        draft = path.with_name(_draft_name(path.name))
        file = os.open(draft, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o644)
        if try_lock(file) is not False and same(file, draft):
            return draft, file
        os.close(file)  # another process took it for one that was left behind


def _new_folder(place: Path, name: str) -> tuple[Path, int]:
    while True:
        draft = place / _draft_name(name)
        draft.mkdir()
        with suppress(FileNotFoundError):
            file = os.open(draft, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            if try_lock(file) is not False and same(file, draft):
                return draft, file
            os.close(file)


def _sweep(place: Path, name: str) -> None:
    """Remove the drafts of `name`, or all of them, that no process is writing."""
    start = f".{_start(name)}." if name else "."
    with suppress(FileNotFoundError), os.scandir(place) as entries:
        left = [Path(entry) for entry in entries if entry.name.startswith(start) and entry.name.endswith(".draft")]
        for path in left:
            if path.is_symlink():
                path.unlink(missing_ok=True)
                continue
            with _abandoned(path) as abandoned, suppress(OSError):
                if abandoned:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()


@contextmanager
def _abandoned(draft: Path) -> Iterator[bool]:
    """Whether no process is writing it; while the block runs none can begin to."""
    try:
        file = os.open(draft, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        yield False
        return
    try:
        held = try_lock(file)
        yield time.time() - os.fstat(file).st_mtime > _DAY if held is None else held
    finally:
        os.close(file)


def _swap(draft: Path, target: Path, place: Path, *, keep: bool) -> None:
    try:
        os.rename(draft, target)  # where there is none, or an empty one
        return
    except OSError:
        if not os.path.lexists(target):
            raise
    if keep:  # another process was first
        return
    if _exchange(draft, target):
        return
    old = place / f".{_start(target.name)}.{secrets.token_hex(4)}.old"  # until the new one is there
    os.rename(target, old)
    os.rename(draft, target)
    shutil.rmtree(old, ignore_errors=True)


def _restore(target: Path, place: Path) -> None:
    """What `_swap` had put aside when it was killed comes back, or goes where the new one came."""
    for old in sorted(place.glob(f".{_globbed(_start(target.name))}.*.old")):
        if os.path.lexists(target):
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.rename(old, target)


def _globbed(name: str) -> str:
    return re.sub(r"([*?[])", r"[\1]", name)


def _exchange(one: Path, other: Path) -> bool:
    """Have the two change places in one step; False where the system has no such step."""
    import ctypes  # which few commands need

    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0
