"""What a grid costs its driver: the real scheduler over fake workers, and files as a driver reads and writes them.

    python bench/grid.py [--users 1000000 --workers 1000]     simulated hours, shards, files, bytes, driver seconds a shard
    python bench/grid.py --measure MODEL --samples 2000       this machine: one process, one worker and two, in seconds

The simulation has a clock of its own: workers take `--seconds` a sample, each a little faster or slower than the others, and die
every `--hours` hours. Only the driver's part is real: which shard is whose, a task's file, a shard's file read and checked, its
samples and costs appended to a record. It needs no model. Files are measured on `--shards` shards, and counted for all.
"""

from __future__ import annotations

import argparse
import heapq
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from harness.grid.folder import put
from harness.grid.results import Results
from harness.grid.scheduler import Scheduler, Unit
from harness.records.schema import (
    DataConfig,
    MethodConfig,
    ModelConfig,
    RunConfig,
    RunRecord,
    SamplingConfig,
    TaskConfig,
)
from harness.records.store import RunFolder
from harness.task import Sample

ROOT = Path(__file__).resolve().parents[1]


def simulated(users: int, workers: int, batch: int, seconds: float, hours: float) -> dict[str, float]:
    """A sample a user, answered in the workers' time; the scheduler's own time is measured."""
    draw, scheduler, spent = random.Random(0), Scheduler(workers), 0.0

    def timed(act: Any, *given: Any) -> Any:
        nonlocal spent
        start = time.perf_counter()
        found = act(*given)
        spent += time.perf_counter() - start
        return found

    units = [Unit(0, tuple(map(str, range(first, min(users, first + batch))))) for first in range(0, users, batch)]
    timed(scheduler.add, units)
    pace = [seconds * draw.uniform(0.8, 1.25) for _ in range(workers)]
    events: list[tuple[float, int, int]] = []
    dies = [draw.expovariate(1 / (hours * 3600)) for _ in range(workers)]
    now, shards, deaths, longest, busy = 0.0, 0, 0, 0.0, 0.0
    waiting = list(range(workers))
    while True:
        for rank in waiting:
            shard = timed(scheduler.next, str(rank))
            if shard is not None:
                takes = shard.samples * pace[rank]
                longest = max(longest, takes)
                heapq.heappush(events, (min(now + takes, max(now, dies[rank])), rank, shard.number))
        if not events:
            break
        now, rank, number = heapq.heappop(events)
        if now >= dies[rank]:
            deaths += 1
            timed(scheduler.lost, str(rank), "gone", (number, 0))
            dies[rank] = now + draw.expovariate(1 / (hours * 3600))
        else:
            shard = scheduler.out[number][1]
            busy += shard.samples * pace[rank]
            timed(scheduler.finished, number, shard.samples * pace[rank])
            shards += 1
        waiting = [rank]
    return {
        "hours": now / 3600,
        "busy_share": busy / (now * workers),
        "shards": shards,
        "deaths": deaths,
        "longest_shard_seconds": longest,
        "failed_samples": len(scheduler.failed),
        "scheduler_seconds_a_shard": spent / shards,
    }


def filed(shards: int, samples: int, together: int) -> dict[str, float]:
    """A driver's files: tasks written, shards read, those that came `together` merged at once. Means of so many shards.

    The processor's seconds a shard, and apart from them the seconds a merge waits for the disk, however many it merges.
    """
    config = RunConfig(
        model=ModelConfig(name="m", id="m", revision="r", dtype="float32"),
        method=MethodConfig(name="plain"),
        task=TaskConfig(name="lamp4"),
        data=DataConfig(description="d", fingerprint="f", split="dev"),
        sampling=SamplingConfig(max_new_tokens=64),
    )
    costs = dict.fromkeys(("forward_passes", "prefill_tokens", "decode_tokens", "flops", "seconds"), 1.0)
    with tempfile.TemporaryDirectory() as name, RunFolder.open(Path(name), config) as folder:
        record, results = RunRecord(config=config), Results(Path(name) / "results")
        made = [
            Sample(f"{number}-{n}", f"u{number}-{n}", prompt_hash="0" * 16, response="a title of a few words", targets=("gold",),
                   parsed="a title of a few words", metrics={"rouge1": 0.25, "rougeL": 0.25}, finish="stop")
            for number in range(shards)
            for n in range(samples)
        ]  # fmt: skip
        record.batches = [[s.id for s in made[n : n + samples]] for n in range(0, len(made), samples)]
        folder.write(record)
        parts = []
        for number in range(shards):
            batch = made[number * samples : (number + 1) * samples]
            content = [{"hash": "h", "whole": record.batches[number], "samples": batch, "costs": costs, "peak": 1}]
            put(results.folder / f"{number}.json", content)
            parts.append((results.folder / f"{number}.json").stat().st_size)
        start, waited = time.process_time(), 0.0
        for first in range(0, shards, together):
            merging = []
            for number in range(first, min(shards, first + together)):
                ids = tuple(record.batches[number])
                task = {"kind": "answer", "units": [{"ids": ids, "points": [0]}]}
                put(Path(name) / "inbox" / "0-x" / f"{number}.json", task)
                results.read(f"{number}.json")
                (part,) = results.found("h", ids) or ()
                record.batch_costs[ids[0]] = part.costs
                merging.append((ids, part, [replace(sample, batch=number) for sample in part.samples]))
            begin, computed = time.perf_counter(), time.process_time()
            folder.log(record, *(ids[0] for ids, _, _ in merging))
            folder.append([sample for _, _, some in merging for sample in some])
            waited += time.perf_counter() - begin - (time.process_time() - computed)
            for ids, part, _ in merging:
                results.merged("h", part, ids)
        seconds = time.process_time() - start
        log = folder.path / "batches.jsonl"
        return {
            "driver_seconds_a_shard": seconds / shards,
            "disk_seconds_a_merge": waited / len(range(0, shards, together)),
            "bytes_a_shard": sum(parts) / shards,
            "bytes_a_sample_in_the_record": (folder.path / "samples.jsonl").stat().st_size / len(made),
            "bytes_of_log_a_batch": log.stat().st_size / shards,
        }


def measured(model: str, samples: int, task: list[str]) -> dict[str, Any]:
    """Seconds of the whole command and of the answering alone, by the records; samples must be the same bytes."""
    found: dict[str, Any] = {"load_before": os.getloadavg()[0]}
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryDirectory() as name:
        env["HARNESS_CACHE"] = name
        texts = {}
        run = [sys.executable, "-m", "harness", "run", "--method", "plain", "--model", model, *task, "--limit"]
        first = [*run, "8", "--output_path", str(Path(name) / "first")]  # what is kept of files is there for all three
        subprocess.run(first, env=env, cwd=ROOT, check=True, capture_output=True)
        for on in ("", "local:1", "local:2"):
            folder = Path(name) / (on or "one").replace(":", "")
            line = [*run, str(samples), "--output_path", str(folder), *(["--on", on] if on else [])]
            start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run(line, env=env, cwd=ROOT, check=True, capture_output=True)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            (record,) = (json.loads(path.read_text()) for path in folder.glob("*/*/*/run.json"))
            (texts[on],) = (path.read_bytes() for path in folder.glob("*/*/*/samples.jsonl"))
            found[on or "one process"] = {
                "seconds": time.perf_counter() - start,
                "cpu_seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
                "answering_seconds": record["cost"]["seconds"],
                "batches": len(record["batches"]),
            }
            shutil.rmtree(folder)
        assert texts["local:1"] == texts["local:2"] == texts[""], "other samples"
    one = found["one process"]["seconds"]
    found["times_as_fast"] = one / found["local:2"]["seconds"]
    found["overhead_of_one_worker"] = found["local:1"]["seconds"] / one - 1
    found["load_after"] = os.getloadavg()[0]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=1_000_000)
    parser.add_argument("--workers", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=2.0, help="of a worker, a sample")
    parser.add_argument("--hours", type=float, default=12.0, help="between two deaths of a worker")
    parser.add_argument("--shards", type=int, default=500, help="whose files are measured")
    parser.add_argument("--together", type=int, default=8, help="shards that come while others are merged")
    parser.add_argument("--measure", metavar="MODEL", help="run on this machine instead")
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--task", default="--task lamp4", help="with its options")
    parser.add_argument("--output", type=Path, help="file to write the numbers to")
    given = parser.parse_args()
    if given.measure:
        found = measured(given.measure, given.samples, given.task.split())
    else:
        found = simulated(given.users, given.workers, given.batch, given.seconds, given.hours)
        found |= filed(given.shards, max(1, round(given.users / found["shards"])), given.together)
        found["bytes_of_the_record"] = given.users * found["bytes_a_sample_in_the_record"]
        found["files_at_once"] = 5.0 * given.workers
        driver = found["driver_seconds_a_shard"] + found["scheduler_seconds_a_shard"]
        found["driver_busy_share"] = driver * found["shards"] / (found["hours"] * 3600)
    text = json.dumps(found, indent=1)
    if given.output:
        given.output.parent.mkdir(parents=True, exist_ok=True)
        given.output.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
