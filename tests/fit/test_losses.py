"""Losses under variants: of the whole stream, and kept by what was scored."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from harness.edits import AddVector, Replace
from harness.engine.decode import Decoder
from harness.fit.artifacts import ArtifactStore
from harness.fit.kit import ModelKit
from harness.plan import DECODE, At, Edit, LoRA, Plan, Site, Stream
from harness.run.contract import random_lm, toy_examples

SITE = Site(1, "block_out")


def _adapter(key: str, seed: int, width: int) -> LoRA:
    draw = torch.Generator().manual_seed(seed)
    down, up = (torch.randn(size, generator=draw, dtype=torch.float64) for size in ((2, width), (width, 2)))
    return LoRA(key, {"model.layers.0.self_attn.q_proj": (down, up)})


@pytest.mark.parametrize("kept", [False, True], ids=["alone", "with beginnings kept"])
def test_losses_are_of_the_stream_with_its_adapters_and_edits(kept: bool) -> None:
    lm, items = random_lm(), toy_examples(2)
    kit, width = ModelKit(lm, max_new_tokens=4), lm.sites.width
    edit = AddVector(SITE, torch.ones(width, dtype=torch.float64), 2.0, DECODE)
    prompt, target = items[0].example.prompt(), items[0].reference
    adapters = [(), (_adapter("a", 1, width),), (_adapter("b", 2, width), _adapter("c", 3, width))]
    plans = [Plan((Stream(prompt, adapters=own),)) for own in adapters]
    if kept:
        with kit.prompts_kept():
            found = kit.losses(plans, [target] * 3, [(), (edit,)])
    else:
        found = kit.losses(plans, [target] * 3, [(), (edit,)])
    for row, own in zip(found, adapters, strict=True):
        for loss, edits in zip(row, ((), (edit,)), strict=True):
            request, answer = kit.reference(Plan((Stream(prompt, edits, own),)), target, "alone")
            (alone,) = Decoder(lm).score([request], [answer])
            assert float(loss) == pytest.approx(-sum(alone.logprobs) / len(answer), rel=1e-9)
    assert len({round(float(loss), 6) for loss in found.flatten()}) == 6


def test_losses_under_other_vectors_or_adapters_are_not_taken_from_a_checkpoint(tmp_path: Path) -> None:
    """Vectors that differ in their last digits, or in the middle of many numbers, look alike as text."""
    lm, items = random_lm(), toy_examples(2)
    width = lm.sites.width
    vector = (torch.arange(width, dtype=torch.float64) + 1).sin().round(decimals=2)
    stored = [vector.repeat(50, 1) for _ in range(2)]
    stored[1][20] = -vector
    edits: list[Edit] = [AddVector(SITE, vector), AddVector(SITE, vector + 3e-6)]
    edits += [Replace(SITE, values, At((20,))) for values in stored]
    assert repr(edits[0]) == repr(edits[1]) and repr(edits[2]) == repr(edits[3])
    streams = [Stream(items[0].example.prompt(), adapters=own) for own in ((), (_adapter("a", 1, width),))]

    def losses(kit: ModelKit) -> list[float]:
        return [
            float(kit.losses([Plan((stream,))], [items[0].reference], [(edit,)]))
            for stream in streams
            for edit in edits
        ]

    keeps = ModelKit(lm, max_new_tokens=4, checkpoint=ArtifactStore(tmp_path).checkpoint("fit"))
    alone = losses(ModelKit(lm, max_new_tokens=4))
    assert len(set(alone)) == 8
    assert losses(keeps) == alone
    parts = sorted((tmp_path / "fit.partial").iterdir())
    assert losses(keeps) == alone and sorted((tmp_path / "fit.partial").iterdir()) == parts  # found, not made again
