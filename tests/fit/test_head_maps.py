"""What the record says of head maps: overlaps by hand on two heads or four, and small enough to keep."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from harness.fit.head_maps import across_k, across_users, by_user, chance, describe, jaccard, rounded, top
from harness.method import Fitted
from harness.methods.dps import DPS
from harness.records.store import find_runs, json_value

A, B, C = [3.0, 2.0, 1.0, 0.0], [3.0, 0.0, 2.0, 1.0], [0.0, 1.0, 2.0, 3.0]


def test_the_jaccard_index_is_what_two_sets_share_of_what_either_holds():
    sets = top(np.array([A, B, C]), 2)  # {0, 1}, {0, 2}, {2, 3}
    assert jaccard(sets, sets) == pytest.approx(np.array([[1, 1 / 3, 0], [1 / 3, 1, 1 / 3], [0, 1 / 3, 1]]))
    assert jaccard(sets[:1] & False, sets[:1] & False) == 0


def test_heads_that_were_not_measured_are_in_no_set_and_ties_go_by_the_heads_order():
    assert top(np.array([[np.nan, 1.0, 1.0, np.nan]]), 3).tolist() == [[False, True, True, False]]
    assert top(np.array([[1.0, 1.0, 1.0]]), 2).tolist() == [[True, True, False]]


def test_overlap_between_users_stands_beside_that_of_random_sets():
    found = across_users(np.array([A, B, C]), 2)
    assert (found["k"], found["users"], found["mean"]) == (2, 3, pytest.approx(2 / 9, abs=1e-4))
    assert found["quantiles"] == pytest.approx([0, 1 / 6, 1 / 3, 1 / 3, 1 / 3], abs=1e-4)
    assert sum(found["histogram"]) == 3 and found["histogram"][0] == 1 and found["histogram"][6] == 2
    # of the 6 sets of two of four heads one is equal, four share one head, one shares none
    assert chance(4, 2) == pytest.approx((1 + 4 / 3 + 0) / 6)
    draws = np.random.default_rng(0).random((2000, 50))
    values = jaccard(top(draws[:1000], 7), top(draws[1000:], 7))
    assert values.mean() == pytest.approx(chance(50, 7), rel=0.01)


def test_halves_of_alike_samples_agree_at_every_k_and_users_only_where_they_are_alike():
    scores = np.array([A, A, A, A])
    found = across_k(scores, np.array([A, C]), [1, 2, 4])
    assert found["halves"] == pytest.approx(np.array([[1, 1 / 2, 1 / 4], [1 / 2, 1, 1 / 2], [1 / 4, 1 / 2, 1]]))
    assert found["users"] == [0, 0, 1]
    assert found["chance"][-1] == 1


def test_a_users_map_is_the_mean_of_their_samples():
    maps = by_user(np.array([A, B, C]), ["u", "v", "u"])
    assert list(maps) == ["u", "v"]
    assert maps["u"].tolist() == [1.5, 1.5, 1.5, 1.5]
    assert rounded(np.array([[123456.0, 0.000123456]])) == [[123500.0, 0.0001235]]
    one_user = describe(np.array([[A], [B]]), ["u", "u"], [(0, 0)])
    assert json_value(one_user["intervals"]) == [[None, None]]
    assert "across_users" not in one_user


@pytest.mark.parametrize("clusters", [0, 8])
def test_the_analysis_of_a_model_of_1024_heads_stays_under_200_kb(clusters: int) -> None:
    samples, layers, heads = 50, 32, 32
    pcs = torch.randn(samples, layers, heads, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mean = pcs.mean(0).flatten()
    order = mean.argsort(descending=True).tolist()
    meta = {
        "heads": [list(divmod(i, heads)) for i in order],
        "scores": mean[order].tolist(),
        "layers": layers,
        "heads_a_layer": heads,
        "users": [f"user {i}" for i in range(samples)],
        "cluster_of_sample": [i % 8 for i in range(samples)],
        "cluster_users": [10] * 8,
        "embedding": "tfidf",
    }
    personal = {f"user {i}": Fitted({"distances": torch.full((8,), 0.5)}) for i in range(3 if clusters else 0)}
    found = DPS(clusters=clusters).analysis(Fitted({"pcs": pcs}, meta), personal)
    assert len(json.dumps(json_value(found))) < 100_000
    assert found["k"] == len(found["intervals"]) == len(found["controls"]["random_heads"]) or clusters
    if clusters:
        assert found["clusters"]["effective"]["mean"] == pytest.approx(8)


def test_a_curve_over_k_reuses_one_discovery_and_its_records_hold_the_maps(harness: Callable, toy: Path) -> None:
    run = f"run --method dps --task lamp3 --model {toy} --limit 2 --max_new_tokens 2 --allow_noop"
    run += " --set samples=4 --set k=1 --set clusters=2"
    first = harness(f"{run} --set heads=1")
    assert "reusing" not in first.err
    for setting in ("heads=3", "routing=hard", "control=random_heads"):
        assert "reusing the fitted state" in harness(f"{run} --set {setting}").err
    records = {
        (r.config.method.options["heads"], r.config.method.options["routing"]): r for r in find_runs(Path("runs"))
    }
    one, three, hard = (records[key].analysis for key in [(1, "soft"), (3, "soft"), (None, "hard")])
    assert (one["k"], three["k"]) == (1, 3)
    assert one["heads"] == three["heads"] and len(one["heads"]) == 12
    assert one["pcs"] == three["pcs"] and np.array(one["pcs"]).shape == (3, 4)
    assert len(one["users"]) == 4 and one["across_users"]["users"] == 4
    assert one["clusters"]["effective"]["mean"] > 1 == hard["clusters"]["effective"]["mean"]
    assert sum(one["clusters"]["samples"]) == 4
    lines = [line for line in (records[1, "soft"].folder / "run.json").read_text().splitlines() if '"pcs"' in line]
    assert len(lines) == 1 and lines[0].startswith('  "pcs": [[')
