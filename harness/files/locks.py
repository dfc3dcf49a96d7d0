"""One writer at a time, and no writing through links.

The kernel lets go of a lock with the process that held it, so a killed one leaves nothing to clear. On file systems without
locks the name inside a lock's file decides.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from harness.errors import UsageError

_NO_LOCKS = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL, errno.EBADF}
"""What a file system without locks says."""


class Lock:
    """A file that one process holds. The kernel lets go of it with the process, so a killed one leaves nothing to clear.

    The text inside (pid and host) is for the message. It decides alone on file systems without locks, where one left by a
    run that died on another machine must be removed by hand; the message says which file that is.
    """

    def __init__(self, path: Path, file: int) -> None:
        self.path, self._file = path, file

    @classmethod
    def take(cls, path: Path) -> Lock:
        """Raises UsageError where another process holds it, or where something else lies in its place."""
        while True:
            try:
                file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o644)
                new = True
            except FileExistsError:
                try:
                    file, new = open_plain(path, os.O_RDWR, links=1), False
                except FileNotFoundError:  # released in between
                    continue
            held = try_lock(file)
            holder = os.pread(file, 200, 0).decode(errors="replace").strip()
            if held is False or (held is None and not new and _may_be_running(holder)):
                os.close(file)
                raise UsageError(_taken(path, holder, knows=held is not None))
            if not same(file, path):  # the holder released it between our open and our lock
                os.close(file)
                continue
            os.ftruncate(file, 0)
            os.pwrite(file, f"pid {os.getpid()} on {socket.gethostname()}".encode(), 0)
            return cls(path, file)

    def release(self) -> None:
        self.path.unlink(missing_ok=True)
        os.close(self._file)


@contextmanager
def waiting(path: Path) -> Iterator[None]:
    """Waits until no other process is in here. Where the file system has no locks nobody waits."""
    file = open_plain(path, os.O_RDWR | os.O_CREAT, links=1)
    try:
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
    finally:
        os.close(file)


def _taken(path: Path, holder: str, *, knows: bool) -> str:
    who = f"another run ({' '.join(holder.split())})" if holder else "another run"
    if knows:
        return f"{path.parent} is being written by {who}; wait for it, or give another --output_path"
    return (
        f"{path.parent} is being written by {who}, as far as can be told on a file system without locks; if that run has "
        f"ended, delete {path} and give the command again, else wait for it or give another --output_path"
    )


def open_plain(path: Path, flags: int, *, links: int) -> int:
    """A plain file of at most `links` names. Raises UsageError for a link, a folder or a device in its place."""
    try:
        file = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EMLINK, errno.EISDIR, errno.ENXIO):
            raise
        raise UsageError(f"{path} is a link or no file, and is not written through; remove it") from error
    found = os.fstat(file)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > links:
        os.close(file)
        raise UsageError(f"{path} is a link or no file, and is not written through; remove it")
    return file


def try_lock(file: int) -> bool | None:
    """Whether this process holds the file's lock now; None where the file system has none."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return None
        raise


def same(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), path.lstat())
    except FileNotFoundError:
        return False


def _may_be_running(holder: str) -> bool:
    """Whether the process named in a lock may live; one that has not written its name may."""
    match = re.fullmatch(r"pid (\d+) on (.+)", holder)
    if match is None or match[2] != socket.gethostname():
        return True
    try:
        os.kill(int(match[1]), 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True
