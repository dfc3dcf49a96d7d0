"""Figures 2, 4, 9, 10 and 11 of Exploring Personalization Shifts in Representation Space of LLMs (PerFit).

2 and 4 are what the task `delta_vectors` keeps of the users' vectors; 9 holds methods' first metric against the parameters
they train; 10 and 11 are sweeps of `perfit` over its ranks and layers. The paper prints points of Figure 9 alone (its Tables
2 and 3, where stage 1 of PerFit and OPPU's LoRA decide the parameters) and names neither datasets nor grids.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullLocator

from harness.publish.figures.style import GREY, MAP, answers, curve, data_of, errors, legend, look, sheet
from harness.publish.tables.measured import CHOSEN_ON
from harness.records.schema import RunRecord

METHODS = ("lora_c", "lora_p", "oppu", "perfit", "reft")


def shifts(records: Sequence[RunRecord], task: str | None) -> Figure | None:
    """Figure 2: users on the first two components, and how the first five coordinates are spread."""
    found = _delta_vectors(records, task)
    if not found:
        return None
    figure, axes = sheet("perfit-2", _delta_about(found), len(found), 2, width=3.0)
    for column, (name, record) in enumerate(found.items()):
        content = record.analysis["delta_vectors"]
        points, mean = np.array(content["coordinates"], dtype=float), np.array(content["mean"], dtype=float)
        top, bottom = axes[column], axes[column + len(found)]
        _origin(top)
        top.scatter(points[:, 0], points[:, 1], s=7, color=look(0).color, alpha=0.5, linewidths=0, label="a user")
        top.plot([mean[0]], [mean[1]], marker="*", ms=13, color="#F0E442", mec="black", ls="", label="mean")
        top.set_title(f"{name}, n = {len(points)} users")
        top.set_xlabel("component 0")
        top.set_ylabel("component 1")
        bottom.axhline(0, color=GREY, lw=0.8, ls=":")
        parts = bottom.violinplot(list(points.T), positions=range(points.shape[1]), showmeans=True, widths=0.8)
        bodies: Any = parts["bodies"]
        for body in bodies:
            body.set(facecolor=look(0).color, edgecolor="black", alpha=0.45)
        for part in ("cmeans", "cmins", "cmaxes", "cbars"):
            parts[part].set(color="black", linewidth=1.0)
        bottom.xaxis.set_major_locator(MaxNLocator(integer=True))
        bottom.set_xlabel("component")
        bottom.set_ylabel("coordinate")
    legend(figure, axes[0])
    return figure


def neighbours(records: Sequence[RunRecord], task: str | None) -> Figure | None:
    """Figure 4: the ten users closest to the mean vector, ten in the middle, and the ten farthest from it."""
    found = _delta_vectors(records, task)
    if not found:
        return None
    figure, axes = sheet("perfit-4", _delta_about(found), len(found), width=3.2)
    for ax, (name, record) in zip(axes, found.items(), strict=True):
        content = record.analysis["delta_vectors"]
        place = dict(zip(content["users"], content["coordinates"], strict=True))
        every = np.array(list(place.values()), dtype=float)
        _origin(ax)
        ax.scatter(every[:, 0], every[:, 1], s=6, color="0.75", linewidths=0, label="the others")
        for number, which in enumerate(("closest", "middle", "farthest")):
            at = np.array([place[user] for user in content[which]], dtype=float)
            style = look(number)
            label = f"{len(at)} {which}"
            ax.plot(
                at[:, 0], at[:, 1], ls="", marker=style.marker, color=style.color, mec="black", mew=0.5, label=label
            )
        ax.set_title(f"{name}, n = {len(every)} users")
        ax.set_xlabel("component 0")
        ax.set_ylabel("component 1")
    legend(figure, axes[0])
    return figure


def parameters(records: Sequence[RunRecord], task: str | None) -> Figure | None:
    """Figure 9: the first metric against trained parameters, marker area by training time; published points beside."""
    alike: dict[str, dict[str, RunRecord]] = {}
    for record in sorted(records, key=lambda record: record.started or ""):
        name, of = record.config.method.name, record.config.task.name
        if name in METHODS and task in (None, of) and _itself(record) and _trained(record):
            asked = json.dumps(record.config.sampling.model_dump(), sort_keys=True)
            alike.setdefault(f"{record.conditions} {asked}", {})[name] = record
    # of each task the samples that most methods answered, and of equals the most samples
    several = [found for found in alike.values() if len(found) > 1]
    several.sort(key=lambda found: (len(found), max(map(answers, found.values()))))
    runs = {next(iter(found.values())).config.task.name: found for found in several}
    if not runs:
        return None
    runs = dict(sorted(runs.items()))
    one = next(iter(next(iter(runs.values())).values()))
    about = (
        f"left {one.config.model.name}, 95 % intervals over users; parameters of the collective stage (of one user, where there "
        "is none); marker area: its training time. Right Llama-2-7B as published, without times and intervals"
    )
    figure, axes = sheet("perfit-9", about, 2, len(runs), width=3.4)
    for row, (of, found) in enumerate(runs.items()):
        left, right = axes[2 * row : 2 * row + 2]
        metric = next(iter(next(iter(found.values())).metrics))
        longest = max((record.cost.fit_seconds or 0 for record in found.values()), default=0) or 1
        for name, record in sorted(found.items(), key=lambda item: METHODS.index(item[0])):
            style, value = look(METHODS.index(name)), record.metrics[metric]
            x, y = [float(_trained(record))], np.array([value.value], dtype=float)
            left.errorbar(x, y, errors([value]), color=style.color, capsize=2.5, ls="", zorder=1)
            area = 25 + 150 * (record.cost.fit_seconds or 0) / longest
            left.scatter(x, y, s=area, color=style.color, marker=style.marker, edgecolors="black", label=name, zorder=2)
        first = next(iter(found.values()))
        left.set_title(f"{data_of(first)}, n = {answers(first)}", fontsize=8)
        _published_points(right, of, metric)
        for ax in (left, right):
            ax.set_xscale("log")
            ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            ax.xaxis.set_major_formatter(EngFormatter(sep=""))
            ax.xaxis.set_minor_locator(NullLocator())
            ax.margins(x=0.12)
            ax.set_xlabel("trained parameters")
            ax.set_ylabel(metric)
    legend(figure, axes[0])
    return figure


def ranks(records: Sequence[RunRecord], task: str | None) -> Figure | None:
    """Figure 10: the first two metrics by collective and personal rank."""
    grid = _grid(records, task or "lamp2m", ("rank", "personal_rank"))
    points = {(int(r.config.method.options["rank"]), int(r.config.method.options["personal_rank"])): r for r in grid}
    collective, personal = sorted({a for a, _ in points}), sorted({b for _, b in points})
    if len(collective) < 2 or len(personal) < 2:
        return None
    one = grid[0]
    names = list(one.metrics)[:2]
    about = f"{data_of(one)}, n = {one.metrics[names[0]].n}; below each value half its 95 % interval over users"
    figure, axes = sheet(
        "perfit-10", about, len(names), width=0.75 * len(personal) + 1.6, height=0.45 * len(collective) + 1
    )
    for ax, name in zip(axes, names, strict=True):
        values = np.full((len(collective), len(personal)), np.nan)
        for (a, b), record in points.items():
            values[collective.index(a), personal.index(b)] = record.metrics[name].value  # NaN where there is none
        image = ax.imshow(values, cmap=MAP, origin="lower", aspect="auto")
        middle = (np.nanmin(values) + np.nanmax(values)) / 2
        for (a, b), record in points.items():
            metric = record.metrics[name]
            if metric.value is None:
                continue
            half = "" if metric.low is None or metric.high is None else f"\n± {(metric.high - metric.low) / 2:.3f}"
            at = (personal.index(b), collective.index(a))
            dark = values[at[1], at[0]] <= middle
            text = f"{metric.value:.3f}{half}"
            ax.text(*at, text, ha="center", va="center", fontsize=7, color="white" if dark else "black")
        ax.set_xticks(range(len(personal)), [str(b) for b in personal])
        ax.set_yticks(range(len(collective)), [str(a) for a in collective])
        ax.set_xlabel("personal rank")
        ax.set_ylabel("collective rank")
        figure.colorbar(image, ax=ax, label=name)
    return figure


def layers(records: Sequence[RunRecord], task: str | None) -> Figure | None:
    """Figure 11: metrics by the one block shifted, of each task there is, and by the number of blocks."""
    panels: list[tuple[str, Mapping[int, RunRecord], str]] = []
    for of in (task,) if task else ("lamp2m", "lamp4"):
        grid = [r for r in _grid(records, of, ("layers",)) if r.config.method.options["layers"]]
        chosen = {tuple(r.config.method.options["layers"]): r for r in grid}
        single = {blocks[0]: r for blocks, r in chosen.items() if len(blocks) == 1}
        counts = {len(blocks): r for blocks, r in sorted(chosen.items(), key=lambda item: _off_centre(item[0], single))}
        if len(single) > 1:
            panels.append((f"{of}: one block", single, "block shifted (0-based)"))
        if len(counts) > 1:
            panels.append((f"{of}: several blocks", counts, "number of blocks shifted"))
    if not panels:
        return None
    one = next(iter(panels[0][1].values()))
    about = f"{one.config.model.name}, 95 % intervals over users"
    figure, axes = sheet("perfit-11", about, len(panels), width=3.2)
    for ax, (title, found, words) in zip(axes, panels, strict=True):
        names = list(next(iter(found.values())).metrics)[:2]
        for number, name in enumerate(names):
            aside = [x + 0.06 * (number - 0.5) for x in sorted(found)]  # so that intervals do not hide each other
            curve(ax, aside, [found[x].metrics[name] for x in sorted(found)], number, name)
        ax.set_title(f"{title}, n = {next(iter(found.values())).metrics[names[0]].n}")
        ax.set_xlabel(words)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=len(names))  # intervals fill the corners
    return figure


def _delta_vectors(records: Sequence[RunRecord], task: str | None) -> dict[str, RunRecord]:
    """LaMP task -> its record with most users, of equals the latest. All are by one method at one block: of those there are, by
    the one that most tasks were run with, of equals the latest."""
    having = [r for r in records if "delta_vectors" in r.analysis and r.config.selection.control == "none"]
    ways: dict[str, dict[str, RunRecord]] = {}
    for record in sorted(having, key=lambda r: (len(r.analysis["delta_vectors"]["users"]), r.started or "")):
        config = record.config
        of = str(config.task.options.get("task", config.task.name))
        asked = {name: value for name, value in config.task.options.items() if name != "task"}
        way = json.dumps([config.method.name, config.method.options, asked, config.data.split], sort_keys=True)
        if task in (None, of):
            ways.setdefault(way, {})[of] = record
    chosen = max(
        ways.values(), key=lambda found: (len(found), max(r.started or "" for r in found.values())), default={}
    )
    return dict(sorted(chosen.items()))


def _delta_about(found: Mapping[str, RunRecord]) -> str:
    one = next(iter(found.values()))
    content, method = one.analysis["delta_vectors"], one.config.method
    mini = " (lamp-mini)" if "lamp-mini" in one.config.data.description else ""
    return (
        f"{one.config.model.name}{mini}, last token after block {content['layer']}, with history ({method.name}, k = "
        f"{method.options.get('k')}) minus without; SVD uncentred"
    )


def _origin(ax: Axes) -> None:
    ax.axhline(0, color=GREY, lw=0.8, ls=":")
    ax.axvline(0, color=GREY, lw=0.8, ls=":")


def _itself(record: RunRecord) -> bool:
    """Whether it is the method as it is meant: training settings may differ; rank and layers of a sweep, and retrieved or
    summarised history in the prompts, may not."""
    from harness.plugins.registry import method_class

    config = record.config
    default = method_class(config.method.name)().options()
    shape = ("rank", "personal_rank", "layers", "ablation", "k", "profile")
    given = config.method.options
    kept = all(given.get(name, default[name]) == default[name] for name in shape if name in default)
    kept = kept and config.data.split not in CHOSEN_ON
    return kept and not config.method.preset and config.selection.control == "none"


def _trained(record: RunRecord) -> int:
    """Parameters of the collective stage, or of one user where there is none; 0 where not recorded."""
    stages = (record.analysis.get(stage) or {} for stage in ("collective", "personal"))
    return next((int(stage["parameters"]) for stage in stages if stage.get("parameters")), 0)


def _grid(records: Sequence[RunRecord], task: str, free: Sequence[str]) -> list[RunRecord]:
    """The largest set of `perfit` runs on the task that differ in these options alone."""
    groups: dict[str, list[RunRecord]] = {}
    for record in records:
        config = record.config
        own = config.method.name == "perfit" and not config.method.preset and config.selection.control == "none"
        if own and config.task.name == task:
            kept = {name: value for name, value in config.method.options.items() if name not in free}
            same = [kept, config.data.model_dump(), config.sampling.model_dump(), record.conditions]
            groups.setdefault(json.dumps(same, sort_keys=True), []).append(record)
    return max(groups.values(), key=len, default=[])


def _off_centre(blocks: Sequence[int], single: Mapping[int, RunRecord]) -> float:
    """Minus the distance of the blocks' middle from that of all: the most central of one number comes last."""
    every = list(single) or list(blocks)
    return -abs(sum(blocks) / len(blocks) - (min(every) + max(every)) / 2)


def _published_points(ax: Axes, task: str, metric: str) -> None:
    """Tables 2 and 3: scores as printed, parameters of stage 1 (LoRA-P: of its only one) from ranks and layers."""
    from harness.engine.flops import SIZES
    from harness.publish.tables.parameters import LORA_MATRICES, LORA_RANK
    from harness.publish.tables.published import published

    llama = SIZES["llama2-7b"]
    lora = {stage: 2 * llama.width * LORA_RANK * matrices * llama.layers for stage, matrices in LORA_MATRICES.items()}
    trained = {"lora_c": lora["1"], "oppu": lora["1"], "lora_p": lora["2"]}
    scores = {}
    for name in ("perfit-2", "perfit-3"):
        for row in published()[name].rows:
            for number, cell in enumerate(row.cells):
                if cell.keys.get("task") != task:
                    continue
                if cell.keys.get("metric") == "parameter_percent" and cell.keys.get("stage") == "1":
                    trained["perfit"] = 2 * llama.width * row.rank_layers[number]
                elif cell.keys.get("metric") == metric and row.keys.get("method") in METHODS:
                    scores[row.keys["method"]] = float(cell.text)
    for method, value in scores.items():
        style = look(METHODS.index(method))
        ax.plot([trained[method]], [value], ls="", marker=style.marker, color=style.color, mec="black", ms=7)
    ax.set_title(f"Llama-2-7B on {task}, as published", fontsize=8)
