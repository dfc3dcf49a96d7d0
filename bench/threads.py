"""Threads of a model on a CPU: what a decoding step takes, on an idle machine and beside other work.

    python bench/threads.py [--size 50m --steps 40]

`spinning` is torch as it comes: a thread a core, which burns the processor while it waits. `sleeping` has as many that sleep
(what `import harness` sets before torch loads), `chosen` as many as are free besides (what `harness run` takes). Loaded is
beside one busy process a core. Every measurement is a process of its own; milliseconds a step by the wall, and of processor
time over all threads.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time

WAYS = {"spinning": {"OMP_WAIT_POLICY": "active", "GOMP_SPINCOUNT": "infinity"}, "sleeping": {}, "chosen": {}}
BUSY = "while True: sum(range(10**5))"


def step_times(way: str, size: str, steps: int) -> dict[str, float]:
    """In this process."""
    import torch
    from subject import model

    from harness.data import Prompt
    from harness.engine.decode import Decoder
    from harness.engine.machine import free_cores
    from harness.plan import Plan, Stream
    from harness.run.contract import ToyTemplate

    torch.set_num_threads(free_cores() if way == "chosen" else os.cpu_count() or 1)
    decoder = Decoder(model(size, "cpu", torch.float32))
    request = decoder.prepare("0", Plan((Stream(Prompt(ToyTemplate(), "a" * 64)),)), steps)
    decoder.generate([request], max_new_tokens=2)
    wall, busy = time.perf_counter(), time.process_time()
    decoder.generate([request], max_new_tokens=steps)
    wall, busy = time.perf_counter() - wall, time.process_time() - busy
    found = {"wall_ms": 1000 * wall / steps, "processor_ms": 1000 * busy / steps}
    return {name: round(value, 1) for name, value in found.items()} | {"threads": torch.get_num_threads()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="50m")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--settle", type=float, default=60, help="seconds of other work before the loaded part")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        print(json.dumps(step_times(args.way, args.size, args.steps)))
        return
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    results = {}
    for condition in ("idle", "loaded"):
        others = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(os.cpu_count() or 1)]
        try:
            if condition == "idle":
                for other in others:
                    other.kill()
            else:
                time.sleep(args.settle)
            load, runs = round(os.getloadavg()[0], 1), {way: [] for way in WAYS}
            for _ in range(args.repeats):
                for way, variables in WAYS.items():
                    command = [sys.executable, __file__, "--way", way, "--size", args.size, "--steps", str(args.steps)]
                    done = subprocess.run(command, env=plain | variables, capture_output=True, text=True, check=True)
                    runs[way].append(json.loads(done.stdout))
                    print(condition, load, way, done.stdout.strip(), file=sys.stderr)
            middle = {
                way: sorted(found, key=lambda one: one["wall_ms"])[len(found) // 2] for way, found in runs.items()
            }
            results[condition] = {"load_average": load, **middle}
        finally:
            for other in others:
                other.kill()
                other.wait()
    print(json.dumps({"cores": os.cpu_count(), "results": results}, indent=1))


if __name__ == "__main__":
    main()
