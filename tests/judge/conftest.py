"""A server that answers as a judge, and can be told to fail."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from chat_server import Server, serving


@pytest.fixture
def server() -> Iterator[Server]:
    with serving(Server()) as running:
        yield running
