"""Universal clamping: take the direction that personas share out of the residual stream, in a band of blocks.

Paper: Phadke et al., Mechanistic Origins of Personalization Bias in LLMs, section 4.3 and Table 1: the mean of four
religions' vectors, each from the block where it steers most, is "subtracted (clamped)" in layers 11-15 of 28.
The paper leaves open what this file makes options:
    universal   published: mean over traits of v[peak], whose norms differ (vectors grow with depth); unit: the mean of
                their unit vectors, as long as the published one; per_layer: in each block the mean of its own vectors
    op          subtract: x - coefficient u (`scale` says how long u is); project_out: x without its component along u;
                neutral: that component set to the mean of neutral answers
    numbering   blocks: the printed layer L is block L, from 0; hidden_states: it is what block L - 1 gives, as the tools the
                paper builds on count. It does not say which.
Peaks by default are the printed ones (Christianity 20, Islam 10, Hinduism 15, Judaism 13, races 20), as fractions of 28.
To use all traits of a category: `--fit_task persona:religion`; a single trait's own vector: `--fit_task persona:islam`;
as a control, the vectors of others: `--fit_task persona:race`; or `control=shuffled`, extracted with shuffled labels; or
`control=random`: moved as far at each position as by the vectors themselves, in a random direction.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from harness.data import Example
from harness.edits import AddVector, ClampTo, ProjectOut
from harness.errors import UsageError
from harness.fit.difference_vectors import WHERE, at_block
from harness.fit.steers import Contrasts
from harness.method import Fitted
from harness.plan import Edit, Plan, Site, Stream

if TYPE_CHECKING:
    from torch import Tensor

PEAKS: Mapping[str, int] = {"Christianity": 20, "Islam": 10, "Hinduism": 15, "Judaism": 13}
"""Of 28 layers, as the paper prints them. Vectors from other tools' files may be called `islam`."""


@dataclass(frozen=True)
class Clamp(Contrasts):
    """Take the mean persona vector out of the residual stream."""

    decode_only: ClassVar[frozenset[str]] = Contrasts.decode_only | {"universal", "op", "band", "peaks"}

    universal: Literal["published", "unit", "per_layer"] = "published"
    op: Literal["subtract", "project_out", "neutral"] = "subtract"
    band: str = "0.39-0.57"
    """First and last layer as in 11-15, or fractions of the depth: the layers whose middle lies between them."""
    peaks: tuple[int, ...] | None = None
    """Each trait's layer, in the order of the traits; like the band's, numbered as `numbering` says."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.op != "subtract" and (self.scale != "raw" or (self.op == "neutral" and self.coefficient != 1)):
            raise UsageError(f"clamp: op={self.op} depends on the direction alone; leave scale and coefficient out")
        blocks_of(self.band, 28, check=False)

    def plan(self, example: Example, shared: Fitted | None, personal: Fitted | None) -> Plan:
        assert shared is not None
        moved = read = self.directions(shared)
        if self.control == "random" and self.op != "subtract":
            # how far these ops move x depends on the direction; along a random one it would be next to nothing
            read = replace(self, control="none").directions(shared)
        edits = tuple(self._edit(block, u, moved[block], shared) for block, u in read.items())
        return Plan((Stream(self.retrieval.prompt(example), edits),))

    def neutral(self) -> Self | None:
        return None if self.op == "neutral" else replace(self, coefficient=0.0)

    def directions(self, shared: Fitted) -> dict[int, Tensor]:
        """u of each block of the band, unscaled, [D]; under a control as long as without."""
        if self.control == "none":
            return self._directions(shared)
        true = replace(self, control="none")._directions(shared)
        return {block: u * (true[block].norm() / u.norm()) for block, u in self._directions(shared).items()}

    def _directions(self, shared: Fitted) -> dict[int, Tensor]:
        traits = shared.meta["traits"]
        vectors = {trait: self._vector(shared, trait) for trait in traits}
        layers = len(vectors[traits[0]])
        first = 0 if self.numbering == "blocks" else 1
        blocks = [number - first for number in blocks_of(self.band, layers, first=first)]
        if self.universal == "per_layer":
            return {block: _mean([at_block(vectors[t], block, shared, t) for t in traits]) for block in blocks}
        peaks = self.peaks or tuple(PEAKS.get(trait.title(), 20) * layers // 28 for trait in traits)
        if len(peaks) != len(traits):
            raise UsageError(f"clamp: {len(peaks)} peaks for {len(traits)} traits ({', '.join(traits)}); give one each")
        at_peak = [at_block(vectors[t], self._block(peak), shared, t) for t, peak in zip(traits, peaks, strict=True)]
        mean = _mean(at_peak)
        if self.universal == "unit":
            of_units = _mean([v / v.norm() for v in at_peak])
            mean = of_units * (mean.norm() / of_units.norm())
        return dict.fromkeys(blocks, mean)

    def _edit(self, block: int, u: Tensor, along: Tensor, shared: Fitted) -> Edit:
        """`u` says how far, `along` where to; they differ under a control alone."""
        site, where = Site(block, "block_out"), WHERE[self.positions]
        if self.op == "subtract":
            return AddVector(site, self._scaled(u, shared, block), -self.coefficient, where)
        if self.op == "project_out":
            return ProjectOut(site, u, self.coefficient, where, along)
        names = [f"{trait}.{self.pooling}.neutral" for trait in shared.meta["traits"]]
        if not all(name in shared.tensors for name in names):
            raise UsageError(
                "clamp: op=neutral needs the mean of neutral answers, which these vector files do not hold"
            )
        mean = _mean([shared.tensors[name][block] for name in names])
        return ClampTo(site, u, float(mean @ u / u.norm()), where, along)


def _mean(vectors: Sequence[Tensor]) -> Tensor:
    total = vectors[0]
    for vector in vectors[1:]:
        total = total + vector
    return total / len(vectors)


def blocks_of(band: str, layers: int, *, first: int = 0, check: bool = True) -> list[int]:
    """The layers a band names: `11-15` both of them included, `0.39-0.57` of the depth; the lowest is called `first`.

    Raises UsageError for others.
    """
    start, dash, last = band.partition("-")
    try:
        if "." in band:
            low, high = float(start) * layers, float(last) * layers
            blocks = [block for block in range(first, layers) if low <= block + 0.5 < high]
        else:
            blocks = list(range(int(start), int(last if dash else start) + 1))
    except ValueError:
        blocks = []
    if not blocks or (check and not first <= blocks[0] <= blocks[-1] < layers + first):
        raise UsageError(
            f"clamp: band={band} names no blocks of a model with blocks {first} to {layers - 1 + first}; give as in "
            "11-15, or fractions of the depth as in 0.39-0.57"
        )
    return blocks
