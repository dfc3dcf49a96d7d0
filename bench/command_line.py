"""Processor seconds until the command line answers, and until Python alone does: python bench/command_line.py [--tries 9]

The least of several tries each, with bytecode already compiled; children's user and system time, so that other work on the
machine counts little.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys

COMMANDS = {
    "python -c pass": ["-c", "pass"],
    "import harness": ["-c", "import harness"],
    "import typer": ["-c", "import typer"],
    "harness --help": ["-m", "harness", "--help"],
    "harness run --help": ["-m", "harness", "run", "--help"],
    "harness list methods": ["-m", "harness", "list", "methods"],
}


def seconds(command: list[str]) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    subprocess.run([sys.executable, *command], stdout=subprocess.DEVNULL, env=environment, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tries", type=int, default=9)
    tries = parser.parse_args().tries
    least = {name: min(seconds(command) for _ in range(tries)) for name, command in COMMANDS.items()}
    bare = least["python -c pass"]
    for name, spent in least.items():
        print(f"{name:22} {spent:.3f} s  {spent / bare:4.1f} times Python alone")


if __name__ == "__main__":
    main()
