"""`harness vectors`: steering vectors out to other tools' files, and theirs in."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Unpack

import typer

from harness.cli import commands
from harness.cli.commands import with_options
from harness.cli.declarations import Command
from harness.cli.run import load
from harness.errors import DataMissing, UsageError
from harness.files.shown import say

if TYPE_CHECKING:
    from harness.fit.vector_files import Vectors

Trait = Annotated[str | None, typer.Option(help="Whose vectors, or what an imported file's are called.")]
Blocks = Annotated[
    str | None, typer.Option(help="0-based blocks to take, as in 3 or 11-15 [default: all there are vectors for].")
]

vectors_app = commands.app(
    help="Steering vectors to and from files: persona-vector .pt, GGUF control vectors, lm-eval's steered .pt."
)


@vectors_app.callback(invoke_without_command=True)
def _vectors(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help(), err=True)
        raise typer.Exit(2)


@vectors_app.command("export")
def export(
    source: Annotated[
        str,
        typer.Argument(metavar="SOURCE", help="Key of a fitted state, as 'harness fit' prints it, or a vector file."),
    ],
    path: Annotated[Path, typer.Argument(metavar="FILE", help="File to write: .safetensors (ours), .pt or .gguf.")],
    trait: Trait = None,
    pooling: Annotated[str, typer.Option(help="response, prompt or last_prompt.")] = "response",
    blocks: Blocks = None,
    steered: Annotated[bool, typer.Option("--steered", help="A .pt for lm-eval's --model steered.")] = False,
    blocks_name: Annotated[
        str, typer.Option("--blocks_name", help="Where lm-eval finds the blocks; GPT-2: h.")
    ] = "layers",
) -> None:
    """Write the vectors of a fitted state, or of another file, in the format that FILE's name says."""
    from harness.fit.vector_files import named, read_vectors, write_vectors

    wanted = _blocks(blocks)
    if Path(source).suffix:
        vectors = read_vectors(Path(source), wanted)
        vectors = named(vectors, trait) if trait else vectors
    else:
        vectors = _fitted(source, trait, pooling).at(wanted)
    if steered and path.suffix != ".pt":
        raise UsageError(f"--steered is a .pt file; {path} is none")
    _say(vectors, path, left_out=write_vectors(vectors, path, steered=steered, blocks_name=blocks_name))


@vectors_app.command("import")
@with_options("model", "model_path", "dtype", "device")
def import_(
    source: Annotated[Path, typer.Argument(metavar="FILE", help="Vectors as another tool wrote them.")],
    path: Annotated[Path, typer.Argument(metavar="OURS", help="The .safetensors file to write.")],
    trait: Trait = None,
    blocks: Blocks = None,
    **given: Unpack[Command],
) -> None:
    """Check another tool's vectors against a model and keep them as ours: `--set vectors=OURS` steers with them.

    Refused are vectors of another size, of another revision where a file says its model, and, asked for by --blocks, the last
    row of a persona-vector file.
    """
    from harness.fit.vector_files import named, read_vectors, save
    from harness.run.console import Terminal

    if path.suffix != ".safetensors":
        raise UsageError(f"imported vectors are kept as .safetensors; {path} is none")
    vectors = read_vectors(source, _blocks(blocks))
    lm = load(given["model"], given, Terminal())
    vectors.check(lm)
    about = replace(vectors.about, model=lm.name, revision=lm.revision, layers=lm.sites.layers)
    vectors = named(replace(vectors, about=about), trait or about.trait)
    save(vectors, path)
    _say(vectors, path, left_out=[block for block in range(lm.sites.layers) if block not in vectors.blocks])


def _fitted(key: str, trait: str | None, pooling: str) -> Vectors:
    from harness.fit.artifacts import ArtifactStore
    from harness.fit.vector_files import of_fitted

    store = ArtifactStore()
    state = store.get(key)
    if state is None:
        raise DataMissing(f"no fitted state {key} in {store.root}; 'harness fit --method persona_vector' makes one")
    name, revision, _ = store.made_from(key)["model"]
    return of_fitted(state, trait, pooling, model=name, revision=revision, key=key)


def _blocks(text: str | None) -> Sequence[int] | None:
    if text is None:
        return None
    found = re.fullmatch(r"([0-9]{1,9})(?:-([0-9]{1,9}))?", text)
    first, last = found.groups() if found else ("", "")
    if not found or int(last or first) < int(first):
        raise UsageError(f"--blocks {text} is not valid; give 0-based blocks as in 3 or 11-15, both included")
    return range(int(first), int(last or first) + 1)


def _say(vectors: Vectors, path: Path, left_out: Sequence[int]) -> None:
    """One JSON line to stdout; `left_out` are the model's blocks that the file has no vector for."""
    about = vectors.about
    facts = {"file": str(path), "trait": about.trait, "model": about.model, "width": vectors.width}
    kept = [block for block in vectors.blocks if block not in left_out]
    say(json.dumps({**facts, "blocks": kept, "left_out": list(left_out)}))
