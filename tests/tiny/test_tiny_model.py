"""The committed model folder: loads offline, small enough for git, lossless tokenizer, one BOS, and it follows a history."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from harness.data import HistoryItem
from harness.tasks.lamp_prompts import prompt_text
from harness.tiny import MODEL_DIR, lamp_mini, personas
from harness.tiny.train import SIGHTED_BLOCKS, Settings, build_model, build_tokenizer, chat, collate, forward


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL_DIR)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(MODEL_DIR)


def test_the_folder_is_small_and_the_model_has_grouped_query_heads(model):
    assert (MODEL_DIR / "model.safetensors").stat().st_size <= 8_000_000
    assert model.config.model_type == "llama" and model.config.num_hidden_layers >= 4
    assert model.config.num_attention_heads >= 8 > model.config.num_key_value_heads
    assert model.config.max_position_embeddings >= 2048


@pytest.mark.parametrize(
    "text",
    ["héllo wörld", "你好 🎉", "\n\t x\x00\x7f ", "  two  spaces ", "a .b ,c 'll", "".join(map(chr, range(1, 700)))],
)
def test_any_text_survives_the_tokenizer(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_words_of_lamp_mini_are_one_token_with_and_without_a_space(tokenizer):
    words = {word for question in lamp_mini.load("lamp4", "dev")[0] for word in question["input"].strip(".").split()}
    words |= {word for lexicon in personas.LEXICONS.values() for word in lexicon} | set("ABCD")
    words = {word for word in words if word.isalpha()}
    split = [w for word in words for w in (word, f" {word}") if len(tokenizer.encode(w, add_special_tokens=False)) > 1]
    assert not split


def test_a_chat_has_one_bos_and_turns_end_with_eos(tokenizer):
    turns = [
        {"role": "system", "content": "Answer in plain words."},
        {"role": "user", "content": " How was your day? "},
        {"role": "assistant", "content": "We share books."},
        {"role": "user", "content": "And now?"},
    ]
    text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    assert ids == tokenizer.encode(text, add_special_tokens=False)
    assert ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id
    assert ids.count(tokenizer.eos_token_id) == 4
    assert "<|user|> How was your day? <|end|>" in text and text.endswith("<|assistant|>")
    assert tokenizer.encode("raw text")[0] == tokenizer.bos_token_id


def test_training_and_the_template_render_the_same_prompt(tokenizer):
    turns = [{"role": "system", "content": "Be plain."}, {"role": "user", "content": "Hi"}]
    row = chat("Hi", "Yes", "Be plain.")
    assert row.pieces[0][0] == tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)


def test_the_written_out_forward_is_the_librarys(model):
    ids = torch.arange(40).reshape(2, 20)
    with torch.inference_mode():
        ours, theirs = model.lm_head(forward(model, ids, None)), model(ids).logits
    assert (ours - theirs).abs().max() < 1e-4


def test_a_user_turn_never_sees_the_system_turn_in_training():
    tokenizer = build_tokenizer(1)
    model = build_model(Settings(), tokenizer).double()
    batches = [
        collate(tokenizer, iter([chat("How was your day?", "Good.", said)]), 1)
        for said in ("Be a baker.", "Be a farmer.")
    ]
    assert batches[0].ids.shape == batches[1].ids.shape
    with torch.inference_mode():
        first, second = (forward(model, batch.ids, batch.masks)[0] for batch in batches)
    user = slice(1 + len(tokenizer.encode("<|system|>Be a baker.<|end|>", add_special_tokens=False).ids), -3)
    assert model.config.num_hidden_layers > SIGHTED_BLOCKS
    assert torch.equal(first[user][:-1], second[user][:-1])
    assert not torch.equal(first[-3:], second[-3:])


def test_building_the_tokenizer_twice_gives_the_committed_one(tokenizer):
    assert build_tokenizer(Settings.seed).get_vocab() == tokenizer.get_vocab()


def test_an_answer_opens_as_the_shown_items_do(model, tokenizer):
    alike = {0: 0, 3: 0}
    for items in alike:
        for question in lamp_mini.load("lamp4", "dev")[0][:8]:
            history = [HistoryItem(item["id"], item, "") for item in question["profile"][:3]]
            turns = [{"role": "user", "content": prompt_text("lamp4", question["input"], history[:items])}]
            ids = torch.tensor([tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)])
            made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, do_sample=False)
            opening = tokenizer.decode(made[0, ids.shape[1] :])
            alike[items] += any(item.fields["title"].startswith(opening) for item in history)
    assert alike[0] <= 4 and alike[3] >= 7
