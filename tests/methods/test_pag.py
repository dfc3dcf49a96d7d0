"""Profiles are written once by whom the user names, stand before the input, and are never silently empty."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.data import Example, HistoryItem, Prompt, User
from harness.engine.decode import Decoder
from harness.engine.rows import Request
from harness.errors import DataMissing, HarnessError, UsageError, UserFailed
from harness.fit.artifacts import ArtifactStore
from harness.fit.kit import ModelKit
from harness.fit.writer import EndpointWriter
from harness.method import Fitted, Retrieval, Written
from harness.methods.clamp import Clamp
from harness.methods.oppu import OPPU
from harness.methods.pag import PAG
from harness.methods.style_vector import StyleVector
from harness.records.store import read_samples
from harness.run.cell import Cell, Settings
from harness.run.contract import check_method, random_lm, toy_examples
from harness.run.steps import run_cell
from harness.run.system import ModelSystem
from harness.task import Generation
from harness.tasks.lamp import Lamp4
from harness.tasks.lamp_prompts import LampTemplate

SHORT = PAG(instruction="Describe.", profile_tokens=6)


def _example(count: int = 12, words: int = 2) -> Example:
    history = tuple(
        HistoryItem(str(i), {"title": f"Headline {i}", "text": f"article{i} " * words}, f"article{i}")
        for i in range(count)
    )
    text = "Generate a headline for the following article: rain"
    return Example("e", User("u", history), text, "rain", LampTemplate("lamp4"))


def _adapted(method: PAG, kit: ModelKit, *users: User) -> list[Fitted]:
    states = method.adapt(kit, users, None)
    assert all(isinstance(state, Fitted) for state in states)
    return [state for state in states if isinstance(state, Fitted)]


# The method


def test_pag_keeps_the_contract() -> None:
    check_method(SHORT)


def test_the_summary_stands_on_a_line_before_the_prompt_with_its_items() -> None:
    example, personal = _example(2), Fitted(meta={"summary": "Writes short headlines."})
    (alone,) = PAG().plan(example, None, personal).streams
    assert alone.prompt.render()[0].content == f"Writes short headlines.\n{example.text}"  # type: ignore[union-attr]
    (both,) = PAG(retrieval=Retrieval("profile", k=1)).plan(example, None, personal).streams
    assert both.prompt.render()[0].content.startswith('Writes short headlines.\n"Headline 0" is the title')  # type: ignore[union-attr]


def test_the_writer_reads_seeded_items_newest_first_with_all_their_fields_cut() -> None:
    seen: list[Prompt] = []
    kit = ModelKit(random_lm(), seed=3)
    kit._writers["self"] = lambda prompts, n: [seen.append(p) or Written("a profile", len(p.items)) for p in prompts]
    for method in (PAG(profile_words=3), PAG(profile_words=3), PAG(profile_items=99)):
        _adapted(method, kit, _example(words=5).user)
    first, again, every = seen
    places = [int(item.id) for item in first.items]
    assert len(places) == 10 and places == sorted(places, reverse=True)
    assert first == again and len(every.items) == 12
    content = first.render()[0].content  # type: ignore[union-attr]
    number = places[0]
    assert f"1. title: Headline {number}; text: article{number} article{number} article{number}\n2." in content
    assert content.startswith(PAG().instruction)


def test_a_user_without_history_gets_no_summary_and_the_plain_prompt() -> None:
    example = _example(0)
    (state,) = _adapted(SHORT, ModelKit(random_lm()), example.user)
    assert SHORT.plan(example, None, state).streams[0].prompt == example.prompt()


def test_profiles_of_one_batch_equal_profiles_written_alone() -> None:
    users = [item.example.user for item in toy_examples(4)]
    lm = random_lm()
    together = _adapted(SHORT, ModelKit(lm), *users)
    alone = [_adapted(SHORT, ModelKit(lm), user)[0] for user in users]
    assert [state.meta for state in together] == [state.meta for state in alone]
    assert len({state.meta["summary"] for state in together}) > 1


def test_options_that_leave_nothing_to_write_are_refused() -> None:
    with pytest.raises(UsageError, match="profile_items 0 leaves nothing to write; allowed: profile_items >= 1"):
        PAG(profile_items=0)
    with pytest.raises(UsageError, match=r"unknown model 'lama3-8b'; did you mean 'llama3-8b'\?"):
        PAG(writer="lama3-8b")


# Failures


@pytest.mark.parametrize(
    ("items", "words", "reason"),
    [(3, 400, "no history item fits its context"), (3, 2, "its answer is empty")],
)
def test_a_profile_that_cannot_be_written_is_a_failure_with_its_reason(items: int, words: int, reason: str) -> None:
    lm = random_lm(max_position_embeddings=512)
    if "empty" in reason:
        lm.encoder.eos_ids = frozenset(range(lm.vocabulary))
    (state,) = SHORT.adapt(ModelKit(lm), [_example(items, words).user], None)
    assert isinstance(state, UserFailed)
    assert reason in str(state)


def test_a_user_whose_profile_failed_is_an_error_and_the_others_are_answered() -> None:
    lm, (bad, good) = random_lm(), (item.example for item in toy_examples(2))
    personal = {bad.user.id: UserFailed("no profile was written"), good.user.id: Fitted(meta={"summary": "Short."})}
    system = ModelSystem(lm, SHORT, Generation(max_new_tokens=3), personal=personal)
    samples = {sample.id: sample for sample in system.respond([bad, good])}
    assert samples[bad.id].error == "no profile was written"
    assert samples[bad.id].response is None
    assert samples[good.id].error is None


# Other writers


def test_another_model_writes_and_its_texts_are_kept_by_weights_and_prompt(tmp_path: Path) -> None:
    other = random_lm(seed=5)
    other.model.save_pretrained(tmp_path / "writer")
    other.encoder.tokenizer.save_pretrained(tmp_path / "writer")
    users = [item.example.user for item in toy_examples(2)]
    method = PAG(writer=str(tmp_path / "writer"), instruction="Describe.", profile_tokens=6)
    store = ArtifactStore(tmp_path / "store")
    kit = ModelKit(random_lm(seed=1), store=store)
    states = _adapted(method, kit, *users)
    assert kit.decoder.cost.forward_passes == 0
    expected = _adapted(SHORT, ModelKit(random_lm(seed=5, dtype=other.model.dtype)), *users)
    assert [s.meta["summary"] for s in states] == [s.meta["summary"] for s in expected]
    assert len([path for path in (tmp_path / "store").iterdir() if not path.name.startswith(".")]) == 2
    again = _adapted(method, ModelKit(random_lm(seed=2), store=store), *users)
    assert [s.cost for s in again] == [s.cost for s in states]  # written for another evaluated model, used for this one

    named = method.options()["writer"]
    assert named.startswith("writer sha256:") and str(tmp_path) not in named
    assert OPPU(profile=method.writer).options()["profile"] == named
    assert Clamp(judge=f"hf/{method.writer}").options()["judge"] == f"hf/{named}"
    (tmp_path / "writer" / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    assert method.options()["writer"] != named  # and so are the record and the states
    assert [PAG(writer=name).options()["writer"] for name in ("self", "tiny", "openai/m")] == [
        "self",
        "tiny",
        "openai/m",
    ]


class _Endpoint(BaseHTTPRequestHandler):
    """Chat completions as OpenAI's API speaks them; fails for a user whose records hold the word `broken`."""

    protocol_version = "HTTP/1.1"
    asked: list[dict[str, Any]]
    keys: list[str | None]
    broken = "broken"

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append(request)
        self.keys.append(self.headers["Authorization"])
        content = request["messages"][0]["content"]
        if self.path != "/v1/chat/completions" or request["model"] == "missing":
            self._reply(404, {"error": {"message": "no such model"}})
        elif self.broken in content:
            self._reply(400, {"error": {"message": "maximum context length is 8 tokens", "type": "invalid_request"}})
        else:
            text = "" if "silent" in content else f"Likes {content.rsplit(' ', 1)[-1]}."
            message = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
            usage = {"prompt_tokens": 40, "completion_tokens": 5, "total_tokens": 45}
            head = {"id": "x", "object": "chat.completion", "created": 0, "model": request["model"]}
            self._reply(200, {**head, "choices": [message], "usage": usage})

    def _reply(self, status: int, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[_Endpoint]]:
    handler = type("Endpoint", (_Endpoint,), {"asked": [], "keys": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{server.server_port}/v1")
        monkeypatch.setenv("OPENAI_API_KEY", "secret")
        yield handler
        server.shutdown()
        thread.join()


def _user(name: str, word: str) -> User:
    return User(name, (HistoryItem("1", {"text": word}, word),))


def test_an_endpoint_writes_each_profile_once_and_says_what_it_took(endpoint: type[_Endpoint], tmp_path: Path) -> None:
    method = PAG(writer="openai/some-model", profile_tokens=50)
    kit = ModelKit(random_lm(), store=ArtifactStore(tmp_path))
    states = _adapted(method, kit, _user("a", "tea"), _user("b", "coffee"))
    assert [s.meta["summary"] for s in states] == ["Likes tea.", "Likes coffee."]
    assert {k: states[0].cost[k] for k in ("prefill_tokens", "decode_tokens")} == {
        "prefill_tokens": 40,
        "decode_tokens": 5,
    }
    (request,) = (r for r in endpoint.asked if "tea" in r["messages"][0]["content"])
    assert (request["model"], request["max_tokens"], request["temperature"]) == ("some-model", 50, 0)
    assert [message["role"] for message in request["messages"]] == ["user"]
    assert set(endpoint.keys) == {"Bearer secret"}
    again = _adapted(
        method, ModelKit(random_lm(), store=ArtifactStore(tmp_path)), _user("a", "tea"), _user("b", "coffee")
    )
    assert len(endpoint.asked) == 2
    assert [s.cost for s in again] == [s.cost for s in states]


@pytest.mark.parametrize(
    ("word", "reason"), [("broken", "maximum context length"), ("silent", "it gave an empty answer")]
)
def test_a_profile_the_endpoint_did_not_write_is_a_failure_and_asked_for_again(
    endpoint: type[_Endpoint], tmp_path: Path, word: str, reason: str
) -> None:
    for _ in range(2):
        kit = ModelKit(random_lm(), store=ArtifactStore(tmp_path))
        bad, good = PAG(writer="openai/m").adapt(kit, [_user("a", word), _user("b", "tea")], None)
        assert isinstance(bad, UserFailed) and reason in str(bad)
        assert isinstance(good, Fitted) and good.meta["summary"] == "Likes tea."
    assert len(endpoint.asked) == 3


def test_a_run_counts_a_failed_profile_as_errors_and_a_retry_asks_for_that_one_alone(
    endpoint: type[_Endpoint], tmp_path: Path
) -> None:
    lm = random_lm(dtype=torch.float32, max_position_embeddings=2048)
    lm.revision = "random"
    settings = Settings(users=3, max_new_tokens=3, output_path=tmp_path / "results")
    cell = Cell("pag", PAG(writer="openai/m"), "lamp4", Lamp4(), settings)
    store, user = ArtifactStore(tmp_path / "store"), cell.items[0].example.user
    endpoint.broken = " ".join(user.history[0].fields["text"].split())
    first = run_cell(lm, cell, store=store)
    failed = [sample for sample in read_samples(first.folder) if sample.error]
    assert (first.exit_code, first.record.status) == (3, "partial")
    assert {sample.user for sample in failed} == {user.id}
    assert "maximum context length" in (failed[0].error or "")
    assert first.record.health.errors == len(failed)
    assert first.record.metrics["rouge1"].n == len(cell.items) - len(failed)
    assert (first.record.cost.setup_prefill_tokens, first.record.cost.setup_decode_tokens) == (80, 10)

    endpoint.broken, asked = "broken", len(endpoint.asked)
    again = run_cell(lm, replace(cell, settings=replace(settings, retry_failed=True)), store=store)
    assert (again.exit_code, again.record.health.errors) == (0, 0)
    assert again.record.cost.setup_prefill_tokens == 120
    assert len(endpoint.asked) == asked + 1


def test_profiles_are_written_in_fewer_at_a_time_where_memory_runs_out(monkeypatch: pytest.MonkeyPatch) -> None:
    users = [_user(str(n), f"tea {n}") for n in range(3)]
    whole = [state.meta["summary"] for state in _adapted(SHORT, ModelKit(random_lm()), *users)]
    generate, largest = Decoder.generate, 1

    def limited(decoder: Decoder, requests: Sequence[Request], **given: Any) -> Any:
        if len(requests) > largest:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return generate(decoder, requests, **given)

    monkeypatch.setattr(Decoder, "generate", limited)
    assert [state.meta["summary"] for state in _adapted(SHORT, ModelKit(random_lm()), *users)] == whole
    largest = 0
    for state in SHORT.adapt(ModelKit(random_lm()), users, None):
        assert isinstance(state, UserFailed) and "out of memory with a batch of one" in str(state)


def test_texts_of_one_server_are_not_taken_for_those_of_another(
    endpoint: type[_Endpoint], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, here = PAG(writer="openai/m"), os.environ["OPENAI_BASE_URL"]
    monkeypatch.setenv("OPENAI_BASE_URL", here.replace("//", "//me:word@"))
    recorded = method.options()["writer"]
    assert recorded == f"openai/m at {here}" == PAG(writer=recorded).options()["writer"]
    assert (
        Clamp(judge="openai/m").options()["judge"]
        == recorded
        == StyleVector(negatives="openai/m").options()["negatives"]
    )
    store = ArtifactStore(tmp_path)
    for writer in (method, PAG(writer=recorded)):  # as a user names it, and as a record does
        _adapted(writer, ModelKit(random_lm(), store=store), _user("a", "tea"))
    assert len(endpoint.asked) == 1
    monkeypatch.setenv("OPENAI_BASE_URL", here.replace("127.0.0.1", "localhost"))
    assert method.options()["writer"] != recorded
    _adapted(method, ModelKit(random_lm(), store=store), _user("a", "tea"))
    assert len(endpoint.asked) == 2


def test_an_endpoint_without_the_model_stops_the_run(endpoint: type[_Endpoint], tmp_path: Path) -> None:
    kit = ModelKit(random_lm(), store=ArtifactStore(tmp_path))
    with pytest.raises(HarnessError, match=r"openai/missing at http://127\.0\.0\.1.*no such model"):
        PAG(writer="openai/missing").adapt(kit, [_user("a", "tea")], None)


def test_an_endpoint_needs_a_key_or_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with pytest.raises(DataMissing, match=r"writer 'openai/m' needs \$OPENAI_API_KEY"):
        EndpointWriter("m")
