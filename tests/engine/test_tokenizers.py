"""LaMP prompts through the tokenizers of the evaluated models: one BOS, the right turns, answers where models put them.

Expected ids are written down from the models' formats and made with sentencepiece, tiktoken and tokenizers alone.
"""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from harness.data import Message, Prompt
from harness.engine.decode import Decoder
from harness.engine.encoder import Encoder
from harness.engine.loading import CHAT_TEMPLATES, load_model
from harness.engine.model import LanguageModel
from harness.methods.plain import Plain
from harness.methods.rag import RAG
from harness.plan import Plan, Stream
from harness.plugins.registry import MODELS, model_row
from harness.plugins.retrieve import retrieve
from harness.run.system import ModelSystem
from harness.task import Generation, Selection
from harness.tasks.lamp import Lamp, Lamp1, Lamp2M, Lamp3, Lamp4, Lamp5, Lamp7

SHARED = Path(os.environ.get("HARNESS_SHARED", "../shared/data"))
TOKENIZERS = SHARED / "tokenizers"
TASKS: tuple[type[Lamp], ...] = (Lamp1, Lamp2M, Lamp3, Lamp4, Lamp5, Lamp7)

FAMILY = {"llama3": "llama", "qwen2": "qwen2", "mistral_v3": "mistral", "llama2": "llama"}
CHAT = {
    "llama3": "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "qwen2": "<|im_start|>system\nYou are a helpful assistant<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n"
    "<|im_start|>assistant\n",
    "mistral_v3": "<s>[INST] {}[/INST]",
    "llama2": "<s>[INST] {} [/INST]",
}
BOS = {"llama3": 128000, "qwen2": None, "mistral_v3": 1, "llama2": 1}
MODEL_NAMES = tuple(FAMILY)
LLAMA3_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def save_model(folder: Path, name: str) -> Path:
    """A small random model of the right family and vocabulary beside the tokenizer's own files."""
    folder.mkdir()
    for file in (TOKENIZERS / name).iterdir():
        if file.name != "config.json":
            shutil.copyfile(file, folder / file.name)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = AutoConfig.for_model(
        FAMILY[name],
        vocab_size={"llama3": 128256, "qwen2": 151936, "mistral_v3": 32768, "llama2": 32000}[name],
        num_hidden_layers=2,
        max_position_embeddings=16384,
        initializer_range=0.3,
        bos_token_id=BOS[name] if BOS[name] is not None else 151643,
        eos_token_id={"llama3": 128001, "qwen2": 151643}.get(name, 2),
        **sizes,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    kept = (folder / "generation_config.json").read_text() if (folder / "generation_config.json").exists() else None
    model.save_pretrained(folder)
    if kept is not None:
        (folder / "generation_config.json").write_text(kept)
    return folder


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], LanguageModel]]:
    """`--model DIR` of each name, loaded once."""
    if not (TOKENIZERS.is_dir() and (SHARED / "lamp").is_dir()):
        pytest.skip(f"no tokenizers and lamp in {SHARED} (set HARNESS_SHARED)")
    transformers_logging.set_verbosity_error()
    root = tmp_path_factory.mktemp("models")

    @functools.cache
    def make(name: str) -> LanguageModel:
        return load_model(model_row(str(save_model(root / name, name))), dtype="float32", device="cpu")

    yield make
    make.cache_clear()


@functools.cache
def plain_ids(name: str) -> Callable[[str], list[int]]:
    """Text to ids by the tokenizer's own library, no specials; a sentencepiece model puts its space before the text."""
    folder = TOKENIZERS / name
    if name == "llama3":
        import tiktoken
        from tiktoken.load import load_tiktoken_bpe

        ranks = load_tiktoken_bpe(str(folder / "tokenizer.model"))
        encoding = tiktoken.Encoding(name, pat_str=LLAMA3_WORDS, mergeable_ranks=ranks, special_tokens={})
        return lambda text: encoding.encode(text, disallowed_special=())
    if name == "qwen2":
        from tokenizers import ByteLevelBPETokenizer

        bpe = ByteLevelBPETokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), unicode_normalizer="nfc")
        from tokenizers import Regex, pre_tokenizers

        words = LLAMA3_WORDS.replace(r"\p{N}{1,3}", r"\p{N}")
        bpe._tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(words), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
        )
        return lambda text: bpe.encode(text).ids
    import sentencepiece

    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    return lambda text: pieces.encode(text)


def chat_ids(name: str, user: str) -> list[int]:
    """The model's chat format around a user turn, special tokens by their numbers."""
    ids = plain_ids(name)
    if name == "llama3":
        user, line = user.strip(), ids("\n\n")
        header, end, eot = 128006, 128007, 128009
        turn = [header, *ids("user"), end, *ids("\n\n" + user), eot]
        return [128000, *turn, header, *ids("assistant"), end, *line]
    if name == "qwen2":
        start, end, line = 151644, 151645, ids("\n")
        system = [start, *ids("system\nYou are a helpful assistant"), end, *line]
        return [*system, start, *ids(f"user\n{user}"), end, *line, start, *ids("assistant\n")]
    if name == "mistral_v3":
        return [1, 3, *ids(user), 4]
    first, *rest = ids(f"[INST] {user.strip()} [/INST]")
    assert first == 518  # a bracket with a space before it, which transformers leaves out behind <s>
    return [1, 29961, *rest]


@functools.cache
def prompts() -> Sequence[Prompt]:
    """Of every task the first users' questions, without and with five retrieved items."""
    made = []
    for task in TASKS:
        for item in task(data=str(SHARED / "lamp")).items(Selection(limit=4)):
            example = item.example
            made += [example.prompt(), example.prompt(retrieve("bm25", example, 5))]
    return made


def content(prompt: Prompt) -> str:
    (message,) = prompt.render()
    assert isinstance(message, Message)
    assert message.role == "user"
    return message.content


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_a_chat_prompt_is_the_models_format_token_by_token(load, name):
    encoder = load(name).encoder
    for prompt in prompts():
        encoded = encoder.encode(prompt.render())
        user = content(prompt)
        assert encoded.text == CHAT[name].format(user.strip() if name in ("llama3", "llama2") else user)
        assert list(encoded.ids) == chat_ids(name, user)


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_a_prompt_has_one_bos_where_the_tokenizer_has_one(load, name):
    encoder, bos = load(name).encoder, BOS[name]
    assert encoder.bos_id == bos
    for prompt in prompts():
        for rendered in (prompt.render(), content(prompt), f"{encoder.tokenizer.bos_token or ''}{content(prompt)}"):
            encoded = encoder.encode(rendered)
            assert encoded.ids.count(bos) == (bos is not None)
            assert encoded.bos == (encoded.ids[0] == bos)
            assert encoder.lengths([rendered, "b"]) == [len(encoded.ids), len(encoder.encode("b").ids)]


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_offsets_point_at_each_tokens_text(load, name):
    encoder = load(name).encoder
    for prompt in prompts()[1:6:4]:
        encoded = encoder.encode(prompt.render())
        assert len(encoded.offsets) == len(encoded.ids)
        assert [start for start, _ in encoded.offsets] == sorted(start for start, _ in encoded.offsets)
        assert encoded.offsets[-1][1] == len(encoded.text)
        for token, (start, end) in zip(encoded.ids[-40:], encoded.offsets[-40:], strict=True):
            assert encoder.tokenizer.decode([token]).strip() in encoded.text[start:end]


@pytest.mark.parametrize("name", MODEL_NAMES)
@pytest.mark.parametrize("answer", ["[1]", "comedy", "A headline: of things", "4"])
def test_answer_ids_are_those_the_template_gives_an_assistant_turn(load, name, answer):
    encoder = load(name).encoder
    rendered = prompts()[0].render()
    conversation = [{"role": "user", "content": rendered[0].content}, {"role": "assistant", "content": answer}]
    whole = encoder.tokenizer.apply_chat_template(conversation, tokenize=False)
    together = encoder.tokenizer.encode(whole, add_special_tokens=False)
    apart = [*encoder.encode(rendered).ids, *encoder.answer(answer, rendered)]
    assert together[: len(apart)] == apart
    assert encoder.decode(encoder.answer(answer, rendered)).strip() == answer


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_prompt_and_answer_are_joined_as_ids_and_never_tokenised_together(load, name):
    lm = load(name)
    item = Lamp4(data=str(SHARED / "lamp")).items(Selection(limit=1))[0]
    system = ModelSystem(lm, Plain(), Generation(8))
    ((scored,),) = system.score([item.example], [["News"]])
    prompt = lm.encoder.encode(item.example.prompt().render()).ids
    answer = lm.encoder.answer("News", item.example.prompt().render())
    with torch.no_grad():
        logits = lm.model(torch.tensor([[*prompt, *answer]])).logits[0].double()
    expected = torch.log_softmax(logits, -1)[len(prompt) - 1 : -1].gather(1, torch.tensor(answer)[:, None])[:, 0]
    assert scored.logprobs == pytest.approx(expected.tolist(), abs=1e-4)
    # half a word before and half after would become one token if the text were tokenised again
    request = Decoder(lm).prepare("x", Plan((Stream(Prompt(_raw, "The internatio")),)), 8)
    assert request.prompts[0].encoded.ids[-1] == lm.encoder.encode("The internatio").ids[-1]


def _raw(text: str, items: Sequence[Any], summary: str) -> str:
    return text


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_a_model_folder_answers_real_questions(load, name):
    items = Lamp7(data=str(SHARED / "lamp")).items(Selection(limit=2))
    samples = list(ModelSystem(load(name), RAG(), Generation(3)).respond([item.example for item in items]))
    assert [sample.error for sample in samples] == [None, None]
    assert all(sample.history_items == 5 and sample.new_tokens == 3 for sample in samples)


@pytest.mark.parametrize("name", ["llama3", "mistral_v3", "llama2"])
def test_a_base_model_gets_the_raw_text(load, name):
    tokenizer = load(name).encoder.tokenizer
    template, tokenizer.chat_template = tokenizer.chat_template, None
    try:
        base = Encoder(tokenizer)
        for prompt in prompts()[:4]:
            encoded = base.encode(prompt.render())
            assert encoded.text == content(prompt)
            assert list(encoded.ids) == [BOS[name], *plain_ids(name)(content(prompt))]
            answer = list(base.answer("News", prompt.render()))
            assert answer == plain_ids(name)(" News" if name == "llama3" else "News")
    finally:
        tokenizer.chat_template = template


def test_a_line_break_before_an_answer_takes_no_space(load):
    encoder = load("llama2").encoder
    assert encoder.tokenizer.convert_ids_to_tokens(list(encoder.answer("News", "Headline:\n"))) == ["News"]
    assert encoder.tokenizer.convert_ids_to_tokens(list(encoder.answer("News", "Headline:"))) == ["▁News"]


def test_a_bare_sentencepiece_file_gives_the_ids_of_its_tokenizer_json(load, tmp_path):
    with_json = load("llama2").encoder
    shutil.copytree(TOKENIZERS / "llama2", tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer.json"))
    bare = Encoder.load(tmp_path / "bare")
    for prompt in prompts():
        assert bare.encode(prompt.render()).ids == with_json.encode(prompt.render()).ids


def test_a_jinja_file_beside_the_tokenizer_is_its_template(load):
    assert not (TOKENIZERS / "mistral_v3/tokenizer_config.json").exists()
    assert load("mistral_v3").encoder.chat
    rendered = prompts()[0].render()
    encoder = load("mistral_v3").encoder
    assert encoder.encode(rendered).ids[:2] == (1, 3)
    assert encoder.encode(rendered).ids[-1] == 4


def test_vicuna_gets_the_format_it_was_trained_with(load, tmp_path):
    folder = shutil.copytree(load("llama2").source, tmp_path / "vicuna")
    config = folder / "tokenizer_config.json"
    config.write_text(config.read_text().replace('"chat_template"', '"unused"'))
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    assert not Encoder.load(folder).chat
    assert MODELS["vicuna-13b"] in CHAT_TEMPLATES
    encoder = load_model(model_row("vicuna-13b", str(folder)), device="cpu").encoder
    encoded = encoder.encode((Message("user", "Hello"),))
    assert encoded.text.endswith("polite answers to the user's questions. USER: Hello ASSISTANT:")
    assert list(encoded.ids) == [1, *plain_ids("llama2")(encoded.text)]
    assert list(encoder.answer("Hi", (Message("user", "Hello"),))) == plain_ids("llama2")("Hi")
