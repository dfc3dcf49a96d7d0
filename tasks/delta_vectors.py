"""delta vectors: how far a user's history moves the residual stream at a query's last token, and the subspace it moves in.

Paper: Exploring Personalization Shifts in Representation Space of LLMs (anonymous ACL submission), section 2, Table 1 and
Figures 2 and 4. v_i = n_i - m_i for each user i: the residual leaving a block at the query's last token, its mean over the
user's queries, with the history in the prompt (n) minus without (m). No code read (it is not public).
What the paper leaves open, and what is done here:
- The history comes into the prompt by the method that is run: `--method rag --set k=1` is the paper's BM25 with the one item
  its template shows. Any other method is measured alike, against the task's plain prompt without its edits and adapters.
- "The 16th layer" is read as the output of block 15 of 32 (`hidden_states[16]`), so of block L/2 - 1 of L.
- Ranks are of the uncentred vectors (the collective shift is part of them), by variance; by sigma, and centred, beside it.
- The collective share and the cosine to the mean are of pairs of different users, since a user compared with a mean that holds
  their own vector agrees with it by 1/N; their intervals are jackknifes over users.
- Distances of Figure 4 are Euclidean, to the mean vector, in the subspace that holds 95 %.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from harness.data import Example, Labelled
from harness.errors import ContextTooLong, UsageError, UserFailed
from harness.plan import LAST_PROMPT, Site, Stream
from harness.plugins.registry import task_class, task_name
from harness.statistics import metrics
from harness.statistics.intervals import jackknife_interval
from harness.task import TOO_LARGE, GenerationDefaults, Metric, Sample, Selection, System, Task

SHARES = (0.8, 0.9, 0.95)
"""Of the energy, as in Table 1."""
COORDINATES, GROUP = 5, 10
"""Coordinates a user in Figure 2, and users a group in Figure 4."""
TEXT = 200
"""Characters kept of a user's text."""


class DeltaVectors(Task):
    """Ranks and collective shift of the users' difference vectors."""

    name = "delta_vectors"
    default_split = "train"
    reads_model = True

    def __init__(
        self, data: str | None = None, task: str = "lamp4", split_by: str = "user", layer: int | None = None
    ) -> None:
        """`task` asks the queries; `layer` is the 0-based block whose output is read, by default L/2 - 1 of L blocks."""
        name = task_name(task)
        if not name.startswith("lamp"):
            raise UsageError(f"delta_vectors: task={task} has no users with a history; choose one of lamp1 to lamp7")
        self.source: Task = task_class(name)(data, split_by)  # type: ignore[call-arg]
        self.layer = layer

    def items(self, selection: Selection) -> Sequence[Labelled]:
        return self.source.items(selection)

    def fingerprint(self, selection: Selection) -> str:
        return self.source.fingerprint(selection)

    def generation(self) -> GenerationDefaults:
        return GenerationDefaults(self.source.generation().max_new_tokens)

    def describe_data(self) -> str:
        return self.source.describe_data()

    def respond(self, system: System, items: Sequence[Labelled]) -> Iterator[Sample]:
        """One sample a query: its vector, and no answer. A query without room for any of its history is an error."""
        by_id = {item.example.id: item for item in items}
        if items and not any(_differs(system, item.example) for item in items[:GROUP]):
            raise UsageError(
                "delta_vectors: the method leaves every prompt as it is, so there is no difference; give one that does "
                "not, as in --method rag --set k=1"
            )
        layer = max(0, system.sites.layers // 2 - 1) if self.layer is None else self.layer
        site = system.sites.check(Site(layer, "block_out"))
        read = partial(self._read, system, site, by_id)
        for batch, name, sample in system.in_batches(list(by_id), read):
            item = by_id[name].example
            yield replace(sample or Sample(name, item.user.id, error=TOO_LARGE), batch=batch)

    def _read(self, system: System, site: Site, items: Mapping[str, Labelled], ids: Sequence[str]) -> list[Sample]:
        samples = {name: self._asked(system, items[name]) for name in ids}
        ready = [items[name].example for name in ids if not samples[name].error]
        both = [system.capture(ready, [site], LAST_PROMPT, plain=plain) if ready else [] for plain in (False, True)]
        for example, own, plain in zip(ready, *both, strict=True):
            delta = (own[site][0].double() - plain[site][0].double()).float().cpu().numpy()
            extra = {"layer": site.layer, "delta": base64.b64encode(delta.astype("<f4").tobytes()).decode()}
            sample = samples[example.id]
            samples[example.id] = replace(sample, response="", extra={**sample.extra, **extra})
        return [samples[name] for name in ids]

    def _asked(self, system: System, item: Labelled) -> Sample:
        """Without its vector."""
        example, pairs = item.example, item.example.user.pairs
        sample = Sample(example.id, example.user.id, targets=item.targets, finish="read")
        sample.extra = {"text": pairs[-1].targets[0][:TEXT]} if len(pairs) else {}
        try:
            prompt = system.prompt(example)
        except (ContextTooLong, UserFailed) as error:
            return replace(sample, error=str(error))
        if prompt.dropped and not prompt.items:
            return replace(sample, error="no history item fits the context")
        tokens = len(prompt.encoded.ids)
        return replace(sample, prompt_tokens=tokens, history_items=prompt.items, dropped_items=prompt.dropped)

    def grade(self, sample: Sample) -> Sample:
        if sample.error is not None:
            return sample
        norm = float(np.linalg.norm(_delta(sample)))
        return replace(sample, parsed=norm, metrics={"norm": norm})

    def aggregate(self, samples: Sequence[Sample]) -> Mapping[str, Metric]:
        graded = [sample for sample in samples if sample.metrics]
        users, vectors = _by_user(graded)
        if not users:
            return {
                f"rank{round(100 * share)}": Metric(None, 0, note="no vector was read") for share in (0.9, 0.8, 0.95)
            }
        found, most, n = subspace(vectors), min(vectors.shape), len(users)
        ranks = {share: ranks_of(found.sigma**2)[share] for share in (0.9, 0.8, 0.95)}
        made = {f"rank{round(100 * s)}": Metric(r, n, higher_is_better=False) for s, r in ranks.items()}
        made |= {
            f"per_mille{round(100 * s)}": Metric(1000 * r / most, n, higher_is_better=False) for s, r in ranks.items()
        }
        return made | _in_common(vectors) | {"norm": metrics.mean(graded, "norm")}

    def analysis(self, samples: Sequence[Sample]) -> Mapping[str, Any]:
        """`delta_vectors`: what Figures 2 and 4 show, users in the order of `users`."""
        graded = [sample for sample in samples if sample.metrics]
        users, vectors = _by_user(graded)
        if not users:
            return {}
        found = subspace(vectors)
        energy = np.cumsum(found.sigma**2) / np.sum(found.sigma**2)
        coordinates = vectors @ found.directions[:COORDINATES].T
        centred = vectors - vectors.mean(axis=0)
        inside = centred @ found.directions[: ranks_of(found.sigma**2)[0.95]].T
        distance = np.linalg.norm(inside, axis=1)
        order, middle = np.argsort(distance, kind="stable"), max(0, (len(users) - GROUP) // 2)
        groups = {"closest": order[:GROUP], "middle": order[middle : middle + GROUP], "farthest": order[-GROUP:]}
        named = {name: [users[i] for i in chosen] for name, chosen in groups.items()}
        shown = {user for group in named.values() for user in group}
        return {
            "delta_vectors": {
                "layer": graded[0].extra["layer"],
                "queries": len(graded),
                "width": vectors.shape[1],
                "dimensions": min(vectors.shape),
                "ranks": {
                    "variance": _named(ranks_of(found.sigma**2)),
                    "sigma": _named(ranks_of(found.sigma)),
                    "centred": _named(ranks_of(subspace(centred).sigma ** 2)),
                },
                "energy": _rounded(energy[: int(np.searchsorted(energy, 0.99)) + 1]),
                "mean": _rounded(coordinates.mean(axis=0)),
                "std": _rounded(coordinates.std(axis=0)),
                "users": users,
                "coordinates": [_rounded(row) for row in coordinates],
                "distance": _rounded(distance),
                **named,
                "texts": {s.user: s.extra["text"] for s in graded if s.user in shown and "text" in s.extra},
            }
        }


class Subspace(NamedTuple):
    """Principal directions of uncentred vectors."""

    sigma: np.ndarray
    """Singular values, falling, [min(N, D)]."""
    directions: np.ndarray
    """Orthonormal rows [min(N, D), D], each with the sign that makes the mean coordinate positive. One of no length where
    sigma is 0."""


def subspace(vectors: np.ndarray) -> Subspace:
    """The SVD of `vectors` [N, D] through the smaller Gram matrix, [D, D] or [N, N], in float64.

    sigma^2 are its eigenvalues. Below sqrt(eps) of the largest sigma they are rounding, and are 0 here.
    """
    wide = vectors.shape[0] < vectors.shape[1]
    values, basis = np.linalg.eigh(vectors @ vectors.T if wide else vectors.T @ vectors)
    values, basis = values[::-1], basis[:, ::-1].T
    noise = np.finfo(float).eps * max(vectors.shape) * max(float(values[0]), 0.0)
    sigma = np.sqrt(np.where(values > noise, values, 0.0))
    if wide:
        lengths = np.where(sigma > 0, sigma, np.inf)
        basis = basis @ vectors / lengths[:, None]
    signs = np.where(basis @ vectors.mean(axis=0) < 0, -1.0, 1.0)
    return Subspace(sigma, basis * signs[:, None])


def ranks_of(energy: np.ndarray) -> dict[float, int]:
    """How many of the components, `energy` falling, hold each of `SHARES` of the whole; 0 where there is none."""
    whole = float(energy.sum())
    held = np.cumsum(energy) / whole if whole else np.ones(1)
    return {share: int(np.searchsorted(held, share - 1e-12)) + 1 if whole else 0 for share in SHARES}


class Estimate(NamedTuple):
    """A number, and what it is without each user in turn."""

    value: float
    without: np.ndarray
    """[N], NaN where there is none."""


def collective_share(vectors: np.ndarray) -> Estimate:
    """|E v|^2 / E |v|^2 of vectors [N, D], N > 1: mean v_i . v_j of i != j by mean |v|^2.

    1 where all vectors are equal, 0 on average where their directions are random, and below 0 by chance.
    """
    products, energy = _of_pairs(vectors, vectors), _means((vectors**2).sum(axis=1))
    return Estimate(*_divided(products, energy))


def cosine_to_mean(vectors: np.ndarray) -> Estimate:
    """Mean cosine of a user's vector with the mean of all users: mean u_i . v_j of i != j by the root of mean v_i . v_j, where
    u_i is v_i at length 1 (a vector of no length has no direction, and counts 0). NaN where that root has none."""
    lengths = np.linalg.norm(vectors, axis=1)
    directions = vectors / np.where(lengths > 0, lengths, 1.0)[:, None]
    whole, without = (np.sqrt(np.where(part > 0, part, np.nan)) for part in _of_pairs(vectors, vectors))
    return Estimate(*_divided(_of_pairs(directions, vectors), (whole, without)))


Parts = tuple[Any, Any]
"""A mean, and the means without each user."""


def _of_pairs(a: np.ndarray, b: np.ndarray) -> Parts:
    """Mean of a_i . b_j over i != j, of [N, D] each."""
    n, sum_a, sum_b, own = len(a), a.sum(axis=0), b.sum(axis=0), (a * b).sum(axis=1)
    whole = sum_a @ sum_b - own.sum()
    without = whole - a @ sum_b - b @ sum_a + 2 * own
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.divide(whole, n * (n - 1)), np.divide(without, (n - 1) * (n - 2))


def _means(values: np.ndarray) -> Parts:
    n = len(values)
    with np.errstate(divide="ignore", invalid="ignore"):
        return values.mean(), np.divide(values.sum() - values, n - 1)


def _divided(above: Parts, below: Parts) -> tuple[float, np.ndarray]:
    """0 where there is nothing to divide by."""
    value, without = (
        np.where(under == 0, 0.0, over / np.where(under == 0, 1.0, under))
        for over, under in zip(above, below, strict=True)
    )
    return float(value), without


def _in_common(vectors: np.ndarray) -> dict[str, Metric]:
    """What the users' vectors share. The cosine needs a direction in common: a share whose interval lies above 0."""
    n = len(vectors)
    if n < 2:
        return {name: Metric(None, n, note="one user") for name in ("collective_share", "cosine_to_mean")}
    share, cosine = collective_share(vectors), cosine_to_mean(vectors)
    low, high = metrics.known(jackknife_interval(*share))
    found = Metric(share.value, n, low, high, note="0 where directions are random")
    ends = [min(max(end, -1.0), 1.0) for end in jackknife_interval(*cosine)]
    if share.value <= 0 or (low is not None and low <= 0):
        against = Metric(None, n, note="the users show no direction in common to hold them against")
    else:
        against = Metric(min(cosine.value, 1.0), n, *metrics.known(ends))
    return {"collective_share": found, "cosine_to_mean": against}


def _differs(system: System, example: Example) -> bool:
    """Whether the method asks for anything else than the plain prompt, or cannot say."""
    try:
        return system.plan(example).streams[0] != Stream(example.prompt())
    except UserFailed:
        return True


def _delta(sample: Sample) -> np.ndarray:
    """[D], float64."""
    return np.frombuffer(base64.b64decode(sample.extra["delta"]), dtype="<f4").astype(float)


def _by_user(graded: Sequence[Sample]) -> tuple[list[str], np.ndarray]:
    """Users in the order of their first query, and their mean vectors [N, D]."""
    own: dict[str, list[np.ndarray]] = {}
    for sample in graded:
        own.setdefault(sample.user, []).append(_delta(sample))
    return list(own), np.array([np.mean(deltas, axis=0) for deltas in own.values()])


def _named(ranks: Mapping[float, int]) -> dict[str, int]:
    return {str(share): rank for share, rank in ranks.items()}


def _rounded(values: np.ndarray) -> list[float]:
    """To five digits: a figure needs no more, and thousands of users stay readable."""
    return [float(f"{value:.5g}") for value in values]
