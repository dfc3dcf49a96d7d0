"""Pushing records: what is sent is shown first, and answers to licensed data stay here unless they are asked for."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness.records.store import RunFolder
from harness.task import Sample


class Hub:
    """A client of the Hub that keeps what it is given."""

    made: list[tuple[str, str, dict[str, Any]]]
    sent: dict[str, dict[str, str]]

    def create_repo(self, name: str, *, repo_type: str, exist_ok: bool, **more: Any) -> None:
        assert exist_ok
        self.made.append((repo_type, name, more))

    def upload_folder(self, *, folder_path: Path, repo_id: str, repo_type: str, commit_message: str) -> str:
        files = [path for path in folder_path.rglob("*") if path.is_file()]
        self.sent[repo_type] = {path.relative_to(folder_path).as_posix(): path.read_text("utf-8") for path in files}
        return f"https://hub/{repo_type}/{repo_id}"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    client = Hub()
    client.made, client.sent = [], {}
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: client)
    return client


@pytest.fixture
def records(harness: Callable, run_config: Callable, run_record: Callable) -> dict[str, str]:
    """Name -> place of a record of synthetic users, and of one of licensed data."""
    found = {}
    for name, description in (("rag", "lamp4: lamp-mini (synthetic, embedded)"), ("plain", "lamp4: /data/lamp")):
        config = run_config(name)
        data = config.data.model_copy(update={"description": description})
        record = run_record(config.model_copy(update={"data": data}), rouge1=0.25)
        with RunFolder.open(Path("runs"), record.config) as folder:
            folder.write(record)
            folder.keep([Sample("1", "u", response="SECRET", metrics={"rouge1": 0.25})])
        found[name] = folder.path.relative_to("runs").as_posix()
    return found


def test_nothing_is_sent_before_yes(harness: Callable, hub: Hub, records: dict[str, str]) -> None:
    done = harness("push hf://datasets/me/mine runs")
    assert done.code == 0 and (hub.made, hub.sent) == ([], {})
    assert "dataset me/mine: 4 files" in done.out and "nothing was sent; --yes sends it" in done.err
    assert (
        f"  {records['rag']}: run.json, samples.jsonl\n" in done.out and f"  {records['plain']}: run.json\n" in done.out
    )


def test_records_go_to_a_data_set_and_answers_to_licensed_data_stay_here(
    harness: Callable, hub: Hub, records: dict[str, str]
) -> None:
    done = harness("push hf://datasets/me/mine runs --yes")
    assert done.code == 0 and "https://hub/dataset/me/mine" in done.out
    assert hub.made == [("dataset", "me/mine", {})]
    expected = {"README.md", *(f"{place}/run.json" for place in records.values()), f"{records['rag']}/samples.jsonl"}
    assert set(hub.sent["dataset"]) == expected
    assert "1 records go without their answers" in done.err and "# Leaderboard" in hub.sent["dataset"]["README.md"]


def test_samples_sends_those_answers_too(harness: Callable, hub: Hub, records: dict[str, str]) -> None:
    harness("push hf://datasets/me/mine runs --yes --samples")
    assert f"{records['plain']}/samples.jsonl" in hub.sent["dataset"]


def test_the_report_becomes_a_static_space_without_licensed_answers(
    harness: Callable, hub: Hub, records: dict[str, str]
) -> None:
    assert harness("push hf://datasets/me/mine runs --report --yes").code == 0
    assert hub.made[1] == ("space", "me/mine", {"space_sdk": "static"})
    page = hub.sent["space"]
    assert "sdk: static" in page["README.md"] and "index.html" in page
    assert "SECRET" not in "".join(page.values())


@pytest.mark.parametrize("to", ["wandb", "trackio"])
def test_a_tracker_gets_configuration_metrics_and_cost(
    harness: Callable, records: dict[str, str], monkeypatch: pytest.MonkeyPatch, to: str
) -> None:
    calls: list[tuple[str, dict[str, Any]]] = []
    fake: Any = types.ModuleType(to)
    fake.init = lambda **given: calls.append(("init", given))
    fake.log = lambda given: calls.append(("log", given))
    fake.finish = lambda: calls.append(("finish", {}))
    monkeypatch.setitem(sys.modules, to, fake)
    assert harness(f"push hf://datasets/me/mine --to {to}").code == 2
    chosen = harness(f"push --to {to} 'runs/*/*/rag-*'").out  # a tracker has no address: the first word is a record
    assert chosen.count("\n") == 1 and "/rag-" in chosen
    assert harness(f"push --to {to}").code == 0 and calls == []
    assert harness(f"push --to {to} --project p --yes").code == 0
    assert [name for name, _ in calls] == ["init", "log", "finish"] * 2
    assert calls[0][1]["project"] == "p" and calls[0][1]["config"]["task"]["name"] == "lamp4"
    assert (calls[1][1]["rouge1"] == 0.25 and "cost/flops" in calls[1][1]) or "cost/forward_passes" in calls[1][1]


def test_what_cannot_be_pushed_is_one_line(harness: Callable, hub: Hub, records: dict[str, str]) -> None:
    for command, words, code in (
        ("push", "give one place to push to", 2),
        ("push s3://bucket runs", "is no data set's address; give hf://datasets/<user>/<name>", 2),
        ("push hf://datasets/me/mine nothing", "names no record", 4),
        ("push --to wandb", "wandb is not installed", 2),
        ("push --to wandb runs", "wandb is not installed", 2),
        ("push --to wandb runs nowhere", "nowhere holds no run.json", 4),
    ):
        done = harness(command)
        assert done.code == code and words in done.error()


def test_a_refusal_of_the_hub_is_one_line(harness: Callable, hub: Hub, records: dict[str, str]) -> None:
    def refuse(*args: Any, **given: Any) -> None:
        raise OSError("401 no token\nsecond line")

    hub.create_repo = refuse  # type: ignore[method-assign]
    done = harness("push hf://datasets/me/mine runs --yes")
    assert done.code == 1 and "the Hub refused me/mine: 401 no token; 'hf auth login' signs in" in done.error()
