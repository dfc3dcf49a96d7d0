"""What runs and rankings are called: as little as tells them from the others beside them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from harness.errors import UsageError
from harness.methods import METHODS
from harness.plugins.registry import method_class, task_class
from harness.records.schema import MethodConfig, RunConfig, RunRecord, json_value


def selected(run: RunRecord) -> list[str]:
    """What tells the samples of a ranking from those of another of its task."""
    data, selection = run.config.data, run.config.selection
    given = [f"{flag} {n}" for flag, n in (("--limit", selection.limit), ("--users", selection.users)) if n is not None]
    said = [f"{key}={json.dumps(value)}" for key, value in sorted(run.config.task.options.items())]
    said += [f"split {data.split}"] * (data.split != "dev") + [f"{' '.join(given)} only"] * bool(given)
    said += ["--exclude_leaks"] * selection.exclude_leaks
    return said + [f"--control {selection.control}"] * (selection.control != "none")


def method_label(run: RunRecord, runs: Sequence[RunRecord]) -> str:
    """The method, its preset, and in what it differs from others of its own among `runs`, options not at their default and
    fit, and from any of them how answers are drawn."""
    method = run.config.method
    same = [other.config for other in runs if other.config.method.name == method.name]
    options = [config.method.options for config in same]
    differing = [key for key in sorted(method.options) if any(method.options[key] != o.get(key) for o in options)]
    default = defaults(method.name)
    notes = [method.preset] if method.preset else []
    notes += [
        f"{key}={json.dumps(method.options[key])}"
        for key in differing
        if key not in default or default[key] != method.options[key]
    ]
    cut = any(other.health.hit_max_tokens for other in runs)  # else how long an answer may be changes none
    of_all = {key for key in dict(run.config.sampling) if cut or key != "max_new_tokens"}
    notes += [
        f"--{key} {value}"
        for key, value in _asked(run.config).items()
        if value is not None
        and any(value != _asked(other)[key] for other in ([r.config for r in runs] if key in of_all else same))
    ]
    return f"{method.name} ({', '.join(notes)})" if notes else method.name


def _asked(config: RunConfig) -> dict[str, Any]:
    """What a command says beside the method's own options, by the names of its flags."""
    return {"fit_split": config.data.fit_split, "fit_task": config.data.fit_task, **dict(config.sampling)}


@cache
def defaults(method: str) -> Mapping[str, Any]:
    """A registered method's own options; none of one that is somebody's file."""
    return json_value(method_class(method)().options()) if method in METHODS else {}


@cache
def usual(method: str, preset: str | None = None) -> Mapping[str, Sequence[Any]]:
    """Option -> the values, as a record writes them, that a run has which sets none: several where the model decides, as of `dps`
    how many heads it measures. None are known of a method that is not registered."""
    if method not in METHODS:
        return {}
    cls = method_class(method)
    made = cls().with_options(cls.presets[preset]) if preset else cls()
    decided = [MethodConfig(name=method, options=made.decided(heads).options()).options for heads in (1, 10**6)]
    return {name: [options[name] for options in decided] for name in decided[0]}


def further(runs: Sequence[RunRecord]) -> tuple[str, ...]:
    """What may tell two rankings apart whose titles are alike: each is true of all `runs` of the one."""
    config, held_out = runs[0].config, {_held_out(run) for run in runs}
    weights = "+".join(part[:8] for part in config.model.revision.removeprefix("sha256:").split("+"))
    judge = f"judge {config.judge.name} {(config.judge.revision or '')[:15]}".strip() if config.judge else ""
    return (
        f"weights {weights}",
        config.model.dtype,
        f"task version {config.task.version}",
        held_out.pop() if len(held_out) == 1 else "held-out users differ",
        f"data {config.data.fingerprint[:8]}",
        judge,
    )


def _held_out(run: RunRecord) -> str:
    count = len(run.held_out_users)
    return f"{count} users held out ({run.config.data.fit_split})" if count else "no users held out"


def names_of_a_sample(task: str) -> dict[str, str]:
    """What a sample of the task calls a number -> the metric that is its mean, where these are one thing: `correct` is `accuracy`."""
    try:
        of_sample = task_class(task).per_sample
    except UsageError:  # a task that this version does not have
        return {}
    return {own: metric for metric, own in of_sample.items() if own.startswith("correct")}
