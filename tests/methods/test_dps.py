"""DPS by hand: who is masked, by how much, for whom; and what its controls and clusters change."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import numpy as np
import pytest
import torch

from harness.data import User
from harness.engine.encoder import Encoded
from harness.engine.model import LanguageModel
from harness.engine.prompt_variants import score_variants
from harness.errors import HarnessError, UsageError
from harness.fit.artifacts import ArtifactStore
from harness.fit.heads import mask
from harness.fit.kit import ModelKit
from harness.fit.profiles import cluster_users, distances
from harness.fit.states import shared_state
from harness.method import Fitted
from harness.methods.dps import DPS
from harness.plan import ALL, DECODE, Plan, Site, Where
from harness.plugins.options import rebuild_method
from harness.plugins.retrieve import _content_hash
from harness.run.cell import Settings, grid
from harness.run.console import Console
from harness.run.contract import check_method, random_lm, toy_examples


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return random_lm("llama")


def _state(pcs: torch.Tensor, **meta: object) -> Fitted:
    mean = pcs.mean(0)
    order = mean.flatten().argsort(descending=True, stable=True).tolist()
    heads = [[i // mean.shape[1], i % mean.shape[1]] for i in order]
    scores = [float(mean[layer, head]) for layer, head in heads]
    return Fitted(
        {"pcs": pcs},
        {
            "heads": heads,
            "scores": scores,
            "head_dim": 4,
            "layers": mean.shape[0],
            "heads_a_layer": mean.shape[1],
            "split_half_spearman": 1.0,
            **meta,
        },
    )


def _masked(plan: Plan) -> dict[tuple[int, int], float]:
    return {(e.site.layer, head): scale for e in plan.streams[1].edits for head, scale in e.scales}  # type: ignore[attr-defined]


PCS = torch.tensor(
    [[[4.0, 0.0], [1.0, -1.0]], [[0.0, 2.0], [1.0, -1.0]]], dtype=torch.float64
)  # 2 samples, 2 x 2 heads


def test_the_k_heads_of_highest_mean_pcs_are_silenced_from_the_last_prompt_token_on():
    example = toy_examples(6)[0].example
    plan = DPS(heads=2).plan(example, _state(PCS), None)
    assert _masked(plan) == {(0, 0): 0.0, (0, 1): 0.0}  # means 2 and 1; (1, 0) ties with (0, 1) and stands behind it
    assert not plan.streams[0].edits
    assert {repr(edit.where) for edit in plan.streams[1].edits} == {"DECODE"}


def test_a_users_clusters_scale_heads_by_one_minus_their_weight():
    example = toy_examples(6)[0].example
    state = _state(PCS, cluster_of_sample=[0, 1])
    method = DPS(clusters=2, heads=2, temperature=1.0)
    near_first = Fitted({"distances": torch.tensor([0.0, 1.0], dtype=torch.float64)})
    # cluster 0: (0,0) 4 -> 1, (1,0) 1 -> .25; cluster 1: (0,1) 2 -> 1, (1,0) 1 -> .5
    share = float(torch.tensor([0.0, -1.0], dtype=torch.float64).softmax(-1)[0])
    assert _masked(method.plan(example, state, near_first)) == pytest.approx(
        {(0, 0): 1 - share, (0, 1): share, (1, 0): 1 - (0.25 * share + 0.5 * (1 - share))}
    )
    hard = replace(method, routing="hard").plan(example, state, near_first)
    assert _masked(hard) == {(0, 0): 0.0, (1, 0): 0.75}


def test_random_heads_are_others_and_stay_and_a_random_mask_changes_from_example_to_example():
    examples = [item.example for item in toy_examples(6)]
    pcs = torch.rand(3, 4, 8, dtype=torch.float64)
    state, method = _state(pcs), DPS(heads=3)
    true = set(_masked(method.plan(examples[0], state, None)))
    random_heads = [set(_masked(replace(method, control="random_heads").plan(e, state, None))) for e in examples]
    assert random_heads[0] == random_heads[1]
    assert not random_heads[0] & true
    assert random_heads[0] != set(
        _masked(replace(method, control="random_heads", draw=1).plan(examples[0], state, None))
    )
    masks = [set(_masked(replace(method, control="random_mask").plan(e, state, None))) for e in examples]
    assert {len(mask) for mask in [*masks, *random_heads]} == {3}
    assert masks[0] != masks[1]


def test_users_who_write_about_the_same_things_share_a_cluster_and_a_newcomer_joins_them():
    def user(name: str, text: str) -> User:
        history = toy_examples(6)[0].example.user.history
        return User(name, tuple(replace(record, document=f"{text} {i}") for i, record in enumerate(history)))

    gardeners = [user(f"g{i}", f"roses soil seeds spade water{i}") for i in range(4)]
    sailors = [user(f"s{i}", f"boat wind harbor anchor wave{i}") for i in range(4)]
    made = cluster_users([*gardeners, *sailors], 2, "tfidf", 0)
    assert len(set(made.labels[:4])) == len(set(made.labels[4:])) == 1 != len(set(made.labels))
    far = distances([user("new", "seeds and soil"), User("empty")], dict(made.tensors), dict(made.meta))
    assert far[0].argmin() == made.labels[0]
    assert far.shape == (2, 2)
    for seed in (2**32 - 1, 2**32, 2**63 - 1):  # every seed that --seed takes
        labels = cluster_users([*gardeners, *sailors], 2, "tfidf", seed).labels
        assert len(set(labels[:4])) == len(set(labels[4:])) == 1 != len(set(labels))


def test_users_are_placed_by_the_encoder_that_made_the_centroids_and_the_record_names_it(monkeypatch):
    asked = []

    def encoder(name: str, wanted_by: str) -> Callable:
        asked.append(name)
        return lambda texts: np.array([[text.count("e"), text.count("o")] for text in texts], dtype=float)

    monkeypatch.setattr("harness.fit.profiles.sentence_encoder", encoder)
    monkeypatch.setenv("HARNESS_ENCODER", "some/other-encoder")
    train, method = toy_examples(6), DPS(clusters=2, samples=6, embedding="minilm")
    shared = method.fit(kit := ModelKit(random_lm()), train)
    monkeypatch.delenv("HARNESS_ENCODER")
    (state,) = method.adapt(kit, [train[0].example.user], shared)
    assert state is not None and state.tensors["distances"].shape == (2,)
    assert set(asked) == {"some/other-encoder"}
    assert method.analysis(shared, {"0": state})["clusters"]["embedded_by"] == "other-encoder"
    tfidf = replace(method, embedding="tfidf")
    assert tfidf.analysis(tfidf.fit(kit, train), {})["clusters"]["embedded_by"] == "tfidf"


def test_profiles_embedded_by_another_encoder_are_another_run(monkeypatch, tmp_path):
    method = DPS(clusters=2, embedding="minilm")
    plain, named = DPS().options(), method.options()
    assert "profile_encoder" not in plain and "profile_encoder" not in DPS(clusters=2).options()
    (tmp_path / "weights").write_text("1")
    monkeypatch.setenv("HARNESS_ENCODER", str(tmp_path))
    other = method.options()
    (tmp_path / "more").write_text("2")
    _content_hash.cache_clear()
    assert len({options["profile_encoder"] for options in (named, other, method.options())}) == 3
    assert rebuild_method(DPS, named) == replace(method, screen=None)


def test_dps_with_clusters_keeps_the_engines_promises():
    check_method(DPS(clusters=2, samples=4, heads=3))


def test_one_discovery_serves_all_clusters(lm):
    train = toy_examples(6)
    method = DPS(clusters=2, samples=len(train))
    calls = []
    kit = ModelKit(lm, progress=lambda label, done, total: calls.append((label, done, total)))
    shared = method.fit(kit, train)
    assert [(done, total) for label, done, total in calls if label.startswith("head discovery")] == [
        (done, len(train)) for done in range(len(train) + 1)
    ]
    plain = replace(method, clusters=0).fit(ModelKit(lm), train)
    assert torch.equal(shared.tensors["pcs"], plain.tensors["pcs"])
    assert sum(shared.meta["cluster_users"]) == len({item.example.user.id for item in train})


def test_a_cluster_without_samples_is_an_error_and_a_small_one_a_warning():
    with pytest.raises(HarnessError, match="cluster 1"):
        DPS(clusters=2).review(_state(PCS, cluster_of_sample=[0, 0]))
    (line,) = DPS(clusters=2, heads=1).review(_state(PCS, cluster_of_sample=[0, 1]))
    assert "1 samples" in line


def test_clusters_that_change_nothing_are_a_warning():
    idle = torch.stack([PCS[0], -PCS[1].abs() - 1])  # nothing helps the second user, the mean still has a best head
    lines = DPS(clusters=2, heads=1).review(_state(idle, cluster_of_sample=[0, 1]))
    assert any("in 1 of 2 clusters masking no head raises" in line for line in lines)
    lines = DPS(clusters=2, heads=1).review(_state(PCS[[0, 0]], cluster_of_sample=[0, 1]))
    assert any("all clusters have the same heads and weights" in line for line in lines)


def test_random_heads_of_a_clustered_user_are_no_other_clusters_preference_heads_either():
    pcs = torch.zeros(2, 2, 4, dtype=torch.float64)
    pcs[0, 0, :2], pcs[1, 1, :2] = 1, 1  # the two clusters' heads are those of different layers
    state, example = _state(pcs, cluster_of_sample=[0, 1]), toy_examples(6)[0].example
    user = Fitted({"distances": torch.tensor([0.0, 1.0], dtype=torch.float64)})
    method = DPS(clusters=2, heads=2, routing="hard")
    assert set(_masked(method.plan(example, state, user))) == {(0, 0), (0, 1)}
    drawn = [replace(method, control="random_heads", draw=n).plan(example, state, user) for n in range(20)]
    assert {head for plan in drawn for head in _masked(plan)} == {(0, 2), (0, 3), (1, 2), (1, 3)}


def test_heads_that_help_nothing_are_an_error_not_greedy_decoding():
    with pytest.raises(HarnessError, match="no head raises"):
        DPS().review(_state(-PCS.abs() - 1))
    with pytest.raises(HarnessError, match="harness fit"):
        DPS().plan(toy_examples(6)[0].example, None, None)
    with pytest.raises(UsageError, match="this model has 4"):
        DPS(heads=5).plan(toy_examples(6)[0].example, _state(PCS), None)


def test_a_published_head_file_drives_a_run_and_another_models_is_refused(lm, tmp_path):
    path = tmp_path / "random_LaMP_4_top_heads.json"
    path.write_text(json.dumps({"preference_heads": [[1, 2], [0, 3]]}))
    method = DPS(heads_file=str(path), heads=2)
    shared = method.fit(ModelKit(lm), [])
    assert not method.review(shared)
    assert set(_masked(method.plan(toy_examples(6)[0].example, shared, None))) == {(1, 2), (0, 3)}
    assert method.options()["heads_file"].startswith(path.name)
    path.write_text(json.dumps({"preference_heads": [[31, 2]]}))
    with pytest.raises(UsageError, match="another model"):
        method.fit(ModelKit(lm), [])


@pytest.mark.parametrize("method", ["dps", "decore"])
def test_a_head_file_needs_no_train_split(harness: Callable, toy: Path, tmp_path: Path, method: str) -> None:
    (tmp_path / "heads.json").write_text(json.dumps({"preference_heads": [[1, 2], [0, 3]]}))
    dev = tmp_path / "data" / "LaMP_4" / "dev"
    dev.mkdir(parents=True)
    question = {"id": "1", "input": "Generate a headline for the following article: rain", "profile": []}
    (dev / "dev_questions.json").write_text(json.dumps([question]))
    (dev / "dev_outputs.json").write_text(json.dumps({"task": "LaMP_4", "golds": [{"id": "1", "output": "Rain"}]}))
    run = f"run --method {method} --task lamp4 --data data --model {toy} --max_new_tokens 3 --set {method}.heads=2"
    without = harness(run)
    assert without.code == 4
    assert "fits on a train split and there is none" in without.error()
    with_file = f"{run} --set {method}.heads_file=heads.json"
    assert "a run first fits\n" in harness(f"{with_file} --dry_run").out
    done = harness(with_file)
    assert done.code == 0, done.err


class Killed(BaseException):
    """The process is gone."""


@pytest.mark.parametrize("at", ["harness.fit.kit.score_variants", "os.replace"])
def test_a_killed_discovery_goes_on_where_it_stopped_and_ends_with_the_same_bits(
    lm: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    (cell,) = grid(["dps"], ["lamp3"], Settings(), ["k=1", "samples=50"])
    unbroken = shared_state(lm, cell, ArtifactStore(tmp_path / "unbroken"), Console()).state
    store, scored = ArtifactStore(tmp_path / "store"), []
    real = resolve_name(at)

    def dying(*args: Any) -> Any:
        if len(scored) == 17:
            raise Killed
        scored.append(args)
        return real(*args)

    monkeypatch.setattr(at, dying)
    with pytest.raises(Killed):
        shared_state(lm, cell, store, Console())
    (left,) = (path for path in store.root.iterdir() if not path.name.startswith("."))
    assert sum(not path.name.startswith(".") for path in left.iterdir()) == 17
    monkeypatch.undo()
    progress, counted = [], Console()
    monkeypatch.setattr(counted, "progress", lambda label, done, total: progress.append((done, total)))
    resumed = shared_state(lm, cell, store, counted)
    assert progress[0] == (17, 50)
    assert resumed.state is not None and unbroken is not None
    assert resumed.state.tensors["pcs"].numpy().tobytes() == unbroken.tensors["pcs"].numpy().tobytes()
    assert resumed.state.meta == unbroken.meta
    assert resumed.key in {path.name for path in store.root.iterdir()}


def test_other_clusters_of_the_same_samples_measure_no_head_again(
    lm: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ArtifactStore(tmp_path)
    everyone, clustered, fewer = (
        grid(["dps"], ["lamp3"], Settings(), ["k=1", "samples=24", *more])[0]
        for more in ([], ["clusters=2"], ["clusters=2", "screen=8", "heads=1"])
    )
    one = shared_state(lm, everyone, store, Console())
    with monkeypatch.context() as patch:
        patch.setattr("harness.fit.kit.score_variants", lambda *_: pytest.fail("measured again"))
        two = shared_state(lm, clustered, store, Console())
    assert one.state is not None and two.state is not None and one.key != two.key
    assert one.state.tensors["pcs"].equal(two.state.tensors["pcs"]) and sum(two.state.meta["cluster_users"]) > 24
    screened = shared_state(lm, fewer, store, Console()).state  # of other heads, so measured
    assert screened is not None
    assert screened.tensors["pcs"].isfinite().flatten(1).sum(1).tolist() == [8] * 24


def test_detecting_by_output_slices_as_released_masks_coordinates_and_no_head(
    lm: LanguageModel, tmp_path: Path
) -> None:
    (edit,) = mask({(1, 1): 0.0}, "output_slice", lm.sites.head_dim, ALL)
    out = torch.ones(1, 2, lm.sites.width)
    out[..., lm.sites.head_dim : 2 * lm.sites.head_dim] = 0
    assert edit.site == Site(1, "attn_out") and edit.bind([edit], out)(torch.ones_like(out)).equal(out)
    found = {}
    for operator in ("zero", "output_slice"):
        (cell,) = grid(["dps"], ["lamp3"], Settings(), ["k=1", "samples=4", f"discover_operator={operator}"])
        state = shared_state(lm, cell, ArtifactStore(tmp_path), Console()).state
        assert state is not None
        found[operator] = state.tensors["pcs"]
    assert found["output_slice"].isfinite().all() and not found["output_slice"].allclose(found["zero"])
    with pytest.raises(UsageError, match="output_slice masks none"):
        DPS(discover_operator="output_slice", screen=8)


@pytest.mark.parametrize("where", [DECODE, ALL], ids=repr)
def test_no_pass_of_a_discovery_holds_more_tokens_than_its_budget(
    lm: LanguageModel, monkeypatch: pytest.MonkeyPatch, where: Where
) -> None:
    prompt, answer = Encoded(tuple(range(3, 63)), ""), (5, 6, 7, 8, 9)
    variants = [mask({(layer, head): 0.0}, "zero", lm.sites.head_dim, where) for layer in range(3) for head in range(4)]
    before = score_variants(lm, prompt, answer, variants)
    monkeypatch.setattr("harness.engine.prompt_variants.PACK_TOKENS", {"cpu": 8})
    monkeypatch.setattr("harness.engine.prompt_variants.ROW_TOKENS", {"cpu": 140})
    tokens: dict[str, list[int]] = {"block": [], "logits": []}
    real = lm.logits
    monkeypatch.setattr(lm, "logits", lambda hidden: (tokens["logits"].append(hidden[..., 0].numel()), real(hidden))[1])
    reads = [lambda x: tokens["block"].append(x[..., 0].numel())]
    with lm.sites.hooked({Site(layer, "block_in"): reads for layer in range(3)}):
        after = score_variants(lm, prompt, answer, variants)
    assert torch.allclose(before, after, atol=1e-12)
    assert max(tokens["logits"]) == 8
    assert max(tokens["block"]) == (59 if where is DECODE else 128)  # the prompt alone; two rows of prompt and answer


def test_without_clusters_nothing_is_learnt_of_a_user() -> None:
    """So a dry run of a fitted dps shows its streams, and says nothing of users to adapt to."""
    assert not DPS().adapts() and DPS(clusters=2).adapts()
