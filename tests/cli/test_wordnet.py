"""WordNet for METEOR, from Debian's packages or what they install."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from harness.cli.fetch import wordnet
from harness.statistics import metrics

SHARED = Path(os.environ.get("HARNESS_SHARED", "../shared/data")).resolve()


def package(path: Path, files: dict[str, bytes]) -> Path:
    """A Debian package that installs the files below usr/share/wordnet."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:xz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"./usr/share/wordnet/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    parts = {"debian-binary": b"2.0\n", "control.tar.xz": b"odd", "data.tar.xz": data.getvalue()}
    content = b"!<arch>\n"
    for name, part in parts.items():
        content += (
            f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(part):<10}`\n".encode() + part + b"\n" * (len(part) % 2)
        )
    path.write_bytes(content)
    return path


def test_packages_become_what_nltks_reader_opens(harness: Callable, tmp_path: Path) -> None:
    half = len(wordnet.NEEDED) // 2
    files = {name: name.encode() for name in wordnet.NEEDED}
    one = package(tmp_path / "one.deb", dict(list(files.items())[:half]))
    two = package(tmp_path / "two.deb", dict(list(files.items())[half:]))
    done = harness(f"data get wordnet --from {one} --from {two}")
    folder = Path(done.out.strip())
    assert folder.parts[-4:] == ("cache", "nltk_data", "corpora", "wordnet")
    assert {path.name for path in folder.iterdir()} == {*wordnet.NEEDED, "lexnames"}
    assert (folder / "data.noun").read_bytes() == b"data.noun"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda folder: folder / "none.deb", "does not exist; give a .deb file or a folder"),
        (lambda folder: package(folder / "half.deb", {"data.noun": b""}), "no index.noun, index.verb"),
    ],
)
def test_what_holds_no_wordnet_is_exit_4(harness: Callable, tmp_path: Path, make: Callable, words: str) -> None:
    done = harness(f"data get wordnet --from {make(tmp_path)}")
    assert done.code == 4 and words in done.error()


def test_lexnames_is_the_table_of_wordnets_manual() -> None:
    lines = wordnet.lexnames().splitlines()
    assert (lines[0], lines[3], lines[29], lines[44]) == (
        "00\tadj.all\t3",
        "03\tnoun.Tops\t1",
        "29\tverb.body\t2",
        "44\tadj.ppl\t3",
    )
    published = SHARED / "wordnet_lexnames" / "lexnames"
    if published.is_file():
        assert wordnet.lexnames().split() == published.read_text().split()


def test_what_is_not_about_wordnet_or_about_nothing_else_is_refused(harness: Callable, tmp_path: Path) -> None:
    for given in ("--output_path there", "--split time", "--part dev"):
        done = harness(f"data get wordnet {given}")
        assert done.code == 2 and "wordnet goes where METEOR looks for it" in done.err
    done = harness("data get lamp4 --from here")
    assert done.code == 2 and "--from here is about wordnet; lamp4 is downloaded" in done.err


@pytest.mark.skipif(not (wordnet.INSTALLED / "data.noun").is_file(), reason="needs Debian's wordnet-base installed")
def test_meteor_reads_what_was_made(harness: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    texts = ("a big hound is running over the fields", "The large dog ran across a field.")
    installed = metrics.meteor(*texts)
    harness("data get wordnet")
    monkeypatch.setattr(metrics, "_DEBIAN_WORDNET", tmp_path)
    monkeypatch.setattr("nltk.data.path", [])
    metrics._wordnet.cache_clear()
    try:
        assert metrics.wordnet_missing() == ""
        assert metrics.meteor(*texts) == installed and installed.unsplit
    finally:
        metrics._wordnet.cache_clear()
