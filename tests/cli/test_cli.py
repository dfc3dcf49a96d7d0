"""The command line: quick and torch-free where no model is needed; one clear line and the right exit code for a mistake."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness.records.store import RunFolder, find_runs, read_record, read_samples

ROOT = Path(__file__).resolve().parents[2]

TORCH_FREE = [
    "--help",
    "run --help",
    "score --help",
    "judge pairs --help",
    "list methods",
    "list tasks",
    "list models",
    "list retrievers",
    "list tables",
    "table",
    "leaderboard --path leaderboard.md",
]


@pytest.mark.parametrize("command", TORCH_FREE)
def test_looking_around_never_imports_torch(command: str, tmp_path: Path) -> None:
    heavy = ("torch", "transformers", "scipy", "sklearn", "nltk")
    code = f"""
import sys
from harness.cli.app import main
sys.argv = ["harness", *{command.split()!r}]
try:
    main()
except SystemExit as stop:
    assert not stop.code, stop.code
print([name for name in {heavy!r} if name in sys.modules], file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"
    assert done.stdout


# Mistakes on the command line. None of them needs a model, so none loads one.

USAGE = {
    "run --method dsp --task lamp4": "unknown method 'dsp'; did you mean 'dps'? 'harness list methods'",
    "run --method xyzzy --task lamp4": "unknown method 'xyzzy'; 'harness list methods'",
    "run --method rag --task lamp44": "unknown task 'lamp44'; did you mean 'lamp4'? 'harness list tasks'",
    "run --method rag --task LaMP-2": "'lamp2' is two tasks: lamp2m (movie tags) and lamp2n (news categories)",
    "run --method rag --task lamp4 --fit_task lamb1": "unknown task 'lamb1'; did you mean 'lamp1'?",
    "run --method rag --task lamp4 --model https://x/y": "https://x/y is a URL; give an alias",
    "run --method rag --task lamp4 --data https://x/y": "--data https://x/y is a URL",
    "run --method rag --task lamp4 --data /etc/hostname": "--data /etc/hostname is a file; give the folder that holds it: /etc",
    "run --method rag --task lamp4 --dtype float33 --data nowhere": "unknown dtype 'float33'; did you mean 'float32'?",
    "run --method rag --task lamp4 --device tpu --data nowhere": "unknown device 'tpu'; allowed: auto, cpu, cuda, cuda:N",
    "run --method rag --task lamp4 --output_path /etc/hostname/runs": "--output_path /etc/hostname/runs: /etc/hostname is a file",
    "sweep --method rag --task lamp4 --set k=1..2 --model README --data nowhere": "unknown model 'README'",
    "fit --method dps --task lamp4 --model openai/x": "openai/x is behind a server, which only 'harness run' can ask",
    "sweep --method rag --task lamp4 --set k=1..2 --model openai/x": "openai/x is behind a server, which only 'harness run'",
    "fit --method dps --task lamp4 --dtype half": "unknown dtype 'half'",
    "show /etc --data /etc/hostname": "--data /etc/hostname is a file",
    "table dps-5 --data /etc/hostname": "--data /etc/hostname is a file",
    "report --data https://x/y": "--data https://x/y is a URL",
    "push runs": "runs is no data set's address; give hf://datasets/<user>/<name>",
    "push --to wandb --report": "--report is about hf://datasets/<user>/<name>; leave it out",
    "push hf://datasets/me/mine --project mine": "--project is about a tracker; leave it out",
    "leaderboard --all --output_path mine.md": "--all is of what is printed",
    "table --check --published_only": "--check holds measured numbers against published ones; leave --published_only out",
    "push": "give one place to push to: hf://datasets/<user>/<name>, or --to wandb or trackio",
    "run --method rag --task lamp4 --model tinny": "unknown model 'tinny'; did you mean 'tiny'?",
    "run --method dps --task lamp4 --set gama=1": "method 'dps' has no option 'gama'; did you mean 'gamma'?",
    "run --method dps --task lamp4 --set gamma": "'gamma' is not key=value",
    "run --method dps --task lamp4 --set gamma=much": "gamma=much is not valid; allowed: float",
    "run --method dps --task lamp4 --set gamma=entropi": "did you mean 'entropy'?",
    "run --method dps --task lamp4 --set gamma=nan": "gamma=nan is not valid",
    "run --method dps --task lamp4 --set gamma=-1": "gamma -1.0 is negative",
    "run --method rag --task lamp4 --set k=few": "method 'rag': k=few is not valid; allowed: int",
    "run --method rag --task lamp4 --set k=-1": "k=-1 history items were asked for; allowed: k >= 0",
    "run --method rag --task lamp4 --set retriever=bm52": "retriever=bm52 is not valid; did you mean 'bm25'?",
    "run --method dps --task lamp4 --preset relased": "no preset 'relased'; did you mean 'released'?",
    "run --method rag --task lamp4 --preset released": "no preset 'released'; it has: none",
    "run --method rag --task lamp4 --task_set splitby=time": "no option 'splitby'; did you mean 'split_by'?",
    "run --method rag --task lamp4 --split dve": "no split 'dve'; did you mean 'dev'?",
    "run --method dps --task lamp4 --fit_split dev:2": "--fit_split dev:2 is not valid",
    "run --method dps --task lamp4 --fit_split dev": "is the evaluated split; give a share of it, as in dev:0.2",
    "run --method rag --task lamp4 --batch_size many": "--batch_size many is not valid; allowed: auto",
    "run --method rag --task lamp4 --batch_size 0": "--batch_size 0 is not valid; allowed: auto",
    "run --method rag --task lamp4 --export json": "unknown export 'json'; allowed: lamp",
    "run --method ./mine.py:Mine --task lamp4": "file './mine.py' does not exist",
    "run --method rag --task lamp4 --control wrong_usr": "unknown control 'wrong_usr'; did you mean 'wrong_user'?",
    "run --method rag --task lamp4 --limit 0": "'--limit'",
    "run --method rag --task lamp4 --temperature -1": "'--temperature'",
    "run --method rag --taks lamp4": "No such option: --taks",
    "run --task lamp4": "Missing option '--method'; see 'harness run --help'",
    "rum --method rag": "Did you mean 'run'?",
    "fit --method rag --task lamp4 --seed one": "'--seed'",
    "list metods": "unknown list 'metods'; did you mean 'methods'?",
    "table dps-11": "unknown table 'dps-11'; did you mean",
    "table --format mdd": "unknown format 'mdd'; did you mean 'md'?",
    "data get lamp44": "unknown task 'lamp44'; did you mean 'lamp4'?",
    "data get lamp4 --split usr": "unknown split 'usr'; did you mean 'user'?",
}


@pytest.mark.parametrize("command", USAGE)
def test_a_usage_mistake_is_one_line_and_exit_2(harness: Callable, command: str) -> None:
    done = harness(command)
    assert done.code == 2
    assert USAGE[command] in done.error()
    assert done.out == ""


@pytest.mark.parametrize("command", ["", "data"])
def test_no_command_prints_help_and_is_exit_2(harness: Callable, command: str) -> None:
    done = harness(command)
    assert done.code == 2
    assert done.err.startswith("Usage: harness")


def test_both_spellings_of_an_option_and_of_a_task_are_one(harness: Callable, toy: Path) -> None:
    harness(f"run --method plain --task LaMP_4 --model {toy} --limit 2 --max_new_tokens 2 --output_path runs")
    done = harness(f"run --method plain --task lamp-4 --model {toy} --limit 2 --max-new-tokens 2 --output-path runs")
    assert "already there: runs/toy/lamp4/plain-" in done.err


# Data and models that are not as they should be


def write_lamp(folder: Path, questions: Any, golds: Any, split: str = "dev", task: str = "LaMP_4") -> Path:
    """The official two files below `folder`, as text where they are given as text; returns `folder`."""
    place = folder / task / split
    place.mkdir(parents=True, exist_ok=True)
    outputs = golds if isinstance(golds, str) else json.dumps({"task": task, "golds": golds})
    (place / f"{split}_questions.json").write_text(questions if isinstance(questions, str) else json.dumps(questions))
    (place / f"{split}_outputs.json").write_text(outputs)
    return folder


def question(id: str, text: str = "a quiet day", profile: Any = ()) -> dict[str, Any]:
    text = f"Generate a headline for the following article: {text}"
    return {"id": id, "input": text, "profile": list(profile)}


def item(id: str, words: str = "rain again") -> dict[str, str]:
    return {"id": id, "text": f"{words} in the valley", "title": f"Rain {id}"}


GOLDS = [{"id": "1", "output": "Quiet"}, {"id": "2", "output": "Loud"}]

BROKEN = {
    "cut off JSON": ('[{"id": "1", "inp', GOLDS, ["dev_questions.json is not valid JSON", "fetch it again"]),
    "no profile": ([{"id": "1", "input": question("1")["input"]}], GOLDS, ["questions.json: record 0 (id '1')", "profile"]),
    "no gold": ([question("1"), question("3")], GOLDS, ["questions.json: record 1 (id '3')", "dev_outputs.json", "no gold"]),
    "gold without output": ([question("1")], [{"id": "1"}], ["dev_outputs.json: record 0", "'output'"]),
    "cut off golds": ([question("1")], '{"task": "LaMP_4", "golds": [{"id"', ["dev_outputs.json is not valid JSON"]),
    "an item without its title": (
        [question("1", profile=[{"id": "a", "text": "x"}])], GOLDS, ["record 0 (id '1')", "title"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_broken_data_is_exit_4_and_names_file_record_and_field(harness: Callable, tmp_path: Path, what: str) -> None:
    questions, golds, words = BROKEN[what]
    done = harness(f"run --method rag --task lamp4 --data {write_lamp(tmp_path / 'data', questions, golds)}")
    assert done.code == 4
    line = done.error()
    assert all(word in line for word in words), line
    assert "loading" not in done.err  # no one waits for a model to hear this


def test_a_folder_without_data_is_exit_4_and_says_how_to_fetch_it(harness: Callable, tmp_path: Path) -> None:
    done = harness(f"run --method rag --task lamp4 --data {tmp_path}")
    assert done.code == 4
    assert "harness data get lamp4" in done.error()


def test_a_method_that_fits_without_a_train_split_is_exit_4_and_says_what_to_give(
    harness: Callable, tmp_path: Path
) -> None:
    data = write_lamp(tmp_path / "data", [question("1"), question("2")], GOLDS)
    done = harness(f"run --method dps --task lamp4 --data {data}")
    assert done.code == 4
    assert "--fit_split dev:0.2" in done.error()


def test_a_model_that_is_not_here_is_exit_4_and_says_which_files_go_where(
    harness: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    done = harness("run --method rag --task lamp4 --model llama3.2-1b --limit 2")
    assert done.code == 4
    line = done.error()
    for word in ("meta-llama/Llama-3.2-1B-Instruct", "config.json", "tokenizer", "safetensors", "--model_path"):
        assert word in line


@pytest.mark.parametrize("option", ["--model ./nowhere", "--model tiny --model_path ./nowhere"])
def test_a_model_folder_that_is_not_there_is_exit_4(harness: Callable, option: str) -> None:
    done = harness(f"run --method rag --task lamp4 {option}")
    assert done.code == 4
    assert "nowhere" in done.error() and "config.json" in done.error()


@pytest.mark.parametrize("kind", ["opt", "frobnicate"])
def test_a_family_without_a_row_is_exit_2_and_names_those_that_have_one(
    harness: Callable, tmp_path: Path, kind: str
) -> None:
    (tmp_path / "strange").mkdir()
    (tmp_path / "strange" / "config.json").write_text(json.dumps({"model_type": kind}))
    done = harness("run --method rag --task lamp4 --model ./strange")
    assert done.code == 2
    assert f"architecture '{kind}'" in done.error()
    assert "llama" in done.error() and "harness/sites.py" in done.error()


@pytest.mark.parametrize("option", ["--device gpu", "--dtype fp32"])
def test_an_unknown_device_or_dtype_is_exit_2(harness: Callable, toy: Path, option: str) -> None:
    done = harness(f"run --method rag --task lamp4 --model {toy} {option}")
    assert done.code == 2
    assert "allowed: auto" in done.error()


# Samples that are not as they should be


def test_an_empty_profile_is_answered_without_history(harness: Callable, tmp_path: Path, toy: Path) -> None:
    data = write_lamp(tmp_path / "data", [question("1"), question("2", profile=[item("a")])], GOLDS)
    for method in ("rag", "cad"):
        done = harness(f"run --method {method} --task lamp4 --data {data} --model {toy} --max_new_tokens 4")
        assert done.code == 0
    first, second = sorted(read_samples(find_runs(Path("runs"), method="rag")[0].folder), key=lambda s: s.id)
    assert (first.history_items, first.error) == (0, None)
    assert second.history_items == 1


def test_history_that_does_not_fit_is_dropped_item_by_item_and_counted(
    harness: Callable, tmp_path: Path, toy: Path
) -> None:
    profile = [item(str(n), words="rain again and again and again, more than anyone can remember") for n in range(9)]
    data = write_lamp(tmp_path / "data", [question("1", profile=profile)], GOLDS)
    done = harness(f"run --method rag --set k=9 --task lamp4 --data {data} --model {toy} --max_new_tokens 4")
    assert done.code == 0
    run = find_runs(Path("runs"))[0]
    (sample,) = read_samples(run.folder)
    assert 0 < sample.history_items < 9
    assert sample.history_items + sample.dropped_items == 9
    assert sample.prompt_tokens <= 512 - 4
    assert (run.health.dropped_items, run.health.truncated) == (sample.dropped_items, 1)
    assert f"{sample.dropped_items} history items did not fit" in done.err


def test_a_query_longer_than_the_context_is_exit_3_counted_named_and_not_scored(
    harness: Callable, tmp_path: Path, toy: Path
) -> None:
    data = write_lamp(tmp_path / "data", [question("1"), question("2", text="very long " * 60)], GOLDS)
    done = harness(f"run --method plain --task lamp4 --data {data} --model {toy} --max_new_tokens 4")
    assert done.code == 3
    run = find_runs(Path("runs"))[0]
    assert (run.status, run.health.errors, run.metrics["rouge1"].n) == ("partial", 1, 1)
    failed = next(sample for sample in read_samples(run.folder) if sample.error)
    assert failed.id == "2" and "never cut" in failed.error and failed.metrics == {}
    assert "1 samples failed" in done.err
    shown = harness(f"show {run.folder}")
    assert "2: the query alone has" in shown.out
    again = harness(f"run --method plain --task lamp4 --data {data} --model {toy} --max_new_tokens 4")
    assert (again.code, "--retry_failed" in again.err) == (3, True)


# The output folder


def test_an_output_folder_in_a_file_is_a_mistake_in_the_command(harness: Callable, tmp_path: Path, toy: Path) -> None:
    (tmp_path / "file").write_text("")
    done = harness(f"run --method plain --task lamp4 --model {toy} --limit 2 --output_path file/results")
    assert done.code == 2
    assert "--output_path file/results: file is a file; give a folder" in done.error()


def test_a_full_disk_is_exit_1_and_loses_nothing(harness: Callable, monkeypatch: pytest.MonkeyPatch, toy: Path) -> None:
    command = f"run --method plain --task lamp4 --model {toy} --limit 6 --batch_size 2 --max_new_tokens 4"
    assert harness(f"{command} --output_path whole").code == 0
    write, samples_written = os.write, 0

    def full(file: int, content: bytes) -> int:
        """The disk takes half of the second batch's samples and then nothing."""
        nonlocal samples_written
        samples_written += content.startswith(b'{"id"')
        if samples_written == 2:
            samples_written += 1
            return write(file, content[: len(content) // 2])
        if samples_written > 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(file, content)

    monkeypatch.setattr(os, "write", full)
    done = harness(command)
    assert done.code == 1
    assert "cannot write" in done.error() and "No space left on device; nothing saved before is lost" in done.error()
    monkeypatch.setattr(os, "write", write)
    (folder,) = Path("runs").glob("*/*/*")
    assert len(read_samples(folder)) == 2
    assert harness(command).code == 0
    (whole,) = Path("whole").glob("*/*/*")
    assert read_record(folder).metrics == read_record(whole).metrics


@pytest.mark.parametrize("command", ["leaderboard --path file/leaderboard.md", "data mini file/mini"])
def test_a_file_that_cannot_be_written_is_exit_1(harness: Callable, tmp_path: Path, command: str) -> None:
    (tmp_path / "file").write_text("")
    done = harness(command)
    assert done.code == 1
    assert "file/" in done.error() and "Not a directory" in done.error()


def test_a_full_disk_under_stdout_is_exit_1_and_one_line() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "harness", "list", "tasks"], stdout=full, stderr=subprocess.PIPE, text=True, cwd=ROOT
        )
    assert done.returncode == 1
    assert done.stderr == "harness: output: No space left on device\n"


def test_a_reader_that_went_away_is_no_traceback() -> None:
    command = f"{sys.executable} -m harness list methods | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert done.returncode in (0, 1)
    assert done.stderr == ""


def test_a_second_run_on_one_record_says_so_and_is_exit_2(harness: Callable, toy: Path) -> None:
    command = f"run --method plain --task lamp4 --model {toy} --limit 2 --max_new_tokens 4"
    harness(command)
    run = find_runs(Path("runs"))[0]
    with RunFolder.open(Path("runs"), run.config):
        done = harness(command)
    assert done.code == 2
    assert f"{run.folder} is being written by another run (pid {os.getpid()} on" in done.error()


def test_ctrl_c_is_exit_130_with_the_state_saved_and_the_same_command_goes_on(harness: Callable, toy: Path) -> None:
    line = f"run --method plain --task lamp3 --model {toy} --limit 10 --batch_size 1 --max_new_tokens 24"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-m", "harness", *line.split()], stderr=subprocess.PIPE, text=True, env=environment
    )
    while process.poll() is None and not any(p.stat().st_size for p in Path("runs").glob("*/*/*/samples.jsonl")):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.splitlines()[-1].startswith("harness: interrupted; the state is saved")
    (folder,) = Path("runs").glob("*/*/*")
    before = read_samples(folder)
    assert read_record(folder).status == "interrupted" and 0 < len(before) < 10
    assert harness(line).code == 0
    assert read_samples(folder)[: len(before)] == before


# What a method did


IDLE = """
from dataclasses import dataclass
from harness.method import Method
from harness.mix import Contrast
from harness.plan import Plan, Stream

@dataclass(frozen=True)
class Idle(Method):
    \"\"\"Contrasts a prompt with itself.\"\"\"
    weight: float = 1.0

    def plan(self, example, shared, personal):
        stream = Stream(example.prompt())
        return Plan((stream, stream), Contrast(self.weight))
"""


def test_a_method_that_changed_nothing_is_exit_1_unless_that_is_allowed(
    harness: Callable, tmp_path: Path, toy: Path
) -> None:
    (tmp_path / "idle.py").write_text(IDLE)
    command = f"run --method ./idle.py:Idle --task lamp4 --model {toy} --limit 3 --max_new_tokens 4"
    done = harness(command)
    assert done.code == 1
    assert "changed nothing" in done.err
    assert find_runs(Path("runs"))[0].health.noop
    assert harness(command).code == 1  # also when the record is there already
    assert harness(f"{command} --allow_noop").code == 0


# Running, as a newcomer would

QUICK = "--limit 3 --max_new_tokens 4"


def test_stdout_is_data_and_stderr_the_rest(harness: Callable, toy: Path) -> None:
    done = harness(f"run --method plain --method rag --task lamp4 --task lamp3 --model {toy} {QUICK} --json")
    assert done.code == 0
    records = [json.loads(line) for line in done.out.splitlines()]
    configs = [record["config"] for record in records]
    assert [(config["method"]["name"], config["task"]["name"]) for config in configs] == [
        ("plain", "lamp4"), ("rag", "lamp4"), ("plain", "lamp3"), ("rag", "lamp3"),
    ]  # fmt: skip
    assert all((Path(record["folder"]) / "run.json").is_file() for record in records)
    assert done.err.count("loading toy") == 1
    assert done.err.count("lamp-mini (synthetic") == 2


def test_a_cell_that_fails_does_not_stop_the_grid(harness: Callable, tmp_path: Path, toy: Path) -> None:
    data = write_lamp(tmp_path / "data", [question("1")], GOLDS)
    done = harness(f"run --method plain --method dps --task lamp3 --task lamp4 --data {data} --model {toy} {QUICK}")
    assert done.code == 4
    assert "harness: plain on lamp3: " in done.err and "harness: dps on lamp4: dps fits on a train split" in done.err
    assert [run.config.method.name for run in find_runs(Path("runs"))] == ["plain"]


def test_a_dry_run_shows_each_stream_as_the_model_reads_it_and_writes_nothing(harness: Callable, toy: Path) -> None:
    done = harness(f"run --method cad --task lamp4 --model {toy} --users 3 --dry_run")
    assert done.code == 0
    assert "cad on lamp4 with toy: 3 items" in done.out
    first, second = done.out.split("--- stream 1: ")
    assert "is the title for" in first and "is the title for" not in second
    for text in (first, second):
        assert "Generate a headline for the following article" in text
    assert "tokens, 0 history items (0 dropped)" in second
    assert "forward pass" in second and "MiB of weights" in second
    assert not Path("runs").exists()


def test_a_dry_run_of_a_method_that_fits_does_not_fit(harness: Callable, toy: Path) -> None:
    done = harness(f"run --method dps --task lamp3 --model {toy} --users 3 --dry_run")
    assert "a run first fits on train of lamp3, 600 items" in done.out
    assert "fitting reads 50 items of about " in done.out and "one a head" in done.out
    assert not Path("cache/artifacts").exists()


def test_a_method_in_a_file_is_checked_run_and_recorded_with_its_source(
    harness: Callable, tmp_path: Path, toy: Path
) -> None:
    mine = IDLE.replace("stream, stream", "stream, Stream(self.retrieval.prompt(example))").replace("Idle", "Mine")
    (tmp_path / "mine.py").write_text(mine)
    checked = harness("check ./mine.py")
    assert (checked.code, checked.out.count("ok  "), checked.out.count("--  not checked: zero strength")) == (0, 7, 1)
    command = f"run --method ./mine.py:Mine --task lamp4 --model {toy} {QUICK} --set weight=0.5"
    assert harness(command).code == 0
    (tmp_path / "mine.py").write_text(mine.replace("weight: float = 1.0", "weight: float = 2.0"))
    assert harness(command).code == 0
    runs = find_runs(Path("runs"))
    assert [run.config.method.name for run in runs] == ["mine", "mine"]
    assert len({run.config.method.options["source_sha256"] for run in runs}) == 2


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("import nothing_of_the_kind", "cannot be imported: ModuleNotFoundError"),
        ("x = 1", "defines no subclass of Method"),
        (
            IDLE + IDLE[IDLE.index("@") :].replace("Idle", "Other"),
            "defines Idle, Other; name one, as in ./mine.py:Idle",
        ),
    ],
)
def test_a_file_without_a_method_is_exit_2(harness: Callable, tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "mine.py").write_text(text)
    done = harness("run --method ./mine.py --task lamp4")
    assert done.code == 2
    assert words in done.error()


def test_a_mistake_in_someones_method_is_one_line_in_the_grid_and_the_others_go_on(
    harness: Callable, tmp_path: Path, toy: Path
) -> None:
    (tmp_path / "mine.py").write_text(IDLE.replace("stream = ", "stream = 1 / 0 #"))
    done = harness(f"run --method ./mine.py --method plain --task lamp4 --model {toy} {QUICK}")
    assert done.code == 1
    assert re.search(r"mine\.py, line \d+, in plan: ZeroDivisionError", done.err) and "Traceback" not in done.err
    assert {run.config.method.name: run.status for run in find_runs(Path("runs"))} == {
        "idle": "failed", "plain": "complete",
    }  # fmt: skip


def test_an_option_or_preset_of_one_of_several_methods_is_its_own(harness: Callable) -> None:
    from harness.run.cell import Settings, grid

    plain, dps = grid(["plain", "dps"], ["lamp4"], Settings(), ["k=3", "dps.heads=2"], presets=["dps.released"])
    assert (plain.method.retrieval.k, dps.method.retrieval.k) == (3, 3)
    assert dps.method.options()["heads"] == 2 and dps.method.options()["gamma"] == "entropy"
    assert (plain.preset, dps.preset) == (None, "released")
    done = harness("run --method plain --method dps --task lamp4 --set heads=2")
    assert done.code == 2
    assert "for dps alone give --set dps.heads=2" in done.error()


def test_local_weights_keep_the_row_of_their_alias(harness: Callable, toy: Path) -> None:
    assert harness(f"run --method plain --task lamp4 --model llama3-8b --model_path {toy} {QUICK}").code == 0
    (run,) = find_runs(Path("runs"))
    assert (run.config.model.name, run.config.model.id) == ("llama3-8b", str(toy))
    assert run.config.model.revision.startswith("sha256:")


def test_the_embedded_model_is_recorded_without_the_path_of_this_machine(harness: Callable) -> None:
    assert harness("run --method plain --task lamp4 --limit 1 --max_new_tokens 2").code == 0
    assert find_runs(Path("runs"))[0].config.model.id == "harness/tiny/model"


def test_export_lamp_writes_what_the_official_evaluator_reads(harness: Callable, toy: Path) -> None:
    done = harness(f"run --method plain --task lamp4 --model {toy} {QUICK} --export lamp")
    (run,) = find_runs(Path("runs"))
    exported = json.loads((run.folder / "predictions.json").read_text())
    assert exported["task"] == "LaMP_4"
    answers = {sample.id: sample.response for sample in read_samples(run.folder)}
    assert {gold["id"]: gold["output"] for gold in exported["golds"]} == answers
    assert "predictions.json" in done.err


def test_show_puts_runs_of_a_task_side_by_side(harness: Callable, toy: Path) -> None:
    harness(f"run --method plain --method rag --task lamp4 --task lamp3 --model {toy} {QUICK}")
    done = harness("show runs/toy/lamp4/rag --beside runs/toy/lamp4/plain --samples 2")
    assert done.code == 0
    assert done.out.count("95 % interval") == 2
    assert done.out.count("expected") == 2
    for words in ("retriever=bm25, k=5", "tokens read", "operations", "rouge1"):
        assert words in done.out
    assert "lamp4, lamp3" in harness("show runs/toy/lamp4/rag --beside runs/toy/lamp3/rag").error()
    for several in ("'runs/toy/lamp4/*'", "runs/toy/lamp4"):
        assert harness(f"show {several} --samples 2").out.count("95 % interval") == 2
    assert "runs of different tasks have no sample in common: lamp3, lamp4" in harness("show runs").error()
    nowhere = harness("show nowhere")
    assert (nowhere.code, "nowhere holds no run.json" in nowhere.error()) == (4, True)


def test_fit_keeps_what_a_run_reuses(harness: Callable) -> None:
    fitted = harness("fit --method dps --task lamp3 --set samples=4")
    assert fitted.code == 0
    kept = json.loads(fitted.out)
    assert (Path(kept["folder"]) / "tensors.safetensors").is_file()
    done = harness("run --method dps --task lamp3 --set samples=4 --set gamma=1 --limit 2")
    assert f"reusing the fitted state {kept['key']}" in done.err
    assert find_runs(Path("runs"))[0].artifacts == {"fit": kept["key"]}
    nothing = harness("fit --method rag --task lamp3")
    assert (nothing.code, "has nothing to fit" in nothing.error()) == (2, True)


def test_a_leaderboard_that_is_not_up_to_date_is_exit_5(harness: Callable, toy: Path) -> None:
    harness(f"run --method plain --task lamp4 --model {toy} {QUICK} --output_path results")
    assert harness("leaderboard --output_path leaderboard.md").code == 0
    assert harness("leaderboard --check").code == 0
    harness(f"run --method rag --task lamp4 --model {toy} {QUICK} --output_path results")
    done = harness("leaderboard --check")
    assert done.code == 5
    assert (
        "leaderboard.md is not what results gives; 'harness leaderboard --output_path leaderboard.md' writes it"
        in done.error()
    )


def test_a_run_that_a_published_record_matches_says_whether_it_reproduces_it(harness: Callable, toy: Path) -> None:
    line = f"run --method plain --task lamp4 --model {toy} {QUICK}"
    harness(f"{line} --output_path results")
    (published,) = find_runs(Path("results"))
    value = published.metrics["rouge1"].value
    same = harness(line).err
    assert f"reproduces {published.folder}: rouge1 " in same and "(same)" in same
    assert published.folder
    with RunFolder.open(Path("results"), published.config) as folder:
        published.metrics["rouge1"].value = value + 0.25
        folder.write(published)
    differing = harness(line).err
    assert f"differs from {published.folder}: rouge1 " in differing and ", published " in differing


def test_a_number_that_cannot_be_computed_here_is_no_other_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """METEOR without WordNet."""
    from harness.publish.show import reproduced

    monkeypatch.chdir(Path(__file__).parents[2])
    run = next(run for run in find_runs(Path("results/tiny/lamp4")) if run.config.method.name == "plain")
    run.metrics = {name: metric.model_copy() for name, metric in run.metrics.items()}
    run.metrics["meteor"].value = None
    said = reproduced(Path("elsewhere"), run)
    assert (
        said.startswith("reproduces results/tiny/lamp4/plain-")
        and "(same); not compared: meteor -, published ." in said
    )
    for metric in run.metrics.values():
        metric.value = None
    assert reproduced(Path("elsewhere"), run).startswith("differs from")


def test_a_run_ends_with_what_to_look_at_next(harness: Callable, toy: Path) -> None:
    done = harness(f"run --method plain --method rag --task lamp4 --model {toy} {QUICK}")
    look, after = done.err.splitlines()[-2:]
    assert look.startswith("look at it: harness show runs/toy/lamp4/plain-")
    assert after.startswith("next: harness compare runs/toy/lamp4/plain-") and after.endswith("harness report --open")
    assert harness(look.removeprefix("look at it: harness ")).code == 0


def test_the_report_opens_in_a_browser(harness: Callable, toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", lambda url: opened.append(url) or True)
    harness(f"run --method plain --task lamp4 --model {toy} {QUICK}")
    (run,) = find_runs(Path("runs"))
    assert harness(f"report {run.folder} --open").out == "report/index.html\n"
    assert opened == [Path("report/index.html").resolve().as_uri()]
