"""A record is certified: its samples again in other batches, with other threads, in another process."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from harness.errors import UsageError
from harness.methods.pag import PAG
from harness.publish.show import certificate_table
from harness.records.store import find_runs
from harness.run.contract.certify import Again, Certificate, Variant, cell_of, moved


def test_a_certificate_says_what_moved_and_finds_an_answer_that_is_not_the_models(
    harness: Callable[[str], Any], toy: Path
) -> None:
    common = f"--task lamp4 --model {toy} --limit 3 --max_new_tokens 2 --output_path kept --batch_size 2"
    assert harness(f"run --method rag --method copy --set rag.k=1 {common}").code == 0
    of = {run.config.method.name: run for run in find_runs(Path("kept"))}
    assert "answers without the model" in harness(f"certify {of['copy'].folder}").error()
    folder = of["rag"].folder
    assert folder is not None
    lines = (folder / "samples.jsonl").read_text().splitlines()
    changed = json.loads(lines[0]) | {"response": "another answer"}
    (folder / "samples.jsonl").write_text("\n".join([json.dumps(changed), *lines[1:]]) + "\n")

    done = harness(f"certify {folder} --samples 3 --json")
    assert done.code == 5, done.err
    found = json.loads(done.out)
    names = [one["name"] for one in found["variants"]]
    assert names[:3] == ["recorded batches", "one a batch", "3 a batch"] and names[-1] == "another process"
    assert found["samples"] == 3 and all(one["changed"] == [changed["id"]] for one in found["variants"])
    assert found["variants"][0]["shift"] == 0 and all(one["shift"] < 1e-3 for one in found["variants"])


def test_a_token_that_is_ruled_out_in_both_has_not_moved() -> None:
    """As by dola, whose mix rules tokens out: their log-probability is -inf."""
    first = Again({"1": "a", "2": "b"}, {"1": [-math.inf, -1.0], "2": [-math.inf]}, 0.5)
    again = Again({"1": "a", "2": "c"}, {"1": [-math.inf, -1.25], "2": [-math.inf]}, 0.25)
    recorded = {"1": "a", "2": "b"}
    assert moved("one a batch", again, first, recorded) == Variant("one a batch", ("2",), 0.25, 0.25)
    assert moved("recorded batches", first, first, recorded).shift == 0
    back = replace(first, logprobs={"1": [-2.0, -1.0], "2": [-math.inf]})
    assert moved("another process", back, first, recorded).shift == math.inf


def test_an_infinite_shift_is_none_in_json() -> None:
    lost = Certificate(Path("run"), 1, "f1", None, (Variant("one a batch", (), math.inf, None),), ())
    assert json.loads(lost.to_json())["variants"][0]["shift"] is None and " inf " in certificate_table(lost)


def test_a_record_whose_writer_lies_in_a_folder_is_made_again_from_that_folder_alone(
    harness: Callable[[str], Any], toy: Path, tmp_path: Path
) -> None:
    run = f"run --method pag --task lamp4 --model {toy} --limit 2 --max_new_tokens 2 --output_path kept --set profile_tokens=2"
    assert harness(f"{run} --set writer={toy}").code in (0, 1)
    (record,) = find_runs(Path("kept"))
    assert "sha256:" in record.config.method.options["writer"]
    with pytest.raises(UsageError, match=r"says of writer what is in it .* give --set writer=PATH"):
        cell_of(record, None)
    assert cell_of(record, None, places=[f"writer={toy}"]).method == PAG(writer=str(toy), profile_tokens=2)
    with pytest.raises(UsageError, match=r"--set writer=tiny is tiny, and the record was made with "):
        cell_of(record, None, places=["writer=tiny"])


def test_the_table_of_a_certificate_says_what_follows() -> None:
    good, moved = Variant("recorded batches", (), 0.0, 0.5), Variant("one a batch", ("7",), 2e-6, 0.25)
    made = Certificate(Path("run"), 20, "rouge1", 0.5, (good, moved), ("numpy 1 then, 2 now",))
    text, all_well, wrong = (
        " ".join(certificate_table(one).split())
        for one in (made, replace(made, variants=(good,)), replace(made, variants=(moved,)))
    )
    assert "one a batch 1 of 20 2.0e-06 0.2500" in text and "1 move with rounding: 7." in text
    assert "numpy 1 then, 2 now" in text and made.reproduced
    assert "All 20 answers are the recorded ones" in all_well
    assert "does not give the recorded answers to 1" in wrong
