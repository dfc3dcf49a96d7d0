"""Replies of judges that were paid for: $HARNESS_CACHE/judge.sqlite, one row a question, written as each one arrives.

A question is the judge (and the server, since servers give their models any name), the prompt and the parameters. The
row says who paid, so that a run that was killed counts its costs once, and one that finds a reply counts none.
Deleting the file costs money only.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sqlite3
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from harness.errors import HarnessError
from harness.files.user_cache import user_cache
from harness.servers.chat import Reply, ScoredToken

_WAIT = 60.0
"""Seconds for another process to finish its write."""


class Kept(NamedTuple):
    reply: Reply
    payer: str
    """The record that paid."""


class ReplyCache:
    """Rows are read and written inside `open`."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path or user_cache() / "judge.sqlite"

    @staticmethod
    def key(asked: Mapping[str, Any]) -> str:
        return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()

    @contextlib.contextmanager
    def open(self) -> Iterator[Rows]:
        """Raises HarnessError where the file is damaged or cannot be written."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # one thread uses it at a time, but in a notebook another than the one that opens it
            with contextlib.closing(sqlite3.connect(self.path, timeout=_WAIT, check_same_thread=False)) as database:
                yield Rows(database)
        except (sqlite3.Error, OSError) as error:
            raise HarnessError(
                f"judge cache {self.path}: {error}; delete the file to ask again, or set HARNESS_CACHE to another folder"
            ) from error


class Rows:
    def __init__(self, database: sqlite3.Connection) -> None:
        self._database = database
        with database:
            database.execute(
                "CREATE TABLE IF NOT EXISTS replies (key TEXT PRIMARY KEY, asked TEXT, reply TEXT, payer TEXT)"
            )

    def get(self, key: str) -> Kept | None:
        row = self._database.execute("SELECT reply, payer FROM replies WHERE key = ?", (key,)).fetchone()
        if row is None:
            return None
        try:
            fields = json.loads(row[0])
            candidates = fields["candidates"]
            pairs = None if candidates is None else tuple((token, logprob) for token, logprob in candidates)
            whole = {"candidates": pairs, "tokens": tuple(fields["tokens"])}
            scored = tuple(ScoredToken(*token) for token in fields.pop("scored", ()))
            return Kept(Reply(**{**fields, **whole}, scored=scored), row[1])
        except (ValueError, KeyError, TypeError):  # of another version
            return None

    def drop(self, key: str) -> None:
        """Forget a reply that is none."""
        with self._database:
            self._database.execute("DELETE FROM replies WHERE key = ?", (key,))

    def put(self, key: str, asked: Mapping[str, Any], reply: Reply, payer: str) -> None:
        """It is on disk when this returns. Of two processes that paid for one question the first is kept."""
        row = (key, json.dumps(asked, sort_keys=True), json.dumps(asdict(reply)), payer)
        with self._database:
            self._database.execute("INSERT OR IGNORE INTO replies VALUES (?, ?, ?, ?)", row)
