"""Head discovery: one head at a time against `harness.engine.prompt_variants` and `harness.fit.screening`, same model, same answers.

    python bench/pcs.py [--samples 50 --loop_heads 16] [--device cuda --size llama3-8b]

Three ways to the loss of an answer under each head's ablation (`where=DECODE`), prompts of 1,000 tokens and 16 answer
tokens: `loop` runs a full forward pass a head, given `logits_to_keep`; `cached` runs the prompt once and only the tail
a head; `variants` is ours. `screening` is the first-order estimate of all heads. Ours run on all heads and samples. The
other two are timed on `loop_heads` heads of one sample, spread over all blocks, and their seconds for the whole are
extrapolated where that is not all: `timed` says what was run. Differences in nats are reported, and ratios within this
one run are the result.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from subject import SIZES, dtype_of, model, peak_bytes, seconds, settings, write

from harness.edits import ScaleHeads
from harness.engine.cache import fork
from harness.engine.encoder import Encoded
from harness.engine.model import LanguageModel
from harness.engine.prompt_variants import score_variants
from harness.fit.screening import first_order
from harness.plan import DECODE


class Ablation:
    """The plain way: a pre-hook on the output projection that zeroes one head from position `start` on."""

    def __init__(self, lm: LanguageModel, layer: int, head: int, start: int) -> None:
        self.projection = lm.sites.blocks[layer].self_attn.o_proj
        self.slice = slice(head * lm.sites.head_dim, (head + 1) * lm.sites.head_dim)
        self.start = start

    def __enter__(self) -> None:
        def hook(_: object, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
            x = args[0].clone()
            x[:, self.start :, self.slice] = 0
            return (x,)

        self.handle = self.projection.register_forward_pre_hook(hook)

    def __exit__(self, *_: object) -> None:
        self.handle.remove()


@torch.inference_mode()
def loop(lm: LanguageModel, prompt: list[int], answer: list[int], heads: list[tuple[int, int]]) -> torch.Tensor:
    ids = torch.tensor([prompt + answer[:-1]], device=lm.device)
    keep = torch.arange(len(prompt) - 1, ids.shape[1], device=lm.device)
    target = torch.tensor(answer, device=lm.device)[:, None]
    out = []
    for layer, head in heads:
        with Ablation(lm, layer, head, len(prompt) - 1):
            logits = lm.model(ids, attention_mask=torch.ones_like(ids), logits_to_keep=keep).logits[0].float()
        out.append(logits.log_softmax(-1).gather(1, target)[:, 0])
    return torch.stack(out)


@torch.inference_mode()
def cached(lm: LanguageModel, prompt: list[int], answer: list[int], heads: list[tuple[int, int]]) -> torch.Tensor:
    ids = torch.tensor([prompt + answer[:-1]], device=lm.device)
    start = len(prompt) - 1
    cache = lm.new_cache()
    lm.model(ids[:, :start], past_key_values=cache, use_cache=True, logits_to_keep=1)
    target = torch.tensor(answer, device=lm.device)[:, None]
    out = []
    for layer, head in heads:
        with Ablation(lm, layer, head, 0):
            logits = lm.model(ids[:, start:], past_key_values=fork(cache), use_cache=True).logits[0].float()
        out.append(logits.log_softmax(-1).gather(1, target)[:, 0])
    return torch.stack(out)


def variants(lm: LanguageModel, prompt: list[int], answer: list[int], heads: list[tuple[int, int]]) -> torch.Tensor:
    edits = [(ScaleHeads(layer, ((head, 0.0),), lm.sites.head_dim),) for layer, head in heads]
    return score_variants(lm, Encoded(tuple(prompt), ""), answer, edits)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="50m")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tokens", type=int, default=1000)
    parser.add_argument("--answer", type=int, default=16)
    parser.add_argument("--samples", type=int, default=1)
    parser.add_argument("--loop_heads", type=int, default=0, help="0 = all heads of the model")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--output", help="file for the JSON; by default stdout")
    args = parser.parse_args()
    lm = model(args.size, args.device, dtype_of(args.device))
    generator = torch.Generator().manual_seed(2)

    def draw(count: int) -> list[int]:
        return torch.randint(3, lm.vocabulary, (count,), generator=generator).tolist()

    samples = [(draw(args.tokens), draw(args.answer)) for _ in range(args.samples)]
    every = [(layer, head) for layer in range(lm.sites.layers) for head in range(lm.sites.heads)]
    count = min(args.loop_heads or len(every), len(every))
    some = [every[i * len(every) // count] for i in range(count)]  # spread over all blocks
    prompt, answer = samples[0]
    ours: dict[str, Callable[[], object]] = {
        "variants": lambda: [variants(lm, p, a, every) for p, a in samples],
        "screening": lambda: [first_order(lm, Encoded(tuple(p), ""), a, "zero", DECODE) for p, a in samples],
    }
    theirs = {"loop": loop, "cached": cached}
    reference = variants(lm, prompt, answer, some)  # these are also the warm-up
    first_order(lm, Encoded(tuple(prompt), ""), answer, "zero", DECODE)
    differences = {
        name: float((way(lm, prompt, answer, some[:4]) - reference[:4]).abs().max()) for name, way in theirs.items()
    }
    results: dict[str, dict[str, Any]] = {}
    for name, whole in ours.items():
        spent: list[float] = []
        peak = peak_bytes(lambda w=whole, s=spent: s.append(seconds(w, args.device)), args.device)
        spent += [seconds(whole, args.device) for _ in range(args.rounds - 1)]
        results[name] = {"seconds": min(spent), "peak_memory_bytes": peak}
    for name, way in theirs.items():
        timed = seconds(lambda w=way: w(lm, prompt, answer, some), args.device)
        results[name] = {
            "seconds": timed * len(every) / len(some) * args.samples,
            "extrapolated": len(some) < len(every) or args.samples > 1,
            "timed": {"heads": len(some), "samples": 1, "seconds": round(timed, 3)},
            "max_difference_nats": differences[name],
        }
    for result in results.values():
        result["variants_times_faster"] = round(result["seconds"] / results["variants"]["seconds"], 2)
        result["seconds"] = round(result["seconds"], 3)
    write({"settings": {**settings(args, lm), "heads": len(every)}, "results": results}, args.output)


if __name__ == "__main__":
    main()
