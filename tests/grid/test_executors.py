"""Workers that Ray and Slurm start write the bytes of one process."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

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
    said = _in_a_process(str(script), *command.split(), "--output_path", "two")
    assert "a node was taken away" in said
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
