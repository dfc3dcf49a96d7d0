"""Seconds and memory until the first answer of many users: prompts made when their batch comes, against all of them first.

    python bench/ahead.py --model smollm2-135m --model_path FILE [--users 20000]

Every user has a history of some items of Zipf's words, of which `rag` puts four into the prompt. A model is cut to its first
block, since what is measured comes before it: `now` plans the batches by the prompts' lengths and prepares the first one;
`before` prepares every prompt, and keeps it, for fewer users, and is extrapolated to all of them, which is said. Memory is what
the process grew by meanwhile.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from subject import write

from harness.data import Example, HistoryItem, User
from harness.engine.loading import load_model
from harness.method import Retrieval
from harness.methods.rag import RAG
from harness.plugins.registry import model_row
from harness.run.batches import Batching
from harness.run.system import ModelSystem
from harness.task import Generation
from harness.tasks.lamp_prompts import LampTemplate


def users(count: int, items: int, words: int) -> list[Example]:
    random = np.random.Generator(np.random.Philox(0))
    vocabulary = ["".join(chr(97 + c) for c in random.integers(26, size=random.integers(2, 9))) for _ in range(5000)]

    def text() -> str:
        return " ".join(vocabulary[n] for n in random.zipf(1.3, words) % len(vocabulary))

    made = []
    for n in range(count):
        texts = [text() for _ in range(items)]
        history = tuple(HistoryItem(str(i), {"text": t, "score": "3"}, t) for i, t in enumerate(texts))
        query = text()
        made.append(Example(str(n), User(str(n), history), query, query, LampTemplate("lamp3")))
    return made


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def measure(args: argparse.Namespace) -> dict[str, float]:
    """Seconds, and bytes that the process grew by, until the first batch can be answered."""
    lm = load_model(model_row(args.model, args.model_path), dtype="float32", device="cpu", blocks=1)
    count = args.users if args.part == "now" else args.users // args.of
    examples = users(count, args.items, args.words)
    system = ModelSystem(lm, RAG(Retrieval(k=4)), Generation(8), batching=Batching(args.batch_size))
    system.answer(examples[:1])  # what is loaded once
    held, start = resident(), time.perf_counter()
    if args.part == "now":
        answers = system.respond(examples)
        next(answers)
    else:
        kept = [system._ask(example) for example in examples]
        assert len(kept) == count
    seconds, grown = time.perf_counter() - start, resident() - held
    return {"users": count, "seconds": seconds, "bytes": grown}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--model_path")
    parser.add_argument("--users", type=int, default=20000)
    parser.add_argument("--items", type=int, default=10)
    parser.add_argument("--words", type=int, default=30)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--of", type=int, default=10, help="`before` is measured on one user in so many")
    parser.add_argument("--part", choices=("now", "before"), help=argparse.SUPPRESS)
    parser.add_argument("--output", help="file for the JSON; by default stdout")
    args = parser.parse_args()
    if args.part:
        sys.stdout.write(json.dumps(measure(args)) + "\n")
        return
    found = {}
    for part in ("now", "before"):  # each in a process of its own: memory is not given back
        done = subprocess.run([sys.executable, *sys.argv, "--part", part], capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr)
        found[part] = json.loads(done.stdout)
    times = {"now": 1, "before": args.of}
    results = {
        part: {
            "users": args.users,
            "seconds_to_the_first_answers": round(values["seconds"] * times[part], 2),
            "megabytes": round(values["bytes"] * times[part] / 1e6, 1),
            "extrapolated": times[part] > 1,
        }
        for part, values in found.items()
    }
    shown = {name: value for name, value in vars(args).items() if name not in ("output", "model_path", "part")}
    write({"settings": shown, "results": results}, args.output)


if __name__ == "__main__":
    main()
