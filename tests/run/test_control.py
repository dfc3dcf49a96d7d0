"""Controls change histories and nothing else."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest

from harness.data import User, each_once
from harness.engine.loading import load_model
from harness.errors import UsageError
from harness.fit.kit import ModelKit
from harness.method import Retrieval
from harness.plugins.options import build_method, rebuild_method
from harness.plugins.registry import method_class, model_row, task_class
from harness.records.store import find_runs, read_samples
from harness.run.cell import Cell, Settings
from harness.run.contract import random_lm, toy_examples
from harness.run.control import controlled
from harness.run.steps import run_cell
from harness.run.system import ModelSystem
from harness.task import Generation, Selection
from harness.tasks.lamp import Lamp4

RESULTS = Path(__file__).parents[2] / "results"


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


def test_each_question_keeps_its_own_history_when_it_is_shuffled(items):
    """Of a user whose earlier questions are the history, a later question's history has the answers to earlier ones."""
    history = items[0].example.user.history
    growing = [
        replace(item, example=replace(item.example, user=User("one", tuple(history[:count]))))
        for count, item in enumerate(items[:4])
    ]
    assert [len(item.example.user.history) for item in controlled(growing, "shuffled", 0)] == [0, 1, 2, 3]


@pytest.mark.parametrize("method", ["lora_p", "oppu", "reft", "perfit", "style_vector"])
def test_a_shuffled_history_is_refused_by_a_method_that_learns_from_its_pairs(items, method):
    shuffled = controlled(items, "shuffled", 0)
    users = [item.example.user for item in shuffled[:2]]
    made = build_method(method_class(method), method, None, ["rank=1"] if method in ("lora_p", "reft") else [])
    lm = random_lm()
    shared = made.fit(ModelKit(lm, max_new_tokens=4), toy_examples(2)) if made.fits() else None
    with pytest.raises(
        UsageError, match="whatever their order, so the control would change nothing; give --control wrong"
    ):
        made.adapt(ModelKit(lm, max_new_tokens=4), users, shared)


def test_a_shuffled_history_is_read_by_a_method_that_puts_it_into_the_prompt(items):
    shuffled = controlled(items, "shuffled", 0)
    drawn = Retrieval("random", k=2)
    assert [drawn.prompt(i.example).render() for i in items] != [drawn.prompt(i.example).render() for i in shuffled]
    assert [item.example.user.owner for item in shuffled] == [item.example.user.id for item in items]


def test_a_history_without_pairs_is_given_with_whose_it_is_so_that_a_control_reads_their_adapter(items):
    bare = [replace(i, example=replace(i.example, user=replace(i.example.user, pairs=()))) for i in items]
    for users in (items, bare):
        owner_of = {id(item.example.user.history): item.example.user.id for item in users}
        for item in controlled(users, "wrong_user", 0):
            assert item.example.user.owner == owner_of[id(item.example.user.history)] != item.example.user.id


def test_who_has_no_history_reads_no_adapter_of_their_own_either(items):
    """What was learnt elsewhere lies under their id, and with it the control would be the run itself for them."""
    bare = [
        items[0],
        *(replace(i, example=replace(i.example, user=User(i.example.user.id))) for i in items[1:3]),
        *items[3:],
    ]
    given = [item.example.user for item in controlled(bare, "wrong_user", 0)]
    assert [user.history for user in given[1:3]] == [(), ()]
    assert all(user.owner not in ("", user.id) for user in given)
    assert given[1].owner != given[2].owner


def test_an_item_is_given_as_much_history_as_it_has(tmp_path):
    """Of one's own users each item's history is what its user asked before it; each_once learns from the shortest."""
    lines = [{"user": f"u{user}", "input": f"mail {user} {n}", "target": "yes"} for n in range(4) for user in range(3)]
    lines += [{"user": "u0", "input": f"mail 0 {n}", "target": "yes"} for n in range(4, 7)]
    (tmp_path / "grow.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    own = task_class(f"users:{tmp_path}/grow.jsonl")().items(Selection("dev"))
    given = controlled(own, "wrong_user", 0)
    for before, after in zip(own, given, strict=True):
        mine, theirs = before.example.user, after.example.user
        assert (theirs.id, len(theirs.history)) == (mine.id, min(len(mine.history), 3)), "nobody else has more than 3"
        assert [len(theirs.pairs), theirs.owner != mine.id] == [len(theirs.history), True]
        assert all(item.document not in {one.document for one in mine.history} for item in theirs.history)
    assert [len(user.history) for user in each_once(item.example.user for item in given)] == [0, 0, 0]


def test_the_published_controls_ask_what_they_asked():
    """Where every user has one history, the whole of another's is given, whatever its length."""
    lm = load_model(model_row("tiny"), device="cpu")
    for task in ("lamp2m", "lamp4"):
        runs = find_runs(RESULTS, model="tiny", task=task, method="rag")
        (run,) = (run for run in runs if run.config.selection.control == "wrong_user")
        method = rebuild_method(method_class("rag"), run.config.method.options)
        system = ModelSystem(lm, method, Generation(run.config.sampling.max_new_tokens))
        given = controlled(task_class(task)().items(Selection("dev")), "wrong_user", run.config.sampling.seed)
        asked = {item.example.id: system.encode(item.example).ids for item in given[:20]}
        hashes = {id: hashlib.sha256(repr(ids).encode()).hexdigest()[:16] for id, ids in asked.items()}
        assert hashes == {sample.id: sample.prompt_hash for sample in read_samples(run.folder) if sample.id in asked}


@pytest.mark.parametrize("sizes", [(2, 2), (3, 2, 1), (1, 4, 2, 1), (1, 1, 1), (3, 1, 1)])
def test_users_of_equal_histories_get_one_that_is_not_their_own(items, sizes):
    """Of colleagues who share what they wrote each is as good as the other."""
    users = [
        User(
            f"{group}.{number}",
            tuple(replace(record, id=f"{number}/{record.id}") for record in items[group].example.user.history),
        )
        for group, size in enumerate(sizes)
        for number in range(size)
    ]
    asked = [replace(item, example=replace(item.example, user=user)) for item, user in zip(items, users, strict=False)]
    for seed in range(5):
        if 2 * max(sizes) > len(users):
            with pytest.raises(UsageError, match="another history for everyone, and 3 of 5 users have the same one"):
                controlled(asked, "wrong_user", seed)
            continue
        given = [item.example.user for item in controlled(asked, "wrong_user", seed)]
        assert sorted(user.owner for user in given) == sorted(user.id for user in users)
        assert all(user.owner.split(".")[0] != user.id.split(".")[0] for user in given)


def test_no_control_changes_nothing_and_one_user_has_no_other(items):
    assert controlled(items, "none", 0) is items
    with pytest.raises(UsageError, match="two users"):
        controlled(items[:1], "wrong_user", 0)


BEST = str(Path(__file__).parents[2] / "docs" / "examples" / "best_of_n.py")


@pytest.mark.parametrize(
    ("method", "settings", "control", "nothing"),
    [
        ("plain", (), "wrong_user", True),
        ("rag", ("k=0",), "shuffled", True),
        ("rag", ("retriever=random", "k=1"), "shuffled", False),
        ("rag", ("k=1",), "wrong_user", False),
        (BEST, ("k=0", "n=1"), "wrong_user", False),  # the history decides which answer is chosen
        (BEST, ("k=0", "n=1", "choose=likely"), "wrong_user", True),
    ],
)
def test_a_run_says_where_its_control_changed_nothing(method, settings, control, nothing, tmp_path, lm):
    made = build_method(method_class(method), method, None, settings)
    asked = Settings(limit=6, max_new_tokens=1, control=control, output_path=tmp_path, allow_noop=True)
    notes = run_cell(lm, Cell("mine", made, "lamp4", Lamp4(), asked)).record.notes
    assert any("changed nothing that mine asks; the numbers are those without it" in note for note in notes) == nothing
