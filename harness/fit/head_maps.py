"""What maps of head scores show, as values for a record: the maps, and how far sets of top heads agree.

Paper: Zhang et al., Preference Heads in Large Language Models, Figures 3, 4 and 7. Sets of different K cut from one
ranking are nested, and their Jaccard index is K1 / K2 whatever the ranking; so the sets compared over K come from
disjoint halves of the samples. Beside every mean stands `chance`, that of sets drawn at random. Scores are [n, layers,
heads], flat maps [n, heads of all layers], NaN where a head was not measured. numpy and scipy only.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np

from harness.fit.heads import Head
from harness.statistics.intervals import mean_interval

BINS = 20
"""Equal parts of 0 to 1 in a histogram of Jaccard indices."""
SHOWN_USERS = 4


def describe(scores: np.ndarray, users: Sequence[str], chosen: Sequence[Head]) -> dict[str, Any]:
    """Of scores [n, layers, heads] whose row i is from user users[i], with the top heads `chosen`:

    pcs           the mean map
    intervals     95 % intervals of the chosen heads' means, over users
    users         the maps of up to SHOWN_USERS users, a fixed draw (Figure 3)
    across_users  how far users' top heads agree (Figure 4)
    across_k      the same for other K, and between halves of the samples (Figure 7)
    """
    maps = by_user(scores, users)
    shown = random.Random(0).sample(list(maps), min(SHOWN_USERS, len(maps)))
    found: dict[str, Any] = {
        "pcs": rounded(scores.mean(axis=0)),
        "intervals": [rounded(np.array(mean_interval(scores[:, layer, head], users))) for layer, head in chosen],
        "users": {user: rounded(maps[user]) for user in shown},
    }
    if len(maps) > 1:
        flat = np.stack([user_map.ravel() for user_map in maps.values()])
        ks = {len(chosen), *(2**n for n in range(_measured(flat).bit_length() - 1))}
        found["across_users"] = across_users(flat, len(chosen))
        found["across_k"] = across_k(scores.reshape(len(scores), -1), flat, sorted(ks))
    return found


def across_users(maps: np.ndarray, k: int) -> dict[str, Any]:
    """Of the pairwise Jaccard indices of each user's `k` best heads, maps [users, heads]: mean, histogram, quantiles."""
    sets = top(maps, k)
    values = jaccard(sets, sets)[np.triu_indices(len(sets), 1)]
    return {
        "k": k,
        "users": len(maps),
        "mean": rounded(values.mean()),
        "quantiles": rounded(np.quantile(values, (0, 0.25, 0.5, 0.75, 1))),
        "histogram": np.histogram(values, BINS, (0, 1))[0].tolist(),
        "chance": rounded(chance(_measured(maps), k)),
    }


def across_k(scores: np.ndarray, maps: np.ndarray, ks: Sequence[int]) -> dict[str, Any]:
    """Mean Jaccard indices for each of `ks`: between users (maps [users, heads]), and between halves of the samples.

    Entry i, j of `halves` compares the ks[i] best heads of one half of the scores [n, heads] with the ks[j] of the other.
    """
    between = [jaccard(sets, sets)[np.triu_indices(len(sets), 1)].mean() for sets in (top(maps, k) for k in ks)]
    return {
        "k": list(ks),
        "users": rounded(np.array(between)),
        "halves": rounded(_halves(scores, ks)),
        "chance": rounded(np.array([chance(_measured(maps), k) for k in ks])),
    }


def top(maps: np.ndarray, k: int) -> np.ndarray:
    """The k heads of highest score in each map, as booleans of its shape; equal scores in order of the heads."""
    best = np.argsort(-maps, axis=1, kind="stable")[:, :k]  # NaN is sorted last
    chosen = np.zeros(maps.shape, dtype=bool)
    np.put_along_axis(chosen, best, True, axis=1)
    return chosen & ~np.isnan(maps)


def jaccard(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Jaccard index of every set of `a` [n, heads] with every one of `b` [m, heads]: [n, m]; 0 of two empty sets."""
    both = a.astype(float) @ b.T.astype(float)
    either = a.sum(axis=1)[:, None] + b.sum(axis=1)[None] - both
    return both / np.maximum(either, 1)


def chance(heads: int, k: int) -> float:
    """Mean Jaccard index of two sets of k drawn at random from `heads`."""
    from scipy.stats import hypergeom

    shared = np.arange(k + 1)
    return float((hypergeom(heads, k, k).pmf(shared) * shared / (2 * k - shared)).sum())


def by_user(scores: np.ndarray, users: Sequence[str]) -> dict[str, np.ndarray]:
    """Mean of each user's samples, scores [n, ...]; users in order of their first sample."""
    return {user: scores[[u == user for u in users]].mean(axis=0) for user in dict.fromkeys(users)}


def rounded(values: np.ndarray | float, digits: int = 4) -> Any:
    """Nested lists with that many significant digits, so that a record stays small."""
    array = np.asarray(values, dtype=float)
    return [rounded(part, digits) for part in array] if array.ndim else float(f"{array:.{digits}g}")


def _halves(scores: np.ndarray, ks: Sequence[int], *, splits: int = 20) -> np.ndarray:
    random = np.random.Generator(np.random.Philox(0))
    total = np.zeros((len(ks), len(ks)))
    for _ in range(splits):
        parts = np.array_split(random.permutation(len(scores)), 2)
        one, other = (scores[part].mean(axis=0, keepdims=True) for part in parts)
        a, b = (np.concatenate([top(mean, k) for k in ks]) for mean in (one, other))
        total += (jaccard(a, b) + jaccard(b, a)) / 2
    return total / splits


def _measured(maps: np.ndarray) -> int:
    return int((~np.isnan(maps[0])).sum())
