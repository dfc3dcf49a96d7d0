"""A worker: one process with one model that does what the driver puts into its inbox, until the driver is gone.

It fits, adapts a group of users, plans batches, answers shards and measures effects by the functions that a run in one process
calls. Before it loads the model it makes sure that it sees the store and the data that the driver sees.
"""

from __future__ import annotations

import ctypes
import os
import secrets
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.data import Example, Labelled
from harness.errors import DataMissing, HarnessError, UserFailed
from harness.fit.artifacts import ArtifactStore
from harness.grid.folder import Session, names, put, take
from harness.method import Fitted
from harness.records import provenance
from harness.records.version import VERSION
from harness.run.cell import Cell
from harness.run.console import Console

if TYPE_CHECKING:
    from harness.engine.model import LanguageModel
    from harness.fit.states import Shared, Users
    from harness.run.answers import Asked
    from harness.run.steps import Answered
    from harness.run.system import ModelSystem

BEAT_SECONDS = 2.0
PATIENCE_SECONDS = 60.0
"""Without a sign of life of the driver, after which a worker ends; the other way round it is taken for dead."""
WAIT_SECONDS = 0.02
KEPT = 50_000
"""Prompts that the worker which planned a cell keeps encoded for answering them."""


def work(
    root: Path, rank: int, parent: int | None, jobs: Callable[[], list[list[Cell]]], load: Callable[[], Any]
) -> int:
    """Be worker `rank` of the grid in `root` until its driver ends; the exit code.

    `jobs` makes all cells of the command, `load` the model. Ends with process `parent`, where one is given.
    """
    if parent is not None:
        _end_with(parent)
    plan = take(root / "plan.json")
    if plan is None:
        raise DataMissing(
            f"{root} holds no plan.json that this machine ({socket.gethostname()}) can read; give a shared path"
        )
    session = Session(root, plan["session"])
    life = _Life(session, rank, parent)
    try:
        life.begin()
        try:
            cells = _checked(plan, session, jobs)
            lm = load()
        except HarnessError as error:
            life.say("refused", line=str(error), code=error.exit_code)
            return error.exit_code
        identity = {"name": lm.name, "source": lm.source, "revision": lm.revision, "dtype": lm.dtype}
        identity |= {"parameters": lm.parameters, "heads": lm.heads, "device_type": lm.device.type, "version": VERSION}
        life.say("ready", identity=identity, hardware=provenance.hardware(lm))
        _Worker(life, cells, lm, ArtifactStore(Path(plan["store"]))).serve()
    except FileNotFoundError:
        if session.folder.exists():
            raise
    return 0  # the driver has ended


def _end_with(parent: int) -> None:
    """Have the kernel end this process with its parent, where it can; elsewhere the heartbeat notices."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != parent:  # it died before that
        os._exit(1)


def _checked(plan: Mapping[str, Any], session: Session, jobs: Callable[[], list[list[Cell]]]) -> list[list[Cell]]:
    """The cells, read from data that is the driver's. Raises DataMissing for what this machine does not see."""
    who = f"worker on {socket.gethostname()}"
    if not Path(plan["cwd"]).is_dir():
        raise DataMissing(
            f"{who}: no folder {plan['cwd']}, in which the command was given; it must be on a shared path"
        )
    os.chdir(plan["cwd"])
    if plan["version"] != VERSION:
        raise DataMissing(f"{who} has version {VERSION} of the harness, the driver {plan['version']}; install the same")
    store = Path(plan["store"])
    if take(store / ".grid" / plan["session"]) != plan["session"]:
        raise DataMissing(
            f"{who} does not see the driver's store {store}; set HARNESS_CACHE to a folder on a shared path"
        )
    all_jobs = jobs()
    for cell in (cell for job in all_jobs for cell in job):
        with suppress(Exception, SystemExit):  # whether a cell that cannot be read runs, the driver knows
            assert cell.items
    while (given := take(session.data)) is None:
        if not session.folder.exists():
            raise FileNotFoundError(session.folder)
        time.sleep(WAIT_SECONDS)
    cells = [all_jobs[number] for number in given["chosen"]]
    for job, files, fingerprints in zip(cells, given["files"], given["fingerprints"], strict=True):
        for cell, file, fingerprint in zip(job, files, fingerprints, strict=True):
            if files_of(cell) != file:
                raise DataMissing(
                    f"{who}: the file of {cell.method_name} or {cell.task_name} is not as the driver read it; leave it as it is while "
                    "the command runs, on a shared path"
                )
            if cell.items and cell.task.fingerprint(cell.selection) != fingerprint:
                raise DataMissing(f"{who}: the data of {cell.task_name} is not the driver's; give it on a shared path")
    return cells


def files_of(cell: Cell) -> list[str | None]:
    """Hashes of the files of a method and a task that are not registered, as the record has them."""
    return [cell.method_source, cell.task_options.get("source_sha256")]


class _Life:
    """That the worker lives, what it is at, and what it has to say."""

    def __init__(self, session: Session, rank: int, parent: int | None) -> None:
        self.session, self.rank, self.parent = session, rank, parent
        self.name = f"{rank}-{secrets.token_hex(4)}"
        self.at: list[int] | None = None
        """The shard, and the unit in it."""
        self.job: tuple[str, int, int] | None = None
        """A progress bar."""
        self._said = 0
        self._lock = threading.Lock()

    def begin(self) -> None:
        self.session.inbox(self.name).mkdir(parents=True)
        self.beat()
        self.say("starting")
        threading.Thread(target=self._live, daemon=True).start()

    def beat(self) -> None:
        if not self.session.folder.exists():  # and is not made again
            raise FileNotFoundError(self.session.folder)
        content = {"rank": self.rank, "host": socket.gethostname(), "pid": os.getpid(), "at": self.at, "job": self.job}
        put(self.session.beat(self.name), {**content, "time": time.time()})

    def is_at(self, shard: int, unit: int) -> None:
        """On disk before the unit begins, so that the driver knows what killed this worker."""
        self.at = [shard, unit]
        self.beat()

    def say(self, kind: str, **content: Any) -> None:
        with self._lock:
            self._said += 1
            who = {"kind": kind, "worker": self.name, "rank": self.rank}
            path = self.session.events / f"{self.name}.{self._said:06d}.json"
        if not self.session.folder.exists():
            raise FileNotFoundError(self.session.folder)
        put(path, {**who, **content})

    def _live(self) -> None:
        heard, last = time.monotonic(), None
        while True:
            time.sleep(BEAT_SECONDS)
            seen = take(self.session.driver)
            if seen is not None and seen != last:
                heard, last = time.monotonic(), seen
            orphan = self.parent is not None and os.getppid() != self.parent
            if orphan or not self.session.folder.exists() or time.monotonic() - heard > PATIENCE_SECONDS:
                os._exit(0)
            try:
                self.beat()
            except OSError:
                continue


class _Relay(Console):
    """What a run says here, the driver says."""

    def __init__(self, life: _Life) -> None:
        self.life, self.said = life, list[str]()

    def say(self, line: str) -> None:
        self.said.append(line)

    def progress(self, label: str, done: int, total: int) -> None:
        self.life.job = (label, done, total)


class _Worker:
    """The model, and the cells it has work for."""

    def __init__(self, life: _Life, jobs: Sequence[Sequence[Cell]], lm: LanguageModel, store: ArtifactStore) -> None:
        self.life, self.lm, self.store = life, lm, store
        self.cells = {(j, p): cell for j, job in enumerate(jobs) for p, cell in enumerate(job)}
        self.opened: dict[tuple[int, int], _OpenCell] = {}

    def serve(self) -> None:
        """Until the session's folder is gone."""
        inbox = self.life.session.inbox(self.life.name)
        while True:
            waiting = names(inbox)
            if not waiting:
                time.sleep(WAIT_SECONDS)
                continue
            path = inbox / waiting[0]
            task = take(path)
            if task is None:  # withdrawn by the driver, or a part of it
                path.unlink(missing_ok=True)
                continue
            relay = _Relay(self.life)
            start = time.perf_counter()
            try:
                value = self._do(task, relay)
            except HarnessError as error:
                self.life.say("failed", task=task["task"], line=str(error), code=error.exit_code, said=relay.said)
            except FileNotFoundError:
                if self.life.session.folder.exists():
                    self._broke(task)
                    raise
                return
            except BaseException:
                self._broke(task)
                raise
            else:
                seconds = time.perf_counter() - start
                self.life.say("done", task=task["task"], value=value, said=relay.said, seconds=seconds)
            self.life.at = self.life.job = None
            path.unlink()

    def _broke(self, task: Mapping[str, Any]) -> None:
        """An error that is no message for a user. Who knows what it left behind: this process ends, another takes its place."""
        self.life.say("broke", task=task["task"], trace=traceback.format_exc(), at=self.life.at)

    def _do(self, task: Mapping[str, Any], relay: Console) -> Any:
        act: Callable[[Mapping[str, Any], Console], Any] = getattr(self, f"_{task['kind']}")
        return act(task, relay)

    def _cell(self, task: Mapping[str, Any], point: int | None = None) -> _OpenCell:
        key = (task["job"], task["point"] if point is None else point)
        if key not in self.opened:
            path = self.life.session.learnt(*key)
            learnt = take(path)
            if (
                learnt is None
            ):  # the driver has ended; without what was learnt other answers would be left to its next life
                raise FileNotFoundError(path)
            self.opened[key] = _OpenCell(self.cells[key], self.lm, self.store, learnt)
        return self.opened[key]

    def _fit(self, task: Mapping[str, Any], relay: Console) -> dict[str, Any]:
        from harness.fit.states import shared_state

        shared = shared_state(self.lm, self.cells[task["job"], task["point"]], self.store, relay)
        return {"key": shared.key, "state": shared.state is not None}

    def _adapt(self, task: Mapping[str, Any], relay: Console) -> dict[str, str | None]:
        """Of the users without a state: why, or None where there is nothing to say."""
        from harness.fit.states import Shared, Users

        cell = self.cells[task["job"], task["point"]]
        shared = Shared(self.store.made(task["shared"]) if task["state"] else None, task["shared"])
        if task["users"] not in self.adapting:
            self.adapting.clear()
            self.adapting[task["users"]] = Users.of(self.lm, cell, shared.key)
        users = self.adapting[task["users"]]
        states = users.adapt(task["first"], self.lm, cell, shared, self.store, relay)
        return {
            user: None if state is None else str(state)
            for user, state in states.items()
            if not isinstance(state, Fitted)
        }

    @cached_property
    def adapting(self) -> dict[str, Users]:
        """The users of the cell that is adapted to, by their key: one entry."""
        return {}

    def _plan(self, task: Mapping[str, Any], relay: Console) -> list[list[str]]:
        return self._cell(task).plan(relay)

    def _answer(self, task: Mapping[str, Any], relay: Console) -> dict[str, Any]:
        """The units' batches as a file, and its name."""
        units = [(tuple(unit["ids"]), unit["points"]) for unit in task["units"]]
        cells = {point: self._cell(task, point) for _, points in units for point in points}
        self.life.is_at(task["shard"], 0)
        left = [len(ids) * len(points) for ids, points in units]
        found, unit = [], 0
        for point, ids, batch in answer(units, cells, self.lm, relay):
            found.append(
                {
                    "hash": task["hashes"][str(point)],
                    "whole": ids,
                    "samples": batch.samples,
                    "costs": {**batch.costs, "worker": self.life.rank},
                    "peak": batch.peak_memory_bytes,
                }
            )
            left[unit] -= len(batch.samples)
            if left[unit] <= 0 and unit + 1 < len(left):
                left[unit + 1] += left[unit]
                unit += 1
                self.life.is_at(task["shard"], unit)
        name = f"{task['hashes'][str(units[0][1][0])]}-{task['shard']}-{self.life.name}.json"
        put(self.life.session.results / name, found)
        return {"file": name}

    def _effect(self, task: Mapping[str, Any], relay: Console) -> dict[str, Any] | None:
        effect = self._cell(task).effect(task["samples"], task["largest"], relay)
        return None if effect is None else asdict(effect)


def answer(
    units: Sequence[tuple[tuple[str, ...], Sequence[int]]],
    cells: Mapping[int, _OpenCell],
    lm: LanguageModel,
    console: Console,
) -> Iterator[tuple[int, list[str], Answered]]:
    """Batches as they are answered: (point, ids of the batch's unit, batch). A unit whose batch was halved comes in parts.

    Several points go on in step, as in a sweep in one process.
    """
    from harness.run.steps import answered
    from harness.run.together import Joint

    steps: dict[int, Iterator[Answered]] = {}
    whole = {i: list(ids) for ids, _ in units for i in ids}
    joint = Joint() if len(cells) > 1 else None
    for point, cell in cells.items():
        own = [list(ids) for ids, points in units if point in points]
        items = [cell.by_id[i] for ids in own for i in ids]
        steps[point] = answered(cell.cell, cell.system(own, console, joint.make if joint else None), items)
    while steps:
        for point, step in list(steps.items()):
            batch = next(step, None)
            if batch is None:
                del steps[point]
            else:
                yield point, whole[batch.samples[0].id], batch


class _Planned(Exception):
    """The batches are planned; none of them is to run."""


class _OpenCell:
    """A cell with what was learnt for it, ready for parts of it to be answered."""

    def __init__(self, cell: Cell, lm: LanguageModel, store: ArtifactStore, learnt: Mapping[str, Any]) -> None:
        from harness.fit.states import Shared

        self.cell, self.lm, self.store = cell, lm, store
        self.others: Mapping[str, str | None] = learnt.get("others", {})
        key = learnt.get("shared")
        self.shared: Shared = Shared(store.made(key) if key and learnt.get("state") else None, key)
        self.encoded: dict[str, Asked | HarnessError] = {}
        """Of the prompts not answered yet, where this worker planned the cell."""

    @cached_property
    def by_id(self) -> Mapping[str, Labelled]:
        return {item.example.id: item for item in self.cell.items}

    @cached_property
    def personal(self) -> Mapping[str, Fitted | UserFailed | None]:
        from harness.fit.states import Users

        if not self.cell.method.adapts():
            return {}
        return _States(Users.of(self.lm, self.cell, self.shared.key), self.store, self.others)

    def system(
        self, planned: list[list[str]], console: Console, make: Callable[..., ModelSystem] | None = None
    ) -> ModelSystem:
        from harness.run.batches import Batching
        from harness.run.cell import generation_of_cell

        batching = Batching(self.cell.settings.batch_size, planned)
        options: dict[str, Any] = {"shared": self.shared.state, "personal": self.personal, "batching": batching}
        made = make or _remembering(self.encoded)
        return made(self.lm, self.cell.method, generation_of_cell(self.cell), **options)

    def plan(self, console: Console) -> list[list[str]]:
        """The batches of all items."""
        system = self.system([], console)

        def planned() -> None:
            raise _Planned

        system.batching.whole, system.batching.changed = True, planned
        try:
            for _ in self.cell.task.respond(system, self.cell.items):
                break
        except _Planned:
            return system.batching.planned
        raise HarnessError(f"task {self.cell.task_name} answers without batches, which a grid cannot share out")

    def effect(self, samples: Sequence[tuple[str, str]], largest: int, console: Console) -> Any:
        system = self.system([[""] * largest], console)
        examples = [self.by_id[i].example for i, _ in samples]
        return system.effect(examples, [response for _, response in samples])


class _States(Mapping[str, Fitted | UserFailed | None]):
    """What was learnt of each user, read when it is asked for."""

    def __init__(self, users: Users, store: ArtifactStore, others: Mapping[str, str | None]) -> None:
        self.keys_of, self.others = users.keys, others
        self._read = lru_cache(1024)(store.made)

    def __getitem__(self, user: str) -> Fitted | UserFailed | None:
        if user in self.others:
            why = self.others[user]
            return None if why is None else UserFailed(why)
        return self._read(self.keys_of[user])

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys_of)

    def __len__(self) -> int:
        return len(self.keys_of)


def _remembering(encoded: dict[str, Asked | HarnessError]) -> Callable[..., ModelSystem]:
    """Systems that encode a prompt once, for planning and for answering."""
    from harness.run.system import ModelSystem

    class Remembering(ModelSystem):
        def _try(self, example: Example) -> Asked | HarnessError:
            found = encoded.pop(example.id, None) or super()._try(example)
            if not self.batching.planned and len(encoded) < KEPT:
                encoded[example.id] = found
            return found

    return Remembering
