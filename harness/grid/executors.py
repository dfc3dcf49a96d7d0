"""Who starts workers and knows whether they live. An executor only starts, watches and stops; work goes through the folder.

--on local:2                                     processes of this machine
--on ray, ray://HOST:10001                       actors of a Ray cluster (harness.grid.on_ray)
--on slurm:partition=gpu,gres=gpu:1,workers=8    jobs of Slurm, by submitit (harness.grid.on_slurm)
--on workers:8                                   whoever starts `harness grid worker FOLDER --rank i/8`
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from harness.errors import UsageError
from harness.servers.address import ENDPOINT

COUNT = re.compile(r"0*[1-9][0-9]{0,5}")
"""How many workers; not what else Unicode has for digits."""
KINDS = "local:N, ray[:N], ray://HOST:PORT, slurm:KEY=VALUE,..., workers:N"


@dataclass(frozen=True)
class Where:
    """What `--on` says."""

    kind: str
    workers: int | None = None
    address: str | None = None
    """Of a Ray cluster."""
    options: Mapping[str, str] = field(default_factory=dict)
    """Of Slurm."""
    gpus: float | None = None
    """GPUs a worker, of Slurm as its gres; None = one where there are any."""


def where(on: str, gpus: float | None = None) -> Where:
    """Raises UsageError for what is no place, and for GPUs that workers cannot have there."""
    kind, _, rest = on.partition(":")
    if gpus is not None and not (gpus <= 1 or gpus % 1 == 0):
        raise UsageError(f"--gpus_per_worker {gpus:g} is not valid; give a share as in 0.5, or a whole number")
    if gpus is not None and kind == "workers":
        raise UsageError(f"--on {on}: you start these workers; set CUDA_VISIBLE_DEVICES there, no --gpus_per_worker")
    if kind == "ray" and rest.startswith("//"):
        return Where("ray", address=on, gpus=gpus)
    if kind in ("local", "workers") or (kind == "ray" and rest):
        if not COUNT.fullmatch(rest):
            raise UsageError(f"--on {on} names no number of workers; give it as in {kind}:2")
        return Where(kind, int(rest), gpus=gpus)
    if kind == "ray":
        return Where("ray", gpus=gpus)
    if kind == "slurm":
        options = {}
        for pair in filter(None, rest.split(",")):
            key, equals, value = pair.partition("=")
            if not (key and equals and value):
                raise UsageError(f"--on {on}: {pair!r} is no KEY=VALUE, as in slurm:partition=gpu,gres=gpu:1,workers=8")
            options[key] = value
        count = options.pop("workers", "1")
        if not COUNT.fullmatch(count):
            raise UsageError(f"--on {on}: workers={count} is no number; give 1 or more")
        if gpus and ("gres" in options or gpus % 1):
            why = "gres says that already" if "gres" in options else "a job of Slurm has whole GPUs"
            raise UsageError(f"--on {on}: {why}; leave out --gpus_per_worker {gpus:g}")
        if gpus:
            options["gres"] = f"gpu:{gpus:.0f}"
        return Where("slurm", int(count), options=options, gpus=gpus)
    raise UsageError(f"--on {on} is no place to run; allowed: {KINDS}")


def place_of(given: Mapping[str, Any]) -> Where | None:
    """Where `--on` says the command runs; None for this process. Raises UsageError for what cannot run there."""
    if given.get("on") is None:
        if given.get("gpus_per_worker") is not None or given.get("mixed_hardware"):
            raise UsageError("--gpus_per_worker and --mixed_hardware are about workers; name them, as in --on local:2")
        return None
    if given["model"].startswith(ENDPOINT):
        raise UsageError(f"{given['model']} is behind a server, which one process keeps busy; leave --on out")
    return where(given["on"] or "", given.get("gpus_per_worker"))


class Executor(Protocol):
    """Starts the workers of a grid."""

    workers: int

    def start(self, rank: int) -> None:
        """Start worker `rank`, again where it has ended."""

    def ended(self, rank: int) -> str | None:
        """Why it ended; None while it waits to begin, or runs, or nobody knows."""

    def kill(self, rank: int) -> None:
        """End a worker that shows no sign of life any more."""

    def stop(self) -> None:
        """End all of them."""


def command(root: Path, rank: int | str, workers: int) -> list[str]:
    """What is to be run for a worker, by the same Python or one that has the same packages."""
    return [sys.executable, "-m", "harness", "grid", "worker", str(root), "--rank", f"{rank}/{workers}"]


def environment() -> dict[str, str]:
    """This process's, with the package on the path wherever the worker begins."""
    package = str(Path(__file__).resolve().parents[2])
    path = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return {**os.environ, "PYTHONPATH": os.pathsep.join(dict.fromkeys([package, *filter(None, path)]))}


def exit_reason(code: int) -> str:
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


class Local:
    """Processes of this machine. They end with the driver, by the kernel's word."""

    def __init__(self, root: Path, workers: int, gpus: float | None = None) -> None:
        self.root, self.workers, self.gpus = root, workers, gpus
        self.running: dict[int, subprocess.Popen[bytes]] = {}

    def start(self, rank: int) -> None:
        env = environment()
        env.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // self.workers)))
        own = gpus_of(rank, self.gpus)
        if own is not None:
            env["CUDA_VISIBLE_DEVICES"] = own
        log = self.root / "logs" / f"{rank}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        line = [*command(self.root, rank, self.workers), "--parent", str(os.getpid())]
        with log.open("ab") as out:
            # a session of its own: ctrl-C is for the driver, which tells its workers
            self.running[rank] = subprocess.Popen(
                line, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
            )

    def ended(self, rank: int) -> str | None:
        code = self.running[rank].poll()
        return None if code is None else exit_reason(code)

    def kill(self, rank: int) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.running[rank].pid, signal.SIGKILL)
        self.running[rank].wait()

    def stop(self) -> None:
        for rank in self.running:
            self.kill(rank)


class Others:
    """Workers that somebody else starts, with `harness grid worker`. Only their heartbeats tell of them."""

    def __init__(self, root: Path, workers: int) -> None:
        self.root, self.workers = root, workers

    def start(self, rank: int) -> None:
        pass

    def ended(self, rank: int) -> str | None:
        return None

    def kill(self, rank: int) -> None:
        pass

    def stop(self) -> None:
        pass


def gpus_of(rank: int, each: float | None) -> str | None:
    """The GPUs of this machine that worker `rank` sees, as CUDA_VISIBLE_DEVICES; None where there are none to share out.

    Raises UsageError where the machine has fewer than one worker is to see.
    """
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    if shown is not None:
        found: Sequence[str] = [one for one in shown.split(",") if one]
    else:
        found = [str(n) for n in range(len(list(Path("/proc/driver/nvidia/gpus").glob("*"))))]
    if each == 0:
        return ""
    if not found:
        return None
    count = max(1, int(each or 1))
    if count > len(found):
        raise UsageError(f"--gpus_per_worker {count}: this machine shows {len(found)}, {','.join(found)}; give fewer")
    first = rank % (len(found) // count) * count  # more workers than places share them
    return ",".join(found[first : first + count])
