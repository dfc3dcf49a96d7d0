"""Differential Preference Steering: contrast a model with itself without its preference heads.

Paper: Zhang et al., Preference Heads in Large Language Models, eqs. 3-9. A head's Preference Contribution Score (PCS)
is the rise of the reference answer's mean token NLL when the head is masked (eq. 4); the K heads of highest PCS are the
preference heads (eq. 5); decoding uses (1 + gamma) l_pref - gamma l_gen (eq. 8), l_gen with those heads masked. With
`clusters`, users are grouped by their profiles, each group has heads of its own with weights (positive part of the PCS,
the best head 1), a user is routed to the groups, and a head's output is scaled by 1 - weight (section 5, algorithm 1).
Code read: weixuzhang/DPS@5bbe129. Differs from that code, which is preset `released` for its decoding:
- Masked means what the paper says: the head's output is zero (`zero`, at the input of the output projection). Upstream
  decodes with the query zeroed (`uniform` attention) and detects heads by zeroing slices of the projection's output,
  which are residual coordinates and no heads.
- Discovery uses the operator, the prompt and the positions of decoding, on the train split, with a seeded sample.
- gamma is a constant (eq. 8); upstream has none and uses the entropy of the unmasked distribution (`gamma=entropy`).
- Clusters are of users; upstream clusters examples, and measures PCS on golds of the evaluated split.
- An empty or useless head set is an error, not a silent fall-back to greedy decoding.
The paper states neither K, gamma, the number of clusters nor a temperature; K = 4 % of all heads is upstream's, gamma =
0.5 and temperature = 0.1 are ours (upstream's 1.0 makes soft routing of normalised embeddings nearly uniform; the
record says how many clusters a user effectively has).
"""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, get_args

from harness.data import Example, Labelled, User
from harness.errors import HarnessError, UsageError
from harness.fit.heads import Detection, Head, Operator, file_identity, mask, read_heads
from harness.fit.profiles import encoder_identity
from harness.method import Fitted, Kit, Method
from harness.mix import Contrast, EntropyContrast
from harness.plan import ALL, DECODE, Plan, Stream, Where
from harness.plugins.options import Draw, Finite

if TYPE_CHECKING:
    from torch import Tensor


Control = Literal["none", "random_heads", "random_mask"]
SCREENED_ABOVE = 100
"""Heads of a model above which `screen=auto` measures some of them."""

_NARROW = (
    "dps: a preference head stood at place {} of the {} that screening chose, so others may have been missed; measure more "
    "(--set screen=...)"
)
_USELESS = (
    "dps: in {} of {} clusters masking no head raises the loss of the references, so a user of these alone is answered "
    "without a contrast; use more train examples (--set samples=...) or fewer clusters"
)
_UNSTABLE = (
    "dps: the head ranking is unstable (mean split-half Spearman {:.2f}); use more train examples (--set samples=...)"
)


@dataclass(frozen=True)
class DPS(Method):
    """Contrast with the model's own preference heads masked."""

    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "released": {
            "gamma": "entropy",
            "discover_operator": "uniform",
            "decode_operator": "uniform",
            "temperature": 1.0,
        },
    }

    decode_only: ClassVar[frozenset[str]] = frozenset(
        {"gamma", "heads", "decode_operator", "routing", "temperature", "control", "draw"}
    )
    grouping: ClassVar[frozenset[str]] = frozenset({"clusters", "embedding", "profile_encoder"})

    gamma: Finite | Literal["entropy"] = 0.5
    """Personalization strength (eq. 8), >= 0, or `entropy`: the entropy of the unmasked distribution in nats."""
    heads: int | None = None
    """K, the number of preference heads; by default 4 % of all heads, at least one."""
    samples: int = 50
    """Train examples whose references measure PCS, a seeded draw."""
    screen: int | Literal["auto", "all", "bound"] | None = "auto"
    """Heads whose PCS is measured: `all`, which head maps need; N, those of largest first-order estimate; or `bound`, in their
    order until no other can be among the best by the worst underestimations seen, which is no proof (see
    `harness.fit.screening`). `auto` is `all` up to 100 heads, `bound` above where heads are masked while decoding."""
    heads_file: str | None = None
    """A published head file for this model (see `harness.fit.heads`), read instead of measuring PCS."""
    scope: Literal["decode", "all"] = "decode"
    """Positions masked: from the last prompt token on, as the shared prefill implies, or everywhere."""
    discover_operator: Detection = "zero"
    """What PCS masks. `output_slice` is an ablation: what the released detection zeroes, which is no head."""
    decode_operator: Operator = "zero"
    clusters: int = 0
    """Groups of users with heads of their own; 0 is one head set for everyone, masked whole."""
    embedding: Literal["tfidf", "minilm"] = "tfidf"
    """What profiles are compared by (see `harness.fit.profiles`)."""
    routing: Literal["soft", "hard"] = "soft"
    """A user's clusters: all, by softmax(-distance / temperature), or the nearest one."""
    temperature: Finite = 0.1
    control: Control = "none"
    """Instead of the preference heads as many random ones: others, one draw a run, or any, a new draw an example."""
    draw: Draw = 0
    """Which draw of the control."""

    def __post_init__(self) -> None:
        if self.gamma != "entropy" and self.gamma < 0:
            raise UsageError(f"dps: gamma {self.gamma} is negative; allowed: gamma >= 0, or 'entropy'")
        if self.heads is not None and self.heads < 1:
            raise UsageError(f"dps: heads {self.heads} masks nothing; allowed: heads >= 1")
        if self.samples < 2:
            raise UsageError(f"dps: samples {self.samples} is too few to rank heads; allowed: samples >= 2")
        chosen = self.screen if self.screen not in ("auto", "all") else None
        if chosen is not None and self.discover_operator == "output_slice":
            raise UsageError(
                "dps: screen estimates what masking heads does, and output_slice masks none; drop one of them"
            )
        if self.clusters < 0 or not self.temperature > 0:
            raise UsageError(f"dps: clusters {self.clusters}, temperature {self.temperature}; allowed: >= 0, > 0")
        if self.heads_file and (self.clusters or chosen):
            raise UsageError("dps: heads_file is one ranked head set; it cannot be used with clusters or screen")
        if isinstance(self.screen, int) and self.screen < (self.heads or 1):
            raise UsageError(f"dps: screen {self.screen} is too few; allowed: screen >= heads, and >= 1")

    def options(self) -> dict[str, Any]:
        """As ever, but the heads file by name and content, which decide the numbers and are the same everywhere, and no
        screening as None: as records said it before there was any."""
        file = file_identity(self.heads_file) if self.heads_file else None
        encoder = {"profile_encoder": encoder_identity()} if self.clusters and self.embedding == "minilm" else {}
        return {
            **super().options(),
            "heads_file": file,
            "screen": None if self.screen in ("auto", "all") else self.screen,
            **encoder,
        }

    def decided(self, heads: int) -> Self:
        if self.screen != "auto":
            return self
        measured = self.discover_operator != "output_slice" and self.heads_file is None
        screened = heads > SCREENED_ABOVE and measured and self.scope == "decode"
        return replace(self, screen="bound" if screened else "all")

    def fit_reads(self) -> frozenset[str]:
        return frozenset({"heads"}) if self.screen == "bound" else frozenset()

    def needs_train(self) -> bool:
        return self.heads_file is None

    def fit(self, kit: Kit, train: Sequence[Labelled]) -> Fitted:
        """PCS of the heads on a seeded sample: tensor `pcs` [samples, layers, heads] in nats per token (eq. 4).

        With `screen` it is NaN for heads that were not measured, and `screened` has the estimates of all.
        """
        sites = kit.sites
        screen = self.decided(sites.layers * sites.heads).screen
        if self.heads_file is not None:
            found = read_heads(self.heads_file, sites.layers, sites.heads)
            heads = [list(head) for head in found.heads]
            shape = {"head_dim": sites.head_dim, "layers": sites.layers, "heads_a_layer": sites.heads}
            return Fitted(
                meta={**shape, "heads": heads, "scores": list(found.scores), "file": Path(self.heads_file).name}
            )
        measured = [(layer, head) for layer in range(sites.layers) for head in range(sites.heads)]
        wanted = self._count(len(measured))  # what cannot be masked is said before anything is measured
        if isinstance(screen, int) and screen < wanted:
            raise UsageError(f"dps: screen {screen} is fewer than the {wanted} heads to mask; give screen >= heads")
        if self.discover_operator == "output_slice" and sites.heads * sites.head_dim != sites.width:
            raise UsageError(
                f"dps: output_slice cuts the residual stream into {sites.heads} slices of {sites.head_dim}; this model's "
                f"has {sites.width} coordinates; give discover_operator=zero or uniform"
            )
        sample = kit.sample(train, self.samples)
        users = [item.example.user for item in sample]
        groups = self._groups(kit, train, users)
        plans = [Plan((Stream(self.retrieval.prompt(item.example)),)) for item in sample]
        targets = [item.reference for item in sample]

        def rises(heads: Sequence[Head]) -> Tensor:
            """Of each sample's loss where each head alone is masked, [samples, heads] (eq. 4)."""
            masks = [mask({head: 0.0}, self.discover_operator, sites.head_dim, self._where()) for head in heads]
            losses = kit.losses(plans, targets, [(), *masks], label="head discovery (PCS)")
            return losses[:, 1:] - losses[:, :1]

        tensors: dict[str, Tensor] = dict(groups.tensors)
        screened: dict[str, Any] = {}
        by_cluster = self._samples_by_cluster(groups)
        with contextlib.ExitStack() as kept:
            if screen not in ("all", None):
                from harness.fit.kit import whole

                assert self.discover_operator != "output_slice"
                kept.enter_context(whole(kit).prompts_kept())
                estimates = whole(kit).screen(plans, targets, self.discover_operator, self._where())
                tensors["screened"] = estimates
                if isinstance(screen, int):
                    measured = whole(kit).shortlist(estimates, screen, by_cluster)
            if screen == "bound":
                found_best = whole(kit).until_sure(estimates, wanted, by_cluster, rises)
                pcs, measured = found_best.exact, found_best.measured
                screened["bound"] = {"best": wanted, "margin": found_best.margin, "closest": found_best.closest}
            else:
                rise = rises(measured)
                pcs = rise.new_full((len(sample), sites.layers, sites.heads), math.nan)
                layers, heads_in_layer = zip(*measured, strict=True)
                pcs[:, layers, heads_in_layer] = rise
        if "screened" in tensors:
            screened["shortlist"] = [list(head) for head in measured]
        tensors["pcs"] = pcs
        ranking = kit.rank(pcs)
        return Fitted(
            tensors=tensors,
            meta={
                "heads": [list(head) for head in ranking.heads],
                "scores": ranking.scores,
                "head_dim": sites.head_dim,
                "layers": sites.layers,
                "heads_a_layer": sites.heads,
                "split_half_spearman": ranking.split_half,
                "sample_ids": [item.example.id for item in sample],
                "users": [user.id for user in users],
                **screened,
                **groups.meta,
            },
        )

    def _groups(self, kit: Kit, train: Sequence[Labelled], sampled: Sequence[User]) -> Fitted:
        """Clusters of the train split's users, and the cluster of each sampled one."""
        if not self.clusters:
            return Fitted()
        users = list({item.example.user.id: item.example.user for item in train}.values())
        from harness.fit.kit import whole

        found = whole(kit).cluster(users, self.clusters, self.embedding)
        label = {user.id: cluster for user, cluster in zip(users, found.labels, strict=True)}
        sizes = [found.labels.count(cluster) for cluster in range(self.clusters)]
        meta = {**found.meta, "cluster_of_sample": [label[user.id] for user in sampled], "cluster_users": sizes}
        return Fitted(found.tensors, meta)

    def _places(self, shared: Fitted) -> list[int]:
        """Places of the K best heads in the order of screening, from 1."""
        shortlist = [(layer, head) for layer, head in shared.meta["shortlist"]]
        return [shortlist.index(head) + 1 for head in self._chosen(shared)]

    def _samples_by_cluster(self, fitted: Fitted) -> list[list[int]]:
        """Numbers of the PCS samples of each cluster's users."""
        of = fitted.meta.get("cluster_of_sample", [])
        return [[number for number, c in enumerate(of) if c == cluster] for cluster in range(self.clusters)]

    def adapts(self) -> bool:
        return self.clusters > 0

    def adapt(self, kit: Kit, users: Sequence[User], shared: Fitted | None) -> Sequence[Fitted | None]:
        """Each user's `distances` [clusters] to the clusters' centroids."""
        if not self.clusters or shared is None:
            return [None] * len(users)
        from harness.fit.kit import whole

        return [Fitted({"distances": row}) for row in whole(kit).cluster_distances(users, shared)]

    def review(self, shared: Fitted | None) -> Sequence[str]:
        chosen, scores = self._chosen(shared), shared.meta["scores"] if shared else []
        assert shared is not None
        if scores and not scores[0] > 0:
            raise HarnessError(
                "dps: masking no head raises the loss of the references, so there are no preference heads to contrast "
                "with; use more train examples (--set samples=...), the other operator, or another model"
            )
        lines = []
        idle = sum(score <= 0 for score in scores[: len(chosen)])
        if idle:
            lines.append(f"dps: {idle} of the {len(chosen)} heads have no positive PCS; lower --set heads=...")
        if isinstance(self.screen, int) and max(places := self._places(shared)) > 0.9 * self.screen:
            lines.append(_NARROW.format(max(places), self.screen))
        if shared.meta.get("split_half_spearman", 1.0) < 0.5:
            lines.append(_UNSTABLE.format(shared.meta["split_half_spearman"]))
        if self.clusters:
            sampled = [len(samples) for samples in self._samples_by_cluster(shared)]
            if min(sampled) == 0:
                raise HarnessError(
                    f"dps: no PCS sample falls into cluster {sampled.index(0)}; use more (--set samples=...) or fewer "
                    "clusters (--set clusters=...)"
                )
            if min(sampled) < 10:
                lines.append(f"dps: a cluster's heads rest on {min(sampled)} samples; use more (--set samples=...)")
            weights = self._cluster_weights(shared)
            useless = sum(not each.any() for each in weights)
            if useless:
                lines.append(_USELESS.format(useless, self.clusters))
            elif self.clusters > 1 and all((each == weights[0]).all() for each in weights):
                lines.append(
                    "dps: all clusters have the same heads and weights, so they change nothing; raise --set heads=..."
                )
        return lines

    def analysis(self, shared: Fitted | None, personal: Mapping[str, Fitted]) -> Mapping[str, Any]:
        """What the paper's figures show: heads as [layer, head, value], maps as [layer][head] of PCS in nats per token.

        heads      all that were measured, best first; `k` of them are masked
        controls   which heads are masked and how strongly, discovered or random (Figure 5); with clusters for one user
        pcs, ...   maps, intervals and overlaps (Figures 3, 4 and 7), see `harness.fit.head_maps.describe`
        clusters   what embedded the profiles, sizes, heads and agreement, and how many clusters a user effectively has
        screening  of how many heads PCS was measured exactly, and the places of the K best in the order of screening: a list cut
                   before a place misses its head. Of `bound`: for how many best heads it stopped, the largest margin, and how close
                   the next head's estimate times margin came to the K-th best PCS (1 is as large; seen, not proved)
        """
        from harness.fit.head_maps import describe, rounded

        chosen = self._chosen(shared)
        assert shared is not None
        ranked, scores = shared.meta["heads"], shared.meta["scores"] or [None] * len(shared.meta["heads"])
        found: dict[str, Any] = {
            "k": len(chosen),
            "heads": [[*head, score and rounded(score)] for head, score in zip(ranked, scores, strict=True)],
            "controls": self._control_maps(shared, personal),
        }
        if "pcs" in shared.tensors:
            found |= describe(shared.tensors["pcs"].numpy(), shared.meta["users"], chosen)
        if self.clusters:
            found["clusters"] = self._cluster_analysis(shared, personal)
        if "shortlist" in shared.meta:
            of = shared.meta["layers"] * shared.meta["heads_a_layer"]
            found["screening"] = {"places": self._places(shared), "measured": len(ranked), "of": of}
            if "bound" in shared.meta:
                bound = {name: rounded(value) for name, value in shared.meta["bound"].items()}
                found["screening"] |= {**bound, "guarantee": "empirical"}
        return found

    def _control_maps(self, shared: Fitted, personal: Mapping[str, Fitted]) -> dict[str, list[list[float]]]:
        """By control [layer, head, weight], the weight being what is taken off the head's output."""
        if self.clusters and not personal:
            return {}
        one = next(iter(personal.values()), None)
        found = {}
        for control in get_args(Control):
            with contextlib.suppress(UsageError):  # too few other heads
                scales = replace(self, control=control)._scales("", shared, one)
                found[control] = [[*head, round(1 - scale, 4)] for head, scale in sorted(scales.items())]
        return found

    def _cluster_analysis(self, shared: Fitted, personal: Mapping[str, Fitted]) -> dict[str, Any]:
        """Train users and PCS samples of each cluster, its heads, their Jaccard indices; how evaluated users are routed."""
        import numpy as np

        from harness.fit.head_maps import jaccard, rounded

        weights = [weights.numpy() for weights in self._cluster_weights(shared)]
        sets = np.stack([each.ravel() > 0 for each in weights])
        found: dict[str, Any] = {
            "embedded_by": Path(shared.meta.get("encoder", shared.meta["embedding"])).name,
            "users": shared.meta["cluster_users"],
            "samples": [len(samples) for samples in self._samples_by_cluster(shared)],
            "heads": [[[*at, rounded(each[tuple(at)])] for at in np.argwhere(each > 0).tolist()] for each in weights],
            "jaccard": rounded(jaccard(sets, sets)),
        }
        if personal:
            routed = np.stack([self._routed(state.tensors["distances"]).numpy() for state in personal.values()])
            entropy = -(routed * np.log(np.maximum(routed, 1e-300))).sum(axis=1)
            found["nearest"] = np.bincount(routed.argmax(axis=1), minlength=self.clusters).tolist()
            found["effective"] = {
                "mean": rounded(np.exp(entropy).mean()),
                "quantiles": rounded(np.quantile(np.exp(entropy), (0, 0.25, 0.5, 0.75, 1))),
            }
        return found

    def plan(self, example: Example, shared: Fitted | None, personal: Fitted | None) -> Plan:
        scales = self._scales(example.id, shared, personal)
        assert shared is not None
        prompt = self.retrieval.prompt(example)
        masked = Stream(prompt, mask(scales, self.decode_operator, shared.meta["head_dim"], self._where()))
        mix = EntropyContrast() if self.gamma == "entropy" else Contrast(self.gamma)
        return Plan((Stream(prompt), masked), mix)

    def neutral(self) -> Self:
        return replace(self, gamma=0.0)

    def _scales(self, example: str, shared: Fitted | None, personal: Fitted | None) -> dict[Head, float]:
        """What each head's output is multiplied by in the masked pass; heads left alone are not in it."""
        chosen = self._chosen(shared)
        assert shared is not None
        every = [
            (layer, head) for layer in range(shared.meta["layers"]) for head in range(shared.meta["heads_a_layer"])
        ]
        if self.clusters:
            if personal is None:
                raise HarnessError(f"dps: the user of example {example!r} was not routed to clusters")
            weights = self._weights(shared, personal)
            scales = {head: max(0.0, 1.0 - float(weights[head])) for head in every if weights[head] > 0}
        else:
            scales = dict.fromkeys(chosen, 0.0)
        if self.control == "none":
            return scales
        found = set(scales)
        if self.clusters:  # another cluster's preference heads are no random ones
            found = {head for weights in self._cluster_weights(shared) for head in every if weights[head] > 0}
        pool = every if self.control == "random_mask" else [head for head in every if head not in found]
        if len(pool) < len(scales):
            raise UsageError(f"dps: {len(pool)} other heads are too few for a control of {len(scales)}")
        key = example if self.control == "random_mask" else ""
        return dict(zip(random.Random(f"{self.draw}/{key}").sample(pool, len(scales)), scales.values(), strict=True))

    def _weights(self, shared: Fitted, personal: Fitted) -> Tensor:
        """How strongly each head is suppressed for a user, [layers, heads] in 0..1: clusters' weights by routing."""
        routed = self._routed(personal.tensors["distances"])
        by_cluster = self._cluster_weights(shared)
        total = by_cluster[0].new_zeros(by_cluster[0].shape)
        for weights, share in zip(by_cluster, routed.tolist(), strict=True):
            total += share * weights
        return total

    def _cluster_weights(self, shared: Fitted) -> list[Tensor]:
        """Each cluster's K best heads: the positive part of their PCS, the best one 1; all others 0. [layers, heads]."""
        pcs, found = shared.tensors["pcs"], []
        for samples in self._samples_by_cluster(shared):
            mean = pcs[samples].mean(dim=0).flatten().nan_to_num(nan=-math.inf)
            top = mean.topk(self._count(len(mean)))
            weights = mean.new_zeros(len(mean))
            if top.values[0] > 0:
                weights[top.indices] = top.values.clamp(min=0) / top.values[0]
            found.append(weights.view(pcs.shape[1:]))
        return found

    def _routed(self, distances: Tensor) -> Tensor:
        """A user's share in each cluster, [clusters], summing to 1."""
        if self.routing == "soft":
            return (-distances / self.temperature).softmax(-1)
        nearest = distances.new_zeros(distances.shape)
        nearest[distances.argmin()] = 1
        return nearest

    def _count(self, every: int) -> int:
        count = self.heads or max(1, int(0.04 * every))
        if count > every:
            raise UsageError(f"dps: heads={count} asked for; this model has {every}")
        return count

    def _chosen(self, shared: Fitted | None) -> list[Head]:
        """The K heads of highest PCS, best first (eq. 5)."""
        if shared is None or not shared.meta.get("heads"):
            raise HarnessError("dps: no preference heads were fitted; run 'harness fit --method dps' first")
        ranked = [(int(layer), int(head)) for layer, head in shared.meta["heads"]]
        count = self._count(shared.meta["layers"] * shared.meta["heads_a_layer"])
        if count > len(ranked):
            raise UsageError(f"dps: {count} heads asked for; {len(ranked)} are ranked (--set heads=...)")
        return ranked[:count]

    def _where(self) -> Where:
        return DECODE if self.scope == "decode" else ALL
