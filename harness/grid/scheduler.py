"""Which worker gets which work next. Knows no files, no processes and no clock, so that a simulation runs the same code.

A unit is one planned batch; in a sweep, of all points that have it. A shard is consecutive units for one worker: about a
minute's worth by the pace measured so far, fewer when little is left, so that all workers end together.

A worker that dies gives back what it had. The unit it was at was perhaps the reason: it is given out alone, after all
others. A unit lost three times is cut into its samples, and a sample whose turn alone is lost too has failed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

TARGET_SECONDS = 60.0
TRIES = 3
HOPELESS = 10
"""Units lost to dying workers before any was answered: then the fault is no sample's."""


@dataclass(frozen=True)
class Unit:
    """Samples that run as one batch."""

    job: int
    ids: tuple[str, ...]
    points: tuple[int, ...] = (0,)
    """Of a sweep: those of the job's cells that have the batch."""
    tries: int = 0
    """How often a worker died, or raised an error, while at it."""
    reason: str = ""

    @property
    def samples(self) -> int:
        return len(self.ids) * len(self.points)

    @property
    def key(self) -> tuple[int, tuple[str, ...]]:
        return self.job, self.ids


@dataclass(frozen=True)
class Shard:
    """Units of one job for one worker."""

    number: int
    units: tuple[Unit, ...]

    @property
    def job(self) -> int:
        return self.units[0].job

    @property
    def samples(self) -> int:
        return sum(unit.samples for unit in self.units)


@dataclass
class _Job:
    """A job's units that nobody has, and how fast its others went."""

    waiting: deque[Unit] = field(default_factory=deque)
    suspects: deque[Unit] = field(default_factory=deque)
    """Lost before; each of them is given out alone, after the others."""
    samples_waiting: int = 0
    seconds: float = 0.0
    samples: int = 0
    lost_to_errors: int = 0
    lost_to_deaths: int = 0

    @property
    def pace(self) -> float | None:
        """Seconds a sample; None before the first shard ended."""
        return self.seconds / self.samples if self.samples else None


class Scheduler:
    """Shards of the jobs added so far. First come, first served: a job's shards go out before a later job's."""

    def __init__(self, workers: int, target_seconds: float = TARGET_SECONDS) -> None:
        self.workers, self.target = workers, target_seconds
        self.jobs: dict[int, _Job] = {}
        self.out: dict[int, tuple[str, Shard]] = {}
        """Number of a shard -> who has it, and the shard."""
        self.failed: list[Unit] = []
        """Single samples that are given up, until somebody takes them off the list."""
        self.hopeless: dict[int, str] = {}
        """Job -> why nothing of it can be answered."""
        self._next = 0

    def add(self, units: Iterable[Unit]) -> None:
        for unit in units:
            job = self.jobs.setdefault(unit.job, _Job())
            job.waiting.append(unit)
            job.samples_waiting += unit.samples

    def drop(self, number: int) -> None:
        """A job that is over: nothing of it is given out any more."""
        self.jobs.pop(number, None)
        self.out = {n: (who, shard) for n, (who, shard) in self.out.items() if shard.job != number}

    def next(self, worker: str) -> Shard | None:
        """The worker's next shard; None where nothing waits."""
        for number, job in self.jobs.items():
            if job.waiting:
                units = list(self._cut(job))
            elif job.suspects:
                units = [job.suspects.popleft()]
            else:
                continue
            job.samples_waiting -= sum(unit.samples for unit in units)
            shard = Shard(self._next, tuple(units))
            assert shard.job == number
            self._next += 1
            self.out[shard.number] = (worker, shard)
            return shard
        return None

    def _cut(self, job: _Job) -> Iterator[Unit]:
        """As many of the next units as take about the target, and no more than half of this worker's part of what waits."""
        most = max(1, len(job.waiting) // (2 * self.workers))
        seconds = 0.0
        for taken in range(most):
            unit = job.waiting[0]
            seconds += unit.samples * (job.pace or self.target)
            if taken and seconds > self.target:
                return
            yield job.waiting.popleft()

    def finished(self, number: int, seconds: float) -> Shard | None:
        """The shard that is done; None where it was withdrawn or given up meanwhile."""
        _, shard = self.out.pop(number, ("", None))
        if shard is not None and shard.job in self.jobs:
            job = self.jobs[shard.job]
            job.seconds, job.samples = job.seconds + seconds, job.samples + shard.samples
        return shard

    def lost(self, worker: str, reason: str, at: tuple[int, int] | None = None, *, error: bool = False) -> None:
        """The worker is gone: its shards are given out again. `at` is the shard and the unit in it that it was at.

        `error` where an error in the code ended it, and no signal.
        """
        for number in [n for n, (who, _) in self.out.items() if who == worker]:
            _, shard = self.out.pop(number)
            if shard.job not in self.jobs:
                continue
            job = self.jobs[shard.job]
            blamed = at[1] if at is not None and at[0] == number and at[1] < len(shard.units) else None
            again = [unit for n, unit in enumerate(shard.units) if n != blamed]
            job.waiting.extendleft(reversed([unit for unit in again if not unit.tries]))
            job.suspects.extend(unit for unit in again if unit.tries)
            job.samples_waiting += sum(unit.samples for unit in again)
            if blamed is not None:
                self._blame(
                    job, replace(shard.units[blamed], tries=shard.units[blamed].tries + 1, reason=reason), error
                )

    def _blame(self, job: _Job, unit: Unit, error: bool) -> None:
        if unit.tries == 1:
            job.lost_to_errors += error
            job.lost_to_deaths += not error
        if unit.tries < TRIES:
            again: Sequence[Unit] = [unit]
        elif len(unit.ids) > 1:
            again = [replace(unit, ids=(one,), tries=TRIES - 1) for one in unit.ids]
        else:
            again = []
            self.failed.append(unit)
        job.suspects.extend(again)
        job.samples_waiting += sum(one.samples for one in again)
        if not job.samples and (job.lost_to_errors >= TRIES or job.lost_to_deaths >= HOPELESS):
            self.hopeless[unit.job] = unit.reason

    @property
    def idle(self) -> bool:
        """Whether nothing waits, though workers may be at their last shards."""
        return not any(job.waiting or job.suspects for job in self.jobs.values())

    def seconds_left(self) -> float | None:
        """Of all workers together from now on; None before the first shard of any job ended."""
        paces = [job.pace for job in self.jobs.values() if job.pace is not None]
        if not paces:
            return None
        usual = sum(paces) / len(paces)
        left = sum(job.samples_waiting * (job.pace or usual) for job in self.jobs.values())
        left += sum(
            shard.samples * (self.jobs[shard.job].pace or usual) / 2
            for _, shard in self.out.values()
            if shard.job in self.jobs
        )
        return left / self.workers
