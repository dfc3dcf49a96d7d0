"""Records name runs by what can change a number, survive kills and full disks, and have one writer at a time."""

from __future__ import annotations

import json
import math
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from harness.errors import HarnessError, UsageError
from harness.files import Lock
from harness.records.store import (
    Batching,
    MetricValue,
    RunConfig,
    RunFolder,
    RunRecord,
    find_runs,
    folder_of,
    json_value,
    read_record,
    read_samples,
)
from harness.task import Metric, Sample

Configs = Callable[..., RunConfig]


def sample(id: str, **changes) -> Sample:
    return replace(Sample(id=id, user=f"user of {id}", response="a title", targets=("a gold", "another")), **changes)


@pytest.fixture
def folder(tmp_path: Path, run_config: Configs):
    with RunFolder.open(tmp_path, run_config()) as opened:
        yield opened


# The hash


@pytest.mark.parametrize(
    "change",
    [
        {"method": "cad"},
        {"options": {"gamma": 2}},
        {"preset": "released"},
        {"task": "lamp5"},
        {"model": "tiny"},
        {"fingerprint": "beef"},
        {"split": "test"},
        {"fit_split": "dev:0.2"},
        {"limit": 5},
        {"users": 5},
        {"seed": 1},
    ],
)
def test_whatever_can_change_a_number_changes_the_hash(run_config: Configs, change: dict):
    assert run_config(**change).hash8() != run_config().hash8()


def test_the_hash_does_not_depend_on_where_weights_and_data_lie(run_config: Configs):
    config = run_config()
    elsewhere = config.model_copy(
        update={
            "model": config.model.model_copy(update={"id": "some/other/folder"}),
            "data": config.data.model_copy(update={"description": "LaMP in another folder"}),
        }
    )
    assert elsewhere.hash8() == config.hash8()


def test_equal_options_hash_equally_however_they_are_written(run_config: Configs):
    first = run_config(options={"gamma": 1, "heads": (1, 2), "names": {"b", "a"}})
    second = run_config(options={"names": ["a", "b"], "heads": [1, 2], "gamma": 1.0})
    assert first.hash8() == second.hash8()


def test_an_infinite_option_is_not_a_missing_one(run_config: Configs):
    assert run_config(options={"cap": math.inf}).hash8() != run_config(options={"cap": None}).hash8()


def test_the_hash_of_a_config_is_fixed_across_versions(run_config: Configs):
    assert run_config().hash8() == "a8481029"  # a change here orphans every record in results/


def test_the_folder_of_a_model_with_a_slash_stays_inside_results(tmp_path: Path, run_config: Configs):
    path = folder_of(tmp_path, run_config(model="meta-llama/Llama-3"))
    assert path.relative_to(tmp_path).parts[:2] == ("meta-llama--Llama-3", "lamp4")
    escaping = folder_of(tmp_path, run_config(model="../../etc", method="./mine.py:Mine"))
    assert escaping.relative_to(tmp_path).parts[0] == "etc"
    assert escaping.name.startswith("mine.py_Mine-")


# run.json


def test_a_record_reads_back_as_it_was_written(folder: RunFolder, run_config: Configs):
    record = RunRecord(
        config=run_config(options={"cap": math.inf, "heads": [[1, 2]]}),
        metrics={"rouge1": MetricValue(value=0.5, n=2, low=0.4, high=0.6)},
        batch=Batching(requested="auto", sizes=[8, 4]),
        batches=[["a", "b"], ["c"]],
        hardware={"device": "cpu", "cores": 2},
    )
    folder.write(record)
    assert folder.record() == record.model_copy(update={"folder": folder.path})


def test_a_record_without_batches_reads_back(folder: RunFolder, run_config: Configs):
    folder.write(RunRecord(config=run_config()))
    saved = folder.record()
    assert saved is not None
    assert saved.batches == []


def test_a_record_knows_its_hash(run_config: Configs):
    assert RunRecord(config=run_config()).hash == run_config().hash8()


def test_a_batch_takes_one_line_of_run_json(run_config: Configs):
    lines = RunRecord(config=run_config(), batches=[["a", "b"], ["c", "d"]]).to_json().splitlines()
    assert '  ["a", "b"],' in lines
    assert '  ["c", "d"]' in lines


def test_metrics_of_a_task_go_into_a_record_as_they_are(run_config: Configs):
    metrics = {"mae": Metric(value=math.nan, n=3, low=0.1, high=0.2, higher_is_better=False, note="why")}
    record = RunRecord.model_validate({"config": run_config(), "metrics": metrics})
    assert record.metrics["mae"] == MetricValue(value=None, n=3, low=0.1, high=0.2, higher_is_better=False, note="why")


def test_a_misspelt_field_is_an_error(run_config: Configs):
    with pytest.raises(ValueError, match="statsu"):
        RunRecord.model_validate({"config": run_config(), "statsu": "complete"})


def test_a_failed_write_keeps_the_old_record(folder: RunFolder, run_config: Configs, monkeypatch: pytest.MonkeyPatch):
    folder.write(RunRecord(config=run_config(), notes=["old"]))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(HarnessError, match="No space left on device"):
        folder.write(RunRecord(config=run_config(), notes=["new"]))
    saved = folder.record()
    assert saved is not None
    assert saved.notes == ["old"]
    assert sorted(path.name for path in folder.path.iterdir()) == ["lock", "run.json"]


# samples.jsonl

json_scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
json_values = st.recursive(
    json_scalars, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=5
)
numbers = st.none() | st.floats(allow_nan=False, allow_infinity=False)
any_text = st.text(st.characters())  # lone surrogates too: a byte tokenizer can produce them


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # beside other work
@given(
    st.builds(
        Sample,
        id=any_text,
        user=any_text,
        response=st.none() | any_text,
        targets=st.lists(any_text).map(tuple),
        parsed=st.none() | any_text | st.floats(allow_nan=False, allow_infinity=False),
        metrics=st.dictionaries(st.text(), numbers),
        error=st.none() | any_text,
        extra=st.dictionaries(st.text(), json_values),
    )
)
def test_every_sample_reads_back_as_it_was_written(tmp_path_factory: pytest.TempPathFactory, given_sample: Sample):
    path = tmp_path_factory.mktemp("run")
    folder = RunFolder(path, Lock.take(path / "lock"))
    folder.append([given_sample])
    assert folder.samples() == [given_sample]
    folder.close()


def test_nan_is_written_as_null(folder: RunFolder):
    folder.append([sample("a", metrics={"mae": math.nan, "rmse": np.float32(math.inf)})])
    assert folder.samples()[0].metrics == {"mae": None, "rmse": None}
    assert "NaN" not in (folder.path / "samples.jsonl").read_text()


def test_numpy_numbers_become_python_numbers():
    assert json_value({"a": np.float32(0.5), "b": np.int64(3), "c": (1, {2})}) == {"a": 0.5, "b": 3, "c": [1, [2]]}


def test_what_is_not_json_is_refused_by_name():
    with pytest.raises(TypeError, match="not object"):
        json_value({"a": object()})


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ({"id": 1, "user": "u"}, "field id: "),
        ({"id": "a", "user": None}, "field user: "),
        ({"id": "a", "user": "u", "targets": "text"}, "field targets: "),
        ({"id": "a", "user": "u", "metrics": {"m": "1"}}, "field metrics.m: "),
        ({"id": "a", "user": "u", "ratings": {"trait": {"outcome": "so so"}}}, "field ratings.trait.outcome: "),
        ({"id": "a", "user": "u", "batch": 1.5}, "field batch: "),
        ({"id": "a", "user": "u", "colour": "red"}, "field colour: "),
    ],
)
def test_a_sample_of_other_types_is_refused_with_its_line_and_field(tmp_path: Path, line: dict, problem: str):
    (tmp_path / "samples.jsonl").write_text(f"{json.dumps(line)}\n")  # whole, though the last
    with pytest.raises(HarnessError, match=rf"samples.jsonl, line 1: not a sample: {problem}"):
        read_samples(tmp_path)


def test_a_record_nested_too_deeply_stops_nobody(tmp_path: Path, run_config: Configs, capsys: pytest.CaptureFixture):
    good = RunFolder.open(tmp_path, run_config())
    good.write(RunRecord(config=run_config()))
    good.close()
    bad = tmp_path / "model" / "task" / "bad"
    bad.mkdir(parents=True)
    (bad / "run.json").write_text('{"analysis": ' + "[" * 50_000 + "]" * 50_000 + "}")
    assert [record.folder for record in find_runs(tmp_path)] == [good.path]
    assert "nested more than 100 deep" in capsys.readouterr().err


def test_a_cut_last_line_is_left_out_and_the_next_sample_starts_a_line(tmp_path: Path, run_config: Configs):
    with RunFolder.open(tmp_path, run_config()) as folder:
        folder.append([sample("a"), sample("b")])
        path = folder.path / "samples.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    assert [s.id for s in read_samples(path.parent)] == ["a"]
    with RunFolder.open(tmp_path, run_config()) as folder:
        folder.append([sample("c")])
        assert [s.id for s in folder.samples()] == ["a", "c"]


# What batches took, logged until run.json holds it


def record_of(run_config: Configs, *firsts: str) -> RunRecord:
    costs = {first: {"flops": 7, "seconds": 0.5} for first in firsts}
    return RunRecord(config=run_config(), batches=[["a"], ["é"], ["c"]], batch_costs=costs)


def test_a_record_is_read_with_what_its_log_has_and_written_it_needs_no_log(folder: RunFolder, run_config: Configs):
    folder.write(record_of(run_config))
    whole = record_of(run_config, "a", "é")
    whole.cost.peak_memory_bytes = 9
    for first in whole.batch_costs:
        folder.log(whole, first)
    size = (folder.path / "run.json").stat().st_size
    assert folder.record() == whole.model_copy(update={"folder": folder.path})
    assert (folder.path / "run.json").stat().st_size == size
    logged = (folder.path / "batches.jsonl").read_bytes()
    folder.write(whole)
    assert not (folder.path / "batches.jsonl").exists()
    assert folder.record() == whole.model_copy(update={"folder": folder.path})
    (folder.path / "batches.jsonl").write_bytes(logged)  # as a kill before it was dropped leaves it
    assert folder.record() == whole.model_copy(update={"folder": folder.path})


def test_a_log_cut_at_any_byte_has_the_batches_before_the_cut_and_goes_on(tmp_path: Path, run_config: Configs):
    with RunFolder.open(tmp_path, run_config()) as folder:
        folder.write(record_of(run_config))
        for first in ("a", "é"):
            folder.log(record_of(run_config, first), first)
    log = folder.path / "batches.jsonl"
    content = log.read_bytes()
    first_line = content.index(b"\n") + 1
    for cut in range(0, len(content), 3):
        log.write_bytes(content[:cut])
        with RunFolder.open(tmp_path, run_config()) as folder:
            folder.log(record_of(run_config, "c"), "c")
            assert list(read_record(folder.path).batch_costs) == (["a", "c"] if cut >= first_line else ["c"])


def test_a_bad_line_in_the_middle_is_named(folder: RunFolder):
    path = folder.path / "samples.jsonl"
    path.write_text('{"id": "a", "user": "u"}\nrubbish\n{"id": "b", "user": "u"}\n')
    with pytest.raises(HarnessError, match=r"samples\.jsonl, line 2"):
        folder.samples()
    (folder.path / "run.json").write_text("{}")
    (folder.path / "batches.jsonl").write_text('{"first": "a", "costs": {"flops": "7"}}\n{}\n')
    with pytest.raises(HarnessError, match=r"batches\.jsonl, line 1: not a batch: field costs"):
        folder.record()


def test_a_full_disk_loses_nothing_that_was_there(folder: RunFolder):
    folder.append([sample("a")])
    size = (folder.path / "samples.jsonl").stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 100, limits[1]))
    try:
        with pytest.raises(HarnessError, match=r"cannot write .*nothing saved before is lost"):
            folder.append([sample("b", response="x" * 5000)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (folder.path / "samples.jsonl").stat().st_size == size
    folder.append([sample("c")])
    assert [s.id for s in folder.samples()] == ["a", "c"]


def test_an_unwritable_results_folder_is_one_clear_line(tmp_path: Path, run_config: Configs):
    blocked = tmp_path / "results"
    blocked.write_text("a file, not a folder")
    with pytest.raises(HarnessError, match=r"cannot write .*Not a directory"):
        RunFolder.open(blocked, run_config())


# Resuming


def test_an_incomplete_batch_is_dropped_whole(folder: RunFolder):
    folder.append([sample("a"), sample("b"), sample("c")])
    done = folder.resume([["a", "b"], ["c", "d"], ["e"]])
    assert [s.id for s in done] == ["a", "b"]
    assert [s.id for s in folder.samples()] == ["a", "b"]


def test_samples_outside_the_plan_are_dropped(folder: RunFolder):
    folder.append([sample("a"), sample("stray")])
    assert [s.id for s in folder.resume([["a"]])] == ["a"]


def test_resuming_a_finished_run_leaves_the_file_untouched(folder: RunFolder):
    folder.append([sample("a"), sample("b")])
    before = (folder.path / "samples.jsonl").stat()
    folder.resume([["b", "a"]])
    after = (folder.path / "samples.jsonl").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


@pytest.mark.parametrize("cut", range(0, 700, 23))
def test_a_run_killed_at_any_byte_ends_like_an_unbroken_one(tmp_path: Path, run_config: Configs, cut: int):
    batches = [["a", "b"], ["c", "d"], ["e"]]

    def run(root: Path) -> bytes:
        with RunFolder.open(root, run_config()) as folder:
            done = {s.id for s in folder.resume(batches)}
            for batch in batches:
                if not done.issuperset(batch):
                    folder.append([sample(id, metrics={"m": 0.1}) for id in batch])
            return (folder.path / "samples.jsonl").read_bytes()

    unbroken = run(tmp_path / "unbroken")
    broken = folder_of(tmp_path / "broken", run_config())
    broken.mkdir(parents=True)
    (broken / "samples.jsonl").write_bytes(unbroken[:cut])
    assert run(tmp_path / "broken") == unbroken


# The lock

HOLD = """
import pathlib, sys
from harness.records.store import RunConfig, RunFolder
folder = RunFolder.open(pathlib.Path(sys.argv[1]), RunConfig.model_validate_json(sys.argv[2]))
print("held", flush=True)
sys.stdin.read()
"""


def hold(root: Path, config: RunConfig) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", HOLD, str(root), config.model_dump_json()]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_process_is_told_who_writes_and_stops(tmp_path: Path, run_config: Configs):
    with hold(tmp_path, run_config()) as process:
        with pytest.raises(UsageError, match=rf"pid {process.pid} on {os.uname().nodename}"):
            RunFolder.open(tmp_path, run_config())
        process.kill()


def test_a_killed_process_leaves_no_lock(tmp_path: Path, run_config: Configs):
    with hold(tmp_path, run_config()) as process:
        process.kill()
        process.wait()
    with RunFolder.open(tmp_path, run_config()):
        pass


def test_runs_of_another_config_are_not_locked(folder: RunFolder, tmp_path: Path, run_config: Configs):
    with RunFolder.open(tmp_path, run_config(seed=1)) as other:
        assert other.path != folder.path


def test_the_same_process_cannot_open_a_record_twice(folder: RunFolder, tmp_path: Path, run_config: Configs):
    with pytest.raises(UsageError, match=f"pid {os.getpid()}"):
        RunFolder.open(tmp_path, run_config())


def test_without_kernel_locks_a_dead_pid_is_taken_over_and_another_host_is_not(
    tmp_path: Path, run_config: Configs, monkeypatch: pytest.MonkeyPatch
):
    def unsupported(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", unsupported)
    path = folder_of(tmp_path, run_config())
    path.mkdir(parents=True)
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    (path / "lock").write_text(f"pid {dead.stdout.strip()} on {os.uname().nodename}")
    RunFolder.open(tmp_path, run_config()).close()
    (path / "lock").write_text("pid 1 on elsewhere")
    with pytest.raises(UsageError, match="pid 1 on elsewhere"):
        RunFolder.open(tmp_path, run_config())


def test_a_closed_folder_leaves_only_the_record(folder: RunFolder, run_config: Configs):
    folder.write(RunRecord(config=run_config()))
    folder.append([sample("a")])
    folder.close()
    assert sorted(path.name for path in folder.path.iterdir()) == ["run.json", "samples.jsonl"]


# Reading many


def write(root: Path, config: RunConfig) -> Path:
    with RunFolder.open(root, config) as folder:
        folder.write(RunRecord(config=config))
        return folder.path


def test_runs_are_found_by_model_task_and_method(tmp_path: Path, run_config: Configs):
    wanted = write(tmp_path, run_config(method="rag", task="lamp4"))
    write(tmp_path, run_config(method="cad", task="lamp4"))
    write(tmp_path, run_config(method="rag", task="lamp5"))
    found = find_runs(tmp_path, model="llama3-8b", task="lamp4", method="rag")
    assert [record.folder for record in found] == [wanted]
    assert len(find_runs(tmp_path)) == 3


def test_an_unreadable_record_is_named_and_left_out(
    tmp_path: Path, run_config: Configs, capsys: pytest.CaptureFixture[str]
):
    good, bad = write(tmp_path, run_config()), write(tmp_path, run_config(seed=1))
    (bad / "run.json").write_text('{"schema_version": 1, "status": ')
    assert [record.folder for record in find_runs(tmp_path)] == [good]
    assert str(bad / "run.json") in capsys.readouterr().err


def test_a_bad_field_of_a_record_is_named(tmp_path: Path, run_config: Configs):
    path = write(tmp_path, run_config())
    content = json.loads((path / "run.json").read_text())
    (path / "run.json").write_text(json.dumps({**content, "status": "great"}))
    with pytest.raises(HarnessError, match=r"run\.json: field status: .*'complete'"):
        read_record(path)


def test_no_results_folder_is_no_runs(tmp_path: Path):
    assert find_runs(tmp_path / "none") == []


def test_reading_records_and_tables_never_imports_torch():
    modules = "harness.records.store, harness.publish.tables, harness.publish.leaderboard, harness.statistics.intervals"
    code = f"import sys, {modules}; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
