"""A name for the file or folder of a user or an item, whatever the id is: one plain component, and it reads back."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from urllib.parse import quote_from_bytes, unquote_to_bytes

from harness.errors import HarnessError
from harness.files.whole import LONGEST, replace_file

NAMES = "names.json"
"""Beside files that are called by ids: name -> id."""
_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\.|$)", re.IGNORECASE)
"""Devices, on one operating system."""


def file_name(id: str) -> str:
    """The name of an id's file: `user 7` -> `user%207`, `../x` -> `%2E.%2Fx`. `id_of` reads it back.

    Letters, digits, `_`, `-` and `.` inside stay; of an id too long for a name the start and a hash.
    """
    name = quote_from_bytes(id.encode("utf-8", "surrogatepass"), safe="").replace("~", "%7E")
    name = re.sub(r"^[.-]|\.$", lambda sign: f"%{ord(sign[0]):02X}", name)
    if _RESERVED.match(name):
        name = f"%{ord(name[0]):02X}{name[1:]}"
    if len(name) > LONGEST:
        start = re.sub(r"%.?$", "", name[: LONGEST - 17])
        name = f"{start}~{_digest(id)}"
    return name or "~"


def names_of(ids: Iterable[str]) -> dict[str, str]:
    """`file_name` of each, made different where some file systems would not tell two apart (`Ann` and `ann`)."""
    found: dict[str, str] = {}
    taken: set[str] = {NAMES}
    for id in sorted(set(ids)):
        name = file_name(id)
        if name.lower() in taken:
            name = f"{name}~{_digest(id)}"
        taken.add(name.lower())
        found[id] = name
    return found


def id_of(name: str) -> str:
    """What `file_name` named. Raises ValueError for the name of a long id, which stands in the table of names alone."""
    if name == "~":
        return ""
    if "~" in name:
        raise ValueError(f"{name!r} holds a part of an id; {NAMES} beside it holds all")
    return unquote_to_bytes(name).decode("utf-8", "surrogatepass")


def write_names(folder: Path, names: Mapping[str, str]) -> None:
    """The table of names, `names_of` the ids, beside the files."""
    content = json.dumps({name: id for id, name in names.items()}, indent=1, sort_keys=True)
    replace_file(folder / NAMES, f"{content}\n".encode())


def named(folder: Path, id: str) -> Path:
    """Where the file or folder of an id lies in `folder`: as its table of names says, else by its name, else by the id
    itself where that is no path."""
    table: object = {}
    try:
        table = json.loads((folder / NAMES).read_bytes())
    except FileNotFoundError:
        pass
    except (OSError, ValueError, RecursionError) as error:
        raise HarnessError(f"{folder / NAMES} cannot be read ({error}); it says which name is whose") from error
    if isinstance(table, dict):
        for name, whose in table.items():
            if whose == id and _is_name(name):
                return folder / name
    if _is_name(id) and not (folder / file_name(id)).exists():
        return folder / id
    return folder / file_name(id)


def _is_name(text: str) -> bool:
    """Whether it is the name of something in a folder, rather than a path or what no file can be called."""
    try:
        return text not in ("", ".", "..") and not re.search(r"[/\\\x00]", text) and len(os.fsencode(text)) < 256
    except UnicodeEncodeError:
        return False


def _digest(id: str) -> str:
    return hashlib.sha256(id.encode("utf-8", "surrogatepass")).hexdigest()[:16]
