"""Published numbers, and measured ones beside them: `harness table dps-1 perfit-2`.

A paper is one YAML file here; adding one needs no code. `published.py` reads them. What fills a table is the module that
its `measured` names: `runs.py`, `costs.py`, `comparisons.py`, `subspaces.py` or `data.py`, each of which makes a
`grid.Grid` of what the paper prints and of what is measured. `formats.py` prints it, `differences.py` says whether the two
agree, `missing.py` which commands would fill what is empty. No table averages over tasks, which have different numbers of
samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING

from harness.errors import UsageError, did_you_mean
from harness.publish.tables.published import Table, published
from harness.records.select import Places

if TYPE_CHECKING:
    from harness.publish.tables.grid import Grid
    from harness.publish.tables.sources import Sources

TABLES: Mapping[str, str] = {id: table.title for id, table in published().items()}
"""Id -> title, for `harness list tables`."""

FORMATS = ("terminal", "md", "csv", "json", "latex")


def table(id: str) -> Table:
    """The published table called `id`; a bare number means the DPS paper's."""
    name = f"dps-{id}" if id.isdigit() else id.lower()
    if name not in TABLES:
        hint = did_you_mean(name, TABLES)
        raise UsageError(f"unknown table {id!r}{hint or ';'} 'harness list tables' shows all {len(TABLES)}")
    return published()[name]


def grids(
    ids: Sequence[str],
    results: Places,
    *,
    model: str | None = None,
    published_only: bool = False,
    measured_only: bool = False,
    data: str | None = None,
) -> list[Grid]:
    """The tables `ids` (all of them if empty), published and measured values side by side.

    `model` keeps that model's rows; `data` is the folder whose statistics stand beside the published ones. Raises
    UsageError for an unknown id, and for a model that neither the tables nor the records have.
    """
    if published_only and measured_only:
        raise UsageError("--published-only and --measured-only leave nothing to print; give one of them")
    tables = [table(id) for id in ids or TABLES]
    from harness.publish.tables.sources import Sources, View

    sources = Sources(results, data)
    view = View(model, published=not measured_only, measured=not published_only)
    made = []
    for t in tables:
        grid = import_module(f"{__name__}.{t.measured}").build(t, sources, view)
        grid.errata = t.errata if view.published else ()
        grid.remarks += sources.left_out(model) if view.measured and _has_models(t) else []
        made.append(grid)
    if model is not None:
        _say_where_it_is_not(model, [grid for grid in made if _has_models(grid.table)], sources)
    return made


def _has_models(table: Table) -> bool:
    return "model" in (*table.row_keys, *table.keys)


def _say_where_it_is_not(model: str, made: Sequence[Grid], sources: Sources) -> None:
    """Note the tables without a row of `model`; UsageError where that is all of them and nothing else has it either."""
    published = dict.fromkeys(row.cells[0].keys["model"] for grid in made for row in grid.table.rows)
    names = [*published, *sorted({record.config.model.name for record in sources.records} - set(published))]
    if made and model not in names and not any(grid.lines for grid in made):
        raise UsageError(
            f"no rows of {model!r}{did_you_mean(model, names)} the tables and records have {', '.join(names)}"
        )
    for grid in made:
        if not grid.lines:
            grid.remarks.append(f"no rows of {model}")


def commands(ids: Sequence[str], results: Places, *, model: str | None = None, data: str | None = None) -> list[str]:
    """What would fill the tables `ids` (all of them if empty), one command a line; see `missing.commands`."""
    tables = [table(id) for id in ids or TABLES]
    from harness.publish.tables import missing
    from harness.publish.tables.sources import Sources

    return missing.commands(tables, Sources(results, data), model)


def render(
    ids: Sequence[str],
    results: Places,
    fmt: str = "terminal",
    *,
    model: str | None = None,
    published_only: bool = False,
    measured_only: bool = False,
    data: str | None = None,
    color: bool = False,
    width: int = 120,
) -> str:
    """`grids` as text. `color` sets the best in terminal bold instead of a star; `width` is the terminal's.

    Raises UsageError for an unknown id or format.
    """
    made = grids(ids, results, model=model, published_only=published_only, measured_only=measured_only, data=data)
    return write(made, fmt, color=color, width=width)


def write(made: Sequence[Grid], fmt: str, *, color: bool = False, width: int = 120) -> str:
    if fmt not in FORMATS:
        raise UsageError(f"unknown format {fmt!r}{did_you_mean(fmt, FORMATS) or ';'} choose from {', '.join(FORMATS)}")
    from harness.publish.tables import formats

    return formats.terminal(made, color, width) if fmt == "terminal" else formats.FORMATS[fmt](made)
