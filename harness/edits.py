"""The changes to activations that methods are made of, and how a batch of rows carries different ones.

Each edit is a frozen value with a site and a `where`; `bind` turns one edit a row into a single tensor function, so a
batch of 64 rows with 64 different edits costs one hook call. Zero strength leaves the activation untouched bit by bit.

ScaleHeads   a head's output slice of the output projection's INPUT times s; 0 is the "masked head" of the DPS paper
ScaleQueries a head's query times s; 0 makes its attention uniform, which is what DeCoRe's and DPS's released code does
ScaleOutputSlices  slices of the output projection's OUTPUT times s, which are no heads; DPS's released detection zeroes them
AddVector    x + coefficient * v (persona vectors, StyleVector)
ProjectOut   x minus its component along v
ClampTo      component along v set to a value
LowRankShift x + R^T (W x + b - R x) (LoReFT, PerFit eq. 2)
Replace      x replaced by stored activations (activation patching)

Methods import this module at their top and `harness list` imports methods, so torch is imported where it computes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self, TypeAlias

from harness.plan import ALL, DECODE, Site, Where

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

Bound: TypeAlias = "Callable[[Tensor], Tensor]"


@dataclass(frozen=True)
class _ScaleSlices:
    """Scales head slices of a [R, T, H * head_dim] activation. `scales` holds (head, factor) pairs."""

    layer: int
    scales: tuple[tuple[int, float], ...]
    head_dim: int
    where: Where = DECODE

    @classmethod
    def bind(cls, edits: Sequence[Self], like: Tensor) -> Bound:
        import torch

        head_dim = edits[0].head_dim
        heads = 1 + max((head for edit in edits for head, _ in edit.scales), default=0)
        factors = torch.ones(len(edits), 1, heads, 1)
        for row, edit in enumerate(edits):
            for head, factor in edit.scales:
                factors[row, 0, head, 0] = factor
        factors = factors.to(device=like.device, dtype=like.dtype)
        zeroed = factors == 0

        def run(x: Tensor) -> Tensor:
            split = x.unflatten(-1, (-1, head_dim))
            scaled = (split[..., :heads, :] * factors).masked_fill(zeroed, 0)  # 0 * inf would be NaN
            return torch.cat([scaled, split[..., heads:, :]], dim=-2).flatten(-2)

        return run


@dataclass(frozen=True)
class ScaleHeads(_ScaleSlices):
    """Head outputs times a factor, at the input of the output projection: 0 removes what the head adds."""

    @property
    def site(self) -> Site:
        return Site(self.layer, "heads_out")


@dataclass(frozen=True)
class ScaleQueries(_ScaleSlices):
    """Queries times a factor: an attention temperature of 1 / factor, and at 0 uniform attention."""

    @property
    def site(self) -> Site:
        return Site(self.layer, "queries")


@dataclass(frozen=True)
class ScaleOutputSlices(_ScaleSlices):
    """Slices of the attention's output times a factor: residual coordinates, to which every head adds. No head is masked."""

    @property
    def site(self) -> Site:
        return Site(self.layer, "attn_out")


@dataclass(frozen=True, eq=False)
class AddVector:
    """x + coefficient * vector; vector [D]."""

    site: Site
    vector: Tensor
    coefficient: float = 1.0
    where: Where = ALL

    @classmethod
    def bind(cls, edits: Sequence[Self], like: Tensor) -> Bound:
        shift = _stack([edit.coefficient * edit.vector for edit in edits], like)
        return lambda x: x + shift


@dataclass(frozen=True, eq=False)
class ProjectOut:
    """x - strength * (x . u) u with u the unit vector; vector [D]."""

    site: Site
    vector: Tensor
    strength: float = 1.0
    where: Where = ALL
    along: Tensor | None = None
    """Moves x as far along this direction [D] instead: a control."""

    @classmethod
    def bind(cls, edits: Sequence[Self], like: Tensor) -> Bound:
        unit = _stack([edit.vector / edit.vector.norm() for edit in edits], like)
        along = _along(edits, unit)
        strength = like.new_tensor([edit.strength for edit in edits])[:, None, None]
        return lambda x: x - strength * (x * unit).sum(-1, keepdim=True) * along


@dataclass(frozen=True, eq=False)
class ClampTo:
    """The component of x along the unit vector set to `value`; vector [D]."""

    site: Site
    vector: Tensor
    value: float = 0.0
    where: Where = ALL
    along: Tensor | None = None
    """Moves x as far along this direction [D] instead: a control."""

    @classmethod
    def bind(cls, edits: Sequence[Self], like: Tensor) -> Bound:
        unit = _stack([edit.vector / edit.vector.norm() for edit in edits], like)
        along = _along(edits, unit)
        value = like.new_tensor([edit.value for edit in edits])[:, None, None]
        return lambda x: x + (value - (x * unit).sum(-1, keepdim=True)) * along


def _along(edits: Sequence[ProjectOut | ClampTo], unit: Tensor) -> Tensor:
    """The unit directions [R, 1, D] that the edits move along, their own (`unit`) where they name none."""
    if all(edit.along is None for edit in edits):
        return unit
    chosen = [edit.vector if edit.along is None else edit.along for edit in edits]
    return _stack([direction / direction.norm() for direction in chosen], unit)


@dataclass(frozen=True, eq=False)
class LowRankShift:
    """x + R^T (W x + b - R x): LoReFT; R [r, D] with orthonormal rows, W [r, D], b [r]. Rows of a batch share r."""

    site: Site
    rotation: Tensor
    weight: Tensor
    bias: Tensor
    where: Where = ALL

    @classmethod
    def bind(cls, edits: Sequence[Self], like: Tensor) -> Bound:
        import torch

        rank = max(edit.rotation.shape[0] for edit in edits)
        rotation = torch.stack([_pad_rows(edit.rotation, rank) for edit in edits])
        weight = torch.stack([_pad_rows(edit.weight, rank) for edit in edits])
        bias = torch.stack([_pad_rows(edit.bias, rank) for edit in edits])
        return low_rank_shift(rotation, weight, bias, like)


def low_rank_shift(rotation: Tensor, weight: Tensor, bias: Tensor, like: Tensor) -> Bound:
    """x + R^T (W x + b - R x) for row r of [R, T, D] by rotation and weight [R, r, D], bias [R, r]; in fp32 or wider."""
    import torch

    exact = torch.float64 if like.dtype == torch.float64 else torch.float32  # bf16 has no orthonormal rows
    rotation, weight, bias = (tensor.to(device=like.device, dtype=exact) for tensor in (rotation, weight, bias))
    difference = (weight - rotation).transpose(1, 2)
    return lambda x: x + torch.bmm(torch.baddbmm(bias[:, None], x.to(exact), difference), rotation).to(x.dtype)


@dataclass(frozen=True, eq=False)
class Replace:
    """x replaced by stored activations: values [N, W] at the N positions from `start` on, in the W columns from `column` on.

    So a head's output alone is replaced at `heads_out` with W = head_dim and column = head * head_dim.
    """

    site: Site
    values: Tensor
    where: Where
    start: int = 0
    column: int = 0

    @classmethod
    def bind(cls, edits: Sequence[Self], like: Tensor) -> Bound:
        raise TypeError("Replace needs positions; the engine binds it through bind_at")

    @classmethod
    def bind_at(cls, edits: Sequence[Self], like: Tensor, positions: np.ndarray) -> Bound:
        """As `bind`, for a forward pass over `positions` [R, T]."""
        import torch

        rows = []
        for edit, row in zip(edits, positions, strict=True):
            index = (row - edit.start).clip(0, edit.values.shape[0] - 1)
            rows.append(edit.values[torch.as_tensor(index, device=edit.values.device)].to(like))

        def run(x: Tensor) -> Tensor:
            x = x.clone()
            for row, (edit, values) in enumerate(zip(edits, rows, strict=True)):
                x[row, :, edit.column : edit.column + values.shape[-1]] = values
            return x

        return run


def _stack(vectors: Sequence[Tensor], like: Tensor) -> Tensor:
    import torch

    stacked = torch.stack(list(vectors))
    if stacked.is_complex():  # torch would keep the real part
        raise ValueError("complex numbers, where activations are real")
    return stacked.to(like)[:, None]


def _pad_rows(x: Tensor, rows: int) -> Tensor:
    import torch

    return torch.cat([x, x.new_zeros(rows - x.shape[0], *x.shape[1:])]) if x.shape[0] < rows else x
