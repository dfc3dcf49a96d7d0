"""The data figures of the papers, drawn from run records alone: `harness figure dps-3`, `harness figure all`.

A file of this folder is one paper. A figure is a function of one model's records that returns None where those it shows
are not there; `published.yaml` holds the numbers that the papers' text gives for points of their figures.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.errors import DataMissing, UsageError, did_you_mean
from harness.files import replace_file
from harness.publish.figures.specs import COLLECTIVE, PERSONAL
from harness.publish.figures.specs import FIGURES as FIGURES
from harness.records.schema import RunRecord
from harness.records.select import Places, said
from harness.records.store import find_runs, models_first_to_last, of_one_weights

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    Draw = Callable[[Sequence[RunRecord], str | None], Figure | None]

FORMATS = ("png", "svg")


@cache
def printed(id: str) -> Mapping[str, Any]:
    """What the paper's text prints about points of the figure, as it stands in `published.yaml`."""
    import yaml

    found: Mapping[str, Any] = yaml.safe_load(files(__package__).joinpath("published.yaml").read_text("utf-8"))
    return found[id]


@dataclass(frozen=True)
class Drawn:
    paths: tuple[Path, ...]
    missing: Mapping[str, tuple[str, ...]]
    """Figure -> the commands that make its records."""


def write(
    ids: Sequence[str],
    results: Places,
    output: Path,
    formats: Sequence[str] = FORMATS,
    *,
    model: str | None = None,
    task: str | None = None,
) -> Drawn:
    """Write the figures `ids` (`all` of them) as OUTPUT/<id>.<format>, from the records of `model` on `task`.

    Where no model is named, of those that have the records the first of `models_first_to_last`. Raises UsageError for an unknown id,
    DataMissing where the one figure asked for has no records.
    """
    names = _named(ids)
    for fmt in formats:
        if fmt not in FORMATS:
            raise UsageError(f"unknown format {fmt!r}{did_you_mean(fmt, FORMATS)} choose from {', '.join(FORMATS)}")
    records = find_runs(results)
    paths, missing = [], {}
    for name in names:
        figure = draw(name, records, model=model, task=task)
        if figure is None:
            missing[name] = commands(name, model)
            continue
        from harness.publish.figures.style import rendered

        output.mkdir(parents=True, exist_ok=True)
        for fmt in formats:
            paths.append(output / f"{name}.{fmt}")
            replace_file(paths[-1], rendered(figure, fmt, name))
    if len(names) == 1 and missing:
        (name,) = names
        of = f" of {model}" if model else ""
        raise DataMissing(
            f"no records{of} in {said(results)} for figure {name}; make them: {' && '.join(missing[name])}"
        )
    return Drawn(tuple(paths), missing)


def draw(id: str, records: Sequence[RunRecord], *, model: str | None = None, task: str | None = None) -> Figure | None:
    """The figure of one model's records; None where they are not there."""
    module, _, function = FIGURES[id].draw.partition(":")
    made: Draw = getattr(import_module(f"harness.publish.figures.{module}"), function)
    finished = of_one_weights([record for record in records if record.status in ("complete", "partial")])
    models = models_first_to_last(finished)
    from harness.publish.figures.style import looks

    with looks():
        drawn = (
            made([record for record in finished if record.config.model.name == name], task)
            for name in (models if model is None else [model])
        )
        return next((figure for figure in drawn if figure is not None), None)


def commands(id: str, model: str | None = None) -> tuple[str, ...]:
    """What makes the figure's records; for other models than the embedded one, with words in capitals to be filled in."""
    given = FIGURES[id].commands
    if model not in (None, "tiny"):
        for words, others in _NOT_TINY.items():
            given = tuple(command.replace(words, others) for command in given)
        given = tuple(c if "persona:" in c or "--data" in c else f"{c} --data FOLDER" for c in given)
    return tuple(f"{command} --model {model}" if model else command for command in given)


_NOT_TINY = {
    " --task_set prompts=tiny": "",
    " --fit_set prompts=tiny --max_new_tokens 32": "",
    " --task_set rollouts=2 --users 10 --temperature 1 --max_new_tokens 32": "",
    "judge=lexicon": "judge=openai/JUDGE",
    "--judge lexicon": "--judge openai/JUDGE",
    " --set layer=1": "",
    f" --users 60{PERSONAL}{COLLECTIVE}": "",
    f"{PERSONAL}{COLLECTIVE}": "",
    PERSONAL: "",
    " --set lr=0.003 --set epochs=1 --set batch_size=4": "",
    "layer=0..4": "layer=0..LAST_BLOCK",
    "layers=0|1|2|3|4": "layers=BLOCK|...",
    "|1,3|0,2,4|0,1,2,3,4": "|BLOCK,BLOCK|...",
}


def _named(ids: Sequence[str]) -> list[str]:
    if "all" in ids:
        return list(FIGURES)
    names = [f"dps-{id}" if id.isdigit() else id.lower() for id in ids]
    for id, name in zip(ids, names, strict=True):
        if name not in FIGURES:
            hint = did_you_mean(name, FIGURES)
            raise UsageError(f"unknown figure {id!r}{hint} there are all, {', '.join(FIGURES)}")
    return list(dict.fromkeys(names))
