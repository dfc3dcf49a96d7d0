"""StyleVector by hand: what is contrasted, the three directions, where the vector is added."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from harness.data import Example, Labelled, User
from harness.edits import AddVector
from harness.engine.capture import capture
from harness.engine.decode import Decoder
from harness.engine.model import LanguageModel
from harness.errors import UsageError, UserFailed
from harness.fit.artifacts import ArtifactStore
from harness.fit.kit import ModelKit
from harness.method import Fitted, Written
from harness.methods.style_vector import StyleVector, _direction
from harness.plan import GENERATED, LAST_PROMPT, PROMPT, Plan, Site, Stream
from harness.run.contract import ToyTemplate, check_method, random_lm, toy_examples

USERS = [item.example.user for item in toy_examples(3, seed=2)]


def _fitted(states: Sequence[Fitted | UserFailed | None]) -> list[Fitted]:
    assert all(isinstance(state, Fitted) for state in states), states
    return [state for state in states if isinstance(state, Fitted)]


@pytest.mark.parametrize(
    "method", [StyleVector(), StyleVector(direction="pca", positions="prompt")], ids=["mean", "pca"]
)
def test_style_vector_keeps_its_promises(method: StyleVector) -> None:
    check_method(method)


def test_style_vector_keeps_its_promises_on_another_family_with_a_logistic_direction() -> None:
    check_method(StyleVector(direction="logistic", positions="last_prompt"), lm=random_lm("gpt2"))


def _last(lm: LanguageModel, pair: Labelled, answer: str, layer: int) -> torch.Tensor:
    """The residual leaving a block at the last token, by a hook of its own."""
    rendered = pair.example.prompt().render()
    ids = torch.tensor([[*lm.encoder.encode(rendered).ids, *lm.encoder.answer(answer, rendered)]])
    read: list[torch.Tensor] = []
    handle = lm.sites.blocks[layer].register_forward_hook(lambda _, __, out: read.append(out[0, -1]))
    with torch.no_grad():
        lm.model(ids, attention_mask=torch.ones_like(ids))
    handle.remove()
    return read[0]


def test_the_vector_is_the_mean_difference_at_the_last_token_of_own_and_generic_answers(lm: LanguageModel) -> None:
    states = _fitted(StyleVector(layer=1).adapt(ModelKit(lm, max_new_tokens=6), USERS, None))
    decoder = Decoder(lm)
    for user, state in zip(USERS, states, strict=True):
        differences = []
        for pair in user.pairs:
            request = decoder.prepare("x", Plan((Stream(pair.example.prompt()),)), 6)
            (generic,) = decoder.generate([request], max_new_tokens=6)
            differences.append(_last(lm, pair, pair.targets[0], 1) - _last(lm, pair, generic.text.strip(), 1))
        assert torch.allclose(state.tensors["vector"], torch.stack(differences).mean(0).float(), atol=1e-6)
        assert state.meta["items"] == len(user.pairs) and state.meta["layer"] == 1


def test_the_three_directions_by_hand() -> None:
    positive = [torch.tensor([3.0, 1.0]), torch.tensor([5.0, -1.0]), torch.tensor([4.0, 0.0])]
    negative = [torch.tensor([1.0, 1.0]), torch.tensor([1.0, 1.0]), torch.tensor([1.0, -2.0])]
    # differences (2, 0), (4, -2), (3, 2)
    assert _direction(positive, negative, "mean").tolist() == [3.0, 0.0]
    logistic, pca = (_direction(positive, negative, kind) for kind in ("logistic", "pca"))
    assert logistic.norm() == pytest.approx(1.0) and pca.norm() == pytest.approx(1.0)
    assert logistic[0] > 0.9  # the first coordinate tells them apart
    moments = torch.tensor([[29.0, -2.0], [-2.0, 8.0]]).double()  # sum of outer products
    assert torch.allclose(moments @ pca, (pca @ moments @ pca) * pca) and pca @ moments @ pca > 29
    assert pca[0] > 0
    flipped = _direction(negative, positive, "pca")
    assert torch.allclose(flipped, -pca)


def test_the_vector_is_added_after_its_block_at_the_generated_positions(lm: LanguageModel) -> None:
    example, state = toy_examples(1)[0].example, Fitted({"vector": torch.ones(32)}, {"layer": 1})
    (edit,) = StyleVector(strength=-0.5).plan(example, None, state).streams[0].edits
    assert isinstance(edit, AddVector)
    assert (edit.site, edit.coefficient, edit.where) == (Site(1, "block_out"), -0.5, GENERATED)
    for positions, wheres in (("prompt", [PROMPT, LAST_PROMPT]), ("last_prompt", [LAST_PROMPT])):
        edits = StyleVector(positions=positions).plan(example, None, state).streams[0].edits  # type: ignore[arg-type]
        assert [edit.where for edit in edits] == wheres


def test_a_stronger_vector_moves_the_answer_towards_the_users_texts(lm: LanguageModel) -> None:
    (state,) = _fitted(StyleVector(layer=1).adapt(ModelKit(lm, max_new_tokens=6), USERS[:1], None))
    decoder, example = Decoder(lm), USERS[0].pairs[0].example
    vector = state.tensors["vector"].double()

    def along(strength: float) -> float:
        plan = StyleVector(strength=strength).plan(example, None, state)
        request = decoder.prepare("x", plan, 8)
        (read,) = capture(lm, [request], [Site(1, "block_out")], GENERATED, [(40, 41, 42)])
        return float((read[Site(1, "block_out")] @ vector).mean())

    assert along(1.0) - along(0.0) == pytest.approx(float(vector @ vector), rel=1e-6)


def test_negatives_come_from_the_writer_that_is_named_and_are_kept(lm: LanguageModel, tmp_path, monkeypatch) -> None:
    other = random_lm(seed=5, dtype=torch.float32)
    other.model.save_pretrained(tmp_path / "writer")
    other.encoder.tokenizer.save_pretrained(tmp_path / "writer")
    store = ArtifactStore(tmp_path / "store")
    method = StyleVector(layer=1, negatives=str(tmp_path / "writer"), negative_tokens=5)
    kit = ModelKit(lm, max_new_tokens=6, store=store)
    theirs = _fitted(method.adapt(kit, USERS[:1], None))
    own = _fitted(StyleVector(layer=1, negative_tokens=5).adapt(kit, USERS[:1], None))
    assert not torch.allclose(theirs[0].tensors["vector"], own[0].tensors["vector"])
    again = ModelKit(lm, max_new_tokens=6, store=store)
    assert torch.equal(_fitted(method.adapt(again, USERS[:1], None))[0].tensors["vector"], theirs[0].tensors["vector"])
    with pytest.raises(UsageError, match="unknown model 'nobody'"):
        StyleVector(negatives="nobody")


def test_a_writer_in_a_folder_is_recorded_by_its_content_so_that_another_one_makes_other_vectors(
    tmp_path: Path,
) -> None:
    def written_by(seed: int) -> object:
        other = random_lm(seed=seed, dtype=torch.float32)
        other.model.save_pretrained(tmp_path / "writer")
        other.encoder.tokenizer.save_pretrained(tmp_path / "writer")
        return StyleVector(negatives=str(tmp_path / "writer")).options()["negatives"]

    first, second = written_by(5), written_by(6)
    assert str(first).startswith("writer sha256:") and first != second
    assert [StyleVector(negatives=name).options()["negatives"] for name in ("self", "tiny")] == ["self", "tiny"]


class _Writes:
    """A writer whose answers are given, `None` for one it fails at."""

    def __init__(self, *texts: str | None) -> None:
        self.texts = texts

    def __call__(self, prompts: Sequence[object], max_new_tokens: int) -> list[Written | UserFailed]:
        return [UserFailed("wrote nothing") if text is None else Written(text, 0) for text in self.texts]


def test_a_pair_without_a_generic_answer_is_left_out_and_a_user_without_any_is_a_failure(
    lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def user(name: str, count: int) -> User:
        pairs = [
            Labelled(Example(f"{name}{n}", User(name), f"ask {n}", "ask", ToyTemplate()), (f"text {n}",))
            for n in range(count)
        ]
        return User(name, pairs=pairs)

    kit = ModelKit(lm, max_new_tokens=6)
    monkeypatch.setattr(kit, "writer", lambda name: _Writes("generic", None, None))
    some, none, empty = StyleVector().adapt(kit, [user("a", 2), user("b", 1), user("c", 0)], None)
    assert isinstance(some, Fitted) and (some.meta["items"], some.meta["left_out"]) == (1, 1)
    assert isinstance(none, UserFailed) and str(none) == "style_vector: user 'b': wrote nothing"
    assert isinstance(empty, Fitted) and not empty.tensors and "no style vector" in empty.notes[0]
    assert StyleVector().plan(toy_examples(1)[0].example, None, empty).streams[0].edits == ()


def test_users_read_together_get_what_each_gets_alone_and_only_from_their_newest_items(lm: LanguageModel) -> None:
    kit, method = ModelKit(lm, max_new_tokens=6), StyleVector(layer=2, items=2)
    together = _fitted(method.adapt(kit, USERS, None))
    for user, state in zip(USERS, together, strict=True):
        newest = User(user.id, user.history, user.pairs[-2:])
        (alone,) = _fitted(StyleVector(layer=2).adapt(kit, [newest], None))
        assert torch.allclose(state.tensors["vector"], alone.tensors["vector"], atol=1e-6)
    found = method.analysis(None, {user.id: state for user, state in zip(USERS, together, strict=True)})
    assert found["users"] == 3 and found["items"] == 2 and -1 <= found["mean_cosine"] <= 1
