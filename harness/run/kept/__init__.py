"""Records that are there already: what a run is called, which needs its data and the name of its model, and not the model.

So a command whose records are finished shows them at once.
"""

from __future__ import annotations

import os
from collections.abc import Hashable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol, TypeVar

from harness.engine.weights.identity import identity_of
from harness.errors import HarnessError
from harness.judge.judges import Judge
from harness.method import Method
from harness.plugins.registry import model_row
from harness.plugins.returned import fingerprint_of, options_of
from harness.records.schema import (
    DataConfig,
    MethodConfig,
    ModelConfig,
    RunConfig,
    RunRecord,
    SamplingConfig,
    SelectionConfig,
    TaskConfig,
)
from harness.records.store import Outcome, folder_of, read_record
from harness.run.cell import Cell, Settings, generation_of_cell
from harness.run.console import Console
from harness.servers.address import ENDPOINT

K = TypeVar("K", bound=Hashable)


class Named(Protocol):
    """What a record says of its model; a `LanguageModel` says it, and `harness.engine.weights.identity` without one."""

    @property
    def name(self) -> str: ...
    @property
    def source(self) -> str: ...
    @property
    def revision(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def heads(self) -> int: ...


def kept_outcomes(
    model: str, asked: Mapping[str, Any], cells: Sequence[Cell], judge: Judge | None
) -> dict[int, Outcome]:
    """By id of a cell, the records that a command leaves as they are; `asked` are its options."""
    if model.startswith(ENDPOINT) or asked["model_base_url"]:
        return {}
    found: dict[int, Outcome] = {}
    path = asked["model_path"]
    identity = identity_of(model_row(model, os.fspath(path) if path else None), asked["dtype"], asked["device"])
    if identity is None:
        return {}
    for cell in cells:
        with suppress(HarnessError):  # what is wrong is said where the cell runs
            done = kept_outcome(identity, cell, judge)
            if done is not None:
                found[id(cell)] = done
    return found


def kept_outcome(model: Named, cell: Cell, judge: Judge | None) -> Outcome | None:
    """What a run of this cell would leave as it is; None where there is something to do, or another process does it."""
    config = config_of(model, cell, judge)
    folder = folder_of(Path(cell.settings.output_path), config)
    if not (folder / "run.json").is_file() or (folder / "lock").exists():
        return None
    record = read_record(folder)
    if not is_finished(record, cell.settings):
        return None
    return Outcome(record, folder, exit_code(record, cell.settings))


def same_records(model: Named, cells: Mapping[K, Cell], judge: Judge | None) -> dict[K, K]:
    """By name of a cell, the first one that has the same record: only that one runs, and its outcome is of both.

    Options that are written in two ways, or decided by the model, can be one. Cells that have no configuration say why when they
    run.
    """
    firsts: dict[Path, K] = {}
    found = {name: name for name in cells}
    for name, cell in cells.items():
        with suppress(Exception):
            folder = folder_of(Path(cell.settings.output_path), config_of(model, cell, judge))
            found[name] = firsts.setdefault(folder, name)
    return found


def is_finished(record: RunRecord, settings: Settings) -> bool:
    """Whether the command has nothing to add."""
    return record.status == "complete" or (record.status == "partial" and not settings.retry_failed)


def other_servers(record: RunRecord, config: RunConfig) -> list[str]:
    """What to know where answers or ratings of the record are of another address, whose weights nobody here can compare."""
    found = [note for note in record.notes if _ELSEWHERE in note]
    was, now = record.config, config
    asked: list[tuple[str, str | None, str | None]] = []
    if was.model.name.startswith(ENDPOINT):
        asked.append(("answers", was.model.id, now.model.id))
    if was.judge is not None and now.judge is not None:
        asked.append(("ratings", was.judge.base_url, now.judge.base_url))
    for what, before, address in asked:
        note = (
            f"{what} {_ELSEWHERE} {before}, and this command says {address}; another --output_path keeps the two apart"
        )
        if before != address and note not in found:
            found.append(note)
    return found


_ELSEWHERE = "here are of"


def say_kept(record: RunRecord, folder: Path, console: Console) -> None:
    failed = record.health.errors + (record.health.unsettled or record.health.unjudged or 0)
    again = f"; {failed} samples failed, --retry_failed tries them again"
    console.say(f"already there: {folder}{again if record.status == 'partial' else ''}")


def exit_code(record: RunRecord, settings: Settings) -> int:
    if record.health.noop and not settings.allow_noop:
        return 1
    return 3 if record.status == "partial" else 0


def config_of(model: Named, cell: Cell, judge: Judge | None) -> RunConfig:
    """Everything that can change a number on purpose."""
    options = options_of(cell.method.decided(model.heads) if decides(cell.method) else cell.method)
    if cell.method_source is not None:
        options["source_sha256"] = cell.method_source
    settings, fit, decoding = cell.settings, cell.fit_data, generation_of_cell(cell)
    return RunConfig(
        model=ModelConfig(name=model.name, id=_model_id(model.source), revision=model.revision, dtype=model.dtype),
        method=MethodConfig(name=cell.method_name, options=options, preset=cell.preset),
        task=TaskConfig(name=cell.task_name, version=cell.task.version, options=dict(cell.task_options)),
        data=DataConfig(
            description=cell.description,
            fingerprint=fingerprint_of(cell.task, cell.selection),
            split=settings.split,
            fit_split=fit.split,
            fit_task=cell.fit_task[0] if cell.fit_task else None,
            fit_fingerprint=fit.fingerprint,
            fit_options=dict(cell.fit_options),
        ),
        selection=SelectionConfig(
            limit=settings.limit, users=settings.users, control=settings.control, exclude_leaks=settings.exclude_leaks
        ),
        sampling=SamplingConfig(
            temperature=decoding.sampling.temperature,
            top_p=decoding.sampling.top_p,
            top_k=decoding.sampling.top_k,
            seed=decoding.sampling.seed,
            max_new_tokens=decoding.max_new_tokens,
            stop=decoding.stop,
        ),
        judge=judge.config if judge and cell.task.judged else None,
    )


def decides(method: Method) -> bool:
    """Whether it asks about the model, whose heads are counted only then."""
    return type(method).decided is not Method.decided


def _model_id(source: str) -> str:
    """The embedded model's folder as it is called in every installation; any other as it was given."""
    package = Path(__file__).resolve().parents[2]
    inside = Path(source).is_absolute() and Path(source).is_relative_to(package)
    return Path(source).relative_to(package.parent).as_posix() if inside else source
