"""Activation patching: one patched run at a time against `harness.run.patch_runs`, same model, same answers.

    python bench/patching.py [--model tiny] [--tokens 100] [--loop_runs 60] [--device cuda]

Both directions of one pair of prompts that differ in one token: every block's MLP, attention and query heads, each at all
positions, at the identity and at the last, with the runs that are checks. `loop` is the plain way: the source's activations
read once, then a whole forward pass a site under one forward hook, given `logits_to_keep`. Ours runs all of it; the loop is
timed on `loop_runs` of the runs, spread over all of them, and its seconds for the whole are extrapolated where that is
not all. Differences in nats are reported, and ratios within this one run are the result. A prompt of 32 tokens is that of
an everyday question, one of 100 a short one of MMLU: the longer it is, the less a loop wastes on small passes.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping

import torch
from subject import SIZES, dtype_of, model, peak_bytes, seconds, settings, write
from torch import Tensor

from harness.data import Prompt
from harness.edits import Replace
from harness.engine.capture import capture
from harness.engine.encoder import CutPrompt, Encoded
from harness.engine.flops import Cost
from harness.engine.loading import load_model
from harness.engine.model import LanguageModel
from harness.engine.rows import Request
from harness.plan import ALL, Edit, Plan, Site, Stream
from harness.plugins.registry import model_row
from harness.run.contract import ToyTemplate
from harness.run.patch_runs import PARTS, Decision, experiment, variants

IDENTITY = 8
"""Position of the token in which the prompts differ."""


def decision(ids: list[int]) -> Decision:
    plan = Plan((Stream(Prompt(ToyTemplate(), "")),))
    return Decision(Request("bench", plan, (CutPrompt(Encoded(tuple(ids), ""), 0, 0),)), (10, 20, 30, 40))


def module_of(lm: LanguageModel, site: Site) -> tuple[torch.nn.Module, bool]:
    """The module of a site in Llama, and whether its input is the site."""
    block = lm.sites.blocks[site.layer]
    attention, mlp = block.self_attn, block.mlp
    return {
        "block_in": (block, True),
        "heads_out": (attention.o_proj, True),
        "attn_out": (attention.o_proj, False),
        "mlp_out": (mlp, False),
        "block_out": (block, False),
    }[site.part]


@torch.inference_mode()
def loop(lm: LanguageModel, prompt: Decision, runs: list[tuple[Edit, ...]]) -> Tensor:
    """Log-probabilities [runs, C] of the decision's tokens, a forward pass a run."""
    ids = torch.tensor([prompt.encoded.ids], device=lm.device)
    tokens, out = torch.tensor(prompt.tokens, device=lm.device), []
    everywhere = torch.arange(ids.shape[1])
    for edits in runs:
        handles = []
        for edit in edits:
            assert isinstance(edit, Replace)
            at = everywhere[edit.where(everywhere.numpy(), prompt.encoded.layout())].to(lm.device)
            module, before = module_of(lm, edit.site)

            def put(x: Tensor, edit: Replace = edit, at: Tensor = at) -> Tensor:
                x = x.clone()
                x[:, at, edit.column : edit.column + edit.values.shape[1]] = edit.values[at]
                return x

            hook = (lambda _, args, f=put: (f(args[0]), *args[1:])) if before else (lambda _, args, x, f=put: f(x))
            register = module.register_forward_pre_hook if before else module.register_forward_hook
            handles.append(register(hook))
        logits = lm.model(ids, attention_mask=torch.ones_like(ids), logits_to_keep=1).logits[0, -1].float()
        out.append(logits.log_softmax(-1)[tokens])
        for handle in handles:
            handle.remove()
    return torch.stack(out).cpu()


def read(lm: LanguageModel, clean: Decision, corrupted: Decision) -> list[dict[Site, Tensor]]:
    layers = range(lm.sites.layers)
    sites = [Site(0, "block_in"), *(Site(n, part) for n in layers for part in (*PARTS, "block_out"))]
    return capture(lm, [clean.request, corrupted.request], sites, ALL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="50m")
    parser.add_argument("--model", help="in place of a size: a model's name or folder, as tiny")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--loop_runs", type=int, default=0, help="0 = all of both directions")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--output", help="file for the JSON; by default stdout")
    args = parser.parse_args()
    lm = (
        load_model(model_row(args.model), device=args.device)
        if args.model
        else model(args.size, args.device, dtype_of(args.device))
    )
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(50, lm.vocabulary - 1, (args.tokens,), generator=generator).tolist()
    other = [*ids[:IDENTITY], ids[IDENTITY] + 1, *ids[IDENTITY + 1 :]]
    clean, corrupted, at = decision(ids), decision(other), (IDENTITY,)
    theirs, own = read(lm, clean, corrupted)
    directions = [(corrupted, theirs, own), (clean, own, theirs)]
    named = [variants(lm, source, base, at) for _, source, base in directions]
    runs = [(n, key, i) for n, some in enumerate(named) for key, edits in some.items() for i in range(len(edits))]
    count = min(args.loop_runs or len(runs), len(runs))
    some = [runs[i * len(runs) // count] for i in range(count)]  # spread over all sites and positions

    cost = Cost()
    found = experiment(lm, clean, corrupted, at, cost)  # also the warm-up
    reference = torch.stack([ours(found, n, key, i) for n, key, i in some])
    chosen: Mapping[int, list[int]] = {n: [j for j, run in enumerate(some) if run[0] == n] for n in (0, 1)}
    loop(lm, clean, [()])

    def all_of_loop() -> None:
        read(lm, clean, corrupted)
        for n, numbers in chosen.items():
            scores = loop(lm, directions[n][0], [named[n][some[j][1]][some[j][2]] for j in numbers])
            plain[numbers] = scores

    plain = torch.empty_like(reference)
    spent: list[float] = []
    whole = lambda: spent.append(seconds(lambda: experiment(lm, clean, corrupted, at, Cost()), args.device))  # noqa: E731
    peak = peak_bytes(whole, args.device)
    for _ in range(args.rounds - 1):
        whole()
    timed = min(seconds(all_of_loop, args.device) for _ in range(args.rounds))
    total, batched = timed * len(runs) / len(some), min(spent)
    results = {
        "batched": {
            "seconds": round(batched, 3),
            "forward_passes": cost.forward_passes,
            "flops": cost.flops,
            "peak_memory_bytes": peak,
        },
        "loop": {
            "seconds": round(total, 3),
            "extrapolated": len(some) < len(runs),
            "timed": {"runs": len(some), "seconds": round(timed, 3)},
            "forward_passes": len(runs),
            "flops": len(runs) * lm.sizes.blocks(args.tokens),
        },
        "times_faster": round(total / batched, 2),
        "max_difference_nats": float((plain - reference).abs().max()),
        "max_relative_difference": float(((plain - reference).abs() / reference.abs().clamp_min(1)).max()),
    }
    write({"settings": {**settings(args, lm), "patched_runs": len(runs)}, "results": results}, args.output)


def ours(found: object, direction: int, key: tuple[str, ...], number: int) -> Tensor:
    """What `experiment` gives for one of its runs."""
    patched = (found.denoised, found.noised)[direction]  # type: ignore[attr-defined]
    if len(key) == 2:
        return patched.sites[key].reshape(-1, len(patched.base))[number]
    return getattr(patched, key[0]).reshape(-1, len(patched.base))[number]


if __name__ == "__main__":
    main()
