"""What `harness run` and `harness show` print of a record."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tabulate import tabulate

from harness.errors import HarnessError, UsageError
from harness.files.shown import one_line
from harness.judge.pairwise_record import PairRecord
from harness.judge.words import WORD_LISTS
from harness.plugins.options import rebuild_task
from harness.plugins.registry import task_class
from harness.publish.labels import names_of_a_sample
from harness.records.select import PUBLISHED
from harness.records.store import MetricValue, RunRecord, folder_of, read_record, read_samples
from harness.run.leaks import said
from harness.statistics.answer import shortened
from harness.task import Selection, Task

if TYPE_CHECKING:  # what a table is of need not be loaded for another one
    from harness.judge.reliability import Finding
    from harness.run.contract.certify import Certificate


def metrics_table(record: RunRecord, width: int = 80) -> str:
    """Metrics with n and their 95 % interval; what must be known of them once below, no line longer than `width`."""
    rows, notes = [], dict[str, list[str]]()
    for name, m in record.metrics.items():
        value = "-" if m.value is None else f"{m.value:.4f}"
        interval = "" if m.low is None or m.high is None else f"[{m.low:.4f}, {m.high:.4f}]"
        rows.append([name, value, interval, m.n])
        if m.note:
            notes.setdefault(m.note, []).append(name)
    table = tabulate(rows, headers=["metric", "value", "95 % interval", "n"], disable_numparse=True)
    below = [f"- {', '.join(of)}: {note}" for note, of in notes.items()]
    if ceiling := ceiling_line(record):
        below.append(f"- {ceiling}")
    return "\n".join([table, *(textwrap.fill(line, width, subsequent_indent="  ") for line in below)])


def ceiling_line(record: RunRecord) -> str:
    """The best that can be reached on lamp-mini, whose habits are known; an empty string elsewhere."""
    found = record.analysis.get("ceiling")
    if not found:
        return ""
    seen = ", ".join(f"{found[count]:.4f}" for count in ("0", "1", "5", "all"))
    return f"ceiling of {found['metric']}: {found['known']:.4f} for who knows the habits; {seen} having seen 0, 1, 5, all items"


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


def expert_table(found: Mapping[str, Any]) -> str:
    """What ExPerT's judge came to, each value a mean over answers with its interval over users."""
    rows = [[name, _with_interval(MetricValue(**value))] for name, value in found["metrics"].items()]
    n = f"n = {found['samples'] - found['missing']} of {found['samples']}"
    return tabulate(rows, headers=[n, "F1 of aspects"], disable_numparse=True)


def reliability_table(found: Sequence[Finding]) -> str:
    """How far judges agree, each value with its n and, of shares and distances, its interval."""
    rows = [[one.what, one.of, _with_interval(one.value), one.value.n] for one in found]
    return tabulate(rows, headers=["what", "of", "value", "n"], disable_numparse=True)


def certificate_table(found: Certificate) -> str:
    """What moved under which circumstances, and what it means."""
    rows = [
        [
            one.name,
            f"{len(one.changed)} of {found.samples}",
            f"{one.shift:.1e}",
            "-" if one.metric is None else f"{one.metric:.4f}",
        ]
        for one in found.variants
    ]
    table = tabulate(
        rows, headers=["answered again", "answers changed", "largest shift, nats", found.metric], disable_numparse=True
    )
    recorded = "" if found.recorded is None else f"{found.metric} of the recorded answers: {found.recorded:.4f}. "
    moved = sorted({i for one in found.variants for i in one.changed})
    if not moved:
        verdict = f"All {found.samples} answers are the recorded ones, whatever the batch, the threads and the process."
    elif found.reproduced:
        verdict = (
            f"The recorded batches give the recorded answers. {len(moved)} move with rounding: {', '.join(moved[:5])}."
        )
    else:
        verdict = f"This machine does not give the recorded answers to {len(found.variants[0].changed)} samples."
    notes = [f"- {note}" for note in found.notes]
    return "\n".join([table, textwrap.fill(recorded + verdict, 80), *notes])


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
    if record.config.judge is not None and record.config.judge.name in WORD_LISTS:
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
    numbers, lacking, compared, differing = [], [], 0, False
    for name, metric in record.metrics.items():
        mine, other = _short(metric), _short(theirs.get(name))
        if "-" in (mine, other) and mine != other:  # METEOR without WordNet is no other number
            lacking.append(f"{name} {mine}, published {other}")
            continue
        compared += mine != "-"
        numbers.append(f"{name} {mine}" if mine == other else f"{name} {mine}, published {other}")
        differing |= mine != other
    if not compared:
        numbers, lacking, differing = [*numbers, *lacking], [], True
    said = "; ".join(numbers) if differing else f"{', '.join(numbers)} (same)"
    only_one = f"; not compared: {'; '.join(lacking)}" if lacking else ""
    return f"{'differs from' if differing else 'reproduces'} {published}: {said}{only_one}"


def _short(metric: MetricValue | None) -> str:
    """`.7312`, as a table has it."""
    if metric is None or metric.value is None:
        return "-"
    return f"{metric.value:.4f}".replace("0.", ".", 1) if abs(metric.value) < 1 else f"{metric.value:.4f}"


def show_runs(folders: Sequence[Path], count: int, width: int = 80, data: str | None = None) -> str:
    """Records in full, then `count` samples that all of them have, the runs one below the other."""
    records = [read_record(folder) for folder in folders]
    tasks = list(dict.fromkeys(record.config.task.name for record in records))
    if len(tasks) > 1:
        raise UsageError(f"runs of different tasks have no sample in common: {', '.join(tasks)}; show them one by one")
    parts = []
    for record, folder in zip(records, folders, strict=True):
        parts += [_facts(record, folder, width), metrics_table(record, width)]
    words = [
        textwrap.fill(f"- {word}: {text}", width, subsequent_indent="  ")
        for word, text in WORDS.items()
        if any(word in name for record in records for name in record.metrics)
    ]
    parts += ["\n".join(words)] if words else []
    samples = [{sample.id: sample for sample in read_samples(folder)} for folder in folders]
    common = [i for i in samples[0] if all(i in other for other in samples[1:])][:count]
    failed = [s for run in samples for s in run.values() if s.error is not None]
    questions, why_not = _questions(records[0], data) if common else ({}, "")
    if why_not:
        parts.append(textwrap.fill(f"the questions are not shown: {why_not}", width))
    called = names_of_a_sample(records[0].config.task.name)
    for i in common:
        first = samples[0][i]
        rows = [["question", questions[i]]] if i in questions else []
        rows.append(["expected", " | ".join(first.targets)])
        for record, run in zip(records, samples, strict=True):
            sample = run[i]
            numbers = ", ".join(f"{called.get(k, k)} {v:.3f}" for k, v in sample.metrics.items() if v is not None)
            rows += [[record.config.method.name, sample.error or sample.response or ""], ["", numbers]]
        parts.append(
            f"sample {one_line(i)}, user {one_line(first.user)}, {first.history_items} history items in the prompt"
        )
        parts.append(_lines([row for row in rows if any(row)], width))
    if failed:
        parts.append(f"{len(failed)} failed samples:")
        parts.append("\n".join(shortened(one_line(f"  {sample.id}: {sample.error}"), width) for sample in failed[:20]))
    return "\n\n".join(parts)


WORDS = {
    "lenient": "the answer is searched for a label or number; the official rule wants it to be nothing else",
    "unsplit": "every text is taken as one sentence, which needs none of NLTK's sentence data",
}
"""What is in names of metrics, in words."""
LONGEST = 320
"""Letters of a question that are shown."""


def _questions(record: RunRecord, data: str | None) -> tuple[dict[str, str], str]:
    """Item -> what was asked, read again from the data; or none, and why."""
    config = record.config
    try:
        task = rebuild_task(task_class(config.task.name), config.task.options, data)
        if task.fingerprint(Selection(config.data.split)) != config.data.fingerprint and not _selected(task, record):
            return {}, f"the run read other data ({config.data.description}); give its folder as --data"
        items = task.items(Selection(config.data.split))
    except HarnessError as error:
        return {}, str(error)
    return {item.example.id: shortened(" ".join(item.example.text.split()), LONGEST) for item in items}, ""


def _selected(task: Task, record: RunRecord) -> bool:
    """Whether the data is that of the run's own selection, where a task hashes what is selected alone."""
    config = record.config
    chosen = Selection(
        config.data.split, config.selection.limit, config.selection.users, frozenset(record.held_out_users)
    )
    return task.fingerprint(chosen) == config.data.fingerprint


def _facts(record: RunRecord, folder: Path, width: int) -> str:
    config = record.config
    options = ", ".join(f"{k}={v}" for k, v in config.method.options.items())
    asked = config.selection
    selection = [f"{name} {n}" for name, n in (("limit", asked.limit), ("users", asked.users)) if n is not None]
    selection += [] if asked.control == "none" else [f"control {asked.control}"]
    facts = {
        "run": str(folder),
        "status": record.status + (f" ({record.error})" if record.error else ""),
        "model": f"{config.model.name} ({config.model.id}, {config.model.revision[:24]}, {config.model.dtype})",
        "method": f"{config.method.name} {options}",
        "data": f"{config.data.description}; split {config.data.split}, fit {config.data.fit_split or '-'}",
        "selection": ", ".join(selection),
        "health": "; ".join(health_in_words(record)) or "nothing to report",
        "cost": "; ".join(cost_in_words(record)),
        "judge": f"{config.judge.name} {_pairs(config.judge.options)}" if config.judge else "",
        "judging": _pairs(record.judging.model_dump()) if record.judging else "",
        "server": "; ".join(serving_in_words(record)),
        "notes": "; ".join(record.notes),
    }
    return _lines([[k, v] for k, v in facts.items() if v], width)


def health_in_words(record: RunRecord) -> list[str]:
    """Whether the method did something, and what went wrong."""
    health, said = record.health, []
    if health.noop:
        said.append("the method changed nothing")
    if health.identical_to_base is not None:
        said.append(f"{health.identical_to_base:.0%} of the first answers are those without the method")
    if health.kl_to_base is not None and health.changed_tokens is not None:
        said.append(
            f"it moves the next token's distribution by {health.kl_to_base:.3g} nats and changes "
            f"{health.changed_tokens:.0%} of the likeliest tokens"
        )
    if health.edits_prefill or health.edits_decode:
        said.append(f"{health.edits_prefill or 0} edits in prompts, {health.edits_decode or 0} while decoding")
    for count, what in (
        (health.errors, "samples failed"),
        (health.unjudged, "wait for the judge"),
        (health.unrated, "have no rating"),
        (health.unparsed, "answers could not be parsed"),
        (health.truncated, f"prompts lost history, {health.dropped_items} items in all"),
        (health.cut_contexts, "contexts were cut from the left"),
        (health.hit_max_tokens, "answers ended at the limit of tokens"),
    ):
        if count:
            said.append(f"{count} {what}")
    return said


def cost_in_words(record: RunRecord) -> list[str]:
    """What an answer, a user and the fit took."""
    cost, n, said = record.cost, max(record.samples, 1), []
    if cost.prefill_tokens is not None and cost.decode_tokens is not None:
        said.append(f"an answer: {cost.prefill_tokens / n:.0f} tokens read, {cost.decode_tokens / n:.0f} written")
    if record.operations:
        said.append(f"{_large(record.operations)} operations")
    if cost.seconds is not None:
        said.append(f"{cost.seconds / n:.2g} s ({cost.seconds:.0f} s in all)")
    if cost.fit_seconds is not None:
        said.append(f"fitting, once: {cost.fit_seconds:.3g} s")
    if cost.setup_seconds_per_user is not None:
        said.append(f"a user: {cost.setup_seconds_per_user:.2g} s to adapt")
    if cost.stored_bytes_per_user is not None:
        said.append(f"{_large(cost.stored_bytes_per_user)}B stored")
    if cost.peak_memory_bytes is not None:
        said.append(f"at most {_large(cost.peak_memory_bytes)}B of memory")
    return said


def serving_in_words(record: RunRecord) -> list[str]:
    """What a model behind a server was asked, and what that cost; nothing of one on this machine."""
    serving = record.serving
    if serving is None:
        return []
    said = [serving.base_url, f"{serving.requests} requests, {serving.cached} of them answered for an earlier run"]
    said.append(f"paid for: {serving.input_tokens} tokens read, {serving.output_tokens} written")
    said += [dollars(serving.usd)] if serving.usd is not None else []
    said += [f"{serving.retries} tries failed"] if serving.retries else []
    return said + ([f"choices by {serving.scoring}"] if serving.scoring else [])


def dollars(usd: float) -> str:
    """`$0.0123`: two digits that count."""
    return f"${usd:.2f}" if usd >= 1 or not usd else f"${usd:.2g}"


def _large(number: float) -> str:
    """`1.2 G`"""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.3g} "


def _lines(rows: Sequence[Sequence[str]], width: int) -> str:
    """Names and texts in two columns, the texts wrapped."""
    indent = max(len(name) for name, _ in rows) + 2
    wrapped = (
        textwrap.wrap(text, width, initial_indent=name.ljust(indent), subsequent_indent=" " * indent) or [name]
        for name, text in rows
    )
    return "\n".join(line for lines in wrapped for line in lines)


def _pairs(values: dict[str, object]) -> str:
    shown = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in values.items() if v is not None}
    return ", ".join(f"{k} {v}" for k, v in shown.items())
