"""What a batch may take is what is free, whoever sets the limit."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.engine import memory
from harness.engine.memory import free_bytes, row_bytes, rows_that_fit
from harness.methods.cad import CAD
from harness.methods.plain import Plain
from harness.run.batches import Batching
from harness.run.contract import random_lm, toy_examples
from harness.run.system import ModelSystem
from harness.task import Generation

GIB = 1 << 30


def machine(root: Path, files: dict[str, str]) -> Path:
    """A file system that says so."""
    for name, text in {"proc/meminfo": f"MemTotal: 99 kB\nMemAvailable:  {8 * GIB >> 10} kB\n", **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({}, 8 * GIB),
        ({"proc/self/status": f"RssAnon: 5 kB\nRssFile:\t {GIB >> 10} kB\n"}, 7 * GIB),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/memory.max": "5", "sys/fs/cgroup/a/memory.current": "2"}, 3),
        ({"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/memory.max": "max", "sys/fs/cgroup/a/memory.current": "2"},
         8 * GIB),
        ({"proc/self/cgroup": "4:cpu:/x\n3:memory:/not/seen/here\n", "sys/fs/cgroup/memory/memory.limit_in_bytes": "90\n",
          "sys/fs/cgroup/memory/memory.usage_in_bytes": "50\n",
          "sys/fs/cgroup/memory/memory.stat": "cache 30\ninactive_file 20\n"}, 60),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "1", "sys/fs/cgroup/memory.current": "9"}, 0),
    ],
)  # fmt: skip
def test_what_is_free_is_the_least_that_the_machine_and_its_control_groups_leave(tmp_path, files, free):
    assert free_bytes(machine(tmp_path, files)) == free


def test_where_the_system_says_nothing_nothing_is_limited(tmp_path):
    assert free_bytes(tmp_path) is None


def test_auto_plans_batches_that_the_free_memory_holds(monkeypatch):
    lm = random_lm()
    examples = [item.example for item in toy_examples(40)]

    def planned(method: Plain | CAD, free: int | None, size: int | None = None) -> list[int]:
        monkeypatch.setattr(memory, "free_bytes", lambda: free)
        system = ModelSystem(lm, method, Generation(1), batching=Batching(size))
        assert len(list(system.respond(examples))) == 40
        return [len(batch) for batch in system.batching.planned]

    longest = max(ModelSystem(lm, Plain(), Generation(1)).prompt(example).encoded.ids.__len__() for example in examples)

    def free_for(rows: float) -> int:
        return int((rows * row_bytes(lm, longest, 1) + memory._FIXED) / memory.SHARE) + 2

    assert planned(Plain(), None) == [8, 16, 16]
    assert planned(Plain(), 10**12) == [8, 16, 16]
    assert planned(Plain(), free_for(5)) == [4] * 10
    assert planned(Plain(), free_for(12)) == [8] * 5
    assert planned(Plain(), 0) == [1] * 40
    assert planned(Plain(), 0, size=20) == [20, 20]
    two_streams = planned(CAD(), free_for(8))
    assert max(two_streams) <= 4
    assert rows_that_fit(lm, longest, 1) == 8
