"""What a batch may take is what is free, whoever sets the limit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from harness.engine import machine as here
from harness.engine.machine import free_bytes, free_cores, row_bytes, rows_that_fit
from harness.methods.cad import CAD
from harness.methods.plain import Plain
from harness.run.batches import FIRST_OPERATIONS, Batching
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


@pytest.mark.parametrize(
    ("load", "files", "cores"),
    [
        (0.4, {}, 8),
        (5.2, {}, 3),
        (30.0, {}, 1),
        (0.0, {"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/cpu.max": "250000 100000\n"}, 2),
        (0.0, {"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/cpu.max": "max 100000\n"}, 8),
        (0.0, {"proc/self/cgroup": "5:cpu,cpuacct:/b\n", "sys/fs/cgroup/cpu/b/cpu.cfs_quota_us": "50000\n",
          "sys/fs/cgroup/cpu/b/cpu.cfs_period_us": "100000\n"}, 1),
    ],
)  # fmt: skip
def test_threads_are_as_many_as_cores_that_are_free_and_allowed(tmp_path, monkeypatch, load, files, cores):
    monkeypatch.setattr(here.os, "cpu_count", lambda: 8)
    monkeypatch.setattr(here.os, "sched_getaffinity", lambda process: range(8), raising=False)
    monkeypatch.setattr(here.os, "getloadavg", lambda: (load, 0, 0))
    assert free_cores(machine(tmp_path, files)) == cores
    monkeypatch.setattr(here.os, "sched_getaffinity", lambda process: range(2), raising=False)
    assert free_cores(tmp_path) == min(cores, 2)


@pytest.mark.parametrize(("given", "policy"), [({}, "passive"), ({"OMP_WAIT_POLICY": "active"}, "active")])
def test_waiting_threads_sleep_unless_the_user_says_otherwise(given, policy):
    code = "import harness, os, sys; assert 'torch' not in sys.modules; print(os.environ['OMP_WAIT_POLICY'])"
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("OMP", "GOMP"))}
    done = subprocess.run([sys.executable, "-c", code], env=plain | given, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == policy


def test_where_the_system_says_nothing_nothing_is_limited(tmp_path):
    assert free_bytes(tmp_path) is None


def test_auto_plans_batches_that_the_free_memory_holds(monkeypatch):
    lm = random_lm()
    examples = [item.example for item in toy_examples(40)]

    def planned(method: Plain | CAD, free: int | None, size: int | None = None) -> list[int]:
        monkeypatch.setattr(here, "free_bytes", lambda: free)
        system = ModelSystem(lm, method, Generation(1), batching=Batching(size))
        assert len(list(system.respond(examples))) == 40
        return [len(batch) for batch in system.batching.planned]

    longest = max(ModelSystem(lm, Plain(), Generation(1)).prompt(example).encoded.ids.__len__() for example in examples)

    def free_for(rows: float) -> int:
        return int((rows * row_bytes(lm, longest, 1) + here._FIXED) / here.SHARE) + 2

    assert planned(Plain(), None) == [8, 16, 16]
    assert planned(Plain(), 10**12) == [8, 16, 16]
    assert planned(Plain(), free_for(5)) == [4] * 10
    assert planned(Plain(), free_for(12)) == [8] * 5
    assert planned(Plain(), 0) == [1] * 40
    assert planned(Plain(), 0, size=20) == [20, 20]
    two_streams = planned(CAD(), free_for(8))
    assert max(two_streams) <= 4
    assert rows_that_fit(lm, longest, 1) == 8


def test_the_first_batch_is_small_where_a_cpu_takes_long_and_answers_stay_the_same(monkeypatch):
    lm = random_lm()
    examples = [item.example for item in toy_examples(40)]

    def answered(size: int | None = None) -> tuple[list[int], dict[str, str | None]]:
        system = ModelSystem(lm, Plain(), Generation(4), batching=Batching(size))
        responses = {sample.id: sample.response for sample in system.respond(examples)}
        return [len(batch) for batch in system.batching.planned], responses

    sizes, responses = answered()
    assert sizes == [8, 16, 16]
    asked = ModelSystem(lm, Plain(), Generation(4)).prompt
    longest = lm.sizes.blocks(max(len(asked(example).encoded.ids) for example in examples) + 4)
    for operations, planned in ((2 * longest, [2, 4, 8, 16, 10]), (1, [1, 2, 4, 8, 16, 9]), (8 * longest, [8, 16, 16])):
        monkeypatch.setitem(FIRST_OPERATIONS, "cpu", operations)
        assert answered() == (planned, responses)
    assert answered(20) == ([20, 20], responses), "a size that was asked for is kept"
