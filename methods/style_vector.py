"""StyleVector: add, while a user's answer is generated, the direction in which their own texts differ from a generic model's.

Paper: Zhang et al., Personalized Text Generation with Contrastive Activation Steering, ACL 2025 (arXiv 2503.05213). For
each history pair (x, y) a generic model answers x with y'; a+ and a- are the residuals leaving block l at the last token
of x + y and of x + y'; s = f({a+ - a-}): their mean as it is (`mean`), the unit weight vector of a logistic regression
that tells a+ from a- (`logistic`), or the unit first principal component of the differences and their negatives (`pca`).
Decoding adds strength * s after block l at every generated position. The authors released no code; Aaronzijingcai/
StyleVector@6512896 (unofficial) was read, and extracts at one block but adds at the next. What the paper tunes per task
(l, from 15 of 32 up, and strength) is by default the middle block and 1; norms differ between the three f, so strengths do
too. y' is the evaluated model's own greedy answer, there gpt-3.5-turbo's (`negatives`); no end token follows y or y'.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from harness.data import Example, User
from harness.edits import AddVector
from harness.errors import UsageError, UserFailed
from harness.fit.writer import ENDPOINT, as_recorded
from harness.method import Fitted, Kit, Method, Retrieval
from harness.plan import GENERATED, LAST_PROMPT, PROMPT, Plan, Site, Stream, Where
from harness.plugins.options import Finite
from harness.plugins.registry import model_row

if TYPE_CHECKING:
    from torch import Tensor


Direction = Literal["mean", "logistic", "pca"]
_WHERE: Mapping[str, tuple[Where, ...]] = {
    "generated": (GENERATED,),
    "last_prompt": (LAST_PROMPT,),
    "prompt": (PROMPT, LAST_PROMPT),
}


@dataclass(frozen=True)
class StyleVector(Method):
    """Steer by the difference between a user's texts and a generic model's."""

    decode_only: ClassVar[frozenset[str]] = frozenset({"strength", "positions"})

    retrieval: Retrieval = Retrieval(k=0)
    layer: int | None = None
    """0-based block whose output is read and steered; by default the one in the middle."""
    strength: Finite = 1.0
    direction: Direction = "mean"
    negatives: str = "self"
    """Who writes the generic answers: `self` (the evaluated model), a model's alias, hub id or folder, or `openai/<model>`."""
    negative_tokens: int | None = None
    """Length of a generic answer at most; by default the task's."""
    items: int | None = None
    """Newest history items read; None = all."""
    positions: Literal["generated", "last_prompt", "prompt"] = "generated"

    def __post_init__(self) -> None:
        for name in ("items", "negative_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"style_vector: {name} {value} is not valid; allowed: {name} >= 1")
        if self.negatives != "self" and not self.negatives.startswith(ENDPOINT):
            model_row(self.negatives)  # an unknown name is heard of before any model is loaded

    def options(self) -> dict[str, Any]:
        """As ever, but a writer in a folder by name and content."""
        return {**super().options(), "negatives": as_recorded(self.negatives)}

    def adapt(self, kit: Kit, users: Sequence[User], shared: Fitted | None) -> list[Fitted | UserFailed]:
        """Each user's `vector` [D], fp32; none where the task makes no pairs of the history."""
        site = kit.sites.check(Site(kit.sites.layers // 2 if self.layer is None else self.layer, "block_out"))
        newest = slice(-self.items, None) if self.items else slice(None)
        pairs = [(number, pair) for number, user in enumerate(users) for pair in user.pairs[newest]]
        length = self.negative_tokens or kit.max_new_tokens
        written = kit.writer(self.negatives)([pair.example.prompt() for _, pair in pairs], length)
        plans = [Plan((Stream(self.retrieval.prompt(pair.example)),)) for _, pair in pairs]
        own = kit.last_tokens(plans, [pair.targets[0] for _, pair in pairs], site)
        generic = kit.last_tokens(plans, ["" if isinstance(w, UserFailed) else w.text for w in written], site)
        states: list[Fitted | UserFailed] = []
        for number, user in enumerate(users):
            of_user = [i for i, (owner, _) in enumerate(pairs) if owner == number]
            both = [(p, n) for i in of_user if (p := own[i]) is not None and (n := generic[i]) is not None]
            meta: dict[str, Any] = {"layer": site.layer, "items": len(both), "left_out": len(of_user) - len(both)}
            if both:
                vector = _direction([p for p, _ in both], [n for _, n in both], self.direction)
                states.append(Fitted({"vector": vector.float()}, {**meta, "norm": float(vector.norm())}))
            elif of_user:
                failure = next(
                    (w for i in of_user if isinstance(w := written[i], UserFailed)), "no pair fits the context"
                )
                states.append(UserFailed(f"style_vector: user {user.id!r}: {failure}"))
            else:
                states.append(Fitted(meta=meta, notes=("the history gives no pairs, so there is no style vector",)))
        return states

    def plan(self, example: Example, shared: Fitted | None, personal: Fitted | None) -> Plan:
        edits: tuple[AddVector, ...] = ()
        if personal is not None and personal.tensors:
            site, vector = Site(personal.meta["layer"], "block_out"), personal.tensors["vector"]
            edits = tuple(AddVector(site, vector, self.strength, where) for where in _WHERE[self.positions])
        return Plan((Stream(self.retrieval.prompt(example), edits),))

    def analysis(self, shared: Fitted | None, personal: Mapping[str, Fitted]) -> Mapping[str, Any]:
        """How long the vectors are, how many items they rest on, and how alike two users' are (mean cosine)."""
        import torch

        made = [state for state in personal.values() if state.tensors]
        if not made:
            return {}
        vectors = torch.stack([state.tensors["vector"] for state in made])
        total = torch.nn.functional.normalize(vectors, dim=-1).sum(dim=0)
        count = len(made)
        alike = (float(total @ total) - count) / (count * (count - 1)) if count > 1 else None
        items = sum(state.meta["items"] for state in made) / count
        return {"users": count, "items": items, "norm": float(vectors.norm(dim=-1).mean()), "mean_cosine": alike}

    def neutral(self) -> Self:
        return replace(self, strength=0.0)


def _direction(own: Sequence[Tensor], generic: Sequence[Tensor], kind: Direction) -> Tensor:
    """s [D] in float64 from a+ and a-; `logistic` and `pca` have length 1 and point the way the mean does."""
    import torch

    positive, negative = torch.stack(list(own)).double().cpu(), torch.stack(list(generic)).double().cpu()
    mean = (positive - negative).mean(dim=0)
    if kind == "mean":
        return mean
    if kind == "pca":
        found = torch.linalg.svd(positive - negative, full_matrices=False).Vh[0]
        return found if found @ mean >= 0 else -found
    from sklearn.linear_model import LogisticRegression

    labels = [1] * len(positive) + [0] * len(negative)
    weights = LogisticRegression(max_iter=1000).fit(torch.cat([positive, negative]).numpy(), labels).coef_[0]
    found = torch.from_numpy(weights).double()
    return found / found.norm().clamp_min(1e-12)
