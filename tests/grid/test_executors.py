"""Workers that Ray and Slurm start write the bytes of one process."""

from __future__ import annotations

import logging
import math
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from harness.errors import UsageError
from harness.grid.executors import Local, gpus_of, where
from harness.grid.on_ray import Ray
from harness.grid.on_slurm import Slurm
from harness.records.store import find_runs

Harness = Callable[[str], Any]


@pytest.fixture
def command(toy: Path) -> str:
    return (
        f"run --method plain --task lamp2m --model {toy} --limit 12 --batch_size 2 --max_new_tokens 3 --dtype float64"
    )


def _samples(folder: str) -> bytes:
    (run,) = find_runs(Path(folder))
    assert run.folder is not None and run.status == "complete"
    return (run.folder / "samples.jsonl").read_bytes()


def _needs(package: str, extra: str) -> None:
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed: pip install 'personalization-harness[{extra}]'")


def _in_a_process(*command: str) -> str:
    """What it said on stderr. Ray and submitit take over signals and streams of the process that uses them."""
    paths = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_two_ray_nodes_write_the_bytes_of_one_process_and_a_node_may_go(harness: Harness, command: str) -> None:
    _needs("ray", "ray")
    assert harness(f"{command} --output_path one").code == 0
    script = Path(__file__).with_name("ray_nodes.py")
    said = _in_a_process(str(script), *command.split(), "--output_path", "two", "--gpus_per_worker", "0.5")
    assert "workers hold 1 GPUs" in said and "a node was taken away" in said
    assert _samples("two") == _samples("one")


def test_submitits_local_jobs_write_the_bytes_of_one_process(harness: Harness, command: str) -> None:
    _needs("submitit", "slurm")
    assert harness(f"{command} --output_path one").code == 0
    _in_a_process("-m", "harness", *command.split(), *["--output_path", "two", "--on", "slurm:cluster=local,workers=1"])
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
    _needs("submitit", "slurm")
    monkeypatch.setenv("PATH", "")
    done = harness(f"{command} --on slurm:partition=gpu")
    assert done.code == 4 and "sbatch" in done.error()


def test_submitit_leaves_the_logging_of_this_process_alone(harness: Harness, command: str) -> None:
    _needs("submitit", "slurm")

    class Mine(logging.Handler):
        closed = False

        def close(self) -> None:
            self.closed = True
            super().close()

    mine = Mine()
    harness(f"{command} --on slurm:partition=gpu")
    assert not mine.closed and not logging.getLogger("submitit").handlers


@pytest.mark.parametrize(
    ("shown", "each", "seen"),
    [
        ("0,1,2,3", None, ["0", "1", "2", "3", "0"]),
        ("0,1,2,3", 2, ["0,1", "2,3", "0,1"]),
        ("4,5", 0.5, ["4", "5", "4", "5"]),
        ("0,1,2", 2, ["0,1", "0,1"]),
        ("0,1", 0, ["", ""]),
        ("", None, [None, None]),
    ],
)
def test_a_local_worker_sees_gpus_of_its_own_and_shares_them_where_they_are_too_few(
    monkeypatch: pytest.MonkeyPatch, shown: str, each: float | None, seen: list[str | None]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
    assert [gpus_of(rank, each) for rank in range(len(seen))] == seen


def test_a_local_worker_begins_with_the_gpus_that_it_may_see(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    begun: list[dict[str, str]] = []
    monkeypatch.setattr(subprocess, "Popen", lambda line, env, **_: begun.append(env))
    workers = Local(tmp_path, 2, 2)
    workers.start(0), workers.start(1)
    assert [env["CUDA_VISIBLE_DEVICES"] for env in begun] == ["0,1", "2,3"]
    with pytest.raises(UsageError, match="this machine shows 4, 0,1,2,3; give fewer"):
        Local(tmp_path, 1, 8).start(0)


def _ray_of(nodes: Sequence[Mapping[str, float]]) -> Any:
    """A module that stands for Ray, joined to a cluster."""
    ray: Any = ModuleType("ray")
    ray.is_initialized = lambda: True
    ray.nodes = lambda: [{"Alive": True, "Resources": node} for node in nodes]
    return ray


NODES = [{"CPU": 8, "GPU": 4}, {"CPU": 8, "GPU": 2}, {"CPU": 8}]


@pytest.mark.parametrize(
    ("nodes", "on", "each", "workers", "gpus"),
    [
        (NODES, "ray", None, 6, 1),
        (NODES, "ray", 2, 3, 2),
        (NODES, "ray", 4, 1, 4),
        (NODES, "ray", 0.25, 16, 0.25),
        (NODES, "ray", 0, 24, 0),
        (NODES, "ray:5", 0.5, 5, 0.5),
        (NODES[2:], "ray", None, 8, 0),
    ],
)
def test_an_actor_asks_ray_for_its_gpus_and_there_are_as_many_as_fit_on_the_nodes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nodes: Any, on: str, each: float | None, workers: int, gpus: float
) -> None:
    asked: list[dict[str, float]] = []
    begun: list[bool] = []

    class Actor:
        run = property(lambda self: self)

        def remote(self, *_: Any, **given: Any) -> Actor:
            begun.extend(given.values())
            return self

    fake = _ray_of(nodes)
    fake.remote = lambda **given: asked.append(given) or (lambda _: Actor())
    monkeypatch.setitem(sys.modules, "ray", fake)
    ray = Ray(tmp_path, where(on, each))
    ray.start(0)
    assert ray.workers == workers
    assert asked == [{"num_cpus": 1, "num_gpus": gpus, "max_restarts": 0}]
    assert begun == [gpus == 0]  # whether the worker sees no GPU


def test_more_gpus_than_any_ray_node_has_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", _ray_of(NODES))
    with pytest.raises(UsageError, match="no node of the Ray cluster has more than 4; give fewer"):
        Ray(tmp_path, where("ray", 8))


def test_gpus_of_a_slurm_worker_are_its_gres(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _needs("submitit", "slurm")
    for name, script in (("sbatch", "echo Submitted batch job 7"), ("srun", "exit 1")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    for on, gpus in (("slurm:partition=gpu,workers=2", 2), ("slurm:partition=gpu,gres=gpu:a100:2", None)):
        root = tmp_path / str(gpus)
        Slurm(root, where(on, gpus)).start(0)
        (job,) = (root / "logs" / "jobs").glob("*7_submission.sh")
        asked = [line for line in job.read_text().splitlines() if "gres" in line or "partition" in line]
        assert asked == [f"#SBATCH --gres=gpu:{'2' if gpus else 'a100:2'}", "#SBATCH --partition=gpu"]


@pytest.mark.parametrize(
    ("on", "gpus", "says"),
    [
        ("local:2", 1.5, "give a share as in 0.5, or a whole number"),
        ("ray", math.nan, "give a share"),
        ("workers:2", 1, "you start these workers; set CUDA_VISIBLE_DEVICES there"),
        ("slurm:gres=gpu:1", 2, "gres says that already"),
        ("slurm:partition=gpu", 0.5, "a job of Slurm has whole GPUs"),
    ],
)
def test_gpus_that_workers_cannot_have_are_refused(on: str, gpus: float, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        where(on, gpus)


def test_the_driver_of_workers_imports_neither_torch_nor_transformers() -> None:
    """It has no model, and workers begin only after what it imports."""
    look = "import sys, harness.grid.run; sys.exit(str(sys.modules.keys() & {'torch', 'transformers'}))"
    done = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == "set()"
