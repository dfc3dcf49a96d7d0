"""What training for a user brings on tiny, in the records that lie in results/."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.records.store import find_runs, read_samples
from harness.statistics.intervals import Difference, paired_difference
from harness.task import Selection
from harness.tasks.lamp import Lamp, Lamp2M, Lamp4

RESULTS = Path(__file__).resolve().parents[2] / "results"
LONG = 20
"""Items of history from which it is long: those of some two users in five."""


def _gain(task: type[Lamp], metric: str, method: str, control: str) -> Difference:
    """Over `plain`, of users with a long history."""
    runs = {
        (r.config.method.name, r.config.selection.control): r.folder
        for r in find_runs(RESULTS)
        if r.config.task.name == task.name
        and r.config.model.name == "tiny"
        and r.config.selection.users is None
        and r.config.method.preset is None
        and r.config.method.name in ("plain", method)
    }
    trained, plain = (
        {sample.id: sample for sample in read_samples(runs[name])} for name in ((method, control), ("plain", "none"))
    )
    long = [i.example for i in task(data="lamp-mini").items(Selection("dev")) if len(i.example.user.history) >= LONG]
    scores = ([samples[example.id].metrics[metric] for example in long] for samples in (trained, plain))
    return paired_difference(*scores, [example.user.id for example in long])


@pytest.mark.parametrize(
    ("method", "task", "metric"),
    [("perfit", Lamp2M, "correct"), ("perfit", Lamp4, "rouge1"), ("oppu", Lamp4, "rouge1")],
)
def test_training_on_a_long_history_helps_its_user_more_than_another_users_adapter_does(
    task: type[Lamp], metric: str, method: str
) -> None:
    own, other = (_gain(task, metric, method, control) for control in ("none", "wrong_user"))
    assert own.n >= 60 and own.low > 0.08
    assert own.mean > other.mean + 0.05
