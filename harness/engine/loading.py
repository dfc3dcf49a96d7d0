"""A language model from a folder or the hub: its files found, read and checked. The only file that loads transformers' models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from harness.engine.encoder import Encoder
from harness.engine.model import LanguageModel
from harness.engine.sites import check_config, family_of
from harness.engine.weights.gguf_files import folder_of
from harness.engine.weights.identity import revision
from harness.errors import DataMissing, HarnessError, UsageError
from harness.plugins.registry import ModelRow

DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}

DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
"""accelerate's ways to spread a model over several devices."""

CHAT_TEMPLATES: Mapping[str, str] = {
    "lmsys/vicuna-13b-v1.5": "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }} {% else %}"
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and "
    "polite answers to the user's questions. {% endif %}{% for m in messages %}{% if m['role'] == 'user' %}"
    "USER: {{ m['content'] }} {% elif m['role'] == 'assistant' %}ASSISTANT: {{ m['content'] }}</s>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}",
}
"""By hub id: the format a chat model was trained with, where its own files hold no template."""


_ADAPTER = "adapter_config.json"


def load_model(
    row: ModelRow,
    *,
    dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"] = "auto",
    device: str = "auto",
    device_map: str | None = None,
    blocks: int | None = None,
) -> LanguageModel:
    """The model of a registry row, or its first `blocks` alone: for checks, its identity does not say so.

    Raises UnsupportedModel for an architecture without a row in sites.py, DataMissing where files are neither local
    nor cached and cannot be fetched, or do not hold this model.
    """
    where = _device(device)
    if device_map not in (None, *DEVICE_MAPS):
        raise UsageError(f"unknown device map {device_map!r}; allowed: {', '.join(DEVICE_MAPS)}")
    quiet()
    files = replace(row, source=str(folder_of(Path(row.source)))) if row.gguf else row
    refuse_adapter(files)
    for local_only in (True, False):  # what is cached needs no network, and no wait for one that is down
        try:
            model, encoder, generation = _read(files, _dtype(dtype, where), device_map, local_only, blocks)
            break
        except (HarnessError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # each library has its own for a file that is absent or damaged
            if row.local or not local_only:
                raise _missing(files, error) from error
    if getattr(model, "_hf_peft_config_loaded", False):
        raise UsageError(
            f"model {row.name!r} ({row.source}) is an adapter on other weights; name those, and give it with --set adapter="
        )
    eos = generation.eos_token_id
    eos_ids = eos if isinstance(eos, list) else [eos] if eos is not None else []
    # the model's own sampling settings and penalties must never leak in: the engine does not call generate
    encoder.eos_ids = frozenset(eos_ids) | encoder.eos_ids
    if device_map is None:
        model.to(where)
    return LanguageModel(
        model,
        encoder,
        name=row.name,
        source=row.source,
        revision=revision(row),
        device=next(model.parameters()).device,
    )


def quiet() -> None:
    """transformers' and tqdm's own lines say nothing that a record does not."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def refuse_adapter(row: ModelRow) -> None:
    """transformers would apply an adapter that lies beside the weights, and the run would call the result `plain`."""
    if row.local and (Path(row.source) / _ADAPTER).exists():
        raise UsageError(
            f"model folder {row.source} holds an adapter ({_ADAPTER}) beside the weights; move adapter_* to a folder of its "
            "own, and give that with --set adapter=FOLDER where the adapter is to be evaluated"
        )


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UsageError(f"unknown device {name!r}; allowed: auto, cpu, cuda, cuda:N")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"device {name!r} asked for, but torch sees no CUDA device; use --device cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"device {name!r} asked for, but torch sees {torch.cuda.device_count()} CUDA devices, from 0")
    return device


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if name not in DTYPES:
        raise UsageError(f"unknown dtype {name!r}; allowed: auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def _read(
    row: ModelRow, dtype: torch.dtype, device_map: str | None, local_only: bool, blocks: int | None
) -> tuple[Any, Encoder, Any]:
    """Model, encoder and generation config, from the hub's cache alone or with the network. Raises what libraries raise."""
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PretrainedConfig

    described, _ = PretrainedConfig.get_config_dict(row.source, local_files_only=local_only)
    if "model_type" not in described:
        raise OSError("no config.json that names a model_type")
    family_of(described["model_type"])  # before gigabytes of weights
    config = AutoConfig.from_pretrained(row.source, local_files_only=local_only)
    check_config(config)
    if blocks is not None:
        config.num_hidden_layers = min(blocks, config.num_hidden_layers)
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[: config.num_hidden_layers]
    encoder = Encoder.load(row.source, template=CHAT_TEMPLATES.get(row.hub_id), local_only=local_only)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        row.source,
        config=config,
        dtype=dtype,
        device_map=device_map,
        attn_implementation="sdpa",
        local_files_only=local_only,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    model, report = loaded
    absent = sorted([*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])])
    if absent:  # transformers would fill these with random numbers
        raise DataMissing(
            f"the weights of {row.source} lack {len(absent)} of the tensors its config.json asks for (or have them in "
            f"another shape), first {absent[0]!r}; config and weights do not belong together, or a file is missing"
        )
    try:
        return model, encoder, GenerationConfig.from_pretrained(row.source, local_files_only=local_only)
    except OSError:
        # a file that is damaged, or perhaps only not cached yet: its end tokens must not be lost
        if (Path(row.source) / "generation_config.json").exists() or (local_only and not row.local):
            raise
        return model, encoder, model.generation_config


def _missing(row: ModelRow, error: Exception) -> DataMissing:
    from huggingface_hub.constants import HF_HUB_CACHE

    if Path(row.source).exists() or row.local:
        return DataMissing(
            f"model folder {row.source} cannot be loaded ({_first_line(error)}); it needs config.json, "
            "tokenizer files and *.safetensors weights"
        )
    return DataMissing(
        f"model {row.name!r} ({row.source}) is not on this machine and cannot be fetched ({_first_line(error)}); "
        f"download its config.json, tokenizer files and *.safetensors (`hf download {row.source}`) into the hub "
        f"cache ({HF_HUB_CACHE}) or any folder, then pass --model_path FOLDER"
    )


def _first_line(error: Exception) -> str:
    text = (str(error).strip().splitlines() or [""])[0][:160]
    return text if text and isinstance(error, OSError) else f"{type(error).__name__}: {text}"
