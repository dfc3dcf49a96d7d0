"""Rows of a table that somebody made: .jsonl, .json, .csv, .parquet, or a data set of the Hugging Face hub.

A row comes with its place, the line of its file where that has lines, so that a message can name it. Nothing is dropped in
silence: a cell too many, a byte that is no UTF-8 and a line that is no JSON are DataMissing, with file and line.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Collection, Iterator
from datetime import date, datetime, time
from pathlib import Path
from typing import Any, NamedTuple

from harness.errors import DataMissing
from harness.files.json_files import parse, read_bytes
from harness.files.shown import first_line

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
HUB = "hf:"
"""Before the name of a hub data set, or the folder of one."""
SPLITS = {"validation": "dev", "valid": "dev", "val": "dev", "eval": "dev"}
"""What hub data sets call our splits."""


class Row(NamedTuple):
    line: int
    """Of the file, from 1; the row's number where the file has no lines."""
    value: Any
    """A dict by column where the file is sound."""


def rows_of(source: str, config: str | None = None, lists: Collection[str] = ()) -> list[Row]:
    """The rows of a file, or of `hf:NAME` in its configuration `config`; of a .csv the columns `lists` hold JSON lists.

    Raises DataMissing where they cannot be read.
    """
    if source.startswith(HUB):
        return list(_hub(source.removeprefix(HUB), config))
    path = Path(source)
    content = content_of(path)
    if path.suffix == ".parquet":
        return list(_parquet(path, content))
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        at = content[: error.start].count(b"\n") + 1
        raise DataMissing(
            f"{path}, line {at}: byte {content[error.start]:#04x} is no UTF-8; convert the file"
        ) from None
    if path.suffix == ".csv":
        return list(_csv(path, text, lists))
    return list((_json if path.suffix == ".json" else _jsonl)(path, text))


def content_of(path: Path, wanted: str = "the path of a file of users") -> bytes:
    try:
        return read_bytes(Path(os.path.expanduser(path)))
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise DataMissing(f"{path} cannot be read ({why}); give {wanted}") from None


def _jsonl(path: Path, text: str) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), start=1):  # a text may hold other line ends as they are
        if line.strip():
            yield Row(number, _parsed(path, number, line))


def _json(path: Path, text: str) -> Iterator[Row]:
    found = _parsed(path, 1, text) if text.strip() else []
    if not isinstance(found, list):
        raise DataMissing(f"{path}: expected a list of objects with user, input and target")
    yield from (Row(number, value) for number, value in enumerate(found, start=1))


def _parsed(path: Path, number: int, text: str) -> Any:
    try:
        return parse(text)
    except ValueError as error:
        raise DataMissing(f"{path}, line {number}: not valid JSON ({error})") from None


def _csv(path: Path, text: str, lists: Collection[str]) -> Iterator[Row]:
    """Rows by the names in the first line; cells are split at what it has most of: comma, semicolon or tab."""
    csv.field_size_limit(2**31 - 1)  # of a cell; Python's own limit is shorter than a long mail
    header = text.split("\n", 1)[0]
    read = csv.reader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=header.count), strict=True)
    try:
        names, line = next(read, []), read.line_num
        if twice := next((name for n, name in enumerate(names) if name and name in names[:n]), ""):
            raise DataMissing(f"{path}, line 1: column {twice!r} stands twice; give each column a name of its own")
        for cells in read:
            first, line = line + 1, read.line_num
            if len(cells) > len(names):
                raise DataMissing(
                    f"{path}, line {first}: more cells than the first line names; put a cell that holds a comma in quotes"
                )
            if cells:
                yield Row(first, {k: _list(v) if k in lists else v for k, v in zip(names, cells, strict=False) if v})
    except csv.Error as error:
        hint = "; is a quote not closed, or not doubled inside a cell?"  # it would swallow the rows behind it
        raise DataMissing(f"{path}, line {line + 1}: not valid CSV ({error}){hint}") from None


def _list(cell: str) -> Any:
    """A list is written as JSON."""
    try:
        return parse(cell)
    except ValueError:
        return cell


def _parquet(path: Path, content: bytes) -> Iterator[Row]:
    import pyarrow
    from pyarrow import parquet

    try:
        table: Any = parquet.read_table(io.BytesIO(content))
        rows: list[dict[str, Any]] = table.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataMissing(f"{path} is no parquet file ({first_line(error)[:100]})") from None
    kinds: Any = {}
    if b"huggingface" in (table.schema.metadata or {}):  # of a data set of the hub, whose labels are numbers with names
        import datasets

        kinds = datasets.Features.from_arrow_schema(table.schema)
    for number, row in enumerate(rows, start=1):
        yield Row(number, _without_gaps(_with_names(row, kinds)))


def _without_gaps(value: Any) -> Any:
    """As JSON has it: a field without a value, which a column must have and a line need not, is no field; a date is a text."""
    if isinstance(value, dict):
        return {name: _without_gaps(part) for name, part in value.items() if part is not None}
    if isinstance(value, list):
        return [_without_gaps(part) for part in value]
    if isinstance(value, datetime) and value.time() == time():  # as pandas keeps a day
        value = value.date()
    return value.isoformat() if isinstance(value, date) else value


def _hub(name: str, config: str | None) -> Iterator[Row]:
    """The rows of all splits, each with the name of its own as `split` where it has none."""
    import datasets

    folder = Path(os.path.expanduser(name))
    datasets.disable_progress_bars()
    try:
        if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
            found: Any = datasets.load_from_disk(str(folder))
        else:
            found = datasets.load_dataset(str(folder) if folder.is_dir() else name, config)
    except Exception as error:  # whatever a server, a cache or a file does
        why = f"{type(error).__name__}: {first_line(error)}"[:200]
        raise DataMissing(
            f"data set {name} cannot be loaded ({why}). Where there is no network, save it elsewhere with "
            f"datasets.load_dataset({name!r}).save_to_disk('FOLDER') and give hf:FOLDER"
        ) from None
    splits = found if isinstance(found, dict) else {str(getattr(found, "split", None) or "dev"): found}
    number = 0
    for split, rows in splits.items():
        for row in rows.to_list():
            number += 1
            yield Row(number, {"split": SPLITS.get(split, split), **_without_gaps(_with_names(row, rows.features))})


def _with_names(value: Any, kind: Any) -> Any:
    """Numbers of labels, in lists and structures too, as their names; None where there is no label, which is -1."""
    if hasattr(kind, "int2str"):
        return kind.int2str(value) if value is not None and value >= 0 else None
    if isinstance(value, dict) and isinstance(kind, dict):
        return {name: _with_names(part, kind.get(name)) for name, part in value.items()}
    if isinstance(value, list) and hasattr(kind, "feature"):
        return [_with_names(part, kind.feature) for part in value]
    return value
