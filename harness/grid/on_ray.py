"""Workers as actors of a Ray cluster: an actor a worker, which holds its GPUs and the process that has the model.

Ray places actors and notices when one, or its node, is gone; shards go through the shared folder, as everywhere.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness.errors import DataMissing, HarnessError, UsageError
from harness.files.shown import first_line
from harness.grid.executors import Where, environment, exit_reason

WAIT_SECONDS = 1.0
"""Between two questions to Ray about the same actor."""


class Keeper:
    """What an actor does: start the worker's process, and end with it."""

    def run(self, root: str, rank: int, workers: int, package: str, *, hide_gpus: bool) -> str:
        """Why the worker ended."""
        line = [sys.executable, "-m", "harness", "grid", "worker", root, "--rank", f"{rank}/{workers}"]
        path = [package, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(dict.fromkeys(path))}
        if hide_gpus:  # Ray tells an actor of the GPUs that it holds, and leaves one that holds none as it is
            env["CUDA_VISIBLE_DEVICES"] = ""
        if not Path(root).is_dir():
            return f"no folder {root} on this machine; give an --output_path on a shared path"
        log = Path(root) / "logs" / f"{rank}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as out:
            worker = subprocess.Popen(
                [*line, "--parent", str(os.getpid())], env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=out
            )
            code = worker.wait()
        return exit_reason(code)


class Ray:
    """Actors of the cluster at an address, of the one that this machine belongs to, or of one made here."""

    def __init__(self, root: Path, place: Where) -> None:
        """Raises DataMissing without Ray, HarnessError where the cluster does not answer, UsageError where no node has the GPUs."""
        try:
            import ray
        except ImportError as error:
            raise DataMissing("--on ray needs Ray: pip install 'personalization-harness[ray]'") from error
        self.ray, self.root = ray, root
        self.ours = not ray.is_initialized()
        if self.ours:
            self._connect(place.address)
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        most = max((node.get("GPU", 0.0) for node in nodes), default=0.0)
        self.gpus = place.gpus if place.gpus is not None else float(most > 0)
        if 0 < most < self.gpus:
            raise UsageError(
                f"--gpus_per_worker {self.gpus:g}: no node of the Ray cluster has more than {most:g}; give fewer"
            )
        self.workers = place.workers or max(1, sum(_places(node, self.gpus) for node in nodes))
        self.actors: dict[int, Any] = {}
        self.results: dict[int, Any] = {}

    def _connect(self, address: str | None) -> None:
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        settings: dict[str, Any] = {"logging_level": "warning", "log_to_driver": False}
        try:
            try:
                self.ray.init(address=address or "auto", **settings)
            except ConnectionError:
                if address is not None:
                    raise
                self.ray.init(include_dashboard=False, **settings)  # this machine alone
        except Exception as error:  # of a node that does not come up in time Ray says so in a bare Exception
            raise HarnessError(f"no Ray cluster answers at {address or 'this machine'}: {first_line(error)}") from error

    def start(self, rank: int) -> None:
        keeper = self.ray.remote(num_cpus=1, num_gpus=self.gpus, max_restarts=0)(Keeper)
        self.actors[rank] = keeper.remote()
        package = environment()["PYTHONPATH"].split(os.pathsep)[0]
        self.results[rank] = self.actors[rank].run.remote(
            str(self.root), rank, self.workers, package, hide_gpus=not self.gpus
        )

    def ended(self, rank: int) -> str | None:
        ready, _ = self.ray.wait([self.results[rank]], timeout=0)
        if not ready:
            return None
        try:
            return str(self.ray.get(ready[0]))
        except self.ray.exceptions.RayError as error:
            return f"its Ray actor is gone ({type(error).__name__})"

    def kill(self, rank: int) -> None:
        """The worker ends with its actor's process."""
        self.ray.kill(self.actors[rank])

    def stop(self) -> None:
        for rank in self.actors:
            self.kill(rank)
        if self.ours:
            self.ray.shutdown()


def _places(node: Mapping[str, float], gpus: float) -> int:
    """Workers that a node has room for: each takes a core, and its GPUs."""
    cores = node.get("CPU", 0.0)
    return int(min(cores, node.get("GPU", 0.0) / gpus) if gpus else cores)
