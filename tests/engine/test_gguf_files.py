"""A GGUF file is a model like any other: its weights, tokenizer, template and end tokens, read once and kept."""

from __future__ import annotations

import hashlib
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_toys import CHATML, TOKENS, toy_llama, write_gguf

from harness.data import Message
from harness.engine.loading import load_model
from harness.engine.model import LanguageModel
from harness.engine.weights import gguf_files
from harness.engine.weights.identity import gguf_folder
from harness.errors import DataMissing, HarnessError, UnsupportedModel, UsageError
from harness.plugins.registry import model_row

QUESTION = (Message("user", "Who wrote it in 1984?"),)


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "cache"))


def load(name: str | Path, path: str | Path | None = None) -> LanguageModel:
    return load_model(model_row(str(name), None if path is None else str(path)), device="cpu", dtype="float32")


def logprobs(lm: Any, ids: tuple[int, ...]) -> torch.Tensor:
    tokens = torch.tensor([ids])
    model = lm.model if isinstance(lm, LanguageModel) else lm
    with torch.no_grad():
        return model(tokens).logits.log_softmax(-1)


def test_a_gguf_file_gives_the_log_probabilities_of_the_model_it_was_made_from(tmp_path):
    model = toy_llama()
    lm = load(write_gguf(tmp_path / "Toy-Chat.Q4_1.gguf", model))
    assert lm.name == "toy-chat.q4_1"
    ids = lm.encoder.encode(QUESTION).ids
    assert lm.encoder.text(QUESTION) == "<|im_start|>user\nWho wrote it in 1984?<|im_end|>\n<|im_start|>assistant\n"
    assert ids[0] == 1 and ids.count(1) == 2 and ids.count(2) == 1
    assert (logprobs(lm, ids) - logprobs(model, ids)).abs().max() < 1e-6
    assert (lm.encoder.eos_ids, lm.max_length, lm.dtype) == ({2}, 256, "float32")


def test_the_identity_of_a_gguf_file_is_its_sha256_and_it_is_read_once(tmp_path, monkeypatch):
    file = write_gguf(tmp_path / "toy.gguf", toy_llama())
    lm = load("smollm2-135m", file)
    assert (lm.name, lm.source) == ("smollm2-135m", str(file))
    assert lm.revision == f"sha256:{hashlib.sha256(file.read_bytes()).hexdigest()}"
    monkeypatch.setattr("harness.engine.weights.gguf_files._convert", None)  # not called again
    copy = tmp_path / "elsewhere" / "other.gguf"
    copy.parent.mkdir()
    shutil.copy(file, copy)
    assert load(copy).revision == lm.revision


def test_runs_side_by_side_convert_a_file_once_and_what_a_killed_one_left_is_cleared_up(tmp_path, monkeypatch):
    file = write_gguf(tmp_path / "toy.gguf", toy_llama())
    left = gguf_folder(file).with_name(f".{gguf_folder(file).name}.0badcafe.draft")
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"half")
    converted, convert = [], gguf_files._convert
    monkeypatch.setattr(gguf_files, "_convert", lambda *given: (converted.append(given), convert(*given)))
    with ThreadPoolExecutor(2) as pool:
        assert set(pool.map(gguf_files.folder_of, [file, file])) == {gguf_folder(file)}
    assert len(converted) == 1
    assert [path.name for path in left.parent.iterdir() if path.name != ".locks"] == [gguf_folder(file).name]


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path):
    file = write_gguf(tmp_path / "toy.gguf", toy_llama())
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "gguf").write_text("")
    with pytest.raises(HarnessError, match=r"cannot write .*; set HARNESS_CACHE to another folder"):
        load(file)


def test_a_folder_that_holds_one_gguf_file_is_that_file(tmp_path):
    (tmp_path / "folder").mkdir()
    write_gguf(tmp_path / "folder" / "Toy.gguf", toy_llama())
    assert load(tmp_path / "folder").name == "toy"
    assert load("smollm2-135m", tmp_path / "folder").name == "smollm2-135m"
    shutil.copy(tmp_path / "folder" / "Toy.gguf", tmp_path / "folder" / "Two.gguf")
    with pytest.raises(UsageError, match=r"holds 2 GGUF files \(Toy.gguf, Two.gguf\); name one"):
        load(tmp_path / "folder")


@pytest.mark.parametrize("name", ["./none.gguf", "none.gguf"])
def test_a_gguf_file_that_is_not_there_is_data_missing(name):
    with pytest.raises(DataMissing, match=f"model {name} does not exist; .* or a .gguf file"):
        load(name)


def test_a_bos_that_no_text_begins_with_is_none_and_one_that_each_begins_with_is_written_once(tmp_path):
    without = load(write_gguf(tmp_path / "qwen.gguf", toy_llama(), bos=0))
    assert without.encoder.bos_id is None
    assert without.encoder.encode(QUESTION).ids[0] == 1
    each = load(write_gguf(tmp_path / "llama.gguf", toy_llama(), bos=0, add_bos=True))
    assert each.encoder.encode("a").ids == (0, TOKENS.index("a"))
    assert each.encoder.tokenizer.encode("a") == [0, TOKENS.index("a")]
    assert each.encoder.encode(QUESTION).ids[:2] == (0, 1)


def test_an_answer_ends_where_the_template_ends_a_turn_whatever_the_file_calls_its_end(tmp_path):
    lm = load(write_gguf(tmp_path / "toy.gguf", toy_llama(), eos=0))
    assert lm.encoder.eos_ids == {0, 2}
    base = load(write_gguf(tmp_path / "base.gguf", toy_llama(), eos=0, template=None))
    assert (base.encoder.eos_ids, base.encoder.chat) == ({0}, False)


def test_the_rope_of_llama_3_2_is_read_from_its_frequencies(tmp_path):
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    model = toy_llama()
    theta = model.config.rope_parameters["rope_theta"]
    model.config.rope_parameters = {
        "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192, "rope_theta": theta,
    }  # fmt: skip
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](model.config, torch.device("cpu"))
    factors = theta ** -(torch.arange(0, 8, 2) / 8) / scaled
    model.model.rotary_emb.inv_freq.copy_(scaled)
    lm = load(write_gguf(tmp_path / "toy.gguf", model, rope=factors))
    ids = tuple(range(3, 120))
    assert (logprobs(lm, ids) - logprobs(model, ids)).abs().max() < 1e-5
    with pytest.raises(DataMissing, match=r"neither Llama 3\.1's nor 3.2's"):
        load(write_gguf(tmp_path / "unlike.gguf", model, rope=factors + 1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"extra": ("blk.0.surprise.weight",)}, "holds 21 tensors, and its model as transformers reads it has 20"),
        ({"scaling": "yarn"}, r"scales its positions \(yarn, factor 4\)"),
        ({"parts": 3}, "is one of 3 parts; join them first"),
    ],
)
def test_what_transformers_would_leave_out_of_a_file_is_refused(tmp_path, options, message):
    with pytest.raises(DataMissing, match=message):
        load(write_gguf(tmp_path / "toy.gguf", toy_llama(), **options))
    assert [path.name for path in (tmp_path / "cache/gguf").iterdir()] == [".locks"]


def test_a_damaged_file_and_an_unknown_architecture_are_one_line(tmp_path):
    file = write_gguf(tmp_path / "toy.gguf", toy_llama())
    whole = file.read_bytes()
    for content in (b"", b"GGUF", whole[: len(whole) // 2], b"x" * 100):
        file.write_bytes(content)
        with pytest.raises(DataMissing, match=r"GGUF file .* cannot be read"):
            load(file)
    file.write_bytes(whole.replace(b"llama", b"falco"))
    with pytest.raises((DataMissing, UnsupportedModel)) as caught:
        load(file)
    assert "\n" not in str(caught.value)


def test_the_template_is_the_files_own(tmp_path):
    lm = load(write_gguf(tmp_path / "toy.gguf", toy_llama(), template=CHATML.replace("im_start", "endoftext")))
    assert lm.encoder.text(QUESTION).startswith("<|endoftext|>user")
