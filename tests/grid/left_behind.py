"""What a run on workers must leave as one process does, and what it must not."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path

from harness.records.store import RunRecord, find_runs


def records(folder: str) -> dict[str, tuple[bytes, RunRecord]]:
    """Hash -> samples as bytes, and the record without what time and place decide."""
    found = {}
    for run in find_runs(Path(folder)):
        assert run.folder is not None
        found[run.hash] = ((run.folder / "samples.jsonl").read_bytes(), run)
    return found


def same(one: str, other: str) -> None:
    first, second = records(one), records(other)
    assert first.keys() == second.keys()
    for key, (samples, run) in first.items():
        assert second[key][0] == samples
        assert second[key][1].metrics == run.metrics
        assert (second[key][1].status, second[key][1].batches) == (run.status, run.batches)
        assert second[key][1].health == run.health
        spent = ("forward_passes", "prefill_tokens", "decode_tokens", "flops")
        assert [getattr(second[key][1].cost, name) for name in spent] == [getattr(run.cost, name) for name in spent]


def none_left(pids: Iterable[int]) -> None:
    """All of these processes end."""
    until = time.monotonic() + 30
    waiting = set(pids)
    while waiting and time.monotonic() < until:
        waiting = {pid for pid in waiting if _lives(pid)}
        time.sleep(0.02)
    assert not waiting


def _lives(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"
