"""What promises are tested with: a small random model of any family, users, and the error of a broken promise."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from harness.data import Example, HistoryItem, Labelled, Message, User
from harness.engine.encoder import Encoder
from harness.engine.model import LanguageModel
from harness.engine.sites import FAMILIES, check_config
from harness.errors import HarnessError

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m['role'][0] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)


class ContractBroken(HarnessError):
    """A promise that a method or a task does not keep; the message names it and what was measured."""


def broken(promise: str, detail: str) -> ContractBroken:
    return ContractBroken(f"promise broken: {promise}: {detail}")


def byte_tokenizer(*, chat: bool = True) -> Any:
    """A tokenizer of 256 bytes and three special tokens, made in memory."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<s>": 0, "</s>": 1, "<pad>": 2, **{c: i + 3 for i, c in enumerate(alphabet)}}
    raw = Tokenizer(models.BPE(vocabulary, [], unk_token=None))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    if chat:
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def random_lm(
    family: str = "llama", *, dtype: torch.dtype = torch.float64, seed: int = 0, chat: bool = True, **config: Any
) -> LanguageModel:
    """A small random model of a supported family; large initial weights make its logits differ."""
    from transformers import AutoConfig, AutoModelForCausalLM

    if family not in FAMILIES:
        raise ValueError(f"unknown family {family!r}; supported: {', '.join(FAMILIES)}")
    tokenizer = byte_tokenizer(chat=chat)
    settings: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.3,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
        "tie_word_embeddings": False,
    }
    if family == "qwen3":
        settings["head_dim"] = 12  # not hidden_size / heads, as in the real ones
    if family == "mistral":
        settings["sliding_window"] = None
    if family == "gemma3_text":
        kinds = ["sliding_attention", "full_attention", "sliding_attention"]
        settings |= {"head_dim": 12, "query_pre_attn_scalar": 9, "layer_types": kinds, "sliding_window": 512}
    if family == "gpt2":
        settings["n_inner"] = settings.pop("intermediate_size")
        settings.pop("num_key_value_heads")
        settings = {
            **settings, "n_embd": settings.pop("hidden_size"), "n_layer": settings.pop("num_hidden_layers"),
            "n_head": settings.pop("num_attention_heads"), "n_positions": settings.pop("max_position_embeddings"),
        }  # fmt: skip
    settings.update(config)
    made = AutoConfig.for_model(family, **settings)
    check_config(made)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(made, attn_implementation="sdpa", dtype=dtype)
    return LanguageModel(model.to(dtype), Encoder(tokenizer), name=f"random-{family}", source="random")


@dataclasses.dataclass(frozen=True)
class ToyTemplate:
    """Histories as lines before the input."""

    def __call__(self, text: str, items: Sequence[HistoryItem], summary: str) -> tuple[Message, ...]:
        lines = [summary] if summary else []
        return (Message("user", " ".join([*lines, *(item.fields["text"] for item in items), text])),)


def toy_examples(count: int, *, seed: int = 0) -> list[Labelled]:
    """Examples of different lengths, each with its own user and history."""
    random = np.random.default_rng(seed)
    words = ["ant", "bee", "cat", "dog", "eel", "fox", "gnu", "hen"]

    def text(low: int, high: int) -> str:
        return " ".join(random.choice(words, int(random.integers(low, high))))

    out = []
    for i in range(count):
        texts = [text(2, 5) for _ in range(int(random.integers(2, 5)))]
        history = tuple(HistoryItem(f"{seed}.{i}.{j}", {"text": t}, t) for j, t in enumerate(texts))
        query = text(1, 8)
        name = f"user-{seed}.{i}"
        example = Example(f"{seed}.{i}", User(name, history, _pairs(name, history)), query, query, ToyTemplate())
        out.append(Labelled(example, (text(1, 3),)))
    return out


def _pairs(user: str, history: tuple[HistoryItem, ...]) -> tuple[Labelled, ...]:
    """Each item as an example whose answer is its last word."""
    made = []
    for i, record in enumerate(history):
        text, _, answer = record.fields["text"].rpartition(" ")
        example = Example(f"{user}/{record.id}", User(user, history[:i]), text, text, ToyTemplate())
        made.append(Labelled(example, (answer,)))
    return tuple(made)
