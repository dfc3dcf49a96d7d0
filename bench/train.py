"""Training users' shifts and adapters together against one user after another, and with the trunk kept against without.

    python bench/train.py [--size stories260k] [--device cuda --size llama2-7b --users 8]

A random Llama; 16 users with 4 lessons each (a prompt of 24 to 40 tokens, an answer of 8), batches of 4. `ordinary` is the
loop everyone writes: one user at a time, transformers' own loss from labels, PEFT for LoRA and hooks for shifts, torch's
AdamW and clipping; `in_turn` is ours for one user at a time; `together` is ours for all of them. All take the same steps on
the same mean losses with the same clipping; the largest difference of a trained value is reported. `trunk` trains one shift
at the middle block with the residual below it kept over the epochs, and computed anew in each step (`anew`): seconds of an
epoch after the first, which is where they differ. `--adapters 1 8 32 64 256` trains the same number of rows in each step as
one adapter's and as those of more and more: `loss` is the share of the rows a second that is lost against one adapter.
Rounds of all contenders are interleaved and the fastest of each counts; ratios within this one run are the result.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import peft
import torch
from subject import SIZES, dtype_of, model, seconds, settings, write
from torch import Tensor

from harness.data import Prompt
from harness.engine.model import LanguageModel
from harness.engine.training.parameter_stacks import retract
from harness.engine.training.train import train
from harness.method import Fitted
from harness.plan import Stream
from harness.run.contract import ToyTemplate
from harness.training import Adapter, Learner, Lesson, Recipe, Shifts, middle


def learners(users: int, lessons: int, low: int, high: int) -> list[Learner]:
    """Prompts of `low` to `high` tokens, one a character, and answers of 7 and an end token."""
    random = torch.Generator().manual_seed(0)

    def text(length: int) -> str:
        return "".join(chr(97 + int(i)) for i in torch.randint(0, 26, (length,), generator=random))

    def lesson() -> Lesson:
        length = int(torch.randint(low, high + 1, (1,), generator=random))
        return Lesson(Stream(Prompt(ToyTemplate(), text(length - 8))), text(7))

    return [Learner(f"user {n}", [lesson() for _ in range(lessons)]) for n in range(users)]


def ordinary(
    lm: LanguageModel, learner: Learner, part: Shifts | Adapter, recipe: Recipe, first: Fitted
) -> dict[str, Tensor]:
    """The user's trained values by the ordinary loop, from the same first ones; every step takes all lessons."""
    rows, starts = [], []
    for lesson in learner.lessons:
        prompt = lm.encoder.encode(lesson.stream.prompt.render()).ids
        rows.append((*prompt, *lm.encoder.answer(lesson.answer, lesson.stream.prompt.render()), 1))
        starts.append(len(prompt))
    longest = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=lm.device)
    column, length = torch.arange(longest), torch.tensor(list(map(len, rows)))[:, None]
    mask = (column < length).long().to(lm.device)
    answer = (column >= torch.tensor(starts)[:, None]) & (column < length)
    labels = ids.masked_fill(~answer.to(lm.device), -100)
    with _shifted(lm, part, first) if isinstance(part, Shifts) else _adapted(lm, part, first) as (network, values):
        fixed = [value for name, value in values.items() if name.endswith(("rotation", "bias"))]
        decayed = [value for name, value in values.items() if not name.endswith(("rotation", "bias"))]
        groups = [{"params": fixed, "weight_decay": 0.0}, {"params": decayed}]
        optimizer = torch.optim.AdamW(
            [g for g in groups if g["params"]], lr=recipe.lr, weight_decay=recipe.weight_decay
        )
        for rate in recipe.rates(recipe.epochs):
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.zero_grad()
            network(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss.backward()
            torch.nn.utils.clip_grad_norm_(list(values.values()), recipe.clip)
            optimizer.step()
            with torch.no_grad():
                for name, value in values.items():
                    if name.endswith("rotation"):
                        value.copy_(retract(value))
        return {name: value.detach().cpu().clone() for name, value in values.items()}


@contextlib.contextmanager
def _shifted(lm: LanguageModel, part: Shifts, first: Fitted) -> Iterator[tuple[Any, dict[str, Tensor]]]:
    values = {name: tensor.to(lm.device).clone().requires_grad_() for name, tensor in first.tensors.items()}
    rotation, weight, bias = (values[f"{part.name}.{kind}"] for kind in ("rotation", "weight", "bias"))
    handles = []
    for place, (site, _) in enumerate(part.places):

        def shift(_: object, __: object, x: Tensor, place: int = place) -> Tensor:
            r, w, b = rotation[place], weight[place], bias[place]
            wide = x.float()
            return x + ((wide @ w.T + b - wide @ r.T) @ r).to(x.dtype)

        handles.append(lm.sites.blocks[site.layer].register_forward_hook(shift))
    try:
        yield lm.model, values
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _adapted(lm: LanguageModel, part: Adapter, first: Fitted) -> Iterator[tuple[Any, dict[str, Tensor]]]:
    config = peft.LoraConfig(
        r=part.rank, lora_alpha=part.alpha, target_modules=list(part.targets), task_type="CAUSAL_LM"
    )
    network = peft.get_peft_model(lm.model, config)
    peft.set_peft_model_state_dict(network, dict(first.tensors))
    try:
        named = {name: value for name, value in network.named_parameters() if value.requires_grad}
        yield network, {name.replace(".default.", "."): value for name, value in named.items()}
    finally:
        network.unload()


def together(
    lm: LanguageModel, users: Sequence[Learner], part: Shifts | Adapter, recipe: Recipe, **options: Any
) -> list[Fitted]:
    states = train(lm, users, [part], recipe, **options)
    assert all(isinstance(state, Fitted) for state in states), states
    return states  # type: ignore[return-value]


def difference(states: Sequence[Fitted], others: Sequence[dict[str, Tensor]]) -> float:
    return max(
        float((state.tensors[name] - other[name]).abs().max())
        for state, other in zip(states, others, strict=True)
        for name in other
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--users", type=int, default=16)
    parser.add_argument("--lessons", type=int, default=4)
    parser.add_argument("--tokens", type=int, nargs=2, default=(24, 40))
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=256, help="of a step, for `adapters`")
    parser.add_argument("--adapters", type=int, nargs="*", default=(), help="that the rows belong to")
    parser.add_argument("--output", help="file for the JSON; by default stdout")
    args = parser.parse_args()
    lm = model(args.size, args.device, dtype_of(args.device))
    lm.encoder.eos_ids = frozenset({1})
    users = learners(args.users, args.lessons, *args.tokens)
    recipe = Recipe(epochs=args.epochs, batch_size=args.lessons, lr=1e-3)
    parts = {"perfit": Shifts("personal", middle(lm.sites.layers), 4), "lora": Adapter(("q_proj", "v_proj"))}
    results: dict[str, Any] = {}
    for name, part in parts.items():
        firsts = together(lm, users, part, Recipe(epochs=0))
        got: dict[str, Any] = {}

        def in_the_ordinary_way(part: Any = part, firsts: Any = firsts, got: Any = got) -> None:
            got["ordinary"] = [ordinary(lm, u, part, recipe, first) for u, first in zip(users, firsts, strict=True)]

        def in_turn(part: Any = part, got: Any = got) -> None:
            got["in_turn"] = [together(lm, [u], part, recipe)[0].tensors for u in users]

        def at_once(part: Any = part, got: Any = got) -> None:
            got["together"] = together(lm, users, part, recipe)

        ways: dict[str, Callable[[], None]] = {"ordinary": in_the_ordinary_way, "in_turn": in_turn, "together": at_once}
        best = dict.fromkeys(ways, float("inf"))
        for _ in range(args.rounds):
            for way, work in ways.items():
                best[way] = min(best[way], seconds(work, args.device))
        results[name] = {
            **{f"{way}_seconds": round(value, 3) for way, value in best.items()},
            "times_faster_than_ordinary": round(best["ordinary"] / best["together"], 2),
            "times_faster_than_in_turn": round(best["in_turn"] / best["together"], 2),
            "seconds_a_user": round(best["together"] / args.users, 4),
            "largest_difference": max(difference(got["together"], got[way]) for way in ("ordinary", "in_turn")),
        }
        if args.device.startswith("cuda"):
            torch.cuda.reset_peak_memory_stats()
            at_once()
            results[name]["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    one = Shifts("personal", (lm.sites.layers // 2,), 4)
    rooms, epochs = {"kept": None, "anew": 0}, {"first": 1, "whole": 1 + args.epochs}
    least = {(way, length): float("inf") for way in rooms for length in epochs}
    for _ in range(args.rounds):
        for way, length in least:
            part = replace(recipe, epochs=epochs[length])
            took = seconds(lambda r=part, b=rooms[way]: together(lm, users, one, r, trunk_bytes=b), args.device)
            least[way, length] = min(least[way, length], took)
    best = {way: (least[way, "whole"] - least[way, "first"]) / args.epochs for way in rooms}
    results["trunk"] = {
        **{f"{way}_seconds_an_epoch": round(value, 4) for way, value in best.items()},
        "saved": round(1 - best["kept"] / best["anew"], 3),
        "block": lm.sites.layers // 2,
        "blocks": lm.sites.layers,
    }
    if args.adapters:
        results["adapters"] = {name: of_adapters(lm, part, args) for name, part in parts.items()}
    write({"settings": settings(args, lm), "results": results}, args.output)


def of_adapters(lm: LanguageModel, part: Shifts | Adapter, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """By number of adapters: rows a second of steps of `--rows` rows, and what is lost against one adapter."""
    least = dict.fromkeys(args.adapters, float("inf"))
    classes = {count: learners(count, args.rows // count, *args.tokens) for count in least}
    for _ in range(args.rounds):
        for count, users in classes.items():
            recipe = Recipe(epochs=args.epochs, batch_size=args.rows // count, lr=1e-3)
            took = seconds(lambda u=users, r=recipe: together(lm, u, part, r), args.device)
            least[count] = min(least[count], took)
    speed = {count: args.rows * args.epochs / took for count, took in least.items()}
    return {
        str(count): {"rows_a_second": round(rows, 1), "loss": round(1 - rows / speed[args.adapters[0]], 3)}
        for count, rows in speed.items()
    }


if __name__ == "__main__":
    main()
