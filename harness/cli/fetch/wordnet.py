"""`harness data get wordnet`: what METEOR reads of WordNet 3.0, from Debian's packages into the user's cache.

Debian's `wordnet-base` and `wordnet-sense-index` hold all files that NLTK's reader opens but `lexnames`, the table of
lexicographer files in WordNet's manual (lexnames(5WN)), which is written here.
"""

from __future__ import annotations

import io
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from harness.errors import DataMissing, HarnessError
from harness.files.user_cache import nltk_cache
from harness.files.whole import replacing_folder

PACKAGES = ("wordnet-base", "wordnet-sense-index")
INSTALLED = Path("/usr/share/wordnet")
NEEDED = tuple(f"{kind}.{part}" for kind in ("index", "data") for part in ("noun", "verb", "adj", "adv"))
NEEDED += tuple(f"{part}.exc" for part in ("noun", "verb", "adj", "adv"))
WELCOME = ("index.sense", "cntlist.rev")
"""Which NLTK's reader may open for other things than METEOR."""

_NOUNS = (
    "Tops act animal artifact attribute body cognition communication event feeling food group location motive object \
person phenomenon plant possession process quantity relation shape state substance time"
)
_VERBS = (
    "body change cognition communication competition consumption contact creation emotion motion perception possession \
social stative weather"
)


def lexnames() -> str:
    """The file: number, name and part of speech (1 noun, 2 verb, 3 adjective, 4 adverb), separated by tabs."""
    names = [("adj.all", 3), ("adj.pert", 3), ("adv.all", 4)]
    names += [(f"noun.{name}", 1) for name in _NOUNS.split()] + [(f"verb.{name}", 2) for name in _VERBS.split()]
    names.append(("adj.ppl", 3))
    return "".join(f"{number:02d}\t{name}\t{part}\n" for number, (name, part) in enumerate(names))


def get(sources: Sequence[Path] = ()) -> Path:
    """Write WordNet to the cache and return its folder; `sources` are .deb files or folders of WordNet's files.

    Without them it takes what is installed, or has apt-get download the packages, which needs no administrator. Raises
    DataMissing, naming the packages, where no file is to be had.
    """
    target = nltk_cache() / "corpora" / "wordnet"
    with tempfile.TemporaryDirectory() as scratch:
        found = _files(sources or ([INSTALLED] if (INSTALLED / "data.noun").is_file() else _downloaded(Path(scratch))))
        lacking = [name for name in NEEDED if name not in found]
        if lacking:
            raise DataMissing(
                f"no {', '.join(lacking)} in {', '.join(map(str, sources)) or INSTALLED}; give Debian's packages "
                f"{' and '.join(PACKAGES)} as --from, as .deb files or the folder they install"
            )
        target.parent.mkdir(parents=True, exist_ok=True)
        with replacing_folder(target) as draft:
            draft.mkdir(parents=True, exist_ok=True)
            for name in (*NEEDED, *WELCOME):
                if name in found:
                    (draft / name).write_bytes(found[name])
            (draft / "lexnames").write_text(lexnames(), encoding="ascii")
    return target


def _downloaded(folder: Path) -> list[Path]:
    command = ["apt-get", "download", *PACKAGES]
    if shutil.which(command[0]) is None:
        raise DataMissing(
            f"WordNet is not installed and there is no apt-get here; give Debian's {' and '.join(PACKAGES)} as --from FILE.deb"
        )
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        why = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise DataMissing(f"'{' '.join(command)}' failed: {why}; give the packages as --from FILE.deb")
    return sorted(folder.glob("*.deb"))


def _files(sources: Sequence[Path]) -> Mapping[str, bytes]:
    """WordNet's files in folders and packages, by name."""
    wanted = {*NEEDED, *WELCOME}
    found: dict[str, bytes] = {}
    for source in sources:
        if source.is_dir():
            found |= {name: (source / name).read_bytes() for name in wanted if (source / name).is_file()}
        elif source.is_file():
            with _contents(source) as archive:
                for member in archive:
                    name = member.name.rpartition("/")[2]
                    file = archive.extractfile(member) if member.isfile() and name in wanted else None
                    if file is not None:
                        found[name] = file.read()
        else:
            raise DataMissing(f"--from {source} does not exist; give a .deb file or a folder of WordNet's files")
    return found


def _contents(package: Path) -> tarfile.TarFile:
    """The data of a Debian package: an `ar` archive of a version, control files, and a tar archive."""
    content, place = package.read_bytes(), 8
    if not content.startswith(b"!<arch>\n"):
        raise HarnessError(f"{package} is no Debian package")
    while place + 60 <= len(content):
        header = content[place : place + 60]
        name, size = header[:16].decode("ascii").strip().rstrip("/"), int(header[48:58])
        if name.startswith("data.tar"):
            try:
                return tarfile.open(fileobj=io.BytesIO(content[place + 60 : place + 60 + size]))
            except tarfile.ReadError as error:
                raise HarnessError(
                    f"{package}: {name} cannot be read here: {error}; unpack it and give its folder"
                ) from error
        place += 60 + size + size % 2
    raise HarnessError(f"{package} holds no data.tar; fetch it again")
