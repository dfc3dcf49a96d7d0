"""What a method or a task gave back, checked where the engine receives it, so that a stranger's mistake is one line.

Each function takes what was returned and gives it back as it belongs there, or raises HarnessError saying whose function it
was, what came, and what was expected. Nothing is guessed: a text is never taken for a list of letters, a short list never
for a whole one.
"""

from __future__ import annotations

import json
import math
import numbers
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from os import PathLike
from typing import Any

from harness.data import HistoryItem, Labelled, Prompt, User
from harness.errors import HarnessError, UsageError, UserFailed
from harness.method import Fitted, Method
from harness.plan import Draws, Edit, Exit, LoRA, Plan, Stream
from harness.task import GenerationDefaults, Metric, Question, Sample, Selection, Task


def options_of(method: Method) -> dict[str, Any]:
    """What `Method.identity` gives: what a record holds of the method. Raises UsageError for values that JSON cannot hold."""
    who = f"method {type(method).__name__}"
    found = _items(f"{who}: identity returned", method.identity())
    for name, value in found:
        if not _plain(value):
            raise UsageError(f"{who}: option {name} is {shown_as(value)}; expected a number, a text, or a list of them")
    return dict(found)


def _plain(value: object) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(name, str) and _plain(part) for name, part in value.items())
    if isinstance(value, tuple | list | set | frozenset):
        return all(map(_plain, value))
    return value is None or isinstance(value, str | bool | numbers.Real | PathLike) or is_dataclass(value)


def _kept(value: object) -> bool:
    """Whether JSON can hold it; a tensor or a NaN would come back as something else."""
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        return False
    return True


def plan_of(method: Method, plan: object) -> Plan:
    """What `Method.plan` returned."""
    who = f"method {type(method).__name__}: plan"
    if not isinstance(plan, Plan):
        raise wrong(f"{who} returned", plan, "a Plan, as in Plan((Stream(prompt),))")
    if not isinstance(plan.streams, tuple | list) or not plan.streams:
        raise wrong(f"{who}: streams is", plan.streams, "a tuple of Stream, as in Plan((Stream(prompt),))")
    for stream in plan.streams:
        if not isinstance(stream, Stream):
            raise wrong(f"{who}: a stream is", stream, "a Stream, as in Plan((Stream(prompt),))")
        if not isinstance(stream.prompt, Prompt):
            raise wrong(
                f"{who}: a stream's prompt is", stream.prompt, "a Prompt, as self.retrieval.prompt(example) gives"
            )
        for name, text in (("text", stream.prompt.text), ("summary", stream.prompt.summary)):
            if not isinstance(text, str):
                raise wrong(f"{who}: {name} of a prompt is", text, "a text")
        items = stream.prompt.items
        if not isinstance(items, tuple | list) or not all(isinstance(item, HistoryItem) for item in items):
            raise wrong(f"{who}: items of a prompt are", items, "a tuple of HistoryItem")
        for name, kind in (("edits", Edit), ("adapters", LoRA), ("exits", Exit)):
            values = getattr(stream, name)
            if not isinstance(values, tuple):
                raise wrong(f"{who}: {name} of a stream is", values, f"a tuple of {kind.__name__}")
            for value in values:
                if not isinstance(value, kind) or isinstance(value, type):
                    raise wrong(f"{who}: {name} of a stream hold", value, f"{kind.__name__} alone")
        if stream.early is not None and not callable(stream.early):
            raise wrong(f"{who}: early of a stream is", stream.early, "an ExitRule, a function of the model's depth")
    if plan.answer is not None and not isinstance(plan.answer, str):
        raise wrong(f"{who}: answer is", plan.answer, "a text, or None where the model answers")
    _check_value(f"{who}: mix", plan.mix)
    if plan.draws is not None:
        if not isinstance(plan.draws, Draws):
            raise wrong(f"{who}: draws is", plan.draws, "Draws(count, choose)")
        _check_value(f"{who}: choose", plan.draws.choose)
    return plan


def chosen_of(choose: object, number: object, count: int) -> int:
    """What `Draws.choose` returned for `count` responses."""
    if isinstance(number, bool) or not isinstance(number, numbers.Integral) or not 0 <= int(number) < count:
        raise wrong(f"{type(choose).__name__} chose", number, f"the place of a response, 0 to {count - 1}")
    return int(number)


def _check_value(what: str, value: object) -> None:
    """A mix, or who chooses among drawn responses: what is called, and is compared by value."""
    expected = "a value that is called, as a frozen dataclass with __call__ (see harness/mix.py)"
    if not callable(value) or isinstance(value, type):
        raise wrong(f"{what} is", value, expected)
    name = getattr(value, "__qualname__", "")
    if "<lambda>" in name or "<locals>" in name:  # a new one in each call, so that no two plans have the same one
        raise HarnessError(
            f"{what} is the function {name}, made anew for each plan, and rows run together where these are equal; "
            f"expected {expected}"
        )
    try:
        hash(value)
    except TypeError as error:
        raise HarnessError(
            f"{what} {type(value).__name__} cannot be hashed ({error}), and rows run together where these are equal; "
            "make it a frozen dataclass of numbers and tuples, or of tensors with eq=False"
        ) from None


NORMALISED = 1e-3
"""How far the log-sum-exp of log-probabilities may be from 0, in the lowest precision that logits are computed in."""


def mixed(mix: object, logp: Any, logits: Any) -> Any:
    """What a mix returned for logits [R, T, V], in their precision and on their device.

    That it is normalised is looked at where a row's first position is, which costs next to nothing; NaN passes, since a
    model may give that too.
    """
    shape = list(logits.shape)
    if list(getattr(logp, "shape", ())) != shape:
        given = f"a tensor {list(logp.shape)}" if hasattr(logp, "shape") else shown_as(logp)
        raise HarnessError(
            f"mix {type(mix).__name__} returned {given}; expected log-probabilities {shape} [rows, tokens, vocabulary]"
        )
    logp = logp.to(logits)
    off = float(logp[:, 0].logsumexp(-1).abs().max())
    if off > NORMALISED:
        raise HarnessError(
            f"mix {type(mix).__name__} returned no log-probabilities: the log-sum-exp over the vocabulary is {off:.3g} away from 0; "
            "end it with "
            ".log_softmax(-1), in float32 or wider"
        )
    return logp


def fitted(method: Method, state: object, function: str = "fit") -> Fitted | None:
    """What `Method.fit` returned, or `adapt` for one user."""
    who = f"method {type(method).__name__}: {function}"
    if state is None:
        return None
    if not isinstance(state, Fitted):
        raise wrong(f"{who} returned", state, "a Fitted of named tensors and JSON values, or None")
    for name, tensor in _items(f"{who}: tensors", state.tensors):
        if not hasattr(tensor, "contiguous"):
            raise wrong(f"{who}: tensors[{name!r}] is", tensor, "a torch.Tensor; other values go into meta")
        if getattr(tensor, "is_sparse", False):
            raise wrong(f"{who}: tensors[{name!r}] is", tensor, "a dense tensor, as to_dense() gives")
    for name, value in _items(f"{who}: meta", state.meta):
        if not _kept(value):
            raise wrong(
                f"{who}: meta[{name!r}] is",
                value,
                "what JSON gives back as it was: finite numbers, texts, lists and dicts",
            )
    for name, value in _items(f"{who}: cost", state.cost):
        if not is_number(value) or not _kept(value):
            raise wrong(f"{who}: cost[{name!r}] is", value, "a finite int or float; leave out what is not known")
    if not isinstance(state.notes, tuple | list) or not all(isinstance(note, str) for note in state.notes):
        raise wrong(f"{who}: notes is", state.notes, "a list of texts")
    return state


def adapted(method: Method, states: object, users: Sequence[User]) -> list[Fitted | UserFailed | None]:
    """What `Method.adapt` returned for `users`."""
    who = f"method {type(method).__name__}: adapt"
    expected = f"a list of {len(users)} states, one a user in their order, each a Fitted, a UserFailed or None"
    if not isinstance(states, Sequence) or isinstance(states, str | bytes):
        raise wrong(f"{who} returned", states, expected)
    if len(states) != len(users):
        raise HarnessError(f"{who} returned {len(states)} states for {len(users)} users; expected {expected}")
    return [state if isinstance(state, UserFailed) else fitted(method, state, "adapt") for state in states]


def reviewed(given: Method | Task, notes: object, function: str = "review") -> list[str]:
    """What `Method.review` returned, or `Task.caveats`."""
    who = f"{whose(given)}: {function}"
    if not isinstance(notes, Sequence) or isinstance(notes, str) or not all(isinstance(note, str) for note in notes):
        raise wrong(f"{who} returned", notes, "a list of texts")
    return list(notes)


def analysis_of(given: Method | Task, found: object) -> dict[str, Any]:
    """What `analysis` of a method or a task returned."""
    who = f"{whose(given)}: analysis"
    for name, value in (found := _items(f"{who} returned", found)):
        if not _plain(value):
            raise wrong(f"{who}: {name!r} is", value, "what JSON holds: numbers, texts, and lists or dicts of them")
    return dict(found)


def fingerprint_of(task: Task, selection: Selection) -> str:
    """What `Task.fingerprint` gives: it names the data in a record, so that an empty one would be any data."""
    found: object = task.fingerprint(selection)
    if not isinstance(found, str) or not found.strip():
        raise wrong(
            f"{whose(task)}: fingerprint returned", found, "a text, as hashlib.sha256(content).hexdigest() gives"
        )
    return found


def described(task: Task) -> str:
    """What `Task.describe_data` gives."""
    found: object = task.describe_data()
    if not isinstance(found, str):
        raise wrong(f"{whose(task)}: describe_data returned", found, "a text")
    return found


def generation_of(task: Task) -> GenerationDefaults:
    """What `Task.generation` gives."""
    found = task.generation()
    whole = isinstance(found, GenerationDefaults) and isinstance(found.max_new_tokens, numbers.Integral)
    if (
        not whole
        or found.max_new_tokens < 1
        or isinstance(found.stop, str)
        or not all(isinstance(text, str) for text in found.stop)
    ):
        raise wrong(
            f"task {_task_name(task)}: generation returned", found, "GenerationDefaults(max_new_tokens, stop=(...,))"
        )
    return found


def samples_of(
    task: Task,
    samples: Iterable[Sample],
    items: Sequence[Labelled],
    planned: Sequence[Sequence[str]],
    done: Collection[str] = (),
) -> Iterator[list[Sample]]:
    """The samples `Task.respond` yields, a whole batch at a time, each sample once and with its item's targets.

    `planned` is read as samples come, since batches are planned, and halved, while they do; `done` are not to be answered.
    Raises HarnessError at the first sample that is not as it should be, and where the last has come and some are missing.
    """
    who = f"task {_task_name(task)}: respond"
    targets = {item.example.id: tuple(item.targets) for item in items}
    seen: set[str] = set()
    batch: list[Sample] = []
    if isinstance(samples, Sample | str) or not isinstance(samples, Iterable):
        raise wrong(f"{who} returned", samples, "an iterator of Sample, as system.respond(examples) gives")
    for sample in samples:
        if not isinstance(sample, Sample):
            raise wrong(f"{who} yielded", sample, "a Sample, as system.respond(examples) gives")
        name = f"{who} yielded sample {sample.id!r}"
        if sample.id not in targets or sample.id in seen:
            why = "a second time" if sample.id in seen else "which is none of its items"
            raise HarnessError(f"{name} {why}; expected each item once")
        if not 0 <= sample.batch < len(planned) or sample.id not in planned[sample.batch]:
            raise HarnessError(
                f"{name} in batch {sample.batch}, where it was not planned; keep the batch that system.respond gave it"
            )
        if batch and batch[0].batch != sample.batch:
            raise HarnessError(f"{name} before batch {batch[0].batch} was whole; yield samples as system.respond does")
        if sample.response is not None and not isinstance(sample.response, str):
            raise wrong(f"{name}, its response", sample.response, "a text, or None where it failed")
        if sample.response is None and sample.error is None:
            raise HarnessError(f"{name} without a response and without an error; expected one of them")
        if sample.targets and tuple(sample.targets) != targets[sample.id]:
            raise HarnessError(
                f"{name} with targets {sample.targets!r}; expected those of its item, {targets[sample.id]!r}"
            )
        seen.add(sample.id)
        batch.append(replace(sample, targets=targets[sample.id]))
        if len(batch) == len(planned[sample.batch]):
            yield batch
            batch = []
    missing = [name for name in targets if name not in seen and name not in done]
    if missing:
        raise HarnessError(
            f"{who} gave no sample for {len(missing)} of {len(targets)} items, first {missing[0]!r}; one that cannot be "
            "answered is a Sample with an error"
        )


_GRADED = ("parsed", "metrics", "extra")


def graded(task: Task, sample: Sample) -> Sample:
    """What `Task.grade` makes of a sample."""
    found: object = task.grade(sample)
    who = f"task {_task_name(task)}: grade"
    if not isinstance(found, Sample):
        raise wrong(
            f"{who} returned", found, "the Sample with its metrics, as in replace(sample, metrics={'accuracy': 1.0})"
        )
    if found.id != sample.id:
        raise HarnessError(f"{who} returned sample {found.id!r} for {sample.id!r}; expected the same one")
    for field in fields(Sample):
        if field.name not in _GRADED and getattr(found, field.name) != getattr(sample, field.name):
            raise wrong(
                f"{who} changed {field.name} of sample {sample.id!r}, which is now",
                getattr(found, field.name),
                "only parsed, metrics and extra to be filled in",
            )
    if found.error is not None and found.metrics:
        raise wrong(f"{who}: metrics of sample {sample.id!r}, which failed, is", found.metrics, "none: it is counted")
    where = f"of sample {sample.id!r} is"
    if isinstance(found.parsed, bool) or not (found.parsed is None or isinstance(found.parsed, str | numbers.Real)):
        raise wrong(f"{who}: parsed {where}", found.parsed, "a text or a number, or None where nothing could be read")
    for name, value in _items(f"{who}: extra", found.extra):
        if not _plain(value):
            raise wrong(
                f"{who}: extra {name!r} {where}", value, "what JSON holds: numbers, texts, and lists or dicts of them"
            )
    for name, value in _items(f"{who}: metrics", found.metrics):
        if value is not None and not _finite(value):
            raise wrong(f"{who}: metric {name!r} {where}", value, "a finite number, or None where there is none")
    if any(isinstance(value, bool) for value in found.metrics.values()):  # as in {"accuracy": answer == target}
        said = {name: int(value) if isinstance(value, bool) else value for name, value in found.metrics.items()}
        return replace(found, metrics=said)
    return found


def questions_of(task: Task, sample: Sample) -> dict[str, Question]:
    """What `Task.to_judge` asks about a sample."""
    who = f"task {_task_name(task)}: to_judge"
    asked = _items(f"{who} returned", task.to_judge(sample))
    for name, question in asked:
        if not isinstance(question, Question) or not isinstance(question.prompt, str):
            raise wrong(f"{who}: {name!r} is", question, "a Question(prompt, text)")
    return dict(asked)


def metrics_of(task: Task, samples: Sequence[Sample]) -> dict[str, Metric]:
    """What `Task.aggregate` makes of graded samples."""
    who = f"task {_task_name(task)}: aggregate"
    found = _items(f"{who} returned", task.aggregate(samples), "a dict of name -> Metric, the main one first")
    answered = sum(sample.error is None for sample in samples)
    if answered and not found:
        raise HarnessError(
            f"{who} returned no metric of {answered} answers; expected one at least, with the value None and a note where "
            "there is nothing to measure"
        )
    for name, metric in found:
        if not isinstance(metric, Metric):
            raise wrong(f"{who}: {name!r} is", metric, "a Metric, as in Metric(value, n)")
        for part in ("value", "low", "high"):
            number = getattr(metric, part)
            none = number is None or (
                part != "value" and number != number
            )  # an interval that says nothing has NaN ends
            if not (none or is_number(number)):
                raise wrong(f"{who}: {part} of {name!r} is", number, "a finite number, or None (a value with a note)")
        if metric.low is not None and metric.high is not None and metric.low > metric.high:
            raise wrong(f"{who}: low of {name!r} is", metric.low, f"no more than high, which is {metric.high}")
        if isinstance(metric.n, bool) or not isinstance(metric.n, numbers.Integral) or metric.n < 0:
            raise wrong(f"{who}: n of {name!r} is", metric.n, "how many samples it is of")
        if not isinstance(metric.note, str):
            raise wrong(f"{who}: note of {name!r} is", metric.note, "a text")
    return dict(found)


def _finite(value: object) -> bool:
    """Whether it is a number that JSON holds: NaN and infinities would be saved as none."""
    return isinstance(value, numbers.Real) and math.isfinite(value)


def is_number(value: object) -> bool:
    """Whether it is finite, and no truth value."""
    return not isinstance(value, bool) and _finite(value)


def _items(what: str, values: object, expected: str = "a dict by name") -> list[tuple[str, Any]]:
    if not isinstance(values, Mapping):
        raise wrong(what if what.endswith("returned") else f"{what} is", values, expected)
    for name in values:
        if not isinstance(name, str):
            raise wrong(f"{what}: a name is", name, "a text")
    return list(values.items())


def whose(given: Method | Task) -> str:
    """`task lamp4`, `method Dps`."""
    return f"task {_task_name(given)}" if isinstance(given, Task) else f"method {type(given).__name__}"


def _task_name(task: Task) -> str:
    return getattr(task, "name", None) or type(task).__name__


def wrong(what: str, given: object, expected: str) -> HarnessError:
    """What was given, and what is allowed."""
    return HarnessError(f"{what} {shown_as(given)}; expected {expected}")


def shown_as(value: object) -> str:
    """`a tuple (1, 2)`, cut."""
    if value is None or isinstance(value, bool):
        return repr(value)
    kind = type(value).__name__
    shown = " ".join(repr(value).split())
    article = "an" if kind[:1].lower() in "aeiou" else "a"
    return f"{article} {kind} ({shown[:57]}...)" if len(shown) > 60 else f"{article} {kind} ({shown})"
