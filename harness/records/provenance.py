"""Where and with what a run was made: versions, hardware, commit, memory. Recorded; never part of a record's hash."""

from __future__ import annotations

import datetime
import platform
import resource
import subprocess
import sys
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.records.version import VERSION

if TYPE_CHECKING:
    from harness.engine.model import LanguageModel

_PACKAGES = ("torch", "transformers", "tokenizers", "rouge-score", "nltk", "scikit-learn", "numpy")


def versions() -> dict[str, str]:
    """Of everything whose version can move a number."""
    return {"harness": VERSION, "python": platform.python_version(), **{n: metadata.version(n) for n in _PACKAGES}}


def hardware(lm: LanguageModel) -> dict[str, Any]:
    import torch

    gpu = torch.cuda.get_device_name(lm.device) if lm.device.type == "cuda" else None
    return {"device": lm.device.type, "gpu": gpu, "cpu": platform.machine(), "threads": torch.get_num_threads()}


def peak_memory_bytes(lm: LanguageModel) -> int:
    """Of the device the model is on: allocated on the GPU, or resident in this process."""
    if lm.device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(lm.device)
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


@cache
def commit() -> tuple[str | None, bool | None]:
    """Commit of the harness and whether its Python files differ from it, where it runs from its own checkout."""
    root = Path(__file__).resolve().parents[2]
    head = _git(root, "rev-parse", "--show-toplevel", "HEAD")
    if head is None or Path(head.splitlines()[0]) != root:  # installed into a folder of someone else's repository
        return None, None
    changed = _git(root, "status", "--porcelain", "--untracked-files=no", "--", "*.py")
    return head.splitlines()[1], bool(changed)


def now() -> str:
    """UTC, ISO 8601, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
