"""What a served model cannot do, said before there is a record."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

from harness.engine.model import LanguageModel
from harness.errors import UsageError
from harness.fit.artifacts import ArtifactStore
from harness.fit.states import Console, personal_states, shared_state
from harness.run.cell import Cell
from harness.run.served import ServedSystem
from harness.servers.model import ServedModel
from harness.task import Generation

SOME = 32
"""Examples whose plans are looked at."""


def check_served(lm: ServedModel, cell: Cell, generation: Generation, store: ArtifactStore, console: Console) -> None:
    """Raises UsageError where the server cannot run the cell.

    What the method learns of everyone, and of the first user, is made to know it; it is kept, so the run finds it.
    """
    if cell.task.reads_model:
        raise UsageError(
            f"{cell.task_name} reads the activations of a model, which a server does not give; {lm.name} is behind one: run it "
            "with a model on this machine"
        )
    model = cast(LanguageModel, lm)
    one = replace(cell, settings=replace(cell.settings, limit=1))
    shared = shared_state(model, cell, store, console)
    personal = personal_states(model, one, shared, store, console)
    examples = [item.example for item in cell.items[:SOME]]
    if cell.method.adapts():
        examples = [example for example in examples if example.user.id in personal.fitted()]
    ServedSystem(model, cell.method, generation, shared=shared.state, personal=personal.states).check(examples)
