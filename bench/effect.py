"""The comparison of a method with the unedited model, as it was in two passes and a generation, and as it is in one pass.

    python bench/effect.py [--size 50m] [--model smollm2-135m --model_path FILE]

Each method answers some samples; then both ways compare the same responses. `times_faster` is the ratio of the medians of
alternating rounds, `of_answering` what the comparison takes over what answering the same samples took. The values of both ways
stand beside each other: shares are equal where no two tokens tie to the last digits, as they may in a random model.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import MethodType

from subject import SIZES, dtype_of, model, settings, write

from harness.data import Example
from harness.engine.loading import load_model
from harness.engine.model import LanguageModel
from harness.fit.artifacts import ArtifactStore
from harness.fit.states import shared_state
from harness.plan import Plan
from harness.plugins.registry import model_row
from harness.run.answers import Difference, Effect, response_of
from harness.run.cell import Cell, Settings, grid
from harness.run.console import Console
from harness.run.system import ModelSystem
from harness.task import Generation


def twice_and_again(system: ModelSystem, pairs: Sequence[tuple[Example, str, Plan, Plan]]) -> list[Difference]:
    """The method's pass, the base's pass, and the base's own answer: how it was."""
    most = system.generation.max_new_tokens
    ids = [system._answer_ids(e, response)[: None if e.choices else most] for e, response, _, _ in pairs]
    rooms = [system._room(example, len(i)) for i, (example, *_) in zip(ids, pairs, strict=True)]
    plans = [system.decoder.prepare(e.id, plan, room) for (e, _, plan, _), room in zip(pairs, rooms, strict=True)]
    bases = [system.decoder.prepare(e.id, base, room) for (e, _, _, base), room in zip(pairs, rooms, strict=True)]
    answers = system._answer([system._ask(example, plan=base) for example, _, _, base in pairs])
    with_method, without = system.decoder.distributions(plans, ids), system.decoder.distributions(bases, ids)
    return [
        Difference(
            kl_nats=float((p.exp() * (p - q).nan_to_num(0.0, 0.0, 0.0)).sum()),
            changed=int((p.argmax(-1) != q.argmax(-1)).sum()),
            tokens=p.shape[0],
            identical=response_of(example, answer) == response,
        )
        for p, q, answer, (example, response, _, _) in zip(with_method, without, answers, pairs, strict=True)
    ]


def measured(lm: LanguageModel, cell: Cell, store: ArtifactStore, new: int, rounds: int) -> dict[str, object]:
    shared = shared_state(lm, cell, store, Console())
    system = ModelSystem(lm, cell.method, Generation(new), shared=shared.state)
    examples = [item.example for item in cell.items]
    start = time.perf_counter()
    answered = {sample.id: sample.response or "" for sample in system.respond(examples)}
    answering = time.perf_counter() - start
    responses = [answered[example.id] for example in examples]
    before = ModelSystem(lm, cell.method, Generation(new), shared=shared.state)
    before._compare = MethodType(twice_and_again, before)  # type: ignore[method-assign]
    ways: dict[str, Callable[[], Effect | None]] = {
        "before": lambda: before.effect(examples, responses),
        "now": lambda: system.effect(examples, responses),
    }
    found = {name: way() for name, way in ways.items()}  # also the warm-up
    spent: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            spent[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in spent.items()}
    one, other = found["before"], found["now"]
    if one is None or other is None:
        sys.exit(f"{cell.method_name}: nothing to compare")
    return {
        "times_faster": round(medians["before"] / medians["now"], 2),
        "of_answering": {name: round(value / answering, 2) for name, value in medians.items()},
        "changed_tokens": {"before": one.changed_tokens, "now": other.changed_tokens},
        "identical": {"before": one.identical, "now": other.identical},
        "kl_nats": other.kl_nats,
        "kl_apart": abs(one.kl_nats - other.kl_nats) / max(one.kl_nats, 1e-12),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="50m", help="a random model, where no --model is given")
    parser.add_argument("--model")
    parser.add_argument("--model_path")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--task", default="lamp4")
    parser.add_argument("--methods", nargs="+", default=["rag", "cad", "dps"])
    parser.add_argument("--k", type=int, default=4)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", help="file for the JSON; by default stdout")
    args = parser.parse_args()
    if args.model:
        lm = load_model(model_row(args.model, args.model_path), dtype="float32", device=args.device)
    else:
        lm = model(args.size, args.device, dtype_of(args.device))
        lm.revision = "random"
    options = [f"k={args.k}", *(["dps.samples=2"] if "dps" in args.methods else [])]
    chosen = Settings(limit=args.samples, max_new_tokens=args.new, fit_split="dev:0.1")
    with tempfile.TemporaryDirectory() as folder:
        store = ArtifactStore(Path(folder))
        cells = grid(args.methods, [args.task], chosen, options)
        results = {cell.method_name: measured(lm, cell, store, args.new, args.rounds) for cell in cells}
    del args.model_path
    write({"settings": settings(args, lm), "results": results}, args.output)


if __name__ == "__main__":
    main()
