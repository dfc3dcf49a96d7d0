"""Heat maps of activation patching: which blocks and heads carry a persona into answers (task `patching`).

Paper: Poonia and Jain, Dissecting Persona-Driven Reasoning in Language Models via Activation Patching. Its figures' numbers
could not be had; what is known of them is in `published.yaml`. A dot marks a value whose 95 % interval, clustered by
question, leaves 0 out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from harness.publish.figures import printed
from harness.publish.figures.style import heat, sheet
from harness.records.schema import RunRecord

_DOT = "a dot: the 95 % interval leaves 0 out"
_RUNS = {"denoised": "clean activations into the corrupted run", "noised": "corrupted activations into the clean run"}
_PARTS = {"mlp_out": "MLP", "attn_out": "attention"}
_ATTENDING = {"clean": "clean", "corrupted": "corrupted", "denoised": "corrupted, first MLP at the identity from clean"}


def blocks(records: Sequence[RunRecord], task: str | None) -> Figure | None:
    """Effects of every block's MLP and attention, by the positions patched, in both directions."""
    record = _patched(records)
    if record is None:
        return None
    found = record.analysis["patching"]
    places = found["positions"]
    rows = [(part, place) for part in _PARTS for place in places]
    count = len(found["sets"]["all"]["denoised"]["mlp_out"][places[0]]["value"])
    paper = printed("patching-blocks")
    about = f"{_about(record)}; {_DOT}; {paper['words']} ({paper['model']}, {paper['place']})"
    figure, axes = sheet("patching-blocks", about, len(_RUNS), width=max(4.0, 0.62 * count + 1.6), height=3.2)
    tables = {run: [found["sets"]["all"][run][part][place] for part, place in rows] for run in _RUNS}
    low, high = _range([line["value"] for lines in tables.values() for line in lines])
    for ax, (run, lines) in zip(axes, tables.items(), strict=True):
        image = heat(ax, [line["value"] for line in lines], low, high, written="{:.2f}" if count <= 16 else None)
        _mark(ax, lines, below=count <= 16)
        ax.set_yticks(range(len(rows)), [f"{_PARTS[part]}, {place}" for part, place in rows])
        ax.invert_yaxis()
        ax.set_xticks(range(0, count, max(1, count // 16)))
        ax.set_xlabel("block")
        ax.set_title(f"{run}: {_RUNS[run]}")
    figure.colorbar(image, ax=axes, label="effect (0 nothing, 1 as in the other run)")
    return figure


def heads(records: Sequence[RunRecord], task: str | None) -> Figure | None:
    """Effects of every head, by the positions patched, in both directions."""
    record = _patched(records, heads=True)
    if record is None:
        return None
    found = record.analysis["patching"]
    places = found["positions"]
    figure, axes = sheet("patching-heads", f"{_about(record)}; {_DOT}", len(places), len(_RUNS), width=2.7, height=2.4)
    cells = [(run, place, found["sets"]["all"][run]["heads_out"][place]) for run in _RUNS for place in places]
    low, high = _range([cell["value"] for _, _, cell in cells])
    for ax, (run, place, cell) in zip(axes, cells, strict=True):
        image = heat(ax, cell["value"], low, high)
        _mark(ax, [dict(zip(cell, line, strict=True)) for line in zip(*cell.values(), strict=True)])
        ax.set_title(f"{run}, positions: {place}")
        _head_axes(ax, cell["value"])
    figure.colorbar(image, ax=axes, label="effect of one head")
    return figure


def attention(records: Sequence[RunRecord], task: str | None) -> Figure | None:
    """How much every head attends to the identity from behind it, before and after the first MLP is patched there."""
    record = _patched(records)
    if record is None:
        return None
    found = record.analysis["patching"]["sets"]["all"]["attention"]
    figure, axes = sheet("patching-attention", _about(record), len(_ATTENDING), width=3.1)
    maps = [found[run]["later"]["value"] for run in _ATTENDING]
    _, high = _range(maps)
    for ax, (run, words), values in zip(axes, _ATTENDING.items(), maps, strict=True):
        image = heat(ax, values, 0.0, high)
        ax.set_title(f"{words} run" if run != "denoised" else words, fontsize=8)
        _head_axes(ax, values)
    figure.colorbar(image, ax=axes, label="attention to the identity\n(mean over later positions)")
    return figure


def pairs(records: Sequence[RunRecord], task: str | None) -> Figure | None:
    """Effects of every block's MLP at the identity and attention everywhere, for each pair of personas."""
    record = _patched(records)
    if record is None:
        return None
    every = {name: pair for name, pair in record.analysis["patching"]["pairs"].items() if pair["n"]}
    if not every:
        return None
    shown = (("mlp_out", "identity"), ("attn_out", "all"))
    count = len(next(iter(every.values()))["denoised"]["mlp_out"]["identity"]["value"])
    width, height = max(3.6, 0.5 * count + 2.2), 0.28 * len(every) + 1.0
    figure, axes = sheet("patching-pairs", f"{_about(record)}; {_DOT}", len(shown), width=width, height=height)
    tables = [[pair["denoised"][part][place] for pair in every.values()] for part, place in shown]
    low, high = _range([line["value"] for lines in tables for line in lines])
    for ax, lines, (part, place) in zip(axes, tables, shown, strict=True):
        image = heat(ax, [line["value"] for line in lines], low, high)
        _mark(ax, lines)
        names = [f"{name.partition('/')[2].replace('>', ' > ')} (n {pair['n']})" for name, pair in every.items()]
        ax.set_yticks(range(len(names)), names if ax is axes[0] else [""] * len(names))
        ax.invert_yaxis()
        ax.set_xticks(range(0, count, max(1, count // 16)))
        ax.set_xlabel("block")
        ax.set_title(f"denoised, {_PARTS[part]}, positions: {place}")
    figure.colorbar(image, ax=axes, label="effect")
    return figure


def _patched(records: Sequence[RunRecord], *, heads: bool = False) -> RunRecord | None:
    """The run with most samples of those that patched something, or each of the `heads`, without a method of their own."""
    found = [
        record
        for record in records
        if record.config.method.name == "plain" and record.analysis.get("patching", {}).get("sets")
    ]
    if heads:
        found = [record for record in found if "heads_out" in record.analysis["patching"]["sets"]["all"]["denoised"]]
    return max(found, key=lambda r: (r.analysis["patching"]["sets"]["all"]["n"], r.started or ""), default=None)


def _about(record: RunRecord) -> str:
    content = record.analysis["patching"]
    every = content["sets"]["all"]
    aligned = sum(pair["n"] > 0 for pair in content["pairs"].values())
    mini = " (lamp-mini)" if "lamp-mini" in record.config.data.description else ""
    return (
        f"{record.config.model.name}{mini}, contrast {content['contrast']}; n = {every['n']} samples, {aligned} pairs of personas, "
        f"{every['questions']} questions"
    )


def _range(matrices: Sequence[Any]) -> tuple[float, float]:
    values = np.concatenate([np.ravel(np.array(matrix, dtype=float)) for matrix in matrices])
    return min(0.0, float(np.nanmin(values))), float(np.nanmax(values))


def _mark(ax: Axes, lines: Sequence[Mapping[str, Sequence[float | None]]], *, below: bool = False) -> None:
    """A dot on each cell whose interval, where it has one, leaves 0 out; `below` what is written in it."""
    for row, line in enumerate(lines):
        for column, (low, high) in enumerate(zip(line["low"], line["high"], strict=True)):
            if low is not None and high is not None and (low > 0 or high < 0):
                at = row + (0.3 if below else 0.0)
                ax.plot([column], [at], marker="o", ms=3, mfc="white", mec="black", mew=0.6, ls="")


def _head_axes(ax: Axes, matrix: Any) -> None:
    layers, count = np.shape(matrix)
    ax.set_xticks(range(0, count, max(1, count // 8)))
    ax.set_yticks(range(0, layers, max(1, layers // 8)))
    ax.set_xlabel("head")
    ax.set_ylabel("block")
