"""Where the harness keeps what it can make again: $HARNESS_CACHE, or the user's cache folder. Deleting it costs time only."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from harness.errors import HarnessError


def user_cache() -> Path:
    if chosen := os.environ.get("HARNESS_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "personalization-harness"


@contextmanager
def caching(place: Path) -> Iterator[None]:
    """What the system refuses there, with what a user can do about it."""
    try:
        yield
    except (OSError, HarnessError) as error:
        if isinstance(error, HarnessError) and not (
            type(error) is HarnessError and isinstance(error.__cause__, OSError)
        ):
            raise
        why = getattr(error.__cause__ or error, "strerror", None) or error
        raise HarnessError(f"cannot write {place}: {why}; set HARNESS_CACHE to another folder") from error


def nltk_cache() -> Path:
    """Where `harness data get wordnet` puts what NLTK reads."""
    return user_cache() / "nltk_data"
