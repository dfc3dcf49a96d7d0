"""Which model it was: one string for every file that the computation reads.

    a hub model       its commit
    a local folder    sha256:WEIGHTS+FILES, 16 digits each: the weights, and all files that say how they are used
    a GGUF file       sha256: and all 64 digits, as `sha256sum` prints them

Weights are hashed once: what was found stays in $HARNESS_CACHE/hashes with the file's size and times.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

from harness.engine.flops import Sizes
from harness.errors import HarnessError
from harness.files import replace_file
from harness.files.json_files import parse
from harness.files.user_cache import user_cache
from harness.plugins.registry import MODELS, ModelRow, model_row
from harness.servers.address import ENDPOINT, with_server

READ = ("*.json", "*.jinja", "*.model", "*.tiktoken", "merges.txt", "vocab.txt", "additional_chat_templates/*.jinja")
"""What transformers may read beside the weights: config, generation settings, tokenizer, chat templates."""

NOT_READ = ("trainer_state.json", "all_results.json", "train_results.json", "eval_results.json")
"""What training leaves behind."""

_SETTLED = 2.0
"""Seconds after which a file that changes again has another time, on file systems with coarse clocks too."""


def revision(row: ModelRow) -> str:
    """The identity of a model that has been found: see above. `unknown` where the hub's cache does not say its commit."""
    if row.gguf:
        return f"sha256:{file_sha256(Path(row.source))}"
    if row.local:
        folder = Path(row.source)
        return f"sha256:{_weights(folder)[:16]}+{_files(folder)[:16]}"
    from huggingface_hub import try_to_load_from_cache

    file = try_to_load_from_cache(row.source, "config.json")  # .../snapshots/COMMIT/config.json
    return Path(file).parent.name if isinstance(file, str) else "unknown"


@dataclass(frozen=True)
class Identity:
    """What a record says of its model, known before it is loaded."""

    name: str
    source: str
    revision: str
    dtype: str
    files: Path | None = field(default=None, compare=False)
    """Where its config.json is, if that is known."""

    @property
    def heads(self) -> int:
        """Attention heads of all blocks. Raises HarnessError where that shows only once it is loaded."""
        try:
            assert self.files is not None
            sizes = Sizes.of(json.loads((self.files / "config.json").read_text(encoding="utf-8")))
        except (AssertionError, OSError, ValueError, KeyError, TypeError):
            raise HarnessError(f"how many heads {self.name} has shows once it is loaded") from None
        return sizes.layers * sizes.heads


def identity_of(row: ModelRow, dtype: str = "auto", device: str = "auto") -> Identity | None:
    """Of the model that `load_model` would give; None where that shows only once it is loaded, or the row names none."""
    if dtype == "auto":
        dtype = "float32" if _on_cpu(device) else "bfloat16"
    with contextlib.suppress(OSError):
        found = revision(row)
        return None if found == "unknown" else Identity(row.name, row.source, found, dtype, _config_folder(row))
    return None


def as_recorded(name: str) -> str:
    """A model as an option of a method names it (`hf/...` of a judge): one in a folder or a GGUF file by its name and content,
    which decide the numbers and are the same everywhere; one behind a server with that one's address; any other as it is."""
    if name.startswith(ENDPOINT):
        return with_server(name)
    kind = "hf/" if name.startswith("hf/") else ""
    path = name.removeprefix(kind)
    if path in (*MODELS, "self") or not os.path.exists(path):
        return name
    row = model_row(path)
    return f"{kind}{row.name} {revision(row)}"


def gguf_folder(file: Path) -> Path:
    """Where the float32 weights made from a GGUF file lie, once they are made."""
    return user_cache() / "gguf" / f"{file_sha256(file)}-transformers-{metadata.version('transformers')}"


def _config_folder(row: ModelRow) -> Path | None:
    if row.gguf or row.local:
        return gguf_folder(Path(row.source)) if row.gguf else Path(row.source)
    from huggingface_hub import try_to_load_from_cache

    file = try_to_load_from_cache(row.source, "config.json")
    return Path(file).parent if isinstance(file, str) else None


def _on_cpu(device: str) -> bool:
    if device != "auto":
        return device == "cpu"
    if metadata.version("torch").endswith("+cpu"):  # it takes seconds to ask torch itself
        return True
    import torch

    return not torch.cuda.is_available()


def weights_of(revision: str) -> str:
    """The part of a revision that names the weights alone: what vectors and adapters were made for."""
    return revision.partition("+")[0]


def file_sha256(file: Path) -> str:
    """sha256 of a file's content, from the user's cache where neither size, times nor inode have changed since."""
    before = file.stat()
    state = [before.st_size, before.st_mtime_ns, before.st_ctime_ns, before.st_ino]
    place = str(file.resolve())
    note = user_cache() / "hashes" / f"{hashlib.sha256(place.encode()).hexdigest()[:32]}.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        kept = json.loads(note.read_text(encoding="utf-8"))
        if [kept["file"], kept["state"]] == [place, state]:
            return str(kept["sha256"])
    started = time.time()
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if started - max(before.st_mtime, before.st_ctime) > _SETTLED:
        _keep(note, {"file": place, "state": state, "sha256": digest})
    return digest


def _weights(folder: Path) -> str:
    files = sorted(folder.glob("*.safetensors")) + sorted(folder.glob("*.bin"))
    files += sorted(_elsewhere(folder) - set(files))
    if len(files) == 1:
        return file_sha256(files[0])
    return hashlib.sha256("".join(map(file_sha256, files)).encode()).hexdigest()


def _elsewhere(folder: Path) -> set[Path]:
    """The parts that an index of the weights names; some lie in folders of their own."""
    found: set[Path] = set()
    for index in folder.glob("*.index.json"):
        with contextlib.suppress(
            OSError, ValueError, KeyError, TypeError, AttributeError
        ):  # loading says what is wrong
            found |= {folder / name for name in parse(index.read_bytes())["weight_map"].values()}
    return {file for file in found if file.is_file()}


def _files(folder: Path) -> str:
    """Of names and contents. Small files are read each time: nobody waits for them."""
    digest = hashlib.sha256()
    for file in _read(folder):
        content = file.read_bytes()
        digest.update(f"{file.relative_to(folder).as_posix()}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()


def _read(folder: Path) -> Iterable[Path]:
    found = {file for pattern in READ for file in folder.glob(pattern) if file.is_file()}
    return sorted(file for file in found if not any(file.match(pattern) for pattern in NOT_READ))


def _keep(note: Path, content: object) -> None:
    """Whole or not at all. A cache that cannot be written costs the next run its time, and this one nothing."""
    with contextlib.suppress(OSError, HarnessError):
        note.parent.mkdir(parents=True, exist_ok=True)
        replace_file(note, json.dumps(content).encode())
