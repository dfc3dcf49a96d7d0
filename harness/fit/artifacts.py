"""Fitted state on disk: one folder a key, safetensors + JSON, written atomically, shared by every run that may share it.

The key is a hash of everything the fit read: model weights, method and the options its fit reads, task, fit data and
seed. The store lies in $HARNESS_CACHE, or the user's cache folder; deleting it costs time only. While a long fit runs,
its finished parts lie in KEY.partial, so that a killed one goes on. They stay where a fit that groups the same samples
otherwise can use them (`Method.grouping`): numbers, a few hundred kilobytes.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from harness.errors import HarnessError
from harness.files import replace_file, replacing_folder, waiting
from harness.files.json_files import parse
from harness.files.user_cache import caching, user_cache
from harness.method import Fitted

_LOCKS = ".locks"
"""Below the root: an empty file for each state that was made here."""
_DRAFTS = ".drafts"
"""Below the root: folders that are being written. A few, where the root may hold one a user."""


class Checkpoint:
    """The finished parts of a fit that is under way, one tensor a part, each on disk whole or not at all."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.restored_seconds = 0.0
        """What the parts that were read here took when they were made."""

    def get(self, part: str) -> Any | None:
        """The tensor kept as `part`; None where it has to be made."""
        from safetensors import SafetensorError
        from safetensors.torch import load

        try:
            kept = load((self.folder / part).read_bytes())
        except (FileNotFoundError, SafetensorError):  # a power cut may leave an empty file
            return None
        self.restored_seconds += float(kept["seconds"])
        return kept["value"]

    def put(self, part: str, value: Any, seconds: float) -> None:
        import torch
        from safetensors.torch import save

        content = save({"value": value.contiguous(), "seconds": torch.tensor(seconds)})
        with caching(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            replace_file(self.folder / part, content)

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


class ArtifactStore:
    """Fitted states by key."""

    def __init__(self, root: Path | None = None) -> None:
        """`root` is the folder of the artifacts; by default `artifacts` in the cache."""
        self.root = root or user_cache() / "artifacts"

    @staticmethod
    def key(content: Mapping[str, Any]) -> str:
        """16 hex digits of the sha256 of the canonical JSON of what the fit read."""
        text = json.dumps(content, sort_keys=True, separators=(",", ":"), default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def get(self, key: str) -> Fitted | None:
        """The state under `key`; None where there is none. A folder is there whole or not at all."""
        folder = self.root / key
        if not (folder / "meta.json").is_file():
            return None
        from safetensors import SafetensorError
        from safetensors.torch import load

        try:
            kept = parse((folder / "meta.json").read_bytes())
            meta, cost, notes = kept["meta"], kept.get("cost", {}), tuple(kept.get("notes", ()))
            tensors = load((folder / "tensors.safetensors").read_bytes())
        except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
            raise HarnessError(
                f"fitted state {folder} cannot be read ({error}); delete the folder to fit again"
            ) from error
        return Fitted(tensors, meta, cost, notes)

    def made(self, key: str) -> Fitted:
        """The state under `key`, which this run made or found. Raises HarnessError where it is gone: without it the method would be
        another one."""
        state = self.get(key)
        if state is None:
            raise HarnessError(
                f"fitted state {self.root / key} was there and is not any more; give the command again, and keep {self.root} from "
                "being cleared while it runs"
            )
        return state

    def put(self, key: str, state: Fitted, made_from: Mapping[str, Any]) -> Fitted:
        """Save under `key`, with what it was made from beside it. Two writers of one key write the same content.

        Returns the state as `get` will, so that the run that fits and the runs that reuse see the same values.
        """
        from safetensors.torch import save

        tensors, held = {}, set()
        for name, tensor in state.tensors.items():
            where = tensor.contiguous().untyped_storage().data_ptr()
            tensors[name] = (
                tensor.contiguous().clone() if where in held else tensor.contiguous()
            )  # the file holds each apart
            held.add(where)
        content = {"made_from": made_from, "meta": state.meta, "cost": state.cost, "notes": state.notes}
        with caching(self.root), replacing_folder(self.root / key, drafts=self.root / _DRAFTS, keep=True) as draft:
            (draft / "tensors.safetensors").write_bytes(save(tensors))
            (draft / "meta.json").write_text(json.dumps(content, indent=1, default=str), encoding="utf-8")
        stored = self.get(key)
        assert stored is not None
        return stored

    @contextmanager
    def alone(self, key: str) -> Iterator[None]:
        """Waits until no other process makes what `key` says, so that runs side by side do not fit the same thing twice.

        Where the file system has no locks nobody waits, and two of them make the same.
        """
        with caching(self.root):
            (self.root / _LOCKS).mkdir(parents=True, exist_ok=True)
        with waiting(self.root / _LOCKS / key):
            yield

    def checkpoint(self, key: str) -> Checkpoint:
        """Where fits that score what `key` says keep what they have finished."""
        return Checkpoint(self.root / f"{key}.partial")

    def made_from(self, key: str) -> Mapping[str, Any]:
        """What the state under `key` was made from."""
        path = self.root / key / "meta.json"
        try:
            made_from = parse(path.read_bytes())["made_from"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise HarnessError(f"{path} cannot be read ({error}); delete the folder to fit again") from error
        return dict(made_from)

    def size(self, key: str) -> int:
        """Bytes stored under `key`."""
        return sum(file.stat().st_size for file in (self.root / key).glob("*"))
