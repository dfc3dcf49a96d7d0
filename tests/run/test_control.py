"""Controls change histories and nothing else."""

import pytest

from harness.errors import UsageError
from harness.run.control import controlled
from harness.task import Selection
from harness.tasks.lamp import Lamp4


@pytest.fixture(scope="module")
def items():
    return Lamp4().items(Selection("dev", limit=20))


def test_every_user_gets_the_history_of_another_and_keeps_the_rest(items):
    wrong = controlled(items, "wrong_user", 0)
    own = {item.example.user.id: item.example.user.history for item in items}
    given = {item.example.user.id: item.example.user.history for item in wrong}
    assert sorted(map(id, given.values())) == sorted(map(id, own.values()))
    assert all(given[name] is not own[name] for name in own)
    for before, after in zip(items, wrong, strict=True):
        assert (before.example.id, before.example.text, before.targets) == (
            after.example.id,
            after.example.text,
            after.targets,
        )
    assert [i.example.user for i in wrong] == [i.example.user for i in controlled(items, "wrong_user", 0)]


def test_shuffling_keeps_a_history_but_for_its_order(items):
    shuffled = controlled(items, "shuffled", 0)
    for before, after in zip(items, shuffled, strict=True):
        assert {id(r) for r in before.example.user.history} == {id(r) for r in after.example.user.history}
    assert any(b.example.user.history != a.example.user.history for b, a in zip(items, shuffled, strict=True))


def test_no_control_changes_nothing_and_one_user_has_no_other(items):
    assert controlled(items, "none", 0) is items
    with pytest.raises(UsageError, match="two users"):
        controlled(items[:1], "wrong_user", 0)
