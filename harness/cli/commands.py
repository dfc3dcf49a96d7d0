"""Typer commands from the declarations, and help that shows options under headings and no sentence cut short."""

from __future__ import annotations

import inspect
import re
import shutil
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from harness.cli.declarations import DTYPES, HEADINGS, NEEDED, declared
from harness.run.control import Control

CONTEXT = {"token_normalize_func": lambda name: name.replace("-", "_"), "max_content_width": 80}
"""Every option may be written with dashes: `--fit-split` is `--fit_split`."""


_ASKED = "A folder of records, a record, a hash or a glob. Repeatable [default: results and runs]."
RecordsArgument = Annotated[list[str] | None, typer.Argument(metavar="RECORDS", help=_ASKED, show_default=False)]
RecordsOption = Annotated[
    list[str], typer.Option("--records", "--results", metavar="RECORDS", help=_ASKED, show_default=False)
]
OldResults = Annotated[list[str], typer.Option("--results", hidden=True)]
"""`--results`, as commands had it whose records are now an argument."""


def with_options(*names: str, **changed: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A command that also takes the options declared under `names`; it gets them as keyword arguments.

    `changed` are the defaults that are its own, as `help_task="..."` is its own words for the help of `task`.
    """

    def decorate(act: Callable[..., None]) -> Callable[..., None]:
        known, own = declared(), inspect.signature(act, eval_str=True)
        kept = [p for p in own.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        made = [_parameter(name, *known[name], changed) for name in names]
        everything = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in (*made, *kept)]
        act.__signature__ = inspect.Signature(everything)  # type: ignore[attr-defined]
        return act

    return decorate


def _parameter(name: str, kind: Any, option: Any, changed: dict[str, Any]) -> inspect.Parameter:
    cli = option.cli or kind
    default = changed.get(name, option.default)
    if typing.get_origin(cli) is list and default == ():
        default = []
    whole = int in (cli, *typing.get_args(cli))
    given = {
        "help": changed.get(f"help_{name}", option.help),
        "rich_help_panel": option.heading or None,
        "metavar": option.metavar or None,
        "min": option.minimum if option.minimum is None or not whole else int(option.minimum),
        "max": option.maximum,
        "autocompletion": completing(option.completes) if option.completes else None,
        "show_default": default is not False and default not in (None, "", []),
    }
    spellings = tuple(f"--{spelling}" for spelling in (name, *option.spellings))
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=inspect.Parameter.empty if default is NEEDED else default,
        annotation=Annotated[cli, typer.Option(*spellings, **given)],
    )


class Command(TyperCommand):
    """Its help has a heading for each group of options."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        _write_parameters(self, ctx, formatter)


class Group(TyperGroup):
    """Its help has the whole first sentence of each command."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        _write_parameters(self, ctx, formatter)
        lines = [(name, _first_sentence(command.help)) for name, command in self.commands.items() if not command.hidden]
        if lines:
            with formatter.section("Commands"):
                formatter.write_dl(lines)


def width(most: int = 100) -> int:
    """Columns of the terminal, `most` of them; 80 where there is none."""
    return min(shutil.get_terminal_size((80, 40)).columns, most)


def completing(*what: str) -> Callable[[typer.Context, str], list[str]]:
    """What a shell offers in place of a name: those of the lists `what` that begin with the letters typed.

    A list is one of `harness list`, of `CHOICES`, or a word that is offered as it is.
    """

    def complete(ctx: typer.Context, incomplete: str) -> list[str]:
        names = [name for one in what for name in _offered(one, ctx)]
        return [name for name in dict.fromkeys(names) if name.startswith(incomplete)]

    return complete


CHOICES: Mapping[str, Sequence[str]] = {
    "controls": typing.get_args(Control),
    "dtypes": DTYPES,
    "devices": ("auto", "cpu", "cuda"),
    "formats": ("terminal", "md", "csv", "json"),
}
"""What an option may be that has no list of its own."""


def _offered(what: str, ctx: typer.Context) -> Sequence[str]:
    from harness.cli.listing import LISTS

    if what == "lists":
        return list(LISTS)
    if what == "presets":  # of the methods named so far
        from harness.plugins.registry import method_class

        return [name for method in ctx.params.get("method") or () for name in method_class(method).presets]
    if what in LISTS:
        return [row[0] for row in LISTS[what][1]()]
    return CHOICES.get(what, (what,))


def app(*, completes: bool = False, default: str = "", **settings: Any) -> typer.Typer:
    """A Typer app whose commands and help are as above; with `completes`, one that can install completion for the shell.

    `default` is the command that is meant where an option comes first.
    """

    class App(typer.Typer):
        def command(self, name: str | None = None, **given: Any) -> Any:
            return super().command(name, cls=Command, **given)

    class Defaulting(Group):
        def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
            meant = default and args and args[0].startswith("-") and args[0] not in ctx.help_option_names
            return super().parse_args(ctx, [default, *args] if meant else args)

    return App(
        cls=Defaulting,
        context_settings=CONTEXT,
        add_completion=completes,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        **settings,
    )


def _write_parameters(command: Any, ctx: Any, formatter: Any) -> None:
    sections: dict[str, list[tuple[str, str]]] = {heading: [] for heading in ("Arguments", *HEADINGS, "Options")}
    for param in command.get_params(ctx):
        record = param.get_help_record(ctx)
        if record is None:
            continue
        heading, left = "Arguments", param.metavar or record[0]
        if param.param_type_name == "option":
            heading, left = param.rich_help_panel or "Options", " ".join(_spelled(param, record[0]))
        sections.setdefault(heading, []).append((left, record[1]))
    for heading, lines in sections.items():
        if lines:
            with formatter.section(heading):
                formatter.write_dl(lines)


def _spelled(param: Any, shown: str) -> Iterator[str]:
    """`--limit N`: the first spelling, and what is to be given; `shown` is both as Typer says them."""
    yield param.opts[0] if not param.secondary_opts else f"{param.opts[0]}/{param.secondary_opts[0]}"
    if not param.is_flag:
        kind = re.sub(r".*?[\s<]([\w ]+)\W*$", r"\1", shown).lower()
        yield param.metavar or next((short for word, short in METAVARS.items() if word in kind), "TEXT")


METAVARS = {"int": "N", "float": "X", "path": "PATH"}


def _first_sentence(text: str | None) -> str:
    paragraph = " ".join((text or "").strip().partition("\n\n")[0].split())
    return paragraph.rstrip(".") if paragraph else ""
