"""Difference vectors of users: the SVD, the ranks and the collective shift, and that they are read where the paper says."""

from __future__ import annotations

import base64
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from harness.engine.decode import Decoder
from harness.fit.kit import ModelKit
from harness.methods.reft import ReFT
from harness.plan import LAST_PROMPT, Plan, Site, Stream
from harness.records.store import read_record, read_samples
from harness.run.cell import Settings, grid
from harness.run.contract import random_lm, toy_examples
from harness.run.steps import run_cell
from harness.run.system import ModelSystem
from harness.task import Generation, Sample
from harness.tasks.delta_vectors import (
    DeltaVectors,
    collective_share,
    cosine_to_mean,
    ranks_of,
    subspace,
)


def _vectors(users: int, width: int, shift: float = 0.0) -> np.ndarray:
    random = np.random.default_rng(0)
    return random.normal(size=(users, width)) * np.linspace(3, 0.1, width) + shift


@pytest.mark.parametrize(("users", "width"), [(40, 12), (12, 40), (20, 20)])
def test_the_gram_matrix_gives_the_ranks_and_directions_of_the_full_svd(users: int, width: int) -> None:
    vectors = _vectors(users, width, shift=0.5)
    found = subspace(vectors)
    _, sigma, directions = np.linalg.svd(vectors, full_matrices=False)
    np.testing.assert_allclose(found.sigma, sigma, atol=1e-9)
    np.testing.assert_allclose(np.abs((found.directions * directions).sum(axis=1)), 1, atol=1e-9)
    assert ranks_of(found.sigma**2) == ranks_of(sigma**2)
    assert (found.directions @ vectors.mean(axis=0) >= 0).all()


def test_vectors_in_a_line_have_rank_one_and_none_have_rank_zero() -> None:
    line = np.outer([1.0, 2.0, -1.0], [3.0, 4.0, 0.0, 0.0])
    found = subspace(line)
    assert (found.sigma > 0).tolist() == [True, False, False]
    np.testing.assert_allclose(found.directions[0], [0.6, 0.8, 0, 0], atol=1e-12)
    assert set(ranks_of(found.sigma**2).values()) == {1}
    assert set(ranks_of(subspace(np.zeros((3, 4))).sigma).values()) == {0}


def test_a_rank_is_the_fewest_components_that_hold_the_share() -> None:
    assert ranks_of(np.array([8.0, 1.0, 0.5, 0.5])) == {0.8: 1, 0.9: 2, 0.95: 3}


def test_a_shift_that_all_users_share_is_in_the_uncentred_rank_alone() -> None:
    vectors = _vectors(200, 30, shift=20.0)
    centred = vectors - vectors.mean(axis=0)
    assert ranks_of(subspace(vectors).sigma ** 2)[0.9] == 1
    assert ranks_of(subspace(centred).sigma ** 2)[0.9] > 5


def test_the_collective_share_is_of_pairs_of_different_users() -> None:
    v = np.array([1.0, -2.0, 2.0])
    assert collective_share(np.array([v, v, v])).value == pytest.approx(1)
    assert collective_share(np.array([v, -v])).value == pytest.approx(-1)
    assert collective_share(np.array([v, 3 * v])).value == pytest.approx(3 / 5)  # 3 |v|^2 / mean(|v|^2, |3 v|^2)
    assert collective_share(np.zeros((3, 2))).value == 0


def test_the_cosine_to_the_mean_is_that_to_the_mean_of_all_users_there_are() -> None:
    v = np.array([1.0, -2.0, 2.0])
    assert cosine_to_mean(np.array([v, v, v])).value == pytest.approx(1)
    # the shared direction is an axis and the users' own a random one: |mu| / E |v| of users alike in length
    random = np.random.default_rng(0)
    own = random.normal(size=(20_000, 40))
    own *= 3 / np.linalg.norm(own, axis=1)[:, None]
    vectors = own + np.eye(40)[0] * 2
    wanted = float((vectors[:, 0] / np.linalg.norm(vectors, axis=1)).mean())
    found = [cosine_to_mean(vectors[50 * k : 50 * k + 50]).value for k in range(400)]
    assert np.mean(found) == pytest.approx(wanted, abs=0.005)


@pytest.mark.parametrize("statistic", [collective_share, cosine_to_mean])
def test_what_is_left_without_a_user_is_what_the_others_give(statistic: Callable) -> None:
    vectors = _vectors(9, 4, shift=2.0)
    without = [statistic(np.delete(vectors, user, axis=0)).value for user in range(9)]
    np.testing.assert_allclose(statistic(vectors).without, without)


def test_the_shared_share_lies_in_its_interval_and_users_without_one_have_no_cosine() -> None:
    found = DeltaVectors().aggregate([_sample(f"u{n}", 0, row.tolist()) for n, row in enumerate(_vectors(60, 8, 1.0))])
    for name in ("collective_share", "cosine_to_mean"):
        assert 0 < found[name].low < found[name].value < found[name].high <= 1
    none = DeltaVectors().aggregate([_sample(f"u{n}", 0, row.tolist()) for n, row in enumerate(_vectors(60, 8))])
    assert none["collective_share"].low < 0 < none["collective_share"].high
    assert none["cosine_to_mean"].value is None and "no direction in common" in none["cosine_to_mean"].note
    one = DeltaVectors().aggregate([_sample("u", 0, [1.0, 2.0])])
    assert one["collective_share"].value is None and one["collective_share"].note == "one user"


def _sample(user: str, number: int, delta: list[float]) -> Sample:
    extra = {"layer": 1, "delta": base64.b64encode(np.array(delta, "<f4").tobytes()).decode(), "text": f"by {user}"}
    return DeltaVectors().grade(Sample(f"{user}/{number}", user, response="", extra=extra))


def test_per_mille_is_of_the_smaller_of_users_and_width_and_queries_are_averaged_by_user() -> None:
    random = np.random.default_rng(1)
    samples = [_sample(f"u{u}", q, random.normal(size=8).tolist()) for u in range(5) for q in range(2)]
    found = DeltaVectors().aggregate(samples)
    vectors = np.array([[sample.metrics["norm"] for sample in samples if sample.user == f"u{u}"] for u in range(5)])
    assert found["rank90"].n == 5 and found["norm"].n == 10
    assert found["norm"].value == pytest.approx(vectors.mean())
    assert found["per_mille90"].value == 1000 * found["rank90"].value / 5
    shown = DeltaVectors().analysis(samples)["delta_vectors"]
    assert shown["dimensions"] == 5 and shown["width"] == 8 and shown["users"] == [f"u{u}" for u in range(5)]
    assert np.array(shown["coordinates"]).shape == (5, 5)
    np.testing.assert_allclose(np.mean(shown["coordinates"], axis=0), shown["mean"], atol=1e-3)


def test_figure_4_names_the_users_nearest_to_the_collective_shift_and_farthest_from_it() -> None:
    samples = [_sample(f"u{n:02}", 0, [10.0, float(n), -0.1 * n]) for n in range(40)]
    shown = DeltaVectors().analysis(samples)["delta_vectors"]
    assert set(shown["closest"]) == {f"u{n:02}" for n in range(15, 25)}
    assert set(shown["farthest"]) == {f"u{n:02}" for n in (*range(5), *range(35, 40))}
    assert len({*shown["closest"], *shown["middle"], *shown["farthest"]}) == 30 == len(shown["texts"])


def test_a_failed_query_is_left_out_and_counted() -> None:
    failed = DeltaVectors().grade(Sample("a/0", "a", error="too long"))
    assert DeltaVectors().aggregate([failed])["rank90"].value is None
    assert DeltaVectors().analysis([failed]) == {}


def test_the_vector_is_what_the_history_adds_at_the_last_prompt_token_of_its_block(tmp_path: Path) -> None:
    lm = random_lm(dtype=torch.float32)
    lm.revision = "random"
    settings = Settings(split="dev", limit=5, output_path=tmp_path, batch_size=2, max_new_tokens=3)
    (cell,) = grid(["rag"], ["delta_vectors"], settings, ["k=1"], ["task=lamp3", "layer=0"])
    outcome = run_cell(lm, cell)
    read = {}
    decoder = Decoder(lm)
    for item in cell.items:
        plans = cell.method.plan(item.example, None, None), Plan((Stream(item.example.prompt()),))
        ends = []
        for plan in plans:
            ids = decoder.prepare("x", plan, 3).prompts[0].encoded.ids
            hidden = lm.model(torch.tensor([ids]), output_hidden_states=True).hidden_states
            ends.append(hidden[1][0, -1].detach())
        read[item.example.id] = (ends[0] - ends[1]).numpy()
    samples = read_samples(outcome.folder)
    assert {sample.id for sample in samples} == set(read)
    for sample in samples:
        found = np.frombuffer(base64.b64decode(sample.extra["delta"]), "<f4")
        np.testing.assert_allclose(found, read[sample.id], atol=2e-5)
    record = read_record(outcome.folder)
    assert record.analysis["delta_vectors"]["layer"] == 0 and record.metrics["rank90"].n == 5


def test_a_method_that_leaves_prompts_alone_is_refused_in_one_line(harness: Callable, toy: Path) -> None:
    done = harness(f"run --method plain --task delta_vectors --limit 2 --model {toy}")
    assert done.code == 2 and "give one that does not, as in --method rag --set k=1" in done.error()
    done = harness(f"run --method rag --task delta_vectors --task_set task=mmlu --model {toy}")
    assert done.code == 2 and "task=mmlu has no users with a history" in done.error()


def test_the_plain_prompt_is_read_without_the_methods_edits() -> None:
    lm = random_lm()
    method = ReFT(start="random", epochs=0)
    (example,) = [item.example for item in toy_examples(1, seed=3)]
    (state,) = method.adapt(ModelKit(lm), [example.user], None)
    system = ModelSystem(lm, method, Generation(3), personal={example.user.id: state})
    site = Site(lm.sites.layers - 1, "block_out")
    (edited,), (plain,) = (system.capture([example], [site], LAST_PROMPT, plain=plain) for plain in (False, True))
    (bare,) = ModelSystem(lm, ReFT(), Generation(3)).capture([example], [site], LAST_PROMPT)
    assert torch.equal(plain[site], bare[site]) and not torch.allclose(edited[site], bare[site])
