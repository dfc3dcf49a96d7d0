"""OPPU's data files as LaMP questions: users with a long history, and all others.

Paper: Tan et al., Democratizing Large Language Models via Personalized Parameter-Efficient Fine-tuning, 2024. Code read:
TamSiuhin/OPPU@d2128d7, whose folders hold lists of users, their history oldest first:
    movie_tagging/user_top_100_history.json, user_others.json
    [{"user_id": 5, "profile": [{"id", "tag", "description"}], "query": [{"id", "input", "gold"}]}]
The users with a long history are both splits that are evaluated, the others are the train split. Labels are read from
`gold`, so `user_top_100_history_label.json` is not needed; profiles in `profile_user_*.json` are not read.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

FOLDERS: Mapping[str, str] = {
    "lamp1": "citation",
    "lamp2m": "movie_tagging",
    "lamp2n": "news_categorize",
    "lamp3": "product_rating",
    "lamp4": "news_headline",
    "lamp5": "scholarly_title",
    "lamp7": "tweet_paraphrase",
}
_EVALUATED = ("user_top_100_history.json", "user_more_100_history.json")
"""The second is how the folder of tweets calls it."""
FILES: Mapping[str, tuple[str, ...]] = {"train": ("user_others.json",), "dev": _EVALUATED, "test": _EVALUATED}


def find(task: str, root: Path, split: str) -> Path | None:
    """The split's file, where `root` is OPPU's data folder or one task's."""
    places = [root / FOLDERS[task], root] if task in FOLDERS else []
    return next((place / name for place in places for name in FILES[split] if (place / name).is_file()), None)


def is_oppu(file: Path) -> bool:
    return any(file.name in names for names in FILES.values())


def questions(user: Any, place: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Questions and golds of the user at this place of the file, in LaMP's shape; they share one profile object.

    Raises ValueError saying what the user lacks.
    """
    for field, kind in (("user_id", (str, int)), ("profile", list), ("query", list)):
        if not isinstance(user, dict) or not isinstance(user.get(field), kind):
            raise ValueError(f"user {place} has no field {field!r} of OPPU's format (user_id, profile, query)")
    asked: list[dict[str, Any]] = []
    golds: list[dict[str, Any]] = []
    for query in user["query"]:
        if not isinstance(query, dict) or not {"id", "input", "gold"} <= set(query):
            raise ValueError(f"user {place} (user_id {user['user_id']!r}): a query should have id, input and gold")
        asked.append({**query, "user_id": user["user_id"], "profile": user["profile"]})
        golds.append({"id": query["id"], "output": query["gold"]})
    return asked, golds
