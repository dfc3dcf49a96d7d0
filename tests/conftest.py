"""No test reaches the network. The command line in this process, and factories of records, which test files share."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import hypothesis
import pytest

from harness.records.store import (
    Cost,
    DataConfig,
    MethodConfig,
    MetricValue,
    ModelConfig,
    RunConfig,
    RunRecord,
    SamplingConfig,
    SelectionConfig,
    TaskConfig,
)

# how long an example takes says something of the machine's other work and nothing of the code
hypothesis.settings.register_profile("suite", deadline=None)
hypothesis.settings.load_profile("suite")

# a shell that starts the tests in the background has them ignore ctrl-C, and what they start ignores it too
signal.signal(signal.SIGINT, signal.default_int_handler)


class NetworkUsed(RuntimeError):
    """A test asked for a host other than this one. Not an OSError: libraries retry or swallow those."""


def _is_local(host: object) -> bool:
    if isinstance(host, bytes):
        host = host.decode()
    return host is None or host in ("localhost", "::1", "") or str(host).startswith("127.")


@pytest.fixture(autouse=True)
def _sockets_off(monkeypatch: pytest.MonkeyPatch) -> None:
    connect, connect_ex, getaddrinfo = socket.socket.connect, socket.socket.connect_ex, socket.getaddrinfo

    def guard(family: int, address: Any) -> None:
        if family in (socket.AF_INET, socket.AF_INET6) and not _is_local(address[0]):
            raise NetworkUsed(f"a test tried to connect to {address}")

    def guarded_connect(self: socket.socket, address: Any) -> None:
        guard(self.family, address)
        connect(self, address)

    def guarded_connect_ex(self: socket.socket, address: Any) -> int:
        guard(self.family, address)
        return connect_ex(self, address)

    def guarded_getaddrinfo(host: Any, *args: Any, **kwargs: Any) -> Any:
        if not _is_local(host):
            raise NetworkUsed(f"a test tried to look up {host!r}")
        return getaddrinfo(host, *args, **kwargs)

    monkeypatch.setattr(socket.socket, "connect", guarded_connect)
    monkeypatch.setattr(socket.socket, "connect_ex", guarded_connect_ex)
    monkeypatch.setattr(socket, "getaddrinfo", guarded_getaddrinfo)


class Done(NamedTuple):
    """What a command left behind."""

    code: int
    out: str
    err: str

    def error(self) -> str:
        """The one line that says what is wrong."""
        lines = [line for line in self.err.splitlines() if line.startswith("harness: ")]
        assert len(lines) == 1 and "Traceback" not in self.err, self.err
        return lines[0]


@pytest.fixture
def harness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[[str], Done]:
    """Runs a command line in this process, in an empty folder with an empty cache: `harness("list methods")`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HARNESS_DATA", raising=False)

    def call(line: str) -> Done:
        from harness.cli.app import main

        monkeypatch.setattr(sys, "argv", ["harness", *shlex.split(line)])
        code: Any = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code or 0
        return Done(code, *capsys.readouterr())

    return call


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a small random chat model with one token a byte and a context of 512: loads and answers in no time."""
    import torch

    from harness.run.contract import random_lm

    folder = tmp_path_factory.mktemp("models") / "toy"
    lm = random_lm(dtype=torch.float32)
    lm.model.save_pretrained(folder)
    lm.encoder.tokenizer.save_pretrained(folder)
    return folder


def _config(
    method: str = "rag",
    task: str = "lamp4",
    model: str = "llama3-8b",
    *,
    preset: str | None = None,
    options: Mapping[str, Any] | None = None,
    data: str = "LaMP",
    fingerprint: str = "f00d",
    split: str = "dev",
    fit_split: str | None = None,
    limit: int | None = None,
    users: int | None = None,
    control: str = "none",
    seed: int = 0,
) -> RunConfig:
    return RunConfig(
        model=ModelConfig(name=model, id=f"org/{model}", revision="abc123", dtype="float32"),
        method=MethodConfig(name=method, options=dict(options or {}), preset=preset),
        task=TaskConfig(name=task),
        data=DataConfig(description=data, fingerprint=fingerprint, split=split, fit_split=fit_split),
        selection=SelectionConfig.model_validate({"limit": limit, "users": users, "control": control}),
        sampling=SamplingConfig(max_new_tokens=64, seed=seed),
    )


@pytest.fixture(scope="session")
def run_config() -> Callable[..., RunConfig]:
    """Makes a valid configuration; arguments change what a test is about."""
    return _config


@pytest.fixture(scope="session")
def run_record() -> Callable[..., RunRecord]:
    """Makes a finished record: `run_record(config, rouge1=0.2)`, each metric with interval value ± 0.01."""

    def make(config: RunConfig, *, n: int = 1925, status: str = "complete", passes: int = 1000, **values: float):
        metrics = {
            name: MetricValue(
                value=value, n=n, low=value - 0.01, high=value + 0.01, higher_is_better=name not in ("mae", "rmse")
            )
            for name, value in values.items()
        }
        cost = Cost(forward_passes=passes, prefill_tokens=passes * 10, decode_tokens=passes)
        return RunRecord(config=config, status=status, metrics=metrics, cost=cost, started="2026-01-01T00:00:00Z")

    return make
