"""Which parts of a model carry a persona into its answers: activation patching between two personas on MMLU questions.

Paper: Poonia and Jain, Dissecting Persona-Driven Reasoning in Language Models via Activation Patching, Findings of EMNLP
2025. Its prompts, pairs, metric and choice of questions could not be had, so these are ours: a system prompt with the
persona ("Your persona: good student."), the question as MMLU's, and the logits of the choices where the answer begins.

Of a pair, the first is the clean run, the second the corrupted one. De-noising puts clean activations into the corrupted
run, noising corrupted ones into the clean run (`harness.run.patch_runs`). With d the difference of two logits (`contrast`),
    effect = sum s (d_patched - d_base) / sum |d_source - d_base|,   s = sign(d_source - d_base)
over samples: 0 = nothing changed, 1 = as in the run the activations come from. It is a ratio of means, not a mean of
ratios, since a ratio with a small denominator is noise; and each sample is turned by its sign, since a persona helps on
one question and hurts on another, and their sum alone would vanish. Samples with |d_source - d_base| below `smallest`
are left out and counted, as are pairs whose prompts are not of equal length in tokens: position t of one would not be
position t of the other. A sample is one pair on one question; questions are users, so intervals are clustered by them.

Pairs: tasks/persona_pairs.json; `pairs=FILE` adds groups of the same form, in which {identity} is all that differs:
    {"attitude": {"prompt": "Your persona: {identity} student.", "pairs": [["good", "bad"]]}}
Without `--data` the questions are everyday ones the embedded model knows, their choices a word of each of its personas.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from pydantic import BaseModel

from harness.data import Example, HistoryItem, Labelled, Message, User
from harness.errors import ContextTooLong, DataMissing, UsageError, UserFailed, did_you_mean
from harness.files.json_files import read_json
from harness.plugins.registry import task_class
from harness.statistics import metrics
from harness.statistics.intervals import ratio_intervals
from harness.statistics.metrics import known
from harness.task import TOO_LARGE, GenerationDefaults, Metric, Sample, Selection, System, Task

if TYPE_CHECKING:
    from harness.run.patch_runs import Decision, Patched

MINI = "lamp-mini"
LEAD = "I love "
"""What an answer to an everyday question begins with."""
RUNS = ("clean", "corrupted", "denoised", "noised")
_FORM = '{"GROUP": {"prompt": "Your persona: {identity} student.", "pairs": [["good", "bad"]]}}'
ATTENDING = ("later", "last")
"""Queries whose attention to the identity is read: the mean over all behind it, and the last position."""


@dataclass(frozen=True)
class Pair:
    group: str
    prompt: str
    clean: str
    corrupted: str

    @property
    def key(self) -> str:
        return f"{self.group}/{self.clean}>{self.corrupted}"

    def system(self, identity: str) -> str:
        return self.prompt.replace("{identity}", identity)


class Asked(NamedTuple):
    id: str
    text: str
    choices: tuple[str, ...]
    right: str = ""
    """Empty where no choice is right."""


@dataclass(frozen=True)
class PersonaQuestion:
    """A question under a persona's system prompt."""

    system: str

    def __call__(self, text: str, items: Sequence[HistoryItem], summary: str) -> tuple[Message, ...]:
        return Message("system", self.system), Message("user", text)


class Patching(Task):
    """Which parts of a model carry a persona into its answers (effect of patching them, 0 to 1)."""

    name = "patching"
    default_split = "test"
    reads_model = True

    def __init__(
        self,
        data: str | None = None,
        pairs: str | None = None,
        groups: str = "all",
        subjects: str = "all",
        per_subject: int = 1,
        contrast: Literal["answer", "switch"] | None = None,
        lead: str | None = None,
        smallest: float = 0.1,
        heads: bool = True,
    ) -> None:
        """`contrast=answer`: logit of the right letter minus the mean of the others (default where there is a right one).

        `switch`: of the clean run's choice minus the corrupted run's, on questions where they differ. `lead` is what
        every answer begins with, as in `lead="The answer is "`. `heads=false` patches whole MLPs and attentions alone: of
        30 blocks with 9 heads each that is a fifth of the work.
        """
        if smallest <= 0:
            raise UsageError(
                f"smallest={smallest:g} nats is not valid; allowed: above 0, as what is patched is divided by it"
            )
        self.data = data or os.environ.get("HARNESS_DATA") or MINI
        self.everyday = self.data == MINI
        if self.everyday and contrast == "answer":
            raise UsageError("contrast=answer needs right answers and everyday questions have none; allowed: switch")
        self.contrast = contrast or ("switch" if self.everyday else "answer")
        self.lead = lead if lead is not None else LEAD if self.everyday else ""
        self.smallest = smallest
        self.heads = heads
        self.questions: Task = task_class("mmlu")(
            self.data,  # type: ignore[call-arg]
            subjects,
            per_subject=per_subject,
            users_from="none",
        )
        self.groups, self.file = groups, pairs

    @cached_property
    def pairs(self) -> Mapping[str, Pair]:
        """By key. Raises DataMissing where a file is not there or not whole, UsageError for an unknown group."""
        found = _read(files("harness.tasks") / "persona_pairs.json")
        found |= _read(Path(self.file)) if self.file else {}
        chosen = list(found) if self.groups == "all" else [name.strip() for name in self.groups.split(",")]
        for name in chosen:
            if name not in found:
                raise UsageError(f"patching has no group {name!r}{did_you_mean(name, found)} it has {', '.join(found)}")
        return {pair.key: pair for name in chosen for pair in found[name]}

    def items(self, selection: Selection) -> Sequence[Labelled]:
        return selection.of(self._asked(selection.split))

    def fingerprint(self, selection: Selection) -> str:
        self._check(selection.split)
        questions = list(_everyday(selection.split)) if self.everyday else self.questions.fingerprint(selection)
        pairs = [(pair.key, pair.prompt) for pair in self.pairs.values()]
        return hashlib.sha256(json.dumps([questions, pairs]).encode()).hexdigest()

    def generation(self) -> GenerationDefaults:
        return GenerationDefaults(max_new_tokens=1)

    def describe_data(self) -> str:
        pairs = f"{len(self.pairs)} pairs of personas"
        where = "everyday questions of lamp-mini" if self.everyday else self.questions.describe_data()
        return f"patching: {pairs}; {where}"

    def respond(self, system: System, items: Sequence[Labelled]) -> Iterator[Sample]:
        by_id = {item.example.id: item for item in items}
        self._check_aligned(system, items)

        def run(ids: Sequence[str]) -> list[Sample]:
            return [self._sample(system, by_id[i]) for i in ids]

        for number, i, sample in system.in_batches(list(by_id), run):
            found = sample or Sample(i, by_id[i].example.user.id, error=TOO_LARGE)
            yield replace(found, targets=by_id[i].targets, batch=number)

    def grade(self, sample: Sample) -> Sample:
        if sample.error is not None:
            return sample
        if "chosen" not in sample.extra:
            return replace(sample, parsed="misaligned")
        clean, corrupted = sample.extra["chosen"]
        found = {"disagree": float(clean != corrupted)}
        if sample.targets:
            found["accuracy_clean"] = float(clean in sample.targets)
            found["accuracy_corrupted"] = float(corrupted in sample.targets)
        if "clean" in sample.extra:
            found["swap_nats"] = abs(sample.extra["clean"] - sample.extra["corrupted"])
        return replace(sample, parsed=clean, metrics={**found})

    def aggregate(self, samples: Sequence[Sample]) -> Mapping[str, Metric]:
        """Effects of the first MLP and attention under de-noising, then how much there was to patch."""
        found: dict[str, Metric] = {}
        patched = [sample for sample in samples if "denoised" in sample.extra]
        for name, part in (("mlp", "mlp_out"), ("attention", "attn_out")):
            for positions in ("identity", "all"):
                found[f"first_{name}_{positions}"] = _first(patched, part, positions)
        first = next(iter(found))
        found[first] = replace(found[first], note=self._note(samples))
        for name in ("swap_nats", "disagree", "accuracy_clean", "accuracy_corrupted"):
            having = [sample for sample in samples if name in sample.metrics]
            if having:
                found[name] = metrics.mean(having, name)
        return found

    def analysis(self, samples: Sequence[Sample]) -> Mapping[str, Any]:
        """Matrices for heat maps, each as value, low and high: effects by run, part and positions, and attention.

        `sets` has all samples and each group, `pairs` each pair without its heads. Effects of mlp_out and attn_out are
        lists over blocks, those of heads_out and attention [blocks][heads].
        """
        patched = [sample for sample in samples if "denoised" in sample.extra]
        members = {name: [s for s in patched if s.id.startswith(f"{name}/")] for name in self._groups()}
        checks = [sample.extra["checks"] for sample in patched]
        found: dict[str, Any] = {
            "contrast": self.contrast,
            "smallest_nats": self.smallest,
            "positions": list(patched[0].extra["denoised"]["mlp_out"]) if patched else [],
            "attending": list(ATTENDING),
            "checks_nats": {name: max(check[name] for check in checks) for name in checks[0]} if checks else {},
            "sets": {name: _matrices(some) for name, some in {"all": patched, **members}.items() if some},
            "pairs": {},
        }
        for key in self.pairs:
            own = [sample for sample in samples if sample.id.startswith(f"{key}/")]
            some = [sample for sample in own if "denoised" in sample.extra]
            lengths = next((s.extra["tokens"] for s in own if "tokens" in s.extra), None)
            counts = {"tokens": lengths, "samples": len(own), "aligned": sum("chosen" in s.extra for s in own)}
            found["pairs"][key] = {**counts, **_matrices(some, heads=False)} if some else {**counts, "n": 0}
        return {"patching": found}

    def _groups(self) -> list[str]:
        return list(dict.fromkeys(pair.group for pair in self.pairs.values()))

    def _note(self, samples: Sequence[Sample]) -> str:
        """How many pairs and samples are left out, and why."""
        misaligned = {_pair(s.id) for s in samples if "tokens" in s.extra and "chosen" not in s.extra}
        aligned = [sample for sample in samples if sample.metrics]
        same = sum("clean" not in sample.extra for sample in aligned)
        small = len(aligned) - same - sum("denoised" in sample.extra for sample in aligned)
        asked = {_pair(sample.id) for sample in samples}
        note = f"{len(misaligned)} of {len(asked)} pairs are not token-aligned; of {len(aligned)} aligned samples "
        return note + f"{same} choose the same, {small} swap less than {self.smallest:g} nats"

    def _check(self, split: str) -> None:
        """Raises DataMissing for the train split: a method must not fit on what is patched."""
        if split == "train":
            raise DataMissing(
                "patching has nothing to fit on; name a task that has, as in --fit_task persona:christianity"
            )

    def _asked(self, split: str) -> Iterator[Labelled]:
        self._check(split)
        for question in _everyday(split) if self.everyday else self._mmlu(split):
            choices = tuple(self.lead + choice for choice in question.choices)
            targets = tuple(
                choice for choice, word in zip(choices, question.choices, strict=True) if word == question.right
            )
            for pair in self.pairs.values():
                yield Labelled(
                    Example(
                        f"{pair.key}/{question.id}",
                        User(question.id),
                        question.text,
                        question.text,
                        PersonaQuestion(pair.system(pair.clean)),
                        choices,
                    ),
                    targets,
                )

    def _mmlu(self, split: str) -> Iterator[Asked]:
        for item in self.questions.items(Selection(split)):
            letters = tuple(choice.strip() for choice in item.example.choices)
            yield Asked(item.example.id, item.example.text, letters, item.targets[0].strip())

    def _decisions(self, system: System, example: Example) -> tuple[Decision, Decision]:
        """The clean and the corrupted prompt."""
        from harness.run.patch_runs import decide

        pair = self.pairs[_pair(example.id)]
        corrupted = replace(example, template=PersonaQuestion(pair.system(pair.corrupted)))
        return decide(system, example), decide(system, corrupted)

    def _check_aligned(self, system: System, items: Sequence[Labelled]) -> None:
        """Raises UsageError where no pair is token-aligned. One question shows it for all."""
        from harness.run.patch_runs import identity

        lengths: dict[str, str] = {}
        first: dict[str, Labelled] = {}
        for item in items:
            first.setdefault(_pair(item.example.id), item)
        for item in first.values():
            try:
                prompts = [decision.encoded for decision in self._decisions(system, item.example)]
            except (ContextTooLong, UserFailed):
                return  # the samples say so
            if identity(*prompts) is not None:
                return
            lengths[_pair(item.example.id)] = " and ".join(str(len(prompt.ids)) for prompt in prompts)
        key, tokens = next(iter(lengths.items()))
        raise UsageError(
            f"none of {len(lengths)} pairs of personas is token-aligned for this model, as {key} with prompts of {tokens} "
            "tokens; choose others with --task_set groups=..., or add some of equal length with --task_set pairs=FILE"
        )

    def _sample(self, system: System, item: Labelled) -> Sample:
        """One pair on one question."""
        from harness.run import patch_runs as patching
        from harness.run.system import whole

        example, runner = item.example, whole(system)
        sample, cost, lm = Sample(example.id, example.user.id), runner.decoder.cost, runner.lm
        try:
            decisions = self._decisions(system, example)
        except (ContextTooLong, UserFailed) as error:
            return replace(sample, error=str(error))
        prompts = [decision.encoded for decision in decisions]
        digest, lengths = hashlib.sha256(repr(prompts[0].ids).encode()).hexdigest(), [len(p.ids) for p in prompts]
        sample = replace(sample, prompt_hash=digest[:16], prompt_tokens=max(lengths), extra={"tokens": lengths})
        at = patching.identity(*prompts)
        if at is None:
            return replace(sample, response="", finish="choice")
        logprobs = [patching.unpatched(lm, decision, cost).tolist() for decision in decisions]
        best = [max(range(len(scores)), key=scores.__getitem__) for scores in logprobs]
        chosen = [example.choices[n] for n in best]
        weights = self._weights(item, best)
        d = [sum(w * p for w, p in zip(weights, scores, strict=True)) for scores in logprobs]
        extra: dict[str, Any] = {**sample.extra, "identity": at, "chosen": chosen}
        if any(weights):
            extra |= {"clean": d[0], "corrupted": d[1]}
        sample = replace(sample, response=chosen[0], finish="choice", extra=extra)
        if abs(d[0] - d[1]) < self.smallest or not any(weights):
            return sample
        found = patching.experiment(lm, *decisions, at, cost, heads=self.heads)
        checks = {"denoised": found.denoised.checks(), "noised": found.noised.checks()}
        worst = {name: max(check[name] for check in checks.values()) for name in checks["noised"]}
        allowed = patching.tolerance_nats(lm.model.dtype)
        for name, off in worst.items():
            if not off <= allowed:
                return replace(
                    sample, response=None, error=f"check {name} is off by {off:.3g} nats, allowed: {allowed:g}"
                )
        extra |= {"denoised": _shifts(found.denoised, weights), "noised": _shifts(found.noised, weights)}
        extra |= {"attention": {run: _rounded(found.attention[run]) for run in RUNS}, "checks": worst}
        return replace(sample, extra=extra)

    def _weights(self, item: Labelled, best: Sequence[int]) -> list[float]:
        """Of the choices' logits in d; all 0 where both runs choose the same and `switch` has nothing to compare."""
        choices = item.example.choices
        if self.contrast == "switch":
            return [float(n == best[0]) - float(n == best[1]) for n in range(len(choices))]
        return [1.0 if choice in item.targets else -1 / (len(choices) - 1) for choice in choices]


def _everyday(split: str) -> Iterator[Asked]:
    from harness.tiny import personas

    if split != "test":
        raise UsageError(f"patching has no split {split!r} of everyday questions; it has test")
    words = list(personas.LEXICONS.values())
    for n, question in enumerate(personas.QUESTIONS_EVAL):
        yield Asked(f"everyday/{n:02}", question, tuple(some[n % len(some)] for some in words))


def _pair(id: str) -> str:
    """The key of the pair in a sample's id."""
    return "/".join(id.split("/")[:2])


def _shifts(patched: Patched, weights: Sequence[float]) -> dict[str, dict[str, Any]]:
    """d of the patched run minus that of the unpatched: part -> positions -> by block, or by block and head."""
    w = patched.base.new_tensor(weights)
    found: dict[str, dict[str, Any]] = {}
    for (part, positions), scores in patched.sites.items():
        found.setdefault(part, {})[positions] = _rounded((scores - patched.base) @ w)
    return found


def _rounded(values: Any) -> Any:
    """A tensor as lists, with six decimals: the last bits of a sum say nothing."""
    return np.round(values.double().cpu().numpy(), 6).tolist()


def _effects(patched: Sequence[Sample], run: str, part: str, positions: str) -> tuple[np.ndarray, np.ndarray]:
    """Numerators [N, ...] and denominators [N] of the effect."""
    swaps = np.array([s.extra["clean"] - s.extra["corrupted"] for s in patched])
    sign = np.sign(swaps) if run == "denoised" else -np.sign(swaps)
    shifts = np.array([sample.extra[run][part][positions] for sample in patched])
    return shifts * sign.reshape(-1, *[1] * (shifts.ndim - 1)), np.abs(swaps)


def _first(patched: Sequence[Sample], part: str, positions: str) -> Metric:
    if not patched:
        return Metric(None, 0, note="no sample was patched")
    shifts, swaps = _effects(patched, "denoised", part, positions)
    ends = ratio_intervals(shifts[:, :1], swaps, [sample.user for sample in patched])
    return Metric(float(shifts[:, 0].sum() / swaps.sum()), len(patched), *known([end[0] for end in ends]))


def _matrices(patched: Sequence[Sample], *, heads: bool = True) -> dict[str, Any]:
    users = [sample.user for sample in patched]
    found: dict[str, Any] = {"n": len(patched), "questions": len(set(users))}
    for run in ("denoised", "noised"):
        parts = patched[0].extra[run]
        found[run] = {
            part: {name: _ratios(*_effects(patched, run, part, name), users) for name in parts[part]}
            for part in parts
            if heads or part != "heads_out"
        }
    if heads:
        weights = {run: np.array([sample.extra["attention"][run] for sample in patched]) for run in RUNS}
        ones = np.ones(len(patched))
        found["attention"] = {
            run: {name: _ratios(weights[run][..., n], ones, users) for n, name in enumerate(ATTENDING)} for run in RUNS
        }
    return found


def _ratios(numerators: np.ndarray, denominators: np.ndarray, users: Sequence[str]) -> dict[str, Any]:
    shape = numerators.shape[1:]
    flat = numerators.reshape(len(numerators), -1)
    value = flat.sum(axis=0) / denominators.sum()
    ends = (value, *ratio_intervals(flat, denominators, users))
    return {
        name: np.round(end.reshape(shape), 4).tolist() for name, end in zip(("value", "low", "high"), ends, strict=True)
    }


class _Group(BaseModel):
    prompt: str
    pairs: list[tuple[str, str]]


def _read(path: Any) -> dict[str, list[Pair]]:
    """Groups of a file of pairs."""
    content: dict[str, _Group] = read_json(path, dict[str, _Group], "pairs file", _FORM)
    found = {group: [Pair(group, told.prompt, *pair) for pair in told.pairs] for group, told in content.items()}
    for pair in (pair for pairs in found.values() for pair in pairs):
        if "{identity}" not in pair.prompt or pair.clean == pair.corrupted or pair.key.count("/") > 1:
            raise DataMissing(
                f"pairs file {path}, {pair.key}: a prompt needs {{identity}} in it, and names differ and have no '/'; "
                f"expected {_FORM}"
            )
    return found
