"""Every option that several commands have, declared once: name, type, default, help, heading.

`harness.cli.commands` makes command lines of these declarations, `harness.cli.python` keyword arguments. Imports neither
typer nor torch. An option of one command alone stands in that command's signature.
"""

from __future__ import annotations

import numbers
import os
import re
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, TypeAlias, TypedDict, Union, cast, get_args, get_origin, get_type_hints

from harness.errors import UsageError, did_you_mean
from harness.run.cell import Settings
from harness.run.control import Control

WHAT, DATA, SAMPLING, FITTING, JUDGING, MACHINE, OUTPUT = HEADINGS = (
    "What to run",
    "Data",
    "Sampling",
    "Fitting",
    "Judging",
    "Machine",
    "Output",
)
"""Under which `--help` shows the options, in this order; what has no heading comes last."""

Pairs: TypeAlias = Mapping[str, object] | Sequence[str]
"""Options of a method, task or judge: `{"gamma": 1.0}`, or `["gamma=1.0"]` as on a command line."""
Names: TypeAlias = str | Sequence[str]
AnyPath: TypeAlias = str | os.PathLike[str]

NEEDED: Any = ...
"""In place of a default: the option must be given."""


@dataclass(frozen=True)
class Option:
    """What a command line says of an option besides its name and its type in Python."""

    help: str
    heading: str = ""
    default: Any = None
    """Of a name that `Settings` has too, the default is the one there unless another is given here."""
    minimum: float | None = None
    maximum: float | None = None
    metavar: str = ""
    cli: Any = None
    """Its type on the command line, where that is not its type in Python."""
    completes: str = ""
    """The list of `harness list` whose names a shell offers."""
    spellings: tuple[str, ...] = ()
    """Older names that work and that no help shows."""


class Judged(TypedDict, total=False):
    """Who judges answers."""

    judge: Annotated[
        str | None, Option("openai/<model>, hf/<model>; words, lexicon: word lists, not comparable.", JUDGING)
    ]
    judge_base_url: Annotated[
        str | None, Option("Server of an openai/ judge [default: $OPENAI_BASE_URL].", JUDGING, metavar="URL")
    ]
    judge_set: Annotated[
        Pairs,
        Option(
            "mode, concurrency, timeout, retries, backoff, price_in or price_out = value. Repeatable.",
            JUDGING,
            (),
            metavar="KEY=VALUE",
            cli=list[str],
        ),
    ]


class Options(Judged, total=False):
    """How a method is run on a task, beside which: the keyword arguments of `harness.evaluate`."""

    model_base_url: Annotated[
        str | None, Option("Server of an openai/<name> model [default: $OPENAI_BASE_URL].", WHAT, metavar="URL")
    ]
    model_set: Annotated[
        Pairs,
        Option(
            "Of an openai/<name> model: concurrency, timeout, retries, backoff, price_in or price_out (US dollars a million "
            "tokens) = value. Repeatable.",
            WHAT,
            (),
            metavar="KEY=VALUE",
            cli=list[str],
        ),
    ]
    model_path: Annotated[
        AnyPath | None, Option("Local weights: folder or .gguf file.", WHAT, metavar="FOLDER", cli=str | None)
    ]
    preset: Annotated[
        Names,
        Option(
            "A named preset of the method, such as released; of several methods, dps.released.",
            WHAT,
            (),
            metavar="NAME",
            cli=list[str],
            completes="presets",
        ),
    ]
    set: Annotated[
        Pairs,
        Option(
            "Method option key=value; of several methods, dps.key=value is one's own. 'harness list methods NAME' explains them.",
            WHAT,
            (),
            metavar="KEY=VALUE",
            cli=list[str],
        ),
    ]
    task_set: Annotated[
        Pairs, Option("Task option key=value. Repeatable.", WHAT, (), metavar="KEY=VALUE", cli=list[str])
    ]
    num_fewshot: Annotated[int | None, Option("Solved examples before each question.", WHAT, minimum=0)]
    control: Annotated[
        Control,
        Option(
            "none, wrong_user (everyone gets another user's history) or shuffled (its order changed).",
            WHAT,
            cli=str,
            completes="controls",
        ),
    ]
    data: Annotated[
        AnyPath | None,
        Option(
            "Folder of the task's files [default: $HARNESS_DATA, else lamp-mini].",
            DATA,
            metavar="FOLDER",
            cli=str | None,
        ),
    ]
    split: Annotated[str, Option("Split to evaluate [default: dev; mmlu: test].", DATA, "", metavar="NAME")]
    limit: Annotated[int | None, Option("At most this many items.", DATA, minimum=1)]
    users: Annotated[int | None, Option("Items of at most this many users.", DATA, minimum=1)]
    exclude_leaks: Annotated[bool, Option("Leave out items whose user's history holds the answer.", DATA)]
    seed: Annotated[int, Option("Decides every draw: fits, sampling, splits.", SAMPLING, minimum=0)]
    max_new_tokens: Annotated[int | None, Option("Tokens of an answer [default: the task's].", SAMPLING, minimum=1)]
    temperature: Annotated[float, Option("0 is greedy.", SAMPLING, minimum=0)]
    top_p: Annotated[float, Option("Nucleus sampling, above 0; 1 is no cut.", SAMPLING)]
    top_k: Annotated[int, Option("0 is no cut.", SAMPLING, minimum=0)]
    fit_split: Annotated[
        str | None, Option("Split to fit on [default: train], or a share: dev:0.2.", FITTING, metavar="SPLIT")
    ]
    fit_task: Annotated[str | None, Option("Fit on another task's items.", FITTING, metavar="NAME", completes="tasks")]
    fit_data: Annotated[
        AnyPath | None,
        Option("Folder of the --fit_task's files [default: --data's].", FITTING, metavar="FOLDER", cli=str | None),
    ]
    fit_set: Annotated[
        Pairs,
        Option("Option key=value of the --fit_task. Repeatable.", FITTING, (), metavar="KEY=VALUE", cli=list[str]),
    ]
    batch_size: Annotated[
        int | Literal["auto"], Option("Samples a batch: a number, or auto.", MACHINE, "auto", metavar="N", cli=str)
    ]
    dtype: Annotated[
        str,
        Option(
            "auto (bfloat16 on CUDA, float32 on CPU), float32, bfloat16, float16, float64.",
            MACHINE,
            "auto",
            completes="dtypes",
        ),
    ]
    device: Annotated[str, Option("auto, cpu, cuda or cuda:N.", MACHINE, "auto", completes="devices")]
    device_map: Annotated[str | None, Option("auto spreads a large model over GPUs.", MACHINE)]
    output_path: Annotated[
        AnyPath, Option("Folder to write to.", OUTPUT, metavar="PATH", cli=Path, spellings=("output", "path"))
    ]
    allow_noop: Annotated[bool, Option("Exit 0 though a method changed nothing.", OUTPUT)]
    effect_samples: Annotated[
        int, Option("Answers to compare with the unedited model's; 0: none.", MACHINE, 32, minimum=0, metavar="N")
    ]
    retry_failed: Annotated[bool, Option("Run the failed samples of a finished record again.", OUTPUT)]


class Command(Options, total=False):
    """What a command line says besides."""

    method: Annotated[
        list[str],
        Option("Registered name, or ./file.py:Class. Repeatable.", WHAT, NEEDED, metavar="NAME", completes="methods"),
    ]
    task: Annotated[
        list[str],
        Option("Task name, as in lamp4 (also LaMP-4). Repeatable.", WHAT, NEEDED, metavar="NAME", completes="tasks"),
    ]
    model: Annotated[
        str,
        Option(
            "Alias, hub id, folder or .gguf file; see 'harness list models'.",
            WHAT,
            "tiny",
            metavar="NAME",
            completes="models",
        ),
    ]
    json: Annotated[bool, Option("Print records as JSON, one a line.", OUTPUT, False)]
    on: Annotated[
        str | None,
        Option("Workers: local:N, ray, ray://HOST:PORT, slurm:KEY=VALUE,... or workers:N.", MACHINE, metavar="WHERE"),
    ]
    gpus_per_worker: Annotated[
        float | None, Option("GPUs of each worker of --on [default: 1 where there are any].", MACHINE, minimum=0)
    ]
    mixed_hardware: Annotated[
        bool, Option("Workers of --on may compute on unlike hardware, whose last bits differ.", MACHINE, False)
    ]


def declared() -> dict[str, tuple[Any, Option]]:
    """Name -> its type in Python and its declaration, in the order written above."""
    defaults = {f.name: f.default for f in fields(Settings) if f.default is not MISSING}
    found = {}
    for name, hint in get_type_hints(Command, include_extras=True).items():
        kind, option = get_args(hint)
        if option.default is None and name in defaults:
            option = Option(**{**vars(option), "default": defaults[name]})
        found[name] = (kind, option)
    return found


def with_defaults(given: Options) -> Command:
    """All of them: those not given at their default."""
    return {**{name: option.default for name, (_, option) in declared().items()}, **given}  # type: ignore[typeddict-item]


def checked(given: Options) -> Options:
    """What was given from Python, with numbers of numpy as Python's. Raises UsageError for a name that is no option of
    `harness.evaluate`, and for a value of another type than its option has."""
    known, own = declared(), Options.__annotations__
    found: dict[str, Any] = {}
    for name, value in given.items():
        if name not in own:
            alone = f"; the command 'harness run' alone has --{name};" if name in known else did_you_mean(name, own)
            raise UsageError(f"unknown option {name!r}{alone} allowed: {', '.join(own)}")
        kind, option = known[name]
        if not _fits(value, kind) and not (
            option.cli is str and isinstance(value, str)
        ):  # words, which are checked by name
            shown = " ".join(reprlib.repr(value).split())
            raise UsageError(f"{name}={shown} is not valid; allowed: {_in_words(kind)}")
        found[name] = _plain(value)
    return cast(Options, found)


def _fits(value: object, kind: Any) -> bool:
    """Whether a value is of a type; a whole number is a number, and a text is no list of its letters."""
    origin, inside = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return any(_fits(value, one) for one in inside)
    if origin is Literal:
        return any(type(value) is type(one) and value == one for one in inside)
    if origin is Sequence:
        return isinstance(value, Sequence) and not isinstance(value, str) and all(_fits(v, inside[0]) for v in value)
    if kind in (int, float):
        return isinstance(value, numbers.Integral if kind is int else numbers.Real) and not isinstance(value, bool)
    return isinstance(value, origin or kind)


def _plain(value: object) -> object:
    if isinstance(value, numbers.Real) and type(value).__module__ != "builtins":
        return int(value) if isinstance(value, numbers.Integral) else float(value)
    return value


def _in_words(kind: Any) -> str:
    inside = get_args(kind)
    if get_origin(kind) in (Union, UnionType):
        return " or ".join(map(_in_words, inside))
    if get_origin(kind) is Literal:
        return " or ".join(map(repr, inside))
    return _WORDS[get_origin(kind) or kind]


_WORDS: Mapping[Any, str] = {
    int: "a whole number",
    float: "a number",
    str: "a text",
    bool: "True or False",
    type(None): "None",
    Mapping: "a dict",
    Sequence: "a list of texts",
    os.PathLike: "a path",
}


def pairs(given: Pairs) -> list[str]:
    """`key=value` strings, as a command line has them."""
    if isinstance(given, Mapping):
        return [f"{key}={_text(value)}" for key, value in given.items()]
    return list(given)


def names(given: Names) -> list[str]:
    return [given] if isinstance(given, str) else list(given)


def path_text(given: AnyPath | None) -> str | None:
    return None if given is None else os.fspath(given)


def folder_text(option: str, given: AnyPath | None) -> str | None:
    """The folder as text. Raises UsageError for a URL or a file."""
    text = path_text(given)
    if text is not None and "://" in text:
        raise UsageError(f"{option} {text} is a URL; 'harness data get TASK' downloads, then give the folder")
    if text is not None and os.path.isfile(os.path.expanduser(text)):
        raise UsageError(f"{option} {text} is a file; give the folder that holds it: {Path(text).parent}")
    return text


DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")


def check_model(model: str, given: Options, *, served: bool = True) -> None:
    """What can be told of the model, its precision and device, and of where to write, before any data is read and without torch.

    One behind a server is taken only where it is `served` that can be used.
    Raises UsageError for a name, word or address that is none, DataMissing where weights or a server are not there.
    """
    from harness.plugins.registry import model_row
    from harness.servers.address import ENDPOINT
    from harness.servers.endpoint import server_of

    asked = with_defaults(given)
    if model.startswith(ENDPOINT) and not served:
        raise UsageError(f"{model} is behind a server, which only 'harness run' can ask; name a model on this machine")
    if model == ENDPOINT:
        raise UsageError(f"--model {ENDPOINT} names no model; give one as in {ENDPOINT}gpt-4.1-mini")
    if model.startswith(ENDPOINT):
        server_of(model.removeprefix(ENDPOINT), "model", asked["model_base_url"])
    else:
        for option, said in (("--model_base_url", asked["model_base_url"]), ("--model_set", asked["model_set"])):
            if said:
                raise UsageError(f"{option} is about the server of an {ENDPOINT}<name> model; {model} has no server")
        model_row(model, path_text(asked["model_path"]))
    if asked["dtype"] not in DTYPES:
        hint = did_you_mean(asked["dtype"], DTYPES)
        raise UsageError(f"unknown dtype {asked['dtype']!r}{hint} allowed: {', '.join(DTYPES)}")
    if not re.fullmatch(r"auto|cpu|cuda(:[0-9]+)?", asked["device"]):
        raise UsageError(f"unknown device {asked['device']!r}; allowed: auto, cpu, cuda, cuda:N")
    place = os.fspath(asked["output_path"])
    while place and not os.path.lexists(place):
        place = os.path.dirname(place)
    if place and not os.path.isdir(place):
        raise UsageError(f"--output_path {os.fspath(asked['output_path'])}: {place} is a file; give a folder")


def _text(value: object) -> str:
    if isinstance(value, list | tuple):
        return ",".join(map(_text, value))
    return "none" if value is None else str(value)
