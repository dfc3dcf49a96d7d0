"""Activation patching: identities of patching, rows equal single runs, pairs and their alignment, the effect by hand, records."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from harness.data import Example, HistoryItem, Message, User
from harness.edits import AddVector, Replace
from harness.engine.capture import attention_to, capture
from harness.engine.decode import Decoder
from harness.engine.flops import Cost
from harness.engine.model import LanguageModel
from harness.engine.sites import FAMILIES
from harness.errors import DataMissing, UsageError
from harness.methods.cad import CAD
from harness.methods.plain import Plain
from harness.plan import ALL, At, Plan, Site
from harness.run import patch_runs as patching
from harness.run.contract import random_lm
from harness.run.patch_runs import PARTS, POSITIONS, WHOLE_PARTS, Decision, Experiment, decide, experiment, identity
from harness.run.system import ModelSystem
from harness.task import Generation, Sample, Selection
from harness.tasks.patching import Patching

SHARED = Path(os.environ.get("HARNESS_SHARED", "../shared/data")).absolute()
STORIES = SHARED / "stories260K/hf"


@pytest.fixture(autouse=True)
def _no_data_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HARNESS_DATA", raising=False)


@dataclasses.dataclass(frozen=True)
class As:
    """A question asked as someone."""

    who: str

    def __call__(self, text: str, items: Any, summary: str) -> tuple[Message, ...]:
        return Message("system", f"As a {self.who} cook:"), Message("user", text)


def pair(lm: LanguageModel, *, clean: str = "red", corrupted: str = "tin") -> tuple[Decision, Decision]:
    example = Example("x", User("u"), "soup or stew?", "", As(clean), ("say A", "say B", "say C"))
    system = ModelSystem(lm, Plain(), Generation(1))
    return decide(system, example), decide(system, dataclasses.replace(example, template=As(corrupted)))


def patched(lm: LanguageModel) -> tuple[Decision, Decision, tuple[int, ...], Experiment]:
    clean, corrupted = pair(lm)
    at = identity(clean.encoded, corrupted.encoded)
    assert at is not None
    return clean, corrupted, at, experiment(lm, clean, corrupted, at, Cost())


@pytest.fixture(scope="module", params=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> tuple[LanguageModel, Decision, Decision, tuple[int, ...], Experiment]:
    lm = random_lm(request.param)
    return (lm, *patched(lm))


# Identities


def test_a_run_patched_with_itself_is_unchanged(family: Any) -> None:
    for side in (family[4].denoised, family[4].noised):
        assert torch.allclose(side.itself, side.base, atol=1e-10)


def test_the_residual_stream_of_any_block_at_all_positions_is_the_other_run(family: Any) -> None:
    lm, *_, found = family
    for side in (found.denoised, found.noised):
        assert (side.source - side.base).abs().max() > 1e-3
        assert side.stream.shape == (lm.sites.layers, 3)
        assert torch.allclose(side.stream, side.source.expand_as(side.stream), atol=1e-10)


def test_what_enters_block_0_at_the_identity_alone_is_the_other_run(family: Any) -> None:
    for side in (family[4].denoised, family[4].noised):
        assert torch.allclose(side.embedding, side.source, atol=1e-10)


def test_all_heads_of_a_block_are_its_attention(family: Any) -> None:
    for side in (family[4].denoised, family[4].noised):
        assert torch.allclose(side.all_heads, side.sites["attn_out", "all"], atol=1e-10)
        assert (side.sites["heads_out", "all"] - side.sites["attn_out", "all"][:, None]).abs().max() > 1e-3


def test_the_last_block_acts_at_the_last_position_alone(family: Any) -> None:
    for side in (family[4].denoised, family[4].noised):
        for part in PARTS:
            assert torch.allclose(side.sites[part, "all"][-1], side.sites[part, "last"][-1], atol=1e-10)
            assert torch.allclose(
                side.sites[part, "identity"][-1], side.base.expand_as(side.sites[part, "all"][-1]), atol=1e-10
            )


def test_the_identities_hold_where_a_method_edits_every_run() -> None:
    lm = random_lm()
    vector = torch.randn(lm.sites.width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    clean, corrupted = (_with_edit(decision, AddVector(Site(1, "block_out"), vector)) for decision in pair(lm))
    at = identity(clean.encoded, corrupted.encoded)
    assert at is not None
    found, plain = experiment(lm, clean, corrupted, at, Cost()), patched(lm)[3]
    assert max(found.denoised.checks().values()) < 1e-10
    assert (found.denoised.base - plain.denoised.base).abs().max() > 1e-3


def _with_edit(decision: Decision, edit: Any) -> Decision:
    (stream,) = decision.request.plan.streams
    plan = Plan((dataclasses.replace(stream, edits=(*stream.edits, edit)),))
    return Decision(dataclasses.replace(decision.request, plan=plan), decision.tokens)


def test_a_check_says_by_how_much_it_is_off() -> None:
    *_, found = patched(random_lm())
    assert max(found.denoised.checks().values()) < 1e-10
    wrong = dataclasses.replace(found.denoised, stream=found.denoised.stream + torch.tensor([0.0, 0.5, 0.0]))
    assert wrong.checks()["residual_stream_is_1"] == pytest.approx(0.5)
    assert dataclasses.replace(found.denoised, itself=found.denoised.base + 3.0).checks()["self_patch_is_0"] < 1e-10


# Rows


def test_rows_of_shared_passes_equal_one_run_at_a_time(family: Any) -> None:
    lm, clean, corrupted, at, found = family
    sites = [Site(n, part) for n in range(lm.sites.layers) for part in PARTS]
    activations = capture(lm, [clean.request, corrupted.request], [*sites], ALL)
    decoder, width = Decoder(lm), lm.sites.head_dim
    wheres = {"all": ALL, "identity": At(at), "last": At((-1,))}
    for base, source, side in ((corrupted, activations[0], found.denoised), (clean, activations[1], found.noised)):
        for positions in POSITIONS:
            for site in sites:
                rows = side.sites[site.part, positions][site.layer].reshape(-1, 3)
                for head, row in enumerate(rows):
                    values, column = source[site], 0
                    if site.part == "heads_out":
                        values, column = source[site][:, head * width : (head + 1) * width], head * width
                    edit = Replace(site, values, wheres[positions], column=column)
                    alone = _with_edit(base, edit).request
                    (logprobs,) = decoder.distributions([alone], [(base.tokens[0],)])
                    assert torch.allclose(logprobs[0, list(base.tokens)], row, atol=1e-10, rtol=0), (site, positions)


def test_a_head_replaced_is_what_a_plain_hook_makes_of_it() -> None:
    lm = random_lm()
    clean, corrupted, _, found = patched(lm)
    site, width = Site(1, "heads_out"), lm.sites.head_dim
    values = capture(lm, [clean.request], [site], ALL)[0][site][:, 2 * width : 3 * width]

    def put(_: Any, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        return (torch.cat([args[0][..., : 2 * width], values[None], args[0][..., 3 * width :]], dim=-1),)

    hook = lm.sites.blocks[1].self_attn.o_proj.register_forward_pre_hook(put)
    logits = lm.model(torch.tensor([corrupted.encoded.ids])).logits[0, -1].log_softmax(-1)
    hook.remove()
    assert torch.allclose(logits[list(corrupted.tokens)], found.denoised.sites["heads_out", "all"][1, 2], atol=1e-10)


def test_without_heads_the_rest_is_the_same_and_takes_less() -> None:
    lm = random_lm()
    clean, corrupted, at, whole = patched(lm)
    cost, all_cost = Cost(), Cost()
    experiment(lm, clean, corrupted, at, all_cost)
    found = experiment(lm, clean, corrupted, at, cost, heads=False)
    assert cost.flops < all_cost.flops
    for side, other in ((found.denoised, whole.denoised), (found.noised, whole.noised)):
        assert set(side.sites) == {(part, name) for part in WHOLE_PARTS for name in POSITIONS}
        assert all(torch.allclose(scores, other.sites[key], atol=1e-12) for key, scores in side.sites.items())
        assert max(side.checks().values()) < 1e-10
        assert set(other.checks()) - set(side.checks()) == {"all_heads_are_attention"}


def test_a_sweep_takes_fewer_passes_than_it_has_runs() -> None:
    lm = random_lm(num_hidden_layers=8)
    clean, corrupted = pair(lm)
    at, cost = identity(clean.encoded, corrupted.encoded), Cost()
    assert at is not None
    experiment(lm, clean, corrupted, at, cost)
    runs = 2 * 8 * (2 + lm.sites.heads) * 3
    assert cost.forward_passes < runs / 3
    assert cost.flops < runs * lm.sizes.blocks(len(clean.encoded.ids)) / 2


@pytest.mark.parametrize("queries", [256, 4])
def test_attention_to_the_identity_is_read_off_the_pattern(queries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.engine.capture.QUERIES", queries)
    lm = random_lm("qwen3")
    clean, _, at, found = patched(lm)
    longer = decide(
        ModelSystem(lm, Plain(), Generation(1)), Example("y", User("u"), "much longer?", "", As("old"), ("A", "B"))
    )
    together = attention_to(lm, [clean.request, longer.request], [at, at])
    for decision, read in zip((clean, longer), together, strict=True):
        pattern = capture(lm, [decision.request], [Site(n, "pattern") for n in range(lm.sites.layers)], ALL)[0]
        for layer in range(lm.sites.layers):
            weights = pattern[Site(layer, "pattern")][..., list(at)].sum(-1)  # [T, H]
            assert torch.allclose(read[layer, :, 0], weights[max(at) + 1 :].mean(0), atol=1e-12)
            assert torch.allclose(read[layer, :, 1], weights[-1], atol=1e-12)
    assert torch.allclose(found.attention["clean"], together[0], atol=1e-12)
    first = (found.attention[name][0] for name in ("denoised", "corrupted"))
    assert torch.allclose(*first, atol=1e-12)  # the first MLP comes later
    assert not torch.allclose(found.attention["denoised"][1], found.attention["corrupted"][1])


# Prompts


def test_prompts_are_aligned_where_they_are_of_equal_length() -> None:
    clean, corrupted = pair(random_lm())
    assert identity(clean.encoded, corrupted.encoded) == (6, 7, 8)
    assert identity(clean.encoded, pair(random_lm(), corrupted="green")[1].encoded) is None
    assert identity(clean.encoded, clean.encoded) is None


def test_choices_are_read_where_they_first_differ() -> None:
    lm = random_lm()
    clean, _ = pair(lm)
    assert lm.encoder.decode(clean.encoded.ids).endswith("say ")
    assert lm.encoder.decode(clean.tokens) == "ABC"
    system = ModelSystem(lm, Plain(), Generation(1))
    for choices in (("A", "AB"), ("A", "B", "A")):
        with pytest.raises(UsageError, match="no single token decides between the choices"):
            decide(system, Example("x", User("u"), "?", "", As("red"), choices))
    with pytest.raises(UsageError, match="'CAD' is more than one pass"):
        decide(
            ModelSystem(lm, CAD(), Generation(1)),
            Example("x", User("u", (HistoryItem("r", {"text": "t"}, "t"),)), "?", "t", As("red"), ("A", "B")),
        )


# The task


@pytest.fixture
def csvs(tmp_path: Path) -> Path:
    (tmp_path / "mmlu/test").mkdir(parents=True)
    for subject in ("virology", "sociology"):
        with (tmp_path / f"mmlu/test/{subject}_test.csv").open("w", newline="") as file:
            csv.writer(file).writerows([[f"{n} of {subject}?", n, n + 1, "NA", n + 3, "ABCD"[n]] for n in range(4)])
    return tmp_path / "mmlu"


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """A user's groups: byte tokens, so equal length is aligned."""
    path = tmp_path / "pairs.json"
    told = {"cooks": {"prompt": "As a {identity} cook:", "pairs": [["red", "tin"], ["red", "green"], ["old", "new"]]}}
    path.write_text(json.dumps(told))
    return path


def run(task: Patching, **selection: Any) -> list[Sample]:
    items = task.items(Selection("test", **selection))
    lm = random_lm(max_position_embeddings=1024)
    return [task.grade(sample) for sample in task.respond(ModelSystem(lm, Plain(), Generation(1)), items)]


def test_pairs_that_are_not_aligned_are_counted_and_left_out(csvs: Path, pairs: Path) -> None:
    task = Patching(str(csvs), str(pairs), "cooks", "virology,sociology", per_subject=2, smallest=1e-6)
    samples = run(task)
    assert len(samples) == 12
    assert [s.parsed == "misaligned" for s in samples] == [s.id.startswith("cooks/red>green") for s in samples]
    found = task.aggregate(samples)
    assert found["first_mlp_identity"].n == 8
    assert found["first_mlp_identity"].note.startswith("1 of 3 pairs are not token-aligned; of 8 aligned samples")
    shown = task.analysis(samples)["patching"]
    aligned, misaligned = (shown["pairs"][f"cooks/red>{other}"]["tokens"] for other in ("tin", "green"))
    assert (aligned[0], misaligned) == (aligned[1], [aligned[0], aligned[0] + 2])
    assert [shown["pairs"]["cooks/red>green"][name] for name in ("samples", "aligned", "n")] == [4, 0, 0]
    assert shown["sets"]["all"]["n"] == shown["sets"]["cooks"]["n"] == 8
    assert shown["sets"]["all"]["questions"] == 4
    assert max(shown["checks_nats"].values()) < 1e-8
    lm = random_lm()
    heads = shown["sets"]["all"]["denoised"]["heads_out"]["identity"]
    assert np.shape(heads["value"]) == np.shape(heads["low"]) == (lm.sites.layers, lm.sites.heads)
    assert np.shape(shown["sets"]["all"]["attention"]["noised"]["last"]["value"]) == (lm.sites.layers, lm.sites.heads)
    assert set(shown["pairs"]["cooks/old>new"]["noised"]) == {"mlp_out", "attn_out"}
    json.dumps(shown)


def test_where_no_pair_is_aligned_the_run_says_so(csvs: Path, pairs: Path) -> None:
    pairs.write_text(json.dumps({"cooks": {"prompt": "{identity}", "pairs": [["red", "green"], ["a", "bc"]]}}))
    with pytest.raises(UsageError, match=r"none of 2 pairs of personas is token-aligned .* as cooks/red>green with"):
        run(Patching(str(csvs), str(pairs), "cooks", "virology"))


def test_a_sample_whose_checks_fail_is_an_error(csvs: Path, pairs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patching, "tolerance_nats", lambda dtype: -1.0)
    task = Patching(str(csvs), str(pairs), "cooks", "virology", smallest=1e-6)
    samples = run(task)
    assert {s.error is not None for s in samples if s.parsed != "misaligned"} == {True}
    assert "self_patch_is_0 is off by" in (samples[0].error or "")
    assert task.aggregate(samples)["first_mlp_identity"].n == 0
    assert "of 0 aligned samples" in task.aggregate(samples)["first_mlp_identity"].note


def test_a_swap_below_the_smallest_is_not_patched(csvs: Path, pairs: Path) -> None:
    task = Patching(str(csvs), str(pairs), "cooks", "virology", smallest=1e6)
    samples = run(task)
    assert not any("denoised" in sample.extra for sample in samples)
    assert task.aggregate(samples)["first_mlp_all"].value is None
    assert task.aggregate(samples)["swap_nats"].n == 2
    assert "0 choose the same, 2 swap less than 1e+06 nats" in task.aggregate(samples)["first_mlp_identity"].note


def _sample(question: str, clean: float, corrupted: float, shifts: list[float]) -> Sample:
    parts = {part: dict.fromkeys(POSITIONS, shifts) for part in ("mlp_out", "attn_out")}
    extra = {"chosen": ["A", "B"], "clean": clean, "corrupted": corrupted, "denoised": parts}
    return Sample(f"g/a>b/{question}", question, response="A", targets=("A",), extra=extra)


def test_the_effect_is_a_ratio_of_means_turned_by_the_sign_of_the_swap() -> None:
    task = Patching(pairs=None)
    samples = [_sample("q1", 3.0, 1.0, [1.0]), _sample("q2", 0.0, 4.0, [-1.0]), _sample("q3", 1.0, 0.0, [0.0])]
    found = task.aggregate([task.grade(sample) for sample in samples])
    assert found["first_mlp_all"].value == pytest.approx((1 + 1 + 0) / (2 + 4 + 1))
    assert (found["swap_nats"].value, found["disagree"].value) == (pytest.approx(7 / 3), 1.0)
    assert (found["accuracy_clean"].value, found["accuracy_corrupted"].value) == (1.0, 0.0)


def test_a_users_pairs_stand_beside_those_that_ship(pairs: Path) -> None:
    shipped, more = Patching().pairs, Patching(pairs=str(pairs)).pairs
    assert list(more)[: len(shipped)] == list(shipped)
    assert list(more)[len(shipped) :] == ["cooks/red>tin", "cooks/red>green", "cooks/old>new"]
    assert Patching(pairs=str(pairs), groups="cooks").fingerprint(Selection("test")) != Patching(
        groups="role"
    ).fingerprint(Selection("test"))
    assert len(Patching(groups="role").items(Selection("test"))) == 20 * 3


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[", "is not valid JSON"),
        ('{"g": {"pairs": [["a", "b"]]}}', "field g.prompt: Field required; expected"),
        (
            '{"g": {"prompt": "{identity}", "pairs": ["ab"]}}',
            "field g.pairs.0: Input should be a valid array, found 'ab'",
        ),
        ('{"g": {"prompt": "{identity}", "pairs": [["a"]]}}', "expected"),
        ('{"g": {"prompt": "You.", "pairs": [["a", "b"]]}}', "a prompt needs {identity} in it"),
        ('{"g": {"prompt": "{identity}", "pairs": [["a", "a"]]}}', "names differ"),
    ],
)
def test_a_damaged_file_of_pairs_is_one_line(tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / "mine.json").write_text(content)
    with pytest.raises(DataMissing) as caught:
        _ = Patching(pairs=str(tmp_path / "mine.json")).pairs
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "split", "words"),
    [
        ({"groups": "couleur"}, "test", "no group 'couleur'; did you mean 'colour'?"),
        ({"contrast": "answer"}, "test", "everyday questions have none"),
        ({"smallest": 0.0}, "test", "smallest=0 nats is not valid"),
        ({}, "dev", "no split 'dev' of everyday questions"),
        ({}, "train", "nothing to fit on"),
    ],
)
def test_a_mistake_says_what_is_allowed(options: dict[str, Any], split: str, words: str) -> None:
    with pytest.raises((UsageError, DataMissing), match=words.replace("?", r"\?")):
        Patching(**options).items(Selection(split))


# Models


def test_the_embedded_model_is_patched_offline(harness: Callable) -> None:
    done = harness("run --task patching --method plain --model tiny --task_set groups=faith,colour --users 2 --json")
    assert done.code == 0, done.err
    (record,) = (json.loads(line) for line in done.out.splitlines())
    shown, metrics = record["analysis"]["patching"], record["metrics"]
    assert max(shown["checks_nats"].values()) < 1e-3
    assert shown["sets"]["faith"]["n"] == metrics["first_mlp_identity"]["n"] == 4
    assert metrics["swap_nats"]["value"] > 5  # its personas are what it was trained on
    attention = np.array(shown["sets"]["all"]["denoised"]["attn_out"]["all"]["value"])
    assert attention.max() > 0.9  # something carries them
    assert "colour" not in shown["sets"]  # of these it knows nothing, and chooses the same
    assert record["cost"]["forward_passes"] > 0


def test_a_real_model_is_patched_on_mmlu(harness: Callable) -> None:
    for path in (STORIES, SHARED / "mmlu/data"):
        if not path.is_dir():
            pytest.skip(f"no {path} (set HARNESS_SHARED)")
    options = "subjects=sociology groups=colour smallest=1e-5 lead=("
    settings = " ".join(f"--task_set '{option}'" for option in options.split())
    done = harness(
        f"run --task patching --method plain --model {STORIES} --data {SHARED / 'mmlu'} {settings} --limit 2 --json"
    )
    assert done.code == 0, done.err
    (record,) = (json.loads(line) for line in done.out.splitlines())
    shown = record["analysis"]["patching"]
    assert max(shown["checks_nats"].values()) < 1e-3
    assert (shown["sets"]["all"]["n"], shown["contrast"]) == (2, "answer")
    assert {"accuracy_clean", "accuracy_corrupted"} < set(record["metrics"])
