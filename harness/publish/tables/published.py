"""The papers' tables as data. One YAML file a paper; every printed cell with its meaning and its place."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any, Literal

import yaml

Filling = Literal["runs", "mitigation", "costs", "comparisons", "subspaces", "data"]
"""What is measured beside the published cells, by the module that does it. `runs`: records, rows being models x methods
and columns tasks x metrics; `mitigation`: the same, each clamp with its controls; `costs`: what decoding costs;
`comparisons`: two runs compared, rows being evaluators x metrics and columns methods; `subspaces`: ranks of user vectors;
`data`: the statistics of a benchmark's files."""


@dataclass(frozen=True)
class Column:
    head: str
    """As printed, with its arrow."""
    keys: Mapping[str, str]

    @property
    def group(self) -> str:
        """What columns side by side have in common, printed above their heads."""
        stage = f"stage {self.keys['stage']}" if "stage" in self.keys else ""
        return self.keys.get("task") or self.keys.get("energy") or stage

    @property
    def higher_is_better(self) -> bool | None:
        """What the printed arrow says; None where there is no arrow, and nothing is best."""
        return {"↑": True, "↓": False}.get(self.head[-1:])


@dataclass(frozen=True)
class Cell:
    """One printed number and what it measures: keys such as model, method, task, metric, split."""

    text: str
    """As printed, every digit."""
    keys: Mapping[str, str]

    @property
    def value(self) -> float | None:
        """`1.06×` is 1.06, `~1.5K` is 1500, `3,181` is 3181; None for words."""
        match = re.fullmatch(r"~?(\d+(?:,\d{3})*(?:\.\d+)?)([K×%]?)", self.text)
        return float(match[1].replace(",", "")) * (1000 if match[2] == "K" else 1) if match else None

    @property
    def decimals(self) -> int:
        return decimals(self.text)


def decimals(printed: str) -> int:
    """Digits after the point."""
    return len(re.sub(r"\D+$", "", printed).partition(".")[2])


@dataclass(frozen=True)
class Row:
    keys: Mapping[str, str]
    cells: tuple[Cell, ...]
    options: Mapping[str, str]
    """Options of the method that the row is about, such as k of RAG (k=1); among its keys too."""
    rank_layers: tuple[int, ...]
    """Rank x layers behind each count of parameters, where the row is one."""
    label: str | None
    """As the paper calls it, where its last key does not say it."""

    @property
    def variant(self) -> str:
        """The method with the row's options: `rag k=1`."""
        return " ".join([self.keys["method"], *(f"{name}={value}" for name, value in self.options.items())])

    @property
    def counts_parameters(self) -> bool:
        """Whether it is about the size of what the method of the row above trains, and not a score."""
        return bool(self.rank_layers)


@dataclass(frozen=True)
class Table:
    id: str
    title: str
    place: str
    """Where in the paper it stands."""
    row_keys: tuple[str, ...]
    """Which keys name a row; printed left of the cells."""
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    measured: Filling
    keys: Mapping[str, str]
    """What holds for every cell."""
    names: Mapping[str, Mapping[str, str]]
    """Key -> value -> as printed."""
    task_options: Mapping[str, str]
    """Options a record's task must have been given to fill a cell."""
    users: Mapping[str, str]
    """Options of a LaMP task that choose the paper's users from the official files."""
    judge: str | None
    """The judge of the published numbers, as `--judge` takes it."""
    sampling: tuple[str, ...]
    """How the published answers were sampled, as `harness run` is told; greedily where nothing is said, but judged ones."""
    official_items: Mapping[str, int]
    """Task -> how many items the published numbers are means over."""

    apart: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Method, or `all` -> in what its every run here differs from the published one."""
    errata: tuple[str, ...] = ()
    """What a reader of the published numbers must know, each with its evidence."""

    @property
    def sampled_as(self) -> dict[str, float]:
        """`sampling` by the names of a record's fields."""
        flags = zip(self.sampling[::2], self.sampling[1::2], strict=True)
        return {flag.removeprefix("--"): float(value) for flag, value in flags}

    def printed(self, key: str, value: str) -> str:
        return self.names.get(key, {}).get(value, value)

    def label(self, row: Row) -> tuple[str, ...]:
        """What stands left of the row's cells."""
        labels = [self.printed(key, row.keys[key]) for key in self.row_keys]
        return (*labels[:-1], row.label or labels[-1])

    def decimals(self, column: int) -> int:
        return max(row.cells[column].decimals for row in self.rows if not row.counts_parameters)


@cache
def published() -> Mapping[str, Table]:
    """Every table of every paper by id (`dps-1`), in the order of the files and of the print."""
    papers = sorted(
        (f for f in (files(__package__) / "papers").iterdir() if f.name.endswith(".yaml")), key=lambda f: f.name
    )
    # BaseLoader: every scalar stays the text that was written, so no digit of a printed number is lost
    loaded = [yaml.load(paper.read_text("utf-8"), yaml.BaseLoader) for paper in papers]
    tables = [_table(paper, table) for paper in loaded for table in paper.get("tables", ())]
    return {table.id: table for table in tables}


def _table(paper: dict[str, Any], table: dict[str, Any]) -> Table:
    id = f"{paper['id']}-{table['id']}"
    every = table.get("all", {})
    columns = tuple(Column(c["head"], {k: v for k, v in c.items() if k != "head"}) for c in table["columns"])
    return Table(
        id=id,
        title=table["title"],
        place=table["place"],
        row_keys=tuple(table["row_keys"]),
        columns=columns,
        rows=tuple(_row(id, every, columns, row) for row in table["rows"]),
        measured=table["measured"],
        keys=every,
        names=paper.get("names", {}),
        task_options=table.get("task_options", {}),
        users=paper.get("users", {}),
        judge=table.get("judge"),
        sampling=tuple(paper.get("sampling", "").split()),
        official_items={task: int(n) for task, n in paper.get("official_items", {}).items()},
        apart={method: tuple(reasons) for method, reasons in table.get("apart", {}).items()},
        errata=tuple(table.get("errata", ())),
    )


def _row(id: str, every: Mapping[str, str], columns: tuple[Column, ...], printed: dict[str, Any]) -> Row:
    """`cells` may have `in_turn`, keys that alternate along the row; a row's keys hold where its columns say otherwise."""
    apart = ("cells", "options", "rank_layers", "label", "in_turn")
    options = printed.get("options", {})
    keys = {**{k: v for k, v in printed.items() if k not in apart}, **options}
    if len(printed["cells"]) != len(columns):
        raise ValueError(f"table {id}, row {keys}: {len(printed['cells'])} cells for {len(columns)} columns")
    in_turn = printed.get("in_turn", [{}])
    cells = tuple(
        Cell(text, {**every, **column.keys, **keys, **in_turn[place % len(in_turn)]})
        for place, (text, column) in enumerate(zip(printed["cells"], columns, strict=True))
    )
    return Row(keys, cells, options, tuple(map(int, printed.get("rank_layers", ()))), printed.get("label"))
