"""A finished record is shown without its model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness.engine.loading import load_model
from harness.engine.weights.identity import Identity, identity_of
from harness.plugins.registry import model_row

ROOT = Path(__file__).resolve().parents[2]
LINE = "--task lamp3 --limit 2 --max_new_tokens 2 --device cpu"


def test_a_command_whose_records_are_finished_shows_them_and_loads_nothing(
    harness: Callable[[str], Any], toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = f"run --method plain --method rag {LINE} --model {toy}"
    first = harness(line)
    assert first.code == 0, first.err

    def loaded(*_: object, **__: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("harness.engine.loading.load_model", loaded)
    again = harness(line)
    assert (again.code, again.out) == (0, first.out)
    assert again.err.count("already there: ") == 2 and "loading" not in again.err
    program = (
        f"import sys; from harness.cli.app import main; sys.argv = ['harness', *{line.split()!r}]\n"
        "try: main()\n"
        "finally: print([n for n in ('torch', 'transformers', 'nltk', 'sklearn', 'scipy') if n in sys.modules])"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.stdout == f"{first.out}[]\n", done.stderr


def test_of_several_records_only_those_that_are_not_finished_run(harness: Callable[[str], Any], toy: Path) -> None:
    assert harness(f"run --method rag {LINE} --model {toy}").code == 0
    done = harness(f"run --method plain --method rag --method cad {LINE} --model {toy}")
    assert done.code == 0, done.err
    assert done.err.count("already there: ") == 1 and done.out.count("on lamp3 with toy") == 3
    content = json.loads(harness(f"run --method rag {LINE} --model {toy} --json").out)
    assert content["status"] == "complete"


def test_failed_samples_are_run_again_where_that_is_asked_for(harness: Callable[[str], Any], toy: Path) -> None:
    line = f"run --method plain {LINE} --model {toy}"
    assert harness(line).code == 0
    (file,) = Path("runs").glob("*/*/*/run.json")
    file.write_text(file.read_text().replace('"status": "complete"', '"status": "partial"'))
    shown = harness(line)
    assert shown.code == 3 and "--retry_failed tries them again" in shown.err and "loading" not in shown.err
    assert "loading" in harness(f"{line} --retry_failed").err


def test_what_a_model_is_called_without_loading_it_is_what_it_says_itself(toy: Path) -> None:
    for dtype in ("auto", "bfloat16"):
        row = model_row(str(toy))
        lm = load_model(row, dtype=dtype, device="cpu")  # type: ignore[arg-type]
        assert identity_of(row, dtype, "cpu") == Identity(lm.name, lm.source, lm.revision, lm.dtype)
        found = identity_of(row, dtype, "cpu")
        assert found is not None and found.heads == lm.heads


def test_tasks_without_meteor_load_neither_wordnet_nor_nltk(toy: Path, tmp_path: Path) -> None:
    program = (
        "import sys; from harness.cli.app import main\n"
        f"sys.argv = ['harness', 'run', *'--task lamp1 --task lamp2m --method plain --model {toy} --limit 2'.split()]\n"
        "try: main()\n"
        "finally: print([n for n in ('nltk', 'sklearn') if n in sys.modules])"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stdout.endswith("[]\n"), done.stdout + done.stderr
