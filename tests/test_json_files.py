"""What Python's JSON reader lets through and something later breaks on is refused where it is read, in one line."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from harness.errors import DataMissing
from harness.files.json_files import DEPTH, instance, parse, read_bytes, read_json
from harness.files.json_lists import NotAList, elements


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (b"[" * 100_000, "nested more than 100 deep"),
        (b"[" * (DEPTH + 1) + b"]" * (DEPTH + 1), "nested more than 100 deep"),
        (b'{"a": ' * 5000, "nested more than 100 deep"),
        (b'{"a": 1, "a": 2}', "field 'a' stands twice in one object"),
        (b"[NaN]", "NaN is no number in JSON"),
        (b"[-Infinity]", "-Infinity is no number in JSON"),
        (b"[1e400]", "1e400 is a number too large for a float"),
        (b"9" * 5000, "is a number of more than 300 digits"),
        (b'{"a": {"b": ["\\ud83d"]}}', "field a.b.0 holds half of a surrogate pair"),
        (b'["\\ud83d\\ude00\\udc00"]', "half of a surrogate pair"),
        (b'{"\\udc00": 1}', "half of a surrogate pair"),
        (b'["\xed\xa0\x80"]', "byte 2 is no UTF-8"),
        (b"\xff", "byte 0 is no UTF-8"),
        (b"", "Expecting value"),
    ],
)
def test_what_no_reader_should_hold_is_refused(text: bytes, problem: str) -> None:
    with pytest.raises(ValueError, match=problem) as refused:
        parse(text)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 200


def test_what_is_json_is_read_as_python_reads_it() -> None:
    assert parse(b'\xef\xbb\xbf{"a": [1, 2.5, true, null, "\\ud83d\\ude00"]}') == {
        "a": [1, 2.5, True, None, "\U0001f600"]
    }
    assert parse("[" * DEPTH + "]" * DEPTH)
    assert parse('"é"') == "é"
    assert parse(b'["\\ud83d"]', surrogates=True) == ["\ud83d"]  # a model may have written it


def listed(file: Path, content: bytes) -> object:
    """What `elements` makes of the content, or what it says."""
    file.write_bytes(content)
    seen: list[bytes] = []
    try:
        found = list(elements(file, seen.append))
    except NotAList as other:
        return f"no list but {other}"
    except ValueError as error:
        return str(error)
    assert b"".join(seen) == content
    for element in found:
        assert parse(content[element.start : element.start + element.size]) == element.value
    return [element.value for element in found]


def parsed(content: bytes) -> object:
    try:
        value = parse(content)
    except ValueError as error:
        return str(error)
    return value if isinstance(value, list) else f"no list but {type(value).__name__}"


@pytest.mark.parametrize("window", [1, 3, 30, 1 << 20])
@pytest.mark.parametrize(
    "content",
    [
        b"[]",
        b"\xef\xbb\xbf\r\n [ ] \t",
        b'[1, -2.5e3, 12345678901234567890, true,null , "\\u00e9\\ud83d\\ude00"]',
        '\ufeff[{"é": ["ü☕", {}]},\n  [[]], "x\U0001f600"]'.encode(),
        b"{}",
        b'"text"',
        b"",
        b"[",
        b"[1",
        b"[1,",
        b"[1 2]",
        b"[1,]",
        b"[,1]",
        b"[] 1",
        b"[1] ]",
        b'[{"a": 1},\n\n  {"a" 2}, 3]',
        b'[{"a": 1},\n "it stops',
        b'["a\nb"]',
        b'["\\x"]',
        b"[tru]",
        b"[1, NaN]",
        b"[1e400]",
        b"[" + b"9" * 400 + b"]",
        b'[{"a": 1, "a": 2}]',
        b'[0, {"b": ["\\ud83d"]}]',
        b"[" * 101 + b"]" * 101,
        b"[" * 100 + b"]" * 100,
        b"[" * 5000,
        b"[1, \xff]",
        '["é'.encode()[:-1],
    ],
)  # fmt: skip
def test_a_list_read_in_parts_is_the_list_read_whole_and_so_is_what_is_refused(tmp_path, monkeypatch, content, window):
    monkeypatch.setattr("harness.files.json_lists.WINDOW", window)
    found = listed(tmp_path / "list.json", content)
    assert found == parsed(content)


def test_a_fault_early_in_a_long_list_is_found_without_reading_the_rest(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("harness.files.json_lists.WINDOW", 100)
    (tmp_path / "long.json").write_bytes(b'[{"a": 1 "b"},' + b" " * 10**5)
    seen: list[bytes] = []
    with pytest.raises(ValueError, match="line 1 column 10"):
        list(elements(tmp_path / "long.json", seen.append))
    assert sum(map(len, seen)) < 1000


def test_a_folder_a_pipe_and_a_file_too_large_are_no_files_to_read(tmp_path: Path, monkeypatch) -> None:
    import os

    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(ValueError, match="it is no file"):
            read_bytes(path)
    (tmp_path / "large").write_bytes(b"12345")
    monkeypatch.setattr("harness.files.json_files.LARGEST", 4)
    with pytest.raises(ValueError, match="more than"):
        read_bytes(tmp_path / "large")


@dataclass
class Inner:
    kind: Literal["a", "b"]
    score: float | None = None


@dataclass
class Outer:
    id: str
    parts: tuple[str, ...] = ()
    inner: dict[str, Inner] = field(default_factory=dict)
    maybe: Inner | None = None
    n: int = 0


def test_an_object_becomes_the_dataclass_whose_fields_it_has() -> None:
    made = instance(
        Outer, {"id": "x", "parts": ["p"], "inner": {"i": {"kind": "a", "score": 1}}, "maybe": {"kind": "b"}}
    )
    assert made == Outer("x", ("p",), {"i": Inner("a", 1)}, Inner("b"))
    assert instance(Outer, {"id": "x", "maybe": None}) == Outer("x")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ({}, "field id: Field required"),
        ({"id": 1}, "field id: .* found 1"),
        ({"id": "x", "n": "1"}, "field n: "),
        ({"id": "x", "n": True}, "field n: "),
        ({"id": "x", "parts": "letters"}, "field parts: "),
        ({"id": "x", "inner": {"i": {"kind": "c"}}}, "field inner.i.kind: "),
        ({"id": "x", "other": 1}, "field other: "),
        ([], "found \\[\\]"),
        (None, "found None"),
    ],
)
def test_nothing_is_turned_into_what_it_is_not(content: object, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        instance(Outer, content)


def test_a_file_is_named_with_its_field(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"a": ["1"]}')
    with pytest.raises(DataMissing, match=r"thing .*x.json: field a.0: .* found '1'; expected numbers"):
        read_json(tmp_path / "x.json", dict[str, list[int]], "thing", "numbers")
