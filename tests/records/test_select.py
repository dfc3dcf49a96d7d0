"""One way to say which records: a folder, a record, a hash, a glob; results and runs where nothing is said."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from harness.errors import DataMissing, HarnessError, UsageError
from harness.records.select import find_records, find_run, record_folders, select
from harness.records.store import RunConfig, RunFolder, RunRecord, find_runs


@pytest.fixture
def places(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    run_config: Callable[..., RunConfig],
    run_record: Callable[..., RunRecord],
) -> dict[str, Path]:
    """Records by `root/method`: plain and rag are published, rag was repeated, and dps is one's own."""
    monkeypatch.chdir(tmp_path)
    found = {}
    for root, method in (("results", "plain"), ("results", "rag"), ("runs", "rag"), ("runs", "dps")):
        record = run_record(run_config(method), rouge1=0.2)
        with RunFolder.open(Path(root), record.config) as folder:
            folder.write(record)
        found[f"{root}/{method}"] = folder.path
    return found


def test_nothing_said_is_results_and_runs_and_a_repeated_record_is_read_once(places: dict[str, Path]) -> None:
    runs = find_runs(select())
    assert [run.folder for run in runs] == [places["results/plain"], places["results/rag"], places["runs/dps"]]


@pytest.mark.parametrize("said", ["runs", "runs/llama3-8b", "runs/llama3-8b/lamp4", "runs/*/lamp4/*", "{tmp}/runs"])
def test_a_folder_or_a_glob_is_what_lies_below(places: dict[str, Path], tmp_path: Path, said: str) -> None:
    folders = record_folders(select([said.format(tmp=tmp_path)]))
    assert sorted(folder.name for folder in folders) == sorted(places[key].name for key in ("runs/rag", "runs/dps"))


def test_a_record_is_named_by_its_folder_its_hash_or_its_method(places: dict[str, Path]) -> None:
    folder = places["runs/dps"]
    for said in (folder, str(folder), folder.name, folder.name[-8:], folder.name[-8:-3], "lamp4/dps", "dps"):
        assert find_run(said) == folder


def test_records_are_found_in_the_order_they_are_named_each_once(places: dict[str, Path]) -> None:
    found = [places["runs/dps"], places["results/plain"], places["results/rag"]]
    assert find_records(["dps", "results", "results/*/lamp4/rag*"]) == found
    with pytest.raises(DataMissing, match="nobody holds no run"):
        find_records(["dps", "nobody"])


def test_two_records_are_not_one_and_are_named(places: dict[str, Path]) -> None:
    with pytest.raises(UsageError, match=r"results is 2 records; name one: results/llama3-8b/lamp4/plain-"):
        find_run("results")


@pytest.mark.parametrize("said", ["a**", "**x/dps", "x" * 300])
def test_what_no_folder_can_be_called_names_no_record(places: dict[str, Path], said: str) -> None:
    with pytest.raises(DataMissing, match="names no record of results and runs"):
        find_run(said)


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("nothing", "nothing holds no run.json and names no record of results and runs"),
        ("https://example.com/results", "is a URL; records are read from folders"),
        ("{record}/run.json", "is a file; give the folder that holds it"),
    ],
)
def test_what_names_no_record_is_one_line(places: dict[str, Path], said: str, words: str) -> None:
    with pytest.raises(HarnessError, match=words) as raised:
        find_run(said.format(record=places["runs/dps"]))
    assert isinstance(raised.value, DataMissing if said == "nothing" else UsageError)
