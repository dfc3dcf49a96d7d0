"""Ranks of user vectors as shares of the dimensions there are: the paper's arithmetic, and what records measured.

N users' vectors of width d have at most min(N, d) dimensions; r of them are 1000 r / min(N, d) per mille.
"""

from __future__ import annotations

from dataclasses import replace

from harness.flops import SIZES
from harness.tables.grid import MISSING, Entry, Grid, Line
from harness.tables.published import Row, Table
from harness.tables.sources import Sources, View


def per_mille(rank: int, users: int, width: int) -> float:
    return 1000 * rank / min(users, width)


def build(table: Table, sources: Sources, view: View) -> Grid:
    grid = Grid(table)
    model = table.keys["model"]
    for row in table.rows if view.model in (None, model) else ():
        published = Line.printed(table, row)
        lines = [published] if view.published else []
        if view.published and view.measured:
            lines.append(_computed(table, row, published))
        grid.add(lines)
    return grid


def _computed(table: Table, row: Row, published: Line) -> Line:
    """Per mille of the printed ranks, with the printed digits."""
    entries = []
    for cell, rank in zip(row.cells, (None, *row.cells), strict=False):
        if rank is None or cell.keys["metric"] != "per_mille" or rank.value is None:
            entries.append(MISSING)
            continue
        width = SIZES[table.keys["model"]].width
        value = per_mille(int(rank.value), int(row.keys["users"]), width)
        entries.append(Entry(f"{value:.{cell.decimals}f}", value, keys=cell.keys))
    return replace(published, source="computed", entries=tuple(entries), ranked=False)
