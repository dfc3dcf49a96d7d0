"""Table 1 of the persona-bias paper beside records: a persona prompted, clamped, and under the clamp's controls.

A line a setting, since settings differ more than the paper says (it names no coefficient and no norm). Coherence and
refusals stand beside the scores, without which a score near zero may be gibberish. Of each clamp a verdict: whether every
score is at most half the prompted one with answers still coherent, by the ends of the 95 % intervals that speak against
it, and whether the controls of that clamp do as much.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from harness.plugins.registry import method_class
from harness.publish.tables.differences import difference
from harness.publish.tables.grid import MISSING, Entry, Grid, Line
from harness.publish.tables.measured import Run, changed_options, has_options, why_not_comparable
from harness.publish.tables.published import Column, Table
from harness.publish.tables.runs import gaps as gaps
from harness.publish.tables.sources import Sources, View
from harness.records.schema import MetricValue, RunRecord
from harness.tasks.persona import COHERENT

BASELINE, CLAMP = "plain", "clamp"
CONTROL = ("control", "draw", "fit_task")
"""What makes a control of a clamp; the rest is the clamp."""


@dataclass(frozen=True)
class Setting:
    """One record of the table, by what is not a default in it."""

    record: RunRecord
    options: Mapping[str, str]

    @property
    def clamp(self) -> tuple[tuple[str, str], ...]:
        """The clamp that it is, or is a control of."""
        return tuple((name, value) for name, value in self.options.items() if name not in CONTROL)

    @property
    def is_control(self) -> bool:
        return any(name in self.options for name in CONTROL)

    @property
    def label(self) -> str:
        return " ".join(f"{name}={value}" for name, value in self.options.items())

    @property
    def control(self) -> str:
        return " ".join(f"{name}={value}" for name, value in self.options.items() if name in CONTROL)

    def metric(self, name: str) -> MetricValue:
        return self.record.metrics.get(name) or MetricValue(value=None, n=0)


def build(table: Table, sources: Sources, view: View) -> Grid:
    """The table with what the records have for it, a block a model."""
    task = table.columns[0].keys["task"]
    beside = tuple(Column(name.title(), {"task": task, "metric": name}) for name in ("coherence", "refused"))
    grid = Grid(replace(table, columns=(*table.columns, *beside)))
    settings = _settings(table, sources.records, grid) if view.measured else []
    of_paper = list(dict.fromkeys(row.keys["model"] for row in table.rows))
    measured = {setting.record.config.model.name for setting in settings}
    for model in [*of_paper, *(name for name in sources.models if name in measured - set(of_paper))]:
        if view.model in (None, model):
            own = [setting for setting in settings if setting.record.config.model.name == model]
            published = list(_published(grid, table, model, view))
            grid.add([*published, *(line for setting in own for line in _measured(grid, table, setting, published))])
            grid.remarks += _verdicts(table, own)
    if view.measured and not settings:
        grid.remarks.append("nothing measured yet: 'harness table --missing' prints the commands that fill this table")
    return grid


def halved(table: Table, setting: Setting, baseline: Setting) -> int:
    """How many scores are at most half the baseline's: the upper end of the one interval, the lower end of the other."""
    pairs = [(setting.metric(c.keys["metric"]).high, baseline.metric(c.keys["metric"]).low) for c in table.columns]
    return sum(high is not None and low is not None and high <= low / 2 for high, low in pairs)


def coherent(setting: Setting) -> bool:
    """Whether the whole interval of the mean coherence is one of answers that can be read."""
    low = setting.metric("coherence").low
    return low is not None and low >= COHERENT


def _settings(table: Table, records: Sequence[RunRecord], grid: Grid) -> list[Setting]:
    """One a line: baselines first, then clamps, each before its controls. Of equal labels the comparable, largest, latest."""
    found: dict[tuple[str, str, str], list[Setting]] = {}
    for record in records:
        config = record.config
        wanted = config.task.name == table.columns[0].keys["task"] and config.data.split == table.keys["split"]
        named = config.method.name in (BASELINE, CLAMP) and config.selection.control == "none"
        if wanted and named and record.status in ("complete", "partial") and has_options(record, table):
            setting = Setting(record, _options(record))
            found.setdefault((config.model.name, config.method.name, setting.label), []).append(setting)
    shown = []
    for (model, method, label), settings in found.items():
        best = max(settings, key=lambda s: _preference(s.record, table))
        shown.append(best)
        if len(settings) > 1:
            folder = best.record.folder.name if best.record.folder else best.record.hash
            grid.remarks.append(f"{len(settings) - 1} more of {method} {label}, {model} not shown beside {folder}")
    return sorted(shown, key=lambda s: (s.record.config.method.name != BASELINE, s.clamp, s.is_control, s.control))


def _options(record: RunRecord) -> dict[str, str]:
    """What is not the method's default of the options that decide how it steers, and what its vectors are of."""
    decides, fit_task = method_class(record.config.method.name).decode_only, record.config.data.fit_task
    changed = {name: str(value) for name, value in changed_options(record).items() if name in decides}
    return changed | ({"fit_task": fit_task} if fit_task else {})


def _preference(record: RunRecord, table: Table) -> tuple[bool, bool, int, str]:
    n = max((metric.n for metric in record.metrics.values()), default=0)
    return (not _reasons(record, table), record.status == "complete", n, record.started or "")


def _reasons(record: RunRecord, table: Table) -> list[str]:
    """Why it is not comparable with the published cell; how it steers stands in the label."""
    method = record.config.method.name
    reasons = [reason for reason in why_not_comparable(record, table) if not reason.startswith(f"{method} with ")]
    decides, judge = method_class(method).decode_only, record.config.judge
    fitted = {k: v for k, v in changed_options(record).items() if k not in decides}
    if judge and fitted.get("judge") == judge.name:  # the paper too filters by the judge that scores
        del fitted["judge"]
    said = ", ".join(f"{name}={value}" for name, value in fitted.items())
    return [*reasons, *([f"vectors extracted with {said}"] if said else [])]


def _published(grid: Grid, table: Table, model: str, view: View) -> Iterator[Line]:
    for row in table.rows:
        if view.published and row.keys["model"] == model:
            line = Line.printed(table, row)
            more = len(grid.table.columns) - len(line.entries)
            yield replace(line, entries=(*line.entries, *[MISSING] * more), runs=(*line.runs, *[None] * more))


def _measured(grid: Grid, table: Table, setting: Setting, published: Sequence[Line]) -> Iterator[Line]:
    """Its line; and of a setting that the paper's row is about, the one with the method's defaults, the difference."""
    config, reasons = setting.record.config, _reasons(setting.record, table)
    run = Run(setting.record, tuple(reasons), 0)
    name = table.printed("method", config.method.name)
    said = f"- {setting.control}" if setting.is_control else f"{name} ({setting.label})" if setting.label else name
    labels = (table.printed("model", config.model.name), said)
    entries = []
    for column in grid.table.columns:
        metric = setting.metric(column.keys["metric"])
        if metric.low == metric.high:  # of equal values older versions said so, which says nothing
            metric = metric.model_copy(update={"low": None, "high": None})
        marks = grid.mark([*reasons, *([metric.note] if metric.note else [])])
        entries.append(
            replace(MISSING, marks=marks)
            if metric.value is None
            else Entry(
                f"{metric.value:.{2 if column in table.columns else 1}f}",
                metric.value,
                metric.low,
                metric.high,
                metric.n,
                marks,
            )
        )
    keys = {"model": config.model.name, "method": config.method.name, "setting": setting.label}
    line = Line(labels, "measured", keys, tuple(entries), (run,) * len(entries), ranked=False)
    yield line
    own = [row for row in published if row.keys["method"] == config.method.name and not setting.label]
    between = difference(own[0], line) if own else None
    if between:
        yield between


def _verdicts(table: Table, settings: Sequence[Setting]) -> Iterator[str]:
    """Of each clamp that has a baseline of the same questions, prompts, sampling and judge."""
    baselines = [s for s in settings if s.record.config.method.name == BASELINE]
    for setting in settings:
        baseline = next((b for b in baselines if _asked(b) == _asked(setting)), None)
        if setting.is_control or setting.record.config.method.name != CLAMP or baseline is None:
            continue
        controls = [s for s in settings if s.is_control and s.clamp == setting.clamp and _asked(s) == _asked(setting)]
        every = len(table.columns)
        too = [s.control for s in controls if halved(table, s, baseline) == every and coherent(s)]
        of_controls = (
            f"of its {len(controls)} controls do both: {', '.join(too) or 'none'}" if controls else "no controls"
        )
        yield (
            f"{setting.record.config.model.name}, clamp{f' ({setting.label})' if setting.label else ''}: mean score "
            f"{_with_interval(baseline, 'trait')} -> {_with_interval(setting, 'trait')}, coherence "
            f"{_with_interval(baseline, 'coherence')} -> {_with_interval(setting, 'coherence')}, n = "
            f"{setting.metric('trait').n}; at least halves {halved(table, setting, baseline)} of {every} scores, "
            f"{'keeps' if coherent(setting) else 'does not keep'} a coherence of {COHERENT:.0f}; {of_controls}"
        )


def _asked(setting: Setting) -> tuple[object, ...]:
    return (setting.record.conditions, setting.record.config.sampling)


def _with_interval(setting: Setting, name: str) -> str:
    metric = setting.metric(name)
    if metric.value is None:
        return "-"
    interval = "" if metric.low is None or metric.high is None else f" [{metric.low:.1f}, {metric.high:.1f}]"
    return f"{metric.value:.1f}{interval}"
