"""What would be gained if waiting samples entered a batch when others leave it? Counted from answers that were given.

    python bench/waiting.py RECORD [RECORD ...] [--size N]

RECORD is the folder of a run with its samples.jsonl: how many tokens each prompt and each answer has. Four ways of decoding
them, in the record's batches or in batches of `--size` in its order:
    stay     every row stays until the last of its batch is done
    half     finished rows leave when they are half of the batch: what the engine does
    leave    each finished row leaves at once
    enter    and the next waiting sample takes its place: continuous batching
`steps` are passes that decode, each of which reads all weights; `rows` are the tokens that they compute, for rows that are
done too. The shares say how much of today's work is left: `by_steps` where a pass takes as long whatever its rows (a large
model on a GPU), `by_tokens` where each token takes its time (a CPU), prompts and answers together. The truth lies between.
"""

from __future__ import annotations

import argparse
import heapq
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from subject import write


class Work(NamedTuple):
    """Of all batches."""

    steps: int
    rows: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", nargs="+", type=Path)
    parser.add_argument("--size", type=int, help="samples a batch instead of the record's batches")
    parser.add_argument("--output", help="file for the JSON; by default stdout")
    args = parser.parse_args()
    rows = [counted(folder, args.size) for folder in args.records]
    write({"settings": {"size": args.size}, "results": rows}, args.output)


def counted(folder: Path, size: int | None) -> dict[str, Any]:
    """The four ways on the samples of one record."""
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    samples = [one for one in samples if one["new_tokens"]]
    by_batch = defaultdict(list)
    for number, one in enumerate(sorted(samples, key=lambda one: one["batch"])):
        by_batch[number // size if size else one["batch"]].append(
            one["new_tokens"] - 1
        )  # the first comes with the prompt
    batches = list(by_batch.values())
    found = {
        "stay": Work(sum(map(max, batches)), sum(len(batch) * max(batch) for batch in batches)),
        "half": total([halved(batch) for batch in batches]),
        "leave": Work(sum(map(max, batches)), sum(map(sum, batches))),
        "enter": entering(batches),
    }
    prompts = sum(one["prompt_tokens"] for one in samples)
    now = found["half"]
    return {
        "record": folder.name,
        "samples": len(samples),
        "batches": len(batches),
        "prompt_tokens": prompts,
        **{
            way: {
                **work._asdict(),
                "by_steps": round(work.steps / max(1, now.steps), 3),
                "by_tokens": round((prompts + work.rows) / (prompts + now.rows), 3),
            }
            for way, work in found.items()
        },
    }


def halved(batch: Sequence[int]) -> Work:
    """Rows leave once those that are done are half of those that run."""
    live, rows = list(batch), 0
    for step in range(max(batch)):
        going = [tokens for tokens in live if tokens > step]
        if 2 * len(going) <= len(live):
            live = going
        rows += len(live)
    return Work(max(batch), rows)


def entering(batches: Sequence[Sequence[int]]) -> Work:
    """As many rows as the largest batch has, each taken by the next sample in order when it is free."""
    free = [0] * max(map(len, batches))
    for tokens in (tokens for batch in batches for tokens in batch):
        heapq.heapreplace(free, free[0] + tokens)
    return Work(max(free), sum(map(sum, batches)))


def total(works: Sequence[Work]) -> Work:
    return Work(sum(work.steps for work in works), sum(work.rows for work in works))


if __name__ == "__main__":
    main()
