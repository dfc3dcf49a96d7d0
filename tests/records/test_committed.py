"""The records in results/: each lies where the hash of its own configuration says."""

from __future__ import annotations

from pathlib import Path

from harness.records.store import folder_of, read_record

RESULTS = Path(__file__).parents[2] / "results"


def test_every_committed_record_has_the_hash_of_its_configuration() -> None:
    folders = sorted(path.parent for path in RESULTS.glob("*/*/*/run.json"))
    assert len(folders) > 200
    for folder in folders:
        record = read_record(folder)
        assert record.config.hash8() == record.hash, folder
        assert folder_of(RESULTS, record.config) == folder
