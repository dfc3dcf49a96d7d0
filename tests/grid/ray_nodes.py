"""A run on a Ray cluster of two nodes of this machine, and a node taken away: `[SECONDS=20] python ray_nodes.py COMMAND...`.

Nobody works before both nodes have a worker. A node goes after the first shard that comes back, or after SECONDS; another one takes
its place. Each node has a GPU, as Ray is told. A process of its own, since Ray takes over signals and streams of the one that uses it.
"""

from __future__ import annotations

import os
import sys
import time
from typing import Any

import ray
from ray.cluster_utils import Cluster

from harness.cli.app import main
from harness.grid import pool as grid_pool


def take_a_node_away(cluster: Cluster) -> None:
    turn, assign, seconds = grid_pool.Pool.turn, grid_pool.Pool._assign, os.environ.get("SECONDS")
    both, gone = list[float](), list[Any]()

    def turn_and_look(pool: grid_pool.Pool) -> None:
        turn(pool)
        if not both and len(pool.by_rank) == 2:
            both.append(time.monotonic())
        if both and not gone and (time.monotonic() - both[0] > float(seconds) if seconds else pool.shards_done):
            free = ray.available_resources().get("GPU", 0.0)
            print(f"workers hold {ray.cluster_resources()['GPU'] - free:g} GPUs", file=sys.stderr)
            gone.append(cluster.worker_nodes.copy().pop())
            cluster.remove_node(gone[0], allow_graceful=False)
            cluster.add_node(num_cpus=1, num_gpus=1)
            print("a node was taken away", file=sys.stderr)

    def to_both(pool: grid_pool.Pool) -> bool:
        return len(pool.by_rank) == 2 and assign(pool)

    grid_pool.Pool.turn, grid_pool.Pool._assign = turn_and_look, to_both  # type: ignore[method-assign]


if __name__ == "__main__":
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "num_gpus": 1, "include_dashboard": False})
    cluster.add_node(num_cpus=1, num_gpus=1)
    take_a_node_away(cluster)
    sys.argv = ["harness", *sys.argv[1:], "--on", "ray"]
    os.environ["RAY_ADDRESS"] = cluster.address
    try:
        main()
    finally:
        if ray.is_initialized():
            ray.shutdown()
        cluster.shutdown()
