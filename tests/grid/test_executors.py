"""Workers that Ray and Slurm start write the bytes of one process."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from harness.records.store import find_runs

# of Ray's and submitit's own: sockets, loops and processes that they leave to be collected
pytestmark = pytest.mark.filterwarnings("ignore")

Harness = Callable[[str], Any]


@pytest.fixture(autouse=True)
def _sockets_off() -> None:
    """Ray asks the system for this machine's address by a socket to another host, to which nothing is sent."""


@pytest.fixture
def command(toy: Path) -> str:
    return (
        f"run --method plain --task lamp2m --model {toy} --limit 12 --batch_size 2 --max_new_tokens 3 --dtype float64"
    )


def _samples(folder: str) -> bytes:
    (run,) = find_runs(Path(folder))
    assert run.folder is not None and run.status == "complete"
    return (run.folder / "samples.jsonl").read_bytes()


@pytest.fixture
def two_nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A Ray cluster of two nodes with a core each, on this machine."""
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'personalization-harness[ray]'")
    import ray
    from ray.cluster_utils import Cluster

    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    )
    monkeypatch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    try:
        yield cluster
    finally:
        if ray.is_initialized():
            ray.shutdown()
        cluster.shutdown()


def test_two_ray_nodes_write_the_bytes_of_one_process_and_a_node_may_go(
    harness: Harness, command: str, two_nodes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from harness.grid import pool as grid_pool

    assert harness(f"{command} --output_path one").code == 0
    back, left = grid_pool.Pool._back, [1]

    def remove_node(pool: Any, mate: Any, event: Any) -> None:
        back(pool, mate, event)
        if left[0] and len(pool.by_rank) == 2:
            left[0] -= 1
            two_nodes.remove_node(two_nodes.worker_nodes.copy().pop(), allow_graceful=False)
            two_nodes.add_node(num_cpus=1)

    monkeypatch.setattr(grid_pool.Pool, "_back", remove_node)
    done = harness(f"{command} --output_path two --on ray")
    assert done.code == 0, done.err
    assert _samples("two") == _samples("one")


def test_submitits_local_jobs_write_the_bytes_of_one_process(harness: Harness, command: str) -> None:
    pytest.importorskip("submitit", reason="submitit is not installed: pip install 'personalization-harness[slurm]'")
    assert harness(f"{command} --output_path one").code == 0
    done = harness(f"{command} --output_path two --on slurm:cluster=local,workers=1")
    assert done.code == 0, done.err
    assert _samples("two") == _samples("one")


@pytest.mark.parametrize(
    ("on", "package", "says"),
    [
        ("ray", "ray", "pip install 'personalization-harness[ray]'"),
        ("slurm", "submitit", "personalization-harness[slurm]'"),
    ],
)
def test_a_missing_package_is_one_line(
    harness: Harness, command: str, monkeypatch: pytest.MonkeyPatch, on: str, package: str, says: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    done = harness(f"{command} --on {on}")
    assert done.code == 4 and says in done.error()


def test_slurm_missing_is_one_line(harness: Harness, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("submitit", reason="submitit is not installed: pip install 'personalization-harness[slurm]'")
    monkeypatch.setenv("PATH", "")
    done = harness(f"{command} --on slurm:partition=gpu")
    assert done.code == 4 and "sbatch" in done.error()
