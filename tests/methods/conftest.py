"""The model that methods are tried on."""

from __future__ import annotations

import pytest

from harness.engine.model import LanguageModel
from harness.run.contract import random_lm


@pytest.fixture
def lm() -> LanguageModel:
    """A small random chat model in float64, where equal is equal to rounding; a new one for each test, which may train it."""
    return random_lm()
