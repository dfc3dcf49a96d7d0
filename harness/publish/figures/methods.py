"""Every ranked method of a model beside copying the input: with a user's own history, and with another user's."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import fill

import numpy as np
from matplotlib.figure import Figure

from harness.publish.figures.style import answers, errors, look, sheet
from harness.publish.labels import selected
from harness.publish.leaderboard import FOR_NOTHING, Ranking, own_hash, rankings
from harness.records.schema import RunRecord

FIRST = ("lamp4", "lamp7")
"""The tasks shown where none is named."""


def ranked(records: Sequence[RunRecord], task: str | None) -> Figure | None:
    """One axes a task, a row a method, best first; where `copy` was run a line through its value."""
    tasks = (task,) if task else FIRST
    whole = [r for r in rankings(records) if r.task in tasks and r.control == "none" and _whole(r)]
    own = {r.task: r for r in sorted(whole, key=lambda r: max(answers(row.run) for row in r.rows))}
    if not own:
        return None
    others = {(r.config.task.name, own_hash(r)): r for r in records if r.config.selection.control == "wrong_user"}
    shown = [own[name] for name in tasks if name in own]
    about = f"{shown[0].model}, the ranked run of each method; 95 % intervals over users; dotted: copying the input"
    tallest = max(len(ranking.rows) for ranking in shown)
    figure, axes = sheet("methods", about, len(shown), width=3.6, height=0.27 * tallest + 0.8)
    for ax, ranking in zip(axes, shown, strict=True):
        rows = [row.run for row in reversed(ranking.rows) if row.place]  # without one it is a variant or has no value
        sign = 1 if ranking.higher_is_better else -1
        rows.sort(key=lambda run: sign * _value(run, ranking.metric))
        for number, control in enumerate(("none", "wrong_user")):
            runs = {
                y: run if control == "none" else others.get((ranking.task, own_hash(run))) for y, run in enumerate(rows)
            }
            values = {
                y: run.metrics[ranking.metric]
                for y, run in runs.items()
                if run and ranking.metric in run.metrics and run.metrics[ranking.metric].value is not None
            }
            style, label = look(number), ("own history", "another user's history")[number]
            x = np.array([m.value for m in values.values()], dtype=float)
            height = [y - 0.16 * number for y in values]
            spread = errors(list(values.values()))
            ax.errorbar(
                x, height, xerr=spread, color=style.color, marker=style.marker, ls="", capsize=2.5, ms=5, label=label
            )
        for run in rows:
            if run.config.method.name == FOR_NOTHING:
                ax.axvline(_value(run, ranking.metric), color="black", ls=":", lw=1)
        ax.set_yticks(range(len(rows)), [run.config.method.name for run in rows])
        of = " · ".join([ranking.task, *selected(rows[0])])
        ax.set_title(fill(f"{of}: {ranking.metric}, n = {max(map(answers, rows))}", 44))
        ax.set_xlim(left=0)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2)
    return figure


def _value(run: RunRecord, metric: str) -> float:
    found = run.metrics[metric].value
    assert found is not None, "what is ranked has a value"
    return found


def _whole(ranking: Ranking) -> bool:
    """Whether it is of users nothing was fitted on, and of more than one method."""
    return ranking.rows[0].run.config.data.split != "train" and sum(row.place is not None for row in ranking.rows) > 1
