"""Where the harness keeps what it can make again: $HARNESS_CACHE, or the user's cache folder. Deleting it costs time only."""

from __future__ import annotations

import os
from pathlib import Path


def user_cache() -> Path:
    if chosen := os.environ.get("HARNESS_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "personalization-harness"


def nltk_cache() -> Path:
    """Where `harness data get wordnet` puts what NLTK reads."""
    return user_cache() / "nltk_data"
