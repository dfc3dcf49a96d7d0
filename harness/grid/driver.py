"""The driver: plans, hands out, and alone writes records. It loads no model; workers do what a run needs one for.

A run's steps are those of `harness.run.steps`; in place of `Hands`, which has the model, stands `Remote`, which asks workers
and waits. The steps of all cells of a command go on in turns, so that no worker waits while one cell fits and another could
answer. Batches are merged in planned order, whatever order shards come back in.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, TypeVar, cast

from harness.data import Example
from harness.errors import HarnessError, UserFailed
from harness.fit.artifacts import ArtifactStore
from harness.fit.states import Personal, Shared, Users, shared_key
from harness.grid.folder import put
from harness.grid.pool import Pool
from harness.grid.results import Part
from harness.judge.judges import Judge
from harness.method import Fitted
from harness.records.schema import Serving
from harness.run.answers import Effect
from harness.run.batches import Batching
from harness.run.cell import Cell
from harness.run.compared import Compared
from harness.run.console import Console
from harness.run.steps import Answered, Hands, config_of

if TYPE_CHECKING:
    from harness.engine.model import LanguageModel

K = TypeVar("K", bound=Hashable)
R = TypeVar("R")


class Remote(Hands):
    """What a run of one cell needs a model for, asked of workers."""

    def __init__(self, pool: Pool, lm: LanguageModel, job: int, point: int, judge: Judge | None) -> None:
        self.pool, self.lm, self.job, self.point, self.judge = pool, lm, job, point, judge

    def hardware(self) -> dict[str, Any]:
        return {**self.pool.hardware, "workers": self.pool.by_rank}

    def fit(self, cell: Cell, store: ArtifactStore, console: Console) -> Generator[None, None, Shared]:
        if not cell.method.fits():
            return Shared()
        key = shared_key(self.lm, cell)
        found = yield from self.pool.wait(self.pool.ask("fit", self.job, self.point, once=("fit", key)))
        if found["key"] != key:
            raise HarnessError(
                f"{cell.method_name}: a worker fitted on other data or other files than the driver read; give them on a shared path, "
                "and leave them as they are while the command runs"
            )
        return Shared(store.made(key) if found["state"] else None, key)

    def learn(
        self, cell: Cell, store: ArtifactStore, console: Console
    ) -> Generator[None, None, tuple[Shared, Personal]]:
        shared = yield from self.fit(cell, store, console)
        has_state = shared.state is not None
        others: dict[str, str | None] = {}
        personal = Personal()
        if cell.method.adapts():
            users = Users.of(self.lm, cell, shared.key)
            task = {"shared": shared.key, "state": has_state, "users": users.key}
            chores = [
                self.pool.ask("adapt", self.job, self.point, once=("adapt", users.key, first), first=first, **task)
                for first in users.starts(self.lm)
            ]
            for number, chore in enumerate(chores):
                console.progress("adapting users", number * users.starts(self.lm).step, len(users.users))
                others |= yield from self.pool.wait(chore)
            console.progress("adapting users", len(users.users), len(users.users))
            states: dict[str, Fitted | UserFailed | None] = {}
            for user, key in users.keys.items():
                why = others.get(user)
                states[user] = (UserFailed(why) if why is not None else None) if user in others else store.made(key)
            personal = users.personal(states, store)
        learnt = {"shared": shared.key, "state": has_state, "others": others}
        put(self.pool.session.learnt(self.job, self.point), learnt)
        return shared, personal

    def answer(
        self, cell: Cell, shared: Shared, personal: Personal, batching: Batching, console: Console
    ) -> Iterator[list[Answered]]:
        pool, hash8 = self.pool, config_of(self.lm, cell, self.judge).hash8()
        pool.hashes[self.job, self.point] = hash8
        self.largest = 1
        if not batching.planned:
            chore = pool.ask("plan", self.job, self.point)
            while not chore.done:
                yield []
            if chore.error is not None:
                raise chore.error
            batching.planned[:] = chore.value
            batching.changed()
        self.largest = max(batching.sizes(), default=1)
        pool.offer(self.job, self.point, [ids for ids in batching.planned if not batching.done.issuperset(ids)])
        number = 0
        while number < len(batching.planned):
            if self.job in pool.scheduler.hopeless:
                raise HarnessError(pool.scheduler.hopeless[self.job])
            ready: list[tuple[tuple[str, ...], Part, Answered]] = []
            changed = False
            while number < len(batching.planned):
                ids = tuple(batching.planned[number])
                if batching.done.issuperset(ids):
                    number += 1
                    continue
                parts = pool.results.found(hash8, ids)
                if parts is None:
                    break
                if [part.ids for part in parts] != [ids]:  # memory did not suffice, or a sample of it kills workers
                    batching.planned[number : number + 1] = [list(part.ids) for part in parts]
                    changed = True
                for part in parts:
                    samples = [replace(sample, batch=number) for sample in part.samples]
                    ready.append((ids, part, Answered(samples, part.costs, part.peak)))
                    number += 1
            if changed:
                batching.changed()
            pool.moved = pool.moved or bool(ready)
            yield [batch for _, _, batch in ready]
            for ids, part, _ in ready:
                pool.results.merged(hash8, part, ids)

    def serving(self, batches: Mapping[str, Mapping[str, int | float]], before: Serving | None) -> Serving | None:
        return None

    def effect(self, samples: Sequence[tuple[Example, str]], kept: Compared) -> Generator[None, None, Effect | None]:
        """One worker's chore, given out again whole where it dies, so that `kept` is left alone."""
        asked = [(example.id, response) for example, response in samples]
        chore = self.pool.ask("effect", self.job, self.point, samples=asked, largest=self.largest)
        found = yield from self.pool.wait(chore)
        return None if found is None else Effect(**found)


def first_worker(pool: Pool) -> LanguageModel:
    """Waits for one, and gives what stands for its model where only its name and its numbers are asked for."""
    pool.turn()
    import scipy.special  # noqa: F401  for the metrics at the end: now there is time

    while pool.identity is None:
        pool.turn()
    known = {**pool.identity, "device": SimpleNamespace(type=pool.identity["device_type"])}
    return cast("LanguageModel", SimpleNamespace(**known))


def drive(
    pool: Pool, steps: Mapping[K, Generator[None, None, R]], over: Callable[[K], None]
) -> dict[K, R | BaseException]:
    """What each of the steps returned or raised; they go on in turns while workers work. `over` is told of each that ends."""
    done: dict[K, R | BaseException] = {}
    try:
        while len(done) < len(steps):
            for key, step in steps.items():
                if key in done:
                    continue
                try:
                    next(step)
                except StopIteration as end:
                    done[key] = end.value
                except (Exception, SystemExit) as error:
                    done[key] = error
                if key in done:
                    over(key)
            if len(done) < len(steps):
                pool.turn()
    finally:
        for step in steps.values():
            step.close()
    return done
