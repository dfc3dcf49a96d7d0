"""The parameters of many users, stacked: what of a user trains, how it starts, and how a batch of rows runs under it.

`ShiftStack` holds `harness.training.Shifts` and `LoraStack` an `Adapter` for U users. Each tensor is [U, ...], so that rows of
a batch pick their users' values in one operation and one optimizer step serves all. Values are fp32 or wider whatever the
model's dtype; a user's first values depend on the seed and the user alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

from harness.edits import Bound, low_rank_shift
from harness.engine.model import LanguageModel
from harness.errors import UsageError
from harness.plan import Edit, Site, Where
from harness.training import Adapter, Learner, Shifts, peft_name


class Stack(Protocol):
    """One part of what trains, for all users."""

    cut: int
    """Blocks below the first one it changes."""

    def parameters(self) -> list[Parameter]: ...

    def edits(self, learner: int) -> list[Edit]:
        """What a row of this learner runs under, after the edits that are frozen."""
        ...

    def modules(self, learners: Sequence[int]) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
        """Module -> its new output from input and output, in a pass whose rows are these learners'."""
        ...

    def tensors(self, learner: int) -> dict[str, Tensor]:
        """A learner's values, on the CPU."""
        ...

    def meta(self) -> dict[str, Any]:
        """What a plan needs to know beside the tensors."""
        ...


def stack(lm: LanguageModel, part: Shifts | Adapter, learners: Sequence[Learner], seed: int) -> Stack:
    """Raises UsageError where the part names a block or module the model does not have."""
    kind = ShiftStack if isinstance(part, Shifts) else LoraStack
    return kind(lm, part, learners, seed)  # type: ignore[arg-type]


def size(lm: LanguageModel, part: Shifts | Adapter) -> int:
    """Trainable parameters of one learner."""
    if isinstance(part, Shifts):
        return len(part.places) * part.rank * (2 * lm.sites.width + 1)
    return sum(part.rank * (rows + columns) for rows, columns in lora_modules(lm, part.targets).values())


@dataclass
class Parameter:
    """One tensor of all learners, [U, ...], and its AdamW moments."""

    value: Tensor
    decays: bool = True
    orthonormal: bool = False

    def __post_init__(self) -> None:
        self.value.requires_grad_()
        self.mean, self.square = torch.zeros_like(self.value), torch.zeros_like(self.value)


@dataclass(frozen=True, eq=False)
class _StackedShift:
    """One learner's shift, as an edit: the engine binds a batch of them by picking rows of the stack."""

    site: Site
    where: Where
    stack: tuple[Tensor, Tensor, Tensor]
    """Rotation, weight, bias of all learners."""
    learner: int

    @classmethod
    def bind(cls, edits: Sequence[Self], like: Tensor) -> Bound:
        stack = edits[0].stack
        assert all(edit.stack is stack for edit in edits)
        index = torch.tensor([edit.learner for edit in edits], device=stack[0].device)
        rotation, weight, bias = (tensor.index_select(0, index) for tensor in stack)
        return low_rank_shift(rotation, weight, bias, like)


class ShiftStack:
    """`Shifts` of all learners."""

    def __init__(self, lm: LanguageModel, part: Shifts, learners: Sequence[Learner], seed: int) -> None:
        self.part = part
        self.places = part.places
        width = lm.sites.width
        if not 1 <= part.rank <= width:
            raise UsageError(
                f"rank {part.rank} is not valid for a residual stream of width {width}; allowed: 1 to {width}"
            )
        for site, _ in self.places:
            lm.sites.check(site)
        self.cut = 1 + min(site.layer for site, _ in self.places)
        firsts = [_first_shifts(part, learner, width, seed) for learner in learners]
        likes = [lm.sites.parameter(site) for site, _ in self.places]
        values = {
            kind: [_stacked([first[kind][place] for first in firsts], like) for place, like in enumerate(likes)]
            for kind in ("rotation", "weight", "bias")
        }
        self.rotation = [Parameter(value, decays=False, orthonormal=True) for value in values["rotation"]]
        self.weight = [Parameter(value) for value in values["weight"]]
        self.bias = [Parameter(value, decays=False) for value in values["bias"]]
        self.stacks = [
            (r.value, w.value, b.value) for r, w, b in zip(self.rotation, self.weight, self.bias, strict=True)
        ]

    def parameters(self) -> list[Parameter]:
        return [*self.rotation, *self.weight, *self.bias]

    def edits(self, learner: int) -> list[Edit]:
        return [
            _StackedShift(site, where, stack, learner)
            for (site, where), stack in zip(self.places, self.stacks, strict=True)
        ]

    def modules(self, learners: Sequence[int]) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
        return {}

    def meta(self) -> dict[str, Any]:
        return {"layers": list(self.part.layers)}

    def tensors(self, learner: int) -> dict[str, Tensor]:
        kinds = {"rotation": self.rotation, "weight": self.weight, "bias": self.bias}
        return {
            f"{self.part.name}.{kind}": torch.stack([p.value[learner].detach().cpu() for p in parameters])
            for kind, parameters in kinds.items()
        }


def _first_shifts(part: Shifts, learner: Learner, width: int, seed: int) -> dict[str, Tensor]:
    """First values by kind: rotation and weight [S, r, D], bias [S, r]."""
    if learner.trained is not None:
        return {kind: learner.trained[f"{part.name}.{kind}"] for kind in ("rotation", "weight", "bias")}
    draw = torch.Generator().manual_seed(seed_of(seed, learner.name, part.name))
    shape = len(part.places), part.rank, width
    rotation = retract(torch.randn(shape, generator=draw, dtype=torch.float64))
    if part.start == "identity":
        return {"rotation": rotation, "weight": rotation, "bias": rotation.new_zeros(shape[:2])}
    bound = width**-0.5  # as torch's Linear starts
    weight, bias = (
        torch.empty(size, dtype=torch.float64).uniform_(-bound, bound, generator=draw) for size in (shape, shape[:2])
    )
    return {"rotation": rotation, "weight": weight, "bias": bias}


class LoraStack:
    """`Adapter` of all learners."""

    def __init__(self, lm: LanguageModel, part: Adapter, learners: Sequence[Learner], seed: int) -> None:
        shapes, width = lora_modules(lm, part.targets), lm.sites.width
        if not 1 <= part.rank <= width:
            raise UsageError(f"rank {part.rank} is not valid for a model of width {width}; allowed: 1 to {width}")
        self.scale = part.alpha / part.rank
        self.cut = min(block for name in shapes if (block := _block_of(lm, name)) is not None)
        firsts = [_first_adapter(part, learner, shapes, seed) for learner in learners]
        self.pairs: dict[str, tuple[Parameter, Parameter]] = {}
        for name in shapes:
            like = next(lm.model.get_submodule(name).parameters())
            down, up = (_stacked([first[peft_name(name, kind)] for first in firsts], like) for kind in ("A", "B"))
            self.pairs[name] = Parameter(down), Parameter(up)

    def parameters(self) -> list[Parameter]:
        return [parameter for pair in self.pairs.values() for parameter in pair]

    def edits(self, learner: int) -> list[Edit]:
        return []

    def meta(self) -> dict[str, Any]:
        return {"scale": self.scale}

    def modules(self, learners: Sequence[int]) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
        """What each module's output becomes, of a pass whose rows are these learners'."""
        return {name: self._transform(down.value, up.value, learners) for name, (down, up) in self.pairs.items()}

    def _transform(self, down: Tensor, up: Tensor, learners: Sequence[int]) -> Callable[[Tensor, Tensor], Tensor]:
        index = torch.tensor(learners, device=down.device)

        def run(x: Tensor, y: Tensor) -> Tensor:
            a, b = (tensor.index_select(0, index).to(x.dtype).transpose(1, 2) for tensor in (down, up))
            return y + self.scale * torch.bmm(torch.bmm(x, a), b)

        return run

    def tensors(self, learner: int) -> dict[str, Tensor]:
        return {
            peft_name(name, kind): parameter.value[learner].detach().cpu()  # type: ignore[arg-type]
            for name, pair in self.pairs.items()
            for kind, parameter in zip("AB", pair, strict=True)
        }


def _first_adapter(
    part: Adapter, learner: Learner, shapes: Mapping[str, tuple[int, int]], seed: int
) -> Mapping[str, Tensor]:
    """PEFT's start: A uniform as torch's Linear starts, B zero, so that nothing changes before the first step."""
    if learner.trained is not None:
        return learner.trained
    draw = torch.Generator().manual_seed(seed_of(seed, learner.name))
    first = {}
    for name, (rows, columns) in shapes.items():
        bound = rows**-0.5
        first[peft_name(name, "A")] = torch.empty(part.rank, rows, dtype=torch.float64).uniform_(
            -bound, bound, generator=draw
        )
        first[peft_name(name, "B")] = torch.zeros(columns, part.rank, dtype=torch.float64)
    return first


def lora_modules(lm: LanguageModel, targets: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Linear modules inside blocks whose names end in one of `targets` -> (in, out), in the model's order.

    Raises UsageError for a target that matches none, and where there is no target.
    """
    inside = lora_shapes(lm)
    for target in targets or ("",):
        if not any(_matches(name, target) for name in inside):
            known = sorted({name.rpartition(".")[2] for name in inside})
            raise UsageError(
                f"LoRA target {target!r} matches no module of {lm.name}; its blocks have: {', '.join(known)}"
            )
    return {name: shape for name, shape in inside.items() if any(_matches(name, target) for target in targets)}


def lora_shapes(lm: LanguageModel) -> dict[str, tuple[int, int]]:
    """Every linear module inside a block -> (in, out), in the model's order."""
    linear = {name: shape for name, module in lm.model.named_modules() if (shape := _shape(module)) is not None}
    return {name: shape for name, shape in linear.items() if _block_of(lm, name) is not None}


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith("." + target)


def _shape(module: nn.Module) -> tuple[int, int] | None:
    """(in, out) of a linear module; GPT-2's keep their weights transposed."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if type(module).__name__ == "Conv1D":
        rows, columns = module.weight.shape  # type: ignore[misc]
        return rows, columns
    return None


def _block_of(lm: LanguageModel, name: str) -> int | None:
    """The block a module lies in."""
    family = lm.sites.family
    head, _, rest = name.partition(f"{family.base}.{family.blocks}.")
    return int(rest.partition(".")[0]) if rest and not head else None


def retract(rotation: Tensor) -> Tensor:
    """The nearest-by-QR matrix with orthonormal rows, [..., r, D]: Q^T of QR(rotation^T), R's diagonal positive."""
    q, r = torch.linalg.qr(rotation.mT)
    sign = torch.where(r.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(q)
    return (q * sign[..., None, :]).mT


def _stacked(firsts: Sequence[Tensor], like: Tensor) -> Tensor:
    """[U, ...] on the device of `like`, in fp32 or wider."""
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return torch.stack(list(firsts)).to(device=like.device, dtype=dtype)


def seed_of(*parts: object) -> int:
    """A seed from what it depends on."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7], "little")


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Tells adapters of different content apart."""
    content = hashlib.sha256()
    for name in sorted(tensors):
        content.update(name.encode() + tensors[name].contiguous().view(torch.uint8).numpy().tobytes())
    return content.hexdigest()[:16]
