"""Thirty kills at random moments: `python tests/grid/kills.py [--kills 30] [--ray 3]`.

Each kill is a `kill -9` of a worker or of the driver of a run of its own, which is then given again until it ends; the last few are
Ray nodes taken away. Samples and metrics must be those of the unbroken run, and no process may be left. Exits 1 where not.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1")
os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])

from conftest import Forked  # noqa: E402

from harness.grid import run as grid_run  # noqa: E402


def command(model: Path, folder: Path, on: str = "") -> list[str]:
    line = f"run --method plain --method rag --task lamp2m --model {model} --limit 48 --batch_size 2 --max_new_tokens 4"
    return [*line.split(), "--dtype", "float64", "--output_path", str(folder), *on.split()]


def start(line: list[str]) -> int:
    """The pid of a process that runs the command line."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1), os.dup2(null, 2)
        from harness.cli.app import main

        sys.argv = ["harness", *line]
        main()
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    finally:
        os._exit(code)


def ended(pid: int) -> int | None:
    found, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if found else None


def wait(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def result(folder: Path) -> dict[str, object]:
    """What must be the same every time."""
    found: dict[str, object] = {}
    for path in sorted(folder.glob("*/*/*/run.json")):
        record = json.loads(path.read_text())
        found[path.parent.name] = (record["status"], record["metrics"], (path.parent / "samples.jsonl").read_bytes())
    return found


def children(pid: int) -> list[int]:
    return [int(n) for n in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def left_over(marker: str) -> list[str]:
    """Processes of this script besides itself."""
    found, own, pid = [], set[int](), os.getpid()
    while pid > 1:  # who started it has its name on the command line too
        own.add(pid)
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line, state = path.read_bytes(), path.with_name("stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if marker.encode() in line and int(path.parent.name) not in own and state != "Z":
            found.append(path.parent.name)
    return found


def none_left(marker: str) -> bool:
    for _ in range(300):
        if not left_over(marker):
            return True
        time.sleep(0.1)
    return False


def one_kill(draw: random.Random, model: Path, folder: Path, unbroken_seconds: float) -> str:
    """Which process was killed when; the run is finished afterwards."""
    line = command(model, folder, "--on local:2")
    driver = start(line)
    time.sleep(draw.uniform(0.05, 0.95) * unbroken_seconds)
    who = draw.choice(["driver", "worker"])
    workers = children(driver) if ended_or_alive(driver) else []
    victim = driver if who == "driver" else (draw.choice(workers) if workers else driver)
    who = "driver" if victim == driver else "worker"
    os.kill(victim, signal.SIGKILL)
    code = wait(driver)
    while code != 0:
        code = wait(start(line))
    return who


def ended_or_alive(pid: int) -> bool:
    return Path(f"/proc/{pid}/task/{pid}/children").exists()


def one_node(draw: random.Random, model: Path, folder: Path) -> str:
    """A node of a Ray cluster of two is taken away while both have work, and another one comes."""
    script = Path(__file__).with_name("ray_nodes.py")  # a process of its own: Ray does not survive a fork
    seconds = draw.uniform(0, 1.5)
    environment = {**os.environ, "SECONDS": f"{seconds:.2f}", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    done = subprocess.run(
        [sys.executable, script, *command(model, folder)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0 and "a node was taken away" in done.stderr, done.stderr
    return f"Ray node after {seconds:.1f} s"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--ray", type=int, default=3, help="how many of them are Ray nodes")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    draw = random.Random(given.seed)
    import torch

    from harness.run.contract import random_lm

    torch.set_num_threads(1)
    grid_run._executor = lambda place, root: Forked(root, place.workers or 1)
    with tempfile.TemporaryDirectory() as name:
        home, model = Path(name), Path(name) / "model"
        os.environ["HARNESS_CACHE"] = str(home / "cache")
        lm = random_lm(dtype=torch.float32)
        lm.model.save_pretrained(model)
        lm.encoder.tokenizer.save_pretrained(model)
        assert wait(start(command(model, home / "whole"))) == 0
        whole = result(home / "whole")
        begin = time.monotonic()
        assert wait(start(command(model, home / "grid", "--on local:2"))) == 0
        seconds = time.monotonic() - begin
        assert result(home / "grid") == whole
        print(f"unbroken: {len(whole)} records, {seconds:.1f} s on two workers", flush=True)
        good = 0
        for number in range(given.kills):
            folder = home / str(number)
            nodes = number >= given.kills - given.ray
            who = one_node(draw, model, folder) if nodes else one_kill(draw, model, folder, seconds)
            same, nobody = result(folder) == whole, none_left("kills.py") and none_left(str(folder))
            good += same and nobody
            print(
                f"kill {number + 1}: {who}; {'same' if same else 'OTHER RESULTS'}{'' if nobody else ', PROCESSES LEFT'}",
                flush=True,
            )
        print(f"{good} of {given.kills} ended like the unbroken run, with nothing left running")
        return 0 if good == given.kills else 1


if __name__ == "__main__":
    sys.exit(main())
