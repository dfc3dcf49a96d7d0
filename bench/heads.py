"""Do the heads that DPS finds matter? Zeroes the top K, and K at random, and weighs what that costs the references.

    python bench/heads.py [--model tiny] [--task lamp4] [--heads 4] [--draws 20] [--users 200]

Heads are ranked by PCS on train users. On users of the dev split, with their best history items in the prompt, the mean
token NLL of the reference is measured as it is, with the K best heads zeroed from the last prompt token on, and with
each of the random draws. `ratio` is the rise for the K best over the mean rise of the draws; its interval is a 95 %
bootstrap over users, draws fixed.
"""

from __future__ import annotations

import argparse
import json
import sys

import numpy as np

from harness.engine.loading import load_model
from harness.fit.heads import mask
from harness.fit.kit import ModelKit
from harness.methods.dps import DPS
from harness.plan import DECODE, Plan, Stream
from harness.plugins.registry import model_row, task_class, task_name
from harness.task import Selection


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--task", default="lamp4")
    parser.add_argument("--data")
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--draws", type=int, default=20)
    parser.add_argument("--samples", type=int, default=50)
    parser.add_argument("--users", type=int, default=200)
    args = parser.parse_args()
    lm = load_model(model_row(args.model))
    task = task_class(task_name(args.task))(**({"data": args.data} if args.data else {}))
    room = task.generation().max_new_tokens
    kit = ModelKit(lm, max_new_tokens=room, progress=lambda *state: print(*state, file=sys.stderr))
    method = DPS(heads=args.heads, samples=args.samples)
    shared = method.fit(kit, task.items(Selection("train")))
    sites = lm.sites
    every = [(layer, head) for layer in range(sites.layers) for head in range(sites.heads)]
    top = [tuple(head) for head in shared.meta["heads"][: args.heads]]
    random = np.random.Generator(np.random.Philox(0))
    draws = [[every[i] for i in random.choice(len(every), args.heads, replace=False)] for _ in range(args.draws)]
    items = task.items(Selection("dev", users=args.users))
    plans = [Plan((Stream(method.retrieval.prompt(item.example)),)) for item in items]
    variants = [mask(dict.fromkeys(heads, 0.0), "zero", sites.head_dim, DECODE) for heads in ([], top, *draws)]
    losses = kit.losses(plans, [item.targets[0] for item in items], variants, label="dev references").numpy()
    rises = losses[:, 1:] - losses[:, :1]  # [users, 1 + draws]
    resampled = random.integers(len(rises), size=(10_000, len(rises)))
    tops, others = rises[:, 0][resampled].mean(1), rises[:, 1:].mean(1)[resampled].mean(1)
    low, high = np.percentile(tops / others, [2.5, 97.5])
    print(
        json.dumps(
            {
                "settings": vars(args),
                "model": lm.revision,
                "top_heads": top,
                "split_half_spearman": round(shared.meta["split_half_spearman"], 3),
                "users": len(items),
                "nll_nats_per_token": round(float(losses[:, 0].mean()), 4),
                "rise_top": round(float(rises[:, 0].mean()), 4),
                "rise_random_mean": round(float(rises[:, 1:].mean()), 4),
                "rise_random_largest": round(float(rises[:, 1:].mean(0).max()), 4),
                "ratio": round(float(rises[:, 0].mean() / rises[:, 1:].mean()), 1),
                "ratio_95": [round(float(low), 1), round(float(high), 1)],
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
