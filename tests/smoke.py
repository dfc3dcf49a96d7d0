"""The command line as a user types it: python tests/smoke.py FOLDER

Runs every registered method on a few users of lamp-mini with the embedded model, then looks at what came of it. All that
is written goes into a new folder inside FOLDER. Stops at the first command that does not do what it should.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from harness.methods import METHODS

ROOT = Path(__file__).resolve().parents[1]
TASKS = ("lamp4", "lamp1")


class Shell:
    """Runs harness commands in a folder of their own, one after the other."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        installed = Path(sys.executable).with_name("harness")
        self.harness = [str(installed)] if installed.is_file() else [sys.executable, "-m", "harness"]
        kept = {name: value for name, value in os.environ.items() if name != "HARNESS_DATA"}
        self.environment = kept | {"HARNESS_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}

    def __call__(self, line: str, *, says: str = "", times: int = 1) -> str:
        """Stdout of a command that must exit 0 and say `says` that often, on stdout or stderr."""
        print(f"$ harness {line}", flush=True)
        start = time.perf_counter()
        done = subprocess.run(
            [*self.harness, *shlex.split(line)], cwd=self.folder, env=self.environment, capture_output=True, text=True
        )
        seconds = time.perf_counter() - start
        said = (done.stdout + done.stderr).count(says) if says else times
        if done.returncode or said < times:
            print(done.stdout, done.stderr, sep="\n", file=sys.stderr)
            wanted = f", saying {says!r} {times} times" if says else ""
            sys.exit(f"smoke: exit {done.returncode} and said it {said} times; expected exit 0{wanted}")
        print(f"  ok, {seconds:.1f} s, {len(done.stdout.splitlines())} lines", flush=True)
        return done.stdout


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    harness = Shell(Path(tempfile.mkdtemp(dir=folder)))
    before = _git_status()

    harness("--version")
    for what in ("methods", "tasks", "models", "retrievers", "tables", "figures"):
        harness(f"list {what}")
    harness("run --method dps --task lamp4 --users 4 --dry_run", says="stream 0")
    harness("fit --method dps --task lamp4", says='"key"')

    every = " ".join(f"--method {name}" for name in METHODS) + "".join(f" --task {task}" for task in TASKS)
    # ten users to fit on, four to answer; where tiny answers all of a history right (lamp3) there is no style vector
    few = "--users 4 --fit_split dev:0.05 --allow_noop"
    records = [json.loads(line) for line in harness(f"run {every} {few} --json").splitlines()]
    assert len(records) == len(METHODS) * len(TASKS), f"{len(records)} records"
    for record in records:
        assert record["status"] == "complete" and record["health"]["errors"] == 0, record["folder"]
    harness(f"run {every} {few}", says="already there", times=len(records))

    harness("show runs/tiny/lamp4/dps --beside runs/tiny/lamp4/plain", says="expected")
    harness("compare runs/tiny/lamp4/plain runs/tiny/lamp4/rag", says="p Holm")
    harness("figure dps-3", says="figures/dps-3.svg")
    harness("table", says="dps-1")
    harness("leaderboard", says="operations")
    harness("leaderboard runs --output_path leaderboard.md", says="leaderboard.md")
    harness("leaderboard runs --check")
    harness("report", says="report/index.html")
    harness("data mini mini")
    harness("run --method rag --task lamp4 --data mini --users 2 --export lamp", says="predictions.json")
    if (ROOT / "results").is_dir():
        harness(f"leaderboard --check --results {ROOT / 'results'} --path {ROOT / 'leaderboard.md'}")
        harness(f"table dps-1 dps-2 --results {ROOT / 'results'}")
    assert _git_status() == before, "the committed results were touched"


def _git_status() -> str:
    """What of the results differs from the commit; empty too where this is no git checkout."""
    command = ["git", "status", "--porcelain", "--", "results", "leaderboard.md"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python tests/smoke.py FOLDER")
    main(Path(sys.argv[1]).resolve())
