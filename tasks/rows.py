"""Rows of a published data set: from a folder of its files, or from the hub through `datasets`.

In a folder the files of a part lie as the hub has them, `topic_writing_user/val-00000-of-00001.parquet`, or as one file,
`topic_writing_user/val.parquet` (also .jsonl and .json), or with the part's name in front, `topic_writing_user_val.json`.
Rows come one after another, so that a few of them take no more memory than that.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.errors import DataMissing
from harness.files.json_files import parse, read_bytes, read_json


@dataclass(frozen=True)
class Source:
    """Where a data set is: a folder, or None for the hub."""

    hub: str
    """Its id there."""
    folder: str | None
    how_to_get: str
    """Said where it is in neither."""

    def rows(self, part: str, split: str) -> Iterator[Mapping[str, Any]]:
        """In file order. Raises DataMissing where they are not there or cannot be read."""
        if self.folder is None:
            yield from self._from_hub(part, split)
            return
        for path in self._files(part, split):
            yield from file_rows(path)

    def sha256(self, part: str, split: str) -> str:
        """Of the files; of a data set from the hub, of the fingerprint that `datasets` gives it."""
        digest = hashlib.sha256()
        if self.folder is None:
            digest.update(f"{self.hub}/{part}/{split}/{self._from_hub(part, split)._fingerprint}".encode())
            return digest.hexdigest()
        for path in self._files(part, split):
            with path.open("rb") as content:
                digest.update(hashlib.file_digest(content, "sha256").digest())
        return digest.hexdigest()

    def _files(self, part: str, split: str) -> list[Path]:
        root = Path(self.folder or "").expanduser()
        for folder in (root / part, root):
            sharded = sorted(folder.glob(f"{split}-*-of-*.parquet"))
            if sharded and (folder != root or root.name == part):
                of = {path.stem.rpartition("-of-")[2] for path in sharded}
                if of != {f"{len(sharded):05}"}:
                    raise DataMissing(
                        f"{folder} has {len(sharded)} files {split}-*-of-{' and -of-'.join(sorted(of))}.parquet, which are not "
                        f"all of one set; {self.how_to_get}"
                    )
                return sharded
        places = [root / part / split, root / f"{part}_{split}"] + ([root / split] if root.name == part else [])
        for place in places:
            for suffix in (".parquet", ".jsonl", ".json"):
                if (path := place.with_name(place.name + suffix)).is_file():
                    return [path]
        raise DataMissing(
            f"{root} has no {part}/{split}-*.parquet, nor {part}/{split} as .parquet, .jsonl or .json; {self.how_to_get}"
        )

    def _from_hub(self, part: str, split: str) -> Any:
        import datasets

        try:
            return datasets.load_dataset(self.hub, part, split=split)
        except Exception as error:  # no network, no such part: whatever it is, the rows are not there
            raise DataMissing(
                f"cannot load {self.hub} ({part}, {split}) from the hub or its cache ({type(error).__name__}); {self.how_to_get}"
            ) from error


def from_the_hub(hub: str, licence: str) -> str:
    """How to get a data set that `harness data get` does not fetch, its licence first."""
    return (
        f"{licence}; read it, then 'hf download {hub} --repo-type dataset --local-dir FOLDER' fetches it, and FOLDER is what to "
        "give as --data"
    )


def file_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    """Of a .parquet, .jsonl or .json file (a list of objects). Raises DataMissing naming file and row."""
    if path.suffix == ".parquet":
        import pyarrow
        from pyarrow import parquet

        try:
            file = parquet.ParquetFile(path)
            for batch in file.iter_batches(batch_size=16):
                yield from batch.to_pylist()
        except (OSError, pyarrow.ArrowException) as error:
            raise DataMissing(f"{path} is no parquet file that can be read ({error})") from None
    elif path.suffix == ".jsonl":
        for number, line in enumerate(read_bytes(path).splitlines(), start=1):
            if line.strip():
                try:
                    row = parse(line)
                except ValueError as problem:
                    raise DataMissing(f"{path}, line {number}: not valid JSON ({problem})") from None
                yield _object(path, number, row)
    else:
        rows: list[Any] = read_json(path, list[Any], "data file", "a list of objects")
        for number, row in enumerate(rows, start=1):
            yield _object(path, number, row)


def text(row: Mapping[str, Any], *names: str, where: str, row_number: int, empty: bool = False) -> str:
    """The first of these fields that the row has, a text or a number. Raises DataMissing where none is, or it is empty."""
    for name in names:
        if isinstance(found := row.get(name), str | int | float) and not isinstance(found, bool):
            if empty or str(found).strip():
                return str(found)
            raise DataMissing(f"{where}, row {row_number}: field {name} is empty")
    raise DataMissing(f"{where}, row {row_number}: field {' or '.join(names)} is missing or no text")


def _object(path: Path, number: int, row: Any) -> Mapping[str, Any]:
    if not isinstance(row, Mapping):
        raise DataMissing(f"{path}, row {number}: expected an object, found {type(row).__name__}")
    return row
