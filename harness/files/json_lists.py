"""A long JSON list, one element at a time: what is in memory is a window of the file, whatever its size.

Each element is checked as `parse` checks a whole file, and a fault is said with its place in the whole file.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from harness.files.json_files import BOM, DEPTH, STRICT, WHITE, check, parse, read_bytes, status

WINDOW = 1 << 22
"""Bytes read at once."""
_CUT = 20
"""Characters before the end of the window where a fault may come of the cut: the longest part that is no text."""


class Element(NamedTuple):
    value: Any
    start: int
    """Its first byte in the file."""
    size: int
    """Its bytes."""


class NotAList(ValueError):
    """A JSON file of something else."""


def elements(file: Path, seen: Callable[[bytes], object] = lambda part: None) -> Iterator[Element]:
    """The elements of the list that the file is; `seen` gets all bytes of the file, in order, as they are read.

    Raises OSError where it cannot be read, NotAList (its text the type's name) where it holds something else, and
    ValueError, in one line, for what `parse` refuses.
    """
    status(file)
    with file.open("rb") as opened:
        window = _Window(opened, seen)
        if window.next() != "[":
            raise NotAList(type(parse(read_bytes(file))).__name__)
        window.skip(1)
        count = 0
        while window.next() != "]" or count:
            yield window.element(count)
            count, after = count + 1, window.next()
            if after == "]":
                break
            if after != ",":
                raise window.fault("Expecting ',' delimiter", window.at)
            window.skip(1)
        window.skip(1)
        if window.next():
            raise window.fault("Extra data", window.at)


class _Window:
    """The text of a file from what is not done with to what was read."""

    def __init__(self, file: BinaryIO, seen: Callable[[bytes], object]) -> None:
        self.text, self.at = "", 0
        self._file, self._seen = file, seen
        self._decoder = codecs.getincrementaldecoder("utf-8")("strict")
        self._read = 0
        self._byte = 0
        """Of the file where `at` is."""
        self._before, self._line, self._column = 0, 1, 1
        """Characters before the window, and where its first one stands."""
        self._ended = False

    def more(self) -> None:
        """Forget what lies before `at` and read on, at least as much again as is still here."""
        done, self.text = self.text[: self.at], self.text[self.at :]
        lines = done.count("\n")
        self._column = len(done) - done.rfind("\n") if lines else self._column + len(done)
        self._before, self._line, self.at = self._before + len(done), self._line + lines, 0
        part = self._file.read(max(WINDOW, len(BOM), len(self.text)))
        self._seen(part)
        self._ended, waiting = not part, len(self._decoder.getstate()[0])
        if not self._read and part.startswith(BOM):
            part, self._byte, self._read = part.removeprefix(BOM), len(BOM), len(BOM)
        try:
            self.text += self._decoder.decode(part, final=self._ended)
        except UnicodeDecodeError as error:
            raise ValueError(f"byte {self._read - waiting + error.start} is no UTF-8") from None
        self._read += len(part)

    def next(self) -> str:
        """The character at `at`, which goes behind white space; nothing at the end of the file."""
        while True:
            end = WHITE.match(self.text, self.at).end()  # type: ignore[union-attr]
            self.skip(end - self.at)
            if self.at < len(self.text) or self._ended:
                return self.text[self.at : self.at + 1]
            self.more()

    def skip(self, ascii_characters: int) -> None:
        self.at += ascii_characters
        self._byte += ascii_characters

    def element(self, number: int) -> Element:
        while True:
            try:
                value, end = STRICT.raw_decode(self.text, self.at)
                number_goes_on = isinstance(value, int | float) and end > len(self.text) - _CUT
                if self._ended or not number_goes_on:
                    break
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated string") or error.pos > len(self.text) - _CUT
                if self._ended or not cut:
                    raise self.fault(error.msg, error.pos) from None
            except RecursionError:
                raise ValueError(f"nested more than {DEPTH} deep") from None
            self.more()
        plain = self.text.isascii() and self.text.find("\\u", self.at, end) < 0  # most text: no copy of it is made
        content = b"" if plain else self.text[self.at : end].encode()
        check(value, content, str(number), DEPTH - 1)
        size = end - self.at if plain else len(content)
        element = Element(value, self._byte, size)
        self.at, self._byte = end, self._byte + size
        return element

    def fault(self, what: str, at: int) -> ValueError:
        """Said as Python's reader says it of a whole file."""
        lines = self.text.count("\n", 0, at)
        column = at - self.text.rfind("\n", 0, at) if lines else self._column + at
        return ValueError(f"{what}: line {self._line + lines} column {column} (char {self._before + at})")
