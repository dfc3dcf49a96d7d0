"""DPS tokens per second: one batch of prompts against the loop the papers released, batch 1 and two passes a token.

    python bench/batching.py [--device cuda --size llama3-8b --tokens 1024]

Same random model, same masked heads, same prompts, 32 new tokens, end-of-text off; the tokens are compared, and other
ones are an error. The loop is that of weixuzhang/DPS and aryopg/DeCoRe: prefill the prompt without its last token, copy
the cache twice, then for each token one pass as it is and one with the heads masked. It is spared what upstream wastes
beside it: fp32 logits of every prompt position, a search through a list of heads in every layer. `alone` is ours with
one prompt a batch. Ratios within this one run are the result; rounds are interleaved and the fastest of each counts.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable

import torch
from decode import ours, requests
from subject import SIZES, dtype_of, model, seconds, settings, write

from harness.engine.model import LanguageModel
from harness.engine.rows import Request


class Masked:
    """Zeroes the slices of heads at the input of each output projection, while `on`."""

    def __init__(self, lm: LanguageModel, request: Request) -> None:
        self.on = False
        self.handles = []
        for edit in request.plan.streams[1].edits:
            keep = torch.ones(lm.sites.heads * lm.sites.head_dim, device=lm.device, dtype=lm.model.dtype)
            for head, _ in edit.scales:  # type: ignore[attr-defined]
                keep[head * lm.sites.head_dim : (head + 1) * lm.sites.head_dim] = 0
            projection = lm.sites.blocks[edit.site.layer].self_attn.o_proj
            self.handles.append(projection.register_forward_pre_hook(self._hook(keep)))

    def _hook(self, keep: torch.Tensor) -> Callable[[object, tuple[torch.Tensor]], tuple[torch.Tensor] | None]:
        return lambda _, args: (args[0] * keep,) if self.on else None

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


@torch.inference_mode()
def loop(lm: LanguageModel, batch: list[Request], new: int) -> list[tuple[int, ...]]:
    return [_answer(lm, request, new) for request in batch]


def _answer(lm: LanguageModel, request: Request, new: int) -> tuple[int, ...]:
    ids = torch.tensor([request.prompts[0].encoded.ids], device=lm.device)
    gamma = request.plan.mix.weight  # type: ignore[attr-defined]
    prefilled = lm.new_cache()
    lm.model(ids[:, :-1], past_key_values=prefilled, use_cache=True, logits_to_keep=1)
    caches = [copy.deepcopy(prefilled), copy.deepcopy(prefilled)]
    masked = Masked(lm, request)
    token, answer = ids[:, -1:], []
    try:
        while len(answer) < new:
            scores = []
            for masked.on, cache in zip((False, True), caches, strict=True):
                logits = lm.model(token, past_key_values=cache, use_cache=True).logits[0, -1]
                scores.append(logits.float().log_softmax(-1))
            token = ((1 + gamma) * scores[0] - gamma * scores[1]).argmax()[None, None]
            answer.append(int(token))
    finally:
        masked.remove()
    return tuple(answer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="50m")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", help="file for the JSON; by default stdout")
    args = parser.parse_args()
    lm = model(args.size, args.device, dtype_of(args.device))
    batch = requests(lm, args.rows, args.tokens, "dps")
    work: dict[str, Callable[[], list[tuple[int, ...]]]] = {
        "loop": lambda: loop(lm, batch, args.new),
        "alone": lambda: [ours(lm, [request], args.new)[0] for request in batch],
        "batched": lambda: ours(lm, batch, args.new),
    }
    answers = {name: function() for name, function in work.items()}  # also the warm-up
    best = dict.fromkeys(work, float("inf"))
    for _ in range(args.rounds):
        for name, function in work.items():
            best[name] = min(best[name], seconds(function, args.device))
    results = {
        name: {
            "seconds": round(spent, 3),
            "tokens_per_second": round(args.rows * args.new / spent, 1),
            "times_the_loop": round(best["loop"] / spent, 2),
            "same_answers_as_the_loop": sum(a == b for a, b in zip(answers[name], answers["loop"], strict=True)),
        }
        for name, spent in best.items()
    }
    write({"settings": settings(args, lm), "results": results}, args.output)
    if answers["batched"] != answers["loop"] and lm.dtype == "float32":  # bf16 answers may part where two tokens tie
        sys.exit("the answers differ")


if __name__ == "__main__":
    main()
