"""Workers as jobs of Slurm, by submitit: `--on slurm:partition=gpu,gres=gpu:1,time=4:00:00,workers=8`.

A worker that reaches the end of its time, or is preempted, is a worker that died: its shard is given out again, and another
job is submitted in its place. `cluster=local` runs the jobs as processes of this machine, which tests do.
"""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path
from typing import Any

from harness.errors import DataMissing, HarnessError, UsageError
from harness.grid.executors import Where, command, exit_reason

MINUTES = 240
LOOK_SECONDS = 2.0
"""Between two looks at the queue; submitit itself asks Slurm less often."""
OVER = {
    "COMPLETED",
    "FAILED",
    "CANCELLED",
    "TIMEOUT",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "PREEMPTED",
    "BOOT_FAIL",
    "DEADLINE",
}


def be_worker(line: list[str]) -> str:
    """Within a job: the worker as a process of its own, and why it ended."""
    return exit_reason(subprocess.run(line, check=False).returncode)


class Slurm:
    """Jobs of the Slurm that this machine belongs to."""

    def __init__(self, root: Path, place: Where) -> None:
        """Raises DataMissing without submitit or Slurm."""
        # it would configure logging for the whole process: close others' handlers, and write to stdout, which is data
        os.environ.setdefault("SUBMITIT_LOG_LEVEL", "NOCONFIG")
        try:
            import submitit
        except ImportError as error:
            raise DataMissing("--on slurm needs submitit: pip install 'personalization-harness[slurm]'") from error
        options = dict(place.options)
        cluster = options.pop("cluster", "slurm")
        self.root, self.workers = root, place.workers or 1
        try:
            self.executor = submitit.AutoExecutor(folder=root / "logs" / "jobs", cluster=cluster)
        except (RuntimeError, ValueError) as error:
            raise DataMissing(f"--on slurm: {error}; give the command where sbatch is") from error
        if cluster == "slurm":
            given: dict[str, Any] = {f"slurm_{key}": value for key, value in {"time": str(MINUTES), **options}.items()}
        else:
            given = {"timeout_min": MINUTES}
            if options:
                raise UsageError(f"--on slurm:cluster={cluster} takes no {', '.join(options)}; leave it out")
        try:
            self.executor.update_parameters(name="harness", **given)
        except (NameError, TypeError, ValueError) as error:
            raise UsageError(f"--on slurm: {' '.join(str(error).split())[:300]}") from error
        self.here = cluster != "slurm"
        """Whether jobs are processes of this machine, whose end somebody has to look at."""
        self.jobs: dict[int, Any] = {}
        self.started: list[Any] = []
        self.looked: dict[int, float] = {}

    def start(self, rank: int) -> None:
        try:
            self.jobs[rank] = self.executor.submit(be_worker, command(self.root, rank, self.workers))
        except Exception as error:  # submitit raises what sbatch printed, in a class of its own
            raise HarnessError(f"--on slurm: {' '.join(str(error).split())[:300]}") from error
        self.started.append(self.jobs[rank])
        self.looked[rank] = 0.0

    def ended(self, rank: int) -> str | None:
        if time.monotonic() - self.looked[rank] < LOOK_SECONDS:
            return None
        self.looked[rank] = time.monotonic()
        job = self.jobs[rank]
        if not job.done():
            return None
        try:
            return str(job.result())
        except Exception:  # whatever way a job can end
            return f"its job {job.job_id} is {job.state.lower()}"

    def kill(self, rank: int) -> None:
        self.jobs[rank].cancel(check=False)

    def stop(self) -> None:
        for rank in self.jobs:
            self.kill(rank)
        until = time.monotonic() + LOOK_SECONDS
        while self.here and not all(job.done() for job in self.started) and time.monotonic() < until:
            time.sleep(0.05)
