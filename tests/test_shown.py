"""What leaves the process obeys nobody's text: terminals, spreadsheets and pages show it, and credentials stay here."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.files.shown import csv_cell, first_line, markdown, message, one_line, printable, without_credentials
from harness.run.console import Terminal

ROOT = Path(__file__).resolve().parents[1]
EVIL = "\x1b]0;title\x07\x1b[2J\x1b[31mred\x9b1m \u202egnp.exe \u2066 \x08\x7f\r \U000e0041 \ud83d"


def test_an_error_without_words_is_called_by_its_type():
    assert [first_line(ConnectionError(text)) for text in ("gone\nfor good", "", " \n")] == [
        "gone",
        *["ConnectionError"] * 2,
    ]
    assert [first_line(text) for text in ("\n  One. \nTwo.", " ", None)] == ["One.", "", ""]


@given(st.text(st.characters()) | st.just(EVIL))
def test_nothing_is_left_that_a_terminal_would_obey(text: str):
    shown = printable(text)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]", shown)
    assert one_line(text).isprintable() or "\n" not in one_line(text)
    shown.encode()


@given(st.recursive(st.text(st.characters()), st.lists, max_leaves=3))
def test_json_means_the_same_after_it(value: object):
    assert json.loads(printable(json.dumps(value, ensure_ascii=False))) == value


def test_usual_text_of_any_language_stays_as_it_is():
    for text in ("Grüße, 你好, नमस्ते, שלום, 👩‍👩‍👧 emoji", "two\nlines\tand a tab", "C:\\u202e"):
        assert printable(text) == text


@pytest.mark.parametrize(
    "text", ["=1+1", "+cmd|' /C calc'!A0", "-2+3+cmd", "@SUM(A1)", "\t=1", "\r=1", " =1", "＝1", "\n@x"]
)
def test_no_cell_begins_as_a_formula(text: str):
    shown = csv_cell(text)
    assert isinstance(shown, str) and shown.startswith("'")
    out = io.StringIO()
    csv.writer(out).writerow([shown])
    assert next(csv.reader(io.StringIO(out.getvalue(), newline="")))[0].endswith(text.strip())


@pytest.mark.parametrize("value", ["-0.5", "+1.2e-3", "-", "- / 200", "12 %", "a = b", 'say "hi"', 3, -0.5, None, ""])
def test_numbers_and_other_text_stay_as_they_are(value: object):
    assert csv_cell(value) == value


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("<script>alert(1)</script>", "&lt;script>alert(1)&lt;/script>"),
        ("&lt;b&gt;", "&amp;lt;b&amp;gt;"),
        ("[x](javascript:alert(1))", "[x\\](javascript:alert(1))"),
        ("![x](http://tracker)", "![x\\](http://tracker)"),
        ("a|b\nc", "a\\|b c"),
        ("**ok** `x` ~~y~~", "\\*\\*ok\\*\\* \\`x\\` \\~\\~y\\~\\~"),
        ("_x_ and __y__", "\\_x\\_ and \\_\\_y\\_\\_"),
        ("# heading", "\\# heading"),
        ("> quote", "\\> quote"),
        ("1. item", "1\\. item"),
        ("---", "\\---"),
        ("persona_vector (layers=[3, 4], k=0.5)", "persona_vector (layers=[3, 4], k=0.5)"),
    ],
)
def test_a_name_is_plain_text_in_markdown(text: str, shown: str):
    assert markdown(text) == shown


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("at http://me:pass@host:80/v1: no", "at http://host:80/v1: no"),
        ("https://token@host/v1", "https://host/v1"),
        ("http://h/v1?api_key=s&api-version=2024#s", "http://h/v1?api-version=2024"),
        ("http://me:pa/ss@host/v1", "http://host/v1"),
        ("http://me:p#a?s@host/v1", "http://host/v1"),
        ("HTTPS://me:p@[::1]:8/v1", "HTTPS://[::1]:8/v1"),
        ("postgres://u:p@db/x and (http://a:b@c)", "postgres://db/x and (http://c)"),
        ("Incorrect API key provided: sk-abcdefghijklmnop1234", "Incorrect API key provided: sk-***"),
        ("http://host/users/@me and a@b.c", "http://host/users/@me and a@b.c"),
        ("nothing here", "nothing here"),
    ],
)
def test_an_address_is_shown_without_credentials(text: str, shown: str):
    assert without_credentials(text) == shown


def test_a_message_is_one_line():
    assert message("a\nharness: all fine\x1b[0m http://u:p@h/") == "a harness: all fine\\u001b[0m http://h/"


def test_the_names_of_jobs_and_metrics_are_plain_text_beside_a_bar(monkeypatch: pytest.MonkeyPatch):
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: True)
    monkeypatch.setattr("sys.stderr", stream)
    bars = Terminal()
    bars.mean("[/x] \x1b[2J", "rouge[/L]", 0.5)
    for done in range(2):
        bars.progress("[/x] \x1b[2J", done, 2)
    bars.close()
    assert "[/x] \\u001b[2J" in stream.getvalue() and "rouge[/L] 0.5000" in stream.getvalue()


def test_every_command_prints_through_it():
    bare = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in (ROOT / "harness").rglob("*.py")
        if "tiny" not in path.parts
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if re.search(r"(?<![\w.])(print\(|typer\.echo\(|sys\.std(out|err)\.write\(|traceback\.print_)", line)
        and "get_help()" not in line
        and path.name != "shown.py"
    ]
    assert bare == []


def test_a_record_with_escape_sequences_tags_and_credentials_is_shown_harmless(
    harness: Callable, tmp_path: Path, run_config: Callable
):
    from harness.records.store import Judging, MetricValue, RunFolder, RunRecord
    from harness.task import Rating, Sample

    evil = EVIL.removesuffix("\ud83d")  # half a character is no text of a record
    config = run_config(model="<b>m</b>", method="x|y")
    judge = {"name": "openai/\x1b[2Jj", "base_url": "http://me:s3cret@host/v1?key=s3cret"}
    config = type(config).model_validate(config.model_dump() | {"judge": judge})
    with RunFolder.open(tmp_path / "results", config) as folder:
        metric = MetricValue(value=0.5, n=1, note=evil)
        error = "failed at http://me:s3cret@host/v1"
        record = RunRecord(
            config=config,
            status="partial",
            metrics={"acc": metric},
            error=error,
            notes=[error, evil],
            judging=Judging(),
        )
        folder.write(record)
        ratings = {"trait": Rating("rated", 1.0, said=evil)}
        samples = [Sample("a\x1b[1m", f"u\n{evil}", response=evil, ratings=ratings), Sample("b", "u", error=error)]
        folder.append(samples)
    (run,) = (tmp_path / "results").glob("*/*/*")
    shown = harness(f"show {run}")
    board = harness("leaderboard --results results --path board.md")
    page = harness("report --results results --output page")
    assert (shown.code, board.code, page.code) == (0, 0, 0), shown.err + board.err + page.err
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    for text in (shown.out, shown.err, *(path.read_text() for path in written)):
        assert "\x1b" not in text and "\x9b" not in text and "\u202e" not in text and "s3cret" not in text
    assert "<b>" not in (tmp_path / "board.md").read_text()
