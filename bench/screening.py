"""How many of the best heads does first-order screening find? Its shortlist against the exact ranking of all heads.

    python bench/screening.py [--model tiny] [--task lamp4 --task lamp7] [--data ../shared/data/lamp] [--k 4]

On train examples, PCS of every head is measured and estimated (`harness.fit.screening`), with both operators. `recall` is the
share of the K heads of highest PCS on a shortlist of so many heads, beside what a random shortlist holds; `bound` is the same
of `screen=bound`, with the heads that it measures, in which rounds, and its largest margin; `spearman` compares the exact
ranking with the estimates and with their size, which makes the shortlist. `seconds` are of measuring all heads (`exact`), of
the estimates, and of all that `bound` computes.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, get_args

import torch
from scipy.stats import spearmanr
from subject import seconds, settings, write

from harness.engine.loading import load_model
from harness.engine.model import LanguageModel
from harness.fit.heads import Head, Operator, mask
from harness.fit.kit import ModelKit
from harness.fit.screening import recall, until_sure
from harness.method import Retrieval
from harness.plan import DECODE, Plan, Stream
from harness.plugins.registry import model_row, task_class, task_name
from harness.task import Selection


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--model_path")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--task", action="append")
    parser.add_argument("--data")
    parser.add_argument("--split", default="train")
    parser.add_argument("--samples", type=int, default=50)
    parser.add_argument("--k", type=int, default=0, help="0 = 4 % of the heads, at least 4")
    parser.add_argument(
        "--record", help="run.json of dps without screening: its exact ranking, nothing is measured anew"
    )
    parser.add_argument("--operator", choices=get_args(Operator), action="append")
    parser.add_argument("--output", help="file for the JSON; by default stdout")
    args = parser.parse_args()
    lm = load_model(model_row(args.model, args.model_path), dtype=args.dtype, device=args.device)
    args.task = [task_name(name) for name in args.task or ("lamp1", "lamp2m", "lamp3", "lamp4", "lamp5", "lamp7")]
    heads = lm.sites.layers * lm.sites.heads
    args.k = args.k or max(4, int(0.04 * heads))
    rows = (
        [recorded(lm, args)]
        if args.record
        else [
            compare(lm, name, operator, args) for name in args.task for operator in args.operator or get_args(Operator)
        ]
    )
    write({"settings": {**settings(args, lm), "heads": heads}, "results": rows}, args.output)


def compare(lm: LanguageModel, name: str, operator: Operator, args: argparse.Namespace) -> dict[str, Any]:
    task = task_class(name)(**({"data": args.data} if args.data else {}))
    kit, sites = ModelKit(lm, max_new_tokens=task.generation().max_new_tokens), lm.sites
    items = kit.sample(task.items(Selection(args.split)), args.samples)
    plans = [Plan((Stream(Retrieval().prompt(item.example)),)) for item in items]
    targets = [item.targets[0] for item in items]
    every = [(layer, head) for layer in range(sites.layers) for head in range(sites.heads)]
    variants = [(), *(mask({head: 0.0}, operator, sites.head_dim, DECODE) for head in every)]
    found: dict[str, torch.Tensor] = {}
    spent = {
        "exact": seconds(lambda: found.update(exact=kit.losses(plans, targets, variants)), str(lm.device)),
        "screening": seconds(
            lambda: found.update(estimates=kit.screen(plans, targets, operator, DECODE)), str(lm.device)
        ),
    }
    spent["bound"] = seconds(lambda: bounded(kit, plans, targets, operator, args.k), str(lm.device))
    exact = (found["exact"][:, 1:] - found["exact"][:, :1]).view(len(items), sites.layers, sites.heads)
    row = {"task": name, "operator": operator, **agreement(exact, found["estimates"], args.k)}
    return {**row, "seconds": {way: round(value, 2) for way, value in spent.items()}}


def bounded(kit: ModelKit, plans: list[Plan], targets: list[str], operator: Operator, k: int) -> None:
    """What a discovery with `screen=bound` computes."""

    def measure(heads: list[Head]) -> torch.Tensor:
        losses = kit.losses(
            plans, targets, [(), *(mask({head: 0.0}, operator, kit.sites.head_dim, DECODE) for head in heads)]
        )
        return losses[:, 1:] - losses[:, :1]

    with kit.prompts_kept():
        kit.until_sure(kit.screen(plans, targets, operator, DECODE), k, (), measure)


def recorded(lm: LanguageModel, args: argparse.Namespace) -> dict[str, Any]:
    """The exact ranking that a record of `dps` holds, against estimates on the samples it was measured on."""
    record = json.loads(Path(args.record).read_text())
    config, held = record["config"], set(record["held_out_users"])
    options, chosen = config["task"]["options"], config["method"]["options"]
    task = task_class(config["task"]["name"])(**options, **({"data": args.data} if args.data else {}))
    own = [item for item in task.items(Selection(config["data"]["split"])) if item.example.user.id in held]
    kit = ModelKit(lm, seed=0, max_new_tokens=config["sampling"]["max_new_tokens"])
    items = kit.sample(own, chosen["samples"])[: args.samples]
    plans = [Plan((Stream(Retrieval(k=chosen["k"]).prompt(item.example)),)) for item in items]
    operator = chosen["discover_operator"]
    estimates = kit.screen(plans, [item.targets[0] for item in items], operator, DECODE)
    exact = torch.tensor(record["analysis"]["pcs"], dtype=torch.float64).expand_as(estimates)
    row = {"record": args.record, "task": config["task"]["name"], "operator": operator, "samples": len(items)}
    return {**row, **agreement(exact, estimates, args.k)}


def agreement(exact: torch.Tensor, estimates: torch.Tensor, k: int) -> dict[str, Any]:
    """Of exact scores and estimates, [n, layers, H] both."""
    ranking, heads = exact.mean(0).flatten(), exact[0].numel()
    rounds: list[int] = []

    def measure(heads: list[Head]) -> torch.Tensor:
        rounds.append(len(heads))
        return exact[:, [layer for layer, _ in heads], [head for _, head in heads]]

    sure, measured, margin, closest = until_sure(estimates, k, (), measure)
    best = set(ranking.topk(k).indices.tolist())
    chosen = set(sure.mean(0).nan_to_num(-torch.inf).flatten().topk(k).indices.tolist())
    lengths = sorted({min(n * k, heads) for n in (1, 2, 3, 4)})
    return {
        "k": k,
        "recall": {str(n): round(recall(exact, estimates, k, n), 3) for n in lengths},
        "bound": {
            "measured": len(measured),
            "of": heads,
            "rounds": rounds,
            "margin": round(margin, 2),
            "closest": round(closest, 3),
            "recall": round(len(best & chosen) / k, 3),
        },
        "recall_by_chance": {str(n): round(n / heads, 3) for n in lengths},
        "spearman": {
            "estimates": round(float(spearmanr(ranking, estimates.mean(0).flatten()).statistic), 3),
            "size": round(float(spearmanr(ranking, estimates.abs().mean(0).flatten()).statistic), 3),
        },
    }


if __name__ == "__main__":
    main()
