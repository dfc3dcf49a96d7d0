"""What `harness run --export` writes beside a record."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from harness.engine.model import LanguageModel
    from harness.records.store import Outcome
    from harness.run.cell import Cell
    from harness.run.console import Console


def export_peft(lm: LanguageModel, cell: Cell, done: Outcome, console: Console) -> None:
    """Reads the adapters where the run kept them; trains those that are gone from there."""
    from harness.engine.weights.adapters import write_adapter
    from harness.files import names_of, replacing_folder, write_names
    from harness.fit.artifacts import ArtifactStore
    from harness.fit.states import personal_states, shared_state

    store = ArtifactStore()
    shared = shared_state(lm, cell, store, console)
    users = personal_states(lm, cell, shared, store, console).fitted()
    names = names_of(users)
    states = {"collective": shared.state, **{f"users/{names[user]}": state for user, state in users.items()}}
    trained = {name: state for name, state in states.items() if state is not None and state.tensors}
    with replacing_folder(done.folder / "peft") as draft:
        for name, state in trained.items():
            (draft / name).mkdir(parents=True)
            write_adapter(state, draft / name, lm)
        if users:
            (draft / "users").mkdir(exist_ok=True)
            write_names(draft / "users", names)
    console.say(f"wrote {len(trained)} adapters to {done.folder / 'peft'}")


def export_lamp(done: Outcome, console: Console) -> None:
    from harness.records.store import read_samples
    from harness.tasks import lamp_export

    if done.record.health.errors:
        console.say("warning: no predictions.json, since the official evaluator wants an answer to every item")
        return
    path = done.folder / "predictions.json"
    lamp_export.export_lamp(done.record.config.task.name, read_samples(done.folder), path)
    console.say(f"for the official evaluator: {path}")
