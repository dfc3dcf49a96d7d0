"""The model that runs are tried on."""

from __future__ import annotations

import pytest
import torch

from harness.engine.model import LanguageModel
from harness.run.contract import random_lm


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    """A small random chat model in float32, whose records can be named."""
    lm = random_lm(dtype=torch.float32)
    lm.revision = "random"
    return lm
