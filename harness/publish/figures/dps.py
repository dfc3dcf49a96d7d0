"""Figures 3 to 8 of Zhang et al., Preference Heads in Large Language Models, from what `DPS.analysis` leaves in records.

The paper prints no number of these figures and names neither tasks nor users. Ours show one task where the paper shows
maps, mark the preference heads, and put beside every overlap what chance would give.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from harness.publish.figures.style import GREY, answers, bars, curve, data_of, errors, heat, legend, look, sheet
from harness.publish.labels import usual
from harness.records.schema import RunRecord

_TASKS = ("lamp2m", "lamp4")
"""Looked at first where no task is named."""


def users(records: Sequence[RunRecord], task: str | None) -> Figure | None:
    """Figure 3: PCS maps of single users, the model's preference heads outlined."""
    record = _discovered(records, task, lambda r: r.analysis.get("users"))
    if record is None:
        return None
    found = record.analysis
    maps = found["users"]
    count = found["across_users"]["users"] if "across_users" in found else len(maps)
    about = (
        f"{data_of(record)}; {len(maps)} of {count} users, drawn at random, each on its own scale; outlined: the "
        f"{_heads(found['k'])} of highest mean"
    )
    figure, axes = sheet("dps-3", about, len(maps), width=2.3)
    for ax, (user, scores) in zip(axes, maps.items(), strict=True):
        values = np.array(scores, dtype=float)
        image = heat(ax, scores, min(0.0, float(np.nanmin(values))), float(np.nanmax(values)))
        _axes_of_heads(ax, scores)
        ax.set_title(f"user {user}")
        for layer, head, *_ in found["heads"][: found["k"]]:
            for color, line in (("white", 2.6), ("#D55E00", 1.3)):  # seen on dark and on light
                ax.add_patch(Rectangle((head - 0.42, layer - 0.42), 0.84, 0.84, fill=False, ec=color, lw=line))
        scale = figure.colorbar(image, ax=ax, location="bottom", label="PCS (nats per token)", format="%.3g")
        scale.locator = MaxNLocator(3)
    return figure


def overlap(records: Sequence[RunRecord], task: str | None) -> Figure | None:
    """Figure 4: how the Jaccard indices of two users' top heads are spread."""
    record = _discovered(records, task, lambda r: r.analysis.get("across_users"))
    if record is None:
        return None
    found = record.analysis["across_users"]
    counts = np.array(found["histogram"], dtype=float)
    pairs = int(counts.sum())
    about = f"{data_of(record)}; {pairs:,} pairs of {found['users']} users, top {_heads(found['k'])} of each"
    figure, (ax,) = sheet("dps-4", about, width=5.2)
    edges = np.linspace(0, 1, len(counts) + 1)
    style = look(0)
    ax.bar(
        edges[:-1], 100 * counts / pairs, 1 / len(counts), align="edge", color=style.color, edgecolor="black", lw=0.6
    )
    ax.axvline(found["mean"], color=look(1).color, linestyle="--", label=f"mean {found['mean']:.2f}")
    ax.axvline(found["chance"], color="black", linestyle=":", label=f"by chance {found['chance']:.2f}")
    low, _, middle, _, high = found["quantiles"]
    ax.set_xlabel(f"Jaccard index of two users' heads (median {middle:.2f}, range {low:.2f} to {high:.2f})")
    ax.set_ylabel("pairs of users (%)")
    ax.set_xlim(-0.02, 1.02)
    legend(figure, ax)
    return figure


def controls(records: Sequence[RunRecord], task: str | None) -> Figure | None:
    """Figure 5: which heads are masked, discovered or random, and what the metric is with each."""
    record = _discovered(records, task, lambda r: r.analysis.get("controls"))
    if record is None:
        return None
    maps = record.analysis["controls"]
    runs: dict[str, list[RunRecord]] = {name: [] for name in maps}
    for other in records:
        control = other.config.method.options.get("control")
        if _same_but(record, other, {"control", "draw"}) and control in runs:
            runs[control].append(other)
    if any(not runs[name] for name in maps):
        return None
    metric = next(iter(record.metrics))
    n = record.metrics[metric].n
    about = (
        f"{data_of(record)}; n = {n}; {metric} with 95 % intervals over users; dotted: rag, which contrasts nothing; a random "
        "mask is drawn anew for each prompt, one of them is shown"
    )
    figure, axes = sheet("dps-5", about, len(maps) + 1, width=2.4)
    shape = _shape(record)
    for ax, (name, heads) in zip(axes, maps.items(), strict=False):
        weights = np.zeros(shape)
        for layer, head, weight in heads:
            weights[int(layer), int(head)] = weight
        image = heat(ax, weights.tolist(), 0, 1)
        _axes_of_heads(ax, weights)
        ax.set_title(_CONTROLS.get(name, name))
    figure.colorbar(image, ax=axes[len(maps) - 1], label="weight taken off")
    last = axes[-1]
    for number, drawn in enumerate(runs.values()):
        values = [run.metrics[metric] for run in drawn]
        x = number + 0.18 * (np.arange(len(values)) - (len(values) - 1) / 2)
        style = look(number)
        heights = np.array([m.value for m in values], dtype=float)
        last.errorbar(x, heights, errors(values), color=style.color, marker=style.marker, ls="", capsize=2.5, ms=5)
    last.set_xticks(range(len(runs)), [_CONTROLS.get(name, name).replace(" ", "\n") for name in runs], fontsize=7)
    last.set_xlim(-0.6, len(runs) - 0.4)
    last.set_ylabel(metric)
    _baseline(last, records, record, metric)
    last.set_title("runs, a point a draw")
    return figure


def head_counts(records: Sequence[RunRecord], task: str | None) -> Figure | None:
    """Figure 6: the task's first two metrics by K."""
    record = _discovered(records, task, lambda r: True)
    if record is None:
        return None
    by_count = {r.analysis["k"]: r for r in records if _same_but(record, r, {"heads"}) and "k" in r.analysis}
    if len(by_count) < 2:
        return None
    counts = sorted(by_count)
    shown = list(record.metrics)[:2]
    every = int(np.prod(_shape(record)))
    n = record.metrics[shown[0]].n
    about = f"{data_of(record)}; n = {n}, 95 % intervals over users; the model has {every} heads"
    figure, (ax,) = sheet("dps-6", about, width=5.2)
    for number, metric in enumerate(shown):
        aside = [k * 2 ** (0.06 * (number - 0.5)) for k in counts]  # so that intervals do not hide each other
        curve(ax, aside, [by_count[k].metrics[metric] for k in counts], number, metric)
    _baseline(ax, records, record, shown[0])
    ax.set_xscale("log", base=2)
    ax.set_xticks(counts, [str(k) for k in counts])
    ax.set_xlabel("K, heads masked in the second pass")
    ax.set_ylabel(" and ".join(shown))
    legend(figure, ax)
    return figure


def head_sets(records: Sequence[RunRecord], task: str | None) -> Figure | None:
    """Figure 7: overlap of the heads chosen for one K with those of another, from disjoint halves of the samples."""
    record = _discovered(records, task, lambda r: r.analysis.get("across_k"))
    if record is None:
        return None
    found = record.analysis["across_k"]
    ks = [str(k) for k in found["k"]]
    samples = record.config.method.options.get("samples")
    about = (
        f"{data_of(record)}; {samples} samples; sets of different K cut from one ranking are nested, so here they come from "
        "disjoint halves of the samples (mean of 20 splits)"
    )
    figure, (left, right) = sheet("dps-7", about, 2, width=3.6)
    image = heat(left, found["halves"], 0, 1, written="{:.2f}")
    left.set_xticks(range(len(ks)), ks)
    left.set_yticks(range(len(ks)), ks)
    left.set_xlabel("K of the other half")
    left.set_ylabel("K of one half")
    figure.colorbar(image, ax=left, label="Jaccard index")
    lines: Mapping[str, Sequence[float]] = {
        "halves of the samples": [row[i] for i, row in enumerate(found["halves"])],
        "two users": found["users"],
        "by chance": found["chance"],
    }
    for number, (name, values) in enumerate(lines.items()):
        style = look(number)
        right.plot(found["k"], values, color=style.color, marker=style.marker, ls=style.line, ms=4.5, label=name)
    right.set_xscale("log", base=2)
    right.set_xticks(found["k"], ks)
    right.set_ylim(-0.02, 1.02)
    right.set_xlabel("K, the same for both sets")
    right.set_ylabel("mean Jaccard index")
    legend(figure, right)
    return figure


def routing(records: Sequence[RunRecord], task: str | None) -> Figure | None:
    """Figure 8: the first metric of every task with users routed to the nearest cluster or to all by distance."""
    pairs: dict[str, dict[str, RunRecord]] = {}
    for record in records:
        options = record.config.method.options
        if _plainly_dps(record, {"clusters", "routing", "samples"}) and options.get("clusters"):
            same = (
                str({k: v for k, v in options.items() if k != "routing"}),
                record.conditions,
                record.config.sampling,
            )
            pairs.setdefault(str(same), {})[str(options["routing"])] = record
    whole = [pair for pair in pairs.values() if len(pair) == 2 and task in (None, pair["hard"].config.task.name)]
    by_task = {pair["hard"].config.task.name: pair for pair in sorted(whole, key=lambda pair: answers(pair["hard"]))}
    by_task = dict(sorted(by_task.items()))
    if not by_task:
        return None
    one = next(iter(by_task.values()))["hard"]
    count = one.config.method.options["clusters"]
    about = f"{one.config.model.name}; {count} clusters; first metric of each task, 95 % intervals over users"
    figure, (ax,) = sheet("dps-8", about, width=max(4.6, 1.3 * len(by_task)))
    labels = []
    for name, pair in by_task.items():
        metric = next(iter(pair["hard"].metrics))
        better = "" if pair["hard"].metrics[metric].higher_is_better else " (lower is better)"
        labels.append(f"{name}\n{metric}{better}\nn = {pair['hard'].metrics[metric].n}")
    for number, kind in enumerate(("hard", "soft")):
        values = [next(iter(pair[kind].metrics.values())) for pair in by_task.values()]
        bars(ax, np.arange(len(values)) + 0.4 * (number - 0.5), values, number, f"{kind} routing", 0.36)
    ax.set_xticks(range(len(labels)), labels)
    ax.set_xlim(-0.8, len(labels) - 0.2)
    ax.set_ylabel("metric")
    legend(figure, ax)
    return figure


_CONTROLS = {"none": "discovered", "random_heads": "random heads", "random_mask": "random mask"}


def _discovered(records: Sequence[RunRecord], task: str | None, wanted: Callable[[RunRecord], Any]) -> RunRecord | None:
    """The run of `dps` as it comes that has what is wanted, of several the one with most answers; where no task is named, of the
    first that the paper has."""
    plainly = [r for r in records if _plainly_dps(r, set()) and "heads" in r.analysis and wanted(r)]
    found = {r.config.task.name: r for r in sorted(plainly, key=answers)}
    order = [task] if task else [*_TASKS, *sorted(name for name in found if name.startswith("lamp"))]
    return next((found[name] for name in order if name in found), None)


def _plainly_dps(record: RunRecord, free: set[str]) -> bool:
    """Whether it is a run of `dps` with its defaults, besides the options that are free."""
    config = record.config
    if config.method.name != "dps" or config.method.preset or config.selection.control != "none":
        return False
    given = config.method.options
    return all(given.get(name, own[0]) in own for name, own in usual("dps").items() if name not in free)


def _same_but(record: RunRecord, other: RunRecord, free: set[str]) -> bool:
    """Whether two runs differ in these options of the method alone."""
    if not _plainly_dps(other, free):
        return False
    return (record.conditions, record.config.sampling) == (other.conditions, other.config.sampling)


def _baseline(ax: Axes, records: Sequence[RunRecord], record: RunRecord, metric: str) -> None:
    """A line at what `rag` reaches on the same items with the same prompts: the model without any contrast."""

    def prompts(run: RunRecord) -> tuple[object, ...]:
        options = run.config.method.options
        return (run.conditions, run.config.sampling, *(options.get(name) for name in ("retriever", "k", "seed")))

    for other in records:
        if other.config.method.name == "rag" and prompts(other) == prompts(record) and metric in other.metrics:
            value = other.metrics[metric].value
            if value is not None:
                ax.axhline(value, color=GREY, linestyle=(0, (1, 1.5)), label=f"rag, {metric}")
            return


def _shape(record: RunRecord) -> tuple[int, int]:
    """Layers, and heads a layer."""
    return int(np.shape(record.analysis["pcs"])[0]), int(np.shape(record.analysis["pcs"])[1])


def _axes_of_heads(ax: Axes, matrix: Any) -> None:
    layers, heads = np.shape(matrix)
    step = max(1, heads // 8)
    ax.set_xticks(range(0, heads, step))
    ax.set_yticks(range(0, layers, max(1, layers // 8)))
    ax.set_xlabel("head")
    ax.set_ylabel("layer")


def _heads(k: int) -> str:
    return f"{k} heads" if k > 1 else "head"
