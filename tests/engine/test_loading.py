"""A model comes from a folder, an alias or the hub's cache as it was saved, or one line says what is missing."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from harness.data import Joint, Message
from harness.engine.decode import Decoder
from harness.engine.loading import load_model
from harness.engine.model import LanguageModel
from harness.engine.weights.identity import file_sha256, revision, weights_of
from harness.errors import DataMissing, UnsupportedModel, UsageError
from harness.plan import Plan, Stream
from harness.plugins.registry import MODELS, model_row
from harness.run.contract import random_lm, toy_examples

LLAMA3 = MODELS["llama3-8b"]
COMMIT = "c0ffee" + "0" * 34


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small random model with its tokenizer, as `save_pretrained` leaves them."""
    lm = random_lm(dtype=torch.float32)
    lm.model.save_pretrained(tmp_path / "toy")
    lm.encoder.tokenizer.save_pretrained(tmp_path / "toy")
    return tmp_path / "toy"


def load(name: str | Path, path: str | Path | None = None, **options: Any) -> LanguageModel:
    return load_model(model_row(str(name), None if path is None else str(path)), device="cpu", **options)


def change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def answer(lm: LanguageModel, tokens: int = 12) -> tuple[int, ...]:
    decoder = Decoder(lm)
    request = decoder.prepare("x", Plan((Stream(toy_examples(1)[0].example.prompt()),)), tokens)
    (generated,) = decoder.generate([request], max_new_tokens=tokens)
    return generated.ids


def test_a_folder_is_loaded_as_it_was_saved(folder):
    lm, saved = load(folder), random_lm(dtype=torch.float32)
    assert (lm.name, lm.source, lm.dtype) == ("toy", str(folder), "float32")
    assert lm.encoder.chat
    assert answer(lm) == answer(saved)
    assert load(folder, dtype="float64").dtype == "float64"


def test_a_record_names_a_folder_as_it_was_given_and_its_row_by_its_name(folder, monkeypatch):
    (folder / "hf").mkdir()
    monkeypatch.chdir(folder)
    assert [(row.name, row.source) for row in map(model_row, (".", "hf", "../toy"))] == [
        ("toy", "."), ("toy", "hf"), ("toy", "../toy"),
    ]  # fmt: skip


def test_the_revision_of_a_folder_names_its_weights_and_every_other_file_that_is_read(folder):
    first = load(folder).revision
    assert re.fullmatch(r"sha256:[0-9a-f]{16}\+[0-9a-f]{16}", first)
    assert load(folder).revision == first
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    other = load(folder).revision
    assert weights_of(other) != weights_of(first) and other.endswith(first.partition("+")[2])


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("chat_template.jinja", "{{ messages[0]['content'] }}"),
        ("additional_chat_templates/rag.jinja", "{{ messages[0]['content'] }}"),
        ("tokenizer.json", None), ("tokenizer_config.json", None), ("config.json", None), ("generation_config.json", None),
        ("special_tokens_map.json", "{}"), ("tokenizer.model", "pieces"), ("vocab.tiktoken", ""), ("merges.txt", "a b"),
    ],
)  # fmt: skip
def test_a_file_that_says_how_the_weights_are_used_changes_the_revision_and_not_its_weights(folder, file, content):
    row = model_row(str(folder))
    before = revision(row)
    (folder / file).parent.mkdir(exist_ok=True)
    (folder / file).write_text((folder / file).read_text() + "\n" if content is None else content)
    assert revision(row) != before
    assert weights_of(revision(row)) == weights_of(before)


def test_weights_in_a_folder_of_their_own_that_an_index_names_are_part_of_the_revision(folder):
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    (folder / "parts").mkdir()
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, "parts/one.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    found = []
    for _ in range(2):
        save_file(weights, folder / "parts/one.safetensors", metadata={"format": "pt"})
        found.append(load(folder))
        weights["model.norm.weight"] += 1
    assert not torch.equal(*(lm.model.get_parameter("model.norm.weight") for lm in found))
    assert weights_of(found[0].revision) != weights_of(found[1].revision)
    (folder / "model.safetensors.index.json").write_text("{")
    assert revision(model_row(str(folder)))  # that it cannot be read is said where it is loaded


@pytest.mark.parametrize("file", ["README.md", "LICENSE", "trainer_state.json", ".gitattributes"])
def test_a_file_that_nothing_reads_is_no_part_of_the_revision(folder, file):
    row = model_row(str(folder))
    before = revision(row)
    (folder / file).write_text("{}")
    assert revision(row) == before


def test_weights_are_hashed_once_and_again_when_they_change_even_at_the_same_size_and_time(
    folder, tmp_path, monkeypatch
):
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("harness.engine.weights.identity._SETTLED", -1.0)
    file = folder / "model.safetensors"
    times, content = file.stat(), file.read_bytes()
    first = file_sha256(file)
    assert first == hashlib.sha256(content).hexdigest()
    with monkeypatch.context() as patched:
        patched.setattr("hashlib.file_digest", None)
        assert file_sha256(file) == first
    file.write_bytes(content[::-1])
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert file_sha256(file) == hashlib.sha256(content[::-1]).hexdigest()
    monkeypatch.setenv("HARNESS_CACHE", str(file))  # a cache that cannot be written costs time only
    assert file_sha256(file) == hashlib.sha256(content[::-1]).hexdigest()


def test_weights_that_were_just_written_are_not_taken_for_settled(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "cache"))
    file_sha256(folder / "model.safetensors")
    assert not (tmp_path / "cache").exists()


def test_an_adapter_beside_the_weights_is_refused_and_never_applied_as_plain(folder):
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(
        UsageError, match=r"holds an adapter .* beside the weights; move adapter_. to a folder of its own"
    ):
        load(folder)


def test_model_path_gives_an_alias_local_weights_and_keeps_its_row(folder):
    lm = load("llama3-8b", folder)
    assert (lm.name, lm.source) == ("llama3-8b", str(folder))


# What is missing


@pytest.mark.parametrize("name", ["llama3-8b", "someone/never-heard-of"])
def test_a_model_that_is_not_cached_says_which_files_are_needed_and_where_they_may_lie(name, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(DataMissing, match=r"config\.json, tokenizer files and \*\.safetensors") as caught:
        load(name)
    message = str(caught.value)
    assert caught.value.exit_code == 4
    assert f"hf download {MODELS.get(name, name)}" in message
    assert f"hub cache ({tmp_path})" in message
    assert "--model_path FOLDER" in message
    assert "\n" not in message


def test_a_cached_model_is_loaded_without_the_network_and_its_commit_is_the_revision(folder, tmp_path, monkeypatch):
    cached = tmp_path / "hub" / f"models--{LLAMA3.replace('/', '--')}"
    shutil.copytree(folder, cached / "snapshots" / COMMIT)
    (cached / "refs").mkdir()
    (cached / "refs/main").write_text(COMMIT)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    lm = load("llama3-8b")
    assert (lm.name, lm.source, lm.revision) == ("llama3-8b", LLAMA3, COMMIT)
    (cached / f"snapshots/{COMMIT}/model.safetensors").unlink()
    with pytest.raises(DataMissing, match="is not on this machine and cannot be fetched"):
        load("llama3-8b")


def lack(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def replaced(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content) and None  # type: ignore[func-returns-value]


def no_tokenizer(folder: Path) -> None:
    for file in folder.glob("*token*"):
        file.unlink()


def half_the_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lack("config.json"), "no config.json that names a model_type"),
        (replaced("config.json", b"{"), "not a valid JSON"),
        (replaced("config.json", b"{}"), "no config.json that names a model_type"),
        (no_tokenizer, "tokenizer"),
        (replaced("tokenizer.json", b"{}"), "KeyError"),
        (lack("model.safetensors"), "no file named model.safetensors"),
        (half_the_weights, "SafetensorError"),
        (replaced("model.safetensors", b""), "SafetensorError"),
        (replaced("generation_config.json", b"{"), "generation_config.json' is not a valid JSON"),
    ],
)  # fmt: skip
def test_a_folder_with_a_missing_or_damaged_file_is_data_missing(folder, damage, named):
    damage(folder)
    with pytest.raises(DataMissing, match=rf"model folder {folder} cannot be loaded \(.*{named}") as caught:
        load(folder)
    assert "it needs config.json, tokenizer files and *.safetensors weights" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "tensor"),
    [({"num_hidden_layers": 4}, "model.layers.3.input_layernorm.weight"), ({"intermediate_size": 50}, "down_proj")],
)
def test_weights_that_do_not_fit_their_config_are_never_filled_with_random_numbers(folder, config, tensor):
    change(folder / "config.json", **config)
    with pytest.raises(DataMissing, match=rf"the weights of {folder} lack \d+ of the tensors .*{tensor}"):
        load(folder)


@pytest.mark.parametrize("family", ["gemma2", "an_architecture_nobody_has"])
def test_an_unknown_family_names_the_supported_ones_and_the_file_to_extend(folder, family):
    change(folder / "config.json", model_type=family)
    (folder / "model.safetensors").unlink()  # said before any weight is read
    with pytest.raises(UnsupportedModel, match=rf"'{family}' is not supported; supported: llama, .*harness/sites.py"):
        load(folder)


# What a model brings along


def test_every_end_token_of_the_generation_config_stops_an_answer(folder):
    ids = answer(load(folder))
    assert 1 not in ids
    for number, ends in ((3, [1, ids[3]]), (5, [ids[5], 1])):
        change(folder / "generation_config.json", eos_token_id=ends)
        assert answer(load(folder)) == ids[: ids.index(ids[number]) + 1]
    (folder / "generation_config.json").unlink()
    change(folder / "config.json", eos_token_id=[ids[2], 1])
    assert answer(load(folder)) == ids[: ids.index(ids[2]) + 1]


def test_a_template_that_writes_the_date_or_thinks_renders_alike_on_every_day(folder):
    template = (
        "{{ date_string if date_string is defined else strftime_now('%d %b %Y') }}|{{ messages[0]['content'] }}|"
        "{% if enable_thinking is defined and not enable_thinking %}no thoughts{% endif %}"
    )
    (folder / "chat_template.jinja").write_text(template)
    text = load(folder).encoder.text((Message("user", "Hi"),))
    assert text == "26 Jul 2024|Hi|no thoughts"


SYSTEM_AND_USER = (Message("system", "Be brief."), Message("user", "Hi"))
TURNS = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
REFUSES = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + TURNS
)
DROPS = TURNS.replace("messages %}", "messages if m['role'] != 'system' %}")


@pytest.mark.parametrize("template", [REFUSES, DROPS])
def test_a_system_turn_that_a_template_refuses_or_drops_begins_the_first_user_turn(folder, template):
    (folder / "chat_template.jinja").write_text(template)
    encoder = load(folder).encoder
    assert encoder.text(SYSTEM_AND_USER) == "<user>Be brief.\n\nHi"
    assert encoder.text(SYSTEM_AND_USER[1:]) == "<user>Hi"
    assert encoder.text(SYSTEM_AND_USER[:1]) == "<user>Be brief."
    assert encoder.text(Joint(SYSTEM_AND_USER, open_turn=True)) == "<user>Be brief.\n\nHi"
    (folder / "chat_template.jinja").write_text(TURNS)
    assert load(folder).encoder.text(SYSTEM_AND_USER) == "<system>Be brief.<user>Hi"


def test_of_several_chat_templates_the_default_is_used_and_without_one_the_names_are_said(folder):
    named = [{"name": name, "template": f"{name}: {TURNS}"} for name in ("tool_use", "rag", "default")]
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    change(folder / "tokenizer_config.json", chat_template=named)
    lm = load(folder)
    assert lm.encoder.text(SYSTEM_AND_USER[1:]) == "default: <user>Hi"
    assert isinstance(lm.encoder.tokenizer.chat_template, str)
    change(folder / "tokenizer_config.json", chat_template=named[:2])
    with pytest.raises(
        UsageError, match=r"has the chat templates rag, tool_use and none called default; .*chat_template\.jinja"
    ):
        load(folder)
    (folder / "chat_template.jinja").write_text(TURNS)
    assert load(folder).encoder.text(SYSTEM_AND_USER[1:]) == "<user>Hi"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('not today') }}", "not today"),
        ("{{ messages[0]['content'] + 1 }}", "can only concatenate"),
        ("{{ messages[9]['content'].x.y }}", "no element 9"),
        ("{% for m in messages %}", "Unexpected end of template"),
        ("{{ 1 // 0 }}", "division"),
    ],
)
def test_a_template_that_cannot_be_used_is_one_line_before_the_weights_are_read(folder, template, reason):
    (folder / "chat_template.jinja").write_text(template)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UsageError, match=rf"chat template cannot write a conversation of user \(.*{reason}") as caught:
        load(folder)
    assert "\n" not in str(caught.value)


def test_a_template_that_takes_no_answers_puts_nothing_before_one(folder):
    refuses = "{% for m in messages if m['role'] == 'assistant' %}{{ raise_exception('none') }}{% endfor %}" + TURNS
    (folder / "chat_template.jinja").write_text(refuses)
    encoder = load(folder).encoder
    assert encoder.answer("yes", SYSTEM_AND_USER[1:]) == tuple(
        encoder.tokenizer.encode("yes", add_special_tokens=False)
    )


def test_a_token_the_model_has_no_embedding_of_is_named_and_never_looked_up(folder):
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    size = len(load(folder).encoder.tokenizer)
    tokenizer["added_tokens"].append({**tokenizer["added_tokens"][0], "id": size, "content": "<image>"})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    encoder = load(folder).encoder
    encoder.encode("Hi")
    for encode in (encoder.encode, lambda text: encoder.answer(text, "Hi"), lambda text: encoder.encode(Joint(text))):
        with pytest.raises(
            UsageError, match=rf"writes '<image>' as id {size}, and the model has embeddings of ids 0 to {size - 1}"
        ):
            encode("see <image>")


@pytest.mark.parametrize("device", ["gpu", "meta", "cuda:99", "mps"])
def test_a_device_that_is_not_there_says_what_is_allowed(folder, device):
    with pytest.raises(UsageError, match=rf"device '{device}'.*(allowed: auto, cpu|use --device cpu|CUDA devices)"):
        load_model(model_row(str(folder)), device=device)


def test_a_device_map_is_one_of_accelerates(folder):
    assert answer(load(folder, device_map="auto")) == answer(load(folder))
    with pytest.raises(UsageError, match="unknown device map 'gpus'; allowed: auto, balanced"):
        load(folder, device_map="gpus")


def test_sampling_and_penalties_of_the_generation_config_never_leak_in(folder):
    before = answer(load(folder))
    change(
        folder / "generation_config.json",
        do_sample=True,
        temperature=50.0,
        top_k=3,
        top_p=0.5,
        repetition_penalty=1e9,
        no_repeat_ngram_size=1,
        bad_words_ids=[[i] for i in before],
        suppress_tokens=list(before),
        begin_suppress_tokens=[before[0]],
        forced_eos_token_id=1,
        max_length=3,
        max_new_tokens=2,
        min_new_tokens=11,
        stop_strings=["a"],
    )
    assert answer(load(folder)) == before
