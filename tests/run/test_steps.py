"""A run: killed at any moment it ends like an unbroken one; fits are made once; the record says what was done."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from harness.data import Example, Labelled, User
from harness.engine.model import LanguageModel
from harness.errors import DataMissing, HarnessError, UsageError, UserFailed
from harness.fit.artifacts import ArtifactStore
from harness.fit.kit import ModelKit
from harness.fit.states import Shared, personal_states, shared_state
from harness.method import Fitted, Method
from harness.plan import Plan, Stream
from harness.records.store import RunFolder, find_runs, read_record, read_samples
from harness.run.cell import Cell, Settings, grid
from harness.run.console import Console
from harness.run.contract import random_lm
from harness.run.score import score
from harness.run.steps import run_cell
from harness.run.system import ModelSystem
from harness.statistics import metrics
from harness.task import Generation, Sample, Task
from harness.tasks.lamp import Lamp1
from harness.tasks.lamp_prompts import LABELS

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(tmp_path / "artifacts")


_TASKS: dict[str, Task] = {}
"""Made once: reading lamp-mini takes longer than answering a few items of it."""


def cells(output: Path, *, method: str = "rag", task: str = "lamp3", **settings: Any) -> Cell:
    """One item of history, three tokens to answer, in batches of two, where `settings` do not say otherwise."""
    defaults: dict[str, Any] = {"limit": 4, "batch_size": 2, "max_new_tokens": 3, "output_path": output}
    options = ["k=1"] if method == "rag" else []
    (cell,) = grid([method], [task], Settings(**{**defaults, **settings}), options)
    return replace(cell, task=_TASKS.setdefault(task, cell.task))


def outcome(folder: Path) -> dict[str, Any]:
    """All that a finished run leaves on disk, but for the order of samples, times and peak memory."""
    record = json.loads((folder / "run.json").read_text())
    for name in ("started", "finished", "git_sha", "dirty"):
        del record[name]
    for name in ("seconds", "effect_seconds", "fit_seconds", "setup_seconds_per_user", "peak_memory_bytes"):
        del record["cost"][name]
    for costs in record["batch_costs"].values():
        del costs["seconds"]
    record["samples"] = sorted((folder / "samples.jsonl").read_text().splitlines())
    return record


def test_log_probabilities_that_are_nan_end_a_run_with_one_line(tmp_path: Path) -> None:
    """A NaN is never compared, drawn from or counted as an answer, whether answers are written or scored."""
    lm = random_lm(dtype=torch.float32)
    lm.revision = "random"
    with torch.no_grad():
        lm.model.get_output_embeddings().weight[7] = torch.nan
    cell = cells(tmp_path, method="plain")
    with pytest.raises(HarnessError, match=r"^the log-probabilities are NaN: .*try --dtype float32") as stopped:
        run_cell(lm, cell)
    assert "\n" not in str(stopped.value) and stopped.value.exit_code == 1
    (folder,) = [path.parent for path in tmp_path.rglob("run.json")]
    assert read_record(folder).status == "failed" and not read_samples(folder)
    with pytest.raises(HarnessError, match=r"^the log-probabilities are NaN"):
        ModelSystem(lm, cell.method, Generation(3)).score([cell.items[0].example], [["1", "2"]])


# Killed and started again


class Killed(BaseException):
    """The process is gone."""


class Death:
    """Kills a run at its nth event: half-way through a write, before a file is replaced, or before a forward pass.

    Once dead nothing reaches the disk any more, whatever the code still tries. What threads of other tests do is no event.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
        self.at, self.events, self.dead = at, 0, False
        write, replace_file, hidden = os.write, os.replace, LanguageModel.hidden

        def dying_write(file: int, content: bytes) -> int:
            if self.strikes():
                write(file, content[: len(content) // 2])
                raise Killed
            return write(file, content)

        def dying_replace(source: Any, target: Any) -> None:
            if self.strikes():
                raise Killed
            replace_file(source, target)

        def dying_hidden(lm: LanguageModel, *args: Any, **kwargs: Any) -> torch.Tensor:
            if self.strikes():
                raise Killed
            return hidden(lm, *args, **kwargs)

        monkeypatch.setattr(os, "write", dying_write)
        monkeypatch.setattr(os, "replace", dying_replace)
        monkeypatch.setattr(LanguageModel, "hidden", dying_hidden)

    def strikes(self) -> bool:
        if threading.current_thread() is not threading.main_thread():
            return False
        if self.dead:
            raise Killed
        self.events += 1
        self.dead = self.events > self.at
        return self.dead


SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"temperature": 1.0, "top_p": 0.9, "seed": 3},
    "auto": {"batch_size": None, "limit": 10},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_run_killed_at_any_moment_ends_like_an_unbroken_one(
    name: str, lm: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = outcome(run_cell(lm, cells(tmp_path / "whole", **SETTINGS[name])).folder)
    for moment in itertools.count(step=1 if name == "greedy" else 5):
        cell = cells(tmp_path / f"killed-{moment}", **SETTINGS[name])
        with monkeypatch.context() as patch:
            death = Death(patch, at=moment)
            with contextlib.suppress(Killed):
                run_cell(lm, cell)
        if not death.dead:  # it had no more than so many moments
            break
        assert outcome(run_cell(lm, cell).folder) == whole, f"killed at event {moment}"
    assert moment > 20


def test_a_run_cut_at_any_byte_of_its_files_ends_like_an_unbroken_one(
    lm: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = outcome(run_cell(lm, cells(tmp_path / "whole")).folder)
    append, kept = RunFolder.append, tmp_path / "kept"

    def second_batch(folder: RunFolder, samples: Sequence[Sample]) -> None:
        append(folder, samples)
        if len(folder.samples()) == 4:
            shutil.copytree(folder.path, kept)
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "append", second_batch)
        with pytest.raises(KeyboardInterrupt):
            run_cell(lm, cells(tmp_path / "killed"))
    (folder,) = (tmp_path / "killed").glob("*/*/*")
    (kept / "lock").unlink()
    log, samples = ((kept / name).read_bytes() for name in ("batches.jsonl", "samples.jsonl"))
    assert log.count(b"\n") == 2
    # samples follow their batch's line in the log: cut within it, only the first batch's are there
    first = b"".join(samples.splitlines(keepends=True)[:2])
    cuts = [(log[:cut], first) for cut in range(log.index(b"\n") + 1, len(log), 61)]
    cuts += [(log, samples[:cut]) for cut in range(0, len(samples), 211)]
    for log_left, samples_left in cuts:
        shutil.rmtree(folder)
        shutil.copytree(kept, folder)
        (folder / "batches.jsonl").write_bytes(log_left)
        (folder / "samples.jsonl").write_bytes(samples_left)
        assert outcome(run_cell(lm, cells(tmp_path / "killed")).folder) == whole
        assert sorted(path.name for path in folder.iterdir()) == ["run.json", "samples.jsonl"]


def test_a_comparison_that_was_killed_goes_on_behind_its_last_whole_piece(
    lm: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compare, asked = ModelSystem._compare, list[int]()

    def dying(system: ModelSystem, pairs: Sequence[Any]) -> Any:
        asked.append(len(pairs))
        if len(asked) == 3:
            raise KeyboardInterrupt
        return compare(system, pairs)

    settings: dict[str, Any] = {"method": "rag", "task": "lamp4", "batch_size": 2, "limit": 7, "max_new_tokens": 3}
    whole = outcome(run_cell(lm, cells(tmp_path / "whole", **settings)).folder)
    monkeypatch.setattr(ModelSystem, "_compare", dying)
    with pytest.raises(KeyboardInterrupt):
        run_cell(lm, cells(tmp_path / "killed", **settings))
    (folder,) = (tmp_path / "killed").glob("*/*/*")
    kept = folder / "compared.jsonl"
    lines = kept.read_bytes().splitlines(keepends=True)
    assert asked == [2, 2, 2] and len(lines) == 4
    for left, again in (
        (lines, [2, 1]),
        (lines[:3], [2, 2, 1]),  # half a piece is computed whole: its last bits depend on both
        ([*lines[:3], lines[3][:20]], [2, 2, 1]),
        ([*lines[:2], lines[3], lines[2]], [2, 2, 1]),
        ([lines[0].replace(b'"response": "', b'"response": "x'), *lines[1:]], [2, 2, 2, 1]),
    ):
        shutil.copytree(folder, tmp_path / "left" / folder.relative_to(tmp_path / "killed"))
        (tmp_path / "left" / kept.relative_to(tmp_path / "killed")).write_bytes(b"".join(left))
        asked[:] = [0] * 3
        done = run_cell(lm, cells(tmp_path / "left", **settings)).folder
        assert outcome(done) == whole and asked[3:] == again
        assert sorted(path.name for path in done.iterdir()) == ["run.json", "samples.jsonl"]
        shutil.rmtree(tmp_path / "left")


def test_the_bar_moves_while_a_batch_is_written(lm: LanguageModel, tmp_path: Path) -> None:
    class Watching(Console):
        told: ClassVar[list[int]] = []

        def progress(self, label: str, done: int, total: int) -> None:
            if label == "answering":
                self.told.append(done)

    run_cell(
        lm, cells(tmp_path, method="plain", task="lamp4", batch_size=4, limit=4, max_new_tokens=8), console=Watching()
    )
    assert {1, 2, 3} & set(Watching.told), "within the only batch"
    assert Watching.told == sorted(Watching.told) and Watching.told[-1] == 4


def test_run_json_is_written_at_the_start_and_at_the_end_however_many_batches_there_are(
    lm: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []
    write = RunFolder.write
    monkeypatch.setattr(
        RunFolder, "write", lambda folder, record: (written.append(record.status), write(folder, record))
    )
    counts = []
    for limit in (2, 8):
        written.clear()
        run_cell(lm, cells(tmp_path, limit=limit, batch_size=1))
        counts.append(len(written))
    assert counts[0] == counts[1]
    assert written[-1] == "complete"


def test_a_run_killed_twice_ends_like_an_unbroken_one(
    lm: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = outcome(run_cell(lm, cells(tmp_path / "whole")).folder)
    for moment in (12, 8):
        with monkeypatch.context() as patch:
            Death(patch, at=moment)
            with pytest.raises(Killed):
                run_cell(lm, cells(tmp_path / "killed"))
    assert outcome(run_cell(lm, cells(tmp_path / "killed")).folder) == whole


def test_a_process_that_is_killed_ends_like_an_unbroken_one(harness: Callable, toy: Path) -> None:
    line = f"run --method rag --task lamp3 --model {toy} --limit 10 --batch_size 1 --max_new_tokens 24"
    process = subprocess.Popen(
        [sys.executable, "-m", "harness", *line.split()],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while process.poll() is None and not any(Path("runs").glob("*/*/*/samples.jsonl")):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (folder,) = Path("runs").glob("*/*/*")
    assert read_record(folder).status == "running"
    assert harness(line).code == 0
    assert harness(f"{line} --output_path whole").code == 0
    (whole,) = Path("whole").glob("*/*/*")
    assert outcome(folder) == outcome(whole)


def test_ctrl_c_saves_the_status_and_a_bug_saves_the_error(
    lm: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for error, status in ((KeyboardInterrupt(), "interrupted"), (ZeroDivisionError("by zero"), "failed")):
        with monkeypatch.context() as patch:
            patch.setattr(ModelSystem, "_generate", _raise(error))
            with pytest.raises(type(error)):
                run_cell(lm, cells(tmp_path))
        record = find_runs(tmp_path)[0]
        assert (record.status, record.error) == (status, "ZeroDivisionError: by zero" if status == "failed" else None)
    assert run_cell(lm, cells(tmp_path)).record.status == "complete"


def _raise(error: BaseException) -> Callable[..., Any]:
    def run(*_: Any) -> Any:
        raise error

    return run


# Memory


def _memory_for(most: int, patch: pytest.MonkeyPatch) -> None:
    """From now on a batch of more than `most` samples runs out of memory."""
    generate = ModelSystem._generate

    def limited(system: ModelSystem, requests: Sequence[Any], generation: Any) -> Any:
        if len(requests) > most:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes.")
        return generate(system, requests, generation)

    patch.setattr(ModelSystem, "_generate", limited)


def test_auto_doubles_and_backs_off_when_memory_runs_out_and_records_what_it_used(
    lm: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = run_cell(lm, cells(tmp_path / "free", limit=30, batch_size=None))
    assert (free.record.batch.requested, free.record.batch.sizes) == ("auto", [8, 16, 6])
    _memory_for(10, monkeypatch)
    tight = run_cell(lm, cells(tmp_path / "tight", limit=30, batch_size=None))
    assert (tight.record.batch.requested, tight.record.batch.sizes) == ("auto", [8, 6])
    assert tight.exit_code == 0
    assert tight.record.metrics == free.record.metrics
    by_id = {sample.id: sample.response for sample in read_samples(free.folder)}
    assert {sample.id: sample.response for sample in read_samples(tight.folder)} == by_id


@pytest.mark.parametrize("after", [1, 8, 14])
def test_a_run_killed_while_memory_is_short_ends_like_an_unbroken_one(
    lm: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    _memory_for(3, monkeypatch)
    whole = outcome(run_cell(lm, cells(tmp_path / "whole", limit=6, batch_size=None)).folder)
    assert whole["batch"]["sizes"] == [3]
    with monkeypatch.context() as patch:
        Death(patch, at=after)
        with pytest.raises(Killed):
            run_cell(lm, cells(tmp_path / "killed", limit=6, batch_size=None))
    assert outcome(run_cell(lm, cells(tmp_path / "killed", limit=6, batch_size=None)).folder) == whole


def test_memory_that_runs_out_while_a_method_learns_is_one_line(
    harness: Callable[[str], Any], toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.")

    monkeypatch.setattr("harness.fit.kit.score_variants", full)
    done = harness(f"run --method dps --task lamp4 --model {toy} --limit 2 --set samples=2 --set screen=all")
    assert done.code == 1 and "memory ran out; what is done is kept" in done.error()


def test_a_sample_too_large_for_the_memory_is_a_failed_sample(
    lm: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        _memory_for(0, patch)
        done = run_cell(lm, cells(tmp_path, limit=2))
    assert (done.exit_code, done.record.status, done.record.health.errors) == (3, "partial", 2)
    assert {sample.error for sample in read_samples(done.folder)} == {"out of memory with a batch of one"}
    assert run_cell(lm, cells(tmp_path, limit=2)).exit_code == 3
    again = run_cell(lm, cells(tmp_path, limit=2, retry_failed=True))
    assert (again.exit_code, again.record.health.errors) == (0, 0)


# Fitting


@dataclass(frozen=True)
class Learner(Method):
    """Remembers whom it was fitted on."""

    decode_only = frozenset({"strength"})
    rank: int = 1
    strength: float = 1.0

    def fit(self, kit: Any, train: Sequence[Labelled]) -> Fitted:
        FITS.append([item.example for item in train])
        return Fitted({"v": torch.ones(2)}, {"users": [item.example.user.id for item in train], "shape": (1, 2)})

    def plan(self, example: Example, shared: Fitted | None, personal: Fitted | None) -> Plan:
        assert shared is not None and shared.meta["shape"] == [1, 2], "the run that fits sees what later runs read"
        return Plan((Stream(self.retrieval.prompt(example)),))


FITS: list[list[Example]] = []


def learner(output: Path, method: Method = Learner(), **settings: Any) -> Cell:
    return replace(cells(output, **settings), method_name="learner", method=method)


@pytest.fixture(autouse=True)
def _no_fits() -> None:
    FITS.clear()


def test_a_fit_is_made_once_and_reused_by_every_run_that_may(
    lm: LanguageModel, tmp_path: Path, store: ArtifactStore
) -> None:
    shared = shared_state(lm, learner(tmp_path), store, Console())
    first = run_cell(lm, learner(tmp_path), store=store)
    run_cell(lm, learner(tmp_path, limit=3), store=store)
    stronger = run_cell(lm, learner(tmp_path, Learner(strength=2.0)), store=store)
    assert len(FITS) == 1
    assert first.record.artifacts == stronger.record.artifacts == {"fit": shared.key}
    assert stronger.folder != first.folder
    assert first.record.cost.fit_seconds == stronger.record.cost.fit_seconds


def test_runs_side_by_side_fit_the_same_thing_once(lm: LanguageModel, tmp_path: Path, store: ArtifactStore) -> None:
    start = threading.Barrier(3)

    def wanted() -> None:
        start.wait()
        shared_state(lm, learner(tmp_path), store, Console())

    threads = [threading.Thread(target=wanted) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(FITS) == 1


@pytest.mark.parametrize(
    "change",
    [{"method": Learner(rank=2)}, {"seed": 1}, {"fit_split": "dev:0.2"}, {"task": "lamp1"}, {"max_new_tokens": 4}],
)
def test_a_fit_that_read_something_else_is_another_fit(
    lm: LanguageModel, tmp_path: Path, store: ArtifactStore, change: dict[str, Any]
) -> None:
    run_cell(lm, learner(tmp_path), store=store)
    run_cell(lm, learner(tmp_path, **change), store=store)
    assert len(FITS) == 2


def test_a_share_to_fit_on_is_kept_out_of_the_evaluation_and_recorded(
    lm: LanguageModel, tmp_path: Path, store: ArtifactStore
) -> None:
    done = run_cell(lm, learner(tmp_path, fit_split="dev:0.2", limit=None, users=20), store=store)
    fitted = {example.user.id for example in FITS[0]}
    assert len(fitted) == 40  # of 200
    assert done.record.held_out_users == sorted(fitted)
    assert done.record.config.data.fit_split == "dev:0.2"
    evaluated = {sample.user for sample in read_samples(done.folder)}
    assert len(evaluated) == 20 and not evaluated & fitted
    other_seed = learner(tmp_path, fit_split="dev:0.2", seed=1)
    assert other_seed.fit_data.held_out != fitted


def test_methods_that_do_not_fit_are_evaluated_on_the_same_users_as_those_that_do(tmp_path: Path) -> None:
    settings = {"fit_split": "dev:0.2", "limit": None}
    fits, does_not = learner(tmp_path, **settings), cells(tmp_path, method="plain", **settings)
    assert [item.example.id for item in fits.items] == [item.example.id for item in does_not.items]
    assert len(fits.items) == 160


def test_a_share_that_leaves_nobody_to_evaluate_is_missing_data(tmp_path: Path) -> None:
    with pytest.raises(DataMissing, match="no users besides the 200 held out"):
        assert cells(tmp_path, fit_split="dev:0.999").items


def test_fit_task_fits_on_another_task(lm: LanguageModel, tmp_path: Path, store: ArtifactStore) -> None:
    cell = replace(learner(tmp_path), fit_task=("lamp1", Lamp1()))
    record = run_cell(lm, cell, store=store).record
    assert FITS[0][0].text == Lamp1().train_items()[0].example.text
    assert (record.config.data.fit_task, record.config.data.fit_split) == ("lamp1", "train")


def test_the_task_to_fit_on_has_its_own_options_and_length_of_answers(tmp_path: Path) -> None:
    def made(*fit_settings: str) -> Cell:
        settings = Settings(output_path=tmp_path)
        return grid(["persona_vector"], ["mmlu"], settings, fit_task="persona:islam", fit_settings=fit_settings)[0]

    asked = [made(*given).fit_data.items()[0].example.text for given in ((), ("prompts=tiny",))]
    assert asked[0] != asked[1]
    assert (made("prompts=tiny").max_new_tokens, made("prompts=tiny").fit_max_new_tokens) == (1, 256)
    with pytest.raises(UsageError, match="no option 'promts'; did you mean 'prompts'"):
        made("promts=tiny")
    with pytest.raises(UsageError, match="name it, as in --fit_task"):
        grid(["persona_vector"], ["mmlu"], Settings(), fit_settings=["prompts=tiny"])


@pytest.mark.parametrize(
    ("tasks", "given", "words"),
    [
        (["persona:islam"], {"data": "FOLDER"}, "--data FOLDER: persona:islam reads no folder of files; leave it out"),
        (["lamp4"], {"fit_data": "FOLDER"}, "--fit_data FOLDER is about another task to fit on; name it"),
        (["lamp4"], {"fit_task": "LaMP-4", "fit_data": "FOLDER"}, "about another task than lamp4, which is evaluated"),
        (
            ["mmlu", "lamp4"],
            {"fit_task": "lamp4", "fit_settings": ["split_by=time"]},
            "another task than lamp4, which is",
        ),
        (["mmlu"], {"fit_task": "persona:islam", "fit_data": "FOLDER"}, "persona:islam reads no folder of files"),
    ],
)
def test_a_folder_or_an_option_that_nothing_reads_is_refused(
    tasks: list[str], given: dict[str, Any], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        grid(["plain"], tasks, Settings(), **given)


def test_a_folder_is_for_those_of_several_tasks_that_read_one() -> None:
    made = grid(["plain"], ["persona:islam", "lamp4"], Settings(), data="lamp-mini")
    fitted = grid(["plain"], ["persona:islam"], Settings(), data="lamp-mini", fit_task="lamp4")
    assert [cell.task_name for cell in (*made, *fitted)] == ["persona:islam", "lamp4", "persona:islam"]


@dataclass(frozen=True)
class Adapter(Method):
    """A state a user; none for those in `unlucky`."""

    def adapt(self, kit: Any, users: Sequence[User], shared: Fitted | None) -> list[Fitted | UserFailed]:
        ADAPTED.extend(user.id for user in users)
        failed = UserFailed("the server is down")
        cost = {"prefill_tokens": 10, "seconds": 2.0}
        return [failed if u.id in UNLUCKY else Fitted({"v": torch.ones(3)}, {"user": u.id}, cost) for u in users]

    def plan(self, example: Example, shared: Fitted | None, personal: Fitted | None) -> Plan:
        assert personal is not None and personal.meta["user"] == example.user.id
        return Plan((Stream(self.retrieval.prompt(example)),))


ADAPTED: list[str] = []
UNLUCKY: set[str] = set()


def test_a_user_is_adapted_to_once_and_a_user_that_failed_again(
    lm: LanguageModel, tmp_path: Path, store: ArtifactStore
) -> None:
    def adapter(**settings: Any) -> Cell:
        return replace(cells(tmp_path, **settings), method_name="adapter", method=Adapter())

    users = [item.example.user.id for item in adapter().items]
    UNLUCKY.add(users[1])
    done = run_cell(lm, adapter(), store=store)
    assert users == ADAPTED
    assert (done.exit_code, done.record.health.errors) == (3, 1)
    assert [s.error for s in read_samples(done.folder) if s.error] == ["the server is down"]
    cost = done.record.cost
    assert (cost.setup_seconds_per_user, cost.setup_prefill_tokens) == (2.0, 30)
    assert cost.stored_bytes_per_user is not None and cost.stored_bytes_per_user > 0
    words = {
        text for item in adapter().items for record in item.example.user.history for text in record.fields.values()
    }
    stored = "".join(path.read_text() for path in store.root.glob("*/meta.json"))
    assert '"history"' in stored and not any(json.dumps(text) in stored for text in words if len(text) > 3)
    UNLUCKY.clear()
    assert run_cell(lm, adapter(retry_failed=True), store=store).exit_code == 0
    ADAPTED.clear()
    run_cell(lm, adapter(temperature=1.0), store=store)
    assert ADAPTED == []


def test_a_fit_on_the_evaluated_users_own_questions_is_noted(
    lm: LanguageModel, tmp_path: Path, store: ArtifactStore
) -> None:
    cell = learner(tmp_path)
    assert run_cell(lm, cell, store=store).record.notes == []
    again = learner(tmp_path, limit=3)
    first, *others = again.items
    known = again.fit_data.items()[0].example.user
    vars(again)["items"] = [replace(first, example=replace(first.example, user=known)), *others]
    (note,) = run_cell(lm, again, store=store).record.notes
    assert note.startswith("1 of 3 users also ask questions that were fitted on; --task_set most_active=100")


def test_users_of_one_history_have_states_of_their_own_and_a_user_of_several_learns_from_the_shortest(
    lm: LanguageModel, tmp_path: Path, store: ArtifactStore
) -> None:
    def states(*users: User) -> dict[str, Fitted]:
        cell = replace(cells(tmp_path), method_name="lengths", method=Lengths())
        items = [
            replace(item, example=replace(item.example, user=user)) for item, user in zip(four, users, strict=False)
        ]
        vars(cell)["items"] = items
        return personal_states(lm, cell, Shared(), store, Console()).fitted()

    four = cells(tmp_path).items
    ann = User("ann", four[0].example.user.history)
    bob, early = replace(ann, id="bob"), replace(ann, history=ann.history[:1])
    for _ in range(2):  # made, and found in the store
        made = states(ann, early, bob)
        assert {name: state.meta for name, state in made.items()} == {
            "ann": {"user": "ann", "items": 1},
            "bob": {"user": "bob", "items": len(ann.history)},
        }


@dataclass(frozen=True)
class Lengths(Adapter):
    """Who was adapted to, on how many items."""

    def adapt(self, kit: Any, users: Sequence[User], shared: Fitted | None) -> list[Fitted | UserFailed]:
        return [Fitted({"v": torch.ones(1)}, {"user": user.id, "items": len(user.history)}) for user in users]


def test_a_large_models_users_are_kept_a_few_at_a_time(
    lm: LanguageModel, tmp_path: Path, store: ArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def adapt(self: Adapter, kit: Any, users: Sequence[User], shared: Fitted | None) -> list[Fitted | UserFailed]:
        calls.append(len(users))
        return [Fitted({"v": torch.ones(1)}, {"user": user.id}) for user in users]

    monkeypatch.setattr(Adapter, "adapt", adapt)
    monkeypatch.setattr("harness.fit.states.LARGE", 1)
    run_cell(lm, replace(cells(tmp_path, limit=10), method_name="adapter", method=Adapter()), store=store)
    assert calls == [8, 2]


# Metrics


def test_metrics_are_those_of_a_straightforward_computation_on_the_saved_samples(harness: Callable) -> None:
    from nltk.tokenize import word_tokenize
    from nltk.translate.meteor_score import single_meteor_score
    from rouge_score.rouge_scorer import RougeScorer
    from sklearn.metrics import accuracy_score, f1_score, mean_absolute_error, root_mean_squared_error

    assert harness("run --method rag --task lamp1 --task lamp2m --task lamp3 --task lamp4 --limit 20").code == 0
    runs = {run.config.task.name: run for run in find_runs(Path("runs"))}
    answers, golds, values = {}, {}, {}
    for task, run in runs.items():
        samples = read_samples(run.folder)
        assert len(samples) == 20
        answers[task] = [sample.response.strip() for sample in samples]
        golds[task] = [sample.targets[0] for sample in samples]
        values[task] = {name: metric.value for name, metric in run.metrics.items()}

    for task in ("lamp1", "lamp2m"):
        assert values[task]["accuracy"] == pytest.approx(accuracy_score(golds[task], answers[task]))
        f1 = f1_score(golds[task], answers[task], labels=LABELS[task], average="macro", zero_division=0)
        assert values[task]["f1"] == pytest.approx(f1)

    def rating(answer: str, gold: float) -> float:
        try:
            return float(answer)
        except ValueError:
            return 1.0 if abs(1 - gold) > abs(5 - gold) else 5.0

    truth = [float(gold) for gold in golds["lamp3"]]
    said = [rating(answer, gold) for answer, gold in zip(answers["lamp3"], truth, strict=True)]
    assert values["lamp3"]["mae"] == pytest.approx(mean_absolute_error(truth, said))
    assert values["lamp3"]["rmse"] == pytest.approx(root_mean_squared_error(truth, said))

    pairs = list(zip(golds["lamp4"], answers["lamp4"], strict=True))
    scorer = RougeScorer(["rouge1", "rougeL"], use_stemmer=False)
    for name in ("rouge1", "rougeL"):
        expected = np.mean([scorer.score(gold, answer)[name].fmeasure for gold, answer in pairs])
        assert values["lamp4"][name] == pytest.approx(expected)
    if metrics.wordnet_missing():
        assert values["lamp4"]["meteor"] is None
    else:
        words = [[word_tokenize(text, preserve_line=True) for text in pair] for pair in pairs]
        scores = [single_meteor_score(gold, answer, wordnet=metrics._wordnet()) for gold, answer in words]
        assert values["lamp4"]["meteor_unsplit"] == pytest.approx(np.mean(scores))


def test_a_train_example_that_does_not_fit_is_passed_over_and_every_run_says_so(
    lm: LanguageModel, tmp_path: Path, store: ArtifactStore
) -> None:
    train = cells(tmp_path).task.train_items()
    long = replace(train[0], example=replace(train[0].example, text="very long " * 100))
    kit = ModelKit(lm, store=store)
    assert kit.sample([long, *train[:3]], 3) == list(train[:3])
    assert kit.notes == ["1 train examples passed over: longer than 512 tokens"]
    assert ModelKit(lm).sample(train, 3) == ModelKit(lm).sample(train, 3) != ModelKit(lm, seed=1).sample(train, 3)
    with pytest.raises(HarnessError, match="none of 1 train examples fits the context of 512"):
        kit.sample([long], 3)

    class Sampler(Learner):
        def fit(self, kit: Any, train: Sequence[Labelled]) -> Fitted:
            return super().fit(kit, kit.sample([long, *train[:3]], 4))

    for _ in range(2):
        record = run_cell(lm, learner(tmp_path, Sampler()), store=store).record
        assert record.notes == ["1 train examples passed over: longer than 512 tokens"]


def test_a_sample_that_lost_its_gold_answer_is_refused_by_score_and_not_left_out(
    lm: LanguageModel, tmp_path: Path
) -> None:
    done = run_cell(lm, cells(tmp_path))
    path = done.folder / "samples.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[1]["targets"] = []
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    before = (done.folder / "run.json").read_text()
    with pytest.raises(
        HarnessError, match=r"samples.jsonl, line 2 \(id '.*'\): field 'targets' is empty, while 3 other samples"
    ):
        score(done.folder)
    assert (done.folder / "run.json").read_text() == before
