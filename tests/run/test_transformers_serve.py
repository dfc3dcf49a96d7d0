"""A real server, `transformers serve` with the embedded model: its answers are the engine's, and what it cannot do is refused."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from harness.records.store import read_record, read_samples

TINY = Path(__file__).parents[2] / "harness/tiny/model"
PATIENCE = 120
"""Seconds for the server to start, on a machine that does much else."""


@pytest.fixture(scope="session")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where it serves the embedded model, under the name of its folder."""
    for package in ("fastapi", "uvicorn"):
        pytest.importorskip(package, reason="transformers serve needs transformers[serving]")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    code = "from transformers.cli.transformers import main; main()"
    log = tmp_path_factory.mktemp("serve") / "log"
    options = ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", "float32"]
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", code, "serve", str(TINY), *options],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=file,
            stderr=file,
        )
    try:
        until = time.monotonic() + PATIENCE
        while process.poll() is None and time.monotonic() < until and not _answers(port):
            time.sleep(0.2)
        if process.poll() is not None or time.monotonic() >= until:
            pytest.skip(f"transformers serve did not start: {log.read_text()[-300:]}")
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.kill()
        process.wait()


def _answers(port: int) -> bool:
    try:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
    except OSError:
        return False
    return True


def test_its_greedy_answers_are_those_of_the_engine(url: str, harness: Callable, tmp_path: Path) -> None:
    what = "run --method rag --task lamp4 --limit 8 --max_new_tokens 12"
    served = harness(f"{what} --model openai/{TINY} --model_base_url {url} --output_path served")
    here = harness(f"{what} --model tiny --output_path here")
    assert (served.code, here.code) == (0, 0), served.err + here.err
    (there,), (ours,) = ((tmp_path / name).glob("*/lamp4/*") for name in ("served", "here"))
    answers = {sample.id: sample.response for sample in read_samples(ours)}
    assert len(answers) == 8
    assert {sample.id: sample.response for sample in read_samples(there)} == answers
    serving = read_record(there).serving
    assert serving is not None and serving.requests == 8
    assert all("top_k" not in sent and sent["temperature"] == 0 for sent in serving.sent)  # it takes no top_k


def test_its_choices_are_refused_since_it_returns_no_log_probabilities_of_a_prompt(
    url: str, harness: Callable, tmp_path: Path
) -> None:
    (tmp_path / "mine.jsonl").write_text('{"user": "a", "input": "?", "target": "x", "choices": ["x", "y"]}\n')
    line = f"run --method plain --task users:./mine.jsonl --model openai/{TINY} --model_base_url {url} --model_set backoff=0"
    done = harness(line)
    assert done.code == 2 and "does not return the log-probabilities of a prompt" in done.error()
    assert not (tmp_path / "runs").exists()
