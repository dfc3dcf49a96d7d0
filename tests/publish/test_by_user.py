"""Who gains: pictures of gains by user in the report."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness.publish.report.by_user import unlike


def test_unlike_is_one_less_the_cosine_to_the_mean_of_the_others() -> None:
    found = unlike({"a": ["x y"], "b": ["x y"], "c": ["z"], "d": ["x y"]})
    assert found["c"] == 1 and found["a"] == pytest.approx(found["b"]) and found["a"] < 0.2


def test_the_report_draws_gains_against_length_and_unlikeness(
    harness: Callable[[str], Any], toy: Path, tmp_path: Path
) -> None:
    lines = [
        {
            "user": f"u{n}",
            "input": f"mail {n}?",
            "target": "yes no"[n % 2 :],
            "history": [f"old {n} {i}" for i in range(1 + n % 5)],
        }
        for n in range(14)
    ]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    common = f"--task ./mine.jsonl --model {toy} --max_new_tokens 2 --task_set metrics=chrf --output_path kept"
    assert harness(f"run --method plain --method rag --set rag.k=1 {common}").code == 0
    assert harness("report kept --output_path page").code == 0
    drawn = json.loads(Path("page/data/figures.js").read_text().split(",", 1)[1].rstrip(");\n"))
    (first, *_) = drawn
    assert (
        first["id"] == "users-1" and first["title"].startswith("who gains over plain") and "14 users" in first["title"]
    )
    svg = Path("page", first["file"]).read_text()
    assert svg.startswith("<?xml") and svg.count("<use") > 28
