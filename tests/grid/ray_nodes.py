"""A run on a Ray cluster of two nodes of this machine, and a node taken away: `python ray_nodes.py COMMAND...`.

Each node has a GPU, as Ray is told. A process of its own, since Ray takes over signals and streams of the one that uses it.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import ray
from ray.cluster_utils import Cluster

from harness.cli.app import main
from harness.grid import pool as grid_pool


def take_a_node_away(cluster: Cluster) -> None:
    """After the first shard that comes back; another node takes its place."""
    back, left = grid_pool.Pool._back, [1]

    def remove_node(pool: Any, mate: Any, event: Any) -> None:
        back(pool, mate, event)
        if left[0] and len(pool.by_rank) == 2:
            free = ray.available_resources().get("GPU", 0.0)
            print(f"workers hold {ray.cluster_resources()['GPU'] - free:g} GPUs", file=sys.stderr)
        if left[0] and len(pool.by_rank) == 2:
            left[0] -= 1
            cluster.remove_node(cluster.worker_nodes.copy().pop(), allow_graceful=False)
            cluster.add_node(num_cpus=1, num_gpus=1)
            print("a node was taken away", file=sys.stderr)

    grid_pool.Pool._back = remove_node  # type: ignore[method-assign]


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
