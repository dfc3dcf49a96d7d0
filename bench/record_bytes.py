"""Bytes that a run at batch 1 writes: batches in a log, against run.json written again at every batch, as it was.

    python bench/record_bytes.py --model_path FOLDER_OF_STORIES260K [--samples 1000 --of 20000]

Every byte that goes through `os.write` in the run's folder is counted, for half the samples and for all of them. With a log
they grow by the same number a sample, with rewriting also by that of all samples before it; the two counts fix both numbers,
and what `--of` samples write is extrapolated from them and said so. With `--of` equal to `--samples` nothing is.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

from subject import settings, write

from harness.engine.loading import load_model
from harness.engine.model import LanguageModel
from harness.fit.artifacts import ArtifactStore
from harness.plugins.registry import model_row
from harness.records.store import RunFolder
from harness.run.cell import Settings, grid
from harness.run.steps import run_cell


def written(lm: LanguageModel, samples: int, *, rewriting: bool) -> tuple[int, int]:
    """Bytes written by a run of so many samples, and the size of its record."""
    count = 0
    os_write = os.write

    def counting(file: int, content: bytes) -> int:
        nonlocal count
        done = os_write(file, content)
        count += done
        return done

    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        users = Path(folder) / "users.jsonl"
        lines = [
            {"user": f"user {n}", "input": f"Tell me story {n}.", "target": "no", "history": []} for n in range(samples)
        ]
        users.write_text("".join(json.dumps(line) + "\n" for line in lines))
        (cell,) = grid(
            ["plain"], [f"users:{users}"], Settings(batch_size=1, max_new_tokens=1, output_path=Path(folder) / "runs")
        )
        assert len(cell.items) == samples
        if rewriting:
            stack.enter_context(patch.object(RunFolder, "log", lambda self, record, first: self.write(record)))
        stack.enter_context(patch.object(os, "write", counting))
        done = run_cell(lm, cell, store=ArtifactStore(Path(folder) / "artifacts"))
        return count, sum(file.stat().st_size for file in done.folder.iterdir())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="stories260k")
    parser.add_argument("--model_path")
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--of", type=int, default=20000, help="samples to extrapolate to")
    parser.add_argument(
        "--rewriting", type=int, default=400, help="samples of the run that writes run.json at every batch"
    )
    parser.add_argument("--output", help="file for the JSON; by default stdout")
    args = parser.parse_args()
    lm = load_model(model_row(args.model, args.model_path), dtype="float32", device="cpu")
    results = {}
    for name, most, rewriting in (("log", args.samples, False), ("rewriting", args.rewriting, True)):
        half, (whole, record) = written(lm, most // 2, rewriting=rewriting)[0], written(lm, most, rewriting=rewriting)
        quadratic = max(0.0, 2 * (whole - 2 * half) / most**2)
        linear = whole / most - quadratic * most
        results[name] = {
            "samples": most,
            "bytes_written": whole,
            "times_the_record": round(whole / record, 1),
            "megabytes_of_all": round((linear * args.of + quadratic * args.of**2) / 1e6, 1),
            "extrapolated": args.of != most,
        }
    del args.model_path
    write({"settings": settings(args, lm), "results": results}, args.output)


if __name__ == "__main__":
    main()
