"""`harness certify`: a few samples of a record answered again under other circumstances, and what moved by how much.

Nothing that names a record changes: the same weights, prompts, options and seeds. What changes is what a number should not
depend on and, in rounding, does: which samples share a batch, how many threads add the numbers up, which process runs. The
first line repeats recorded batches as they were; where answers differ there, this machine does not reproduce the record.
Answers are compared word for word, and the log-probabilities of the recorded answers token by token.
"""

from __future__ import annotations

import json
import math
import multiprocessing
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from harness.data import Labelled
from harness.engine.loading import load_model
from harness.engine.model import LanguageModel
from harness.errors import UsageError
from harness.fit.artifacts import ArtifactStore
from harness.fit.states import personal_states, shared_state
from harness.method import Fitted
from harness.methods import METHODS
from harness.plan import Sampling
from harness.plugins.options import rebuild_method, rebuild_task, takes_data
from harness.plugins.registry import method_class, method_row, model_row, task_class
from harness.plugins.returned import graded, metrics_of, samples_of
from harness.records import provenance
from harness.records.schema import RunRecord
from harness.records.store import read_record, read_samples
from harness.run.batches import Batching
from harness.run.cell import Cell, Settings
from harness.run.console import Console
from harness.run.score import task_of
from harness.run.system import ModelSystem
from harness.task import Generation, Sample

COUNT = 20
"""Samples that are answered again, unless the command says otherwise."""


@dataclass(frozen=True)
class Again:
    """The samples answered once more."""

    responses: Mapping[str, str | None]
    """By id of the sample."""
    logprobs: Mapping[str, Sequence[float]]
    """Of the recorded answer's tokens, or of every choice's, in nats."""
    metric: float | None
    """The main metric, on these samples alone; None where it needs a judge."""


@dataclass(frozen=True)
class Variant:
    name: str
    changed: tuple[str, ...]
    """Ids of the samples whose answer is not the recorded one."""
    shift: float
    """Largest difference of a token's log-probability from that in the recorded batches, in nats; infinite where one is ruled out
    in the one and not in the other."""
    metric: float | None


@dataclass(frozen=True)
class Certificate:
    folder: Path
    samples: int
    metric: str
    recorded: float | None
    """The main metric of the recorded answers to these samples."""
    variants: tuple[Variant, ...]
    """The recorded batches again, first."""
    notes: tuple[str, ...]
    """How this machine and its libraries differ from those of the record."""

    @property
    def reproduced(self) -> bool:
        return not self.variants[0].changed

    def to_json(self) -> str:
        """One object, in which an infinite shift is null."""
        variants = [{**asdict(v), "shift": v.shift if math.isfinite(v.shift) else None} for v in self.variants]
        content = {**asdict(self), "folder": str(self.folder), "variants": variants}
        return json.dumps(content, allow_nan=False)


@dataclass(frozen=True)
class Asked:
    """What to answer again, and where its parts lie."""

    folder: Path
    data: str | None = None
    model_path: str | None = None
    method: str | None = None
    """The file of a method that is not registered."""
    device: str = "auto"
    count: int = COUNT
    places: tuple[str, ...] = ()
    """Where files and folders are that the record names by their content, as in `writer=./folder`."""


def certify(asked: Asked, console: Console | None = None) -> Certificate:
    """Raises UsageError where the record cannot be made again: other data, weights, or no answers of a model."""
    import torch

    console = console or Console()
    console.say("answering again in this process")
    bench = _Bench(asked, console)
    ids = [i for batch in bench.batches for i in batch]
    largest = max(map(len, bench.batches))
    together = len(ids) if len(ids) > largest else max(2, largest // 2)
    first = bench.again(Batching(largest, [list(batch) for batch in bench.batches]))
    found = {
        "recorded batches": first,
        "one a batch": bench.again(Batching(1)),
        f"{together} a batch": bench.again(Batching(together)),
    }
    threads = torch.get_num_threads()
    other = 1 if threads > 1 else 2
    torch.set_num_threads(other)
    try:
        found[f"{other} thread{'s' if other > 1 else ''} instead of {threads}"] = bench.again(bench.recorded())
    finally:
        torch.set_num_threads(threads)
    console.say("answering again in another process")
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        found["another process"] = pool.submit(_elsewhere, asked).result()
    recorded = {i: bench.samples[i].response for i in ids}
    variants = tuple(moved(name, again, first, recorded) for name, again in found.items())
    name = next(iter(bench.record.metrics), "")
    value = bench.metric([bench.samples[i] for i in ids])
    return Certificate(asked.folder, len(ids), name, value, variants, tuple(_differences(bench.record, bench.lm)))


def moved(name: str, again: Again, first: Again, recorded: Mapping[str, str | None]) -> Variant:
    """What is not as in the recorded answers, and how far tokens are from where they were in `first`."""
    pairs = [pair for i in recorded for pair in zip(again.logprobs[i], first.logprobs[i], strict=True)]
    shift = max(0.0 if a == b else abs(a - b) for a, b in pairs)  # -inf twice: ruled out in both
    return Variant(name, tuple(i for i in recorded if again.responses[i] != recorded[i]), shift, again.metric)


def _elsewhere(asked: Asked) -> Again:
    bench = _Bench(asked, Console())
    return bench.again(bench.recorded())


class _Bench:
    """A record's model, method and items, ready to answer."""

    def __init__(self, asked: Asked, console: Console) -> None:
        self.record = read_record(asked.folder)
        self.samples = {sample.id: sample for sample in read_samples(asked.folder) if not sample.error}
        config = self.record.config
        self.cell = cell_of(self.record, asked.data, asked.method, asked.places)
        items = {item.example.id: item for item in self.cell.items}
        missing = [i for batch in self.record.batches for i in batch if i not in items]
        if missing or self.cell.task.fingerprint(self.cell.selection) != config.data.fingerprint:
            raise UsageError(f"{asked.folder} read other data ({config.data.description}); give its folder as --data")
        self.batches = self._some(asked.count)
        self.items: list[Labelled] = [items[i] for batch in self.batches for i in batch]
        self.lm = _model(self.record, asked)
        self.generation = _generation(self.record)
        store = ArtifactStore()
        self.shared = shared_state(self.lm, self.cell, store, console)
        self.personal = personal_states(self.lm, self.cell, self.shared, store, console)

    def _some(self, count: int) -> list[list[str]]:
        """Whole recorded batches with `count` samples together, or the beginning of the first where that is far larger."""
        whole = [batch for batch in self.record.batches if self.samples.keys() >= set(batch)]
        if not whole:
            raise UsageError("no batch of the record was answered whole, so there is nothing to hold against it")
        chosen: list[list[str]] = []
        for batch in whole:
            if sum(map(len, chosen)) < count:
                chosen.append(batch if chosen or len(batch) <= 4 * count else batch[:count])
        return chosen

    def recorded(self) -> Batching:
        return Batching(max(map(len, self.batches)), [list(batch) for batch in self.batches])

    def again(self, batching: Batching) -> Again:
        shared: Fitted | None = self.shared.state
        states = self.personal.states
        system = ModelSystem(
            self.lm, self.cell.method, self.generation, shared=shared, personal=states, batching=batching
        )
        answers = self.cell.task.respond(system, self.items)
        batches = samples_of(self.cell.task, answers, self.items, batching.planned)
        done = {sample.id: graded(self.cell.task, sample) for batch in batches for sample in batch}
        examples = [item.example for item in self.items]
        if any(system.plan(example).answer is not None for example in examples):
            raise UsageError(f"{self.cell.method_name} answers without the model, so nothing can move")
        said = [example.choices or (self.samples[example.id].response or "",) for example in examples]
        scores = system.score(examples, said)
        logprobs = {e.id: [x for one in some for x in one.logprobs] for e, some in zip(examples, scores, strict=True)}
        return Again({i: s.response for i, s in done.items()}, logprobs, self.metric([done[e.id] for e in examples]))

    def metric(self, samples: Sequence[Sample]) -> float | None:
        found = metrics_of(self.cell.task, samples)
        main = next(iter(self.record.metrics), "")
        return found[main].value if main in found else None


def cell_of(record: RunRecord, data: str | None, method_file: str | None = None, places: Sequence[str] = ()) -> Cell:
    """The cell that a record is of. Raises UsageError where its method, or what that reads, is in a file that is not given, or
    another one."""
    config = record.config
    name = config.method.name
    if name not in METHODS and method_file is None:
        raise UsageError(f"method {name!r} is in a file of its own; give it as --method ./file.py")
    row = method_row(method_file) if method_file is not None else None
    source = config.method.options.get("source_sha256")
    if row is not None and row.source != source:
        raise UsageError(f"{method_file} is not the file that the record was made with: another hash")
    cls = row.cls if row is not None else method_class(name)
    drawn = config.sampling
    settings = Settings(
        split=config.data.split,
        limit=config.selection.limit,
        users=config.selection.users,
        control=config.selection.control,
        exclude_leaks=config.selection.exclude_leaks,
        fit_split=config.data.fit_split,
        max_new_tokens=drawn.max_new_tokens,
        temperature=drawn.temperature,
        top_k=drawn.top_k or 0,
        top_p=1.0 if drawn.top_p is None else drawn.top_p,
        seed=drawn.seed,
    )
    fit_task, own_data = None, data
    if config.data.fit_task is not None:
        other = config.data.fit_task
        fit_data = data if takes_data(task_class(other)) else None
        fit_task = other, rebuild_task(task_class(other), config.data.fit_options, fit_data)
        own_data = None if fit_data and not takes_data(task_class(config.task.name)) else data
    return Cell(
        name,
        rebuild_method(cls, config.method.options, places),
        config.task.name,
        task_of(record, own_data),
        settings,
        config.task.options,
        config.method.preset,
        fit_task,
        config.data.fit_options,
        source,
    )


def _model(record: RunRecord, asked: Asked) -> LanguageModel:
    config = record.config.model
    path = asked.model_path or (config.id if config.name != "tiny" and Path(config.id).exists() else None)
    lm = load_model(model_row(config.name, path), dtype=cast(Any, config.dtype), device=asked.device)
    if lm.revision != config.revision:
        raise UsageError(
            f"{asked.folder} was made with {config.name} at {config.revision[:20]}, and this is {lm.revision[:20]}; give "
            "those weights as --model_path"
        )
    return lm


def _generation(record: RunRecord) -> Generation:
    drawn = record.config.sampling
    top_p = 1.0 if drawn.top_p is None else drawn.top_p
    sampling = Sampling(drawn.temperature, drawn.top_k or 0, top_p, drawn.seed)
    return Generation(drawn.max_new_tokens, tuple(drawn.stop), sampling)


def _differences(record: RunRecord, lm: LanguageModel) -> list[str]:
    here, notes = provenance.versions(), []
    for name, version in (record.versions or {}).items():
        if here.get(name) != version:
            notes.append(f"{name} {version} then, {here.get(name, 'none')} now")
    now = provenance.hardware(lm)
    for name, value in (record.hardware or {}).items():
        if name in now and now[name] != value:
            notes.append(f"{name} {value} then, {now[name]} now")
    return notes
