"""What do heads for every cluster of users cost? DPS discovery with 8 clusters against one global discovery.

    python bench/clusters.py [--model tiny] [--task lamp4] [--clusters 8] [--samples 48]

The same train examples are measured once either way; clusters add the embedding of all train users and k-means. Fits run
in turn and the fastest of each counts; that both measured the same PCS is checked. Upstream runs one discovery a cluster.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace

import torch
from subject import seconds, settings, write

from harness.engine.loading import load_model
from harness.fit.kit import ModelKit
from harness.method import Fitted
from harness.methods.dps import DPS
from harness.plugins.registry import model_row, task_class, task_name
from harness.task import Selection


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--task", default="lamp4")
    parser.add_argument("--data")
    parser.add_argument("--clusters", type=int, default=8)
    parser.add_argument("--samples", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", help="file for the JSON; by default stdout")
    args = parser.parse_args()
    lm = load_model(model_row(args.model), device=args.device)
    task = task_class(task_name(args.task))(**({"data": args.data} if args.data else {}))
    train = task.items(Selection("train"))
    everyone = DPS(samples=args.samples)
    methods = {"global": everyone, "clusters": replace(everyone, clusters=args.clusters)}
    fitted: dict[str, Fitted] = {}
    best = dict.fromkeys(methods, float("inf"))

    def fit(name: str) -> None:
        fitted[name] = methods[name].fit(ModelKit(lm, max_new_tokens=task.generation().max_new_tokens), train)

    fit("clusters")  # imports scikit-learn
    for _ in range(args.rounds):
        for name in methods:
            best[name] = min(best[name], seconds(lambda n=name: fit(n), str(lm.device)))
    if not torch.equal(fitted["global"].tensors["pcs"], fitted["clusters"].tensors["pcs"]):
        sys.exit("the two discoveries measured different PCS")
    meta = fitted["clusters"].meta
    results = {
        "seconds": {name: round(value, 3) for name, value in best.items()},
        "clusters_of_global": round(best["clusters"] / best["global"], 3),
        "train_users": sum(meta["cluster_users"]),
        "samples_of_cluster": [meta["cluster_of_sample"].count(cluster) for cluster in range(args.clusters)],
    }
    write({"settings": settings(args, lm), "results": results}, args.output)


if __name__ == "__main__":
    main()
