"""Cells of one task run together: points of a sweep, or the methods of a grid, answered as rows of shared batches.

All cells run in step. When the first of them comes to a batch, the batch's prompts are answered under the plans of all cells
that have the same batch before them, in the same forward passes; rows whose prompts, adapters and edits of the prompt are equal
share the prefill. Each cell keeps its own record and its own samples, so that a killed grid goes on, and a cell run alone is
the same record: its cost is what it takes alone, and what sharing saved stands in fields of its own. A cell that fails takes
no other with it: what cannot be answered together is answered apart.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any, NamedTuple

from harness.data import Example
from harness.engine.flops import Cost
from harness.engine.model import LanguageModel
from harness.engine.replay import cost_of_generating, cost_of_scoring
from harness.fit.artifacts import ArtifactStore
from harness.fit.trains import TrainsUsers
from harness.judge.judges import Judge
from harness.plan import Generated
from harness.records.store import Outcome
from harness.run.answers import Answer, Asked, Size
from harness.run.cell import Cell
from harness.run.console import Console, Named
from harness.run.kept import same_records
from harness.run.steps import cell_steps, run_cell
from harness.run.system import ModelSystem
from harness.servers.model import ServedModel
from harness.task import Generation, Sample

SHARED_ROWS = 8
"""Rows of a shared batch, in the largest batches of a single run; fewer where memory does not suffice."""


def run_grid(
    lm: LanguageModel,
    cells: Sequence[Cell],
    *,
    store: ArtifactStore | None = None,
    console: Console | None = None,
    judge: Judge | None = None,
) -> list[Callable[[], Outcome]]:
    """For each cell, what runs, resumes or reuses its record when it is called; raises as `run_cell` does.

    Cells of one task run together. Methods that train for each user run by themselves: what they learnt would have to be in
    memory at once, and their prompts share nothing. Cells with one record have one outcome.
    """
    console = console or Console()
    found = [_Once(partial(run_cell, lm, cell, store=store, console=console, judge=judge)) for cell in cells]
    firsts = same_records(lm, dict(enumerate(cells)), judge)
    for task in dict.fromkeys(cell.task_name for cell in cells):
        members: dict[int, Cell] = {}
        for number, cell in enumerate(cells):
            apart = isinstance(cell.method, TrainsUsers) or isinstance(lm, ServedModel)
            if cell.task_name == task and firsts[number] == number and not apart:
                members[number] = cell
        if len(members) > 1:
            consoles = {number: Named(console, cell.method_name) for number, cell in members.items()}
            together = Together(lm, members, store=store, consoles=consoles, judge=judge)
            for number in members:
                found[number] = _Once(partial(together.finish, number))
    return [found[first] for first in firsts.values()]


class _Once:
    """What a cell gives, which is run when it is first asked for."""

    def __init__(self, run: Callable[[], Outcome]) -> None:
        self._run = run
        self._end: Outcome | Exception | SystemExit | None = None

    def __call__(self) -> Outcome:
        if self._end is None:
            try:
                self._end = self._run()
            except (Exception, SystemExit) as error:
                self._end = error
        if isinstance(self._end, Outcome):
            return self._end
        raise self._end


class Together:
    """Cells of one task under the same settings, run in step as far as somebody asks for."""

    def __init__(
        self,
        lm: LanguageModel,
        cells: Mapping[Any, Cell],
        *,
        store: ArtifactStore | None = None,
        consoles: Mapping[Any, Console] | None = None,
        judge: Judge | None = None,
    ) -> None:
        joint, consoles = Joint(), consoles or {}
        self._steps: dict[Any, Generator[None, None, Outcome]] = {
            name: cell_steps(lm, cell, store=store, console=consoles.get(name), judge=judge, make_system=joint.make)
            for name, cell in cells.items()
        }
        self._ended: dict[Any, Outcome | BaseException] = {}

    def finish(self, name: Any) -> Outcome:
        """The outcome of a cell. Raises what stopped it; whatever stops the program stops all, with their state saved."""
        while name not in self._ended:
            try:
                self._step()
            except BaseException:
                self.close()
                raise
        end = self._ended[name]
        if isinstance(end, BaseException):
            raise end
        return end

    def close(self) -> None:
        """Cells that have not ended leave an interrupted record."""
        for step in self._steps.values():
            step.close()

    def _step(self) -> None:
        """Every cell that has not ended goes one batch further."""
        for name, step in self._steps.items():
            if name in self._ended:
                continue
            try:
                next(step)
            except StopIteration as end:
                self._ended[name] = end.value
            except (Exception, SystemExit) as error:
                self._ended[name] = error


@dataclass
class Joint:
    """What the cells have answered for each other."""

    members: list[_Member] = field(default_factory=list)
    kept: dict[tuple[int, tuple[str, ...]], _Kept] = field(default_factory=dict)
    """(member, ids of a batch) -> its answers, until the member comes to the batch."""

    def make(self, *args: Any, **options: Any) -> _Member:
        member = _Member(*args, **options)
        member.joint, member.number = self, len(self.members)
        self.members.append(member)
        return member

    def answers(self, member: _Member, asked: Sequence[Asked], ids: tuple[str, ...]) -> list[Answer]:
        if (member.number, ids) not in self.kept:
            waiting = {member: asked}
            for other in self.members:
                theirs = None if other is member else other.waits_with(member, ids)
                if theirs is not None:
                    waiting[other] = theirs
            if len(waiting) == 1 or not self._answer(waiting, ids):
                return member.answer_alone(asked)
        kept = self.kept.pop((member.number, ids))
        member.decoder.cost = plus(member.decoder.cost, kept.alone)
        member.saved = plus(member.saved, kept.saved)
        member.elsewhere += kept.elsewhere
        return kept.answers

    def _answer(self, waiting: Mapping[_Member, Sequence[Asked]], ids: tuple[str, ...]) -> bool:
        """Whether a batch could be answered for all that wait, the first of whom runs it."""
        first, count = next(iter(waiting)), len(waiting)
        before = minus(first.decoder.cost, Cost())
        by_sample = list(zip(*waiting.values(), strict=True))
        start = time.perf_counter()
        try:
            found = list(first._in_pieces(by_sample, _samples_at_once(first, by_sample), first.answer_samples))
        except Exception:  # of one method perhaps: it will raise it again, in its own name
            first.decoder.cost = before
            return False
        seconds = time.perf_counter() - start
        spent, first.decoder.cost = minus(first.decoder.cost, before), before
        parts = [list(part) for part in zip(*found, strict=True)]
        alone = [m.cost_alone(asked, part) for (m, asked), part in zip(waiting.items(), parts, strict=True)]
        total = sum(cost.flops for cost in alone)
        whole = time.perf_counter() - start  # what counting costs takes is nobody's
        for member, part, cost, share in zip(waiting, parts, alone, shares(spent, count), strict=True):
            own = seconds * cost.flops / total
            elsewhere = own - whole if member is first else own
            self.kept[member.number, ids] = _Kept(part, cost, minus(cost, share), elsewhere)
        return True


class _Kept(NamedTuple):
    """A batch of a member, answered beside those of others."""

    answers: list[Answer]
    alone: Cost
    """What it takes in a run of its own."""
    saved: Cost
    """That less an equal share of what was spent."""
    elsewhere: float
    """See `ModelSystem.elsewhere`; seconds are shared out by operations."""


class _Member(ModelSystem):
    """A system that has its batches answered together with the other cells'."""

    joint: Joint
    number: int
    _asked_for: tuple[Mapping[str, Example], Callable[[Example], str]] | None = None
    """While it responds: the examples by id, and which are alike."""

    def respond(
        self, examples: Sequence[Example], *, alike: Callable[[Example], str] = lambda example: ""
    ) -> Iterator[Sample]:
        self._asked_for = {example.id: example for example in examples}, alike
        try:
            yield from super().respond(examples, alike=alike)
        finally:
            self._asked_for = None

    def waits_with(self, other: _Member, ids: tuple[str, ...]) -> list[Asked] | None:
        """What is asked in a batch that `other` has come to; None where this one has not the same before it."""
        assert other._asked_for is not None
        examples, alike = other._asked_for
        try:
            self.plan_batches(list(examples.values()), alike=alike)
            if list(ids) not in self.batching.planned or self.batching.done.issuperset(ids):
                return None
            asked = [self._ask(examples[i]) for i in ids]
        except Exception:  # it will raise it again when it comes to this batch
            return None
        return None if any(one.apart for one in asked) else asked

    def answer_alone(self, asked: Sequence[Asked]) -> list[Answer]:
        return super()._answer(asked)

    def answer_samples(self, by_sample: Sequence[Sequence[Asked]]) -> list[list[Answer]]:
        """Of each sample, what every member asks."""
        answers = iter(self.answer_alone([one for sample in by_sample for one in sample]))
        return [[next(answers) for _ in sample] for sample in by_sample]

    def cost_alone(self, asked: Sequence[Asked], answers: Sequence[Answer]) -> Cost:
        """Of answering a batch that was answered beside others, had it been by itself."""
        written = [
            (a.requests[0], answer)
            for a, answer in zip(asked, answers, strict=True)
            if isinstance(answer, Generated) and a.given is None
        ]
        pairs = [pair for a in asked for pair in zip(a.requests, a.choices, strict=False)]
        g = self.generation
        generated = cost_of_generating(
            self.decoder, [r for r, _ in written], [a for _, a in written], max_new_tokens=g.max_new_tokens, stop=g.stop
        )
        return plus(generated, cost_of_scoring(self.decoder, [r for r, _ in pairs], [c for _, c in pairs]))

    def _answer(self, asked: Sequence[Asked], generation: Generation | None = None) -> list[Answer]:
        if self._asked_for is None or not asked or any(one.apart for one in asked):
            return super()._answer(asked, generation)
        return self.joint.answers(self, asked, tuple(one.requests[0].key for one in asked))


def _samples_at_once(member: _Member, by_sample: Sequence[Sequence[Asked]]) -> int:
    """Samples of a shared batch whose rows are not too many."""
    each = [[one.size for one in sample] for sample in by_sample]
    sizes = [Size(max(s.tokens for s in some), sum(s.rows for s in some), max(s.choice for s in some)) for some in each]
    rows = SHARED_ROWS * member.batching.most(member.lm.device.type)
    samples = max(1, rows // max(size.rows for size in sizes))
    return min(samples, member.fits(sizes) or samples)


def plus(a: Cost, b: Cost) -> Cost:
    return Cost(**{f.name: getattr(a, f.name) + getattr(b, f.name) for f in fields(Cost)})


def minus(a: Cost, b: Cost) -> Cost:
    return Cost(**{f.name: getattr(a, f.name) - getattr(b, f.name) for f in fields(Cost)})


def shares(cost: Cost, count: int) -> list[Cost]:
    """Equal parts of whole numbers, the first of them with what is left over."""
    part = Cost(**{f.name: getattr(cost, f.name) // count for f in fields(Cost)})
    rest = cost
    for _ in range(count - 1):
        rest = minus(rest, part)
    return [rest, *[part] * (count - 1)]
