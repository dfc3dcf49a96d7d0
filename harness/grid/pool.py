"""The workers of a grid as its driver sees them: what each is at, what came back, who is gone and what is given out next."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import threading
import time
from collections import Counter
from collections.abc import Generator, Hashable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from harness.errors import HarnessError
from harness.files import Lock, writing
from harness.fit.artifacts import ArtifactStore
from harness.grid.executors import Executor, Others
from harness.grid.folder import Session, names, put, take
from harness.grid.mates import Chore, Mate, why_unlike
from harness.grid.results import Results, given_up
from harness.grid.scheduler import TARGET_SECONDS, TRIES, Scheduler, Shard, Unit
from harness.grid.worker import BEAT_SECONDS, PATIENCE_SECONDS, files_of
from harness.records.version import VERSION
from harness.run.cell import Cell
from harness.run.console import Console

AHEAD = 2
"""Shards a worker has at once, so that none waits for the driver."""
WAIT_SECONDS = 0.02

Jobs = Sequence[Sequence[Cell]]
"""The cells of a command: of a sweep, all points of a task are one job, as they are answered together."""


class Pool:
    """Workers, what they are at, and what came back."""

    def __init__(
        self,
        root: Path,
        executor: Executor,
        plan: Mapping[str, Any],
        console: Console,
        store: ArtifactStore,
        *,
        mixed_hardware: bool = False,
        target_seconds: float = TARGET_SECONDS,
    ) -> None:
        self.root, self.executor, self.console, self.store = root, executor, console, store
        self.session = Session(root, secrets.token_hex(4))
        self.scheduler = Scheduler(executor.workers, target_seconds)
        self.jobs: Jobs = ()
        self.plan, self.mixed = dict(plan), mixed_hardware
        self.mates: dict[str, Mate] = {}
        self.chores: list[Chore] = []
        self.once: dict[Hashable, Chore] = {}
        self.results = Results(self.session.results)
        self.identity: dict[str, Any] | None = None
        self.hardware: dict[str, Any] = {}
        self.by_rank: dict[str, Any] = {}
        """Rank -> what it computes on; records hold this very dict, so that they know of workers that came later."""
        self.hashes: dict[tuple[int, int], str] = {}
        self.planned: dict[int, dict[int, list[tuple[str, ...]]]] = {}
        """Job -> its points that are planned -> their batches; a job goes out when all of its points are there."""
        self.over: set[tuple[int, int]] = set()
        self.done_samples = self.all_samples = 0
        self.moved = self.finished = False
        self.started = time.time()
        self._numbers = iter(range(1, 1 << 62))
        self._ranks_gone: set[int] = set()
        self._never_ready: Counter[int] = Counter()
        """Rank -> how many of its workers, one after the other, ended before they had a model."""
        self._names_gone: set[str] = set()
        """Workers taken for dead: what they say on shared files that show it late is not heard."""
        self._over, self._heart = threading.Event(), threading.Thread(target=self._live, daemon=True)

    # starting and stopping

    def __enter__(self) -> Pool:
        """Workers begin; they read the data while the driver does, and load no model before it gives them work.

        Raises UsageError where another driver has the same command.
        """
        self._anew = not self.root.parent.parent.exists()
        with writing(self.root):
            self.root.mkdir(parents=True, exist_ok=True)
        self._lock = Lock.take(self.root / "lock")
        try:
            self._begin()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _begin(self) -> None:
        self._sweep("results", "logs")  # workers of earlier lives of the driver end when they notice
        self.session.begin()
        self.results.begin()
        token = self.store.root / ".grid" / self.session.name
        put(token, self.session.name)
        put(
            self.root / "plan.json",
            {
                **self.plan,
                "session": self.session.name,
                "cwd": os.getcwd(),
                "store": str(self.store.root.resolve()),
                "version": VERSION,
                "workers": self.executor.workers,
            },
        )
        self._beat()
        self._heart.start()
        for rank in range(self.executor.workers):
            self.executor.start(rank)

    def give(self, jobs: Jobs, chosen: Sequence[int]) -> None:
        """The work there is: `chosen` are the jobs by their numbers among all of the command, where some cannot run."""
        self.jobs = jobs
        fingerprints = [[cell.task.fingerprint(cell.selection) for cell in job] for job in jobs]
        files = [[files_of(cell) for cell in job] for job in jobs]
        put(self.session.data, {"chosen": list(chosen), "fingerprints": fingerprints, "files": files})

    def __exit__(self, *_: object) -> None:
        self._over.set()
        with suppress(RuntimeError):  # it had not begun
            self._heart.join()
        gone = self.session.folder.with_name(f".{self.session.name}")
        with suppress(OSError):  # somebody has removed it
            os.replace(self.session.folder, gone)  # at once: a worker that looks finds nothing and ends
        shutil.rmtree(gone, ignore_errors=True)
        try:
            self.executor.stop()
        finally:
            results = self.session.results
            nothing = not self.jobs and not (results.is_dir() and names(results))  # came of it, so nothing goes on
            if self.finished or nothing:
                self._sweep()
            self._lock.release()
        (self.store.root / ".grid" / self.session.name).unlink(missing_ok=True)
        for folder in (self.root, self.root.parent, self.store.root / ".grid"):
            with suppress(OSError):  # where something is in it
                folder.rmdir()
        if self._anew and nothing:
            with suppress(OSError):
                self.root.parent.parent.rmdir()

    def _sweep(self, *kept: str) -> None:
        """Remove what lies in the folder, but for these and the lock."""
        for old in self.root.iterdir() if self.root.is_dir() else ():
            if old.is_dir() and old.name not in kept:
                shutil.rmtree(old, ignore_errors=True)
            elif old.name not in (*kept, "lock"):
                old.unlink(missing_ok=True)

    def _live(self) -> None:
        while not self._over.wait(BEAT_SECONDS):
            with suppress(Exception):  # a job was over while it was counted; the next beat is soon
                self._beat()

    def _beat(self) -> None:
        if self.session.folder.exists():
            who = {"pid": os.getpid(), "host": socket.gethostname()}
            put(self.session.driver, {"time": time.time(), **who, **self.summary()})

    def summary(self) -> dict[str, Any]:
        """How far it is, for `harness grid status`."""
        left = self.scheduler.seconds_left()
        return {
            "started": self.started,
            "samples": [self.done_samples, self.all_samples],
            "running": len(self.scheduler.out),
            "done": self.shards_done,
            "waiting_batches": sum(len(j.waiting) + len(j.suspects) for j in list(self.scheduler.jobs.values())),
            "failed_samples": self.failed_samples,
            "workers": sum(mate.ready for mate in list(self.mates.values())),
            "seconds_left": left,
        }

    shards_done = failed_samples = 0

    # what the driver's steps ask for

    def ask(self, kind: str, job: int, point: int, *, once: Hashable = None, **task: Any) -> Chore:
        """Have a worker do something; with `once`, what is asked for a second time is the first one's."""
        if once is not None and once in self.once:
            return self.once[once]
        chore = Chore({"kind": kind, "job": job, "point": point, **task})
        if once is not None:
            self.once[once] = chore
        self.chores.append(chore)
        return chore

    def wait(self, chore: Chore) -> Generator[None, None, Any]:
        while not chore.done:
            yield None
        if chore.error is not None:
            raise chore.error
        return chore.value

    def offer(self, job: int, point: int, batches: Sequence[Sequence[str]]) -> None:
        """The batches of a cell that are to be answered."""
        self.planned.setdefault(job, {})[point] = [tuple(ids) for ids in batches]
        self.all_samples += sum(len(ids) for ids in batches)
        self._release(job)

    def is_over(self, job: int, point: int) -> None:
        """A cell is finished, or has failed: nobody waits for its batches any more."""
        self.over.add((job, point))
        points = range(len(self.jobs[job]))
        if all((job, p) in self.over for p in points):
            self.scheduler.drop(job)
        else:
            self._release(job)

    def _release(self, job: int) -> None:
        """Give out the job's units, once all of its points are planned or over."""
        points = self.planned.get(job, {})
        if job in self.scheduler.jobs or any(
            p not in points and (job, p) not in self.over for p in range(len(self.jobs[job]))
        ):
            return
        sharing: dict[tuple[str, ...], list[int]] = {}
        for number in range(max(map(len, points.values()), default=0)):
            for point, batches in sorted(points.items()):
                if number < len(batches) and (job, point) not in self.over:
                    ids = batches[number]
                    if (
                        self.hashes[job, point],
                        ids,
                    ) in self.results.parts:  # an earlier life of the driver had it answered
                        self.done_samples += len(ids)
                    else:
                        sharing.setdefault(ids, []).append(point)
        self.scheduler.add(Unit(job, ids, tuple(having)) for ids, having in sharing.items())
        self._progress()

    # one turn: what came back, who is gone, who gets what

    def turn(self) -> None:
        """Look once, and wait a little where nothing moved."""
        came = self._events()
        self._watch()
        gave = self._assign()
        self._give_up()
        if not (came or gave or self.moved):
            time.sleep(WAIT_SECONDS)
        self.moved = False

    def _events(self) -> bool:
        some = names(self.session.events)
        for name in some:
            path = self.session.events / name
            event = take(path)
            path.unlink()
            if event is not None:
                self._event(event)
        return bool(some)

    def _event(self, event: Mapping[str, Any]) -> None:
        name, kind = event["worker"], event["kind"]
        if name in self._names_gone:
            return
        mate = self.mates.setdefault(name, Mate(event["rank"], heard=time.monotonic()))
        for line in event.get("said", ()):
            self.console.say(line)
        if kind == "refused":
            self._refuse(name, mate, HarnessError(event["line"]), event["code"])
        elif kind == "ready":
            self._welcome(name, mate, event)
        elif kind == "broke":
            mate.trace, mate.blamed = event["trace"], _pair(event["at"])
        elif kind in ("done", "failed"):
            self._back(mate, event)

    def _welcome(self, name: str, mate: Mate, event: Mapping[str, Any]) -> None:
        identity, hardware = event["identity"], event["hardware"]
        if self.identity is None:
            self.identity, self.hardware = dict(identity), dict(hardware)
        why = why_unlike((self.identity, self.hardware), (identity, hardware), mixed=self.mixed)
        if why:
            self._refuse(name, mate, HarnessError(f"worker {mate.rank} {why}"), 1)
            return
        mate.ready = True
        del self._never_ready[mate.rank]
        self._ranks_gone.discard(mate.rank)  # somebody has started it anew, elsewhere
        self.by_rank[str(mate.rank)] = dict(hardware)

    def _refuse(self, name: str, mate: Mate, error: HarnessError, code: int) -> None:
        error.exit_code = code
        del self.mates[name]
        self._names_gone.add(name)
        self.executor.kill(mate.rank)
        self._leave_out(mate.rank, error, f"{error}; going on without worker {mate.rank}")

    def _leave_out(self, rank: int, error: HarnessError, warning: str) -> None:
        self._ranks_gone.add(rank)
        if len(self._ranks_gone) == self.executor.workers:
            raise error
        self.console.say(f"warning: {warning}")

    def _back(self, mate: Mate, event: Mapping[str, Any]) -> None:
        chore = mate.chore
        if chore is not None and chore.number == event["task"]:
            mate.chore = None
            chore.done, chore.value = True, event.get("value")
            if event["kind"] == "failed":
                chore.error = HarnessError(event["line"])
                chore.error.exit_code = event["code"]
            return
        if event["task"] not in mate.shards:
            return
        mate.shards.remove(event["task"])
        if event["kind"] == "failed":
            _, shard = self.scheduler.out.get(event["task"], ("", None))
            if shard is not None:
                self.scheduler.hopeless[shard.job] = event["line"]
            return
        shard = self.scheduler.finished(event["task"], event["seconds"])
        self.shards_done += 1
        self.results.read(event["value"]["file"])
        if shard is not None:
            self.done_samples += shard.samples
            self._progress()

    def _progress(self) -> None:
        self.console.progress("answering", self.done_samples, max(1, self.all_samples))

    def _watch(self) -> None:
        """Notice who is gone."""
        now = time.monotonic()
        for rank in range(self.executor.workers):
            if rank in self._ranks_gone:
                continue
            why = self.executor.ended(rank)
            if why is not None:
                self._events()  # what it said last comes first
                if rank not in self._ranks_gone:
                    self._gone(rank, why)
        for name, mate in list(self.mates.items()):
            if name not in self.mates or (now - mate.heard < PATIENCE_SECONDS / 4 and mate.beat is not None):
                continue
            beat = take(self.session.beat(name))
            if beat != mate.beat:
                mate.beat, mate.heard = beat, now
                if mate.chore is not None and beat is not None and beat["job"]:
                    self.console.progress(*beat["job"])
            elif now - mate.heard > PATIENCE_SECONDS:
                self.executor.kill(mate.rank)  # and with it all that have its rank, but where nobody can
                alone = name if isinstance(self.executor, Others) else None
                self._gone(mate.rank, f"no sign of life for {PATIENCE_SECONDS:.0f} s", alone)

    def _gone(self, rank: int, why: str, name: str | None = None) -> None:
        """A worker has ended: what it had is given out again, and another takes its place where there is work."""
        mine = [n for n, mate in self.mates.items() if mate.rank == rank and name in (None, n)]
        was_ready = False
        for one in mine:
            mate = self.mates.pop(one)
            self._names_gone.add(one)
            was_ready = was_ready or mate.ready
            last = take(self.session.beat(one)) or {}
            at = mate.blamed if mate.trace else _pair(last.get("at"))
            reason = mate.trace.strip().splitlines()[-1] if mate.trace else f"its worker died ({why})"
            if mate.trace:
                self.console.say(mate.trace.strip())
            elif mate.chore is not None or mate.shards:
                self.console.say(f"worker {rank} died ({why}); what it was at is given out again")
            self.scheduler.lost(one, reason, at, error=bool(mate.trace))
            if mate.chore is not None:
                chore = mate.chore
                chore.tries += 1
                if chore.tries < TRIES:
                    self.chores.insert(0, chore)
                else:
                    chore.done = True
                    chore.error = HarnessError(f"{TRIES} workers died while they had to {chore.task['kind']}: {reason}")
            shutil.rmtree(self.session.inbox(one), ignore_errors=True)
            self.session.beat(one).unlink(missing_ok=True)
        self._never_ready[rank] += not was_ready
        if self._never_ready[rank] >= TRIES:
            where = f"see {self.root / 'logs'}{self._tail(rank)}"
            self._leave_out(
                rank,
                HarnessError(f"workers end before they are ready ({why}); {where}"),
                f"worker {rank} ended {TRIES} times before it was ready ({why}); going on without it; {where}",
            )
            return
        self.executor.start(rank)

    def _tail(self, rank: int) -> str:
        """The last line that the worker printed."""
        try:
            lines = (self.root / "logs" / f"{rank}.log").read_text(errors="replace").strip().splitlines()
        except OSError:
            return ""
        return f": {lines[-1]}" if lines else ""

    def _assign(self) -> bool:
        gave = False
        for depth in range(AHEAD):
            for name, mate in self.mates.items():
                if not mate.ready or mate.chore is not None or len(mate.shards) != depth:
                    continue
                if self.chores and not depth:
                    mate.chore = self.chores.pop(0)
                    mate.chore.number = self._send(name, mate, mate.chore.task)
                    gave = True
                    continue
                shard = self.scheduler.next(name)
                if shard is None:
                    continue
                self._send(name, mate, self._task(shard), number=shard.number)
                mate.shards.append(shard.number)
                gave = True
        return gave

    def _task(self, shard: Shard) -> dict[str, Any]:
        points = dict.fromkeys(point for unit in shard.units for point in unit.points)
        return {
            "kind": "answer",
            "job": shard.job,
            "point": next(iter(points)),
            "shard": shard.number,
            "units": [{"ids": unit.ids, "points": unit.points} for unit in shard.units],
            "hashes": {str(point): self.hashes[shard.job, point] for point in points},
        }

    def _send(self, name: str, mate: Mate, task: Mapping[str, Any], number: int | None = None) -> int:
        mate.sent += 1
        number = -next(self._numbers) if number is None else number
        put(self.session.inbox(name) / f"{mate.sent:06d}.json", {**task, "task": number})
        return number

    def _give_up(self) -> None:
        """Samples that took three workers with them are failed samples."""
        while self.scheduler.failed:
            unit = self.scheduler.failed.pop()
            for point in unit.points:
                key = (self.hashes[unit.job, point], unit.ids)
                why = f"{unit.reason}, {unit.tries} times at this sample"
                self.results.parts[key] = [given_up(self.jobs[unit.job][point], unit.ids[0], why)]
                self.done_samples += 1
                self.failed_samples += 1


def _pair(at: Sequence[int] | None) -> tuple[int, int] | None:
    return None if at is None else (at[0], at[1])
