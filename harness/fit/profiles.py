"""Users as points: embeddings of their history, clusters of them, and the distance of a new user to each cluster.

`tfidf` needs no download: TF-IDF over words, reduced by truncated SVD (scikit-learn), one text a user. `minilm` is
sentence-transformers/all-MiniLM-L6-v2 or what $HARNESS_ENCODER names, the mean over a user's items (optional extra `dense`).
Both are L2-normalised.
The fitted state is numbers only, so that users who were not there at the fit are placed among the same clusters.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from harness.data import User
from harness.errors import HarnessError, UsageError
from harness.plugins.retrieve import Encoder, identity_of_encoder, sentence_encoder

Embedding = Literal["tfidf", "minilm"]

MOST_ITEMS = 100
"""Newest items of a history that are embedded."""
_DIMENSIONS, _WORDS = 64, 20_000
_MINILM = "sentence-transformers/all-MiniLM-L6-v2"


@dataclass(frozen=True)
class UserClusters:
    """k-means over users, with what places further users."""

    labels: tuple[int, ...]
    """Cluster of each user of the fit, in their order."""
    tensors: dict[str, Any]
    """`centroids` [C, D]; for tfidf also `idf` [W] and `components` [D, W]. torch, float32."""
    meta: dict[str, Any]


def cluster_users(users: Sequence[User], count: int, embedding: Embedding, seed: int) -> UserClusters:
    """Raises UsageError where there are fewer users with a history than clusters."""
    from sklearn.cluster import KMeans

    if len(users) < count:
        raise UsageError(f"{count} clusters asked for of {len(users)} users; give fewer (--set clusters=...)")
    tensors, meta = _fit(users, embedding, seed)
    points = embed(users, tensors, meta)
    import torch

    means = KMeans(count, n_init=10, random_state=_seed32(seed)).fit(points)
    return UserClusters(
        labels=tuple(int(label) for label in means.labels_),
        tensors={
            name: torch.from_numpy(np.ascontiguousarray(value, dtype=np.float32))
            for name, value in {**tensors, "centroids": means.cluster_centers_}.items()
        },
        meta=meta,
    )


def distances(users: Sequence[User], tensors: dict[str, Any], meta: dict[str, Any]) -> np.ndarray:
    """Euclidean distance of each user to each centroid, [n, C]; users without a history are at the origin."""
    points = embed(users, tensors, meta)
    return np.linalg.norm(points[:, None] - np.asarray(tensors["centroids"])[None], axis=-1)


def embed(users: Sequence[User], tensors: dict[str, Any], meta: dict[str, Any]) -> np.ndarray:
    """[n, D], L2-normalised."""
    if meta["embedding"] == "minilm":
        encode = sentence_encoder(meta["encoder"], "embedding minilm")
        points = np.stack([_mean(encode, [r.document for r in user.history[-MOST_ITEMS:]]) for user in users])
    else:
        words = {word: column for column, word in enumerate(meta["vocabulary"])}
        counts = _vectorizer(words).transform([_text(user) for user in users])
        weighted = counts.multiply(np.asarray(tensors["idf"])[None]).tocsr()
        points = np.asarray(weighted @ np.asarray(tensors["components"]).T)
    return points / np.maximum(np.linalg.norm(points, axis=1, keepdims=True), 1e-12)


def encoder_identity() -> str:
    """What `minilm` embeds with, for a record."""
    return identity_of_encoder(_encoder_name())


def _encoder_name() -> str:
    return os.environ.get("HARNESS_ENCODER", _MINILM)


def _fit(users: Sequence[User], embedding: Embedding, seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
    if embedding == "minilm":
        # kept, so that later users are never embedded by another encoder than the centroids were
        return {}, {"embedding": "minilm", "encoder": _encoder_name()}
    from sklearn.decomposition import TruncatedSVD

    counter = _vectorizer(None)
    try:
        counts = counter.fit_transform([_text(user) for user in users])
    except ValueError as error:
        raise HarnessError(f"profiles cannot be embedded: {error}") from error
    idf = np.log((1 + counts.shape[0]) / (1 + np.bincount(counts.indices, minlength=counts.shape[1]))) + 1
    size = min(_DIMENSIONS, min(counts.shape) - 1)
    if size < 1:
        raise HarnessError("profiles cannot be embedded: they hold fewer than two different words")
    svd = TruncatedSVD(size, random_state=_seed32(seed)).fit(counts.multiply(idf[None]).tocsr())
    tensors = {"idf": idf.astype(np.float32), "components": svd.components_.astype(np.float32)}
    return tensors, {"embedding": "tfidf", "vocabulary": list(counter.get_feature_names_out())}


def _seed32(seed: int) -> int:
    """A seed as scikit-learn takes it, below 2^32: itself where it is that already, else hashed."""
    return seed if seed < 2**32 else int.from_bytes(hashlib.sha256(str(seed).encode()).digest()[:4], "little")


def _vectorizer(vocabulary: dict[str, int] | None) -> Any:
    from sklearn.feature_extraction.text import CountVectorizer

    return CountVectorizer(vocabulary=vocabulary, max_features=None if vocabulary else _WORDS, dtype=np.float64)


def _text(user: User) -> str:
    return "\n".join(record.document for record in user.history[-MOST_ITEMS:])


def _mean(encode: Encoder, texts: Sequence[str]) -> np.ndarray:
    return encode(list(texts)).mean(axis=0) if texts else encode([""])[0] * 0
