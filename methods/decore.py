"""DeCoRe: contrast a model with itself without its retrieval heads.

Paper: Gema et al., DeCoRe: Decoding by Contrasting Retrieval Heads to Mitigate Hallucinations (arXiv 2410.18860):
(1 + alpha) log p_base - alpha log p_masked, alpha the entropy of p_base in nats (`entropy`, the paper's) or a constant
(preset `static`, 0.5). Retrieval heads: Wu et al., ICLR 2025, by needle tests (see `harness.fit.needle`), or from a
published file (`heads_file`, see `harness.fit.heads`).
Code read: aryopg/DeCoRe@d1fa5a9, and its copy in weixuzhang/DPS@5bbe129. `entropy_gain` (entropy of p_masked minus that
of p_base, which may be negative) is in the code only. Differs from that code:
- Masked means what the paper says: the head's output is zero (`zero`). Upstream zeroes the query, so that the head
  attends to everything alike (preset `released`, as `uniform` in `dps`).
- Heads are masked from the last prompt token on in scoring as in generation; upstream scores with the prompt masked too.
- The model's own needle tests, hidden in the train users' histories. A model that answers fewer than two of them has no
  retrieval heads by the test; then the heads that copy from the task's own prompts while the references are read are
  taken, with a warning.
- The control `random_heads` draws heads that are not retrieval heads. Upstream's draws both numbers of a head from the
  count of layers and excludes nothing.
- Prompts are user turns; no smaller amateur model; alpha is not divided by ln V.
The number of heads is upstream's default, 50; the paper tunes it per task from 10 to 100.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self

from harness.data import Example, Labelled
from harness.errors import HarnessError, UsageError
from harness.fit.heads import Head, Operator, file_identity, mask, read_heads
from harness.method import Fitted, Kit, Method
from harness.mix import Contrast, EntropyContrast
from harness.plan import DECODE, Plan, Stream
from harness.plugins.options import Draw, Finite, Many

_COPYING = (
    "decore: the model answered {answered} of {tests} needle tests, so its retrieval heads are unknown; taken are the heads "
    "that copy from the prompt while it reads the references (a published list: --set heads_file=...)"
)


@dataclass(frozen=True)
class DeCoRe(Method):
    """Contrast with the model's own retrieval heads masked."""

    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "released": {"decode_operator": "uniform"},
        "static": {"alpha": 0.5},
        "random": {"control": "random_heads"},
    }

    decode_only: ClassVar[frozenset[str]] = frozenset({"alpha", "cap", "heads", "decode_operator", "control", "draw"})

    alpha: Finite | Literal["entropy", "entropy_gain"] = "entropy"
    """Weight of the contrast: >= 0, or per position the entropy in nats, or what masking adds to the entropy."""
    cap: Finite | None = None
    """Largest weight, where it is an entropy."""
    heads: int | None = None
    """Retrieval heads masked; by default 50, or a tenth of all heads where that is fewer, at least one."""
    heads_file: str | None = None
    """A published head file for this model, read instead of running needle tests."""
    decode_operator: Operator = "zero"
    control: Literal["none", "random_heads"] = "none"
    """Instead of the retrieval heads as many others, drawn at random once a run."""
    draw: Draw = 0
    """Which draw of the control."""
    needle_tokens: int | None = None
    """Tokens of the longest needle test; by default 3,579, as published, or a quarter of a smaller context."""
    depths: Many = 10
    """Places of a needle in its text."""
    samples: int = 50
    """Train examples read where needle tests find nothing, a seeded draw."""

    def __post_init__(self) -> None:
        if isinstance(self.alpha, float | int) and self.alpha < 0:
            raise UsageError(f"decore: alpha {self.alpha} is negative; allowed: alpha >= 0, 'entropy', 'entropy_gain'")
        if self.cap is not None and self.cap < 0:
            raise UsageError(f"decore: cap {self.cap} is negative; allowed: cap >= 0")
        for name in ("heads", "needle_tokens", "depths", "samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"decore: {name} {value} is not valid; allowed: {name} >= 1")

    def options(self) -> dict[str, Any]:
        """As ever, but the heads file by name and content, which decide the numbers and are the same everywhere."""
        options = super().options()
        return {**options, "heads_file": file_identity(self.heads_file) if self.heads_file else None}

    def needs_train(self) -> bool:
        return self.heads_file is None

    def fit(self, kit: Kit, train: Sequence[Labelled]) -> Fitted:
        """All heads, best first: tensor `scores` [runs, layers, heads] by test, sample or file, where there is any."""
        from harness.fit.kit import whole
        from harness.fit.needle import copying_scores, needle_scores

        sites, tools = kit.sites, whole(kit)
        every = {"head_dim": sites.head_dim, "layers": sites.layers, "heads_a_layer": sites.heads}
        if self.heads_file is not None:
            found = read_heads(self.heads_file, sites.layers, sites.heads)
            made_by = {"source": "file", "file": file_identity(self.heads_file)}
            heads = [list(head) for head in found.heads]
            return Fitted(meta={**every, **made_by, "heads": heads, "scores": list(found.scores)})
        texts = [record.document for item in train for record in item.example.user.history]
        needles = needle_scores(tools, texts, tokens=self.needle_tokens, depths=self.depths)
        scores, source = needles.scores, "needles"
        if len(scores) < 2:
            sample = kit.sample(train, self.samples)
            plans = [Plan((Stream(self.retrieval.prompt(item.example)),)) for item in sample]
            scores, source = copying_scores(tools, plans, [item.reference for item in sample]), "references"
        ranking = kit.rank(scores)
        return Fitted(
            tensors={"scores": scores},
            meta={
                **every,
                "source": source,
                "needle_tests": needles.tests,
                "answered": len(needles.scores),
                "heads": [list(head) for head in ranking.heads],
                "scores": ranking.scores,
                "split_half_spearman": ranking.split_half,
            },
        )

    def review(self, shared: Fitted | None) -> Sequence[str]:
        chosen, meta = self._chosen(shared), shared.meta if shared else {}
        scores = meta["scores"]
        if scores and not scores[0] > 0:
            raise HarnessError(
                "decore: no head copies from the text, so there are no retrieval heads to contrast with; give a published "
                "list (--set heads_file=...) or another model"
            )
        lines = []
        if meta["source"] == "references":
            lines.append(_COPYING.format(answered=meta["answered"], tests=meta["needle_tests"]))
        idle = sum(score <= 0 for score in scores[: len(chosen)])
        if idle:
            lines.append(f"decore: {idle} of the {len(chosen)} heads never copy; lower --set heads=...")
        return lines

    def analysis(self, shared: Fitted | None, personal: Mapping[str, Fitted]) -> Mapping[str, Any]:
        """`heads`: all that are ranked as [layer, head, score], best first; the `k` best are the retrieval heads."""
        from harness.fit.head_maps import rounded

        chosen = self._chosen(shared)
        assert shared is not None
        ranked, scores = shared.meta["heads"], shared.meta["scores"] or [None] * len(shared.meta["heads"])
        found = [[*head, score and rounded(score)] for head, score in zip(ranked, scores, strict=True)]
        return {"k": len(chosen), "heads": found}

    def plan(self, example: Example, shared: Fitted | None, personal: Fitted | None) -> Plan:
        heads = self._masked(shared)
        assert shared is not None
        prompt = self.retrieval.prompt(example)
        edits = mask(dict.fromkeys(heads, 0.0), self.decode_operator, shared.meta["head_dim"], DECODE)
        return Plan((Stream(prompt), Stream(prompt, edits)), self._mix())

    def neutral(self) -> Self:
        return replace(self, alpha=0.0)

    def _mix(self) -> Contrast | EntropyContrast:
        if isinstance(self.alpha, str):
            return EntropyContrast(self.cap, gain=self.alpha == "entropy_gain")
        return Contrast(self.alpha)

    def _chosen(self, shared: Fitted | None) -> list[Head]:
        """The retrieval heads, best first."""
        if shared is None or not shared.meta.get("heads"):
            raise HarnessError("decore: no retrieval heads were fitted; run 'harness fit --method decore' first")
        ranked = [(int(layer), int(head)) for layer, head in shared.meta["heads"]]
        every = shared.meta["layers"] * shared.meta["heads_a_layer"]
        count = self.heads or min(50, max(1, every // 10), len(ranked))
        if count > len(ranked):
            raise UsageError(f"decore: heads={count} asked for; {len(ranked)} are ranked, of this model's {every}")
        return ranked[:count]

    def _masked(self, shared: Fitted | None) -> list[Head]:
        chosen = self._chosen(shared)
        if self.control == "none":
            return chosen
        assert shared is not None
        layers, heads, taken = shared.meta["layers"], shared.meta["heads_a_layer"], set(chosen)
        others = [(layer, head) for layer in range(layers) for head in range(heads) if (layer, head) not in taken]
        if len(others) < len(chosen):
            raise UsageError(f"decore: {len(others)} other heads are too few for a control of {len(chosen)}")
        return random.Random(str(self.draw)).sample(others, len(chosen))
