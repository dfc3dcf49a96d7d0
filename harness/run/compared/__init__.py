"""What was compared with the unedited model so far, a line an answer in `compared.jsonl`, until run.json says what it comes to.

The comparison takes as long as some batches do, so a run that is killed in it goes on behind the last piece that was whole: the
last bits of a difference depend on what it was computed with.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from harness.files import append, replace_file
from harness.files.json_files import instance, parse, read_bytes
from harness.run.answers import Difference

NAME = "compared.jsonl"


@dataclass(frozen=True)
class _Line:
    id: str
    response: str
    """The first digits of its hash."""
    difference: Difference

    def content(self) -> bytes:
        return json.dumps(asdict(self)).encode() + b"\n"


class Compared:
    """Remembers nothing: for whoever keeps no record."""

    def read(self, asked: Sequence[tuple[str, str]], size: int) -> list[Difference]:
        """The differences of the first of the samples `asked` (id, response), as many as whole pieces of `size` have."""
        return []

    def add(self, id: str, response: str, difference: Difference) -> None:
        """Keep one more."""


class ComparedIn(Compared):
    """Kept in the folder of a record."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / NAME

    def read(self, asked: Sequence[tuple[str, str]], size: int) -> list[Difference]:
        kept = self._lines()
        same = next((n for n, one in enumerate(kept) if (one.id, one.response) != _named(asked, n)), len(kept))
        whole = same if same == len(asked) else same // size * size
        content = b"".join(one.content() for one in kept[:whole])
        if self.path.exists() and self.path.read_bytes() != content:  # what is added must not run into half a line
            replace_file(self.path, content)
        return [one.difference for one in kept[:whole]]

    def add(self, id: str, response: str, difference: Difference) -> None:
        append(self.path, _Line(id, _digest(response), difference).content())

    def drop(self) -> None:
        """To be called once the record holds what they come to."""
        self.path.unlink(missing_ok=True)

    def _lines(self) -> list[_Line]:
        """What can be read; a line that was cut off, and what follows it, is computed again."""
        found: list[_Line] = []
        try:
            for line in read_bytes(self.path).split(b"\n")[:-1]:
                found.append(instance(_Line, parse(line)))
        except (OSError, ValueError):
            pass
        return found


def _named(asked: Sequence[tuple[str, str]], n: int) -> tuple[str, str] | None:
    return (asked[n][0], _digest(asked[n][1])) if n < len(asked) else None


def _digest(response: str) -> str:
    return hashlib.sha256(response.encode(errors="surrogatepass")).hexdigest()[:16]
