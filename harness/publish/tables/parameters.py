"""How many weights PerFit trains: by the paper's arithmetic, and in a run's own modules.

A low-rank shift of rank r at one layer has R and W, 2 x width x r weights (its r biases change no printed digit); OPPU's
LoRA of rank 8 on m square matrices of L layers has 2 x width x 8 x m x L. With rank x layers = R the percentage is
100 x 2 width R / weights of the model, the reduction 100 x (1 - 2 width R / OPPU's of the same stage).
"""

from __future__ import annotations

import json

from harness.engine.flops import SIZES, Sizes
from harness.publish.tables.grid import MISSING, Entry, Grid, Line
from harness.publish.tables.measured import Run
from harness.publish.tables.published import Row, Table

LLAMAS = ("llama2-7b", "llama3-8b", "mistral-7b", "vicuna-13b")
"""Models whose weights `weights` counts."""
LORA_RANK = 8
LORA_MATRICES = {"1": 3, "2": 2}
"""Stage -> how many of a layer OPPU adapts: q, k, v of all users; q, v of one."""


def weights(llama: Sizes) -> int:
    """Of a Llama whose embeddings are not tied: two tables, the blocks with two norms each, and the last norm."""
    blocks = llama.layers * (llama.block_weights + 2 * llama.width)
    return 2 * llama.vocabulary * llama.width + blocks + llama.width


def percent(sizes: Sizes, rank_layers: int) -> float:
    return 100 * 2 * sizes.width * rank_layers / weights(sizes)


def reduction(sizes: Sizes, rank_layers: int, stage: str) -> float:
    """In percent of OPPU's weights of the stage."""
    return 100 * (1 - rank_layers / (LORA_RANK * LORA_MATRICES[stage] * sizes.layers))


def computed(table: Table, row: Row, labels: tuple[str, ...]) -> Line:
    """The row from rank x layers, with the digits that the paper prints."""
    sizes = SIZES[row.keys["model"]]
    entries = []
    for cell, rank_layers in zip(row.cells, row.rank_layers, strict=True):
        if cell.keys["metric"] == "parameter_percent":
            value = percent(sizes, rank_layers)
        else:
            value = reduction(sizes, rank_layers, cell.keys["stage"])
        entries.append(Entry(f"{value:.{cell.decimals}f}", value, keys=cell.keys))
    keys = {**table.keys, **row.keys}
    return Line(labels, "computed", keys, tuple(entries), (None,) * len(entries), ranked=False)


def measured(
    grid: Grid,
    labels: tuple[str, ...],
    model: str,
    row: Row,
    behind: tuple[Run | None, ...],
    oppu: tuple[Run | None, ...],
) -> Line | None:
    """The row from what the modules of PerFit's runs hold, and OPPU's on the same tasks; None where nothing was run."""
    whole, entries = _weights_of(model), []
    for cell, run, other in zip(row.cells, behind, oppu, strict=True):
        own = _trained(run, cell.keys["stage"])
        of = whole if cell.keys["metric"] == "parameter_percent" else _trained(other, cell.keys["stage"])
        if run is None or own is None or of is None:
            entries.append(MISSING)
            continue
        value = 100 * own / of if cell.keys["metric"] == "parameter_percent" else 100 * (1 - own / of)
        entries.append(Entry(f"{value:.{cell.decimals}f}", value, marks=grid.mark(run.reasons), keys=cell.keys))
    if all(entry.value is None for entry in entries):
        return None
    keys = {**row.keys, "model": model}
    return Line(labels, "measured", keys, tuple(entries), behind, ranked=False)


def _trained(run: Run | None, stage: str) -> int | None:
    """Of all users in stage 1, of one in stage 2."""
    trained = run.record.analysis.get({"1": "collective", "2": "personal"}[stage]) if run else None
    return trained["parameters"] if trained else None


def _weights_of(model: str) -> int | None:
    if model == "tiny":
        from harness.tiny import MODEL_DIR

        sizes = Sizes.of(json.loads((MODEL_DIR / "config.json").read_text("utf-8")))
        return weights(sizes) - sizes.vocabulary * sizes.width  # its embeddings are tied
    return weights(SIZES[model]) if model in LLAMAS else None
