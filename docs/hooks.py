"""What the documentation site has besides docs/: pages of the repository, and a reference that the code writes. Loaded by mkdocs.yml.

README is the start page. Links that lead out of docs/ go to the page that was made of their file, or become plain text.
"""

from __future__ import annotations

import inspect
import posixpath
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import typer
import yaml
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
PAGES: Mapping[str, str] = {
    "README.md": "index.md",
    "results/README.md": "results.md",
    "leaderboard.md": "leaderboard.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
"""File of the repository -> page of the site."""
SOURCE = {page: file for file, page in PAGES.items()}


def on_config(config: Any) -> Any:
    """A page of docs/ that the navigation does not name is listed under Learn."""
    named = yaml.safe_dump(config.nav)
    learn = next(part["Learn"] for part in config.nav if "Learn" in part)
    learn += [page.name for page in sorted((ROOT / "docs").glob("*.md")) if page.name not in named]
    return config


def on_files(files: Any, config: Any) -> Any:
    for file, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / file).read_text(encoding="utf-8")))
    for name, make in REFERENCE.items():
        files.append(File.generated(config, f"reference/{name}.md", content=make()))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Links as they are right on the site; those to files that are no page of it become their text."""
    uri = page.file.src_uri
    here = SOURCE.get(uri, f"docs/{uri}")

    def link(found: re.Match[str]) -> str:
        text, target = found[1], found[2]
        if re.match(r"[a-z]+:|#", target):
            return found[0]
        path, _, anchor = target.partition("#")
        there = posixpath.normpath(posixpath.join(posixpath.dirname(here), path))
        inside = PAGES.get(there) or (there.removeprefix("docs/") if there.startswith("docs/") else None)
        if inside and files.get_file_from_path(inside):
            relative = posixpath.relpath(inside, posixpath.dirname(uri) or ".")
            return f"[{text}]({relative}{'#' + anchor if anchor else ''})"
        if there.startswith("docs/") and not (ROOT / there).exists():
            return found[0]  # a link that is broken in the repository too: the strict build says so
        return text

    return re.sub(r"\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s]+)\)", link, markdown)


def commands() -> str:
    """Every command with its options, as `--help` says them."""
    from harness.cli.app import app

    root = typer.main.get_command(app)
    parts = ["# Commands\n\nGenerated from the command line's declarations. Every option may be written with dashes.\n"]
    for path, command in _walk(root, ("harness",)):
        context = command.make_context(" ".join(path), [], resilient_parsing=True)
        context.terminal_width = context.max_content_width = 100
        parts.append(f"## {' '.join(path)}\n\n```text\n{command.get_help(context)}\n```\n")
    return "\n".join(parts)


def _walk(command: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    yield path, command
    for name, sub in getattr(command, "commands", {}).items():
        if not sub.hidden:
            yield from _walk(sub, (*path, name))


def methods() -> str:
    """Every method: what it does and its options; then paper, code that was read, and what differs from it."""
    from harness.cli.listing import method_in_full
    from harness.methods import METHODS
    from harness.plugins.registry import method_class

    parts = [
        "# Methods\n\nGenerated from the methods' files: what each does, its options, its paper, and what differs from it.\n"
    ]
    for name in METHODS:
        module = inspect.getdoc(inspect.getmodule(method_class(name))) or ""
        parts.append(f"## {name}\n\n```text\n{method_in_full(name, 100)}\n```\n\n```text\n{module}\n```\n")
    return "\n".join(parts)


def tasks() -> str:
    """Every task with the first lines of its file."""
    from harness.cli.listing import LISTS
    from harness.plugins.registry import task_class

    parts = ["# Tasks\n\nGenerated from the tasks' files.\n"]
    modules: dict[str, list[str]] = {}
    for name, what in LISTS["tasks"][1]():
        parts.append(f"- `{name}`: {what}")
        modules.setdefault(inspect.getdoc(inspect.getmodule(task_class(name))) or "", []).append(name)
    parts += [f"\n## {', '.join(names)}\n\n```text\n{text}\n```" for text, names in modules.items() if text]
    return "\n".join(parts)


def records() -> str:
    """The fields of run.json and samples.jsonl, with types, defaults and the text below them."""
    from pydantic import BaseModel

    from harness.cli.listing import field_docs
    from harness.records import schema

    parts = [
        "# Records\n\nGenerated from the schema. `run.json` is a RunRecord; a field whose type is a class has its fields.\n"
    ]
    classes = [
        c
        for _, c in inspect.getmembers(schema, inspect.isclass)
        if issubclass(c, BaseModel) and c.__module__ == schema.__name__
    ]
    classes = [c for c in classes if not c.__name__.startswith("_")]
    for cls in sorted(classes, key=lambda c: (c.__name__ != "RunRecord", c.__name__)):
        said = field_docs(cls)
        about = inspect.cleandoc(cls.__dict__.get("__doc__") or "")
        parts.append(f"## {cls.__name__}\n\n{about}\n\n| Field | Type | Default | |\n|---|---|---|---|")
        for name, field in cls.model_fields.items():
            if field.exclude:
                continue
            kind = str(cls.__annotations__.get(name, "")).replace("|", "\\|")
            default = "" if field.is_required() or field.default_factory else f"`{field.default!r}`"
            parts.append(f"| `{name}` | `{kind}` | {default} | {said.get(name, '')} |")
        parts.append("")
    return "\n".join(parts)


def tables() -> str:
    """The papers' tables, and what is known against printed numbers."""
    parts = [
        "# Tables\n\nGenerated from the files that hold the printed numbers. `harness table NAME` shows one with what was measured.\n"
    ]
    for file in sorted((ROOT / "harness/publish/tables/papers").glob("*.yaml")):
        paper = yaml.safe_load(file.read_text(encoding="utf-8"))
        parts.append(f"## {paper['paper']}\n")
        for table in paper["tables"]:
            parts.append(f"### {paper['id']}-{table['id']}\n\n{table['title']}. {table.get('place', '')}.\n")
            parts += [f"{number}. {text}" for number, text in enumerate(table.get("errata", []), 1)]
            parts.append("")
    return "\n".join(parts)


REFERENCE: Mapping[str, Callable[[], str]] = {
    "commands": commands,
    "methods": methods,
    "tasks": tasks,
    "records": records,
    "tables": tables,
}
"""Page below reference/ -> what writes it."""
