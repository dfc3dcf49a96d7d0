"""A LaMP file of any size: processor time and peak memory of reading it, whole as one JSON value and as the harness does.

    python bench/lamp_files.py [--megabytes 500]

The file is made in a temporary folder: LaMP-3 questions of the time split, 190 items of about 100 words a user. `whole` is
what a reader does that parses the file as one value with the same checks and makes all histories; `first` is the harness's
first reading, which checks the file and keeps what it found; `limit 50` and `again` are later runs of 50 samples and of
all, each with its histories looked at once. Each reading is a process of its own. Readings alternate, and medians of
`--repeats` count.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from harness.errors import DataMissing
from harness.files.json_files import parse
from harness.task import Selection
from harness.tasks import lamp_prompts
from harness.tasks.lamp import Lamp3
from harness.tasks.lamp_files import sha256_of

WAYS = ("whole", "first", "limit 50", "again")
REVIEW = (
    "What is the score of the following review on a scale of 1 to 5? just answer with 1, 2, 3, 4, or 5 without further "
    "explanation. review: "
)


def make(folder: Path, megabytes: int) -> None:
    """`dev_questions.json` and its golds."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 9))) for _ in range(5000)]
    texts = [" ".join(draw.choices(words, k=100)) for _ in range(2000)]
    golds = []
    with (folder / "dev_questions.json").open("w") as file:
        file.write("[")
        while file.tell() < megabytes * 10**6:
            ident = str(len(golds))
            profile = [
                {"id": f"{ident}{i}", "text": draw.choice(texts), "score": "3", "date": "2015-03-01"}
                for i in range(190)
            ]
            record = {"id": ident, "user_id": ident, "input": REVIEW + draw.choice(texts), "profile": profile}
            file.write(("," if golds else "") + json.dumps(record))
            golds.append({"id": ident, "output": "3"})
        file.write("]")
    (folder / "dev_outputs.json").write_text(json.dumps({"task": "LaMP_3", "golds": golds}))
    for path in folder.iterdir():
        os.utime(path, (10**9, 10**9))


def read(way: str, folder: Path) -> None:
    """In this process; what it took, as JSON to stdout."""
    start = time.process_time()  # other work on the machine does not count
    if way == "whole":
        content = (folder / "dev_questions.json").read_bytes()
        questions, digest = parse(content), sha256_of(content)
        histories = [lamp_prompts.history("lamp3", question["profile"], dated=True) for question in questions]
        assert digest and len({question["id"] for question in questions}) == len(questions)
        count = len(histories)
    else:
        task = Lamp3(data=str(folder), split_by="time")
        items = task.items(Selection(limit=50 if way == "limit 50" else None))
        task.fingerprint(Selection())
        if way != "first":
            assert all(record.document for item in items for record in item.example.user.history)
        count = len(items)
    took = time.process_time() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"seconds": took, "peak_mib": peak, "items": count}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=500)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        read(args.way, args.folder)
        return
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "data"
        folder.mkdir()
        make(folder, args.megabytes)
        size = (folder / "dev_questions.json").stat().st_size
        for repeat in range(args.repeats):
            for way in WAYS:
                command = [sys.executable, __file__, "--way", way, "--folder", str(folder)]
                cache = {**os.environ, "HARNESS_CACHE": str(Path(place) / f"cache{repeat}")}
                done = subprocess.run(command, env=cache, capture_output=True, text=True)
                if done.returncode:
                    raise DataMissing(f"{way}: {done.stderr.strip().splitlines()[-1]}")
                found[way].append(json.loads(done.stdout))
    middle = {
        way: {name: round(statistics.median(one[name] for one in runs), 2) for name in runs[0]}
        for way, runs in found.items()
    }
    times_faster = {way: round(middle["whole"]["seconds"] / middle[way]["seconds"], 2) for way in WAYS}
    print(json.dumps({"megabytes": round(size / 1e6), "readings": middle, "whole_over": times_faster}, indent=1))


if __name__ == "__main__":
    main()
