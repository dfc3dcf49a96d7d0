"""What `harness run` and `harness show` print of a record."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tabulate import tabulate

from harness.errors import UsageError
from harness.judge.pairwise_record import PairRecord
from harness.records.select import PUBLISHED
from harness.records.store import MetricValue, RunRecord, folder_of, read_record, read_samples
from harness.run.leaks import said


def metrics_table(record: RunRecord) -> str:
    """Metrics with n and their 95 % interval."""
    rows = []
    for name, m in record.metrics.items():
        value = "-" if m.value is None else f"{m.value:.4f}"
        interval = "" if m.low is None or m.high is None else f"[{m.low:.4f}, {m.high:.4f}]"
        rows.append([name, value, interval, m.n, m.note])
    return tabulate(rows, headers=["metric", "value", "95 % interval", "n", "note"], disable_numparse=True)


def pairs_table(record: PairRecord) -> str:
    """A comparison of two runs: both sides beside each other, then what is of the pair."""
    a, b = record.config.runs
    names = [run.method.name for run in (a, b)] if a.method.name != b.method.name else [run.hash8() for run in (a, b)]
    rows = [
        [name, *(_with_interval(record.metrics[side].get(name)) for side in ("a", "b", "b-a"))]
        for name in record.metrics.get("a", {})
    ]
    rows += [[name, "", "", _with_interval(metric)] for name, metric in record.metrics.get("both", {}).items()]
    n = f"n = {record.compared} of {record.pairs} pairs"
    return tabulate(rows, headers=[n, *names, f"{names[1]} - {names[0]}"], disable_numparse=True)


def _with_interval(metric: MetricValue | None) -> str:
    if metric is None or metric.value is None:
        return "-"
    interval = "" if metric.low is None or metric.high is None else f" [{metric.low:.3f}, {metric.high:.3f}]"
    return f"{metric.value:.3f}{interval}"


def warnings(record: RunRecord) -> list[str]:
    """What a reader must know before quoting the numbers."""
    health, lines = record.health, []
    if health.noop:
        lines.append("the method changed nothing: its outputs equal the unedited model's (--allow_noop accepts that)")
    if health.errors:
        lines.append(f"{health.errors} samples failed and are in no metric; 'harness show' names them")
    if health.unjudged and record.config.judge is None:
        lines.append("no judge was asked: 'harness score RUN --judge ...' judges the saved responses")
    elif health.unjudged:
        lines.append(
            f"{health.unjudged} samples have no answer of the judge and are in no metric of it; "
            "'harness score RUN' asks again"
        )
    if health.unrated:
        lines.append(
            f"the judge refused to rate {health.unrated} samples or gave no number; they are in no metric of it"
        )
    if health.unsettled and health.unrated:
        lines.append(
            f"{health.unsettled} samples have an answer of the judge that is not whole (cut off, empty, or nothing but thoughts) or "
            "none; 'harness score RUN' asks again"
        )
    if record.judging is not None and record.judging.greedy is False:
        lines.append(
            "the judge's server takes no temperature 0: its ratings are draws, and another run of it gives others"
        )
    if record.config.judge is not None and record.config.judge.name == "lexicon":
        lines.append("judged by word lists: not comparable with a language model's judgement")
    if health.unparsed:
        lines.append(f"{health.unparsed} responses could not be parsed by the official rule")
    if health.truncated:
        lines.append(f"{health.dropped_items} history items did not fit the context, in {health.truncated} samples")
    if record.leaks:
        lines.append(said(record.leaks, sum(map(len, record.batches))))
    if health.cut_contexts:
        lines.append(f"{health.cut_contexts} contexts did not fit and were cut from the left, as lm-eval does")
    return lines


def reproduced(folder: Path, record: RunRecord) -> str:
    """How a run's metrics agree with the published record of its configuration; empty where there is none beside it."""
    published = folder_of(PUBLISHED, record.config)
    if folder.resolve() == published.resolve() or not (published / "run.json").is_file():
        return ""
    theirs = read_record(published).metrics
    numbers, differing = [], False
    for name, metric in record.metrics.items():
        mine, other = _short(metric), _short(theirs.get(name))
        numbers.append(f"{name} {mine}" if mine == other else f"{name} {mine}, published {other}")
        differing |= mine != other
    said = "; ".join(numbers) if differing else ", ".join(numbers)
    return f"{'differs from' if differing else 'reproduces'} {published}: {said}{'' if differing else ' (same)'}"


def _short(metric: MetricValue | None) -> str:
    """`.7312`, as a table has it."""
    if metric is None or metric.value is None:
        return "-"
    return f"{metric.value:.4f}".replace("0.", ".", 1) if abs(metric.value) < 1 else f"{metric.value:.4f}"


def show_runs(folders: Sequence[Path], count: int) -> str:
    """Records in full, then `count` samples that all of them have, one column a run."""
    records = [read_record(folder) for folder in folders]
    tasks = list(dict.fromkeys(record.config.task.name for record in records))
    if len(tasks) > 1:
        raise UsageError(f"runs of different tasks have no sample in common: {', '.join(tasks)}; show them one by one")
    parts = []
    for record, folder in zip(records, folders, strict=True):
        config = record.config
        options = ", ".join(f"{k}={v}" for k, v in config.method.options.items())
        facts = {
            "run": str(folder),
            "status": record.status + (f" ({record.error})" if record.error else ""),
            "model": f"{config.model.name} ({config.model.id}, {config.model.revision[:24]}, {config.model.dtype})",
            "method": f"{config.method.name} {options}",
            "data": f"{config.data.description}; split {config.data.split}, fit {config.data.fit_split or '-'}",
            "health": _pairs(record.health.model_dump()),
            "cost": _pairs(record.cost.model_dump()),
            "judge": f"{config.judge.name} {_pairs(config.judge.options)}" if config.judge else "",
            "judging": _pairs(record.judging.model_dump()) if record.judging else "",
            "notes": "; ".join(record.notes),
        }
        parts.append(tabulate([[k, v] for k, v in facts.items() if v], tablefmt="plain", maxcolwidths=[None, 110]))
        parts.append(metrics_table(record))
    samples = [{sample.id: sample for sample in read_samples(folder)} for folder in folders]
    common = [i for i in samples[0] if all(i in other for other in samples[1:])]
    failed = [s for run in samples for s in run.values() if s.error is not None]
    for i in common[:count]:
        first = samples[0][i]
        rows = [["expected", " | ".join(first.targets), ""]]
        for record, run in zip(records, samples, strict=True):
            sample = run[i]
            numbers = ", ".join(f"{k} {v:.3f}" for k, v in sample.metrics.items() if v is not None)
            rows.append([record.config.method.name, sample.error or sample.response or "", numbers])
        parts.append(f"sample {i}, user {first.user}, {first.history_items} history items")
        parts.append(tabulate(rows, tablefmt="plain", maxcolwidths=[None, 80, 30]))
    if failed:
        parts.append(f"{len(failed)} failed samples:")
        parts.append("\n".join(f"  {sample.id}: {sample.error}" for sample in failed[:20]))
    return "\n\n".join(parts)


def _pairs(values: dict[str, object]) -> str:
    shown = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in values.items() if v is not None}
    return ", ".join(f"{k} {v}" for k, v in shown.items())
