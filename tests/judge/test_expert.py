"""ExPerT: scores worked by hand, and the rounds of questions with a judge that is told what to say."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from chat_server import Server, serving

from harness.errors import UsageError
from harness.judge.expert import WORDS, Aspect, Found, judge_run, scores
from harness.judge.judges import open_judge
from harness.records.store import RunConfig, RunFolder, RunRecord
from harness.task import Sample, Selection
from harness.tasks.lamp import Lamp4

TASK = Lamp4()
ITEMS = TASK.items(Selection("dev", limit=8))


@pytest.fixture(autouse=True)
def _workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    monkeypatch.delenv("HARNESS_DATA", raising=False)


@pytest.fixture
def server() -> Iterator[Server]:
    with serving(Server(writes=say)) as running:
        yield running


@pytest.fixture
def run(tmp_path: Path, run_config: Callable[..., RunConfig]) -> Path:
    """A run whose references speak of tea and milk, and whose answers of milk and of something else."""
    made = run_config("rag", data="lamp4: lamp-mini", fingerprint=TASK.fingerprint(Selection("dev")))
    samples = [
        Sample(item.example.id, item.example.user.id, response=f"milk; beer{n}", targets=("tea; milk",))
        for n, item in enumerate(ITEMS)
    ]
    with RunFolder.open(tmp_path / "results", made) as folder:
        folder.write(RunRecord(config=made, status="complete", batches=[[sample.id for sample in samples]]))
        folder.append(samples)
        return folder.path


def say(prompt: str) -> str:
    """Aspects are what stands between semicolons; equal ones match; content agrees, style does not."""
    if "\nTEXT\n" in prompt:
        text = prompt.split("\nTEXT\n")[1].split("\n\nReply")[0]
        made = [{"aspect": part.strip(), "description": "d", "evidence": [part]} for part in text.split(";")]
        return f"```json\n{json.dumps(made)}\n```"
    if "\nLIST\n" in prompt:
        one = prompt.split("\nASPECT\n")[1].split("\n")[0]
        listed = re.findall(r"^(\d+)\. (.*)$", prompt.split("\nLIST\n")[1], re.MULTILINE)
        return json.dumps({"match": next((int(n) for n, title in listed if title == one), 0), "reason": "r"})
    return json.dumps({"agree": "same about it" in prompt, "reason": "r"})


def judge_at(server: Server) -> Any:
    return open_judge("openai/x", server.url, ["backoff=0.01", "timeout=2", "retries=1"])


def _found(match: int | None, content: bool = False, style: bool = False) -> Found:
    return Found(Aspect("a", "d", ("e",)), match, content, style)


def test_scores_are_harmonic_means_of_shares_of_aspects() -> None:
    reference = [_found(0, content=True, style=True), _found(1, content=True), _found(None), _found(None)]
    answer = [_found(0, content=True, style=True), _found(1, style=True)]
    found = scores(reference, answer)
    assert found["content"] == pytest.approx(2 * 0.5 * 0.5 / (0.5 + 0.5))
    assert found["style"] == pytest.approx(2 * 0.25 * 1 / 1.25)
    assert found["both"] == pytest.approx(2 * 0.25 * 0.5 / 0.75)
    assert found["either"] == pytest.approx(2 * 0.5 * 1 / 1.5)
    assert found["average"] == pytest.approx(2 * 0.375 * 0.75 / 1.125)
    assert scores([_found(0, content=True)], []) == dict.fromkeys(found, 0.0)


def test_a_run_is_judged_round_by_round_and_replies_are_paid_for_once(server: Server, run: Path) -> None:
    folder, found = judge_run(run, judge_at(server))
    # of two aspects on each side one has a counterpart, which agrees in content alone
    values = {name: metric["value"] for name, metric in found["metrics"].items()}
    assert values == pytest.approx({"content": 0.5, "style": 0, "both": 0, "either": 0.5, "average": 0.25})
    assert (found["samples"], found["missing"], found["unread"]) == (8, 0, 0)
    kept = json.loads((folder / "expert.json").read_text())
    assert kept["judged"][0]["reference"][1]["match"] == 0 and kept["judged"][0]["reference"][0]["match"] is None
    asked = len(server.prompts())
    again, same = judge_run(run, judge_at(server))
    assert again == folder and same["metrics"] == found["metrics"] and len(server.prompts()) == asked
    assert any(ITEMS[0].example.text in prompt for prompt in server.prompts())


def test_what_cannot_be_read_is_counted_and_what_has_no_aspects_is_missing(server: Server, run: Path) -> None:
    def careless(prompt: str) -> str:
        if "\nTEXT\n" in prompt and "beer0" in prompt:
            return "I see no aspects."
        return "who knows" if "\nLIST\n" in prompt and "beer1" in prompt else say(prompt)

    server.writes = careless
    folder, found = judge_run(run, judge_at(server), limit=3)
    assert (found["samples"], found["missing"]) == (3, 1) and found["unread"] > 0
    (missing,) = [one for one in json.loads((folder / "expert.json").read_text())["judged"] if not one["scores"]]
    assert missing["problem"] == "no aspects of the answer in the judge's reply"
    assert found["metrics"]["content"]["n"] == 2


def test_a_server_that_fails_leaves_samples_missing_and_is_asked_again(server: Server, run: Path) -> None:
    server.faults = lambda prompt, tries: "500" if "\nLIST\n" in prompt else ""
    _, found = judge_run(run, judge_at(server), limit=2)
    assert (found["missing"], found["metrics"]["content"]["value"]) == (2, None)
    server.faults = lambda prompt, tries: ""
    _, found = judge_run(run, judge_at(server), limit=2)
    assert (found["missing"], found["metrics"]["content"]["value"]) == (0, 0.5)


def test_long_texts_are_read_to_their_first_words(server: Server, run: Path) -> None:
    lines = (run / "samples.jsonl").read_text().splitlines()
    first = json.loads(lines[0])
    first["response"] = " ".join(f"w{n}" for n in range(WORDS + 5))
    (run / "samples.jsonl").write_text("\n".join([json.dumps(first), *lines[1:]]) + "\n")
    judge_run(run, judge_at(server), limit=1)
    read = [prompt for prompt in server.prompts() if "\nTEXT\nw0 " in prompt]
    assert len(read) == 1 and f"w{WORDS - 1}" in read[0] and f"w{WORDS}" not in read[0]


def test_the_command_prints_the_scores_and_names_its_folder(
    harness: Callable[[str], Any], server: Server, run: Path
) -> None:
    done = harness(f"judge expert {run} --judge openai/x --judge_base_url {server.url} --limit 4")
    assert done.code == 0, done.err
    assert re.search(r"content +0\.500", done.out) and "n = 4 of 4" in done.out
    assert "expert-rag-" in done.out.splitlines()[-1]
    assert "give --judge openai/<model>" in harness(f"judge expert {run}").error()
    with pytest.raises(UsageError, match="judge 'lexicon' cannot list aspects"):
        judge_run(run, open_judge("lexicon"))
