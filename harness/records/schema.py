"""What run.json holds: the configuration that names a run, and what came of it. Read and written by `harness.records.store`.

`RunConfig` covers everything that can change a number on purpose and nothing else; its hash names the run's folder, so
the same command finds the same record and a changed setting makes a new one.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import numbers
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from harness.files.shown import without_credentials


def json_value(value: Any) -> Any:
    """`value` as plain JSON: NaN and infinities become null, tuples lists, sets sorted lists, numpy numbers plain."""
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): json_value(v) for k, v in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(json_value(v) for v in value)
    if isinstance(value, Sequence):
        return [json_value(v) for v in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: json_value(getattr(value, f.name)) for f in dataclasses.fields(value)}
    raise TypeError(f"a record holds JSON values only, not {type(value).__name__}: {value!r}")


def _options(value: Any) -> Any:
    """Options as JSON, with infinities kept apart as text: `gamma=inf` and `gamma=None` are different runs."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(k): _options(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_options(v) for v in value]
    return json_value(value)


def _finite(value: Any) -> Any:
    return None if isinstance(value, numbers.Real) and not math.isfinite(value) else value


Options = Annotated[dict[str, Any], BeforeValidator(_options)]
Number = Annotated[float | None, BeforeValidator(_finite)]
Shown = Annotated[str, AfterValidator(without_credentials)]
"""Text that may hold an address, kept without its credentials."""


class _Config(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelConfig(_Config):
    name: str
    """The row of a table: an alias, or the id where there is none."""
    id: str
    """Hub id, folder or GGUF file. Not hashed: the revision says which weights they are, wherever they lie."""
    revision: str = Field(min_length=1)
    """Hub commit; of a local model sha256:WEIGHTS+FILES, of a GGUF file its sha256 (`harness.engine.weights.identity`)."""
    dtype: str


class MethodConfig(_Config):
    name: str
    options: Options = {}
    preset: str | None = None


class TaskConfig(_Config):
    name: str
    version: int = 1
    options: Options = {}


class DataConfig(_Config):
    description: str
    """One line for a reader, which says `lamp-mini` where the data is the synthetic default. Not hashed."""
    fingerprint: str
    split: str
    fit_split: str | None = None
    fit_task: str | None = None
    fit_fingerprint: str | None = None
    fit_options: Options = {}
    """Of the other task that was fitted on."""


class SelectionConfig(_Config):
    limit: int | None = None
    users: int | None = None
    control: Literal["none", "wrong_user", "shuffled"] = "none"
    """Whose history the items have: the user's own unless a control was asked for."""
    exclude_leaks: bool = False
    """Whether items whose history holds the answer were left out."""


class SamplingConfig(_Config):
    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    seed: int = 0
    max_new_tokens: int
    stop: tuple[str, ...] = ()


class JudgeConfig(_Config):
    name: str
    """`openai/<model>`, `hf/<model>`, `words` or `lexicon`."""
    revision: str | None = None
    """Of a local model, as `ModelConfig.revision`."""
    options: Options = {}
    base_url: Shown | None = None
    """Where the server is, without credentials. Not hashed: it may move."""


class RunConfig(_Config):
    """Everything that can change a number on purpose. Not batch size or device: they move the last bits only."""

    model: ModelConfig
    method: MethodConfig
    task: TaskConfig
    data: DataConfig
    selection: SelectionConfig = SelectionConfig()
    sampling: SamplingConfig
    judge: JudgeConfig | None = None

    def hash8(self) -> str:
        """First 8 hex digits of the sha256 of the canonical JSON, in which 1.0 and 1 are the same number."""
        unhashed: Any = {"model": {"id"}, "data": {"description"}, "judge": {"base_url"}}
        content = self.model_dump(mode="json", exclude=unhashed)
        if self.selection.control == "none":  # as records were hashed before there were controls
            del content["selection"]["control"]
        if not self.selection.exclude_leaks:  # and before leaks were looked for
            del content["selection"]["exclude_leaks"]
        if self.judge is None:  # and before there were judges
            del content["judge"]
        if not self.data.fit_options:  # and options of the task to fit on
            del content["data"]["fit_options"]
        return hash_of(content)


def hash_of(content: Mapping[str, Any]) -> str:
    """8 hex digits of the canonical JSON."""
    text = json.dumps(_whole_numbers(content), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _whole_numbers(value: Any) -> Any:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, dict):
        return {k: _whole_numbers(v) for k, v in value.items()}
    return [_whole_numbers(v) for v in value] if isinstance(value, list) else value


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_assignment=True)


class MetricValue(_Part):
    """A `harness.task.Metric` on disk; `metrics={name: metric}` accepts those as they are."""

    model_config = ConfigDict(extra="forbid", from_attributes=True)

    value: Number
    n: int
    low: Number = None
    high: Number = None
    higher_is_better: bool = True
    note: str = ""

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval; None where there is none."""
        return None if self.low is None or self.high is None else (self.low, self.high)


class Health(_Part):
    """Whether the method did something, and what went wrong. Counts of samples where not said; None = unknown."""

    edits_prefill: int | None = None
    """Edits applied, in the prompt's pass and while decoding."""
    edits_decode: int | None = None
    kl_to_base: Number = None
    """Mean over tokens, in nats, against the unedited model with the same or the plain prompt."""
    changed_tokens: Number = None
    """Share, 0 to 1."""
    identical_to_base: Number = None
    """Share of responses, 0 to 1."""
    unparsed: int | None = None
    truncated: int | None = None
    dropped_items: int | None = None
    """History items that did not fit, over all samples."""
    cut_contexts: int | None = None
    """Contexts that do not fit without history and were cut from the left, as lm-eval does."""
    hit_max_tokens: int | None = None
    errors: int = 0
    unjudged: int | None = None
    """Answered, and no judge has answered about them yet."""
    unrated: int | None = None
    """The judge refused to rate them, or gave no number."""
    unsettled: int | None = None
    """Of the unjudged and unrated, those that the next `harness score` asks about again."""
    leaks: int | None = None
    """Their history holds the answer; `RunRecord.leaks` names them."""
    noop: bool | None = None


class Cost(_Part):
    """What answering took, in a run of its own: a point of a sweep counts as if it had shared nothing."""

    forward_passes: int | None = None
    prefill_tokens: int | None = None
    decode_tokens: int | None = None
    flops: Number = None
    seconds: Number = None
    """As measured. Of a point of a sweep, its part of the shared batches by operations: alone it would take longer."""
    saved_forward_passes: int | None = None
    """Of a point of a sweep, how much less than the above it took, as its batches were answered beside other points'."""
    saved_flops: Number = None
    effect_seconds: Number = None
    """Of comparing the method with the unedited model; not part of `seconds`."""
    fit_seconds: Number = None
    peak_memory_bytes: int | None = None
    setup_seconds_per_user: Number = None
    setup_prefill_tokens: int | None = None
    """Of adapting to all users, as far as the method counts them; also where the states were kept from an earlier run."""
    setup_decode_tokens: int | None = None
    setup_flops: Number = None
    stored_bytes_per_user: Number = None


class Batching(_Part):
    requested: str = "auto"
    """What the command line said: `auto` or a number."""
    sizes: list[int] = []
    """The sizes used, in order, where `auto` grew or backed off."""


class Judging(_Part):
    """What came of the judge's questions, and what this run paid for them: equal questions once, and not the one question
    (some 20 tokens) that shows how a server writes numbers."""

    greedy: bool | None = None
    """Whether every rating was asked for at temperature 0; where False, some are draws. None where that is not known."""
    mode: str = ""
    """`logprobs` and `numbers`: an expectation over numbers, of the first token and of whole strings; `text`: the number
    in the answer; `words`, `lexicon`: word lists."""
    models: list[str] = []
    """As the server names those that answered."""
    ratings: int = 0
    cached: int = 0
    """Paid for by another run; they cost this one nothing."""
    refused: int = 0
    unparsable: int = 0
    failed: int = 0
    not_final: int = 0
    """Of all these, how many the next `harness score` asks for again: failed, cut off, empty, or nothing but thoughts."""
    retries: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    usd: Number = None
    """None where no price is known."""
    seconds: float = 0.0
    """Waiting for the judge, in all sittings."""
    sent: list[dict[str, Any]] = []
    """What was asked for beside the questions: the fields of the requests, each set of them once."""


class Serving(_Part):
    """Of a model behind a server: where it is, what was asked of it, and what this run paid for."""

    base_url: Shown
    models: list[str] = []
    """As the server names those that answered."""
    requests: int = 0
    cached: int = 0
    """Answered for another run, which paid for them."""
    retries: int = 0
    input_tokens: int = 0
    """Paid for by this run, as are the output tokens."""
    output_tokens: int = 0
    usd: Number = None
    """None where no price is known."""
    scoring: str = ""
    """How choices were scored; empty where none were."""
    sent: list[dict[str, Any]] = []
    """What requests said beside their messages and seeds, each set of fields once."""


Status = Literal["running", "complete", "partial", "failed", "interrupted"]


class RunRecord(_Part):
    """run.json. `complete`: every sample scored; `partial`: saved, but some samples failed."""

    schema_version: Literal[1] = 1
    status: Status = "running"
    config: RunConfig
    hash: str = ""
    artifacts: dict[str, str] = {}
    """What was fitted -> its key in the artifact store."""
    versions: dict[str, str] = {}
    git_sha: str | None = None
    dirty: bool | None = None
    hardware: dict[str, Any] = {}
    batch: Batching = Field(default_factory=Batching)
    metrics: dict[str, MetricValue] = {}
    """The task's main metric first."""
    health: Health = Field(default_factory=Health)
    judging: Judging | None = None
    serving: Serving | None = None
    """None of a model on this machine."""
    cost: Cost = Field(default_factory=Cost)
    analysis: dict[str, Any] = {}
    """What the method's fitted states and the task's samples show (`Method.analysis`, `Task.analysis`)."""
    started: str | None = None
    """UTC, ISO 8601."""
    finished: str | None = None
    error: Shown | None = None
    notes: list[Shown] = []
    held_out_users: list[str] = []
    """Users of the evaluated split who were fitted on, and so are in no sample."""
    batches: list[list[str]] = []
    """Sample ids of every batch, planned before the first one runs."""
    batch_costs: dict[str, dict[str, int | float]] = {}
    """First sample of a finished batch -> what it took: the fields of `harness.engine.rows.Cost`, and seconds; of a sweep
    also what sharing saved. A batch repeated after a kill replaces its own numbers, so nothing is counted twice."""
    leaks: dict[str, Literal["question", "answer", "near"]] = {}
    """Items whose history holds the answer -> how (`harness.run.leaks`)."""
    folder: Path | None = Field(default=None, exclude=True)
    """Where the record was read from."""

    @property
    def samples(self) -> int:
        """How many samples the costs were spent on, failed ones included."""
        return sum(len(batch) for batch in self.batches) or max((m.n for m in self.metrics.values()), default=0)

    @property
    def operations(self) -> float | None:
        """Floating-point operations (FLOPs) that an answer took; None where they were not counted."""
        return self.cost.flops / self.samples if self.cost.flops is not None and self.samples else None

    @property
    def weights(self) -> tuple[str, str, str]:
        """The model's name, which two of different weights or dtypes can share, and what tells these apart."""
        model = self.config.model
        return (model.name, model.revision, model.dtype)

    @property
    def conditions(self) -> str:
        """What two runs must share for their numbers to stand in one ranking: weights, task, users and samples, judge.

        Not how long answers may be and how they are drawn, which a method may want otherwise.
        """
        config, judge = self.config, self.config.judge
        judged = None if judge is None else [judge.name, judge.revision, judge.options]
        ids = sorted(id for batch in self.batches for id in batch)  # without what is held out for fitting
        samples = [config.data.split, config.data.fingerprint, config.selection.model_dump(), hash_of({"ids": ids})]
        return json.dumps([self.weights, config.task.model_dump(), samples, judged], sort_keys=True)

    @model_validator(mode="before")
    @classmethod
    def _fill_hash(cls, data: Any) -> Any:
        if isinstance(data, dict) and not data.get("hash") and isinstance(data.get("config"), RunConfig):
            return {**data, "hash": data["config"].hash8()}
        return data

    def to_json(self) -> str:
        """Indented, but one line a batch: a thousand samples should not be a thousand lines of a diff."""
        content = json_value(self.model_dump(mode="json"))
        apart = ("analysis", "held_out_users", "leaks", "batches", "batch_costs")
        analysis, held_out, leaks, batches, costs = (content.pop(name) for name in apart)
        batch_lines = ",\n  ".join(json.dumps(batch) for batch in batches)
        return (
            f"{json.dumps(content, indent=1)[:-2]},\n"
            f' "analysis": {{\n  {_one_line_each(analysis)}\n }},\n'
            f' "held_out_users": {json.dumps(held_out)},\n'
            f' "leaks": {json.dumps(leaks)},\n'
            f' "batches": [\n  {batch_lines}\n ],\n'
            f' "batch_costs": {{\n  {_one_line_each(costs)}\n }}\n}}\n'
        )


def _one_line_each(values: Mapping[str, Any]) -> str:
    return ",\n  ".join(f"{json.dumps(name)}: {json.dumps(value)}" for name, value in values.items())
