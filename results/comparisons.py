"""What the records of a model say of each other, as a table: python results/comparisons.py results/smollm2-135m > FILE

Needs the samples, which are not committed with real users' records; the table holds numbers alone. Of each ranking of the
leaderboard one line a method: its number with the 95 % interval, then paired differences by user (`harness.statistics.compare`)
to `plain`, to `copy`, and to itself with another user's history; cost in passes and, where it is trained, seconds a user.
A difference is a gain: positive is better also where less is better. `*`: p < .05 after Holm's correction in the ranking.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from tabulate import tabulate

from harness.errors import HarnessError
from harness.publish.leaderboard import Ranking, Row, rankings
from harness.records.schema import RunRecord
from harness.records.store import find_runs
from harness.statistics.compare import Compared, compare, control_of


def main(folder: Path) -> None:
    runs = [run for run in find_runs(folder.parent, model=folder.name) if run.folder is not None]
    print(
        f"# {folder.name}: who beats whom\n\nMade by `python results/comparisons.py`; what each column is stands there.\n"
    )
    for ranking in rankings(runs):
        rows = [row for row in ranking.rows if row.run.status == "complete"]
        if len(rows) > 1 and ranking.rows[0].run.config.selection.control == "none":
            print(f"## {ranking.title}\n\n{ranking.description}\n\n{_table(ranking, rows)}\n")


def _table(ranking: Ranking, rows: Sequence[Row]) -> str:
    against = {name: _against(name, rows, ranking.metric) for name in ("plain", "copy")}
    lines = []
    for row in rows:
        value, cost = row.run.metrics[ranking.metric], row.run.cost
        own = _compare([row.run], ranking.metric, control="wrong_user") if row.gain is not None else {}
        lines.append(
            [
                row.label,
                "-" if value.value is None else f"{value.value:.3f}{_ends(value.low, value.high)}",
                str(value.n),
                *(_gain(found.get(row.run.hash)) for found in against.values()),
                _gain(own.get(row.run.hash)),
                "-" if row.operations is None else f"{row.operations:.2f}×",
                "-" if cost.setup_seconds_per_user is None else f"{cost.setup_seconds_per_user:.1f} s",
            ]
        )
    header = [
        "method",
        ranking.metric,
        "n",
        "gain over plain",
        "over copy",
        "over another user's history",
        "operations",
        "setup",
    ]
    return tabulate(lines, header, tablefmt="pipe", disable_numparse=True)


def _against(name: str, rows: Sequence[Row], metric: str) -> dict[str, Compared]:
    """By hash: every run against the one of the method `name`."""
    base = [row.run for row in rows if row.run.config.method.name == name]
    others = [row.run for row in rows if row.run.config.method.name != name]
    return _compare([base[0], *others], metric) if base and others else {}


def _compare(runs: Sequence[RunRecord], metric: str, control: str = "") -> dict[str, Compared]:
    """By hash, all runs against the first, or one against its control; nothing where samples are missing."""
    folders = [run.folder for run in runs if run.folder is not None]
    try:
        if control:
            folders = [control_of(folders[0], control), *folders]
        found = compare(folders, [metric])
    except HarnessError as why:
        print(f"{folders[0]}: {why}", file=sys.stderr)
        return {}
    hashes = {side.letter: side.record.hash for side in found.sides}
    return {hashes[row.letter]: row for row in found.rows}


def _gain(row: Compared | None) -> str:
    if row is None:
        return "-"
    sign, effect = (1 if row.higher_is_better else -1), row.effect
    low, high = sorted((sign * effect.low, sign * effect.high))
    return f"{sign * effect.difference:+.3f}{_ends(low, high, '+')}{'*' if row.p_holm < 0.05 else ''}"


def _ends(low: float | None, high: float | None, sign: str = "") -> str:
    return "" if low is None or high is None or low != low else f" [{low:{sign}.3f}, {high:{sign}.3f}]"


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
