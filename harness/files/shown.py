"""Text that leaves the process: without credentials, without what a terminal, a spreadsheet or a page would obey.

    say(line)                    a line for the user, on stdout or stderr; every command prints through it
    printable(text)              model text and names, for a terminal
    csv_cell(value)              for a spreadsheet
    markdown(text)               a name or a number in a line or a cell of Markdown
    without_credentials(text)    addresses as they may be kept and shown

Files of records keep a model's words as they are, as JSON with everything odd escaped.
"""

from __future__ import annotations

import re
import sys
from typing import TextIO
from urllib.parse import parse_qsl, urlencode

# control characters but newline and tab; marks that turn the direction of writing or are seen by nobody; half a surrogate pair
_OBEYED = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e0fff]"
)
_FORMULA = re.compile(r"\s*[=+\-@\uff1d\uff0b\uff0d\uff20]")
_NUMBER = re.compile(r"[-+]?[\d\s.,/%±-]*(e[+-]?\d+)?", re.IGNORECASE)
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://([^\s'\"<>`]+)")
_KEY = re.compile(r"(?<![\w-])(sk|pk|hf|gsk|xai|Bearer|Basic)([-_ ])[A-Za-z0-9+/=_-]{16,}")
_PUBLIC = {"api-version"}
"""Of an address's query: what names no person and no key, and without which a server is not the same."""


def say(text: object = "", *, stream: TextIO | None = None, bold: bool = False) -> None:
    """Print to stdout, or `stream`, what a terminal shows and does not obey; but `bold`, where it is wanted."""
    shown = printable(str(text))
    if bold:
        shown = re.sub(r"\\u001b\[([01])m", "\x1b[\\1m", shown)
    print(shown, file=stream or sys.stdout)


def message(text: str) -> str:
    """What a user is told, in one line."""
    return one_line(without_credentials(" ".join(text.split())))


def first_line(said: object) -> str:
    """Of a library's error or a docstring, what it says first; of an error without words its type."""
    lines = str("" if said is None else said).strip().splitlines()
    return lines[0].rstrip() if lines else type(said).__name__ if isinstance(said, BaseException) else ""


def printable(text: str) -> str:
    r"""With what a terminal would obey as `\u001b`, which in JSON is the same text."""
    return _OBEYED.sub(_escaped, text)


def one_line(text: str) -> str:
    r"""`printable`, with line breaks as `\u000a` too."""
    return re.sub(r"[\n\t]", _escaped, printable(text))


def _escaped(letter: re.Match[str]) -> str:
    code = letter[0].encode("utf-16-be", "surrogatepass").hex()
    return "".join(f"\\u{code[i : i + 4]}" for i in range(0, len(code), 4))


def csv_cell(value: object) -> object:
    """A cell that no spreadsheet takes for a formula; numbers stay as they are."""
    if not isinstance(value, str):
        return value
    text = printable(value)
    return f"'{text}" if _FORMULA.match(value) and not _NUMBER.fullmatch(text) else text


def markdown(text: str, *, inside: bool = False) -> str:
    """One line of plain text: no tag, link, emphasis, code, cell or heading of the text's own making.

    What is `inside` a line, such as a cell, cannot begin a heading or a list.
    """
    text = " ".join(printable(text).split())
    text = text.replace("&", "&amp;").replace("<", "&lt;")
    text = re.sub(r"[\\`*~|]", r"\\\g<0>", text)
    text = re.sub(r"\](?=[(\[:])|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\\g<0>", text)
    return text if inside else re.sub(r"^(\d*)([#>+=.)-])(?=[#=-]*(\s|$))", r"\1\\\2", text)


def without_credentials(text: str) -> str:
    """With every address in it cut to scheme, host, port and path, and without what looks like a key."""
    return _KEY.sub(r"\1\2***", _URL.sub(lambda found: _bare(found[1], found[2]), text))


def _bare(scheme: str, rest: str) -> str:
    place = re.split(r"[/?#\\]", rest, maxsplit=1)[0]
    port = place.rpartition(":")[2] if ":" in place.rpartition("@")[2].rpartition("]")[2] else ""
    if "@" in place or not re.fullmatch(r"\d*", port):  # a password may hold a slash of its own
        _, at, after = rest.rpartition("@")
        rest = after if at else "***"
    path, mark, query = re.split(r"([?#])", rest, maxsplit=1) if re.search(r"[?#]", rest) else (rest, "", "")
    kept = [(k, v) for k, v in parse_qsl(query.partition("#")[0]) if k in _PUBLIC] if mark == "?" else []
    return f"{scheme}://{path}{'?' + urlencode(kept) if kept else ''}"
