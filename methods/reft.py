"""ReFT: each user has low-rank shifts of the residual stream of their own, trained on their history.

Paper: Wu et al., ReFT: Representation Finetuning for Language Models, 2024, LoReFT: h + R^T (W h + b - R h), R with
orthonormal rows; one stage and one user, as PerFit (anonymous ACL submission, Table 4, @Stage-2) compares with. Code
read: stanfordnlp/pyreft@dafd099. Differs from that code:
- R stays orthonormal under weight decay (see `harness.engine.training.train`); theirs becomes zero at the first step.
- W starts as R and b as 0, so that an untrained shift changes nothing (preset `pyreft`: theirs, which moves every edited
  activation by a tenth of its size).
- First and last positions share weights unless `share_weights=false`; theirs do not share.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from harness.data import Example, User
from harness.errors import UserFailed
from harness.fit.trains import TrainsUsers
from harness.method import Fitted, Kit
from harness.plan import Plan, Stream
from harness.plugins.options import Count
from harness.training import Shifts, Start, middle, positions


@dataclass(frozen=True)
class ReFT(TrainsUsers):
    """Low-rank shifts of the residual stream, one set a user."""

    presets: ClassVar[dict[str, dict[str, Any]]] = {"pyreft": {"start": "random", "share_weights": False}}

    rank: Count = 4
    layers: tuple[int, ...] | None = None
    """Blocks whose output is shifted; by default the block or two in the middle."""
    positions: str = "all"
    """`all` (generated ones too), `last` (of the prompt), or ReFT's `f7+l7`: the prompt's first and last tokens."""
    share_weights: bool = True
    """Whether first and last positions have one set of weights."""
    start: Start = "identity"

    def __post_init__(self) -> None:
        super().__post_init__()
        positions(self.positions)

    def adapt(self, kit: Kit, users: Sequence[User], shared: Fitted | None) -> list[Fitted | UserFailed]:
        """The user's `personal.*` tensors; none where the task makes no pairs of the history."""
        layers = self.layers or middle(kit.sites.layers)
        return self.personal(kit, users, self._shifts(layers))

    def plan(self, example: Example, shared: Fitted | None, personal: Fitted | None) -> Plan:
        trained = personal is not None and personal.tensors
        edits = self._shifts(personal.meta["layers"]).edits(personal.tensors) if personal and trained else ()
        return Plan((Stream(self.prompt(example, personal), edits),))

    def neutral(self) -> Self:
        return replace(self, epochs=0, start="identity")

    def _shifts(self, layers: Sequence[int]) -> Shifts:
        wheres = positions(self.positions, shared=self.share_weights)
        return Shifts("personal", tuple(layers), self.rank, wheres, self.start)
