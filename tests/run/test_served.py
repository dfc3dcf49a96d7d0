"""Models behind servers: prompt-only methods answer through one, nothing is lost or paid for twice, the rest is refused."""

from __future__ import annotations

import json
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from harness.errors import UsageError
from harness.methods.plain import Plain
from harness.records.store import read_record, read_samples
from harness.run.contract import toy_examples
from harness.run.served import ServedSystem
from harness.run.system import Generation
from harness.servers.chat import Ask, NoReply, Reply
from harness.servers.endpoint import Endpoint, Limits
from harness.servers.model import ServedModel


class Server:
    """Answers with the first words of the last turn. `context` in words, where it has one."""

    def __init__(self) -> None:
        self.url = ""
        self.asked: list[dict[str, Any]] = []
        self.answered: Counter[str] = Counter()
        self.context: int | None = None
        self.counts = False
        self.refuses: tuple[str, ...] = ()
        self.faults: Callable[[int], int] = lambda number: 0
        """Number of the request -> a status, or 0; 1 breaks the connection."""
        self.lock = threading.Lock()
        self.now = self.most = 0

    def length(self, request: dict[str, Any]) -> int:
        return sum(len(turn["content"].split()) for turn in request["messages"])

    def react(self, path: str, request: dict[str, Any]) -> tuple[int, dict[str, Any], dict[str, str]]:
        if path == "/tokenize":
            if not self.counts or self.context is None:
                return 404, {"detail": "Not Found"}, {}
            return 200, {"count": self.length(request), "max_model_len": self.context}, {}
        with self.lock:
            self.asked.append(request)
            number = len(self.asked)
        if fault := self.faults(number):
            return fault, {"error": {"message": "not now"}}, {"Retry-After": "0"} if fault == 429 else {}
        if found := [name for name in self.refuses if name in request]:
            return 400, {"error": {"message": f"Unrecognized request argument supplied: {found[0]}"}}, {}
        needed = self.length(request) + request["max_tokens"]
        if self.context is not None and needed > self.context:
            said = (
                f"This model's maximum context length is {self.context} tokens. However, you requested {needed} tokens."
            )
            return 400, {"error": {"message": said}}, {}
        text = " ".join(request["messages"][-1]["content"].split()[: request["max_tokens"]])
        with self.lock:
            self.answered[json.dumps(request["messages"])] += 1
        usage = {"prompt_tokens": self.length(request), "completion_tokens": len(text.split())}
        choice = {"index": 0, "finish_reason": "length", "message": {"role": "assistant", "content": text}}
        return 200, {"model": f"{request['model']}-1", "choices": [choice], "usage": usage}, {}


@contextmanager
def serving(server: Server) -> Iterator[Server]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with server.lock:
                server.now += 1
                server.most = max(server.most, server.now)
            try:
                status, body, headers = server.react(self.path, request)
                if status == 1:
                    self.close_connection = True
                    return
                data = json.dumps(body).encode()
                self.send_response(status)
                for name, value in {"Content-Type": "application/json", **headers}.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)
            finally:
                with server.lock:
                    server.now -= 1

        def log_message(self, *_: Any) -> None:
            pass

        def handle_one_request(self) -> None:
            try:
                super().handle_one_request()
            except OSError:
                self.close_connection = True

    class Roomy(ThreadingHTTPServer):
        request_queue_size = 128
        block_on_close = False

    with Roomy(("127.0.0.1", 0), Handler) as http:
        server.url = f"http://127.0.0.1:{http.server_port}/v1"
        thread = threading.Thread(target=http.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            http.shutdown()
            thread.join()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Server]:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "cache"))
    with serving(Server()) as running:
        yield running


@pytest.fixture
def run(harness: Callable, server: Server, tmp_path: Path) -> Callable[..., Any]:
    def call(method: str, more: str = "", task: str = "lamp4", limit: int = 6, output: str = "out") -> Any:
        line = f"run --method {method} --task {task} --limit {limit} --model openai/m --model_base_url {server.url}"
        done = harness(f"{line} --output_path {output} {more}")
        folders = sorted((tmp_path / output).glob(f"*/*/{method}-*"), key=lambda folder: folder.stat().st_mtime)
        return done, folders[-1] if folders else None

    return call


@pytest.mark.parametrize("method", ["plain", "rag", "pag", "copy"])
def test_methods_that_are_a_prompt_answer_through_a_server(method: str, run: Callable, server: Server) -> None:
    done, folder = run(method, "--max_new_tokens 5")
    assert done.code == 0, done.err
    record = read_record(folder)
    samples = read_samples(folder)
    assert record.status == "complete" and len(samples) == 6 and all(s.response for s in samples)
    assert (record.config.model.name, record.config.model.dtype) == ("openai/m", "served")
    assert record.serving is not None and record.serving.base_url == server.url
    assert record.cost.forward_passes is None
    if method != "copy":
        assert record.serving.models == ["m-1"] and record.serving.requests == 6
        assert record.cost.prefill_tokens == sum(s.prompt_tokens for s in samples)
        assert (samples[0].finish, samples[0].new_tokens) == ("length", 5)


def test_every_sampling_field_is_sent(run: Callable, server: Server) -> None:
    run("plain", "--max_new_tokens 5")
    sent = server.asked[-1]
    assert (sent["temperature"], sent["top_p"], sent["top_k"], sent["min_p"]) == (0, 1, 0, 0)
    assert (sent["repetition_penalty"], sent["presence_penalty"], sent["frequency_penalty"]) == (1, 0, 0)
    run("plain", "--max_new_tokens 5 --temperature 0.7 --top_k 7 --top_p 0.9")
    six = server.asked[-6:]
    assert {(r["temperature"], r["top_k"], r["top_p"]) for r in six} == {(0.7, 7, 0.9)}
    assert len({r["seed"] for r in six}) == 6  # a sample draws with noise of its own


def test_a_neutral_field_may_be_refused_and_one_that_was_asked_for_may_not(run: Callable, server: Server) -> None:
    server.refuses = ("top_k",)
    done, folder = run("plain", "--max_new_tokens 5")
    assert done.code == 0
    record = read_record(folder)
    assert record.serving is not None and all("top_k" not in sent for sent in record.serving.sent)
    done, folder = run("plain", "--max_new_tokens 5 --top_k 7 --temperature 1")
    assert done.code == 3
    assert all("does not take top_k" in str(sample.error) for sample in read_samples(folder))


@pytest.mark.parametrize("counts", [True, False])
def test_history_is_left_out_by_whole_items_and_never_cut(counts: bool, run: Callable, server: Server) -> None:
    server.context, server.counts = 90, counts
    done, folder = run("rag", "--max_new_tokens 5 --set k=8")
    samples = read_samples(folder)
    assert any(sample.dropped_items for sample in samples), done.err
    for sample in samples:
        assert sample.error is None and sample.prompt_tokens + 5 <= 90
    assert set(server.answered.values()) == {1}
    server.context = 6
    done, folder = run("rag", "--max_new_tokens 4 --set k=7")
    assert done.code == 3
    assert all(sample.response is None and sample.error for sample in read_samples(folder))


def test_what_needs_weights_is_one_line_that_says_why(run: Callable, server: Server, harness: Callable) -> None:
    for method in ("cad", "dps", "lora_p"):
        done, _ = run(method, "--max_new_tokens 5")
        assert done.code == 2 and "Traceback" not in done.err, done.err
        assert "weights" in done.error()
    chosen = replace(toy_examples(1)[0].example, choices=(" A", " B"))
    with pytest.raises(UsageError, match="log-probabilities"):
        ServedSystem(ServedModel("m", server.url), Plain(), Generation(5)).answer([chosen])
    for command in ("fit --method dps --task lamp4", "sweep --method plain --task lamp4 --set k=1,2"):
        assert harness(f"{command} --model openai/m").code == 2
    assert harness("run --method plain --task lamp4 --model tiny --model_base_url http://h/v1").code == 2


def test_a_hundred_requests_through_a_server_that_fails_lose_and_pay_for_nothing_twice(
    server: Server, tmp_path: Path
) -> None:
    draw = random.Random(0)
    chances = [draw.choice([0, 0, 429, 500, 503, 1]) for _ in range(2000)]
    server.faults = lambda number: chances[number]
    model = ServedModel("m", server.url, Limits(64, timeout=5, retries=30, backoff=0.005))
    asks = [Ask((("user", f"question {n}"),), 3) for n in range(100)]
    found = model.replies.ask(asks, "one")
    assert [heard.reply.text for heard in found if isinstance(heard.reply, Reply)] == [
        f"question {n}" for n in range(100)
    ]
    assert set(server.answered.values()) == {1}
    again = ServedModel("m", server.url).replies.ask(asks, "two")
    assert all(heard.cached for heard in again) and set(server.answered.values()) == {1}


def test_requests_double_while_a_server_keeps_up_and_a_429_takes_some_away(server: Server) -> None:
    model = Endpoint("m", "model", server.url, Limits(64, retries=40, backoff=0.005))
    model.ask([Ask((("user", f"q {n}"),), 1) for n in range(10)])
    assert server.most <= 10
    slow = threading.Event()
    react = server.react
    server.react = lambda path, request: (slow.wait(0.05), react(path, request))[1]  # type: ignore[method-assign]
    model.ask([Ask((("user", f"q {n}"),), 1) for n in range(200)])
    assert 10 < server.most <= 64
    server.most, server.faults = 0, lambda number: 429 if number % 2 else 0
    found = model.ask([Ask((("user", f"r {n}"),), 1) for n in range(30)])
    assert not any(isinstance(reply, NoReply) for reply in found) and server.most <= 10


def test_a_run_that_was_stopped_goes_on_without_paying_twice(run: Callable, server: Server) -> None:
    server.faults = lambda number: 400 if number > 4 else 0
    done, folder = run("plain", "--max_new_tokens 5")
    assert done.code == 3
    server.faults = lambda number: 0
    done, folder = run("plain", "--max_new_tokens 5 --retry_failed")
    assert done.code == 0, done.err
    record = read_record(folder)
    assert {n for q, n in server.answered.items() if "Say yes" not in q} == {1}
    assert record.serving is not None and record.serving.requests == 6
    assert record.serving.input_tokens == record.cost.prefill_tokens


def test_a_server_that_is_not_there_is_one_line(harness: Callable, server: Server) -> None:
    done = harness("run --method plain --task lamp4 --limit 2 --model openai/m --model_base_url http://127.0.0.1:9/v1")
    assert done.code == 1 and "openai/m at http://127.0.0.1:9/v1 does not answer" in done.error()
