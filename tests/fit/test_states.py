"""Under which keys fitted states are kept: what they were learnt from, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from harness.data import Example, User
from harness.errors import UsageError
from harness.fit.artifacts import ArtifactStore
from harness.fit.kit import ModelKit
from harness.fit.states import Shared, Users, personal_states, shared_key
from harness.method import Fitted, Kit, Method
from harness.methods.persona_vector import PersonaVector
from harness.plan import Plan, Stream
from harness.run.cell import Cell, Settings, grid
from harness.run.console import Console
from harness.run.contract import random_lm, toy_examples

LINE = {"input": "What now?", "target": "tea", "history": [{"input": f"Day {n}?", "output": "tea"} for n in range(3)]}
TASK = """
from harness.tasks.users import Users


class Mine(Users):
    name = "mine"

    def read(self):
        return [{{"user": user, "split": split, **{line!r}}} for user, split in (("ann", "dev"), ("bob", "train"))]
"""


@pytest.fixture
def users(tmp_path: Path) -> str:
    file = tmp_path / "mine.jsonl"
    file.write_text("\n".join(json.dumps({"user": user, **LINE}) for user in ("ann", "bob")))
    return f"users:{file}"


def _cell(task: str, *settings: str, method: str = "lora_p", **others: str) -> Cell:
    (cell,) = grid([method], [task], Settings(split=""), task_settings=settings, **others)  # type: ignore[arg-type]
    return cell


def _keys(task: str, *settings: str) -> set[str]:
    """Of each user's state."""
    lm = random_lm()
    return set(Users.of(lm, _cell(task, *settings), None).keys.values())


def test_what_was_learnt_of_pairs_in_other_words_is_learnt_again(users: str, tmp_path: Path) -> None:
    wording = tmp_path / "wording.jinja"
    wording.write_text("{{ input }} Be brief.")
    before = _keys(users), _keys(users, f"template={wording}")
    assert before == (_keys(users), _keys(users, f"template={wording}"))  # it is found again
    wording.write_text("{{ input }} Be kind.")
    after = _keys(users, f"template={wording}")
    assert len(before[0] | before[1] | after) == 6
    assert _keys(users, "max_new_tokens=64", "rubric=Rate {{ response }}") == before[0]  # what asks nothing else


def test_lamps_states_are_shared_by_runs_whose_options_ask_alike() -> None:
    lm = random_lm()
    written, scored = (Users.of(lm, _cell("lamp2m", f"answers={how}"), None) for how in ("written", "scored"))
    assert written.keys == scored.keys
    assert all("asked" not in made_from for made_from in written.made_from.values())


@dataclass(frozen=True)
class Noting(Method):
    """Notes something while it learns of users, for some of whom there is nothing to keep."""

    def adapt(self, kit: Kit, users: Sequence[User], shared: Fitted | None) -> list[Fitted | None]:
        kit.notes.append("a text was cut")
        return [Fitted() if user.id == "ann" else None for user in users]

    def plan(self, example: Example, shared: Fitted | None, personal: Fitted | None) -> Plan:
        return Plan((Stream(example.prompt()),))


def test_what_is_noted_while_users_are_learnt_of_reaches_the_record(users: str, tmp_path: Path) -> None:
    lm, store = random_lm(), ArtifactStore(tmp_path / "store")
    cell = replace(_cell(users), method_name="noting", method=Noting())
    for _ in range(2):  # made, and found again
        assert personal_states(lm, cell, Shared(), store, Console()).notes() == ["1 of 2 users: a text was cut"]
    (tmp_path / "bob.jsonl").write_text(json.dumps({"user": "bob", **LINE}))
    of_bob = replace(_cell(f"users:{tmp_path}/bob.jsonl"), method_name="noting", method=Noting())
    assert personal_states(lm, of_bob, Shared(), store, Console()).notes() == ["a text was cut"]


def test_a_tasks_file_that_changed_is_learnt_from_again(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(TASK.format(line=LINE))
    before = _keys(str(file))
    fit = _cell("lamp4", method="dps", fit_task=str(file))
    assert fit.fit_options["source_sha256"]
    key = shared_key(random_lm(), fit)
    assert (
        _keys(str(file)) == before and shared_key(random_lm(), _cell("lamp4", method="dps", fit_task=str(file))) == key
    )
    file.write_text(TASK.format(line=LINE) + "# and another way to read it\n")
    assert not _keys(str(file)) & before
    assert shared_key(random_lm(), _cell("lamp4", method="dps", fit_task=str(file))) != key


def test_a_shuffled_history_has_states_without_its_pairs_being_read(users: str) -> None:
    (cell,) = grid(["pag"], [users], Settings(split="", control="shuffled"))
    assert len(Users.of(random_lm(), cell, None).keys) == 2


def test_a_vector_of_history_is_of_users_who_have_one() -> None:
    items = toy_examples(4)
    bare = toy_examples(4, seed=3)
    for item in bare:
        object.__setattr__(item.example.user, "history", ())
    made, kit = PersonaVector(), ModelKit(random_lm())
    (pairs,) = made._pairs(kit, [*items, *bare]).values()
    assert [pair.user for pair in pairs] == [item.example.user.id for item in items]
    with pytest.raises(UsageError, match="none of its 4 train items has a user with a history to contrast with none"):
        made._pairs(kit, bare)
