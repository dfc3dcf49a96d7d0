"""Figures 1, 5, 6 and 7 of Phadke et al., Mechanistic Origins of Personalization Bias in LLMs, from sweeps and MMLU runs.

Figures 1 and 5 are sweeps of `persona_vector` over `layer`; 6 and 7 hold MMLU under `plain`, `clamp` and persona vectors.
The paper prints peaks in its text (`published.yaml`) and no number of Figures 6 and 7, nor which five categories they show.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from harness.publish.figures import printed
from harness.publish.figures.style import GREY, bars, curve, errors, legend, look, sheet
from harness.publish.labels import usual
from harness.records.schema import MetricValue, RunRecord

RELIGIONS = ("christianity", "islam", "hinduism", "judaism")
RACES = ("african_american", "asian_american", "native_american", "hispanic", "caucasian")

_COHERENT = 75.0
"""Mean coherence below which a point is no peak, as in `harness sweep`."""


def religions(records: Sequence[RunRecord], task: str | None) -> Figure | None:
    """Figure 1: how strongly each religion shows in neutral answers, by the block steered at."""
    return _by_layer("persona-1", records, RELIGIONS)


def races(records: Sequence[RunRecord], task: str | None) -> Figure | None:
    """Figure 5: the same of five races."""
    return _by_layer("persona-5", records, RACES)


def categories(records: Sequence[RunRecord], task: str | None) -> Figure | None:
    """Figure 6: MMLU without and with mitigation, by subject, or by category of subjects where there are many."""
    runs = _mmlu(records)
    clamps = _mitigated(runs)
    if not clamps:
        return None
    baseline = runs["plain"]
    names = [name for name in baseline.metrics if name.startswith("accuracy/")]
    if len(names) > 8:
        names = [name for name in baseline.metrics if name.startswith("accuracy_")]
    names = [name for name in ("accuracy", *names) if baseline.metrics[name].n]
    described = "; ".join(f"{label}: {_options(run)}" for label, run in clamps.items())
    about = f"{_mmlu_about(baseline)}; 95 % intervals; dotted: chance; {described}"
    figure, (ax,) = sheet("persona-6", about, width=max(5.4, 1.2 * len(names)))
    wide = 0.8 / (1 + len(clamps))
    for number, (label, run) in enumerate({"baseline": baseline, **clamps}.items()):
        x = np.arange(len(names)) + wide * (number - len(clamps) / 2)
        bars(ax, x, [run.metrics[name] for name in names], number, label, 0.92 * wide)
    labels = [f"{_plain_words(name)}\nn = {baseline.metrics[name].n}" for name in names]
    ax.set_xticks(range(len(names)), labels, fontsize=7)
    ax.axhline(0.25, color=GREY, linestyle=":")
    ax.set_ylabel("accuracy")
    legend(figure, ax)
    return figure


def vectors(records: Sequence[RunRecord], task: str | None) -> Figure | None:
    """Figure 7: MMLU overall under each persona's vector and under the mitigation."""
    runs = _mmlu(records)
    known = (*(f"persona:{trait}" for trait in (*RELIGIONS, *RACES)), *sorted(runs))
    personas = [name for name in dict.fromkeys(known) if name in runs and name.startswith("persona:")]
    if not personas:
        return None
    rows = {"baseline": runs["plain"], **_mitigated(runs)}
    looks = {label: number for number, label in enumerate(rows)}
    blocks = {name: _block(runs[name]) for name in personas}
    apart = len(set(blocks.values())) > 1
    rows |= {f"+ {_plain_words(name)}{f', block {blocks[name]}' if apart else ''}": runs[name] for name in personas}
    described = "".join(f"; {label}: {_options(run)}" for label, run in _mitigated(runs).items())
    steered = {_steered(runs[name]) for name in personas}
    described = f"; vectors: {steered.pop()}{described}" if len(steered) == 1 else described
    about = f"{_mmlu_about(runs['plain'])}; dotted: baseline and chance{described}"
    figure, (ax,) = sheet("persona-7", about, width=5.2, height=0.32 * len(rows) + 0.7)
    for place, (label, run) in enumerate(rows.items()):
        metric, style = run.metrics["accuracy"], look(looks.get(label, len(looks)))
        value = np.array([metric.value], dtype=float)
        ax.errorbar(value, [place], xerr=errors([metric]), color=style.color, marker=style.marker, capsize=2.5, ls="")
    ax.set_yticks(range(len(rows)), list(rows))
    ax.invert_yaxis()
    for at in (runs["plain"].metrics["accuracy"].value, 0.25):
        ax.axvline(np.nan if at is None else at, color=GREY, linestyle=":")
    ax.set_xlabel(f"accuracy (n = {runs['plain'].metrics['accuracy'].n}, 95 % intervals)")
    return figure


def _by_layer(id: str, records: Sequence[RunRecord], traits: Sequence[str]) -> Figure | None:
    sweeps: dict[str, dict[str, dict[int, RunRecord]]] = {}
    for record in sorted(records, key=lambda record: record.started or ""):
        config = record.config
        trait = config.task.name.partition(":")[2]
        block = _block(record)
        neutral = config.task.options.get("condition", "neutral") == "neutral"
        of = (config.data.fit_task or config.task.name).partition(":")[2]
        control = config.method.options.get("control") != "none" or of in {*RELIGIONS, *RACES} - {trait}
        own = not control and config.data.split == "dev"
        scored = "trait" in record.metrics and record.metrics["trait"].value is not None
        if (
            config.method.name == "persona_vector"
            and trait in traits
            and block is not None
            and neutral
            and own
            and scored
        ):
            sweeps.setdefault(_same_sweep(record), {}).setdefault(trait, {})[block] = record
    if not sweeps:
        return None
    best = max(sweeps.values(), key=lambda found: (len(found), sum(map(len, found.values()))))
    if max(map(len, best.values())) < 2:
        return None
    one = next(record for points in best.values() for record in points.values())
    judge = one.config.judge.name if one.config.judge else "no judge"
    about = (
        f"{one.config.model.name}, n = {one.metrics['trait'].n} answers a point, 95 % intervals by question; {_options(one)}; "
        f"judge {judge}; hollow: coherence below {_COHERENT:.0f}"
    )
    figure, (left, right) = sheet(id, about, 2, width=3.8)
    for number, trait in enumerate(traits):
        points = best.get(trait, {})
        layers = sorted(points)
        if not points:
            continue
        curve(left, layers, [points[layer].metrics["trait"] for layer in layers], number, _plain_words(trait))
        weak = [layer for layer in layers if not _coherent(points[layer].metrics)]
        style = look(number)
        heights = np.array([points[layer].metrics["trait"].value for layer in weak], dtype=float)
        left.plot(weak, heights, ls="", marker=style.marker, mfc="white", mec=style.color, ms=4.5, zorder=5)
    left.set_xlabel("block steered at (0-based)")
    left.set_ylabel("trait score (0 to 100)")
    left.set_title("measured")
    left.set_ylim(-3, 112)
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    _published_peaks(right, id, traits)
    legend(figure, left)
    return figure


def _published_peaks(ax: Axes, id: str, traits: Sequence[str]) -> None:
    """What the text prints of the curves: where they peak, and how high where it says so."""
    paper = printed(id)
    written = set()
    for peak in paper["peaks"]:
        style = look(traits.index(peak["name"].lower().replace(" ", "_")))
        (first, last), (low, high) = peak["layers"], peak.get("scores", (0, 0))
        if first < last:
            box = Rectangle((first, low), last - first, high - low, fill=False, ec="black", hatch="///", lw=0.8)
            if (first, low) not in written:
                ax.add_patch(box)
                ax.annotate("each of the others", ((first + last) / 2, low - 3), ha="center", va="top", fontsize=7)
            written.add((first, low))
        else:
            label = f"{peak['name']} {low:.0f}" if "scores" in peak else f"{peak['name']}\n(no height)"
            ax.plot([first], [low], marker=style.marker, color=style.color, ms=7, ls="", clip_on=False)
            ax.annotate(label, (first, low + 4), ha="center", va="bottom", fontsize=7)
    ax.set_title(f"published peaks ({paper['model']}, {paper['place']})")
    ax.set_xlim(-0.5, paper["layers"] - 0.5)
    ax.set_ylim(-3, 112)
    ax.set_xlabel(f"layer of {paper['layers']}, as printed")


def _same_sweep(record: RunRecord) -> str:
    config = record.config
    options = {name: value for name, value in config.method.options.items() if name != "layer"}
    judge = [config.judge.name, config.judge.revision, config.judge.options] if config.judge else None
    asked = [config.task.options, config.selection.model_dump(), config.sampling.model_dump(), config.data.fit_options]
    return json.dumps([options, asked, judge], sort_keys=True)  # not the data: each trait has its own questions


def _block(record: RunRecord) -> int | None:
    """The 0-based block that was steered at; None where it is the method's default."""
    options = record.config.method.options
    layer = options.get("layer")
    return None if layer is None else int(layer) - (options.get("numbering") == "hidden_states")


def _coherent(metrics: Mapping[str, MetricValue]) -> bool:
    value = metrics["coherence"].value if "coherence" in metrics else None
    return value is None or value >= _COHERENT


def _mmlu(records: Sequence[RunRecord]) -> dict[str, RunRecord]:
    """`plain`, each `clamp ...` and each `persona:<trait>` -> the latest run on the same questions; empty without a baseline.

    Personas are of one way of steering, block aside: of the one that most of them were run with, of equals the latest.
    """
    groups: dict[str, dict[str, RunRecord]] = {}
    steered: dict[tuple[str, str], dict[str, RunRecord]] = {}
    for record in sorted(records, key=lambda record: record.started or ""):
        config = record.config
        control = config.method.options.get("control", "none") != "none" or config.selection.control != "none"
        if config.task.name != "mmlu" or control:
            continue
        name = config.method.name
        if name == "persona_vector":
            name = config.data.fit_task or f"persona:{config.method.options.get('trait')}"
            alike = {k: v for k, v in config.method.options.items() if k not in ("layer", "trait")}
            ways = (record.conditions, json.dumps([alike, config.data.fit_options], sort_keys=True))
            found = steered.pop(ways, {})
            steered[ways] = {**found, name: record}  # the latest stands last
            continue
        if name == "clamp":
            name = f"clamp {json.dumps([config.method.options, config.data.model_dump()], sort_keys=True)}"
        if name == "plain" or name.startswith("clamp "):
            groups.setdefault(record.conditions, {})[name] = record
    for (conditions, _), found in sorted(steered.items(), key=lambda one: len(one[1])):
        if conditions in groups:
            groups[conditions] = {n: r for n, r in groups[conditions].items() if not n.startswith("persona:")} | found
    with_baseline = [runs for runs in groups.values() if "plain" in runs]
    return max(with_baseline, key=len, default={})


def _mitigated(runs: Mapping[str, RunRecord]) -> dict[str, RunRecord]:
    """The clamps by what they are called: `mitigated`, numbered where there are several."""
    clamps = [run for name, run in runs.items() if name.startswith("clamp ")]
    return {f"mitigated {n}" if len(clamps) > 1 else "mitigated": run for n, run in enumerate(clamps, start=1)}


def _mmlu_about(record: RunRecord) -> str:
    options = record.config.task.options
    shots = options.get("num_fewshot", 0)
    return f"{record.config.model.name} on MMLU, {shots} shots, {record.config.data.split} split"


def _options(record: RunRecord) -> str:
    """What was steered, as `op subtract, band 0.39-0.57, vectors of persona:religion`: what decides it, and what is no default."""
    options = record.config.method.options
    own = usual(record.config.method.name)
    told = ("op", "universal", "band", "peaks", "apply", "scale", "coefficient", "positions")
    others = [name for name in options if name not in (*told, "layer") and options[name] not in own.get(name, [])]
    given: Mapping[str, Any] = {**options, "vectors of": record.config.data.fit_task}
    said = (*told, *others, "vectors of")
    return ", ".join(f"{name} {given[name]}" for name in said if given.get(name) is not None)


def _steered(record: RunRecord) -> str:
    """The same of a persona's vector, and at which block, without whose it is."""
    said = [part for part in _options(record).split(", ") if not part.startswith(("vectors of ", "trait "))]
    block = _block(record)
    return ", ".join([*said, *([f"block {block}"] if block is not None else [])])


def _plain_words(name: str) -> str:
    """`accuracy/high_school_physics` -> `high school physics`."""
    last = name.rpartition("/")[2].rpartition(":")[2].removeprefix("accuracy_")
    return "overall" if last == "accuracy" else last.replace("_", " ")
