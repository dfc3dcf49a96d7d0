"""What the benchmarks share: random models of real shapes, the clock, and what a result says about where it was measured."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from harness.engine.model import LanguageModel
from harness.files import replace_file
from harness.records import provenance
from harness.run.contract import random_lm

SIZES: dict[str, dict[str, Any]] = {
    "toy": {  # to try a benchmark, not to measure anything
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "50m": {
        "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 12, "num_attention_heads": 8,
        "num_key_value_heads": 4, "vocab_size": 8192,
    },
    "llama3-8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256,
    },
    "qwen2-7b": {
        "family": "qwen2", "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064,
    },
    "llama2-7b": {
        "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 32, "vocab_size": 32000,
    },
    "tiny": {
        "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 5, "num_attention_heads": 8,
        "num_key_value_heads": 4, "vocab_size": 2260,
    },
    "smollm2-135m": {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True,
    },
    "stories260k": {
        "hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 5, "num_attention_heads": 8,
        "num_key_value_heads": 4, "vocab_size": 512,
    },
}  # fmt: skip


def model(size: str, device: str, dtype: torch.dtype) -> LanguageModel:
    """A random model of a real shape, end-of-text off."""
    config = {"initializer_range": 0.02, "max_position_embeddings": 8192, "tie_word_embeddings": False, **SIZES[size]}
    family = config.pop("family", "llama")
    with torch.device(device):
        lm = random_lm(family, dtype=dtype, **config)
    lm.device = torch.device(device)
    lm.encoder.eos_ids = frozenset()
    return lm


def dtype_of(device: str) -> torch.dtype:
    return torch.bfloat16 if device.startswith("cuda") else torch.float32


def seconds(work: Callable[[], object], device: str) -> float:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_bytes(work: Callable[[], object], device: str) -> int | None:
    """Most GPU memory allocated during `work`, weights included; None on a CPU."""
    if not device.startswith("cuda"):
        work()
        return None
    torch.cuda.reset_peak_memory_stats()
    work()
    return torch.cuda.max_memory_allocated()


def settings(args: argparse.Namespace, lm: LanguageModel) -> dict[str, Any]:
    return {
        **{name: value for name, value in vars(args).items() if name != "output"},
        "parameters": lm.parameters,
        "dtype": lm.dtype,
        "hardware": provenance.hardware(lm),
        "versions": provenance.versions(),
    }


def write(result: dict[str, Any], output: str | None) -> None:
    """As JSON to a file, whole or not at all, or to stdout."""
    text = json.dumps(result, indent=1) + "\n"
    if output is None:
        sys.stdout.write(text)
        return
    path = Path(output)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, text.encode())
