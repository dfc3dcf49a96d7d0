"""LoRA adapters in PEFT's folders: those made elsewhere, read as fitted states; ours, written for anyone's PEFT.

    FOLDER/adapter_config.json, adapter_model.safetensors (or .bin)     one adapter
    FOLDER/<name>/adapter_config.json, ...                              one a user: their id, or what FOLDER/names.json calls it

Our own fitted states name their tensors as these files do. Nothing is merged: adapters run beside the weights, row by row.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Required, TypeVar

from pydantic import Field
from typing_extensions import TypedDict

from harness.errors import DataMissing, UsageError
from harness.files import NAMES
from harness.files.json_files import read_json
from harness.method import Fitted
from harness.training import PEFT_A, peft_name

if TYPE_CHECKING:
    from peft import LoraConfig
    from torch import Tensor

    from harness.engine.model import LanguageModel

T = TypeVar("T")
_Rank = Annotated[int, Field(ge=1)]


class _Said(TypedDict, total=False):
    """Of adapter_config.json, what is computed with."""

    peft_type: Required[str]
    r: _Rank
    lora_alpha: float
    use_rslora: bool
    rank_pattern: dict[str, _Rank] | None
    alpha_pattern: dict[str, float] | None


_KNOWN = frozenset((
    "peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "init_lora_weights",
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout", "fan_in_fan_out",
    "megatron_config", "megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size",
    "runtime_config", "ensure_weight_tying",
))  # fmt: skip
"""Of adapter_config.json, what is read here or of no account once trained: where the matrices are, how training began. With
anything else, known to this PEFT or not (DoRA, trained biases, ...), y + scale * B A x is not all of it."""


_INITIAL = (None, True, False, "gaussian", "eva", "orthogonal", "mica")
"""Ways to begin that leave the base weights as they are. PEFT takes the others' beginning (PiSSA, OLoRA, CorDA, LoftQ, ...)
off the weights whenever it loads them."""


def read_adapter(folder: str | Path, lm: LanguageModel) -> Fitted:
    """The adapter of a PEFT folder, as training gives one.

    Raises DataMissing where there is none, UsageError where it is no plain LoRA or is for another model.
    """
    import peft

    from harness.engine.training.parameter_stacks import digest, lora_shapes

    if not os.path.isfile(Path(folder) / "adapter_config.json"):
        raise DataMissing(f"{folder} has no adapter_config.json; give the folder of a PEFT adapter")
    said: _Said = read_json(
        Path(folder) / "adapter_config.json", _Said, "adapter file", "the LoraConfig that PEFT writes"
    )
    settings: dict[str, Any] = read_json(
        Path(folder) / "adapter_config.json", dict[str, Any], "adapter file", "an object"
    )
    off: tuple[object, ...] = (None, False, "none", "", [], {})
    odd = [
        f"{name}={' '.join(repr(v).split())[:60]}"
        for name, v in settings.items()
        if name not in _KNOWN and v not in off
    ]
    if said["peft_type"] != "LORA" or odd:
        kind = ", ".join(odd) or f"peft_type={said['peft_type']!r}"
        raise UsageError(f"adapter {folder} is no plain LoRA ({kind}); train it without")
    try:
        config: Any = peft.PeftConfig.from_pretrained(str(folder))
        found: dict[str, Tensor] = peft.utils.load_peft_weights(str(folder), device="cpu")
    except Exception as error:  # PEFT and its file readers each have their own
        reason = " ".join(str(error).split())[:200]
        raise DataMissing(f"adapter {folder} cannot be read ({type(error).__name__}: {reason})") from error
    begun = getattr(config, "init_lora_weights", None)
    if begun not in _INITIAL:
        raise UsageError(
            f"adapter {folder} is no plain LoRA (init_lora_weights={begun!r}): PEFT changes the model's own weights when it loads "
            "one; save it as a plain one with PEFT's save_pretrained(FOLDER, path_initial_model_for_weight_conversion=...)"
        )
    names = [match[1] for name in found if (match := re.fullmatch(PEFT_A, name))]
    wanted = {peft_name(name, kind) for name in names for kind in ("A", "B")}
    if not names or set(found) != wanted:
        raise UsageError(
            f"adapter {folder} holds {min(set(found) ^ wanted, default='nothing')}; expected pairs lora_A, lora_B"
        )
    for name, tensor in found.items():
        if tensor.dim() != 2 or not tensor.is_floating_point() or not tensor.numel() or not tensor.isfinite().all():
            shown = f"{tensor.dtype} {list(tensor.shape)}"
            raise UsageError(f"adapter {folder}: {name} is {shown}; expected a matrix of finite floating-point numbers")
    shapes = lora_shapes(lm)
    scales = {}
    for name in names:
        down, up = found[peft_name(name, "A")], found[peft_name(name, "B")]
        if shapes.get(name) != (down.shape[1], up.shape[0]):
            here = f"{shapes[name]} here" if name in shapes else f"not in the blocks of {lm.name}"
            raise UsageError(
                f"adapter {folder} is for another model: {name} is {(down.shape[1], up.shape[0])} there, {here}"
            )
        ranks = {down.shape[0], up.shape[1], _of_module(said.get("rank_pattern"), name, int(config.r))}
        if len(ranks) > 1:
            raise UsageError(
                f"adapter {folder}: {name} is of ranks {sorted(ranks)} by its matrices and its config; expected one"
            )
        scales[name] = _scale(config, name, down.shape[0])
    scale = next(filter(None, scales.values()), 0.0)
    tensors = {}
    for name, value in found.items():
        own = scales[name.removeprefix("base_model.model.").rpartition(".lora_")[0]]
        folded = name.endswith("lora_B.weight") and own != scale
        tensors[name] = (value * (own / scale) if folded else value).contiguous()
    meta = {"scale": scale, "key": digest(tensors), "parameters": sum(t.numel() for t in tensors.values())}
    return Fitted(tensors, meta)


def write_adapter(state: Fitted, folder: str | Path, lm: LanguageModel) -> None:
    """Writes a trained adapter as a folder that `peft.PeftModel.from_pretrained(model, folder)` loads."""
    import peft
    from safetensors.torch import save_file

    names = [match[1] for name in state.tensors if (match := re.fullmatch(PEFT_A, name))]
    ranks = {state.tensors[peft_name(name, "A")].shape[0] for name in names}
    if len(ranks) != 1:
        raise UsageError(f"an adapter of ranks {sorted(ranks)} cannot be written; expected one rank")
    rank = ranks.pop()
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=state.meta["scale"] * rank,
        target_modules=sorted(names),
        fan_in_fan_out=type(lm.model.get_submodule(names[0])).__name__ == "Conv1D",
        base_model_name_or_path=lm.source,
        inference_mode=True,
    )
    config.save_pretrained(str(folder))
    save_file(
        {name: tensor.contiguous() for name, tensor in state.tensors.items()},
        Path(folder) / "adapter_model.safetensors",
    )


def adapter_identity(folder: str) -> str:
    """Name and content of the adapters in a folder in one string, the same on every machine: `name sha256:…`."""
    digest, root = hashlib.sha256(), Path(folder)
    found = {*root.rglob("adapter_*"), *root.glob("*/adapter_*")}  # the second follows links to folders
    files = sorted(file for file in found if file.is_file())
    if not files:
        raise DataMissing(f"{folder} has no adapter_config.json; give a folder of PEFT adapters")
    files += [root / NAMES] if (root / NAMES).is_file() else []
    for file in files:
        content = hashlib.sha256(file.read_bytes()).hexdigest()
        digest.update(f"{file.relative_to(root).as_posix()} {content}\n".encode())
    return f"{root.name} sha256:{digest.hexdigest()[:16]}"


def _of_module(patterns: Mapping[str, T] | None, name: str, default: T) -> T:
    """What PEFT's patterns say of a module: keys are regular expressions of the end of its name."""
    for key in patterns or {}:
        try:
            if re.match(rf"(.*\.)?({key})$", name):
                return patterns[key]  # type: ignore[index]
        except re.error as error:
            raise UsageError(f"adapter: the pattern {ascii(key)[:60]} is no regular expression ({error})") from None
    return default


def _scale(config: LoraConfig, name: str, rank: int) -> float:
    """alpha / r of a module, or alpha / sqrt(r) where the config says so."""
    alpha = _of_module(config.alpha_pattern, name, config.lora_alpha)
    return alpha / (math.sqrt(rank) if config.use_rslora else rank)
