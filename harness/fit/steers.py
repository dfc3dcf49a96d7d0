"""Base of the methods that steer by difference vectors (see `harness.fit.difference_vectors`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from harness.data import Labelled
from harness.engine.weights.identity import as_recorded
from harness.errors import UsageError
from harness.fit.difference_vectors import Control, Extraction, Numbering, Pair, Pooling, Positions, Scale
from harness.fit.heads import file_identity
from harness.method import Fitted, Kit, Method
from harness.plan import TEMPERATURES, sane_temperature
from harness.plugins.options import Draw, Finite

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Contrasts(Extraction, Method):
    """Base of the methods that steer by difference vectors."""

    decode_only: ClassVar[frozenset[str]] = frozenset(
        {"pooling", "scale", "positions", "coefficient", "control", "draw", "numbering"}
    )
    later: ClassVar[Mapping[str, Any]] = {"numbering": "blocks"}

    pairs: int = 200
    """Pairs of prompts a trait at most, a seeded draw."""
    vectors: str | None = None
    """Files of vectors for this model instead of extracting, comma-separated (`harness.fit.vector_files`)."""
    pooling: Pooling = "response"
    """The mean of an answer's activations, of its prompt's, or the last prompt token's."""
    scale: Scale = "raw"
    """The vector as it is, of length 1, or as long as the residual stream at that block is on average."""
    coefficient: Finite = 1.0
    positions: Positions = "response"
    control: Control = "none"
    """Instead of the vector one of the same norm: in a random direction, or extracted with shuffled labels."""
    draw: Draw = 0
    """Which draw of the random direction."""
    numbering: Numbering = "blocks"
    """What a layer number means, printed defaults included: `blocks` counts blocks from 0; `hidden_states` counts as
    persona-vector tools do, where 0 is the embeddings, so that layer L is what block L - 1 gives."""

    def __post_init__(self) -> None:
        if self.rollouts < 1 or self.pairs < 1 or not sane_temperature(self.temperature):
            raise UsageError(
                f"rollouts {self.rollouts}, pairs {self.pairs}, temperature {self.temperature}: allowed >= 1, >= 1, "
                f"{TEMPERATURES}"
            )
        if not 0 <= self.threshold <= 100 or not 0 <= self.coherence_min <= 100:
            raise UsageError(f"threshold {self.threshold}, coherence_min {self.coherence_min}: allowed 0 to 100")

    def options(self) -> dict[str, Any]:
        """As ever, but files by name and content, which decide the numbers and are the same everywhere."""
        files = [file_identity(file) for file in self._files()] if self.vectors else None
        judge = as_recorded(self.judge) if self.judge else self.judge
        return {**super().options(), "vectors": files, "judge": judge}

    def needs_train(self) -> bool:
        return self.vectors is None

    def fit(self, kit: Kit, train: Sequence[Labelled]) -> Fitted:
        """For each trait and pooling the tensors `vector`, `neutral` and `shuffled` [layers, D], named `trait.pooling.vector`.

        `neutral` is the mean of the negative side, `trait.residual_norm` [layers] the mean norm of its answers' activations.
        """
        from harness.fit.extraction import contrast
        from harness.fit.kit import whole
        from harness.fit.vector_files import as_fitted

        if self.vectors is not None:
            return as_fitted(self._files(), whole(kit).lm)
        return contrast(whole(kit), self._pairs(kit, train), self)

    def review(self, shared: Fitted | None) -> Sequence[str]:
        assert shared is not None
        lines = []
        if shared.meta["poolings"] and self.pooling not in shared.meta["poolings"]:
            raise UsageError(f"the vectors were pooled over {', '.join(shared.meta['poolings'])}; set pooling to that")
        for trait, found in shared.meta["yields"].items():
            if min(found["kept"]) < 50:
                lines.append(
                    f"{trait}: only {min(found['kept'])} answers of a side were kept; --set rollouts=... makes more"
                )
            if self.judge is None:
                lines.append(f"{trait}: answers were not filtered by a judge (--set judge=...)")
        return lines

    def analysis(self, shared: Fitted | None, personal: Mapping[str, Fitted]) -> Mapping[str, Any]:
        """Norms of the vectors by block, how many answers they rest on, and how alike two halves of the pairs are."""
        assert shared is not None
        found: dict[str, Any] = {"yields": shared.meta["yields"], "split_half_cosine": shared.meta["split_half_cosine"]}
        for trait in shared.meta["traits"]:
            norms = shared.tensors[f"{trait}.{self.pooling}.vector"].norm(dim=-1)
            found[f"norms/{trait}"] = [round(norm, 4) for norm in norms.tolist()]
        return found

    def _files(self) -> list[str]:
        return [] if self.vectors is None else self.vectors.split(",")

    def _pairs(self, kit: Kit, train: Sequence[Labelled]) -> dict[str, list[Pair]]:
        """By trait; the i-th positive item is paired with the i-th negative one."""
        sides: dict[str, tuple[list[Labelled], list[Labelled]]] = {}
        for item in train:
            if item.side:
                sides.setdefault(item.targets[1], ([], []))[item.side == "neg"].append(item)
        if not sides:
            return {"history": self._with_history(kit, train)}
        found = {}
        for trait, (positive, negative) in sides.items():
            if len(positive) != len(negative):
                raise UsageError(f"{trait}: {len(positive)} positive and {len(negative)} negative items make no pairs")
            both = list(zip(positive, negative, strict=True))
            chosen = [both[i] for i in kit.draw(len(both), self.pairs)]
            found[trait] = [
                Pair(p.example.prompt(), n.example.prompt(), (p.example.id, n.example.id), p.example.user.id)
                for p, n in chosen
            ]
        return found

    def _with_history(self, kit: Kit, train: Sequence[Labelled]) -> list[Pair]:
        if self.retrieval.k == 0:
            raise UsageError("the task has no two sides, and k=0 leaves no history to contrast with none; set k")
        with_history = [item for item in train if item.example.user.history]
        if not with_history:
            raise UsageError(
                f"the task has no two sides, and none of its {len(train)} train items has a user with a history to contrast "
                "with none; fit on another task, as in --fit_task persona:religion"
            )
        items = [item.example for item in kit.sample(with_history, self.pairs)]
        return [Pair(self.retrieval.prompt(e), e.prompt(), (f"{e.id}/pos", f"{e.id}/neg"), e.user.id) for e in items]

    def _vector(self, shared: Fitted, trait: str) -> Tensor:
        """The trait's vectors under `pooling` and `control`, unscaled, [layers, D]."""
        vector = shared.tensors[f"{trait}.{self.pooling}.vector"]
        if self.control == "none":
            return vector
        if self.control == "random":
            import torch

            direction = torch.randn(vector.shape[1], generator=torch.Generator().manual_seed(self.draw))
            other = direction.to(vector).expand_as(vector)
        else:
            name = f"{trait}.{self.pooling}.shuffled"
            if name not in shared.tensors:
                raise UsageError("control=shuffled needs vectors extracted here; a file holds no shuffled ones")
            other = shared.tensors[name]
        return other * (vector.norm(dim=-1) / other.norm(dim=-1))[:, None]

    def _block(self, layer: int) -> int:
        """The 0-based block that a layer number means. Raises UsageError for the embeddings."""
        if self.numbering == "hidden_states" and layer == 0:
            raise UsageError("layer 0 of the hidden states is the embeddings, which no block gives; give a layer >= 1")
        return layer if self.numbering == "blocks" else layer - 1

    def _scaled(self, vector: Tensor, shared: Fitted, layer: int) -> Tensor:
        """A vector [D] as long as `scale` says at this block."""
        if self.scale == "raw":
            return vector
        unit = vector / vector.norm()
        if self.scale == "unit":
            return unit
        norms = [shared.tensors.get(f"{trait}.residual_norm") for trait in shared.meta["traits"]]
        if any(norm is None for norm in norms):
            raise UsageError(
                "scale=residual needs the norms of the residual stream, which these vector files do not hold"
            )
        return unit * float(sum(float(norm[layer]) for norm in norms if norm is not None) / len(norms))
