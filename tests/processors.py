"""The test suite as other processors would round it: `python tests/processors.py [default|avx2] [1|2] [-- pytest options]`.

Each run limits the vector instructions of PyTorch, oneDNN and MKL, and the number of threads, so float32 sums are made in
another order. Says which tests do not give the same outcome in all runs, and exits with 1 if a test failed in any.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parent.parent
INSTRUCTIONS = {
    "default": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
}
THREADS = ("1", "2")
NAMES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


def run(instructions: str, threads: str, options: list[str]) -> dict[str, str]:
    """The outcome of each test by its id: passed, failed, error or skipped."""
    environment = os.environ | INSTRUCTIONS[instructions] | dict.fromkeys(NAMES, threads)
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        started = time.monotonic()
        command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", *options]
        code = subprocess.run(command, cwd=ROOT, env=environment).returncode
        if not report.is_file():
            raise SystemExit(f"processors: pytest ended with {code} and left no report; see its output above")
        cases = list(ElementTree.parse(report).iter("testcase"))
    outcomes = {f"{case.get('classname')}::{case.get('name')}": _outcome(case) for case in cases}
    counts = {outcome: list(outcomes.values()).count(outcome) for outcome in sorted(set(outcomes.values()))}
    said = ", ".join(f"{n} {outcome}" for outcome, n in counts.items())
    print(f"{instructions}, {threads} thread(s): {said} in {time.monotonic() - started:.0f} s", flush=True)
    return outcomes


def _outcome(case: ElementTree.Element) -> str:
    return next((tag for tag in ("failure", "error", "skipped") if case.find(tag) is not None), "passed")


def main() -> int:
    arguments, options = sys.argv[1:], []
    if "--" in arguments:
        at = arguments.index("--")
        arguments, options = arguments[:at], arguments[at + 1 :]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("instructions", nargs="?", choices=list(INSTRUCTIONS), help="one set only; all by default")
    parser.add_argument("threads", nargs="?", choices=THREADS, help="one count only; all by default")
    asked = parser.parse_args(arguments)
    runs = {
        f"{instructions} {threads}": run(instructions, threads, options)
        for instructions in ([asked.instructions] if asked.instructions else INSTRUCTIONS)
        for threads in ([asked.threads] if asked.threads else THREADS)
    }
    tests = sorted({test for outcomes in runs.values() for test in outcomes})
    failed = 0
    for test in tests:
        outcomes = {name: outcomes.get(test, "missing") for name, outcomes in runs.items()}
        if not set(outcomes.values()) <= {"passed", "skipped"} or len(set(outcomes.values())) > 1:
            failed += 1
            print(f"{test}: " + ", ".join(f"{outcome} ({name})" for name, outcome in outcomes.items()))
    print(f"{len(tests)} tests in {len(runs)} runs; {failed} failed or differ")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
