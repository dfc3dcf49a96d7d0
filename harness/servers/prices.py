"""What a server is told by `key=value` beside its address, and what its tokens cost: of judges and of evaluated models."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any

from harness.errors import UsageError
from harness.plugins.options import parse
from harness.servers.address import OPENAI
from harness.servers.endpoint import Limits

LISTED: Mapping[str, tuple[float, float]] = MappingProxyType(
    {"gpt-4.1-mini": (0.40, 1.60), "gpt-4o-mini": (0.15, 0.60), "gpt-5.2": (1.75, 14.00)}
)
"""US dollars per million input and output tokens, list prices of 2026, of the judges of the papers, at OpenAI."""
_TYPES: Mapping[str, Any] = MappingProxyType(
    {
        **dict.fromkeys(("concurrency", "retries"), int),
        **dict.fromkeys(("timeout", "backoff", "price_in", "price_out"), float),
    }
)


@dataclass(frozen=True)
class Price:
    """US dollars per million tokens."""

    input: float
    output: float

    def usd(self, input_tokens: float, output_tokens: float) -> float:
        return (input_tokens * self.input + output_tokens * self.output) / 1e6


def settings_of(given: Sequence[str], whose: str, more: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """`key=value` read: limits, prices, and what `more` allows. Raises UsageError for what is not known or not valid."""
    found = parse(given, {**(more or {}), **_TYPES}, whose)
    for name, lowest in (("concurrency", 1), ("retries", 0), ("backoff", 0.0), ("price_in", 0.0), ("price_out", 0.0)):
        if name in found and not lowest <= found[name] < math.inf:
            raise UsageError(f"{whose}: {name}={found[name]} is not valid; allowed: {lowest} or more")
    if "timeout" in found and not 0 < found["timeout"] < math.inf:
        raise UsageError(f"{whose}: timeout={found['timeout']} is not valid; allowed: seconds above 0")
    return found


def limits_of(settings: Mapping[str, Any], default: Limits = Limits()) -> Limits:
    return Limits(**{name: settings.get(name, value) for name, value in asdict(default).items()})


def price_of(settings: Mapping[str, Any], model: str, server: str) -> Price | None:
    """The one that is given, else OpenAI's list price of its own model; None where neither is known.

    Raises UsageError where one of the two is given and the other not known.
    """
    listed = LISTED.get(re.sub(r"-\d{4}-\d\d-\d\d$", "", model)) if server == OPENAI else None
    of_list = dict(zip(("price_in", "price_out"), listed or (), strict=False))
    known = {name: settings.get(name, of_list.get(name)) for name in ("price_in", "price_out")}
    lacking = [name for name, price in known.items() if price is None]
    if len(lacking) == 1:
        raise UsageError(
            f"{model}: one price is given and {lacking[0]} is not; give both, or {lacking[0]}=0 where it costs nothing"
        )
    return None if lacking else Price(known["price_in"], known["price_out"])
