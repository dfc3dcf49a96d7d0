"""LaMP's files: reading them, and answers as its own evaluator reads them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness.errors import DataMissing, UsageError
from harness.files import replace_file
from harness.files.json_files import parse, read_bytes
from harness.task import Sample
from harness.tasks import lamp_prompts


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


def content_of(file: Path) -> bytes:
    try:
        return read_bytes(file)
    except OSError as error:
        raise DataMissing(f"{file} cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise DataMissing(f"{file} cannot be read: {error}") from None


def parsed_json(file: Path, content: bytes) -> Any:
    try:
        return parse(content)
    except ValueError as error:
        raise DataMissing(f"{file} is not valid JSON ({error}); it may be truncated, fetch it again") from None


def golds_of(task: str, file: Path, content: Any) -> dict[str, str]:
    if not isinstance(content, dict) or not isinstance(content.get("golds"), list):
        raise DataMissing(f"{file}: field 'golds' is missing; expected {{'task': ..., 'golds': [...]}}")
    named = str(content.get("task", official_name(task))).replace("-", "_")
    if not named.startswith(official_name(task)):
        raise DataMissing(f"{file}: field 'task' is {named!r}, expected {official_name(task)!r} for {task}")
    labels = lamp_prompts.LABELS.get(task)
    golds: dict[str, str] = {}
    for index, gold in enumerate(content["golds"]):
        output = gold.get("output") if isinstance(gold, dict) else None
        text = isinstance(output, str) or (isinstance(output, int) and not isinstance(output, bool))
        if not isinstance(gold, dict) or not lamp_prompts.is_name(gold.get("id")) or not text:
            raise DataMissing(f"{file}: record {index} should have fields 'id' and 'output', found {str(gold)[:60]}")
        output = str(gold["output"])
        if labels and output.strip() not in labels:
            raise DataMissing(
                f"{file}: record {index} (id {gold['id']!r}): field 'output' is {output!r}, not a label of {task}"
            )
        if golds.setdefault(str(gold["id"]), output) != output:
            raise DataMissing(f"{file}: record {index}: field 'id' is {gold['id']!r}, taken by an earlier, other gold")
    return golds


def sha256_of(*contents: bytes) -> str:
    return hashlib.sha256(b"\0".join(contents)).hexdigest()
