"""Who gains: each user's gain over `plain` against the length of their history, and against how unlike other users they are.

How unlike: 1 less the cosine between a user's words (TF-IDF of the whole history) and the mean of all other users' words. A dot
is a user; squares are means of thirds of the users with 95 % intervals; rho is Spearman's rank correlation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from harness.errors import HarnessError
from harness.plugins.registry import task_class
from harness.publish import leaderboard
from harness.publish.report.items import Group, histories, key
from harness.statistics.intervals import gain_interval
from harness.statistics.paired_tests import with_ties
from harness.task import Sample

FEWEST = 12
"""Users below which thirds of them say nothing."""
MOST = 5
"""Methods in one picture: those that rank first."""
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9")
Points = tuple[list[float], list[float]]


def figures(groups: Sequence[Group], data: Sequence[str], folder: Path) -> list[dict[str, Any]]:
    """A picture of each model on each data set with a run of `plain`, of others, and of enough users whose histories are at hand."""
    found: list[dict[str, Any]] = []
    for group in groups:
        for model in dict.fromkeys(run.config.model.name for run in group.runs):
            drawn = _draw(group, model, data, folder, f"users-{len(found) + 1}")
            found += [drawn] if drawn else []
    return found


def _draw(group: Group, model: str, data: Sequence[str], folder: Path, name: str) -> dict[str, Any] | None:
    usual = [r for r in group.runs if r.config.model.name == model and r.config.selection.control == "none"]
    with_plain = [
        (ranking, row.run)
        for ranking in leaderboard.rankings(usual)
        for row in ranking.rows
        if row.run.config.method.name == "plain"
    ]
    if not with_plain:
        return None
    ranking, plain = max(with_plain, key=lambda one: len(one[0].rows))
    ranked = [row for row in ranking.rows if row.run is not plain and not row.variant][:MOST]
    try:
        texts = histories(group, plain, data)
    except HarnessError:
        return None
    if len(texts) < FEWEST or not ranked:
        return None
    sign, own = (1 if ranking.higher_is_better else -1), task_class(ranking.task).per_sample
    number = own.get(ranking.metric, ranking.metric)
    base = _by_id(group.samples[key(plain)], number)
    gains = {}
    for row in ranked:
        mine = _by_id(group.samples[key(row.run)], number)
        by_user: dict[str, list[float]] = {}
        for id, (user, value) in mine.items():
            if id in base and user in texts:
                by_user.setdefault(user, []).append(sign * (value - base[id][1]))
        if len(by_user) >= FEWEST:
            gains[row.label] = {user: float(np.mean(some)) for user, some in by_user.items()}
    if not gains:
        return None
    file = folder / f"{name}.svg"
    _picture(file, gains, {user: float(len(some)) for user, some in texts.items()}, unlike(texts), ranking.metric)
    title = f"who gains over plain: {ranking.title}, {len(texts)} users"
    return {"id": name, "title": title, "place": "gain by user", "file": f"{folder.name}/{file.name}", "commands": ()}


def _by_id(samples: Sequence[Sample], number: str) -> dict[str, tuple[str, float]]:
    return {s.id: (s.user, float(v)) for s in samples if (v := s.metrics.get(number)) is not None}


def unlike(texts: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """By user, 1 - the cosine between the TF-IDF of their texts and the mean of all other users'; 0 to 1."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    users = list(texts)
    words = TfidfVectorizer(token_pattern=r"(?u)\b\w+\b").fit_transform(" ".join(texts[user]) for user in users)
    total = np.asarray(words.sum(axis=0)).ravel()
    found = {}
    for number, user in enumerate(users):
        own = words[number].toarray().ravel()
        others = total - own
        lengths = np.linalg.norm(own) * np.linalg.norm(others)
        found[user] = float(1 - own @ others / lengths) if lengths else 1.0
    return found


def _picture(
    file: Path,
    gains: Mapping[str, Mapping[str, float]],
    lengths: Mapping[str, float],
    unlikeness: Mapping[str, float],
    metric: str,
) -> None:
    import matplotlib
    from matplotlib.figure import Figure
    from scipy.stats import spearmanr

    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for panel, (what, place) in zip(
        axes, (("items in the user's history", lengths), ("how unlike other users (0 to 1)", unlikeness)), strict=True
    ):
        for colour, (label, of) in zip(COLOURS, gains.items(), strict=False):
            users = list(of)
            x, y = np.array([place[user] for user in users]), np.array([of[user] for user in users])
            ranks = with_ties(x), with_ties(y)
            differ = all(len(set(one.tolist())) > 1 for one in ranks)
            rho = f", rho {spearmanr(*ranks).statistic:+.2f}" if differ else ""
            panel.plot(x, y, ".", color=colour, alpha=0.25, markersize=4)
            for middle, mean, low, high in _thirds(x, y, users):
                panel.plot([middle, middle], [low, high], color=colour, linewidth=1)
                panel.plot(middle, mean, "s", color=colour, markersize=5)
            panel.plot([], [], "s", color=colour, label=f"{label}{rho}")
        panel.axhline(0, color="0.6", linewidth=0.8)
        panel.set_xlabel(what)
        panel.legend(fontsize=8, frameon=False)
    axes[0].set_ylabel(f"gain over plain, {metric}")
    file.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": "harness"}):
        figure.savefig(file, metadata={"Date": None})


def _thirds(x: np.ndarray, y: np.ndarray, users: Sequence[str]) -> list[tuple[float, float, float, float]]:
    """Of each third of the users by x: its median place, the mean gain, and the ends of its interval."""
    third = np.searchsorted(np.quantile(x, [1 / 3, 2 / 3], method="lower"), x, side="left")
    found = []
    for number in range(3):
        inside: list[int] = np.flatnonzero(third == number).tolist()
        if len(inside) > 1:
            low, high = gain_interval(y[inside], [users[i] for i in inside])
            found.append((float(np.median(x[inside])), float(y[inside].mean()), float(low), float(high)))
    return found
