"""Trains low-rank shifts and LoRA adapters of many users at once: each user is some rows of a batch.

Users share no parameters, so their losses add up to one backward pass whose gradients never meet. Parameters are stacked
[U, ...]; every user takes their own steps of AdamW, clipped by their own norm, on the mean loss of their own batch, in an
order drawn for them alone: the result is that of training each user alone, in any order, up to rounding.

The model is frozen, so nothing below the lowest trained block changes: the residual that enters it is computed once for
each lesson and kept over the epochs (the trunk), and the backward pass stops there.

R is a plain parameter in fp32 (see `parameter_stacks`), brought back to orthonormal rows after each step by a QR decomposition. The
usual parametrisation (torch's `orthogonal`, as in pyreft) turns R into zeros at the first step with weight decay.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from harness.engine.model import LanguageModel
from harness.engine.row_edits import RowEdits
from harness.engine.sites import computing
from harness.engine.training.parameter_stacks import digest, retract, seed_of, size, stack
from harness.errors import ContextTooLong, UserFailed
from harness.method import Fitted
from harness.plan import Layout, Site
from harness.training import Adapter, Learner, Lesson, Recipe, Shifts

PASS_TOKENS = {"cpu": 1024, "cuda": 8192}
"""Tokens of one forward and backward pass, padding included; a larger step is several passes."""
TRUNK_BYTES = {"cpu": 4 * 2**30, "cuda": 8 * 2**30}
"""Residuals kept at once; those of further lessons are computed anew in every epoch."""
STATE_BYTES = 4 * 2**30
"""Parameters with gradients and moments of the users who train together."""
BETAS, EPSILON = (0.9, 0.999), 1e-8


def train(
    lm: LanguageModel,
    learners: Sequence[Learner],
    parts: Sequence[Shifts | Adapter],
    recipe: Recipe,
    *,
    seed: int = 0,
    new_tokens: int = 0,
    progress: Callable[[str, int, int], None] = lambda label, done, total: None,
    trunk_bytes: int | None = None,
) -> list[Fitted | UserFailed]:
    """Trains `parts` for each learner: tensors by the parts' names on the CPU, and in `meta` how it went.

    Prompts are cut so that `new_tokens` more fit, as while decoding. A lesson whose input does not fit, or whose answer is
    empty, is left out and counted. A learner whose loss or gradient is not finite stops there, the others go on. A learner
    without lessons gets no tensors. Raises UsageError where a part names a block or module the model does not have.
    """
    exercises = [_exercises(lm, learner, new_tokens) for learner in learners]
    steps = [math.ceil(len(own) / recipe.batch_size) * recipe.epochs for own in exercises]
    found: dict[int, Fitted | UserFailed] = {}
    order = sorted(range(len(learners)), key=lambda number: -steps[number])  # those who still learn stay in front
    most = max(1, STATE_BYTES // (16 * sum(size(lm, part) for part in parts)))
    groups = [order[first : first + most] for first in range(0, len(order), most)]
    total, done = sum(steps[group[0]] for group in groups), 0
    for group in groups:
        school = _School(lm, parts, recipe, seed, trunk_bytes)
        pupils = [_Pupil(learners[number], exercises[number], steps[number]) for number in group]
        start = time.perf_counter()
        states = school.train(pupils, partial(_tell, progress, done, total))
        seconds = time.perf_counter() - start
        tokens = sum(pupil.tokens for pupil in pupils)
        for number, pupil, state in zip(group, pupils, states, strict=True):
            if isinstance(state, Fitted):
                share = pupil.tokens / tokens if tokens else 1 / len(pupils)
                cost = {"prefill_tokens": pupil.tokens, "flops": pupil.flops, "seconds": seconds * share}
                state = replace(state, cost=cost)
            found[number] = state
        done += steps[group[0]]
    progress("training", total, total)
    return [found[number] for number in range(len(learners))]


def _tell(progress: Callable[[str, int, int], None], before: int, total: int, step: int) -> None:
    progress("training", before + step, total)


@dataclass(frozen=True)
class _Exercise:
    """A lesson as token ids: the prompt, then the answer with an end token."""

    lesson: Lesson
    layout: Layout
    ids: tuple[int, ...]
    answer: int
    """Tokens of the answer."""

    @property
    def length(self) -> int:
        """Tokens the model reads: all but the last."""
        return len(self.ids) - 1


def _exercises(lm: LanguageModel, learner: Learner, new_tokens: int) -> list[_Exercise]:
    end = lm.encoder.end_id
    made = []
    for lesson in learner.lessons:
        prompt = lesson.stream.prompt
        answer = lm.encoder.answer(lesson.answer, prompt.render()) if lesson.answer else ()
        if not answer:
            continue
        answer = answer if end is None else (*answer, end)
        try:
            encoded = lm.encoder.encode_within(prompt, lm.max_length - max(new_tokens, len(answer))).encoded
        except ContextTooLong:
            continue
        made.append(_Exercise(lesson, encoded.layout(), (*encoded.ids, *answer), len(answer)))
    return made


@dataclass
class _Pupil:
    """A learner in training."""

    learner: Learner
    exercises: list[_Exercise]
    steps: int
    losses: list[float] = field(default_factory=list)
    """Of each step so far, in nats per answer token."""
    failure: str = ""
    tokens: int = 0
    """Tokens read so far, without padding."""
    flops: float = 0.0

    def batches(self, recipe: Recipe, seed: int) -> list[list[int]]:
        """Numbers of the exercises of each step; every epoch in a new order that no other learner has a part in."""
        size, out = recipe.batch_size, []
        for epoch in range(recipe.epochs):
            order = np.random.Generator(np.random.Philox(seed_of(seed, self.learner.name, epoch)))
            drawn = order.permutation(len(self.exercises)).tolist()
            out += [drawn[first : first + size] for first in range(0, len(drawn), size)]
        return out


@dataclass(frozen=True)
class _Row:
    """One exercise of one pupil in a pass."""

    pupil: int
    number: int
    exercise: _Exercise


class _School:
    """Learners who train together: step s of all of them is one step here."""

    def __init__(
        self,
        lm: LanguageModel,
        parts: Sequence[Shifts | Adapter],
        recipe: Recipe,
        seed: int,
        trunk_bytes: int | None,
    ) -> None:
        self.lm = lm
        self.parts = parts
        self.recipe = recipe
        self.seed = seed
        self.pass_tokens = PASS_TOKENS[lm.device.type]
        self.trunk_bytes = TRUNK_BYTES[lm.device.type] if trunk_bytes is None else trunk_bytes

    def train(self, pupils: list[_Pupil], progress: Callable[[int], None]) -> list[Fitted | UserFailed]:
        """`pupils` come with the longest training first."""
        self.pupils = pupils
        learners = [pupil.learner for pupil in pupils]
        self.stacks = [stack(self.lm, part, learners, self.seed) for part in self.parts]
        self.parameters = [parameter for own in self.stacks for parameter in own.parameters()]
        self.trunk = _Trunk(self.lm, min(own.cut for own in self.stacks), self.trunk_bytes, self._count)
        batches = [pupil.batches(self.recipe, self.seed) for pupil in pupils]
        rates = [self.recipe.rates(pupil.steps) for pupil in pupils]
        with torch.enable_grad():
            for step in range(pupils[0].steps):
                progress(step)
                active = sum(pupil.steps > step for pupil in pupils)
                rows = [
                    _Row(number, index, pupil.exercises[index])
                    for number, pupil in enumerate(pupils[:active])
                    if not pupil.failure
                    for index in batches[number][step]
                ]
                if not rows:
                    break
                losses = self._gradients(rows, active)
                self._update(step, losses, [rates[number][step] for number in range(active)])
        return [self._state(number) for number in range(len(pupils))]

    def _gradients(self, rows: list[_Row], active: int) -> list[float]:
        """The gradient of each pupil's mean loss over their answer tokens, in `grad`; returns those means in nats."""
        while True:
            try:
                return self._attempt(rows, active)
            except torch.OutOfMemoryError:
                longest = max(row.exercise.length for row in rows)
                if self.pass_tokens <= longest:
                    raise
                self.pass_tokens = max(longest, self.pass_tokens // 2)
            torch.cuda.empty_cache()

    def _attempt(self, rows: list[_Row], active: int) -> list[float]:
        for parameter in self.parameters:
            parameter.value.grad = None
        read = Counter[int]()
        for row in rows:
            read[row.pupil] += row.exercise.answer
        tokens = torch.tensor([max(1, read[number]) for number in range(active)], device=self.lm.device)
        sums: Tensor | None = None
        for part in _passes(rows, self.pass_tokens):
            owners = torch.tensor([row.pupil for row in part], device=self.lm.device)
            nll = self._nll(part)
            (nll / tokens[owners]).sum().backward()
            sums = nll.new_zeros(active) if sums is None else sums
            sums.index_add_(0, owners, nll.detach())
        assert sums is not None
        return (sums / tokens).tolist()

    def _nll(self, rows: list[_Row]) -> Tensor:
        """Sum of the answer's token NLL of each row, [R], in nats."""
        lm, longest = self.lm, max(row.exercise.length for row in rows)
        ids = np.zeros((len(rows), longest), dtype=np.int64)
        positions = np.full((len(rows), longest), -1, dtype=np.int64)
        for r, row in enumerate(rows):
            ids[r, : row.exercise.length] = row.exercise.ids[:-1]
            positions[r, : row.exercise.length] = np.arange(row.exercise.length)
        wanted = [
            (r, row.exercise.length - row.exercise.answer + n, token)
            for r, row in enumerate(rows)
            for n, token in enumerate(row.exercise.ids[-row.exercise.answer :])
        ]
        at, columns, targets = torch.tensor(wanted, device=lm.device).unbind(1)
        pupils = [row.pupil for row in rows]
        lowest = self.trunk.cut - 1
        frozen = [[e for e in row.exercise.lesson.stream.edits if e.site.layer >= lowest] for row in rows]
        trained = [tuple(e for own in self.stacks for e in own.edits(pupil)) for pupil in pupils]
        edits = RowEdits(
            [(*a, *b) for a, b in zip(frozen, trained, strict=True)], [row.exercise.layout for row in rows], lm.sites
        )
        edits.at(positions)
        adapters = [row.exercise.lesson.stream.adapters for row in rows]
        with contextlib.ExitStack() as hooks:
            hooks.enter_context(self.trunk.replaced(rows, ids, positions))
            hooks.enter_context(_answers_only(lm, rows, longest))
            hooks.enter_context(lm.sites.hooked(edits.transforms()))
            if any(adapters):
                hooks.enter_context(lm.adapted(adapters))
            for own in self.stacks:
                hooks.enter_context(lm.sites.hooked_modules(own.modules(pupils)))
            hidden = _hidden(lm, ids, positions)
        self._count(rows, 2 * (1 - self.trunk.cut / lm.sizes.layers))  # a forward pass and one back to the activations
        for row in rows:
            self.pupils[row.pupil].tokens += row.exercise.length
            self.pupils[row.pupil].flops += 2 * lm.sizes.head(row.exercise.answer)
        logits = lm.logits(hidden[at.to(hidden.device), columns.to(hidden.device)])
        nll = nn.functional.cross_entropy(logits, targets, reduction="none")
        return nll.new_zeros(len(rows)).index_add(0, at, nll)

    def _count(self, rows: list[_Row], passes: float) -> None:
        """That many passes through all blocks were run over the rows; frozen weights have no gradients to compute."""
        flops = passes * self.lm.sizes.blocks(max(row.exercise.length for row in rows))
        for row in rows:
            self.pupils[row.pupil].flops += flops

    def _update(self, step: int, losses: list[float], rates: list[float]) -> None:
        """One step of AdamW for every pupil who still learns, each clipped by their own norm."""
        active = len(losses)
        gradients = [
            parameter.value.grad[:active]
            if parameter.value.grad is not None
            else torch.zeros_like(parameter.value[:active])
            for parameter in self.parameters
        ]
        device = self.lm.device
        norms = torch.stack([g.flatten(1).double().square().sum(1).to(device) for g in gradients]).sum(0).sqrt()
        for number, (loss, norm) in enumerate(zip(losses, norms.tolist(), strict=True)):
            pupil = self.pupils[number]
            if not pupil.failure and not (math.isfinite(loss) and math.isfinite(norm)):
                what = f"loss is {loss}" if not math.isfinite(loss) else f"gradient's norm is {norm}"
                pupil.failure = f"the {what} at step {step + 1} of {pupil.steps}"
            pupil.losses.append(loss)
        scale = (self.recipe.clip / (norms + 1e-6)).clamp(max=1) if self.recipe.clip else torch.ones_like(norms)
        failed = torch.tensor([bool(pupil.failure) for pupil in self.pupils[:active]], device=device)
        rate = torch.tensor(rates, device=device, dtype=norms.dtype)
        (slow, fast), t = BETAS, step + 1
        with torch.no_grad():
            for parameter, gradient in zip(self.parameters, gradients, strict=True):
                value, mean, square = (x[:active] for x in (parameter.value, parameter.mean, parameter.square))
                each = (-1, *[1] * (value.dim() - 1))
                lr = rate.to(value).view(each)
                gradient = (gradient * scale.to(gradient).view(each)).masked_fill(failed.to(value.device).view(each), 0)
                mean.lerp_(gradient, 1 - slow)
                square.mul_(fast).addcmul_(gradient, gradient, value=1 - fast)
                if parameter.decays:
                    value.mul_(1 - lr * self.recipe.weight_decay)
                value.sub_(lr / (1 - slow**t) * mean / ((square / (1 - fast**t)).sqrt() + EPSILON))
                if parameter.orthonormal:
                    value.copy_(retract(value))

    def _state(self, number: int) -> Fitted | UserFailed:
        pupil = self.pupils[number]
        name = pupil.learner.name
        if pupil.failure:
            return UserFailed(f"training {name!r}: {pupil.failure}; lower the learning rate (--set lr=...)")
        meta: dict[str, Any] = {
            "lessons": len(pupil.exercises),
            "left_out": len(pupil.learner.lessons) - len(pupil.exercises),
            "steps": pupil.steps,
        }
        if not pupil.exercises:
            why = "no pair of the history fits the context" if meta["left_out"] else "the history gives no pairs"
            return Fitted(meta=meta, notes=(f"{why}, so nothing was learnt of them",))
        tensors = {k: v for own in self.stacks for k, v in own.tensors(number).items()}
        per_epoch = len(pupil.losses) // self.recipe.epochs if self.recipe.epochs else 0
        epochs = [pupil.losses[n : n + per_epoch] for n in range(0, len(pupil.losses), per_epoch or 1)]
        meta |= {
            "losses": [sum(own) / len(own) for own in epochs],
            "parameters": sum(tensor.numel() for tensor in tensors.values()),
            "key": digest(tensors),
        }
        for own in self.stacks:
            meta |= own.meta()
        return Fitted(tensors, meta)


class _Trunk:
    """The model below the lowest trained block: blocks 0 to cut - 1, whose output the lessons keep."""

    def __init__(self, lm: LanguageModel, cut: int, room: int, count: Callable[[list[_Row], float], None]) -> None:
        self.lm = lm
        self.count = count
        self.cut = cut
        """Blocks that need not run again; 0 = none."""
        self.room = room
        """Bytes still free for residuals."""
        self.kept: dict[tuple[int, int], Tensor] = {}
        """(pupil, exercise) -> residual leaving block cut - 1, before edits there, [T, D]."""

    @contextlib.contextmanager
    def replaced(self, rows: list[_Row], ids: np.ndarray, positions: np.ndarray) -> Iterator[None]:
        """Within the context a forward pass over the rows begins with the kept residual of block cut - 1."""
        if not self.cut:
            yield
            return
        residual = self._residual(rows, ids, positions)
        blocks = list(self.lm.sites.blocks[: self.cut])
        with computing([*[(block, _pass_on) for block in blocks[:-1]], (blocks[-1], lambda *_, **__: residual)]):
            yield

    def _residual(self, rows: list[_Row], ids: np.ndarray, positions: np.ndarray) -> Tensor:
        """[R, T, D], padded on the right."""
        found = {r: self.kept[key] for r, row in enumerate(rows) if (key := (row.pupil, row.number)) in self.kept}
        new = [r for r in range(len(rows)) if r not in found]
        if new:
            computed = self._compute([rows[r] for r in new], ids[new], positions[new])
            for r, whole in zip(new, computed, strict=True):
                row = rows[r]
                found[r] = whole[: row.exercise.length]
                size = found[r].numel() * found[r].element_size()
                if size <= self.room:
                    self.room -= size
                    found[r] = self.kept[row.pupil, row.number] = found[r].clone()
            if len(new) == len(rows):
                return computed
        return nn.utils.rnn.pad_sequence([found[r] for r in range(len(rows))], batch_first=True)

    @torch.no_grad()
    def _compute(self, rows: list[_Row], ids: np.ndarray, positions: np.ndarray) -> Tensor:
        sites = self.lm.sites
        last = Site(self.cut - 1, "block_out")
        streams = [row.exercise.lesson.stream for row in rows]
        below = [[e for e in stream.edits if e.site.layer < self.cut and e.site != last] for stream in streams]
        edits = RowEdits(below, [row.exercise.layout for row in rows], sites)
        edits.at(positions)
        read: list[Tensor] = []
        transforms = edits.transforms()
        transforms[last] = [read.append]
        adapters = [stream.adapters for stream in streams]
        with contextlib.ExitStack() as hooks:
            hooks.enter_context(computing([(block, _pass_on) for block in sites.blocks[self.cut :]]))
            hooks.enter_context(sites.hooked(transforms))
            if any(adapters):
                hooks.enter_context(self.lm.adapted(adapters))
            _hidden(self.lm, ids, positions)
        self.count(rows, self.cut / self.lm.sizes.layers)
        return read[0]


@contextlib.contextmanager
def _answers_only(lm: LanguageModel, rows: list[_Row], longest: int) -> Iterator[None]:
    """Within the context the last block's MLP and output projection run where the answers are predicted, elsewhere give 0.

    Nothing above them mixes positions. Each row keeps as many, its last ones, so that adapters inside see rows.
    """
    kept = max(row.exercise.answer for row in rows)
    starts = [max(0, row.exercise.length - kept) for row in rows]
    window = torch.tensor(starts, device=lm.device)[:, None] + torch.arange(kept, device=lm.device)

    def at(module: nn.Module) -> Callable[[Tensor], Tensor]:
        forward = module.forward

        def run(x: Tensor) -> Tensor:
            index = window.to(x.device)[..., None]
            y = forward(x.gather(1, index.expand(-1, -1, x.shape[-1])))
            return y.new_zeros(*x.shape[:2], y.shape[-1]).scatter(1, index.expand_as(y), y)

        return run

    family, last = lm.sites.family, lm.sites.blocks[-1]
    modules = [last.get_submodule(name) for name in (family.mlp, family.output_projection)]
    with computing([(module, at(module)) for module in modules] if kept < longest else []):
        yield


def _pass_on(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
    return hidden


def _hidden(lm: LanguageModel, ids: np.ndarray, positions: np.ndarray) -> Tensor:
    device = lm.device
    return lm.hidden(
        torch.from_numpy(ids).to(device),
        mask=torch.from_numpy((positions >= 0).astype(np.int64)).to(device),
        positions=torch.from_numpy(positions).to(device),
    )


def _passes(rows: list[_Row], tokens: int) -> list[list[_Row]]:
    """Rows of like length together, at most `tokens` in a pass: none is padded by more than a quarter and 16 tokens."""
    out: list[list[_Row]] = []
    longest = 0
    for row in sorted(rows, key=lambda row: -row.exercise.length):
        length = row.exercise.length
        if not out or (len(out[-1]) + 1) * longest > tokens or longest - length > max(16, longest // 4):
            out.append([])
            longest = length
        out[-1].append(row)
    return out
