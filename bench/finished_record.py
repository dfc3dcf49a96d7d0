"""Seconds from the command to a finished record's numbers; the hash of weights anew and from the cache.

    python bench/finished_record.py [--megabytes 512]

`shown` is `harness run` again, in a process of its own, where the record is finished; `loading` is the same with the model
loaded first, as it was. `hashed` reads a file of weights, `remembered` finds its hash by path, size and times. Rounds
alternate, and ratios of medians are the result.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from subject import write

ROOT = Path(__file__).resolve().parents[1]
LINE = "run --method rag --task lamp3 --limit 2 --max_new_tokens 1"
SHOWN = "import sys; from harness.cli.app import main; sys.argv = ['harness', *{!r}]; main()"
LOADING = f"import harness.run.kept; harness.run.kept.kept_outcomes = lambda *_: dict(); {SHOWN}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--megabytes", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", help="file for the JSON; by default stdout")
    args = parser.parse_args()
    line = f"{LINE} --model {args.model} --device {args.device}".split()
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        environment = os.environ | {"PYTHONPATH": str(ROOT), "HARNESS_CACHE": str(place / "cache")}
        os.environ["HARNESS_CACHE"] = str(place / "cache")

        def command(program: str) -> None:
            done = subprocess.run(
                [sys.executable, "-c", program.format(line)], cwd=place, env=environment, capture_output=True, text=True
            )
            if done.returncode:
                sys.exit(done.stderr)

        from harness.engine.weights.identity import file_sha256

        weights = place / "weights.safetensors"
        weights.write_bytes(os.urandom(1 << 20) * args.megabytes)
        os.utime(weights, (1, 1))
        time.sleep(2.1)  # a file that is new may change again within the clock's step, and is not remembered

        def forget() -> None:
            for note in (place / "cache" / "hashes").glob("*.json"):
                note.unlink()

        work: dict[str, Callable[[], object]] = {
            "loading": lambda: command(LOADING),
            "shown": lambda: command(SHOWN),
            "hashed": lambda: (forget(), file_sha256(weights)),
            "remembered": lambda: file_sha256(weights),
        }
        command(SHOWN)  # makes the record
        spent: dict[str, list[float]] = {name: [] for name in work}
        for _ in range(args.rounds):
            for name, function in work.items():
                start = time.perf_counter()
                function()
                spent[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in spent.items()}
    results = {
        "seconds": {name: round(value, 4) for name, value in medians.items()},
        "times_faster": {
            "finished_record": round(medians["loading"] / medians["shown"], 1),
            "hash_of_weights": round(medians["hashed"] / medians["remembered"], 1),
        },
    }
    write(
        {"settings": {n: v for n, v in vars(args).items() if n != "output"}, "results": results},
        args.output,
    )


if __name__ == "__main__":
    main()
