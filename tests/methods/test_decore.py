"""DeCoRe: the mixes by hand, the needle test, published head files, the contract in every family."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
import torch

from harness.edits import ScaleHeads, ScaleQueries
from harness.engine.capture import capture
from harness.engine.decode import Decoder
from harness.engine.sites import FAMILIES
from harness.errors import DataMissing, HarnessError, UsageError
from harness.fit.heads import read_heads
from harness.fit.kit import ModelKit
from harness.fit.needle import ANSWER_TOKENS, NEEDLES, needle_scores
from harness.method import Fitted, Method
from harness.methods.decore import DeCoRe
from harness.mix import EntropyContrast
from harness.plan import DECODE, Generated, Site, StreamOutput
from harness.plugins.options import build_method
from harness.run.contract import check_method, random_lm, toy_examples

SHARED = Path(os.environ.get("HARNESS_SHARED", "../shared/data")) / "reference_results"
SMALL = ("needle_tokens=40", "depths=1", "samples=4")


def _method(*settings: str, preset: str | None = None) -> Method:
    return build_method(DeCoRe, "decore", preset, settings)


def _fitted(**changes: object) -> Fitted:
    meta = {
        "heads": [[1, 2], [0, 3], [2, 0]],
        "scores": [0.5, 0.2, 0.0],
        "layers": 3,
        "heads_a_layer": 4,
        "head_dim": 8,
    }
    return Fitted(meta={**meta, "source": "needles", "needle_tests": 6, "answered": 6, **changes})


def test_the_weight_is_an_entropy_or_its_gain_by_hand() -> None:
    base, masked = [0.5, 0.25, 0.25], [0.2, 0.6, 0.2]
    outputs = [StreamOutput(torch.tensor([[p]], dtype=torch.float64).log()) for p in (base, masked)]

    def entropy(p: list[float]) -> float:
        return -sum(x * math.log(x) for x in p)

    def contrasted(alpha: float) -> list[float]:
        raw = [p ** (1 + alpha) / q**alpha for p, q in zip(base, masked, strict=True)]
        return pytest.approx([x / sum(raw) for x in raw])

    gain = entropy(masked) - entropy(base)
    assert gain < 0
    assert EntropyContrast()(outputs)[0, 0].exp().tolist() == contrasted(entropy(base))
    assert EntropyContrast(gain=True)(outputs)[0, 0].exp().tolist() == contrasted(gain)
    assert EntropyContrast(cap=0.0, gain=True)(outputs)[0, 0].exp().tolist() == contrasted(gain)  # bounds above only
    assert EntropyContrast(cap=0.0)(outputs)[0, 0].exp().tolist() == pytest.approx(base)


@pytest.mark.parametrize(
    ("preset", "mix", "kind"),
    [
        (None, "EntropyContrast(cap=None, strength=1.0, gain=False)", ScaleHeads),
        ("static", "Contrast(weight=0.5)", ScaleHeads),
        ("released", "EntropyContrast(cap=None, strength=1.0, gain=False)", ScaleQueries),
    ],
)
def test_a_preset_is_a_mix_and_an_operator(preset: str | None, mix: str, kind: type) -> None:
    (item,) = toy_examples(1)
    plan = _method("heads=2", preset=preset).plan(item.example, _fitted(), None)
    assert repr(plan.mix) == mix
    assert plan.streams[0].edits == ()
    assert plan.streams[1].edits == (kind(0, ((3, 0.0),), 8, DECODE), kind(1, ((2, 0.0),), 8, DECODE))


def test_random_heads_are_as_many_others_the_same_for_every_example() -> None:
    def drawn(*settings: str) -> list[tuple[int, int]]:
        (item,) = toy_examples(1, seed=len(settings))
        plan = _method("heads=2", "control=random_heads", *settings).plan(item.example, _fitted(), None)
        return [(e.layer, head) for e in plan.streams[1].edits for head, _ in e.scales]  # type: ignore[attr-defined]

    assert len(drawn()) == 2
    assert drawn() == drawn("draw=0")
    assert not {(1, 2), (0, 3)} & set(drawn())
    assert len({tuple(drawn(f"draw={n}")) for n in range(8)}) > 1
    ranked = [[layer, head] for layer in range(3) for head in range(4)]
    (item,) = toy_examples(1)
    with pytest.raises(UsageError, match="5 other heads are too few for a control of 7"):
        _method("heads=7", "control=random_heads").plan(item.example, _fitted(heads=ranked), None)


@pytest.mark.parametrize(("layers", "heads", "expected"), [(32, 32, 50), (28, 28, 50), (5, 8, 4), (1, 4, 1)])
def test_fifty_heads_are_masked_or_a_tenth_of_a_small_model(layers: int, heads: int, expected: int) -> None:
    ranked = [[layer, head] for layer in range(layers) for head in range(heads)]
    assert len(DeCoRe()._chosen(_fitted(heads=ranked, layers=layers, heads_a_layer=heads))) == expected


def test_a_record_keeps_the_ranking_and_how_many_are_masked() -> None:
    fitted = _fitted()
    found = DeCoRe(heads=2).analysis(fitted, {})
    assert found["k"] == 2
    assert found["heads"] == [
        [*head, score] for head, score in zip(fitted.meta["heads"], fitted.meta["scores"], strict=True)
    ]
    unscored = DeCoRe(heads=2).analysis(_fitted(scores=[]), {})
    assert [score for _, _, score in unscored["heads"]] == [None] * len(fitted.meta["heads"])


def test_a_ranking_that_means_nothing_is_an_error_or_a_warning() -> None:
    assert list(DeCoRe().review(_fitted())) == []
    assert DeCoRe(heads=3).review(_fitted()) == ["decore: 1 of the 3 heads never copy; lower --set heads=..."]
    (warning,) = DeCoRe().review(_fitted(source="references", answered=1))
    assert "answered 1 of 6 needle tests" in warning
    with pytest.raises(HarnessError, match="no head copies from the text"):
        DeCoRe().review(_fitted(scores=[0.0, 0.0, 0.0]))
    with pytest.raises(HarnessError, match="no retrieval heads were fitted"):
        DeCoRe().review(None)
    with pytest.raises(UsageError, match="heads=4 asked for; 3 are ranked, of this model's 12"):
        DeCoRe(heads=4).review(_fitted())


def test_settings_that_make_no_sense_are_refused() -> None:
    for setting in ("alpha=-0.1", "heads=0", "depths=0", "samples=0", "alpha=entropies"):
        with pytest.raises(UsageError, match="allowed"):
            _method(setting)


# The needle test


def _answering(kit: ModelKit, monkeypatch: pytest.MonkeyPatch, right: set[str]) -> list[str]:
    """Makes the model answer the needle tests whose question is in `right`; the prompts are returned as they come."""
    prompts: list[str] = []

    def generate(requests, **_):
        out = []
        for request in requests:
            prompts.append(request.prompts[0].encoded.text)
            needle = next(n for n in NEEDLES if n.question in prompts[-1])
            text = needle.answer if needle.question in right else "no idea"
            out.append(Generated(kit.lm.encoder.answer(text, ""), (), text, "stop"))
        return out

    monkeypatch.setattr(kit.decoder, "generate", generate)
    return prompts


def test_a_needle_is_hidden_at_every_depth_and_the_text_keeps_its_length(monkeypatch: pytest.MonkeyPatch) -> None:
    kit = ModelKit(random_lm(max_position_embeddings=2048))
    prompts = _answering(kit, monkeypatch, set())
    texts = [f"line {n} of the text goes on" for n in range(40)]
    found = needle_scores(kit, texts, tokens=400, depths=5)
    assert (found.tests, found.scores.shape) == (30, (0, 3, 4))
    assert len(prompts) == 30
    places = []
    for prompt in prompts[5:10]:  # the first needle in the longer text
        assert prompt.count(NEEDLES[0].fact) == 1
        text, _, question = prompt.partition("\n\nAnswer from")
        assert NEEDLES[0].question in question
        lines = text.removeprefix("<s>").removeprefix("<u>").splitlines()
        places.append(lines.index(NEEDLES[0].fact))
        assert 370 <= len(text) - len(NEEDLES[0].fact) <= 410  # a byte is a token
    assert places == sorted(set(places))
    assert places[0] == 0
    assert places[-1] == len(lines) - 1
    assert len(prompts[0]) < len(prompts[5]) / 1.5


def test_a_head_scores_for_looking_at_the_token_it_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = random_lm(max_position_embeddings=2048)
    kit = ModelKit(lm)
    _answering(kit, monkeypatch, {NEEDLES[1].question})
    found = needle_scores(kit, ["some text of a user", "and some more"], tokens=60, depths=2)
    assert found.tests == 12
    assert found.scores.shape == (4, 3, 4)

    requests: list = []
    prepare = kit.decoder.prepare
    monkeypatch.setattr(kit.decoder, "prepare", lambda *args: requests.append(prepare(*args)) or requests[-1])
    needle_scores(kit, ["some text of a user", "and some more"], tokens=60, depths=2)
    request = next(r for r in requests if NEEDLES[1].question in r.prompts[0].encoded.text)
    encoded, answer = request.prompts[0].encoded, lm.encoder.answer(NEEDLES[1].answer, "")
    start = encoded.text.index(NEEDLES[1].fact)
    span = {p for p, (lo, hi) in enumerate(encoded.offsets) if hi > start and lo < start + len(NEEDLES[1].fact)}
    for layer in range(3):
        (read,) = capture(lm, [request], [Site(layer, "pattern")], DECODE, [answer])
        for head in range(4):
            hits = 0
            for token, weights in zip(answer, read[Site(layer, "pattern")][:, head], strict=False):
                best = int(weights.argmax())
                hits += best in span and encoded.ids[best] == token
            assert found.scores[0, layer, head].item() == pytest.approx(hits / len(span))
    assert found.scores.max() > 0
    assert ANSWER_TOKENS == 50


def test_a_test_that_cannot_be_made_says_why() -> None:
    kit = ModelKit(random_lm())
    with pytest.raises(HarnessError, match="no text to hide a needle in"):
        needle_scores(kit, ["", " "])
    with pytest.raises(HarnessError, match=r"needle tests: .*--set needle_tokens"):
        needle_scores(kit, ["some text"], tokens=500)


def test_heads_are_those_that_copy_from_the_prompt_where_no_needle_is_found() -> None:
    kit = ModelKit(random_lm())
    train = toy_examples(6, seed=1)
    method = _method(*SMALL)
    shared = method.fit(kit, train)
    assert shared is not None
    assert shared.meta["source"] == "references"
    assert shared.meta["answered"] == 0
    scores = shared.tensors["scores"]
    assert scores.shape == (4, 3, 4)
    best = scores.mean(dim=0)
    assert shared.meta["scores"] == sorted((float(x) for x in best.flatten()), reverse=True)
    assert best[tuple(shared.meta["heads"][0])] == best.max()
    assert 0 < best.max() <= 1


# Published files


def _write(path: Path, content: object) -> str:
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return str(path)


def test_every_shape_of_head_file_is_read(tmp_path: Path) -> None:
    scores = {"0-0": [0, 0], "0-1": [1, 0.5], "1-0": [0, 0], "1-1": [0.5, 0.5]}
    found = read_heads(_write(tmp_path / "a.json", scores), 2, 2)
    assert found.heads == ((0, 1), (1, 1), (0, 0), (1, 0))
    assert found.scores == (0.75, 0.5, 0, 0)
    assert found.samples[0] == (1, 0.5)
    ranked = [{"layer": h // 2, "head": h % 2, "avg_pcs": -h, "rank": h + 1} for h in range(4)]
    found = read_heads(_write(tmp_path / "b.json", {"model": "m", "ranked_heads": ranked}), 2, 2)
    assert (found.heads, found.scores) == (((0, 0), (0, 1), (1, 0), (1, 1)), (0, -1, -2, -3))
    found = read_heads(_write(tmp_path / "c.json", {"preference_heads": [[1, 0], [0, 1]]}), 2, 2)
    assert (found.heads, found.scores) == (((1, 0), (0, 1)), ())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"0-0": [1], "0-1": [1]}, r"scores 2 heads; .* 4 in all"),
        ({f"{h}-0": [1] for h in range(4)}, "names head 0 of layer 2; this model has layers 0 to 1 with heads 0 to 1"),
        ({"preference_heads": [[0, 1], [0, 1]]}, "names a head twice"),
        ({"preference_heads": []}, "names no head"),
        ({"heads": "0-1"}, "must hold scores by 'layer-head', 'ranked_heads' or 'preference_heads'"),
        ({"0-0": []}, "cannot be read"),
        ({"ranked_heads": [{"layer": 0}]}, r"cannot be read \(KeyError: 'head'\)"),
        ([1, 2], "holds no heads"),
        ("{", "is no JSON"),
    ],
)
def test_a_head_file_that_does_not_fit_is_refused_in_one_line(tmp_path: Path, content: object, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        read_heads(_write(tmp_path / "heads.json", content), 2, 2)
    assert "\n" not in str(caught.value)


def test_a_head_file_that_is_not_there_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(DataMissing, match="No such file"):
        read_heads(str(tmp_path / "none.json"), 2, 2)
    with pytest.raises(DataMissing, match="No such file"):
        DeCoRe(heads_file=str(tmp_path / "none.json")).options()


def test_a_record_knows_a_head_file_by_its_content(tmp_path: Path) -> None:
    path = _write(tmp_path / "heads.json", {"preference_heads": [[0, 1]]})
    before = DeCoRe(heads_file=path).options()["heads_file"]
    assert before.startswith("heads.json sha256:")
    _write(tmp_path / "heads.json", {"preference_heads": [[1, 1]]})
    assert DeCoRe(heads_file=path).options()["heads_file"] != before
    assert DeCoRe().options()["heads_file"] is None


def test_a_head_file_drives_a_run(tmp_path: Path) -> None:
    path = _write(tmp_path / "heads.json", {"preference_heads": [[2, 3], [1, 0]]})
    check_method(_method(f"heads_file={path}"))


def _published(*parts: str) -> Path:
    path = SHARED.joinpath(*parts)
    if not path.is_file():
        pytest.skip(f"no published head file {path} (set HARNESS_SHARED)")
    return path


@pytest.mark.parametrize(
    ("name", "layers", "tests", "first"),
    [
        ("Meta-Llama-3-8B-Instruct", 32, 51, ((15, 30), (24, 27))),
        ("Mistral-7B-Instruct-v0.3", 32, 49, ((18, 0), (12, 7), (18, 2), (12, 6))),
        ("Qwen2-7B-Instruct", 28, 326, ((22, 3), (14, 0), (22, 4), (14, 6))),
        ("Llama-2-7b-hf", 32, 54, ((11, 15), (16, 19), (8, 26))),
    ],
)
def test_published_retrieval_heads_are_ranked_by_their_mean(
    name: str, layers: int, tests: int, first: tuple[tuple[int, int], ...]
) -> None:
    path = str(_published("retrieval_heads", f"{name}.json"))
    found = read_heads(path, layers, layers)
    assert found.heads[: len(first)] == first
    assert {len(sample) for sample in found.samples} == {tests}
    with pytest.raises(UsageError, match=r"in all|another model's"):
        read_heads(path, 60 - layers, 60 - layers)
    if name.startswith("Meta"):
        assert found.scores[0] == pytest.approx(0.945, abs=5e-4)
        assert sum(score >= 0.1 for score in found.scores) == 47


@pytest.mark.parametrize("task", [1, 2, 3, 4, 5, 7])
def test_published_preference_heads_agree_in_all_three_files(task: int) -> None:
    def read(kind: str):
        name = f"Meta-Llama-3-8B-Instruct_LaMP_{task}_{kind}.json"
        return read_heads(str(_published("results", "preference_head", "preference_scores", name)), 32, 32)

    scored, ranked, top = read("pcs"), read("ranked"), read("top_heads")
    by_head = dict(zip(scored.heads, scored.scores, strict=True))
    assert [by_head[head] for head in ranked.heads] == pytest.approx(ranked.scores)
    assert top.heads == ranked.heads[:40]


def test_published_heads_drive_a_model_of_their_shape() -> None:
    path = _published("retrieval_heads", "Meta-Llama-3-8B-Instruct.json")
    lm = random_lm(num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, hidden_size=64)
    method, (item,) = _method(f"heads_file={path}", preset="released"), toy_examples(1)
    shared = method.fit(ModelKit(lm), [])
    assert method.review(shared) == []
    plan = method.plan(item.example, shared, None)
    masked = [(e.layer, head) for e in plan.streams[1].edits for head, _ in e.scales]  # type: ignore[attr-defined]
    assert len(masked) == 50
    assert (15, 30) in masked
    decoder = Decoder(lm)
    decoder.generate([decoder.prepare("x", plan, 2)], max_new_tokens=2)
    assert decoder.cost.edits_decode == 2 * len({layer for layer, _ in masked})


# The contract


@pytest.mark.parametrize("family", FAMILIES)
def test_the_contract_holds_in_every_family(family: str) -> None:
    preset = "released" if family in ("qwen3", "gpt2") else None  # whose queries lie elsewhere
    check_method(_method(*SMALL, preset=preset), lm=random_lm(family))


@pytest.mark.parametrize(
    ("preset", "settings"),
    [("released", ()), ("static", ()), ("random", ()), (None, ("alpha=entropy_gain", "heads=3", "cap=2"))],
)
def test_the_contract_holds_for_every_weight_and_control(preset: str | None, settings: tuple[str, ...]) -> None:
    check_method(_method(*SMALL, *settings, preset=preset))
