"""Measures the embedded model on users it never saw: `python -m harness.tiny.evaluate [--model DIR]` prints a table as JSON.

A check of the training script, with its own loops on purpose: the harness proper is measured elsewhere. Two threads at most.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import torch
from rouge_score.rouge_scorer import RougeScorer
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from harness.tasks.lamp_prompts import prompt_text
from harness.tiny import MODEL_DIR, lamp_mini, oracle, personas, words
from harness.tiny.train import MOST_ITEMS, choice_question, records

_ROUGE = RougeScorer(["rouge1"], use_stemmer=False)


class Judged:
    """The model with greedy answers and teacher-forced losses."""

    def __init__(self, folder: Path) -> None:
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder)
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)

    def prompt(self, user: str, system: str = "") -> list[int]:
        turns = [{"role": "system", "content": system}] if system else []
        turns.append({"role": "user", "content": user})
        text = self.tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        return self.tokenizer.encode(str(text), add_special_tokens=False)

    @torch.inference_mode()
    def answers(self, prompts: Sequence[list[int]], rows: int = 50) -> list[str]:
        texts: dict[int, str] = {}
        order = sorted(range(len(prompts)), key=lambda place: len(prompts[place]))
        for start in range(0, len(order), rows):
            places = order[start : start + rows]
            longest = max(len(prompts[place]) for place in places)
            pads = [longest - len(prompts[place]) for place in places]
            ids = torch.tensor(
                [[self.tokenizer.pad_token_id] * pad + prompts[place] for pad, place in zip(pads, places, strict=True)]
            )
            seen = torch.tensor([[0] * pad + [1] * (longest - pad) for pad in pads])
            made = self.model.generate(ids, attention_mask=seen, do_sample=False, max_new_tokens=32)[:, longest:]
            texts.update(zip(places, self.tokenizer.batch_decode(made, skip_special_tokens=True), strict=True))
        return [texts[place] for place in range(len(prompts))]

    @torch.inference_mode()
    def nll(self, pairs: Sequence[tuple[list[int], list[int]]], zeroed: Sequence[tuple[int, int]] = ()) -> float:
        """Mean nats a row of the answers, with (block, head) slices of the o_proj input zeroed from the last prompt token on."""
        handles, start, width = [], torch.zeros(0), self.model.config.head_dim

        def zero(block: int):
            def hook(module, args: tuple[Tensor]) -> tuple[Tensor]:
                x = args[0].clone()
                late = torch.arange(x.shape[1]) >= start[:, None]
                for head in (head for number, head in zeroed if number == block):
                    x[..., head * width : (head + 1) * width] *= ~late[..., None]
                return (x,)

            return hook

        total, pairs = 0.0, sorted(pairs, key=lambda pair: len(pair[0]))
        try:
            for block in {block for block, _ in zeroed}:
                handles.append(self.model.model.layers[block].self_attn.o_proj.register_forward_pre_hook(zero(block)))
            for begin in range(0, len(pairs), 50):
                group = pairs[begin : begin + 50]
                longest = max(len(prompt) + len(answer) for prompt, answer in group)
                start = torch.tensor([len(prompt) - 1 for prompt, _ in group])
                ids = torch.tensor(
                    [[*prompt, *answer] + [0] * (longest - len(prompt) - len(answer)) for prompt, answer in group]
                )
                hidden = self.model.model(ids).last_hidden_state
                for row, (prompt, answer) in zip(
                    hidden, group, strict=True
                ):  # the vocabulary at answer tokens only: the rest is most of the cost
                    logits = self.model.lm_head(row[len(prompt) - 1 : len(prompt) + len(answer) - 1])
                    total += torch.nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="sum").item()
        finally:
            for handle in handles:
                handle.remove()
        return total / len(pairs)


def asked(task: str, question: dict, items: int) -> str:
    """With the items that `bm25` finds."""
    history = records(task, question)
    return prompt_text(task, question["input"], [history[place] for place in oracle.found(task, question)[:items]])


def lamp(judged: Judged, task: str, items: int, other: bool) -> float:
    """Dev accuracy (lamp1, lamp2), mean absolute error (lamp3) or ROUGE-1 with the best items of one's own or another's history."""
    questions, golds = lamp_mini.load(task, "dev")
    prompts = []
    for number, question in enumerate(questions):
        owner = questions[(number + 1) % len(questions)] if other else question
        prompts.append(judged.prompt(asked(task, {**question, "profile": owner["profile"]}, items)))
    scores = []
    for answer, gold in zip(judged.answers(prompts), (gold["output"] for gold in golds), strict=True):
        if task == "lamp3":
            scores.append(abs(int(answer) - int(gold)) if answer in "12345" and answer else 4)
        elif task in words.GENRES:
            scores.append(_ROUGE.score(gold, answer)["rouge1"].fmeasure)
        else:
            scores.append(answer == gold)
    return round(sum(scores) / len(scores), 3)


def heads(judged: Judged, task: str, draws: int = 20) -> dict[str, object]:
    """What the 4 heads that matter most on train users cost on dev users, against random sets of 4."""

    def pairs(split: lamp_mini.Split, users: int) -> list[tuple[list[int], list[int]]]:
        made = []
        for question, gold in list(zip(*lamp_mini.load(task, split), strict=True))[:users]:
            prompt = judged.prompt(asked(task, question, MOST_ITEMS))
            answer = judged.tokenizer.encode(gold["output"], add_special_tokens=False)
            made.append((prompt, [*answer, judged.tokenizer.eos_token_id]))
        return made

    config = judged.model.config
    everyone = [
        (block, head) for block in range(config.num_hidden_layers) for head in range(config.num_attention_heads)
    ]
    train, dev = pairs("train", 100), pairs("dev", 200)
    raised = {head: judged.nll(train, [head]) for head in everyone}
    top = sorted(everyone, key=lambda head: -raised[head])[:4]
    base, rng = judged.nll(dev), Random(0)
    random = [judged.nll(dev, rng.sample(everyone, 4)) - base for _ in range(draws)]
    cost, mean = judged.nll(dev, top) - base, sum(random) / draws
    return {
        "top": top,
        "nll": round(base, 3),
        "top_cost": round(cost, 3),
        "random_cost": round(mean, 3),
        "ratio": round(cost / mean, 1),
    }


def persona(judged: Judged) -> dict[str, dict[str, float]]:
    """Mean lexicon share of answers to half of the evaluation questions under positive, negative, neutral and no system prompts."""
    table: dict[str, dict[str, float]] = {}
    for name in personas.LEXICONS:
        sides = {
            "positive": personas.POSITIVE,
            "negative": personas.NEGATIVE,
            "neutral": personas.NEUTRAL,
            "none": ("",),
        }
        table[name] = {}
        for side, systems in sides.items():
            prompts = [judged.prompt(q, s.format(persona=name)) for q in personas.QUESTIONS_EVAL[::2] for s in systems]
            shares = [personas.lexicon_share(text, name) for text in judged.answers(prompts, 100)]
            table[name][side] = round(sum(shares) / len(shares), 3)
    return table


@torch.inference_mode()
def choice(judged: Judged, questions: int = 200) -> dict[str, float]:
    """Accuracy by the likeliest letter, as raw text after a BOS and as a chat turn."""
    rng, right = Random("choice"), {"raw": 0, "chat": 0}
    for _ in range(questions):
        text, letter = choice_question(rng)
        for form, ids, space in (("raw", judged.tokenizer.encode(text), " "), ("chat", judged.prompt(text), "")):
            letters = [judged.tokenizer.encode(space + option, add_special_tokens=False)[0] for option in "ABCD"]
            logits = judged.model(torch.tensor([ids])).logits[0, -1, letters]
            right[form] += "ABCD"[int(logits.argmax())] == letter
    return {form: round(count / questions, 3) for form, count in right.items()}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m harness.tiny.evaluate", description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, default=MODEL_DIR, metavar="DIR")
    judged = Judged(parser.parse_args().model)
    print(json.dumps({"choice": choice(judged), "persona": persona(judged)}, indent=1), flush=True)
    for task in lamp_mini.TASKS:
        sides = {"plain": lamp(judged, task, 0, False), "own": lamp(judged, task, MOST_ITEMS, False)}
        sides["own_1"] = lamp(judged, task, 1, False)
        sides["other"] = lamp(judged, task, MOST_ITEMS, True)
        print(json.dumps({task: sides}), flush=True)
    for task in ("lamp4", "lamp2m"):
        print(json.dumps({"heads": task, **heads(judged, task)}), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
