"""A real vLLM server against the engine, both in float32: `pytest tests/servers_vllm.py -s`, which prints what it measures.

It takes some minutes and a server, so no other run of the tests collects it. To start one, on a CPU too:
    vllm serve SmolLM2-135M-Instruct --dtype float32 --max-model-len 2048 --enforce-eager
where the folder holds the weights that the GGUF file in the shared data has (the harness writes it under $HARNESS_CACHE/gguf).
    VLLM_URL        http://127.0.0.1:8000/v1 unless it is set
    VLLM_MODEL      what the server calls the model, SmolLM2-135M-Instruct unless it is set
    HARNESS_SHARED  the shared data: lamp/, mmlu/, smollm2/
"""

from __future__ import annotations

import os
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import harness
from harness.cli.python import Run
from harness.records.store import read_samples
from harness.task import Sample

URL = os.environ.get("VLLM_URL", "http://127.0.0.1:8000/v1")
MODEL = f"openai/{os.environ.get('VLLM_MODEL', 'SmolLM2-135M-Instruct')}"
SHARED = Path(os.environ.get("HARNESS_SHARED", "../shared/data")).absolute()
SMOLLM2 = SHARED / "smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
QUESTIONS = {"task": "mmlu", "task_set": {"per_subject": 2}}


Both = Callable[..., tuple[Run, Run]]


@pytest.fixture(scope="module", autouse=True)
def _there() -> None:
    for path in (SMOLLM2, SHARED / "lamp", SHARED / "mmlu"):
        if not path.exists():
            pytest.skip(f"no {path} (set HARNESS_SHARED)")
    try:
        urllib.request.urlopen(f"{URL}/models", timeout=10).close()
    except OSError as error:
        pytest.skip(f"no vLLM server at {URL} ({error}); the head of {Path(__file__).name} says how to start one")


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Both:
    """A run on the server and the same on this machine."""
    folder = tmp_path_factory.mktemp("vllm")

    def run(**what: Any) -> tuple[Run, Run]:
        served = harness.evaluate(model=MODEL, model_base_url=URL, output_path=folder / "served", **what)
        here = harness.evaluate(
            model="smollm2-135m", model_path=SMOLLM2, dtype="float32", output_path=folder / "here", **what
        )
        return served, here

    return run


def _by_id(run: Run) -> dict[str, Sample]:
    return {sample.id: sample for sample in read_samples(run.folder)}


@pytest.mark.parametrize("method", ["plain", "cad"])
def test_letters_have_the_log_probabilities_of_the_engine(method: str, both: Both) -> None:
    """Of `cad` their differences: over a server they are known up to a number that the letters share."""
    served, here = both(method=method, data=str(SHARED / "mmlu"), **QUESTIONS)
    theirs, ours = _by_id(served), _by_id(here)
    worst = 0.0
    for name in ours:
        pair = [theirs[name].extra["logprobs"], ours[name].extra["logprobs"]]
        if method == "cad":
            pair = [[x - numbers[0] for x in numbers] for numbers in pair]
        worst = max(worst, *(abs(x - y) for x, y in zip(*pair, strict=True)))
    print(f"\n{method}: {len(ours)} questions, largest difference {worst:.1e} nats")
    assert len(ours) >= 100 and worst < 1e-3
    assert all(theirs[name].response == ours[name].response for name in ours)


def test_greedy_answers_are_those_of_the_engine(both: Both) -> None:
    """Where two tokens are equally likely to the last bits, rounding decides; nearly all answers agree word for word."""
    served, here = both(method="plain", task="lamp7", data=str(SHARED / "lamp"), users=60)
    theirs, ours = _by_id(served), _by_id(here)
    same = sum(theirs[name].response == ours[name].response for name in ours) / len(ours)
    print(f"\nlamp7: {same:.1%} of {len(ours)} answers are equal word for word")
    assert all(theirs[name].prompt_tokens == ours[name].prompt_tokens for name in ours)
    assert same >= 0.9
