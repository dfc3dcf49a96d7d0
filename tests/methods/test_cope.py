"""CoPe: the mix by hand on three tokens, what contrasts with what, and OPPU as the case without contrast."""

from __future__ import annotations

import math

import pytest
import torch

from harness.errors import HarnessError, UsageError
from harness.fit.kit import ModelKit
from harness.method import Fitted
from harness.methods.cope import CoPe
from harness.methods.oppu import OPPU
from harness.mix import PlausibleContrast
from harness.plan import StreamOutput
from harness.plugins.options import build_method
from harness.run.contract import random_lm, toy_examples

QUICK = {"lr": 1e-2, "batch_size": 2, "rank": 2, "epochs": 1, "collective_epochs": 1}


def _mixed(mix: PlausibleContrast, *distributions: tuple[float, ...]) -> list[float]:
    outputs = [StreamOutput(torch.tensor([[p]], dtype=torch.float64).log() + 7) for p in distributions]
    found: list[float] = mix(outputs).exp()[0, 0].tolist()
    return found


def test_the_mix_is_the_papers_on_three_tokens() -> None:
    user, base = (0.6, 0.36, 0.04), (0.8, 0.1, 0.1)
    kept = [0.6 / math.sqrt(0.8), 0.36 / math.sqrt(0.1)]  # .04 is less than a tenth of .6
    expected = [kept[0] / sum(kept), kept[1] / sum(kept), 0.0]
    assert _mixed(PlausibleContrast(0.5, 0.1), user, base) == pytest.approx(expected)
    assert _mixed(PlausibleContrast(0.0), user, base) == pytest.approx(user)
    assert _mixed(PlausibleContrast(0.0, 0.1), user, base) == pytest.approx([0.6 / 0.96, 0.36 / 0.96, 0])


def test_a_floor_keeps_what_is_not_plausible_as_the_released_code_does() -> None:
    user, base, floor = (0.6, 0.36, 0.04), (0.8, 0.1, 0.1), 0.01
    truncated = (0.6 / 0.96, 0.36 / 0.96, 0.0)
    scores = [(p + floor) / math.sqrt(q + floor) for p, q in zip(truncated, base, strict=True)]
    found = _mixed(PlausibleContrast(0.5, 0.1, floor), user, base)
    assert found == pytest.approx([score / sum(scores) for score in scores])


def test_the_user_is_contrasted_with_what_all_users_share() -> None:
    lm, train = random_lm(), toy_examples(4, seed=1)
    method = CoPe(**QUICK)
    shared = method.fit(ModelKit(lm), train)
    (personal,) = method.adapt(ModelKit(lm), [train[0].example.user], shared)
    assert isinstance(personal, Fitted)
    user, base = method.plan(train[0].example, shared, personal).streams
    assert user.prompt == base.prompt and user.adapters[:1] == base.adapters and len(user.adapters) == 2
    (without,) = CoPe(base="model").plan(train[0].example, shared, personal).streams[1:]
    assert without.adapters == ()
    (same,) = OPPU(**QUICK).plan(train[0].example, shared, personal).streams
    assert same == user
    alone = [len(stream.adapters) for stream in method.plan(train[0].example, shared, None).streams]
    assert alone == [1, 1]  # who has no history is contrasted with themselves


def test_what_cannot_be_meant_is_one_line() -> None:
    for wrong in ({"contrast": -1.0}, {"plausible": 2.0}, {"floor": 1.0}):
        with pytest.raises(UsageError, match=r"cope: contrast .*; allowed: contrast >= 0"):
            CoPe(**wrong)
    with pytest.raises(HarnessError, match="cope: no collective adapter was trained; run 'harness fit --method cope'"):
        CoPe().plan(toy_examples(1)[0].example, None, None)
    released = build_method(CoPe, "cope", "released", [])
    assert isinstance(released, CoPe) and (released.floor, released.batch_size) == (1e-8, 4)
