"""`harness run` and `harness fit`: the two commands that load a model."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from traceback import format_exc
from typing import TYPE_CHECKING, Annotated, Any, Unpack, cast, get_args

import typer

from harness.cli.commands import with_options
from harness.cli.declarations import (
    OUTPUT,
    WHAT,
    Command,
    Judged,
    Options,
    check_model,
    folder_text,
    names,
    pairs,
    path_text,
    with_defaults,
)
from harness.errors import HarnessError, UsageError, did_you_mean, gravest, one_line
from harness.files.shown import say, without_credentials
from harness.run.control import Control
from harness.servers.address import ENDPOINT

if TYPE_CHECKING:
    from harness.engine.model import LanguageModel
    from harness.judge.judges import Judge
    from harness.method import Method
    from harness.records.store import Outcome
    from harness.run.cell import Cell
    from harness.run.console import Console

SMALL = 20_000_000
"""Weights below which threads wait for each other longer than they compute: one is faster, and many times so beside
another job."""

RUN = (
    "method",
    "task",
    "model",
    "model_base_url",
    "model_set",
    "model_path",
    "set",
    "preset",
    "task_set",
    "num_fewshot",
    "control",
    "data",
    "split",
    "limit",
    "users",
    "exclude_leaks",
    "seed",
    "max_new_tokens",
    "temperature",
    "top_p",
    "top_k",
    "fit_split",
    "fit_task",
    "fit_data",
    "fit_set",
    "judge",
    "judge_base_url",
    "judge_set",
    "batch_size",
    "effect_samples",
    "dtype",
    "device",
    "device_map",
    "on",
    "gpus_per_worker",
    "mixed_hardware",
    "output_path",
    "json",
    "allow_noop",
    "retry_failed",
)
FIT = tuple(
    name
    for name in RUN
    if name not in {"control", "limit", "users", "temperature", "top_p", "top_k", "output_path", "json"}
    and name not in {"judge", "judge_base_url", "judge_set", "allow_noop", "retry_failed", "exclude_leaks"}
    and name not in {"model_base_url", "model_set", "batch_size", "effect_samples"}
)


@with_options(*RUN)
def run(
    export: Annotated[
        str | None,
        typer.Option(
            help="lamp: also write predictions.json for the official evaluator; peft: also write the LoRA adapters as "
            "PEFT folders, peft/collective and peft/users/<name> (names.json says whose), into the record's.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry_run", help="Show prompts and costs; run nothing.", rich_help_panel=WHAT)
    ] = False,
    **given: Unpack[Command],
) -> None:
    """Run methods on tasks: every --method on every --task, the model loaded once, equal prompts read once.

    The same command again resumes a run that was killed, and shows one that is complete.
    """
    from harness.grid.executors import place_of
    from harness.run.console import Terminal

    if export not in (None, "lamp", "peft"):
        raise UsageError(f"unknown export {export!r}; allowed: lamp, peft")
    check_model(given["model"], given)
    cells = cells_of(given["method"], given["task"], given)
    for cell in cells:
        if export == "lamp" and not cell.task_name.startswith("lamp"):
            raise UsageError(f"--export lamp is for LaMP tasks; {cell.task_name} is none")
        if export == "peft" and "targets" not in cell.method.options():
            raise UsageError(f"--export peft is for methods that train LoRA adapters; {cell.method_name} does not")
    console, several, place = Terminal(), len(cells) > 1, place_of(given)
    if place and export == "peft":
        raise UsageError("--export peft reads adapters with the model at hand; give the command again without --on")
    finished: list[Path] = []
    codes: list[int] = []

    def read(cell: Cell) -> int:
        """Before the model is loaded: a mistake in the data shows at once."""
        from harness.plugins.returned import fingerprint_of

        assert cell.items
        if place:  # workers are told
            fingerprint_of(cell.task, cell.selection)
        return 0

    def answer(cell: Cell) -> int:
        from harness.cli.exports import export_lamp, export_peft
        from harness.run.kept import say_kept

        if several:
            console.say(f"{cell.method_name} on {cell.task_name}")
        done = outcomes(cell) if outcomes else kept[id(cell)] if id(cell) in kept else runs[id(cell)]()
        if id(cell) in kept or done.folder in finished:
            say_kept(done.record, done.folder, console)
        console.close()
        report(done, console, as_json=given["json"])
        if export == "lamp":
            export_lamp(done, console)
        if export == "peft":
            export_peft(lm, cell, done, console)
        if done.folder not in finished:
            finished.append(done.folder)
        return done.exit_code

    def describe(cell: Cell) -> int:
        from harness.grid.estimate import estimate
        from harness.run.dry_run import dry_run

        say(dry_run(lm, cell))
        if place:
            say(estimate(lm, [cell], place.workers))
        return 0

    def prepare() -> tuple[list[list[Cell]], list[int], Judge | None]:
        """The cells whose data can be read."""
        from harness.statistics.paired_tests import FEWEST

        for line in dict.fromkeys(cell.description for cell in cells):
            console.say(line)
        codes.extend(_each(cells, read, console, grid=several))
        chosen = [number for number, code in enumerate(codes) if not code]
        some = [cells[number] for number in chosen]
        fewest = min(map(_units, some), default=FEWEST)
        if fewest < FEWEST:
            console.say(
                f"warning: {fewest} users: no test finds a difference at 5 % with fewer than {FEWEST}; give more"
            )
        return [[cell] for cell in some], chosen, open_judge_for(given, some, console) if some and not dry_run else None

    outcomes = None
    if place and not dry_run:
        from harness.grid.run import on_workers

        outcomes = on_workers("run", given, place, console, prepare)
    else:
        rater = prepare()[2]
    ready = [cell for cell, code in zip(cells, codes, strict=True) if not code]
    if ready:
        from harness.run.kept import kept_outcomes

        kept = (
            {}
            if dry_run or place or export == "peft"
            else kept_outcomes(given["model"], with_defaults(given), ready, rater)
        )
        waiting = [] if outcomes else [cell for cell in ready if id(cell) not in kept]
        if waiting:
            lm = load(given["model"], given, console, served=place is None)
        if waiting and not dry_run:
            from harness.run.together import run_grid

            runs = dict(zip(map(id, waiting), run_grid(lm, waiting, console=console, judge=rater), strict=True))
        codes += _each(ready, describe if dry_run else answer, console, grid=several)
    if finished and not given["json"]:
        console.say(f"look at it: harness show {finished[0]}")
        together = len(finished) > 1 and len({folder.parent for folder in finished}) == 1
        beside = f"harness compare {' '.join(map(str, finished[:4]))}; " if together else ""
        console.say(f"next: {beside}harness report --open")
    raise typer.Exit(gravest(codes))


@with_options(*FIT)
def fit(**given: Unpack[Command]) -> None:
    """Fit a method and keep what it learnt; a later run with the same settings reuses it."""
    from harness.fit.artifacts import ArtifactStore
    from harness.grid.executors import place_of
    from harness.run.cell import check_fit
    from harness.run.console import Terminal

    check_model(given["model"], given, served=False)
    cells = cells_of(given["method"], given["task"], given)
    console, store = Terminal(), ArtifactStore()

    def learn(cell: Cell) -> int:
        from harness.fit.states import shared_state, warnings_of

        shared = learnt(cell) if learnt else shared_state(lm, cell, store, console)
        console.close()
        for warning in warnings_of(cell.method, shared):
            console.say(f"warning: {warning}")
        if shared.key and shared.state:
            meta = {k: v[:10] if isinstance(v, list) else v for k, v in shared.state.meta.items()}
            say(json.dumps({"key": shared.key, "folder": str(store.root / shared.key), **meta}))
        return 0

    def prepare() -> tuple[list[list[Cell]], range, None]:
        for cell in cells:
            check_fit(cell)
        return [[cell] for cell in cells], range(len(cells)), None

    place, learnt = place_of(given), None
    if place:
        from harness.grid.run import on_workers

        learnt = on_workers("fit", given, place, console, prepare)
    else:
        prepare()
        lm = load(given["model"], given, console)
    raise typer.Exit(gravest(_each(cells, learn, console, grid=len(cells) > 1)))


def _units(cell: Cell) -> int:
    """How many users, or independent items, are evaluated."""
    by_user = cell.task.independent == "user"
    return len({item.example.user.id if by_user else item.example.id for item in cell.items})


def _each(cells: Sequence[Cell], act: Callable[[Cell], int], console: Console, *, grid: bool) -> list[int]:
    """The exit code of `act` for each cell. A cell that fails is a line, named in a grid, and the others go on."""
    codes = []
    for cell in cells:
        try:
            codes.append(act(cell))
        except HarnessError as error:
            name = f"{cell.method_name} on {cell.task_name}: " if grid else ""
            console.say(f"harness: {name}{error}")
            codes.append(error.exit_code)
        except BrokenPipeError:
            raise
        except SystemExit as stop:  # of a method or task; whatever code it gives, nothing was finished
            name = f"{cell.method_name} on {cell.task_name}: " if grid else ""
            console.say(
                f"harness: {name}the method or task ended the program with sys.exit({stop.code}); that is no result"
            )
            codes.append(1)
        except Exception as error:  # a mistake in someone's method; the record says `failed`
            line = one_line(error)
            console.say(f"harness: {line}") if line else say(without_credentials(format_exc()), stream=sys.stderr)
            codes.append(1)
    console.close()
    return codes


def report(done: Outcome, console: Console, *, as_json: bool) -> None:
    """Results to stdout, and what must be known before quoting them to stderr."""
    from harness.publish.show import metrics_table, reproduced, serving_in_words, warnings

    config = done.record.config
    if as_json:
        say(json.dumps({"folder": str(done.folder), **json.loads(done.record.to_json())}))
    else:
        say(f"{config.method.name} on {config.task.name} with {config.model.name}")
        say(metrics_table(done.record))
        say(done.folder)
    if served := serving_in_words(done.record):
        console.say(f"server: {'; '.join(served)}")
    for line in warnings(done.record):
        console.say(f"warning: {line}")
    again = reproduced(done.folder, done.record)
    if again:
        console.say(again)


def cells_of(methods: Sequence[str | Method], tasks: Sequence[str], given: Options) -> list[Cell]:
    """Every method on every task as `given` says. Raises UsageError for whatever is not known or not valid."""
    from harness.run.cell import Settings, grid

    asked = with_defaults(given)
    controls = get_args(Control)
    if asked["control"] not in controls:
        hint = did_you_mean(asked["control"], controls)
        raise UsageError(f"unknown control {asked['control']!r}{hint} allowed: {', '.join(controls)}")
    chosen = Settings(
        split=asked["split"],
        limit=asked["limit"],
        users=asked["users"],
        exclude_leaks=asked["exclude_leaks"],
        control=asked["control"],
        fit_split=asked["fit_split"],
        batch_size=_batch_size(asked["batch_size"]),
        max_new_tokens=asked["max_new_tokens"],
        temperature=asked["temperature"],
        top_k=asked["top_k"],
        top_p=asked["top_p"],
        seed=asked["seed"],
        output_path=Path(asked["output_path"]),
        allow_noop=asked["allow_noop"],
        effect_samples=asked["effect_samples"],
        retry_failed=asked["retry_failed"],
    )
    shots = [] if asked["num_fewshot"] is None else [f"num_fewshot={asked['num_fewshot']}"]
    return grid(
        methods,
        tasks,
        chosen,
        pairs(asked["set"]),
        [*pairs(asked["task_set"]), *shots],
        names(asked["preset"]),
        folder_text("--data", asked["data"]),
        asked["fit_task"],
        folder_text("--fit_data", asked["fit_data"]),
        pairs(asked["fit_set"]),
    )


def open_judge_for(given: Judged, cells: Sequence[Cell], console: Console) -> Judge | None:
    """The judge, where one is named. What can be wrong with it shows before a response is generated."""
    name, base_url, settings = given.get("judge"), given.get("judge_base_url"), pairs(given.get("judge_set", ()))
    if name is None:
        if base_url or settings:
            raise UsageError("--judge_base_url and --judge_set are about a judge; name it: --judge openai/<model>")
        return None
    if not any(cell.task.judged for cell in cells):
        tasks = ", ".join(dict.fromkeys(cell.task_name for cell in cells))
        raise UsageError(f"{tasks}: no judge is asked; 'harness judge pairs RUN_A RUN_B' compares two runs of any task")
    from harness.judge.judges import open_judge
    from harness.servers.address import ENDPOINT

    for asked in {getattr(cell.method, "judge", None) or "" for cell in cells}:
        if base_url and asked.startswith(ENDPOINT) and base_url != os.environ.get("OPENAI_BASE_URL"):
            raise UsageError(
                f"--judge_base_url is of the answers' judge; judge={asked} of the fit is asked at $OPENAI_BASE_URL: set that to "
                f"{without_credentials(base_url)} in place of --judge_base_url"
            )
    asks = {what for cell in cells if cell.task.judged for what in cell.task.asks}
    judge = open_judge(name, base_url, settings, asks=asks)
    why_not = judge.check()
    if why_not:
        console.say(f"warning: the judge does not answer now, the responses will be saved: {why_not}")
    return judge


def _batch_size(given: int | str) -> int | None:
    text = str(given)
    if text == "auto":
        return None
    if not re.fullmatch(r"[0-9]{1,9}", text) or int(text) < 1:
        raise UsageError(f"--batch_size {text} is not valid; allowed: auto, or 1 to 999999999")
    return int(text)


def load(model: str, given: Options, console: Console, *, served: bool = False) -> LanguageModel:
    """The model, by its alias, hub id or folder, as `given` says of weights, precision and device.

    One behind a server only where it is `served` that can be used.
    """
    from harness.engine.loading import load_model
    from harness.plugins.registry import model_row

    check_model(model, given, served=served)
    asked = with_defaults(given)
    if model.startswith(ENDPOINT):
        return _served(model.removeprefix(ENDPOINT), asked["model_base_url"], pairs(asked["model_set"]), console)
    row = model_row(model, path_text(asked["model_path"]))
    console.say(f"loading {row.name}")
    lm = load_model(row, dtype=asked["dtype"], device=asked["device"], device_map=asked["device_map"])  # type: ignore[arg-type]
    if lm.device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        import torch

        from harness.engine.machine import free_cores

        torch.set_num_threads(1 if lm.parameters < SMALL else min(free_cores(), torch.get_num_threads()))
    return lm


def _served(name: str, base_url: str | None, settings: Sequence[str], console: Console) -> LanguageModel:
    """A model behind a server, which answers where it stands for one with weights what it can."""
    from harness.servers.model import ServedModel

    served = ServedModel.open(name, base_url, settings)
    console.say(f"asking {served.source}")
    served.check()
    return cast(Any, served)
