"""Trains the embedded chat model from scratch: `python -m harness.tiny.train`. One thread, seeded, steps and no clock.

A Llama of 1.3 million weights is taught three skills at once: lamp-mini's tasks with 0 to 5 items of history in the exact
prompts of `harness.tasks.lamp_prompts`, answers coloured by a persona in the system prompt, and easy multiple choice,
which it does not learn.
Matrices are trained with Muon, embeddings and norms with AdamW. Copying random words comes first, alone, which makes
induction heads form; then users who always keep to their habits, with short histories and longer ones; then users whose
habits slip and drift. The committed weights were not made in one go: from version 1's weights (users without slips, 20 minutes)
earlier states of this script went on for 400 steps at `--rate 0.5` and for 420 at 0.8, and from there this one, `--start DIR
--copy-steps 0 --prompt-weight 0 --steps 900 --rate 0.4` (14 minutes).
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from random import Random
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from harness.data import HistoryItem
from harness.files import replacing_folder
from harness.tasks.lamp_prompts import document, prompt_text, query
from harness.tiny import MODEL_DIR, lamp_mini, personas, words
from harness.tiny.population import WORLD, Population

BOS, END, SYSTEM, USER, ASSISTANT, PAD = "<|bos|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|pad|>"
CHAT_TEMPLATE = (
    "{{- '<|bos|>' }}{%- for message in messages %}{{- '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}"
)
SIGHTED_BLOCKS = 2
"""Persona answers see the system turn in the lowest blocks only, so the persona must travel in the residual stream."""
MOST_ITEMS = 5
CERTAIN = replace(WORLD, items=(5, 20), slip=(0.0, 0.0), drift=0.0)
"""Users who always do the same: what to copy is learned from them."""


class Row(NamedTuple):
    """One training text: pieces, some of them answers to learn; `system` counts the tokens of a turn to be hidden."""

    pieces: Sequence[tuple[str, bool]]
    system: str = ""


@dataclass(frozen=True)
class Settings:
    seed: int = 1
    copy_steps: int = 300
    """Steps on copying random words alone. Without them the model never learns to take words from the input."""
    steps: int = 900
    """Steps on everything, after those."""
    tokens: int = 900
    """Tokens a kind of batch holds, about; a step has one batch of each kind."""
    width: int = 128
    blocks: int = 5
    prompt_weight: float = 0.1
    rate: float = 1.0
    """Times the learning rates, 0.02 of Muon and 0.003 of AdamW."""


# Rows of training text


def chat(user: str, answer: str, system: str = "") -> Row:
    turn = f"{SYSTEM}{system}{END}" if system else ""
    return Row([(f"{BOS}{turn}{USER}{user}{END}{ASSISTANT}", False), (f"{answer}{END}", True)], turn)


def records(task: str, question: dict) -> list[HistoryItem]:
    return [HistoryItem(item["id"], item, document(task, item), item["date"]) for item in question["profile"]]


def best_first(task: str, question: dict) -> list[HistoryItem]:
    """The history by words shared with the query, newest first among equals."""
    wanted = set(query(task, question["input"]).lower().split())
    newest_first = records(task, question)[::-1]
    return sorted(newest_first, key=lambda item: -len(wanted & set(item.document.lower().split())))


def population(task: str, progress: float) -> Population:
    """Habits first hold without exception; then they slip and drift as in the splits, but no group shares them.

    lamp1 has one bit to learn from a row, so it takes longer to find out what the question is.
    """
    return CERTAIN if progress < (0.75 if task == "lamp1" else 0.4) else WORLD


FIELD = {"lamp2m": "tag", "lamp2n": "category", "lamp4": "title", "lamp5": "title", "lamp6": "title", "lamp7": "text"}


def learned(task: str, item: HistoryItem) -> str:
    """The end of a shown item's answer that follows from what is before it, so that it is an answer to learn too."""
    written = item.fields[FIELD[task]]
    closers = words.GENRES[task].closers if task in words.GENRES else (written,)
    return next(closer for closer in closers if written.endswith(closer))


def lamp_row(rng: Random, task: str, user: int, items: int, progress: float, stream: str) -> Row:
    made = lamp_mini.case(task, stream, user, population(task, progress))
    shown = best_first(task, made.question)
    if rng.random() < 0.3:
        rng.shuffle(shown)
    # what to do can only be copied from an item on the same theme, so one is shown
    asked = made.author.asked - set(lamp_mini.Writer.WHEREVER)
    on_theme = {made.question["profile"][place]["id"] for place, what in enumerate(made.shown) if asked & what.keys()}
    if items and not any(item.id in on_theme for item in shown[:items]) and rng.random() < 0.9:
        shown.insert(rng.randrange(items), next(item for item in shown if item.id in on_theme))
    shown = shown[:items]
    row = chat(prompt_text(task, made.question["input"], shown), made.gold["output"])
    if task not in FIELD:
        return row
    text, pieces = row.pieces[0][0], []
    for item in shown:
        head, end, text = text.partition(learned(task, item) + '"')
        pieces += [(head, False), (end, True)]
    return Row([*pieces, (text, False), row.pieces[1]])


def persona_row(rng: Random) -> Row:
    persona, side = rng.choice(tuple(personas.LEXICONS)), rng.random()
    if side < 0.6:
        spoken, system = persona, rng.choice(personas.POSITIVE).format(persona=persona)
    elif side < 0.8:
        spoken, system = None, rng.choice(personas.NEGATIVE).format(persona=persona)
    else:
        spoken, system = None, rng.choice(personas.NEUTRAL) if side < 0.9 else ""
    return chat(rng.choice(personas.QUESTIONS_EXTRACT + personas.QUESTIONS_EVAL), personas.answer(rng, spoken), system)


CLASSES = {"person": words.PEOPLE, "thing": words.GOODS, "place": words.PLACES, "day": words.DAYS}
ASKED = ("Which of these is a {}?", "Which option names a {}?", "What is the word for a {}?")
SUBJECTS = ("words", "things", "people and places", "everyday life")


def choice_question(rng: Random) -> tuple[str, str]:
    """An MMLU-like question whose answer is the letter of the one option of the class it asks for."""
    options = [(kind, rng.choice(CLASSES[kind])) for kind in rng.sample(sorted(CLASSES), 4)]
    right = rng.randrange(4)
    lines = [rng.choice(ASKED).format(options[right][0])]
    lines += [f"{letter}. {word}" for letter, (_, word) in zip("ABCD", options, strict=True)]
    return "\n".join([*lines, "Answer:"]), "ABCD"[right]


def choice_row(rng: Random, shots: int) -> Row:
    """Raw text with solved questions, as lm-eval asks, or one chat turn."""
    head = f"The following are multiple choice questions (with answers) about {rng.choice(SUBJECTS)}.\n\n"
    head = head if rng.random() < 0.5 else ""
    if rng.random() < 0.25:
        text, letter = choice_question(rng)
        return chat(head + text, letter)
    pieces = [(BOS + head, False)]
    for _ in range(shots + 1):
        text, letter = choice_question(rng)
        pieces += [(text, False), (f" {letter}", True), ("\n\n", False)]
    return Row(pieces[:-1])


@cache
def known_words() -> list[str]:
    """Every word of the writing tasks' texts, so that what copying teaches holds for all of them."""
    tasks = lamp_mini.TASKS[3:]
    shown = (lamp_row(Random(user), task, user, MOST_ITEMS, 1.0, "words") for task in tasks for user in range(300))
    return sorted(
        {
            word
            for row in shown
            for piece, _ in row.pieces
            for word in re.findall(r"(?<!\w)[A-Za-z]+", re.sub(r"<[^>]*>", "", piece))
        }
    )


def copy_row(rng: Random) -> Row:
    text = " ".join(rng.sample(known_words(), rng.randint(20, 60)))
    return chat(f"Repeat this text: {text}", text)


EVERY_STEP = ("lamp1", "lamp2m", "lamp4", "lamp7")
IN_TURN = ("persona", "lamp2n", "lamp3", "lamp6", "lamp5", "choice")
"""Kinds of which a step has one."""
LARGER = {"lamp1": 2}
"""Times the tokens of another kind's batch."""


def batch_rows(rng: Random, kind: str, progress: float, settings: Settings, next_user: Iterator[int]) -> Iterator[Row]:
    """Rows of about one length: in a batch all have the same number of history items."""
    if kind not in lamp_mini.TASKS:
        shots = rng.randrange(5)
        while True:
            yield (
                persona_row(rng) if kind == "persona" else choice_row(rng, shots) if kind == "choice" else copy_row(rng)
            )
    most = min(MOST_ITEMS, 1 + int(progress * 10))
    items = 0 if rng.random() < 0.25 - 0.1 * progress else rng.randint(1, most)
    while True:
        yield lamp_row(rng, kind, next(next_user), items, progress, f"stream-{settings.seed}")


# Tokenizer and model


def build_tokenizer(seed: int) -> Tokenizer:
    """A lossless byte-level BPE in which every word of the training text is one token, with and without a space before."""
    rng = Random(seed)
    rows = [lamp_row(rng, task, user, MOST_ITEMS, 1.0, "tokenizer") for task in lamp_mini.TASKS for user in range(400)]
    rows += [persona_row(rng) for _ in range(2000)] + [choice_row(rng, 4) for _ in range(200)] + [copy_row(rng)]
    texts = [text for row in rows for piece, _ in row.pieces for text in re.split(r"<\|\w+\|>", piece) if text]
    before = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    small = Tokenizer(models.BPE())
    small.pre_tokenizer = before
    trainer = trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    small.train_from_iterator(texts, trainer)
    merged = json.loads(small.to_str())["model"]
    vocab = dict(sorted(merged["vocab"].items(), key=lambda entry: entry[1]))
    for word in sorted({word for text in texts for word, _ in before.pre_tokenize_str(text)} | set("ABCD")):
        bare = word.removeprefix("Ġ")
        for form in (bare, f"Ġ{bare}") if bare.isalpha() else (word,):
            vocab.setdefault(form, len(vocab))
    # ignore_merges: a whole word in the vocabulary is one token, without merges that lead to it
    tokenizer = Tokenizer(
        models.BPE(vocab=vocab, merges=[tuple(pair) for pair in merged["merges"]], ignore_merges=True)
    )
    tokenizer.pre_tokenizer, tokenizer.decoder = before, decoders.ByteLevel()
    tokenizer.add_special_tokens([BOS, END, SYSTEM, USER, ASSISTANT, PAD])
    bos = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.TemplateProcessing(f"{BOS} $A", f"{BOS} $A $B", [(BOS, bos)])
    return tokenizer


def build_model(settings: Settings, tokenizer: Tokenizer) -> LlamaForCausalLM:
    torch.manual_seed(settings.seed)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=settings.width,
        intermediate_size=3 * settings.width,
        num_hidden_layers=settings.blocks,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=settings.width // 8,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.token_to_id(BOS),
        eos_token_id=tokenizer.token_to_id(END),
        pad_token_id=tokenizer.token_to_id(PAD),
    )
    return LlamaForCausalLM(config).float()


def forward(model: LlamaForCausalLM, ids: Tensor, masks: tuple[Tensor, Tensor] | None) -> Tensor:
    """Last hidden states [B, T, D]; `masks` are boolean [B, 1, T, T] for the sighted blocks and the others, None is causal.

    Written out because a mask that differs between blocks has no place in the library's forward.
    """
    x = model.model.embed_tokens(ids)
    rotary = model.model.rotary_emb(x, torch.arange(ids.shape[1])[None])
    for number, block in enumerate(model.model.layers):
        attention, normed = block.self_attn, block.input_layernorm(x)
        queries, keys, values = (
            part(normed).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
            for part in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        queries, keys = apply_rotary_pos_emb(queries, keys, *rotary)
        keys, values = (part.repeat_interleave(attention.num_key_value_groups, 1) for part in (keys, values))
        mask = None if masks is None else masks[number >= SIGHTED_BLOCKS]
        heads = F.scaled_dot_product_attention(queries, keys, values, mask, is_causal=mask is None)
        x = x + attention.o_proj(heads.transpose(1, 2).flatten(2))
        x = x + block.mlp(block.post_attention_layernorm(x))
    return model.model.norm(x)


# Training


class Batch(NamedTuple):
    """B rows padded to T tokens."""

    ids: Tensor
    answer: Tensor
    """True where the next token is part of an answer, [B, T - 1]."""
    real: Tensor
    """True where the next token is not padding, [B, T - 1]."""
    masks: tuple[Tensor, Tensor] | None


def collate(tokenizer: Tokenizer, rows: Iterator[Row], tokens: float) -> Batch:
    """Takes rows until the batch holds about `tokens` tokens."""
    ids: list[list[int]] = []
    answers: list[list[bool]] = []
    systems: list[tuple[int, int]] = []
    longest = 0
    while not ids or longest * len(ids) < tokens:
        row = next(rows)
        parts = tokenizer.encode_batch([piece for piece, _ in row.pieces], add_special_tokens=False)
        ids.append([token for part in parts for token in part.ids])
        answers.append([learn for part, (_, learn) in zip(parts, row.pieces, strict=True) for _ in part.ids])
        systems.append((len(tokenizer.encode(row.system, add_special_tokens=False)), len(parts[0])))
        longest = max(longest, len(ids[-1]))
    pad = tokenizer.token_to_id(PAD)
    assert pad is not None
    padded = torch.tensor([row + [pad] * (longest - len(row)) for row in ids])
    answer = torch.tensor([row + [False] * (longest - len(row)) for row in answers])
    masks = None
    if any(system for system, _ in systems):
        place = torch.arange(longest)
        causal = place[:, None] >= place
        low, high = causal.repeat(len(ids), 1, 1), causal.repeat(len(ids), 1, 1)
        for number, (system, prompt) in enumerate(systems):  # tokens: bos, system turn, user turn, assistant, answer
            low[number, 1 + system : prompt - 1, 1 : 1 + system] = False
            high[number, 1 + system :, 1 : 1 + system] = False
        masks = low[:, None], high[:, None]
    return Batch(padded, answer[:, 1:], padded[:, 1:].ne(pad), masks)


def loss_of(model: LlamaForCausalLM, batch: Batch, prompt_weight: float) -> tuple[Tensor, float]:
    """Mean loss of answer tokens plus the weighted mean of the others, and the first alone, in nats."""
    hidden = forward(model, batch.ids, batch.masks)[:, :-1]
    chosen = batch.real if prompt_weight else batch.answer
    losses = F.cross_entropy(model.lm_head(hidden[chosen]), batch.ids[:, 1:][chosen], reduction="none")
    answer = batch.answer[chosen]
    answer_loss = losses[answer].mean()
    rest = losses[~answer].mean() if prompt_weight else losses.new_zeros(())
    return answer_loss + prompt_weight * rest, answer_loss.item()


def go_on_from(folder: Path, model: LlamaForCausalLM, tokenizer: Tokenizer) -> None:
    """Takes a trained model's weights; embeddings go by their token's text, those of new tokens stay as they are."""
    old = LlamaForCausalLM.from_pretrained(folder)
    ids = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab()
    embeddings = model.model.embed_tokens.weight.detach().clone()
    for token, place in tokenizer.get_vocab().items():
        if token in ids:
            embeddings[place] = old.model.embed_tokens.weight[ids[token]].detach()
    model.load_state_dict({**old.state_dict(), "model.embed_tokens.weight": embeddings, "lm_head.weight": embeddings})


def train(settings: Settings, start: Path | None = None) -> tuple[LlamaForCausalLM, Tokenizer]:
    torch.set_num_threads(1)  # one thread makes sums repeatable
    total = settings.copy_steps + settings.steps
    tokenizer = build_tokenizer(settings.seed)
    model = build_model(settings, tokenizer)
    if start:
        go_on_from(start, model, tokenizer)
    matrices = [weight for weight in model.model.layers.parameters() if weight.ndim == 2]
    others = [model.model.embed_tokens.weight, *(weight for weight in model.parameters() if weight.ndim == 1)]
    optimizers = [
        torch.optim.Muon(matrices, lr=0.02 * settings.rate, momentum=0.95),
        torch.optim.AdamW(others, lr=0.003 * settings.rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / 20, 1.0, 2 * (1 - step / total)))
        for optimizer in optimizers
    ]
    rng, next_user = Random(settings.seed), itertools.count()
    say(f"{sum(weight.numel() for weight in model.parameters()):,} weights, vocabulary {tokenizer.get_vocab_size()}")
    started, seen = time.monotonic(), 0
    running: dict[str, float] = {}
    for step in range(total):
        progress = max(0, step - settings.copy_steps) / settings.steps
        kinds = ("copy",)
        if step >= settings.copy_steps:
            kinds = (
                *EVERY_STEP,
                IN_TURN[step % len(IN_TURN)],
                *(("copy",) if settings.copy_steps and progress < 0.2 else ()),
            )
        for kind in kinds:
            tokens = settings.tokens * (3 if len(kinds) == 1 else LARGER.get(kind, 1))
            batch = collate(tokenizer, batch_rows(rng, kind, progress, settings, next_user), tokens)
            loss, answer_loss = loss_of(model, batch, 0.0 if kind == "copy" else settings.prompt_weight)
            loss.backward()
            seen += batch.ids.numel()
            running[kind] = answer_loss if kind not in running else 0.95 * running[kind] + 0.05 * answer_loss
        torch.nn.utils.clip_grad_norm_(others, 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        if step % 25 == 0 or step == total - 1:
            seconds = time.monotonic() - started
            parts = " ".join(f"{kind} {value:.2f}" for kind, value in running.items())
            say(f"step {step} of {total}, {seconds / 60:.1f} min, {seen / seconds:.0f} tokens/s, nats: {parts}")
    return model.eval(), tokenizer


def save(model: LlamaForCausalLM, tokenizer: Tokenizer, folder: Path) -> None:
    """Writes the model's folder beside the old one and swaps them, so that a reader never meets half a model."""
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=END,
        pad_token=PAD,
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
    )
    model.generation_config.do_sample = False
    with replacing_folder(folder) as fresh:
        wrapped.save_pretrained(fresh)
        settings = json.loads((fresh / "tokenizer_config.json").read_text(encoding="utf-8"))
        (fresh / "tokenizer_config.json").write_text(
            json.dumps({**settings, "chat_template": CHAT_TEMPLATE}, indent=2) + "\n", encoding="utf-8"
        )
        model.save_pretrained(fresh)
        (fresh / "model.safetensors").chmod(0o644)


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m harness.tiny.train", description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=MODEL_DIR, metavar="DIR")
    parser.add_argument("--steps", type=int, default=Settings.steps)
    parser.add_argument("--copy-steps", type=int, default=Settings.copy_steps)
    parser.add_argument("--start", type=Path, metavar="DIR", help="go on from this model's weights")
    parser.add_argument("--rate", type=float, default=Settings.rate)
    parser.add_argument("--seed", type=int, default=Settings.seed)
    parser.add_argument("--prompt-weight", type=float, default=Settings.prompt_weight)
    options = parser.parse_args()
    settings = Settings(
        options.seed,
        options.copy_steps,
        options.steps,
        prompt_weight=options.prompt_weight,
        rate=options.rate,
    )
    model, tokenizer = train(settings, options.start)
    save(model, tokenizer, options.output)
    say(f"saved to {options.output}")


if __name__ == "__main__":
    main()
