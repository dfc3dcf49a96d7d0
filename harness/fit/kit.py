"""What the engine lends a method while it fits and adapts: the model, writers, variant losses, rankings, progress.

`ModelKit` keeps the promise of `harness.method.Kit`, which is what a method's signature names. What it has beyond that (the model
itself, screening, clusters, checkpoints) serves the ways of fitting in this folder; `whole(kit)` gives a method that uses them
all of it.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from harness.data import Labelled, Prompt, User
from harness.engine.capture import capture
from harness.engine.decode import Decoder
from harness.engine.loading import load_model
from harness.engine.machine import attempt, room_to_keep
from harness.engine.model import LanguageModel
from harness.engine.prompt_variants import ROW_TOKENS, Beginnings, score_variants
from harness.engine.rows import Request
from harness.engine.sites import Sites
from harness.engine.training.train import train
from harness.engine.weights.adapters import read_adapter
from harness.errors import ContextTooLong, DataMissing, HarnessError, UsageError, UserFailed
from harness.files import named
from harness.fit.artifacts import ArtifactStore, Checkpoint
from harness.fit.heads import Head, Operator
from harness.fit.profiles import Embedding, UserClusters, cluster_users, distances
from harness.fit.screening import Screened, first_order, shortlist, until_sure
from harness.fit.writer import ENDPOINT, EndpointWriter, Kept, as_recorded
from harness.method import Fitted, HeadRanking, Kit, Progress, Writer, Written
from harness.plan import GENERATED, Edit, Plan, Site, Stream, Where
from harness.plugins.registry import model_row
from harness.servers.model import ServedModel
from harness.task import TOO_LARGE, Question, Rating, Sample
from harness.training import Adapter, Learner, Recipe, Shifts


@dataclass
class ModelKit:
    """One fit or adapt call's tools. `seed` decides every draw."""

    lm: LanguageModel
    seed: int = 0
    max_new_tokens: int = 0
    """Room the prompts must leave, as while decoding: history is cut exactly as it will be then."""
    progress: Progress = lambda label, done, total: None
    store: ArtifactStore = field(default_factory=ArtifactStore)
    """Where written texts are kept."""
    notes: list[str] = field(default_factory=list)
    """Warnings for the reader of the numbers; kept with the fitted state."""
    checkpoint: Checkpoint | None = None
    """Where a fit keeps the samples it has scored, so that a killed one goes on."""
    to_judge: Callable[[Sample], Mapping[str, Question]] = lambda sample: {}
    """What the task that is fitted on asks a judge of an answer."""

    def __post_init__(self) -> None:
        self._writers: dict[str, Writer] = {}
        self._begun: Beginnings | None = None

    @cached_property
    def decoder(self) -> Decoder:
        return Decoder(self.lm)

    @property
    def sites(self) -> Sites:
        return self.lm.sites

    @property
    def vocabulary(self) -> int:
        return self.lm.vocabulary

    @property
    def end_tokens(self) -> frozenset[int]:
        return frozenset(self.lm.encoder.eos_ids)

    def tokens(self, text: str) -> tuple[int, ...]:
        """Ids of a text that follows other text, without begin and end tokens."""
        return tuple(self.lm.encoder.tokenizer.encode(text, add_special_tokens=False))

    def sample(self, items: Sequence[Labelled], count: int) -> list[Labelled]:
        """`count` items drawn without replacement by the seed, in file order; all of them where there are fewer.

        An item whose input does not fit the context even without history is passed over, as a run cannot answer it
        either; `notes` says how many. Raises HarnessError where none fits.
        """
        chosen: list[int] = []
        passed_over = 0
        for i in np.random.Generator(np.random.Philox(self.seed)).permutation(len(items)).tolist():
            if len(chosen) == count:
                break
            try:
                self.reference(Plan((Stream(items[i].example.prompt()),)), items[i].reference, items[i].example.id)
                chosen.append(i)
            except ContextTooLong:
                passed_over += 1
        if not chosen:
            raise HarnessError(f"none of {len(items)} train examples fits the context of {self.lm.max_length} tokens")
        if passed_over:
            self.notes.append(f"{passed_over} train examples passed over: longer than {self.lm.max_length} tokens")
        return [items[i] for i in sorted(chosen)]

    def draw(self, total: int, count: int) -> list[int]:
        """`count` of the numbers below `total` without replacement, in order; all of them where there are fewer."""
        order = np.random.Generator(np.random.Philox(self.seed)).permutation(total)
        return sorted(order[:count].tolist())

    def rate(self, judge: str, samples: Sequence[Sample]) -> list[dict[str, Rating]]:
        """Ratings of answered samples by the judge called `judge`, by the names of the task's questions.

        Raises UsageError where the task asks a judge nothing, HarnessError where the judge does not answer.
        """
        from harness.judge.judges import open_judge

        asked = [
            (n, name, question) for n, sample in enumerate(samples) for name, question in self.to_judge(sample).items()
        ]
        if not asked:
            raise UsageError(f"judge={judge}: the task that is fitted on asks a judge nothing; leave judge out")
        opened = open_judge(judge, asks={question.asks for _, _, question in asked})
        ratings = opened.rate([question for _, _, question in asked], "fit", self.progress)
        failed = [rating.said for rating in ratings if rating.outcome == "failed"]
        if failed:
            raise HarnessError(f"{judge}: {len(failed)} of {len(ratings)} ratings failed, run again: {failed[0]}")
        found: list[dict[str, Rating]] = [{} for _ in samples]
        for (n, name, _), rating in zip(asked, ratings, strict=True):
            found[n][name] = rating
        return found

    def writer(self, name: str) -> Writer:
        """`self` (the evaluated model), another model's alias, hub id or folder, or `openai/<model>`.

        Another model stays loaded as long as the kit lives. Raises as loading a model does.
        """
        if name not in self._writers:
            self._writers[name] = self._make_writer(name)
        return self._writers[name]

    def _make_writer(self, name: str) -> Writer:
        if name.startswith(ENDPOINT):
            return Kept(EndpointWriter(name), [as_recorded(name)], self.store)
        if name == "self" and isinstance(self.lm, ServedModel):
            served = EndpointWriter(self.lm.endpoint.model, self.lm.endpoint)
            return Kept(served, [self.lm.source], self.store)
        if name != "self":
            other = load_model(model_row(name), device=str(self.lm.device))
            return ModelKit(other, self.seed, progress=self.progress, store=self.store).writer("self")
        weights = self.lm.revision
        return Kept(self._write, [self.lm.name, weights, self.lm.dtype], self.store) if weights else self._write

    def _write(self, prompts: Sequence[Prompt], max_new_tokens: int) -> list[Written | UserFailed]:
        return self.generate([Plan((Stream(prompt),)) for prompt in prompts], max_new_tokens, label="writing profiles")

    def generate(
        self, plans: Sequence[Plan], max_new_tokens: int, *, label: str = "generating"
    ) -> list[Written | UserFailed]:
        """One greedy response a plan, prompts of like length in one batch. A failure stands in its response's place.

        It fails where the prompt does not fit the context, where none of its history does, and where nothing is written.
        """
        found: dict[int, Written | UserFailed] = {}
        requests: dict[int, Request] = {}
        for number, plan in enumerate(plans):
            try:
                requests[number] = self.decoder.prepare(str(number), plan, max_new_tokens)
            except ContextTooLong as error:
                found[number] = UserFailed(f"{self.lm.name} wrote nothing: {error}")
                continue
            prompt = requests[number].prompts[0]
            if prompt.dropped and not prompt.items:
                found[number] = UserFailed(f"{self.lm.name} wrote nothing: no history item fits its context")
                del requests[number]
        waiting, most = sorted(requests, key=lambda number: requests[number].tokens), len(plans)
        while waiting:
            self.progress(label, len(found), len(plans))
            longest = requests[waiting[-1]]
            row_tokens = len(longest.plan.streams) * (longest.tokens + max_new_tokens)
            size = min(most, max(1, ROW_TOKENS[self.lm.device.type] // row_tokens))
            batch = waiting[-size:]
            start, before = time.perf_counter(), self.decoder.cost.flops
            some = [requests[number] for number in batch]
            answers = attempt(partial(self.decoder.generate, some, max_new_tokens=max_new_tokens))
            if answers is None and len(batch) > 1:
                most = len(batch) // 2
                continue
            del waiting[-len(batch) :]
            if answers is None:
                found[batch[0]] = UserFailed(f"{self.lm.name} wrote nothing: {TOO_LARGE}")
                continue
            flops, seconds = self.decoder.cost.flops - before, time.perf_counter() - start
            share = {"flops": flops / len(batch), "seconds": seconds / len(batch)}
            for number, answer in zip(batch, answers, strict=True):
                prompt, text = requests[number].prompts[0], answer.text.strip()
                cost = {"prefill_tokens": requests[number].tokens, "decode_tokens": len(answer.ids), **share}
                found[number] = (
                    Written(text, prompt.items, prompt.dropped, cost)
                    if text
                    else UserFailed(f"{self.lm.name} wrote nothing: its answer is empty")
                )
        self.progress(label, len(plans), len(plans))
        return [found[number] for number in range(len(plans))]

    def losses(
        self,
        plans: Sequence[Plan],
        targets: Sequence[str],
        variants: Sequence[Sequence[Edit]],
        *,
        label: str = "scoring variants",
    ) -> Tensor:
        """Mean token NLL in nats of each target after its plan's first stream under each variant's edits: [n, V] float64.

        The stream's own edits and adapters are there under each variant. Raises HarnessError where a prompt does not fit the
        context: no sample is dropped silently.
        """
        pairs = list(zip(plans, targets, strict=True))

        def score(number: int) -> Tensor:
            plan, target = pairs[number]
            request, answer = self.reference(plan, target, f"{label}: sample {number}")
            first = plan.streams[0]
            edited = [(*first.edits, *v) for v in variants]
            # what is kept of beginnings is what the model makes of them without adapters
            begun = None if first.adapters else self._begun
            with self.lm.adapted([first.adapters]) if first.adapters else contextlib.nullcontext():
                scores = score_variants(self.lm, request.prompts[0].encoded, answer, edited, begun)
            return -scores.double().mean(dim=1).cpu()

        return self._by_sample(label, _said(variants), pairs, score)

    def screen(
        self,
        plans: Sequence[Plan],
        targets: Sequence[str],
        operator: Operator,
        where: Where,
        *,
        label: str = "screening heads",
    ) -> Tensor:
        """First-order estimates of what masking each head alone adds to `losses`: [n, layers, H] float64.

        For the unedited model with each plan's first prompt (see `harness.fit.screening`). Raises as `losses` does.
        """
        pairs = list(zip(plans, targets, strict=True))

        def estimate(number: int) -> Tensor:
            plan, target = pairs[number]
            request, answer = self.reference(plan, target, f"{label}: sample {number}")
            return first_order(self.lm, request.prompts[0].encoded, answer, operator, where, self._begun)

        return self._by_sample(label, f"first order, {operator}, {where}", pairs, estimate)

    def shortlist(self, estimates: Tensor, count: int, groups: Sequence[Sequence[int]] = ()) -> list[Head]:
        """The heads to measure after `screen`, an equal share for each group of samples (see `harness.fit.screening`)."""
        return shortlist(estimates, count, groups)

    def until_sure(
        self,
        estimates: Tensor,
        best: int,
        groups: Sequence[Sequence[int]],
        measure: Callable[[list[Head]], Tensor],
    ) -> Screened:
        """Exact scores of as many heads as it takes for the `best` to be right (see `harness.fit.screening`)."""
        return until_sure(estimates, best, groups, measure)

    @contextlib.contextmanager
    def prompts_kept(self) -> Iterator[None]:
        """While it lasts, `losses` and `screen` run the beginning of each prompt once, as far as memory holds them."""
        self._begun = Beginnings(self.lm, room_to_keep(self.lm))
        try:
            yield
        finally:
            self._begun = None

    def _by_sample(
        self, label: str, what: str, pairs: Sequence[tuple[Plan, str]], score: Callable[[int], Tensor]
    ) -> Tensor:
        """score(0) to score(len(pairs) - 1), stacked. A sample that another fit had finished is read from its checkpoint.

        A part is named by what is scored, its number, and the first stream and the answer it is scored on: a fit that scores the
        same items under several prompts or vectors finds none of one under another.
        """
        rows = []
        count = len(pairs)
        for number, (plan, target) in enumerate(pairs):
            first = plan.streams[0]
            under = _said(first.edits) + (_said(first.adapters) if first.adapters else "")
            named = f"{what}\0{first.prompt.render()!r}\0{under}\0{target}"
            part = f"{hashlib.sha256(named.encode(errors='replace')).hexdigest()[:16]}-{number}"
            row = self.checkpoint.get(part) if self.checkpoint else None
            if row is None:
                self.progress(label, number, count)
                start = time.perf_counter()
                row = score(number)
                if self.checkpoint:
                    self.checkpoint.put(part, row, time.perf_counter() - start)
            rows.append(row)
        self.progress(label, count, count)
        return torch.stack(rows)

    def reference(self, plan: Plan, target: str, label: str) -> tuple[Request, tuple[int, ...]]:
        """A train plan with the ids of its reference answer. Raises ContextTooLong where they do not fit the context
        without any history, HarnessError where the reference is empty."""
        answer = self.lm.encoder.answer(target, plan.streams[0].prompt.render())
        if not answer:
            raise HarnessError(f"{label} has an empty reference")
        try:
            return self.decoder.prepare(label, plan, max(self.max_new_tokens, len(answer))), answer
        except ContextTooLong as error:
            raise ContextTooLong(f"{label}: {error}") from error

    def last_tokens(self, plans: Sequence[Plan], texts: Sequence[str], site: Site) -> list[Tensor | None]:
        """The activation at the last token of each text, read after its plan's prompt under the first stream: [D].

        None where the text is empty, or where the prompt does not fit before it.
        """
        asked: dict[int, tuple[Request, tuple[int, ...]]] = {}
        for number, (plan, text) in enumerate(zip(plans, texts, strict=True)):
            ids = self.lm.encoder.answer(text, plan.streams[0].prompt.render()) if text else ()
            with contextlib.suppress(ContextTooLong):
                if ids:
                    asked[number] = self.decoder.prepare(str(number), plan, max(self.max_new_tokens, len(ids))), ids
        found: list[Tensor | None] = [None] * len(plans)
        numbers, done = list(asked), 0
        lengths = [request.tokens + len(ids) for request, ids in asked.values()]
        for batch in by_length(lengths, ROW_TOKENS[self.lm.device.type]):
            self.progress("reading activations", done, len(numbers))
            chosen = [asked[numbers[n]] for n in batch]
            read = capture(self.lm, [r for r, _ in chosen], [site], GENERATED, [ids for _, ids in chosen])
            for n, activations in zip(batch, read, strict=True):
                found[numbers[n]] = activations[site][-1]
            done += len(batch)
        self.progress("reading activations", done, len(numbers))
        return found

    def train(
        self, learners: Sequence[Learner], parts: Sequence[Shifts | Adapter], recipe: Recipe
    ) -> list[Fitted | UserFailed]:
        """Trains `parts` for each learner, all of them together (see `harness.engine.training.train`)."""
        return train(
            self.lm, learners, parts, recipe, seed=self.seed, new_tokens=self.max_new_tokens, progress=self.progress
        )

    def read_adapter(self, folder: str) -> Fitted:
        """The adapter of a PEFT folder (see `harness.engine.weights.adapters`)."""
        return read_adapter(folder, self.lm)

    def read_adapters(self, folder: str, users: Sequence[User]) -> list[Fitted | UserFailed]:
        """Each user's adapter, from the PEFT folder of their id in `folder` (see `harness.files.named`); that of whose history
        they have."""
        found: list[Fitted | UserFailed] = []
        for user in users:
            try:
                found.append(read_adapter(named(Path(folder), user.owner), self.lm))
            except DataMissing as error:
                found.append(UserFailed(str(error)))
        return found

    def cluster(self, users: Sequence[User], count: int, embedding: Embedding) -> UserClusters:
        """k-means over the users' profile embeddings."""
        self.progress("clustering users", 0, 1)
        made = cluster_users(users, count, embedding, self.seed)
        self.progress("clustering users", 1, 1)
        return made

    def cluster_distances(self, users: Sequence[User], shared: Fitted) -> Tensor:
        """Euclidean distance [n, C] of each user's profile to the centroids that `cluster` found."""
        return torch.from_numpy(distances(users, dict(shared.tensors), dict(shared.meta)))

    def rank(self, scores: Tensor) -> HeadRanking:
        """Ranks heads by the mean of `scores` [n, layers, heads] over samples, with its split-half stability.

        Heads that were not measured (NaN) are left out.
        """
        shape = scores.shape[1:]
        measured = np.flatnonzero(~np.isnan(scores[0].numpy().ravel()))
        values = scores.numpy().reshape(len(scores), -1)[:, measured]
        mean = values.mean(axis=0)
        random = np.random.Generator(np.random.Philox(self.seed))
        agreement = []
        for _ in range(20):
            order = random.permutation(len(values))
            half = len(values) // 2
            a, b = values[order[:half]].sum(axis=0), values[order[half:]].sum(axis=0)
            ranked = np.ptp(a) > 0 and np.ptp(b) > 0  # else, as with one sample, there is no order to compare
            agreement.append(stats.spearmanr(a, b).statistic if ranked else 0.0)
        order = np.argsort(-mean, kind="stable")
        heads = [divmod(int(i), shape[1]) for i in measured[order]]
        return HeadRanking(heads, mean[order].tolist(), float(np.mean(agreement)))


def whole(kit: Kit) -> ModelKit:
    """The kit with all that this package's own ways of fitting use."""
    if not isinstance(kit, ModelKit):
        raise TypeError(
            f"{type(kit).__name__} lends what harness.method.Kit names; this method needs harness.fit.kit.ModelKit"
        )
    return kit


def _said(value: object) -> str:
    """The repr of edits or adapters, and behind it a hash of their tensors: of those a repr shows a few digits of a few numbers."""
    tensors = list(_tensors(value))
    content = hashlib.sha256()
    for tensor in tensors:
        numbers = tensor.detach().cpu().contiguous()
        content.update(
            f"{numbers.dtype} {list(numbers.shape)}".encode() + numbers.flatten().view(torch.uint8).numpy().tobytes()
        )
    return repr(value) + (f" {content.hexdigest()}" if tensors else "")


def _tensors(value: object) -> Iterator[Tensor]:
    """Those in a value of frozen dataclasses, tuples and mappings, in their order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, np.ndarray):
        yield torch.from_numpy(np.ascontiguousarray(value))
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _tensors(part)
    elif is_dataclass(value) and not isinstance(value, type):
        for own in fields(value):
            yield from _tensors(getattr(value, own.name))


def by_length(tokens: Sequence[int], most: int) -> list[list[int]]:
    """Numbers of rows in batches of at most `most` tokens, padding counted, longest first."""
    order = sorted(range(len(tokens)), key=lambda n: -tokens[n])
    batches: list[list[int]] = []
    for n in order:
        if batches and (len(batches[-1]) + 1) * tokens[batches[-1][0]] <= most:
            batches[-1].append(n)
        else:
            batches.append([n])
    return batches
