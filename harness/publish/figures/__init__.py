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
from harness.records.schema import RunRecord
from harness.records.select import Places, said
from harness.records.store import find_runs, models_first_to_last

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    Draw = Callable[[Sequence[RunRecord], str | None], Figure | None]

FORMATS = ("png", "svg")

_DPS = "harness run --method dps --task lamp2m"
_CLUSTERS = "harness run --method dps --set clusters=4 --set samples=200 --task lamp2m --task lamp4"


_DELTA = tuple(
    f"harness run --method rag --set k=1 --task delta_vectors --task_set task={task}"
    for task in ("lamp2n", "lamp4", "lamp5", "lamp7")
)
# rates for the short histories of lamp-mini, as in results/make.sh
_PERSONAL = " --set lr=0.03 --set epochs=3 --set batch_size=2"
_COLLECTIVE = " --set collective_lr=0.003 --set collective_epochs=1"
_GRID = f"harness sweep --method perfit --users 60{_PERSONAL}{_COLLECTIVE}"
_PATCHING = ("harness run --method plain --task patching",)
_HEAT_MAPS = "patching paper, heat maps"
_MMLU = "harness run --task mmlu --data MMLU_FOLDER"
_FITTED = "--fit_set prompts=tiny --max_new_tokens 32 --set judge=lexicon --set k=0"
_TRAITS = (
    *("christianity", "islam", "hinduism", "judaism"),
    *("african_american", "asian_american", "native_american", "hispanic", "caucasian"),
)


def _sweep(*traits: str) -> str:
    tasks = " ".join(f"--task persona:{trait}" for trait in traits)
    few = "--task_set prompts=tiny --task_set rollouts=5 --users 10 --temperature 1 --max_new_tokens 32"
    judged = "--judge lexicon --set judge=lexicon"
    return f"harness sweep --method persona_vector {tasks} {few} {judged} --set layer=0..4"


@dataclass(frozen=True)
class Spec:
    title: str
    place: str
    """Where in which paper."""
    draw: str
    """`module:function` in this folder."""
    commands: tuple[str, ...]
    """What makes its records with the embedded model."""


FIGURES: Mapping[str, Spec] = {
    "dps-3": Spec("PCS of every head, for single users", "DPS paper, Figure 3", "dps:users", (_DPS,)),
    "dps-4": Spec("Overlap of users' preference heads", "DPS paper, Figure 4", "dps:overlap", (_DPS,)),
    "dps-5": Spec(
        "Discovered heads and random controls",
        "DPS paper, Figure 5",
        "dps:controls",
        (_DPS, f"{_DPS} --set control=random_heads", f"{_DPS} --set control=random_mask"),
    ),
    "dps-6": Spec(
        "Metrics by the number of heads",
        "DPS paper, Figure 6",
        "dps:head_counts",
        tuple(f"{_DPS} --set heads={heads}" for heads in (1, 2, 4, 8)),
    ),
    "dps-7": Spec("Overlap of head sets of different size", "DPS paper, Figure 7", "dps:head_sets", (_DPS,)),
    "dps-8": Spec(
        "Hard and soft routing to clusters",
        "DPS paper, Figure 8",
        "dps:routing",
        tuple(f"{_CLUSTERS} --set routing={routing}" for routing in ("hard", "soft")),
    ),
    "persona-1": Spec(
        "Trait scores by the block of the religion's vector",
        "persona-bias paper, Figure 1",
        "persona:religions",
        (_sweep("christianity", "islam", "hinduism", "judaism"),),
    ),
    "persona-5": Spec(
        "Trait scores by the block of the race's vector",
        "persona-bias paper, Figure 5",
        "persona:races",
        (_sweep("african_american", "asian_american", "native_american", "hispanic", "caucasian"),),
    ),
    "persona-6": Spec(
        "MMLU without and with mitigation",
        "persona-bias paper, Figure 6",
        "persona:categories",
        (f"{_MMLU} --method plain", f"{_MMLU} --method clamp --fit_task persona:religion {_FITTED}"),
    ),
    "persona-7": Spec(
        "MMLU under persona vectors",
        "persona-bias paper, Figure 7",
        "persona:vectors",
        (
            f"{_MMLU} --method plain",
            f"{_MMLU} --method clamp --fit_task persona:religion {_FITTED}",
            *(
                f"{_MMLU} --method persona_vector --fit_task persona:{trait} {_FITTED} --set layer=1"
                for trait in _TRAITS
            ),
        ),
    ),
    "perfit-2": Spec("Shifts of users, collective and personal", "PerFit paper, Figure 2", "perfit:shifts", _DELTA),
    "perfit-4": Spec(
        "Users close to the collective shift and far from it", "PerFit paper, Figure 4", "perfit:neighbours", _DELTA
    ),
    "perfit-9": Spec(
        "Metrics against trained parameters",
        "PerFit paper, Figure 9",
        "perfit:parameters",
        (
            f"harness run --method perfit --method oppu --task lamp2m --task lamp4{_PERSONAL}{_COLLECTIVE}",
            f"harness run --method lora_p --method reft --task lamp2m --task lamp4{_PERSONAL}",
            "harness run --method lora_c --task lamp2m --task lamp4 --set lr=0.003 --set epochs=1 --set batch_size=2",
        ),
    ),
    "perfit-10": Spec(
        "Metrics by collective and personal rank",
        "PerFit paper, Figure 10",
        "perfit:ranks",
        (f"{_GRID} --task lamp2m --set 'rank=1|4|16' --set 'personal_rank=1|4|16'",),
    ),
    "perfit-11": Spec(
        "Metrics by the blocks shifted",
        "PerFit paper, Figure 11",
        "perfit:layers",
        (
            f"{_GRID} --task lamp2m --set 'layers=0|1|2|3|4|1,3|0,2,4|0,1,2,3,4'",
            f"{_GRID} --task lamp4 --set 'layers=0|1|2|3|4'",
        ),
    ),
    "patching-blocks": Spec("Effect of patching a block's MLP or attention", _HEAT_MAPS, "patching:blocks", _PATCHING),
    "patching-heads": Spec("Effect of patching one head", _HEAT_MAPS, "patching:heads", _PATCHING),
    "patching-attention": Spec("Attention to the identity of a persona", _HEAT_MAPS, "patching:attention", _PATCHING),
    "patching-pairs": Spec("Effect of patching, pair by pair of personas", _HEAT_MAPS, "patching:pairs", _PATCHING),
}


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
    finished = [record for record in records if record.status in ("complete", "partial")]
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
    " --task_set rollouts=5 --users 10 --temperature 1 --max_new_tokens 32": "",
    "judge=lexicon": "judge=openai/JUDGE",
    "--judge lexicon": "--judge openai/JUDGE",
    " --set layer=1": "",
    f" --users 60{_PERSONAL}{_COLLECTIVE}": "",
    f"{_PERSONAL}{_COLLECTIVE}": "",
    _PERSONAL: "",
    " --set lr=0.003 --set epochs=1 --set batch_size=2": "",
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
