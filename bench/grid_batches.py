"""Five methods of one grid in shared batches, against five runs of their own.

    python bench/grid_batches.py [--size 50m] [--model smollm2-135m --model_path FILE --data FOLDER --limit 8]

`rag`, `cad`, `dps`, `dola` and `cos` on one task: the same prompts, one answer each. What dps learns is learnt before the clock
starts, and each run has a folder of its own. `whole` is the time of everything a command does once the model is loaded;
`answering` leaves out the comparison with the unedited model, which each method has by itself in both. Rounds alternate and the
medians' ratio is the result. The responses are compared: in float32 the last bits depend on what stands beside a row in its
batch, so single answers may differ where two tokens tie.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from subject import SIZES, dtype_of, model, settings, write

from harness.engine.loading import load_model
from harness.engine.model import LanguageModel
from harness.fit.artifacts import ArtifactStore
from harness.fit.states import shared_state
from harness.plugins.registry import model_row
from harness.records.store import Outcome, read_samples
from harness.run.cell import Cell, Settings, grid
from harness.run.console import Console
from harness.run.steps import run_cell
from harness.run.together import run_grid

METHODS = ("rag", "cad", "dps", "dola", "cos")


def cells(args: argparse.Namespace, output: Path) -> list[Cell]:
    chosen = Settings(
        limit=args.limit,
        batch_size=args.batch_size,
        max_new_tokens=args.new,
        output_path=output,
        allow_noop=True,
        fit_split="dev:0.1",
    )
    options = [f"k={args.k}", f"dps.samples={args.fit_samples}"]
    return grid(METHODS, [args.task], chosen, options, data=args.data)


def timed(
    lm: LanguageModel, args: argparse.Namespace, store: ArtifactStore, folder: Path, *, together: bool
) -> tuple[float, float, list[Outcome]]:
    """Seconds of everything, seconds without the comparison with the unedited model, and what came of it."""
    shutil.rmtree(folder, ignore_errors=True)
    asked = cells(args, folder)
    assert all(cell.items for cell in asked)
    start = time.perf_counter()
    runs: Sequence[Callable[[], Outcome]] = (
        run_grid(lm, asked, store=store) if together else [partial(run_cell, lm, cell, store=store) for cell in asked]
    )
    done = [run() for run in runs]
    spent = time.perf_counter() - start
    return spent, spent - sum(one.record.cost.effect_seconds or 0.0 for one in done), done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="50m", help="a random model, where no --model is given")
    parser.add_argument("--model")
    parser.add_argument("--model_path")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--task", default="lamp3")
    parser.add_argument("--data")
    parser.add_argument("--k", type=int, default=4)
    parser.add_argument("--limit", type=int, default=32)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--new", type=int, default=8)
    parser.add_argument("--fit_samples", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", help="file for the JSON; by default stdout")
    args = parser.parse_args()
    if args.model:
        lm = load_model(model_row(args.model, args.model_path), dtype="float32", device=args.device)
    else:
        lm = model(args.size, args.device, dtype_of(args.device))
        lm.revision = "random"
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        store = ArtifactStore(place / "artifacts")
        for cell in cells(args, place):
            shared_state(lm, cell, store, Console())
        times: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
        outcomes: dict[bool, list[Outcome]] = {}
        for _ in range(args.rounds):
            for together in times:
                whole, answering, outcomes[together] = timed(lm, args, store, place / str(together), together=together)
                times[together].append((whole, answering))
        medians = {t: [statistics.median(values) for values in zip(*found, strict=True)] for t, found in times.items()}
        responses = [
            [(s.id, s.response) for one in outcomes[t] for s in sorted(read_samples(one.folder), key=lambda s: s.id)]
            for t in times
        ]
        prompt_tokens = statistics.mean(s.prompt_tokens for s in read_samples(outcomes[True][0].folder))
    costs = [one.record.cost for one in outcomes[True]]
    results = {
        "seconds_together": [round(value, 3) for value in medians[True]],
        "seconds_apart": [round(value, 3) for value in medians[False]],
        "times_faster": {
            name: round(medians[False][n] / medians[True][n], 2) for n, name in enumerate(("whole", "answering"))
        },
        "flops_saved": round(sum(c.saved_flops or 0 for c in costs) / sum(c.flops or 0 for c in costs), 3),
        "same_responses": sum(a == b for a, b in zip(*responses, strict=True)),
        "responses": len(responses[0]),
        "mean_prompt_tokens": round(prompt_tokens),
    }
    del args.model_path, args.data
    write({"settings": settings(args, lm), "results": results}, args.output)


if __name__ == "__main__":
    main()
