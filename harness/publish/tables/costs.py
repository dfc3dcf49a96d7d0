"""What decoding costs beside what a paper prints: its formula, the true count, and what runs took.

published  as printed
formula    `flops.dps_estimate`, the paper's estimate as reconstructed
counted    `flops.decoding`, the matrix products of the engine's passes for one sample of that length
           where a run record has it, of the run's own passes
measured   seconds a sample of a `rag` and a `dps` run on the same samples, prompts and hardware
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence

from harness.engine.flops import SIZES, Sizes, decoding, dps_estimate
from harness.publish.tables.grid import MISSING, Entry, Grid, Line, Source
from harness.publish.tables.measured import Run, is_another_method
from harness.publish.tables.missing import Gap
from harness.publish.tables.published import Table
from harness.publish.tables.sources import Sources, View
from harness.records.schema import RunRecord

_TERA = 1e12
_STREAMS = {"rag": 1, "dps": 2}


def build(table: Table, sources: Sources, view: View) -> Grid:
    """The table with counts for its prompt lengths, also of a model it lacks where that is asked for, and what runs took."""
    grid = Grid(table)
    new = int(table.keys["new_tokens"])
    lengths = list(dict.fromkeys(int(row.keys["prompt_tokens"]) for row in table.rows))
    models = list(dict.fromkeys(row.keys["model"] for row in table.rows)) if view.model is None else [view.model]
    for name in models if view.published else ():
        counted = view.measured and name in SIZES
        for length in lengths:
            lines = list(_published(table, name, length))
            if counted:
                lines.append(_computed(table, name, length, "formula", dps_estimate))
                lines.append(_computed(table, name, length, "counted", decoding))
            grid.add(lines)
        if counted:
            grid.remarks += _explained(table.printed("model", name), SIZES[name], lengths, new)
    if view.measured:
        for rag, dps in sorted(pairs(sources.records, view.model), key=lambda pair: pair[0].config.model.name):
            grid.add(_measured(table, rag, dps))
        if any(line.source == "measured" for line in grid.lines):
            grid.remarks.append(
                "measured = seconds of the run's batches by their samples, without loading, fitting and grading, but with whatever "
                "else the machine did, so no overhead is taken of them; bench/decode.py times methods in turn"
            )
    return grid


def gaps(table: Table, sources: Sources, model: str | None) -> Iterator[Gap]:
    """The pair of runs on headlines that shows what decoding took, where there is none of the model on any task."""
    of_paper = {row.keys["model"] for row in table.rows}
    for name in sorted(of_paper) if model is None else [model]:
        if not any(pairs(sources.records, name)):
            yield from (Gap(name, method, "lamp4", official=name in of_paper) for method in _STREAMS)


def _published(table: Table, model: str, length: int) -> Iterator[Line]:
    for row in table.rows:
        if (row.keys["model"], row.keys["prompt_tokens"]) == (model, str(length)):
            yield Line.printed(table, row)


def _computed(
    table: Table, model: str, length: int, source: Source, operations: Callable[[Sizes, int, int, int], int]
) -> Line:
    new = int(table.keys["new_tokens"])
    counts = {name: operations(SIZES[model], length, new, n) / _TERA for name, n in _STREAMS.items()}
    entries = _entries(table, counts, "{:.2f}")
    keys = {**table.keys, "model": model, "prompt_tokens": str(length)}
    return Line((table.printed("model", model), str(length)), source, keys, entries, (None,) * len(entries))


def _measured(table: Table, rag: RunRecord, dps: RunRecord) -> list[Line]:
    """Two lines: TFLOPs a sample as the engine counted them, and seconds a sample."""
    config, runs = rag.config, {"rag": rag, "dps": dps}
    tokens = round((rag.cost.prefill_tokens or 0) / _samples(rag))
    limit = config.sampling.max_new_tokens
    labels = (table.printed("model", config.model.name), f"{tokens} ({config.task.name}, T ≤ {limit})")
    keys = {
        "model": config.model.name,
        "task": config.task.name,
        "prompt_tokens": str(tokens),
        "new_tokens": str(limit),
    }
    shown = {name: Run(run, (), 0) for name, run in runs.items()}
    behind = tuple(shown[column.keys["method"]] for column in table.columns)
    operations = {name: (run.cost.flops or 0) / _TERA / _samples(run) for name, run in runs.items()}
    seconds = {name: (run.cost.seconds or 0) / _samples(run) for name, run in runs.items()}
    return [
        Line(labels, "counted", keys, _entries(table, operations, "{:.3g}"), behind),
        Line(labels, "measured", keys, _entries(table, seconds, "{:.3g} s", metric="seconds"), behind),
    ]


def _entries(table: Table, values: Mapping[str, float], form: str, metric: str = "") -> tuple[Entry, ...]:
    """A cell for each column: each method's value, and how many times `rag`'s that of `dps` is.

    `metric` says what the values are where they are no TFLOPs; of seconds no ratio is given, since what else the machine did at
    each run's time can change it twentyfold.
    """
    entries = []
    for column in table.columns:
        if column.keys["metric"] != "overhead":
            value = values[column.keys["method"]]
            entries.append(Entry(form.format(value), value, keys={"metric": metric} if metric else {}))
        elif metric:
            entries.append(MISSING)
        else:
            ratio = values["dps"] / values["rag"]
            entries.append(Entry(f"{ratio:.2f}×", ratio))
    return tuple(entries)


def pairs(records: Sequence[RunRecord], model: str | None) -> Iterator[tuple[RunRecord, RunRecord]]:
    """Finished runs of `rag` and `dps` that answered the same samples with the same prompts on the same machine."""
    latest: dict[str, dict[str, RunRecord]] = {}
    for record in sorted(records, key=lambda record: record.started or ""):
        config = record.config
        wanted = config.method.name in _STREAMS and model in (None, config.model.name)
        if not wanted or is_another_method(record):
            continue
        if record.status != "complete" or not record.cost.seconds or not record.cost.flops:
            continue
        prompt = {name: config.method.options.get(name) for name in ("retriever", "k", "seed")}
        sampling, batch = config.sampling.model_dump(), record.batch.sizes
        ids = sorted(i for batch in record.batches for i in batch)
        same = [config.model.model_dump(), config.task.model_dump(), config.data.fingerprint, ids, prompt, sampling]
        key = json.dumps([*same, batch, record.hardware], sort_keys=True, default=str)
        latest.setdefault(key, {})[config.method.name] = record
    for pair in latest.values():
        if len(pair) == len(_STREAMS):
            yield pair["rag"], pair["dps"]


def _samples(record: RunRecord) -> int:
    return sum(len(batch) for batch in record.batches)


def _explained(model: str, sizes: Sizes, lengths: Sequence[int], new: int) -> list[str]:
    head = sizes.head(1) / _TERA
    all_positions = ", ".join(f"{head * length:.2f} at {length}" for length in lengths)
    return [
        "formula = the paper's estimate as reconstructed (it prints none): attention and MLP without grouped queries or "
        "gate, no vocabulary head",
        f"counted = every matrix product of {model} in the passes the engine makes for one sample; each stream pays the "
        f"vocabulary head at its {new} answer positions ({head * new:.3f} TFLOP), and never over the rest of the prompt, "
        f"where it would add {all_positions}",
    ]
