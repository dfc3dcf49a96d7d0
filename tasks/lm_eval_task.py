"""Any lm-eval task that asks for text or scores it: `--task lm_eval:hellaswag`, `lm_eval:gsm8k`, a group as `lm_eval:arc`.

lm-eval makes the documents, the contexts and the grades (EleutherAI/lm-evaluation-harness, 0.4.12 or newer); the engine
answers, under any method, and keeps a record as of every task. `--data FOLDER` adds task files of one's own (lm-eval's
include_path). Differs from `lm_eval run`: `--limit` counts documents of all the group's tasks together, metrics of a
group are means over its documents, and only means have intervals. Whole-text perplexity, several samples
a document and settings that differ between the tasks of a group are refused; the last of these run one by one.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import math
import numbers
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from harness.data import Example, Labelled
from harness.errors import DataMissing, UsageError, did_you_mean
from harness.run.lm_eval.contexts import MINI, ContextTemplate, UserPool, query, written
from harness.statistics.intervals import mean_interval
from harness.statistics.metrics import known
from harness.task import TOO_LARGE, GenerationDefaults, Metric, Sample, Selection, System, Task

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from lm_eval.api.task import Task as Source

    from harness.task import Generation


class LmEvalTask(Task):
    """Any lm-eval task or group, named behind a colon: lm_eval:hellaswag."""

    name = "lm_eval"
    default_split = "test"
    independent = "item"
    grades_with_data = True
    source: ClassVar[str] = ""
    """lm-eval's name of the task or group."""

    def __init__(
        self,
        data: str | None = None,
        num_fewshot: int | None = None,
        apply_chat_template: bool = False,
        fewshot_as_multiturn: bool = False,
        system_instruction: str | None = None,
        fewshot_seed: int = 1234,
        users_from: str = "lamp4",
        users_data: str = MINI,
        users_split: str = "dev",
        users_seed: int = 0,
    ) -> None:
        if not self.source:
            raise UsageError(
                "lm_eval is a family of tasks; name one as in lm_eval:hellaswag ('lm_eval ls tasks' shows all)"
            )
        self.data = data
        self.num_fewshot = num_fewshot
        self.chat = apply_chat_template
        self.multiturn = fewshot_as_multiturn
        self.system_instruction = system_instruction
        self.fewshot_seed = fewshot_seed
        self.users = UserPool(users_from, users_data, users_split, users_seed)
        self._asked: dict[str, list[Instance]] = {}

    @classmethod
    def member(cls, name: str) -> type[Task]:
        if not name:
            raise UsageError("lm_eval: names no task; name one as in lm_eval:hellaswag")
        return type("LmEvalTask", (cls,), {"name": f"lm_eval:{name}", "source": name, "__doc__": cls.__doc__})

    def items(self, selection: Selection) -> Sequence[Labelled]:
        if selection.split == "train":
            raise DataMissing(f"{self.name} has no items to fit on; fit on another task's, as in --fit_task lamp4")
        if selection.split != self.default_split:
            raise UsageError(f"{self.name}: lm-eval itself says which split is evaluated; leave --split out")
        return selection.of(self._documents())

    def fingerprint(self, selection: Selection) -> str:
        if selection.split == "train":
            self.items(selection)
        digest = hashlib.sha256(self.users.fingerprint().encode())
        for source in self._sources.values():
            shots = source.fewshot_docs() if source.config.num_fewshot else []
            for part in (source.dump_config(), *(doc for _, doc in source.doc_iterator()), *shots):
                digest.update(json.dumps(part, sort_keys=True, default=_plain).encode())
        return digest.hexdigest()

    def generation(self) -> GenerationDefaults:
        settings = self._settings()
        return GenerationDefaults(settings.max_new_tokens, settings.stop) if settings else GenerationDefaults(1)

    def describe_data(self) -> str:
        return f"{self.name}: lm-eval's {', '.join(self._sources)}"[:200] + f"; {self.users.describe()}"

    def respond(self, system: System, items: Sequence[Labelled]) -> Iterator[Sample]:
        by_id = {item.example.id: item for item in items}
        longest = sorted(by_id, key=lambda i: (i.partition("/")[0], -len(by_id[i].example.text)))

        def run(ids: Sequence[str]) -> list[list[Sample]]:
            parts = [self._parts(by_id[i].example) for i in ids]
            samples = iter(system.answer([part for some in parts for part in some]))
            return [[next(samples) for _ in some] for some in parts]

        for number, i, samples in system.in_batches(longest, run):
            item = by_id[i]
            failed = Sample(i, item.example.user.id, error=TOO_LARGE)
            sample = failed if samples is None else self._merged(i, samples)
            yield replace(sample, targets=item.targets, batch=number)

    def grade(self, sample: Sample) -> Sample:
        if sample.error is not None or "resps" not in sample.extra:
            return sample
        source = self._sources[sample.id.partition("/")[0]]
        instances = [copy.copy(instance) for instance in self._instances(sample.id)]
        for instance, response in zip(instances, sample.extra["resps"], strict=True):
            instance.resps = [tuple(response) if isinstance(response, list) else response]
            instance.filtered_resps = {}
        source_filters: Any = source
        for ensemble in source_filters._filters:
            ensemble.apply(instances)
        found: dict[str, Any] = {}
        for name in instances[0].filtered_resps:
            results = source.process_results(instances[0].doc, [i.filtered_resps[name] for i in instances])
            found.update({metric if name == "none" else f"{metric},{name}": value for metric, value in results.items()})
        values = {name: float(value) for name, value in found.items() if isinstance(value, numbers.Real)}
        others = {name: json.loads(json.dumps(found[name], default=_plain)) for name in found if name not in values}
        first = next(iter(instances[0].filtered_resps.values()))
        written_answer = first if isinstance(first, str) else sample.response
        parsed = None if written_answer == "[invalid]" else written_answer
        return replace(sample, parsed=parsed, metrics=dict(values), extra={**sample.extra, "values": others})

    def aggregate(self, samples: Sequence[Sample]) -> Mapping[str, Metric]:
        """Over all documents, then of each task where there are several."""
        graded = [sample for sample in samples if sample.metrics or sample.extra.get("values")]
        whole = _metrics(graded, self._sources)
        if len(self._sources) > 1:
            for name, source in self._sources.items():
                own = [sample for sample in graded if sample.id.partition("/")[0] == name]
                whole |= {f"{metric}/{name}": value for metric, value in _metrics(own, {name: source}).items()}
        return whole

    @cached_property
    def _sources(self) -> Mapping[str, Source]:
        """lm-eval's tasks by name, with their number of examples set as lm-eval sets it."""
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        from lm_eval.tasks import TaskManager

        managers = [lambda: TaskManager(include_path=self.data, include_defaults=False)] if self.data else []
        for make in (*managers, lambda: TaskManager(include_path=self.data)):  # all of lm-eval's take a while to index
            manager = make()
            if self.source in manager.all_tasks:
                break
        else:
            near = did_you_mean(self.source, manager.all_tasks)
            raise UsageError(f"lm-eval has no task {self.source!r}{near} 'lm_eval ls tasks' shows all")
        try:
            sources: dict[str, Source] = dict(manager.load([self.source])["tasks"])
        except Exception as error:  # each kind of dataset has its own way to be absent
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
            raise DataMissing(
                f"{self.name} cannot be loaded ({reason}); its data set must be in the hub's cache, or the network reachable"
            ) from error
        for name, source in sources.items():
            if source.OUTPUT_TYPE == "loglikelihood_rolling":
                raise UsageError(
                    f"{self.name}: {name} asks for the perplexity of whole texts, and a method answers prompts"
                )
            if (source.config.repeats or 1) > 1:
                raise UsageError(
                    f"{self.name}: {name} asks for {source.config.repeats} samples a document; one is what there is"
                )
            if source.config.num_fewshot is None or (self.num_fewshot is not None and source.config.num_fewshot != 0):
                source.set_config(key="num_fewshot", value=self.num_fewshot or 0)
            source.set_fewshot_seed(seed=self.fewshot_seed)
        return sources

    def _settings(self) -> Generation | None:
        """How the tasks that ask for text want it generated; None where none of them does."""
        from harness.run.lm_eval.bridge import generation_of

        wanted = [s.config.generation_kwargs for s in self._sources.values() if s.OUTPUT_TYPE == "generate_until"]
        found = [generation_of(settings or {}) for settings in wanted]
        if any(settings != found[0] for settings in found):
            raise UsageError(f"{self.name}: its tasks generate in different ways; run them one by one")
        if found and found[0].sampling.temperature:
            raise UsageError(
                f"{self.name} asks for samples at temperature {found[0].sampling.temperature}; it cannot be run"
            )
        return found[0] if found else None

    def _documents(self) -> Iterator[Labelled]:
        template = {True: ContextTemplate(), False: ContextTemplate(scored=False)}
        self._settings()
        for name, source in self._sources.items():
            for number, doc in source.doc_iterator():
                ident = f"{name}/{number}"
                instances = self._instances(ident, doc)
                context, scored = instances[0].args[0], instances[0].request_type == "loglikelihood"
                choices = tuple(i.args[1] for i in instances if i.args[0] == context) if scored else ()
                user = self.users.user(ident)
                example = Example(ident, user, context, query(context), template[scored], choices)
                yield Labelled(example, (_target(source, doc, choices),))

    def _instances(self, ident: str, doc: Any = None) -> list[Instance]:
        """What lm-eval asks about a document, in its order."""
        if ident not in self._asked:
            name, _, number = ident.partition("/")
            source = self._sources[name]
            doc = source.eval_docs[int(number)] if doc is None else doc
            chat: dict[str, Any] = {"apply_chat_template": self.chat, "chat_template": _written if self.chat else None}
            shots = {"num_fewshot": source.config.num_fewshot or 0, "fewshot_as_multiturn": self.multiturn}
            about = {"system_instruction": self.system_instruction, "gen_prefix": source.doc_to_prefix(doc)}
            context = source.fewshot_context(doc, **shots, **about, **chat)
            made = source.construct_requests(doc=doc, ctx=context, metadata=(name, int(number), 1), **chat)
            self._asked[ident] = made if isinstance(made, list) else [made]
            if any(len(i.args) != 2 for i in self._asked[ident]):
                raise UsageError(f"{self.name} asks about more than text, which a text model cannot answer")
        return self._asked[ident]

    def _parts(self, example: Example) -> list[Example]:
        """The document as one example for each of its contexts, the first of which is `example` itself."""
        contexts: dict[str, list[str]] = {}
        for instance in self._instances(example.id):
            contexts.setdefault(instance.args[0], []).append(instance.args[1])
        if not example.choices:
            return [example]
        return [
            replace(example, id=f"{example.id}#{n}" if n else example.id, text=context, choices=tuple(choices))
            for n, (context, choices) in enumerate(contexts.items())
        ]

    def _merged(self, ident: str, samples: Sequence[Sample]) -> Sample:
        """The sample of a document from those of its contexts: the prompts are the first one's, counts are sums."""
        errors = [sample.error for sample in samples if sample.error]
        if errors:
            return replace(samples[0], response=None, error=errors[0], extra={})
        instances = self._instances(ident)
        resps: list[Any] = [samples[0].response]
        response = samples[0].response
        if samples[0].finish == "choice":
            scores = {
                context: iter(zip(sample.extra["logprobs"], sample.extra["greedy"], strict=True))
                for context, sample in zip(dict.fromkeys(i.args[0] for i in instances), samples, strict=True)
            }
            resps = [list(next(scores[i.args[0]])) for i in instances]
            if len(samples) > 1:
                response = f"choice {int(np.argmax([logprob for logprob, _ in resps]))}"
        return replace(
            samples[0],
            response=response,
            dropped_items=sum(sample.dropped_items for sample in samples),
            cut_tokens=sum(sample.cut_tokens for sample in samples),
            extra={"resps": resps},
        )


def _written(turns: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
    return written(turns, open_turn=add_generation_prompt)


def _target(source: Any, doc: Any, choices: Sequence[str]) -> str:
    """The gold answer as text that follows the context."""
    target = source.doc_to_target(doc)
    target = target[0] if isinstance(target, list) and target else target
    if isinstance(target, int) and target < len(choices):
        return choices[target]
    return str(target)


def _plain(value: Any) -> Any:
    """What JSON cannot hold, without addresses, so that equal data give equal text."""
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, np.generic):
        return value.item()
    return getattr(value, "__name__", None) or type(value).__name__


def _metrics(graded: Sequence[Sample], sources: Mapping[str, Any]) -> dict[str, Metric]:
    """Each metric of the tasks over their documents; of several tasks only means, which pool."""
    names = dict.fromkeys(name for sample in graded for name in (*sample.metrics, *sample.extra.get("values", {})))
    found = {}
    for name in names:
        metric = name.partition(",")[0]
        values = {}
        for sample in graded:
            value = sample.metrics.get(name, sample.extra.get("values", {}).get(name))
            if value is not None:
                values[sample.id] = tuple(value) if isinstance(value, list) else value
        rules = [source.aggregation().get(metric) for source in sources.values()]
        higher = next((s.higher_is_better()[metric] for s in sources.values() if metric in s.higher_is_better()), True)
        if all(rule is None or getattr(rule, "__name__", "") == "mean" for rule in rules):
            array = np.array(list(values.values()), dtype=float)
            ends = known(mean_interval(array, list(values)))
            found[name] = Metric(float(array.mean()), len(array), *ends, bool(higher))
        elif len(rules) == 1 and rules[0] is not None:
            value = float(rules[0](list(values.values())))
            note = "no interval: not a mean" if math.isfinite(value) else f"lm-eval gives {value}"
            shown = value if math.isfinite(value) else None
            found[name] = Metric(shown, len(values), None, None, bool(higher), note)
    return found
