"""PerFit: a shift of the residual stream that all users share, and on top of it one of each user's own.

Paper: Exploring Personalization Shifts in Representation Space of LLMs (anonymous ACL submission), eqs. 1-2:
phi_2(phi_1(h)) at each layer, phi_s(x) = x + R^T (W x + b - R x), R with orthonormal rows. Stage 1 trains phi_1 on other
users' questions, stage 2 trains phi_2 of each user on their history with phi_1 frozen. AdamW 1e-4, decay 0.01, clipping
at 0.3, batches of 16, 3 and 2 epochs. No code read (it is not public); LoReFT as in `reft`.
What the paper leaves open, and what is done here:
- Ranks, layers and positions came from a random search that is not published. Its parameter counts fit ranks of 16 to
  32 and 4 to 32 on one to three layers; here 32 and 4, the two middle blocks, all positions.
- How phi_2 starts. `identity`: as no change, so that a user begins where stage 1 ended. `fresh`: as pyreft starts, which
  moves activations before the first step. `from_stage1`: phi_2 is trained in stage 1 too, and each user goes on from it;
  who has no history keeps it.
Table 4's ablations are settings: `stage1` has no personal stage; `stage2_cp` and `stage2_p` have no collective one, and
the sum of both ranks or the personal rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self

from harness.data import Example, Labelled, User
from harness.errors import HarnessError, UsageError, UserFailed
from harness.fit.trains import TrainsUsers
from harness.method import Fitted, Kit
from harness.plan import Edit, Plan, Stream, Where
from harness.plugins.options import Count
from harness.training import Shifts, Start, middle, positions


@dataclass(frozen=True)
class PerFit(TrainsUsers):
    """Low-rank shifts of the residual stream: a collective one, then one of each user."""

    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "pyreft": {"start": "random", "stage2_init": "fresh", "share_weights": False},
        "stage1": {"ablation": "stage1"},
        "stage2_cp": {"ablation": "stage2_cp"},
        "stage2_p": {"ablation": "stage2_p"},
    }

    rank: Count = 32
    """Of the collective shifts."""
    personal_rank: Count = 4
    layers: tuple[int, ...] | None = None
    """Blocks whose output is shifted; by default the block or two in the middle."""
    positions: str = "all"
    """`all` (generated ones too), `last` (of the prompt), or ReFT's `f7+l7`: the prompt's first and last tokens."""
    share_weights: bool = True
    """Whether first and last positions have one set of weights."""
    collective_epochs: int = 3
    collective_lr: float | None = None
    """Of the collective stage, which takes a hundred times the steps; None = lr, as published."""
    start: Start = "identity"
    """How the collective shifts start."""
    stage2_init: Literal["identity", "fresh", "from_stage1"] = "identity"
    ablation: Literal["none", "stage1", "stage2_cp", "stage2_p"] = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        positions(self.positions)
        for name in ("collective_epochs", "collective_lr"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < float("inf"):
                raise UsageError(f"{name} {value} is not valid; allowed: {name} >= 0")
        if self.stage2_init == "from_stage1" and self.ablation != "none":
            raise UsageError(f"perfit: stage2_init=from_stage1 needs both stages; ablation={self.ablation} has one")

    def needs_train(self) -> bool:
        return not self.ablation.startswith("stage2")

    def personal_only(self) -> frozenset[str]:
        own = {"epochs", "items"}
        if self.stage2_init != "from_stage1":
            own |= {"personal_rank", "stage2_init"}
        if not self.ablation.startswith("stage2"):
            own.add("ablation")  # stage 1 is the same whether a second one follows
        return frozenset(own)

    def fit(self, kit: Kit, train: Sequence[Labelled]) -> Fitted | None:
        """Stage 1: `collective.*`, and with `from_stage1` the `personal.*` tensors that users start from."""
        if self.ablation.startswith("stage2"):
            return None
        layers = self.layers or middle(kit.sites.layers)
        parts = [self._collective(layers)]
        if self.stage2_init == "from_stage1":
            parts.append(self._personal(layers))
        (state,) = kit.train(
            [self.collective(kit, train)], parts, self.recipe(self.collective_epochs, self.collective_lr)
        )
        if isinstance(state, UserFailed):
            raise HarnessError(str(state))
        return state

    def adapt(self, kit: Kit, users: Sequence[User], shared: Fitted | None) -> Sequence[Fitted | UserFailed | None]:
        """Stage 2: each user's `personal.*` tensors; none where the task makes no pairs of the history."""
        if self.ablation == "stage1":
            return self.personal(kit, users, None) if self.profile else [None] * len(users)
        layers = self.layers or middle(kit.sites.layers)
        trained = shared.tensors if shared and self.stage2_init == "from_stage1" else None
        return self.personal(kit, users, self._personal(layers), self._frozen(shared), trained=trained)

    def plan(self, example: Example, shared: Fitted | None, personal: Fitted | None) -> Plan:
        edits = self._frozen(shared)
        own = personal if personal is not None and personal.tensors else None
        if own is None and self.stage2_init == "from_stage1":
            own = shared
        if own is not None:
            edits += self._personal(own.meta["layers"]).edits(own.tensors)
        return Plan((Stream(self.prompt(example, personal), edits),))

    def neutral(self) -> Self:
        init: Literal["identity", "from_stage1"] = "from_stage1" if self.stage2_init == "from_stage1" else "identity"
        return replace(self, epochs=0, collective_epochs=0, start="identity", stage2_init=init)

    def _frozen(self, shared: Fitted | None) -> tuple[Edit, ...]:
        if self.ablation.startswith("stage2"):
            return ()
        if shared is None or not shared.tensors:
            raise HarnessError("perfit: the collective stage was not trained; run 'harness fit --method perfit' first")
        return self._collective(shared.meta["layers"]).edits(shared.tensors)

    def _collective(self, layers: Sequence[int]) -> Shifts:
        return Shifts("collective", tuple(layers), self.rank, self._wheres(), self.start)

    def _personal(self, layers: Sequence[int]) -> Shifts:
        rank = self.rank + self.personal_rank if self.ablation == "stage2_cp" else self.personal_rank
        start: Start = "random" if self.stage2_init == "fresh" else "identity"
        return Shifts("personal", tuple(layers), rank, self._wheres(), start)

    def _wheres(self) -> tuple[Where, ...]:
        return positions(self.positions, shared=self.share_weights)
