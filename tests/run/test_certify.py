"""A record is certified: its samples again in other batches, with other threads, in another process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness.records.store import find_runs, read_samples


def test_a_certificate_says_what_moved_and_a_record_of_other_answers_is_found_out(
    harness: Callable[[str], Any], toy: Path
) -> None:
    common = f"--task lamp4 --model {toy} --limit 3 --max_new_tokens 2 --output_path kept --batch_size 2"
    assert harness(f"run --method dps --set heads=2 {common}").code in (0, 1)
    assert harness(f"run --method copy {common}").code == 0
    of = {run.config.method.name: run for run in find_runs(Path("kept"))}
    folder = of["dps"].folder
    assert folder is not None
    done = harness(f"certify {folder} --samples 3 --json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    names = [one["name"] for one in found["variants"]]
    assert names[:3] == ["recorded batches", "one a batch", "3 a batch"] and names[-1] == "another process"
    assert found["samples"] == 3 and all(one["changed"] == [] for one in found["variants"])
    assert found["variants"][0]["shift"] == 0 and all(one["shift"] < 1e-3 for one in found["variants"])
    assert found["variants"][0]["metric"] == found["recorded"]
    assert "answers without the model" in harness(f"certify {of['copy'].folder}").error()

    lines = (folder / "samples.jsonl").read_text().splitlines()
    changed = json.loads(lines[0]) | {"response": "another answer"}
    (folder / "samples.jsonl").write_text("\n".join([json.dumps(changed), *lines[1:]]) + "\n")
    done = harness(f"certify {folder} --samples 3")
    assert done.code == 5 and "does not give the recorded answers to 1 samples" in done.out
    assert len(read_samples(folder)) == 3
