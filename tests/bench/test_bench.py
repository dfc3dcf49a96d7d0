"""The benchmarks run: on a toy model every script writes its JSON, and bench/gpu.sh asks for all of them."""

from __future__ import annotations

import json
import os
import runpy
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# PEFT asks transformers for an attribute by its old name
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
BENCH = Path(__file__).resolve().parents[2] / "bench"
SMALL = (
    '--device cpu --sizes toy --tokens "16 24" --rows "1 2" --new 3 --samples 2 --loop_heads 2 --rounds 1 '
    "--trained toy --users 2"
)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], dict[str, Any]]:
    """Runs a script in this process: `bench("decode.py --size toy")` returns what it writes."""
    monkeypatch.syspath_prepend(str(BENCH))

    def call(line: str) -> dict[str, Any]:
        script, *arguments = shlex.split(line)
        if "--output" not in arguments:
            arguments += ["--output", str(tmp_path / "out" / "result.json")]
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        runpy.run_path(str(BENCH / script), run_name="__main__")
        return json.loads(Path(arguments[arguments.index("--output") + 1]).read_text())

    return call


def gpu_sh(folder: Path, arguments: str, python: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """bench/gpu.sh with `python` (a shell script) in python's place."""
    stand_in = folder / "bin" / "python"
    stand_in.parent.mkdir(exist_ok=True)
    stand_in.write_text(f"#!/bin/sh\n{python}\n")
    stand_in.chmod(0o755)
    path = f"{stand_in.parent}:{os.environ['PATH']}"
    command = ["bash", str(BENCH / "gpu.sh"), *shlex.split(arguments)]
    return subprocess.run(
        command, cwd=folder, env={**os.environ, "PATH": path, **environment}, capture_output=True, text=True
    )


def test_gpu_sh_asks_for_every_measurement_and_every_script_understands_it(bench: Callable, tmp_path: Path) -> None:
    done = gpu_sh(tmp_path, f"{SMALL} --output out", f'echo "$@" >> {tmp_path}/asked')
    assert done.returncode == 0, done.stderr
    asked = (tmp_path / "asked").read_text().splitlines()
    scripts = ["decode", "decode", "pcs", "decode", "decode", "batching", "pcs", "batching", "train"]
    assert [line.split()[0] for line in asked] == [f"bench/{script}.py" for script in scripts]
    decode, batching, pcs, train = (bench(asked[i].removeprefix("bench/")) for i in (3, 5, 6, 8))
    assert decode["settings"]["rows"] == 2 and decode["plain_tokens_equal_generate"]
    assert decode["results"]["dps"]["of_plain"] > 0
    assert batching["results"]["batched"]["same_answers_as_the_loop"] == 2
    assert pcs["results"]["loop"]["timed"]["heads"] == 2 and pcs["results"]["loop"]["extrapolated"]
    assert pcs["results"]["loop"]["max_difference_nats"] < 1e-4
    assert train["results"]["perfit"]["largest_difference"] < 1e-4 and train["results"]["lora"]["seconds_a_user"] > 0
    assert not list(tmp_path.rglob("*.tmp"))
    (tmp_path / "asked").unlink()
    for name in ("decode-toy-16-2", "batching-toy-16", "pcs-toy-16", "train-toy"):  # what was just written
        assert (tmp_path / "out" / f"{name}.json").is_file()
    again = gpu_sh(tmp_path, f"{SMALL} --output out", f'echo "$@" >> {tmp_path}/asked')
    assert again.stdout.count("there already") == 4
    assert len((tmp_path / "asked").read_text().splitlines()) == 5


def test_gpu_sh_goes_on_after_a_failure_and_says_how_many_there_were(tmp_path: Path) -> None:
    fails = f'echo "$@" >> {tmp_path}/asked; case "$*" in *pcs.py*) exit 1;; esac'
    done = gpu_sh(tmp_path, f"{SMALL} --output out", fails)
    assert done.returncode == 1
    assert "2 measurements failed" in done.stderr
    assert len((tmp_path / "asked").read_text().splitlines()) == 9


def test_gpu_sh_stops_at_its_time_budget_and_names_what_it_did_not_measure(tmp_path: Path) -> None:
    done = gpu_sh(
        tmp_path, f"{SMALL} --output out --minutes 1", "sleep 30", SECONDS="58"
    )  # 2 of its 60 seconds are left
    assert done.returncode == 3
    assert done.stdout.count("bench/decode.py") == 1
    assert "not measured within 1 minutes: decode-toy-16-1 decode-toy-24-1 pcs-toy-24" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        ("--minutes soon", 2, "give a whole number"),
        ("--sizes", 2, "--sizes needs a value"),
        ("--szies toy", 2, "unknown option --szies"),
        ("", 4, "torch sees no CUDA device"),
        ("--help", 0, "bench/gpu.sh [--device cuda]"),
    ],
)
def test_a_mistake_with_gpu_sh_is_one_line(tmp_path: Path, arguments: str, code: int, says: str) -> None:
    done = gpu_sh(tmp_path, arguments, "")  # asked for the GPU's name it prints nothing, as without a GPU
    assert done.returncode == code
    assert says in done.stdout + done.stderr
    assert len(done.stderr.splitlines()) <= 1


def test_the_cost_of_clusters_and_the_recall_of_screening_are_measured(bench: Callable) -> None:
    clusters = bench("clusters.py --device cpu --task lamp3 --samples 12 --clusters 2 --rounds 1")["results"]
    assert clusters["train_users"] == 600 and sum(clusters["samples_of_cluster"]) == 12
    (zero, uniform) = bench("screening.py --device cpu --task lamp3 --samples 8")["results"]
    assert (zero["operator"], uniform["operator"]) == ("zero", "uniform")
    assert zero["recall"].keys() == zero["recall_by_chance"].keys() == {"4", "8", "12", "16"}


def test_patching_in_rows_gives_what_a_loop_over_hooks_gives(bench: Callable) -> None:
    found = bench("patching.py --size toy --tokens 16 --loop_runs 40")
    assert found["results"]["max_difference_nats"] < 1e-5
    assert found["results"]["batched"]["forward_passes"] < found["settings"]["patched_runs"] / 3


def test_a_record_at_batch_one_writes_little_more_than_itself(bench: Callable) -> None:
    found = bench("record_bytes.py --model tiny --samples 20 --of 20 --rewriting 10")["results"]
    assert found["log"]["extrapolated"] is False
    assert found["log"]["times_the_record"] < 4 < found["rewriting"]["times_the_record"]


def test_what_a_grid_in_shared_batches_saves_is_measured(bench: Callable) -> None:
    found = bench("grid_batches.py --size toy --limit 4 --batch_size 2 --new 2 --k 1 --rounds 1")["results"]
    assert found["responses"] == 20  # in float32 single ones may differ
    assert found["flops_saved"] > 0.2


def test_the_comparison_in_one_pass_gives_what_two_passes_and_a_generation_gave(bench: Callable) -> None:
    found = bench("effect.py --size toy --samples 4 --new 3 --k 1 --rounds 1 --methods rag cad")["results"]
    for method in ("rag", "cad"):
        for share in ("changed_tokens", "identical"):
            assert found[method][share]["before"] == found[method][share]["now"]
        assert found[method]["kl_apart"] < 1e-3


def test_what_entering_a_running_batch_would_gain_is_counted_from_answers(bench: Callable, tmp_path: Path) -> None:
    given = [{"batch": n // 4, "new_tokens": new, "prompt_tokens": 10} for n, new in enumerate((5, 2, 2, 1, 3))]
    (tmp_path / "samples.jsonl").write_text("".join(f"{json.dumps(one)}\n" for one in given))
    (found,) = bench(f"waiting.py {tmp_path}")["results"]
    ways = {way: (found[way]["steps"], found[way]["rows"]) for way in ("stay", "half", "leave", "enter")}
    assert ways == {"stay": (6, 18), "half": (6, 9), "leave": (6, 8), "enter": (4, 8)}
    assert (found["enter"]["by_steps"], found["enter"]["by_tokens"]) == (0.667, 0.983)
