"""One cell of a grid: fit, answer, grade, aggregate, record; resumable at any moment.

Order of things: the record's folder is locked; the fitted state is found in the artifact store or made; all batches are
planned into the record before the first one runs; what a batch took and its samples are on disk before the next one starts,
and all of them before a judge is asked; metrics, health and cost are computed from what is on disk, so a killed run ends like
an unbroken one.

Nothing here imports torch before there is a model: of a run on workers the driver has none.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from harness.data import Example, Labelled
from harness.engine.flops import Cost
from harness.errors import UserFailed
from harness.fit.artifacts import ArtifactStore
from harness.fit.states import Personal, Shared, personal_states, shared_state, warnings_of
from harness.judge.grading import check_targets, judge_samples, settle
from harness.judge.judges import Judge
from harness.plugins.returned import analysis_of, graded, plan_of, reviewed, samples_of
from harness.records import provenance
from harness.records.schema import Serving
from harness.records.store import (
    Outcome,
    RunFolder,
    RunRecord,
    json_value,
)
from harness.run.answers import Effect, by_value, without_mix
from harness.run.batches import Batching
from harness.run.cell import Cell, generation_of_cell
from harness.run.compared import Compared, ComparedIn
from harness.run.console import Console
from harness.run.kept import config_of as config_of
from harness.run.kept import exit_code, is_finished, kept_outcome, other_servers, say_kept
from harness.run.leaks import leaks, unlike_histories
from harness.servers.model import ServedModel
from harness.task import Sample

if TYPE_CHECKING:
    from harness.engine.model import LanguageModel
    from harness.run.system import ModelSystem

_COUNTS = [field.name for field in fields(Cost)]
_SAVED = ("forward_passes", "prefill_tokens", "decode_tokens", "flops")


@dataclass
class Answered:
    """A batch's graded samples, and what they took."""

    samples: list[Sample]
    costs: dict[str, int | float]
    peak_memory_bytes: int


class Hands:
    """What a run needs a model for, done in this process.

    `harness.grid` has other processes do it; its generators yield nothing, again and again, while they wait for them.
    """

    system: ModelSystem

    def __init__(self, lm: LanguageModel, make_system: Callable[..., ModelSystem]) -> None:
        self.lm, self.make_system = lm, make_system

    def hardware(self) -> dict[str, Any]:
        return provenance.hardware(self.lm)

    def learn(
        self, cell: Cell, store: ArtifactStore, console: Console
    ) -> Generator[None, None, tuple[Shared, Personal]]:
        """What the method's `fit` and `adapt` give."""
        yield from ()
        shared = shared_state(self.lm, cell, store, console)
        return shared, personal_states(self.lm, cell, shared, store, console)

    def answer(
        self, cell: Cell, shared: Shared, personal: Personal, batching: Batching, console: Console
    ) -> Iterator[list[Answered]]:
        """Every batch that is not done, in their order, those that are there at once; planned where they are not yet."""
        self.system = self.make_system(
            self.lm,
            cell.method,
            generation_of_cell(cell),
            shared=shared.state,
            personal=personal.states,
            batching=batching,
            progress=console.progress,
        )
        yield []
        for batch in answered(cell, self.system):
            yield [batch]

    def serving(self, batches: Mapping[str, Mapping[str, int | float]], before: Serving | None) -> Serving | None:
        """Of a model behind a server; see `System.serving`."""
        return self.system.serving(batches.values(), before)

    def effect(self, samples: Sequence[tuple[Example, str]], kept: Compared) -> Generator[None, None, Effect | None]:
        """`System.effect` of examples and the responses to them."""
        yield from ()
        return self.system.effect([example for example, _ in samples], [response for _, response in samples], kept)


def answered(cell: Cell, system: ModelSystem, items: Sequence[Labelled] | None = None) -> Iterator[Answered]:
    """Each planned batch of the system that is not done, answered and graded; `items` are those of the batches, by default all."""
    batching = system.batching
    spent, start, saved, elsewhere = replace(system.decoder.cost), time.perf_counter(), replace(system.saved), 0.0
    answers = cell.task.respond(system, cell.items)
    for batch in samples_of(
        cell.task, answers, cell.items if items is None else items, batching.planned, batching.done
    ):
        counted = {name: getattr(system.decoder.cost, name) - getattr(spent, name) for name in _COUNTS}
        seconds = time.perf_counter() - start + system.elsewhere - elsewhere
        costs: dict[str, int | float] = {**counted, "seconds": seconds, **system.spent()}
        if system.saved != saved:
            costs |= {f"saved_{name}": getattr(system.saved, name) - getattr(saved, name) for name in _SAVED}
        finished = [graded(cell.task, sample) for sample in batch]
        yield Answered(finished, costs, provenance.peak_memory_bytes(system.lm))
        spent, start = replace(system.decoder.cost), time.perf_counter()
        saved, elsewhere = replace(system.saved), system.elsewhere


def run_cell(
    lm: LanguageModel,
    cell: Cell,
    *,
    store: ArtifactStore | None = None,
    console: Console | None = None,
    judge: Judge | None = None,
) -> Outcome:
    """Run, resume or reuse the record of this cell. Nothing goes to stdout. Only a task that asks a judge gets it.

    Raises HarnessError for what a user can mend; KeyboardInterrupt passes through with the state saved.
    """
    steps = cell_steps(lm, cell, store=store, console=console, judge=judge)
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


def cell_steps(
    lm: LanguageModel,
    cell: Cell,
    *,
    store: ArtifactStore | None = None,
    console: Console | None = None,
    judge: Judge | None = None,
    make_system: type[ModelSystem] | Callable[..., ModelSystem] | None = None,
    hands: Hands | None = None,
) -> Generator[None, None, Outcome]:
    """`run_cell`, with a pause before the first batch and after each; closed in one, it leaves an interrupted record."""
    console, config = console or Console(), config_of(lm, cell, judge)
    if make_system is None and isinstance(lm, ServedModel):
        from harness.run.served import ServedSystem
        from harness.run.served.refusals import check_served

        make_system = partial(ServedSystem, payer=config.hash8())
        if kept_outcome(lm, cell, judge) is None:
            check_served(lm, cell, generation_of_cell(cell), store or ArtifactStore(), console)
    if hands is None:
        from harness.run.system import ModelSystem

        hands = Hands(lm, make_system or ModelSystem)
    with RunFolder.open(cell.settings.output_path, config) as folder:
        record = folder.record()
        if record is not None and is_finished(record, cell.settings):
            say_kept(record, folder.path, console)
            for note in other_servers(record, config):
                console.say(f"warning: {note}")
        else:
            record = record or RunRecord(config=config, started=provenance.now())
            if not record.batch_costs:
                record.config = config  # nothing is there of an address that it was started with
            moved = other_servers(record, config)
            yield from _run(hands, cell, folder, record, store or ArtifactStore(), console, judge, moved)
        return Outcome(record, folder.path, exit_code(record, cell.settings))


def _run(
    hands: Hands,
    cell: Cell,
    folder: RunFolder,
    record: RunRecord,
    store: ArtifactStore,
    console: Console,
    judge: Judge | None,
    moved: Sequence[str],
) -> Generator[None, None, None]:
    """Fill the record, whatever happens: it is on disk with its status when this returns or raises."""
    record.status, record.error = "running", None
    record.versions, record.hardware = provenance.versions(), hands.hardware()
    record.git_sha, record.dirty = provenance.commit()
    try:
        notes = [*moved, *cell.shared_with_fit]  # before anything is fitted
        shared, personal = yield from hands.learn(cell, store, console)
        _note_fit(cell, record, shared, personal, console, notes)
        yield from _answer(hands, cell, folder, record, shared, personal, console)
        yield from _measure(hands, cell, folder, record)
        folder.write(record)
        check_targets(folder.samples(), folder.path / "samples.jsonl")
        judge_samples(cell.task, folder, record, judge, console.progress)
        settle(cell.task, _in_file_order(cell, folder), record)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt | GeneratorExit):
            record.status = "interrupted"
        else:
            record.status, record.error = "failed", f"{type(error).__name__}: {error}"
        folder.write(record)
        raise
    record.finished = provenance.now()
    folder.write(record)


def _of_known_users(cell: Cell) -> list[str]:
    """What to know where evaluated users asked questions that the method was fitted on, as LaMP's time-based split has it."""
    fit = cell.fit_data
    if fit.split is None or fit.held_out or cell.fit_task is not None:
        return []
    users = {item.example.user.id for item in cell.items if item.example.user.history}
    known = users & {item.example.user.id for item in fit.items()}
    if not known:
        return []
    keep_apart = f"--fit_split {cell.settings.split}:0.2 fits on other users alone"
    if "most_active" in inspect.signature(type(cell.task)).parameters:
        keep_apart = "--task_set most_active=100 fits on other users alone"
    return [f"{len(known)} of {len(users)} users also ask questions that were fitted on; {keep_apart}"]


def _of_unlike_histories(cell: Cell) -> list[str]:
    """What to know where a user's questions have histories of which none is in all others, as where two users have one id."""
    adapts = cell.method.adapts()
    unlike = unlike_histories(cell.items, read=adapts)
    if not unlike:
        return []
    users = {item.example.user.id for item in cell.items}
    name = next(iter(unlike))
    note = f"{len(unlike)} of {len(users)} users, first {name!r}, have questions under unlike histories"
    if not adapts:
        return [f"{note}; each is asked under its own, and intervals take them for one user"]
    return [f"{note}; what is learnt of a user is of the shortest"]


def _of_the_control(cell: Cell, shared: Shared, personal: Personal) -> list[str]:
    """What to know where the control made no other plan of any item, so that the run is the one without it."""
    if cell.settings.control == "none":
        return []
    for item, own in zip(cell.items, cell.own_items, strict=True):
        state = personal.states.get(own.example.user.id)
        if not isinstance(state, UserFailed):
            given, before = (
                plan_of(cell.method, cell.method.plan(one.example, shared.state, state)) for one in (item, own)
            )
            if (without_mix(given), by_value(given.mix)) != (without_mix(before), by_value(before.mix)):
                return []
    rest = (
        "only what was learnt of the users can differ" if cell.method.adapts() else "the numbers are those without it"
    )
    return [f"--control {cell.settings.control} changed nothing that {cell.method_name} asks; {rest}"]


def _note_fit(
    cell: Cell, record: RunRecord, shared: Shared, personal: Personal, console: Console, notes: Sequence[str]
) -> None:
    """What was fitted and what it took, here or in the run that kept it."""
    record.notes = [*warnings_of(cell.method, shared), *notes, *_of_known_users(cell), *personal.notes()]
    record.notes += reviewed(cell.task, cell.task.caveats(cell.own_items), "caveats")
    record.notes += [*_of_unlike_histories(cell), *_of_the_control(cell, shared, personal)]
    record.leaks = dict(leaks(cell.task, cell.items))
    if cell.method.adapts():
        learnt = unlike_histories(cell.items)
        record.leaks |= leaks(cell.task, [item for items in learnt.values() for item in items])
    record.health.leaks = len(record.leaks)
    for note in record.notes:
        console.say(f"warning: {note}")
    record.held_out_users = sorted(cell.fit_data.held_out)
    if shared.key is not None and shared.state is not None:
        record.artifacts["fit"] = shared.key
        record.cost.fit_seconds = shared.state.cost["seconds"]
    record.analysis = json_value(analysis_of(cell.method, cell.method.analysis(shared.state, personal.fitted())))
    made = personal.fitted().values()
    if made:
        record.cost.setup_seconds_per_user = sum(state.cost["seconds"] for state in made) / len(made)
        record.cost.stored_bytes_per_user = personal.stored_bytes / len(made)
        record.cost.setup_prefill_tokens = sum(int(state.cost.get("prefill_tokens", 0)) for state in made)
        record.cost.setup_decode_tokens = sum(int(state.cost.get("decode_tokens", 0)) for state in made)
        record.cost.setup_flops = sum(state.cost.get("flops", 0.0) for state in made)


def _answer(
    hands: Hands,
    cell: Cell,
    folder: RunFolder,
    record: RunRecord,
    shared: Shared,
    personal: Personal,
    console: Console,
) -> Generator[None, None, None]:
    """Have every sample answered, graded and on disk, but for those that are."""
    if {i for ids in record.batches for i in ids} != {item.example.id for item in cell.items}:
        record.batches, record.batch_costs = [], {}
    batching = Batching(cell.settings.batch_size, record.batches)
    failed = {sample.id for sample in folder.samples() if sample.error} if cell.settings.retry_failed else set()
    finished = folder.resume([ids for ids in record.batches if failed.isdisjoint(ids)])
    batching.done = frozenset(sample.id for sample in finished)

    def save() -> None:
        record.batches = batching.planned
        record.batch.requested = str(batching.size or "auto")
        record.batch.sizes = batching.sizes()
        folder.write(record)

    batching.changed = save
    if batching.planned:
        save()
    means = _Means(console, finished)
    for batches in hands.answer(cell, shared, personal, batching, console):
        if batches:
            costs = {batching.planned[batch.samples[0].batch][0]: batch.costs for batch in batches}
            record.batch_costs |= costs
            peak = max(batch.peak_memory_bytes for batch in batches)
            record.cost.peak_memory_bytes = max(peak, record.cost.peak_memory_bytes or 0)
            samples = [sample for batch in batches for sample in batch.samples]
            folder.log(record, *costs)  # before the samples: a batch on disk without its cost would not be run again
            folder.append(samples)
            means.add(samples)
        yield


class _Means:
    """The running mean of the samples' main number, for whoever waits."""

    def __init__(self, console: Console, samples: Sequence[Sample]) -> None:
        self.console, self.name, self.total, self.count = console, "", 0.0, 0
        self.add(samples)

    def add(self, samples: Sequence[Sample]) -> None:
        for sample in samples:
            self.name = self.name or next(iter(sample.metrics), "")
            value = sample.metrics.get(self.name)
            if value is not None:
                self.total, self.count = self.total + value, self.count + 1
        if self.count:
            self.console.mean("answering", self.name, self.total / self.count)


def _in_file_order(cell: Cell, folder: RunFolder) -> list[Sample]:
    """The samples on disk, whatever order batches ran in."""
    by_id = {sample.id: sample for sample in folder.samples()}
    return [by_id[item.example.id] for item in cell.items]


def _measure(hands: Hands, cell: Cell, folder: RunFolder, record: RunRecord) -> Generator[None, None, None]:
    """Health and cost of answering the samples on disk, while the model is at hand."""
    samples = _in_file_order(cell, folder)
    answered = [(item.example, sample) for item, sample in zip(cell.items, samples, strict=True) if not sample.error]
    health, cost = record.health, record.cost
    health.hit_max_tokens = sum(sample.finish == "length" for _, sample in answered)
    health.dropped_items = sum(sample.dropped_items for _, sample in answered)
    health.truncated = sum(sample.dropped_items > 0 for _, sample in answered)
    health.cut_contexts = sum(sample.cut_tokens > 0 for _, sample in answered)
    spent = {name: sum(record.batch_costs[ids[0]][name] for ids in record.batches) for name in (*_COUNTS, "seconds")}
    health.edits_prefill, health.edits_decode = int(spent["edits_prefill"]), int(spent["edits_decode"])
    cost.forward_passes, cost.flops, cost.seconds = int(spent["forward_passes"]), spent["flops"], spent["seconds"]
    cost.prefill_tokens, cost.decode_tokens = int(spent["prefill_tokens"]), int(spent["decode_tokens"])
    shared = [costs for costs in record.batch_costs.values() if "saved_flops" in costs]
    if shared:
        cost.saved_forward_passes = int(sum(costs["saved_forward_passes"] for costs in shared))
        cost.saved_flops = sum(costs["saved_flops"] for costs in shared)

    record.serving = hands.serving(record.batch_costs, record.serving)
    if record.serving is not None:  # what a server computes nobody knows
        cost.forward_passes = cost.flops = cost.peak_memory_bytes = None
    if not cell.settings.effect_samples:
        record.notes.append("no answer was compared with the unedited model's (--effect_samples 0)")
        return
    compared, start = answered[: cell.settings.effect_samples], time.perf_counter()
    kept = ComparedIn(folder.path)
    effect = yield from hands.effect([(example, sample.response or "") for example, sample in compared], kept)
    kept.drop()
    if effect is not None:
        cost.effect_seconds = time.perf_counter() - start
        health.kl_to_base = effect.kl_nats
        health.changed_tokens = effect.changed_tokens
        health.identical_to_base = effect.identical
        health.noop = effect.nothing(record.config.model.dtype)
