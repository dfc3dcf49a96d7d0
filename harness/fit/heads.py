"""Lists of attention heads: the files that were published, and the edits that mask heads.

A file is JSON, in one of three shapes:
    {"15-30": [0.9, 1.0], "8-1": [...], ...}                  scores of every head, one a test or sample: DeCoRe's
                                                              retrieval heads, DPS's *_pcs.json
    {"ranked_heads": [{"layer": 28, "head": 18, "avg_pcs": 0.25}, ...]}    every head, best first: DPS's *_ranked.json
    {"preference_heads": [[28, 18], [30, 18], ...]}           the best heads, best first: DPS's *_top_heads.json
Layers are 0-based blocks, heads are query heads. Which model a file is for shows in its numbers alone, so a file that
does not cover exactly the model's heads is refused.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from harness.edits import ScaleHeads, ScaleOutputSlices, ScaleQueries
from harness.errors import DataMissing, UsageError
from harness.files.json_files import parse, read_bytes
from harness.plan import Edit, Where

Head = tuple[int, int]
"""(layer, query head)."""
_KEY = re.compile(r"(\d{1,6})-(\d{1,6})", re.ASCII)
Operator = Literal["zero", "uniform"]
Detection = Literal["zero", "uniform", "output_slice"]
"""`output_slice` masks no head: it zeroes as many coordinates of the attention's output, as the released DPS detection does."""


@dataclass(frozen=True)
class HeadFile:
    """What a file says of a model's heads."""

    heads: tuple[Head, ...]
    """Best first; heads of equal score in (layer, head) order."""
    scores: tuple[float, ...] = ()
    """Of `heads`, in their order: means over samples. Empty where the file has an order only."""
    samples: tuple[tuple[float, ...], ...] = ()
    """Scores of each of `heads` by sample, where the file has them."""


def read_heads(path: str, layers: int, heads: int) -> HeadFile:
    """The heads of a published file, for a model of `layers` blocks with `heads` query heads each.

    Raises DataMissing where there is no file, UsageError where it has another shape or is for another model.
    """
    content = _json(path)
    shape = next((name for name in ("ranked_heads", "preference_heads") if name in content), None)
    samples: dict[Head, tuple[float, ...]] = {}
    try:
        if shape == "ranked_heads":
            order = [(_index(r["layer"]), _index(r["head"])) for r in content[shape]]
            samples = {head: (_score(r["avg_pcs"]),) for head, r in zip(order, content[shape], strict=True)}
        elif shape == "preference_heads":
            order = [(_index(layer), _index(head)) for layer, head in content[shape]]
        else:
            for key, values in content.items():
                layer, head = _KEY.fullmatch(key).groups()  # type: ignore[union-attr]
                samples[int(layer), int(head)] = tuple(map(_score, values))
            order = sorted(samples, key=lambda h: (-math.fsum(samples[h]) / len(samples[h]), h))
    except (KeyError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
        raise UsageError(
            f"heads file {path} cannot be read ({type(error).__name__}: {error}); it must hold scores by 'layer-head', "
            "'ranked_heads' or 'preference_heads' (see harness/fit/heads.py)"
        ) from error
    _check(path, order, layers, heads, whole=shape != "preference_heads")
    means = tuple(math.fsum(samples[h]) / len(samples[h]) for h in order) if samples else ()
    return HeadFile(tuple(order), means, tuple(samples[h] for h in order) if samples and shape is None else ())


def _index(value: Any) -> int:
    if type(value) is not int:
        raise TypeError(f"{ascii(value)[:40]} is no number of a layer or head")
    return value


def _score(value: Any) -> float:
    if type(value) not in (int, float):
        raise TypeError(f"{ascii(value)[:40]} is no score")
    return float(value)


def file_identity(path: str) -> str:
    """Name and content of a file in one string, the same on every machine: `name.json sha256:…`."""
    return f"{Path(path).name} sha256:{hashlib.sha256(_bytes(path)).hexdigest()[:16]}"


def mask(scales: Mapping[Head, float], operator: Detection, head_dim: int, where: Where) -> tuple[Edit, ...]:
    """One edit a layer: `zero` scales the heads' outputs, `uniform` their queries (at 0 they attend to all alike)."""
    by_layer: dict[int, list[tuple[int, float]]] = defaultdict(list)
    for (layer, head), scale in sorted(scales.items()):
        by_layer[layer].append((head, scale))
    kinds: Mapping[Detection, type[ScaleHeads | ScaleQueries | ScaleOutputSlices]] = {
        "zero": ScaleHeads,
        "uniform": ScaleQueries,
        "output_slice": ScaleOutputSlices,
    }
    kind = kinds[operator]
    return tuple(kind(layer, tuple(heads), head_dim, where) for layer, heads in by_layer.items())


def _json(path: str) -> dict[str, Any]:
    try:
        content = parse(_bytes(path))
    except ValueError as error:
        raise UsageError(f"heads file {path} is no JSON ({error}); give a published head file") from error
    if not isinstance(content, dict) or not content:
        raise UsageError(f"heads file {path} holds no heads; give a published head file")
    return content


def _bytes(path: str) -> bytes:
    try:
        return read_bytes(Path(path))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise DataMissing(f"heads file {path} cannot be opened ({reason}); give the path of a .json file") from error


def _check(path: str, order: Sequence[Head], layers: int, heads: int, *, whole: bool) -> None:
    has = f"this model has layers 0 to {layers - 1} with heads 0 to {heads - 1}"
    for layer, head in order:
        if not (0 <= layer < layers and 0 <= head < heads):
            raise UsageError(f"heads file {path} names head {head} of layer {layer}; {has}: it is another model's file")
    if not order or len(set(order)) != len(order):
        raise UsageError(
            f"heads file {path} names {'a head twice' if order else 'no head'}; give a published head file"
        )
    if whole and len(order) != layers * heads:
        raise UsageError(f"heads file {path} scores {len(order)} heads; {has}, {layers * heads} in all")
