"""A comparison as an answer: one line a run, ranks that ties share, and a sentence that can be quoted."""

from __future__ import annotations

import math
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence

from harness.statistics.compare import Comparison, Side, differences
from harness.statistics.paired_tests import FEWEST


def brief(comparison: Comparison, width: int = 80) -> str:
    """The first metric of every run, no line longer than `width`, and the sentence."""
    rows = {row.letter: row for row in reversed(comparison.rows)}  # the first metric of each
    first = comparison.rows[0]
    labels = names(comparison.sides)
    arrow = "↑" if first.higher_is_better else "↓"
    lines = [["rank", "run", f"{first.metric} {arrow}", "difference [95 %]", "p Holm", "operations"]]
    widest = max(
        rows.values(), key=lambda row: row.effect.n
    )  # A's number is a mean over all that most runs share with it
    means = {"A": widest.effect.a} | {letter: row.effect.b for letter, row in rows.items()}
    sign = -1 if first.higher_is_better else 1
    order = sorted(comparison.sides, key=lambda side: (comparison.rank(side.letter), sign * means[side.letter]))
    for side in order:
        row = rows.get(side.letter)
        against, p = "", ""
        if row is not None:
            e = row.effect
            interval = "" if math.isnan(e.low) else f" [{_number(e.low)}, {_number(e.high)}]"
            against, p = f"{_signed(e.difference)}{interval}", _p(_holm(comparison, side.letter))
        lines.append(
            [
                str(comparison.rank(side.letter)),
                labels[side.letter],
                _number(means[side.letter]),
                against,
                p,
                _cost(comparison, side),
            ]
        )
    space = width - sum(max(len(line[i]) for line in lines) + 2 for i in (0, 2, 3, 4, 5))
    lines = [[line[0], shortened(line[1], max(space, 8)), *line[2:]] for line in lines]
    config = comparison.sides[0].config
    units = max(row.effect.users for row in comparison.rows)
    head = f"{config.task.name}, {config.data.split} split, {units} {comparison.unit}s{_with_history(comparison)}"
    count = len(comparison.between)
    base = labels["A"]
    notes = [
        f"difference: run minus {base}, on the samples both answered; 95 % interval over {comparison.unit}s",
        f"p Holm: permutation test that exchanges the runs for whole {comparison.unit}s, corrected for "
        + (f"the {count} pairs of runs" if count > 1 else "one test"),
        *(
            [f"with {units} {comparison.unit}s no test finds a difference at 5 %; it takes {FEWEST}"]
            if units < FEWEST
            else []
        ),
        "rank: 1, and 1 more for each run that is better at 5 %; what nothing separates shares a rank",
        f"operations: floating-point operations an answer, relative to {base}",
        *_beside_the_method(comparison, labels),
        *(
            _by_name(note, labels)
            for note in comparison.notes
            if note.startswith(tuple(f"{letter}:" for letter in labels))
        ),
    ]
    return "\n\n".join(
        [
            f"{head}\n\n{aligned(lines)}",
            textwrap.fill(sentence(comparison), width),
            "\n".join(textwrap.fill(f"- {note}", width, subsequent_indent="  ") for note in notes),
        ]
    )


def _by_name(note: str, labels: Mapping[str, str]) -> str:
    """`B: left out: 4 answered by A alone` with the runs' names in place of their letters."""
    for letter, label in labels.items():
        note = note.replace(f"by {letter} alone", f"by {label} alone")
    mine, colon, what = note.partition(":")
    return f"{labels[mine]}{colon}{what}"


def _beside_the_method(comparison: Comparison, labels: Mapping[str, str]) -> list[str]:
    """What else than its method and whose history sets a run apart from the first, where that may move its numbers."""
    first, *others = comparison.sides
    found = []
    for side in others:
        every = differences(first.config, side.config)
        said = [one for one in every if not one.startswith(("method.", "data.fit", "selection.control "))]
        found += [f"{labels[side.letter]}: differs from {labels['A']} also in {'; '.join(said)}"] if said else []
    return found


def sentence(comparison: Comparison) -> str:
    """Which runs beat the first, which lie below it, what separates the winners, and what the least costs."""
    labels, base = names(comparison.sides), "A"
    against = {one.second: one for one in comparison.between if one.first == base}
    others = [side.letter for side in comparison.sides[1:] if side.letter in against]
    above = [letter for letter in others if against[letter].better == letter]
    below = [letter for letter in others if against[letter].better == base]
    same = [letter for letter in others if not against[letter].better]

    def said(letters: Sequence[str], singular: str, plural: str) -> str:
        gains = [against[letter].gain for letter in letters]
        low, high = min(gains), max(gains)
        size = _short(low) if _short(low) == _short(high) else f"{_short(low)} to {_short(high)}"
        p = max(against[letter].p_holm for letter in letters)
        verb = singular if len(letters) == 1 else plural
        return f"{_list([labels[letter] for letter in letters])} {verb} {labels[base]} ({size}, {_p_said(p)})"

    parts = []
    if above:
        parts.append(said(above, "beats", "beat"))
    if below:
        parts.append(said(below, "lies below", "lie below"))
    if same:
        parts.append(f"nothing separates {_list([labels[letter] for letter in same])} from {labels[base]}")
    if len(above) > 1:
        parts += _among(comparison, above, labels)
        cheapest = _cheapest(comparison, above)
        if cheapest:
            parts.append(f"{labels[cheapest]} costs least")
    users = max(row.effect.users for row in comparison.rows)
    of = f"Of {users} {comparison.unit}s{_with_history(comparison)}: " if comparison.min_history else ""
    text = f"{of}{'; '.join(parts)}."
    return f"{text[0].upper()}{text[1:]}" if text.startswith("nothing ") else text


def names(sides: Sequence[Side]) -> dict[str, str]:
    """Letter -> the method, with as much more as tells the runs apart: model, control, options that differ, the hash."""
    said = {side.letter: side.config.method.name for side in sides}
    for more in (
        lambda side: side.config.model.name,
        lambda side: "" if side.config.selection.control == "none" else side.config.selection.control,
        lambda side: side.config.method.preset or "",
        lambda side: _differing(side, sides),
        lambda side: side.record.hash,
    ):
        count = Counter(said.values())
        alike = {name: [side for side in sides if said[side.letter] == name] for name in count if count[name] > 1}
        for group in alike.values():
            words = {side.letter: more(side) for side in group}
            if len(set(words.values())) > 1:
                said |= {letter: f"{said[letter]} {word}".strip() for letter, word in words.items()}
    return said


def _differing(side: Side, sides: Sequence[Side]) -> str:
    mine = side.config.method
    others = [other.config.method.options for other in sides if other.config.method.name == mine.name]
    keys = [key for key, value in mine.options.items() if any(other.get(key, value) != value for other in others)]
    return " ".join(f"{key}={mine.options[key]}" for key in keys)


def _among(comparison: Comparison, letters: Sequence[str], labels: dict[str, str]) -> list[str]:
    """What separates the runs that beat the first."""
    pairs = [one for one in comparison.between if one.first in letters and one.second in letters]
    if not any(one.better for one in pairs):
        return ["nothing separates them"]
    beaten: dict[str, list[str]] = {}
    for one in pairs:
        if one.better:
            worse = one.first if one.better == one.second else one.second
            beaten.setdefault(one.better, []).append(worse)
    winners: dict[tuple[str, ...], list[str]] = {}
    for letter in sorted(beaten, key=comparison.rank):
        winners.setdefault(tuple(beaten[letter]), []).append(labels[letter])
    return [
        f"{_list(those)} {'beats' if len(those) == 1 else 'beat'} {_list([labels[letter] for letter in worse])}"
        for worse, those in winners.items()
    ]


def _cheapest(comparison: Comparison, letters: Sequence[str]) -> str:
    cost = {side.letter: side.record.operations for side in comparison.sides if side.letter in letters}
    known = {letter: operations for letter, operations in cost.items() if operations is not None}
    if len(known) < len(cost):
        return ""
    return min(known, key=lambda letter: known[letter])


def _holm(comparison: Comparison, letter: str) -> float:
    return next((one.p_holm for one in comparison.between if (one.first, one.second) == ("A", letter)), math.nan)


def _cost(comparison: Comparison, side: Side) -> str:
    mine, base = side.record.operations, comparison.sides[0].record.operations
    return f"{mine / base:.2f}x" if mine is not None and base else "-"


def _with_history(comparison: Comparison) -> str:
    return f" with {comparison.min_history} or more items of history" if comparison.min_history else ""


def _list(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f}" if abs(value) < 10 else f"{value:.2f}"


def _signed(value: float) -> str:
    return f"{value + 0.0:+.3f}" if abs(value) < 10 else f"{value:+.2f}"


def _short(gain: float) -> str:
    """`+.56`"""
    return f"{gain:+.2f}".replace("0.", ".", 1) if abs(gain) < 1 else f"{gain:+.2f}"


def _p(p: float) -> str:
    return "-" if math.isnan(p) else "<.001" if p < 0.001 else f"{p:.3f}".replace("0.", ".", 1)


def _p_said(p: float) -> str:
    return "p < .001" if p < 0.001 else f"p = {_p(p)}"


def shortened(text: str, space: int) -> str:
    return text if len(text) <= space else f"{text[: space - 1]}…"


def aligned(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    ruled = [lines[0], ["-" * width for width in widths], *lines[1:]]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in ruled)
