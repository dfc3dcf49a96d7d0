"""`harness run` and `harness fit`: the two commands that load a model."""

from __future__ import annotations

import json
import os
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast, get_args

import typer

from harness.cli.judge import JudgeName, JudgeSet, JudgeUrl
from harness.errors import HarnessError, UsageError, did_you_mean

if TYPE_CHECKING:
    from harness.engine.model import LanguageModel
    from harness.judge.judges import Judge
    from harness.records.store import Outcome
    from harness.run.cell import Cell
    from harness.run.console import Console

Methods = Annotated[list[str], typer.Option("--method", help="Registered name, or ./file.py:Class. Repeatable.")]
Tasks = Annotated[list[str], typer.Option("--task", help="Task name, as in lamp4 (also LaMP-4). Repeatable.")]
Model = Annotated[str, typer.Option("--model", help="Alias, hub id, or folder. See: harness list models")]
ModelPath = Annotated[str | None, typer.Option("--model_path", "--model-path", help="Local weights for an alias.")]
Set = Annotated[
    list[str], typer.Option("--set", help="Method option key=value; of several methods, dps.key=value is one's own.")
]
TaskSet = Annotated[list[str], typer.Option("--task_set", "--task-set", help="Task option key=value. Repeatable.")]
SMALL = 20_000_000
"""Weights below which threads wait for each other longer than they compute: one is faster, and many times so beside
another job."""

Preset = Annotated[
    list[str], typer.Option(help="A named preset of the method, such as released; of several methods, dps.released.")
]
Data = Annotated[str | None, typer.Option(help="Folder of the task's files [default: $HARNESS_DATA, else lamp-mini].")]
Split = Annotated[str, typer.Option(help="Split to evaluate [default: dev; mmlu: test].", show_default=False)]
Fewshot = Annotated[
    int | None, typer.Option("--num_fewshot", "--num-fewshot", min=0, help="Solved examples before each question.")
]
Limit = Annotated[int | None, typer.Option(min=1, help="At most this many items.")]
Users = Annotated[int | None, typer.Option(min=1, help="Items of at most this many users.")]
ControlName = Annotated[
    str, typer.Option(help="none, wrong_user (everyone gets another user's history) or shuffled (its order changed).")
]
FitSplit = Annotated[
    str | None,
    typer.Option("--fit_split", "--fit-split", help="Split to fit on [default: train], or a share: dev:0.2."),
]
FitData = Annotated[
    str | None, typer.Option("--fit_data", "--fit-data", help="Folder of the --fit_task's files [default: --data's].")
]
FitTask = Annotated[str | None, typer.Option("--fit_task", "--fit-task", help="Fit on another task's items.")]
FitSet = Annotated[
    list[str], typer.Option("--fit_set", "--fit-set", help="Option key=value of the --fit_task. Repeatable.")
]
Seed = Annotated[int, typer.Option(help="Decides every draw: fits, sampling, splits.")]
BatchSize = Annotated[str, typer.Option("--batch_size", "--batch-size", help="Samples a batch: a number, or auto.")]
MaxNew = Annotated[
    int | None, typer.Option("--max_new_tokens", "--max-new-tokens", min=1, help="[default: the task's]")
]
Temperature = Annotated[float, typer.Option(min=0, help="0 is greedy.")]
TopP = Annotated[float, typer.Option("--top_p", "--top-p", min=0, max=1, help="Nucleus sampling; 1 is no cut.")]
TopK = Annotated[int, typer.Option("--top_k", "--top-k", min=0, help="0 is no cut.")]
Output = Annotated[Path, typer.Option("--output_path", "--output-path", help="Where records are kept.")]
Dtype = Annotated[
    str, typer.Option(help="auto (bfloat16 on CUDA, float32 on CPU), float32, bfloat16, float16, float64.")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
DeviceMap = Annotated[
    str | None, typer.Option("--device_map", "--device-map", help="auto spreads a large model over GPUs.")
]


def run(
    method: Methods,
    task: Tasks,
    model: Model = "tiny",
    model_path: ModelPath = None,
    settings: Set = [],  # noqa: B006
    task_settings: TaskSet = [],  # noqa: B006
    num_fewshot: Fewshot = None,
    preset: Preset = [],  # noqa: B006
    data: Data = None,
    split: Split = "",
    limit: Limit = None,
    users: Users = None,
    control: ControlName = "none",
    fit_split: FitSplit = None,
    fit_task: FitTask = None,
    fit_data: FitData = None,
    fit_settings: FitSet = [],  # noqa: B006
    seed: Seed = 0,
    batch_size: BatchSize = "auto",
    max_new_tokens: MaxNew = None,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    output_path: Output = Path("results"),
    dtype: Dtype = "auto",
    device: Device = "auto",
    device_map: DeviceMap = None,
    judge: JudgeName = None,
    judge_base_url: JudgeUrl = None,
    judge_settings: JudgeSet = [],  # noqa: B006
    export: Annotated[
        str | None,
        typer.Option(
            help="lamp: also write predictions.json for the official evaluator; peft: also write the LoRA adapters as "
            "PEFT folders, peft/collective and peft/users/<id>, into the record's."
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry_run", "--dry-run", help="Show prompts and costs; run nothing.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print records as JSON, one a line.")] = False,
    allow_noop: Annotated[
        bool, typer.Option("--allow_noop", "--allow-noop", help="Exit 0 though a method changed nothing.")
    ] = False,
    retry_failed: Annotated[
        bool,
        typer.Option("--retry_failed", "--retry-failed", help="Run the failed samples of a finished record again."),
    ] = False,
) -> None:
    """Run methods on tasks: every --method on every --task, the model loaded once.

    The same command again resumes a run that was killed, and shows one that is complete.
    """
    from harness.run.cell import Settings, grid
    from harness.run.console import Terminal
    from harness.run.control import Control

    controls = get_args(Control)
    if control not in controls:
        raise UsageError(f"unknown control {control!r}{did_you_mean(control, controls)} allowed: {', '.join(controls)}")
    if export not in (None, "lamp", "peft"):
        raise UsageError(f"unknown export {export!r}; allowed: lamp, peft")
    chosen = Settings(
        split=split,
        limit=limit,
        users=users,
        control=cast(Control, control),
        fit_split=fit_split,
        batch_size=batch_size_of(batch_size),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        output_path=output_path,
        allow_noop=allow_noop,
        retry_failed=retry_failed,
    )
    task_settings = _with_shots(task_settings, num_fewshot)
    cells = grid(method, task, chosen, settings, task_settings, preset, data, fit_task, fit_data, fit_settings)
    for cell in cells:
        if export == "lamp" and not cell.task_name.startswith("lamp"):
            raise UsageError(f"--export lamp is for LaMP tasks; {cell.task_name} is none")
        if export == "peft" and "targets" not in cell.method.options():
            raise UsageError(f"--export peft is for methods that train LoRA adapters; {cell.method_name} does not")
    console, several = Terminal(), len(cells) > 1

    def read(cell: Cell) -> int:
        """Before the model is loaded: a mistake in the data shows at once."""
        assert cell.items
        return 0

    def answer(cell: Cell) -> int:
        from harness.run.steps import run_cell

        if several:
            console.say(f"{cell.method_name} on {cell.task_name}")
        done = run_cell(lm, cell, console=console, judge=rater)
        console.close()
        report(done, console, as_json=as_json)
        if export == "lamp":
            _export_lamp(done, console)
        if export == "peft":
            _export_peft(lm, cell, done, console)
        return done.exit_code

    def describe(cell: Cell) -> int:
        from harness.run.dry_run import dry_run

        print(dry_run(lm, cell))
        return 0

    for line in dict.fromkeys(cell.task.describe_data() for cell in cells):
        console.say(line)
    codes = _each(cells, read, console, grid=several)
    ready = [cell for cell, code in zip(cells, codes, strict=True) if not code]
    if ready:
        rater = None if dry_run else open_judge_for(judge, judge_base_url, judge_settings, ready, console)
        lm = load(model, model_path, dtype, device, device_map, console)
        codes += _each(ready, describe if dry_run else answer, console, grid=several)
    raise typer.Exit(next((code for code in (1, 4, 2, 3) if code in codes), 0))


def fit(
    method: Methods,
    task: Tasks,
    model: Model = "tiny",
    model_path: ModelPath = None,
    settings: Set = [],  # noqa: B006
    task_settings: TaskSet = [],  # noqa: B006
    num_fewshot: Fewshot = None,
    preset: Preset = [],  # noqa: B006
    data: Data = None,
    split: Split = "",
    fit_split: FitSplit = None,
    fit_task: FitTask = None,
    fit_data: FitData = None,
    fit_settings: FitSet = [],  # noqa: B006
    seed: Seed = 0,
    max_new_tokens: MaxNew = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    device_map: DeviceMap = None,
) -> None:
    """Fit a method and keep what it learnt; a later run with the same settings reuses it."""
    from harness.fit.artifacts import ArtifactStore
    from harness.run.cell import Settings, check_fit, grid
    from harness.run.console import Terminal

    chosen = Settings(split=split, fit_split=fit_split, max_new_tokens=max_new_tokens, seed=seed)
    task_settings = _with_shots(task_settings, num_fewshot)
    cells = grid(method, task, chosen, settings, task_settings, preset, data, fit_task, fit_data, fit_settings)
    console, store = Terminal(), ArtifactStore()

    def learn(cell: Cell) -> int:
        from harness.fit.states import shared_state, warnings_of

        shared = shared_state(lm, cell, store, console)
        console.close()
        for warning in warnings_of(cell.method, shared):
            console.say(f"warning: {warning}")
        if shared.key and shared.state:
            meta = {k: v[:10] if isinstance(v, list) else v for k, v in shared.state.meta.items()}
            print(json.dumps({"key": shared.key, "folder": str(store.root / shared.key), **meta}))
        return 0

    for cell in cells:
        check_fit(cell)
    lm = load(model, model_path, dtype, device, device_map, console)
    raise typer.Exit(max(_each(cells, learn, console, grid=len(cells) > 1)))


def _each(cells: Sequence[Cell], act: Callable[[Cell], int], console: Console, *, grid: bool) -> list[int]:
    """The exit code of `act` for each cell. A cell that fails is a line, named in a grid, and the others go on."""
    codes = []
    for cell in cells:
        try:
            codes.append(act(cell))
        except HarnessError as error:
            name = f"{cell.method_name} on {cell.task_name}: " if grid else ""
            console.say(f"harness: {name}{' '.join(str(error).split())}")
            codes.append(error.exit_code)
        except BrokenPipeError:
            raise
        except Exception:  # a mistake in someone's method; the record says `failed`
            console.close()
            traceback.print_exc()
            codes.append(1)
    console.close()
    return codes


def report(done: Outcome, console: Console, *, as_json: bool) -> None:
    """Results to stdout, and what must be known before quoting them to stderr."""
    from harness.publish.show import metrics_table, warnings

    config = done.record.config
    if as_json:
        print(json.dumps({"folder": str(done.folder), **json.loads(done.record.to_json())}))
    else:
        print(f"{config.method.name} on {config.task.name} with {config.model.name}")
        print(metrics_table(done.record))
        print(done.folder)
    for line in warnings(done.record):
        console.say(f"warning: {line}")


def _export_peft(lm: LanguageModel, cell: Cell, done: Outcome, console: Console) -> None:
    """Reads the adapters where the run kept them; trains those that are gone from there."""
    from harness.engine.adapters import write_adapter
    from harness.fit.artifacts import ArtifactStore
    from harness.fit.states import personal_states, shared_state

    store = ArtifactStore()
    shared = shared_state(lm, cell, store, console)
    users = personal_states(lm, cell, shared, store, console).fitted()
    states = {"collective": shared.state, **{f"users/{user}": state for user, state in users.items()}}
    trained = {name: state for name, state in states.items() if state is not None and state.tensors}
    for name, state in trained.items():
        write_adapter(state, done.folder / "peft" / name, lm)
    console.say(f"wrote {len(trained)} adapters to {done.folder / 'peft'}")


def _export_lamp(done: Outcome, console: Console) -> None:
    from harness.records.store import read_samples
    from harness.tasks.lamp import export_lamp

    if done.record.health.errors:
        console.say("warning: no predictions.json, since the official evaluator wants an answer to every item")
        return
    path = done.folder / "predictions.json"
    export_lamp(done.record.config.task.name, read_samples(done.folder), path)
    console.say(f"for the official evaluator: {path}")


def open_judge_for(
    name: str | None, base_url: str | None, settings: Sequence[str], cells: Sequence[Cell], console: Console
) -> Judge | None:
    """The judge, where one is named. What can be wrong with it shows before a response is generated."""
    if name is None:
        if base_url or settings:
            raise UsageError("--judge_base_url and --judge_set are about a judge; name it: --judge openai/<model>")
        return None
    if not any(cell.task.judged for cell in cells):
        tasks = ", ".join(dict.fromkeys(cell.task_name for cell in cells))
        raise UsageError(f"{tasks}: no judge is asked; 'harness judge pairs RUN_A RUN_B' compares two runs of any task")
    from harness.judge.endpoint import ENDPOINT
    from harness.judge.judges import open_judge

    for asked in {getattr(cell.method, "judge", None) or "" for cell in cells}:
        if base_url and asked.startswith(ENDPOINT) and base_url != os.environ.get("OPENAI_BASE_URL"):
            raise UsageError(
                f"--judge_base_url is of the answers' judge; judge={asked} of the fit is asked at $OPENAI_BASE_URL: set that to "
                f"{base_url} in place of --judge_base_url"
            )
    judge = open_judge(name, base_url, settings)
    why_not = judge.check()
    if why_not:
        console.say(f"warning: the judge does not answer now, the responses will be saved: {why_not}")
    return judge


def _with_shots(task_settings: Sequence[str], num_fewshot: int | None) -> list[str]:
    return [*task_settings, *([] if num_fewshot is None else [f"num_fewshot={num_fewshot}"])]


def batch_size_of(text: str) -> int | None:
    if text == "auto":
        return None
    if not text.isdigit() or int(text) < 1:
        raise UsageError(f"--batch_size {text} is not valid; allowed: auto, or a number >= 1")
    return int(text)


def load(
    model: str, path: str | None, dtype: str, device: str, device_map: str | None, console: Console
) -> LanguageModel:
    from harness.engine.loading import load_model
    from harness.registry import model_row

    row = model_row(model, path)
    console.say(f"loading {row.name}")
    lm = load_model(row, dtype=dtype, device=device, device_map=device_map)  # type: ignore[arg-type]
    if lm.device.type == "cpu" and lm.parameters < SMALL and "OMP_NUM_THREADS" not in os.environ:
        import torch

        torch.set_num_threads(1)
    return lm
