"""Tokens per second of `plain`, `dps` and `cad` against transformers' own `generate`: same model, prompts and batch.

    python bench/decode.py [--device cuda --size llama3-8b]

A random Llama, 16 prompts of 256 tokens, 32 new tokens, end-of-text off, so that every row decodes to the end. Ratios
within this one run are the result; the rounds of all contenders are interleaved and the fastest of each counts. Prefill
is timed as a generation of one token. `of_plain` is a contender's time over that of `plain`: DPS's overhead. `cad`'s
second stream is the prompt without its context, 64 tokens here.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from subject import SIZES, dtype_of, model, peak_bytes, seconds, settings, write

from harness.data import Prompt
from harness.edits import ScaleHeads
from harness.engine.decode import Decoder
from harness.engine.encoder import CutPrompt, Encoded
from harness.engine.model import LanguageModel
from harness.engine.rows import Request
from harness.mix import Contrast
from harness.plan import Plan, Stream
from harness.run.contract import ToyTemplate


def requests(lm: LanguageModel, rows: int, tokens: int, method: str, context_free: int = 64) -> list[Request]:
    """`rows` random prompts under a method's plan."""
    generator = torch.Generator().manual_seed(1)
    sites = lm.sites
    count = max(1, int(0.04 * sites.layers * sites.heads))
    picks = torch.randperm(sites.layers * sites.heads, generator=generator)[:count].tolist()
    by_layer: dict[int, list[tuple[int, float]]] = {}
    for pick in picks:
        by_layer.setdefault(pick // sites.heads, []).append((pick % sites.heads, 0.0))
    masked = tuple(ScaleHeads(layer, tuple(heads), sites.head_dim) for layer, heads in sorted(by_layer.items()))
    out = []
    for row in range(rows):
        ids = tuple(torch.randint(3, lm.vocabulary, (tokens,), generator=generator).tolist())
        whole = CutPrompt(Encoded(ids, ""), 0, 0)
        part = CutPrompt(Encoded(ids[-context_free:], ""), 0, 0)
        prompt = Prompt(ToyTemplate(), "")
        if method == "plain":
            plan, prompts = Plan((Stream(prompt),)), (whole,)
        elif method == "dps":
            plan, prompts = Plan((Stream(prompt), Stream(prompt, masked)), Contrast(0.5)), (whole, whole)
        else:
            plan, prompts = Plan((Stream(prompt), Stream(prompt)), Contrast(0.5)), (whole, part)
        out.append(Request(str(row), plan, prompts))
    return out


def ours(lm: LanguageModel, batch: list[Request], new: int) -> list[tuple[int, ...]]:
    return [answer.ids for answer in Decoder(lm).generate(batch, max_new_tokens=new)]


def theirs(lm: LanguageModel, batch: list[Request], new: int) -> list[tuple[int, ...]]:
    ids = torch.tensor([request.prompts[0].encoded.ids for request in batch], device=lm.device)
    with torch.inference_mode():
        out = lm.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new, do_sample=False,
            pad_token_id=2, eos_token_id=None,
        )  # fmt: skip
    return [tuple(row) for row in out[:, ids.shape[1] :].tolist()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="50m")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", help="file for the JSON; by default stdout")
    args = parser.parse_args()
    lm = model(args.size, args.device, dtype_of(args.device))
    batches = {name: requests(lm, args.rows, args.tokens, name) for name in ("plain", "dps", "cad")}
    work: dict[str, Callable[[int], object]] = {"generate": lambda new: theirs(lm, batches["plain"], new)}
    work |= {name: (lambda new, b=batch: ours(lm, b, new)) for name, batch in batches.items()}
    same = ours(lm, batches["plain"], args.new) == theirs(lm, batches["plain"], args.new)
    peaks = {name: peak_bytes(lambda f=function: f(args.new), args.device) for name, function in work.items()}
    best = {name: [float("inf")] * 2 for name in work}
    for _ in range(args.rounds):
        for name, function in work.items():
            best[name][0] = min(best[name][0], seconds(lambda f=function: f(1), args.device))
            best[name][1] = min(best[name][1], seconds(lambda f=function: f(args.new), args.device))
    rows = {}
    for name, (prefill, whole) in best.items():
        rows[name] = {
            "prefill_seconds": round(prefill, 4),
            "decode_seconds": round(whole - prefill, 4),
            "tokens_per_second": round(args.rows * args.new / whole, 1),
            "of_generate": round(best["generate"][1] / whole, 3),
            "of_plain": round(whole / best["plain"][1], 3),
            "peak_memory_bytes": peaks[name],
            "decode_of_generate": round((best["generate"][1] - best["generate"][0]) / (whole - prefill), 3),
        }
    write({"settings": settings(args, lm), "plain_tokens_equal_generate": same, "results": rows}, args.output)


if __name__ == "__main__":
    main()
