"""A server on this machine that speaks OpenAI's chat completions, and can be told how to fail."""

from __future__ import annotations

import json
import math
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from harness.judge.judges import CALIBRATION


@dataclass
class Server:
    """Answers every question with a number of its own, or as `writes` does, unless `faults` says otherwise."""

    url: str = ""
    asked: list[dict[str, Any]] = field(default_factory=list)
    answered: Counter[str] = field(default_factory=Counter)
    """Prompt -> how often it was answered in full, and so paid for."""
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
    headers: list[Mapping[str, str]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    waiting: int = 0
    most_waiting: int = 0
    delay: float = 0.0
    lock: Any = field(default_factory=threading.Lock)

    def number(self, prompt: str) -> int:
        if prompt == CALIBRATION:
            raise ValueError("it asks for two")
        return 10 + sum(prompt.encode()) % 90

    def prompts(self) -> list[str]:
        """Those that were asked, without the calibration."""
        found = [request["messages"][0]["content"] for request in self.asked]
        return [prompt for prompt in found if prompt != CALIBRATION]


COMPLAINTS = {
    "logprobs": "You are not allowed to request logprobs from this model",
    "max_tokens": "Unsupported parameter: 'max_tokens' is not supported. Use 'max_completion_tokens' instead.",
    "temperature": "Unsupported value: 'temperature' does not support 0 with this model.",
}


@contextmanager
def serving(server: Server) -> Iterator[Server]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            prompt = request["messages"][-1]["content"]
            with server.lock:
                server.asked.append(request)
                server.headers.append(dict(self.headers))
                server.paths.append(self.path)
                server.waiting += 1
                server.most_waiting = max(server.waiting, server.most_waiting)
                tries = sum(r["messages"] == request["messages"] for r in server.asked)
            try:
                time.sleep(server.delay)
                self.react(request, prompt, server.faults(prompt, tries))
            finally:
                with server.lock:
                    server.waiting -= 1

        def react(self, request: dict[str, Any], prompt: str, fault: str) -> None:
            unknown = [name for name in server.refuses if name in request]
            script = server.scripted(request)
            if script is not None:
                self.send(*script)
            elif self.headers["Authorization"] != "Bearer secret":
                self.send(401, {"error": {"message": "Incorrect API key provided"}})
            elif request["model"] == "missing" or self.path != "/v1/chat/completions":
                self.send(404, {"error": {"message": "no such model"}})
            elif unknown:
                self.send(400, {"error": {"message": COMPLAINTS[unknown[0]], "param": unknown[0]}})
            elif fault.isdigit():
                self.send(int(fault), {"error": {"message": "not now"}}, {"Retry-After": "0"})
            elif fault == "no money":
                self.send(429, {"error": {"message": "You exceeded your quota", "code": "insufficient_quota"}})
            elif fault == "hang":
                self.connection.recv(1)  # nothing comes, until the client gives up
                self.close_connection = True
            elif fault == "cut":
                self.send(200, self.completion(request, prompt, ""), cut=True)
            elif fault == "half":
                self.close_connection = True
                self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 900\r\n\r\n{")
            elif fault == "page":
                self.send(200, {"error": {"message": "upstream overloaded"}})
            else:
                with server.lock:
                    server.answered[prompt] += 1
                self.send(200, self.completion(request, prompt, fault))

        def completion(self, request: dict[str, Any], prompt: str, fault: str) -> dict[str, Any]:
            usual = "57 100" if prompt == CALIBRATION else (server.writes or server.number)(prompt)
            text = {"refusal": "REFUSAL", "words": "Certainly"}.get(fault, str(usual))
            tokens = server.tokenizer(text)[: request.get("max_tokens", 99)]
            message: dict[str, Any] = {"role": "assistant", "content": "".join(tokens)}
            if fault == "native refusal":
                message = {"role": "assistant", "content": None, "refusal": "I cannot help with that."}
            choice = {"index": 0, "finish_reason": "stop", "message": message, "logprobs": None}
            if request.get("logprobs") and server.gives_logprobs and fault != "no logprobs":
                likely = {tokens[0]: 0.7, "20": 0.2, "the": 0.1}
                top = [{"token": t, "logprob": math.log(p), "bytes": None} for t, p in likely.items()]
                if fault in ("refusal", "words"):
                    top = [{"token": tokens[0], "logprob": math.log(0.8), "bytes": None}, *top[1:2]]
                shown = [{"token": t, "logprob": math.log(0.7), "top_logprobs": top, "bytes": None} for t in tokens]
                choice["logprobs"] = {"content": shown, "refusal": None}
            usage = {"prompt_tokens": 100, "completion_tokens": len(tokens), "total_tokens": 100 + len(tokens)}
            head = {"id": "x", "object": "chat.completion", "created": 0, "model": f"{request['model']}-2025-04-14"}
            return {**head, "choices": [choice], "usage": usage}

        def send(
            self, status: int, body: dict[str, Any], headers: Mapping[str, str] | None = None, *, cut: bool = False
        ) -> None:
            data = json.dumps(body).encode()
            data = data[: len(data) // 2] if cut else data
            self.send_response(status)
            for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

        def handle_one_request(self) -> None:
            try:
                super().handle_one_request()
            except (ConnectionError, BrokenPipeError):  # the client gave up, or was killed
                self.close_connection = True

    class Roomy(ThreadingHTTPServer):
        request_queue_size = 64  # else a burst of connections waits a second for the kernel to try again
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
