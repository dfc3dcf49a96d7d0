"""Servers on this machine that speak OpenAI's protocol, and can be told how to fail: `with serving(Server()) as server`.

`Server` rates: what a judge is. `Words` answers with words of what it was asked, one token each, and scores them: an evaluated
model as vLLM serves one.
"""

from __future__ import annotations

import json
import math
import re
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal, TypeVar

from harness.judge.judges import CALIBRATION


@dataclass
class Said:
    """What a server answers, or how it fails to."""

    body: Any = None
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    broken: Literal["", "cut", "half", "hang", "closed"] = ""
    """Of the answer: half of its body; half of its head; nothing, until the client gives up; nothing at all."""


@dataclass
class Listening:
    """What every server here keeps of what it was sent."""

    url: str = ""
    asked: list[dict[str, Any]] = field(default_factory=list)
    answered: Counter[str] = field(default_factory=Counter)
    """Prompt -> how often it was answered in full, and so paid for."""
    headers: list[Mapping[str, str]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    waiting: int = 0
    most_waiting: int = 0
    delay: float = 0.0
    lock: Any = field(default_factory=threading.Lock)

    def react(self, path: str, request: dict[str, Any], headers: Mapping[str, str]) -> Said:
        raise NotImplementedError


COMPLAINTS = {
    "logprobs": "You are not allowed to request logprobs from this model",
    "max_tokens": "Unsupported parameter: 'max_tokens' is not supported. Use 'max_completion_tokens' instead.",
    "temperature": "Unsupported value: 'temperature' does not support 0 with this model.",
}


@dataclass
class Server(Listening):
    """Answers every question with a number of its own, or as `writes` does, unless `faults` says otherwise."""

    faults: Callable[[str, int], str] = lambda prompt, tries: ""
    """(prompt, how often it was asked) -> a fault, or empty."""
    writes: Callable[[str], str] | None = None
    """Prompt -> answer."""
    tokenizer: Callable[[str], list[str]] = lambda text: re.findall(r"\s*\S+", text)
    gives_logprobs: bool = True
    refuses: tuple[str, ...] = ()
    """Request fields it does not take."""
    scripted: Callable[[dict[str, Any]], tuple[int, dict[str, Any]] | None] = lambda request: None
    """Request -> status and body; None where the server answers as usual."""

    def number(self, prompt: str) -> int:
        if prompt == CALIBRATION:
            raise ValueError("it asks for two")
        return 10 + sum(prompt.encode()) % 90

    def prompts(self) -> list[str]:
        """Those that were asked, without the calibration."""
        found = [request["messages"][0]["content"] for request in self.asked]
        return [prompt for prompt in found if prompt != CALIBRATION]

    def react(self, path: str, request: dict[str, Any], headers: Mapping[str, str]) -> Said:
        prompt = request["messages"][-1]["content"]
        with self.lock:
            tries = sum(r["messages"] == request["messages"] for r in self.asked)
        unknown = [name for name in self.refuses if name in request]
        script, fault = self.scripted(request), self.faults(prompt, tries)
        if script is not None:
            return Said(script[1], script[0])
        if headers["Authorization"] != "Bearer secret":
            return _error(401, "Incorrect API key provided")
        if request["model"] == "missing" or path != "/v1/chat/completions":
            return _error(404, "no such model")
        if unknown:
            return Said({"error": {"message": COMPLAINTS[unknown[0]], "param": unknown[0]}}, 400)
        if fault.isdigit():
            return Said({"error": {"message": "not now"}}, int(fault), {"Retry-After": "0"})
        if fault == "no money":
            return Said({"error": {"message": "You exceeded your quota", "code": "insufficient_quota"}}, 429)
        if fault in ("hang", "half"):
            return Said(broken=fault)  # type: ignore[arg-type]
        if fault == "cut":
            return Said(self.completion(request, prompt, ""), broken="cut")
        if fault == "page":
            return Said({"error": {"message": "upstream overloaded"}})
        with self.lock:
            self.answered[prompt] += 1
        return Said(self.completion(request, prompt, fault))

    def completion(self, request: dict[str, Any], prompt: str, fault: str) -> dict[str, Any]:
        usual = "57 100" if prompt == CALIBRATION else (self.writes or self.number)(prompt)
        text = {"refusal": "REFUSAL", "words": "Certainly"}.get(fault, str(usual))
        tokens = self.tokenizer(text)[: request.get("max_tokens", 99)]
        message: dict[str, Any] = {"role": "assistant", "content": "".join(tokens)}
        if fault == "native refusal":
            message = {"role": "assistant", "content": None, "refusal": "I cannot help with that."}
        choice = {"index": 0, "finish_reason": "stop", "message": message, "logprobs": None}
        if request.get("logprobs") and self.gives_logprobs and fault != "no logprobs":
            likely = {tokens[0]: 0.7, "20": 0.2, "the": 0.1}
            top = [{"token": t, "logprob": math.log(p), "bytes": None} for t, p in likely.items()]
            if fault in ("refusal", "words"):
                top = [{"token": tokens[0], "logprob": math.log(0.8), "bytes": None}, *top[1:2]]
            shown = [{"token": t, "logprob": math.log(0.7), "top_logprobs": top, "bytes": None} for t in tokens]
            choice["logprobs"] = {"content": shown, "refusal": None}
        usage = {"prompt_tokens": 100, "completion_tokens": len(tokens), "total_tokens": 100 + len(tokens)}
        head = {"id": "x", "object": "chat.completion", "created": 0, "model": f"{request['model']}-2025-04-14"}
        return {**head, "choices": [choice], "usage": usage}


@dataclass
class Words(Listening):
    """Answers with the first words of the last turn. Its tokens are words, each with the space before it."""

    context: int | None = None
    """In words, where it has one."""
    counts: bool = False
    """Whether it lends its tokenizer."""
    scores: Literal["", "prompt", "answer", "zeros", "late"] = ""
    """What it takes for the log-probabilities of a prompt: none; the right ones; those of its own answer; zeros; each one token
    too late."""
    refuses: tuple[str, ...] = ()
    """Request fields it does not take."""
    faults: Callable[[int], str] = lambda number: ""
    """Number of the request -> a status, what is broken, `slow`, or nothing."""
    answering: int = 0
    """Requests so far, those for tokens aside."""
    retry_after: str = "0"
    vocabulary: list[str] = field(default_factory=list)
    """An id is a place in it."""

    def ids(self, text: str) -> list[int]:
        with self.lock:
            for word in re.findall(r"\s*\S+", text):
                if word not in self.vocabulary:
                    self.vocabulary.append(word)
        return [self.vocabulary.index(word) for word in re.findall(r"\s*\S+", text)]

    def logprob(self, before: list[int], token: int) -> float:
        """Of a token after others, in nats; less than a half each, so that no token is certain."""
        words = [self.vocabulary[i] for i in (*before[-3:], token)]
        return -1 - (zlib.crc32("|".join(words).encode()) % 1000) / 100

    def react(self, path: str, request: dict[str, Any], headers: Mapping[str, str]) -> Said:
        if path == "/tokenize":
            if not self.counts:
                return _error(404, "Not Found")
            ids = self.ids(self.text(request))
            return Said({"count": len(ids), "max_model_len": self.context or 4096, "tokens": ids})
        with self.lock:  # not by how many have come: several may come before the first is answered
            self.answering += 1
            fault = self.faults(self.answering)
        if fault.isdigit():
            return Said({"error": {"message": "not now"}}, int(fault), {"Retry-After": self.retry_after})
        if fault == "slow":
            time.sleep(0.1)
        elif fault:
            return Said(broken=fault)  # type: ignore[arg-type]
        if found := [name for name in self.refuses if name in request]:
            return _error(400, f"Unrecognized request argument supplied: {found[0]}")
        ids = request["prompt"] if isinstance(request.get("prompt"), list) else self.ids(self.text(request))
        needed = len(ids) + request["max_tokens"]
        if self.context is not None and needed > self.context:
            limit = f"This model's maximum context length is {self.context} tokens."
            return _error(400, f"{limit} However, you requested {needed} tokens.")
        with self.lock:
            self.answered[json.dumps(request.get("messages") or request["prompt"])] += 1
        if path == "/v1/completions":
            return Said(self.echo(request, ids)) if self.scores else _error(404, "Not Found")
        text = " ".join(request["messages"][-1]["content"].split()[: request["max_tokens"]])
        usage = {"prompt_tokens": len(ids), "completion_tokens": len(text.split())}
        choice = {"index": 0, "finish_reason": "length", "message": {"role": "assistant", "content": text}}
        return Said({"model": f"{request['model']}-1", "choices": [choice], "usage": usage})

    def text(self, request: Mapping[str, Any]) -> str:
        if "prompt" in request:
            return request["prompt"]
        return " ".join(turn["content"] for turn in request["messages"])

    def echo(self, request: Mapping[str, Any], ids: list[int]) -> dict[str, Any]:
        """The prompt's tokens and one that follows: the most likely word it knows."""
        words = [i for i, word in enumerate(self.vocabulary) if word.startswith(" ")]
        last = max(words, key=lambda i: self.logprob(ids, i))
        both = [*ids, last]
        numbers = [self.logprob(both[:n], i) if n else None for n, i in enumerate(both)]
        if self.scores == "answer":
            both, numbers = both[-1:], numbers[-1:]
        elif self.scores == "zeros":
            numbers = [None, *(0.0 for _ in both[1:])]
        elif self.scores == "late":
            numbers = [None, -3.0, *numbers[1:-2], numbers[-1]]
        named = request.get("return_tokens_as_token_ids")
        tokens = [f"token_id:{i}" if named else self.vocabulary[i] for i in both]
        shown = {"tokens": tokens, "token_logprobs": numbers, "top_logprobs": None}
        usage = {"prompt_tokens": len(ids), "completion_tokens": 1}
        return {"model": f"{request['model']}-1", "choices": [{"text": "", "logprobs": shown}], "usage": usage}


def _error(status: int, message: str) -> Said:
    return Said({"error": {"message": message}}, status)


Heard = TypeVar("Heard", bound=Listening)


@contextmanager
def serving(server: Heard) -> Iterator[Heard]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with server.lock:
                server.asked.append(request)
                server.headers.append(dict(self.headers))
                server.paths.append(self.path)
                server.waiting += 1
                server.most_waiting = max(server.waiting, server.most_waiting)
            try:
                time.sleep(server.delay)
                self.send(server.react(self.path, request, self.headers))
            finally:
                with server.lock:
                    server.waiting -= 1

        def send(self, said: Said) -> None:
            if said.broken in ("hang", "closed", "half"):
                if said.broken == "hang":
                    self.connection.recv(1)  # nothing comes, until the client gives up
                self.close_connection = True
                if said.broken == "half":
                    head = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 900\r\n\r\n{"
                    self.wfile.write(head.encode())
                return
            data = json.dumps(said.body).encode()
            data = data[: len(data) // 2] if said.broken == "cut" else data
            self.send_response(said.status)
            for name, value in {"Content-Type": "application/json", **said.headers}.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

        def handle_one_request(self) -> None:
            try:
                super().handle_one_request()
            except OSError:  # the client gave up, or was killed
                self.close_connection = True

    class Roomy(ThreadingHTTPServer):
        request_queue_size = 128  # else a burst of connections waits a second for the kernel to try again
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
