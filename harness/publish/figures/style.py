"""How figures look: colours that the colour-blind tell apart, and a marker, line or hatch beside each, so grey will do.

Colours are Okabe and Ito's; maps use cividis, whose lightness rises evenly. Nothing depends on the day or the machine, so
the same records give the same bytes with the same matplotlib.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text

from harness.files.shown import printable
from harness.publish.figures.specs import FIGURES
from harness.records.schema import MetricValue, RunRecord

MAP = "cividis"
GREY = "0.45"


class Look(NamedTuple):
    color: str
    marker: str
    line: str
    hatch: str


LOOKS = (
    Look("#0072B2", "o", "-", ""),
    Look("#D55E00", "s", "--", "///"),
    Look("#009E73", "^", "-.", "..."),
    Look("#CC79A7", "D", ":", "xxx"),
    Look("#E69F00", "v", "-", "\\\\\\"),
    Look("#56B4E9", "P", "--", "+++"),
    Look("#000000", "X", "-.", "---"),
    Look("#999999", "*", ":", "ooo"),
)

_RC: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": False,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "hatch.linewidth": 0.6,
    "text.parse_math": False,  # a name may hold dollar signs
}


def look(number: int) -> Look:
    return LOOKS[number % len(LOOKS)]


def sheet(
    id: str, about: str, columns: int = 1, rows: int = 1, *, width: float = 3.4, height: float = 2.7
) -> tuple[Figure, list[Axes]]:
    """A figure of columns x rows axes, each `width` x `height` inches, and its axes row by row.

    `about` stands under its title: model, data and n.
    """
    size = (max(4.6, width * columns), height * rows + 0.9)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
    below = "\n".join(textwrap.wrap(about, int(size[0] * 15)))
    figure.suptitle(f"{FIGURES[id].title} ({FIGURES[id].place})\n{below}", fontsize=9, x=0.01, ha="left")
    return figure, axes


def legend(figure: Figure, ax: Axes) -> None:
    """Under the axes, where it hides nothing."""
    handles, labels = ax.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(5, len(labels)))


def looks() -> AbstractContextManager[None]:
    """What a figure is drawn and saved in."""
    return matplotlib.rc_context(_RC)


def rendered(figure: Figure, fmt: str, id: str) -> bytes:
    """The figure as a file of `fmt`. The same figure gives the same bytes."""
    file = io.BytesIO()
    metadata: dict[str, Any] = {"Title": id, "Date": None} if fmt == "svg" else {"Title": id, "Software": None}
    for text in figure.findobj(Text):
        text.set_text(printable(text.get_text()))
    with matplotlib.rc_context({**_RC, "svg.hashsalt": id}):
        figure.savefig(file, format=fmt, dpi=150, metadata=metadata)
    return file.getvalue()


def curve(ax: Axes, x: Sequence[float], values: Sequence[MetricValue], number: int, label: str) -> None:
    """Metric values joined by a line, with their 95 % intervals."""
    shown = [(at, m) for at, m in zip(x, values, strict=True) if m.value is not None]
    style = look(number)
    ax.errorbar(
        [at for at, _ in shown],
        np.array([m.value for _, m in shown], dtype=float),
        yerr=errors([m for _, m in shown]),
        color=style.color,
        marker=style.marker,
        linestyle=style.line,
        markersize=4.5,
        linewidth=1.4,
        capsize=2.5,
        elinewidth=0.8,
        label=label,
    )


def bars(ax: Axes, x: np.ndarray, values: Sequence[MetricValue], number: int, label: str, width: float = 0.8) -> None:
    """Metric values as bars with their 95 % intervals; none where there is no value."""
    style = look(number)
    ax.bar(
        x,
        np.array([m.value for m in values], dtype=float),
        width,
        yerr=errors(values),
        color=style.color,
        alpha=0.75,
        edgecolor="black",
        linewidth=0.6,
        hatch=style.hatch,
        error_kw={"elinewidth": 0.9, "capsize": 2.5},
        label=label,
    )


def errors(values: Sequence[MetricValue]) -> np.ndarray:
    """Lengths of the error bars, [2, n]; 0 where there is no interval."""
    ends = [
        (0.0, 0.0) if m.value is None or m.low is None or m.high is None else (m.value - m.low, m.high - m.value)
        for m in values
    ]
    return np.maximum(np.array(ends).reshape(-1, 2).T, 0)


def heat(
    ax: Axes, matrix: Sequence[Sequence[float | None]], low: float, high: float, *, written: str | None = None
) -> Any:
    """A map with row 0 at the bottom; `written` is the format of the numbers in its cells. Returns what a colour bar needs."""
    values = np.array(matrix, dtype=float)
    image = ax.imshow(values, cmap=MAP, vmin=low, vmax=high, origin="lower", aspect="auto", interpolation="nearest")
    if written is not None:
        for (row, column), value in np.ndenumerate(values):
            dark = value < low + 0.55 * (high - low)
            if not np.isnan(value):
                color = "white" if dark else "black"
                ax.text(
                    column,
                    row,
                    written.format(round(value, 2) + 0.0),
                    ha="center",
                    va="center",
                    fontsize=7,
                    color=color,
                )
    return image


def answers(record: RunRecord) -> int:
    """How many its first metric is a mean over: of runs that are alike beside that, figures show the one with most."""
    return next((metric.n for metric in record.metrics.values()), 0)


def data_of(record: RunRecord) -> str:
    """`tiny on lamp4 (lamp-mini), dev`."""
    config = record.config
    mini = " (lamp-mini)" if "lamp-mini" in config.data.description else ""
    return f"{config.model.name} on {config.task.name}{mini}, {config.data.split} split"
