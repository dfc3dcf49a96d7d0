"""Answers as LaMP's own evaluator reads them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from harness.errors import UsageError
from harness.files import replace_file
from harness.task import Sample


def export_lamp(task_name: str, samples: Sequence[Sample], path: Path) -> None:
    """Writes the answers as LaMP's own evaluator reads them: `{"task": "LaMP_4", "golds": [{"id", "output"}]}`.

    Raises UsageError where a sample has no answer: the evaluator wants every id, and a failure is no answer.
    """
    failed = [sample.id for sample in samples if sample.response is None]
    if failed:
        raise UsageError(f"{len(failed)} of {len(samples)} samples have no answer, first {failed[0]!r}; run them again")
    answers = [{"id": sample.id, "output": sample.response} for sample in samples]
    text = json.dumps({"task": official_name(task_name), "golds": answers}, ensure_ascii=False, indent=1)
    # a model may have answered half a surrogate pair, which UTF-8 cannot hold
    replace_file(Path(path), f"{text}\n".encode(errors="replace"))


def official_name(task: str) -> str:
    return f"LaMP_{task[4]}"
