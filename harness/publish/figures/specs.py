"""Which figures there are: title, place in the paper, the function that draws each, and the commands that make its records."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

_DPS = "harness run --method dps --task lamp2m"
_CLUSTERS = "harness run --method dps --set clusters=4 --set samples=200 --task lamp2m --task lamp4"


_DELTA = tuple(
    f"harness run --method rag --set k=1 --task delta_vectors --task_set task={task}"
    for task in ("lamp2n", "lamp4", "lamp5", "lamp7")
)
# rates for the histories of lamp-mini, as in results/make.sh
PERSONAL = " --set lr=0.01 --set epochs=2 --set batch_size=4"
COLLECTIVE = " --set collective_lr=0.003 --set collective_epochs=1"
_GRID = f"harness sweep --method perfit --users 60{PERSONAL}{COLLECTIVE}"
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
    few = "--task_set prompts=tiny --task_set rollouts=2 --users 10 --temperature 1 --max_new_tokens 32"
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
    "methods": Spec(
        "Every method beside copying the input",
        "all methods",
        "methods:ranked",
        (
            "harness run --method copy --method plain --method rag --method cad --method dps --task lamp4 --task lamp7",
            "harness run --method rag --method cad --method dps --task lamp4 --task lamp7 --control wrong_user",
        ),
    ),
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
            f"harness run --method perfit --method oppu --task lamp2m --task lamp4{PERSONAL}{COLLECTIVE}",
            f"harness run --method lora_p --method reft --task lamp2m --task lamp4{PERSONAL}",
            "harness run --method lora_c --task lamp2m --task lamp4 --set lr=0.003 --set epochs=1 --set batch_size=4",
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
