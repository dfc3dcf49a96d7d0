"""People compare two runs: blind pairs as a CSV file, one filled-in copy of it an annotator, majority and agreement.

The file names neither run. Which answer is whose stays in the comparison's folder, so that votes can be counted by whoever
holds that and cast by whoever does not. A pair's code (`p001-32c2`) is of one comparison, so that a vote counts in no other.
Paper: Zhang et al., Preference Heads, section 6.7: final decisions by majority vote, ties among them.
"""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np

from harness.errors import HarnessError, UsageError
from harness.files import replace_file
from harness.files.shown import csv_cell
from harness.judge.pairwise import Comparison, config_of, draw, mean, profile, shares
from harness.judge.pairwise_record import Choice, Opinion, Pair, PairRecord, held, read, read_pairs, write
from harness.records import provenance
from harness.records.schema import MetricValue
from harness.records.store import folder_of, read_samples

VOTES = {"better": "winner", "better_for_user": "alignment_winner"}
"""Columns to fill in -> what they are called in a record."""
COLUMNS = ("pair", "profile", "request", "answer_A", "answer_B", *VOTES, "comment")
ALLOWED = "A, B or tie"


def export(
    a: Path,
    b: Path,
    path: Path | None = None,
    *,
    count: int = 100,
    seed: int = 0,
    profile_items: int = 10,
    data: str | None = None,
) -> tuple[Path, Path]:
    """Write the pairs for annotators to `path`, and the comparison they belong to; its folder and the file.

    Raises UsageError where an earlier export had other pairs, which votes are still to come for, or are there, and where
    `path` is a file with anything else in it than that export wrote, such as votes.
    """
    comparison = draw(a, b, count=count, seed=seed, data=data)
    config = config_of(comparison, count, seed, profile_items)
    record = PairRecord(config=config, hash=config.hash8(), pairs=len(comparison.pairs), started=provenance.now())
    folder = record.folder(comparison.root)
    path = path or folder / "annotate.csv"
    with held(folder):
        there = read_pairs(folder)  # votes that are there stay, and codes that forms have already
        if there and [_drawn(pair) for pair in there] != [_drawn(pair) for pair in comparison.pairs]:
            raise UsageError(
                f"{folder} has other pairs than the runs have now, since one of them has answered more; a vote would be counted "
                "for another pair than was shown: use the file of the first export, or move that folder away and export anew"
            )
        pairs = there or [replace(pair, code=f"{pair.code}-{record.hash[:4]}") for pair in comparison.pairs]
        content = _blank(comparison, pairs, profile_items)
        if path.exists() and (not path.is_file() or path.read_bytes() != content):
            raise UsageError(
                f"{path} is there and is no empty form of these pairs: it may hold somebody's votes; move it away, or give another "
                "--output_path"
            )
        if not there:
            write(folder, record, pairs)
    replace_file(path, content)
    return folder, path


def _blank(comparison: Comparison, pairs: Sequence[Pair], profile_items: int) -> bytes:
    """The file without votes, with the mark by which spreadsheets know UTF-8."""
    text = io.StringIO()
    rows = csv.writer(text)
    rows.writerow(COLUMNS)
    for pair in pairs:
        shown = comparison.shown[pair.id]
        lines = "\n".join(profile(shown.example, profile_items))
        shown_texts = (lines, shown.example.text, *shown.answers(pair.first))
        rows.writerow([pair.code, *map(csv_cell, shown_texts), "", "", ""])
    return text.getvalue().encode("utf-8-sig", errors="replace")


def _drawn(pair: Pair) -> tuple[str, str]:
    return pair.id, pair.first


def import_votes(folder: Path, files: Sequence[Path]) -> PairRecord:
    """Count the votes of the files, one an annotator, with those that were counted before. A file read again replaces its
    own. Raises UsageError for a vote that is none, naming file, line and column."""
    read(folder)  # that there is one, before its folder is held
    with held(folder):
        record, pairs = read(folder), read_pairs(folder)
        if record.config.evaluator != "human":
            raise UsageError(
                f"{folder} was compared by {record.config.judge.name if record.config.judge else 'a judge'}; "
                "'harness judge export RUN_A RUN_B' makes a comparison for people"
            )
        names = [file.stem for file in files]
        if len(set(names)) < len(names):
            raise UsageError("two files have the same name; the name is the annotator's")
        by_code, shown = {pair.code: pair for pair in pairs}, _shown_by(folder, record, pairs)
        for name, file in zip(names, files, strict=True):
            for pair in pairs:
                pair.votes.pop(name, None)
            for code, opinion in _votes(file, by_code, shown).items():
                by_code[code].votes[name] = opinion
        summarise(record, pairs)
        record.finished = provenance.now()
        write(folder, record, pairs)
        return record


def _shown_by(folder: Path, record: PairRecord, pairs: Sequence[Pair]) -> dict[str, list[str]]:
    """Code -> answers A and B of its form, for codes of older versions (`p001`), which every comparison has. None where the runs
    are not beside the comparison."""
    old = [pair for pair in pairs if "-" not in pair.code]
    root, found = folder.resolve().parents[2], dict[str, list[str]]()
    if not old:
        return found
    try:
        a, b = ({s.id: s.response or "" for s in read_samples(folder_of(root, run))} for run in record.config.runs)
    except HarnessError:
        return found
    for pair in old:
        if pair.id in a and pair.id in b:
            first, second = (a, b) if pair.first == "a" else (b, a)
            found[pair.code] = [_folded(str(csv_cell(side[pair.id].strip()))) for side in (first, second)]
    return found


def _folded(cell: str) -> str:
    """A cell but for what a spreadsheet may change."""
    return " ".join(cell.encode(errors="replace").decode().split()).lstrip("'")


def _votes(file: Path, pairs: Mapping[str, Pair], shown: Mapping[str, list[str]]) -> dict[str, Opinion]:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{file} cannot be read ({error}); save it as CSV in UTF-8") from error
    first = text.partition("\n")[0]
    separator = max(",;\t", key=first.count)  # spreadsheets of other countries write others
    csv.field_size_limit(2**31 - 1)  # of a cell; Python's own limit is shorter than some profiles
    # strict: an open quote would swallow the lines behind it, and their votes
    rows = csv.DictReader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    try:
        missing = {"pair", *VOTES} - set(rows.fieldnames or ())
    except csv.Error as error:
        raise _broken(file, 1, error) from None
    if missing:
        raise UsageError(f"{file} has no column {', '.join(sorted(missing))}; keep the columns that were exported")
    found: dict[str, Opinion] = {}
    for row in _lines(rows, file):
        where = f"{file}, line {rows.line_num}"
        code = (row["pair"] or "").strip()
        if code not in pairs:
            raise UsageError(
                f"{where}: pair {code!r} is not of this comparison; it has {len(pairs)}, {next(iter(pairs), 'none')} and so on"
            )
        if code in found:
            raise UsageError(f"{where}: pair {code} has votes above already; keep one line of it")
        choices = {
            name: _choice(row[column] or "", pairs[code], f"{where}, {column}") for column, name in VOTES.items()
        }
        answers = [_folded(row.get(column) or "") for column in ("answer_A", "answer_B")]
        if any(choices.values()) and any(answers) and answers != shown.get(code, answers):
            raise UsageError(
                f"{where}: the answers are not those of pair {code} here; the votes were cast in another comparison, or the cells "
                "have changed"
            )
        if any(choices.values()):
            found[code] = Opinion(choices["winner"], choices["alignment_winner"])
    return found


def _lines(rows: csv.DictReader[str], file: Path) -> Iterator[dict[str, str]]:
    last = 1
    try:
        for row in rows:
            yield row
            last = rows.line_num
    except csv.Error as error:
        raise _broken(file, last + 1, error) from None


def _broken(file: Path, line: int, error: csv.Error) -> UsageError:
    return UsageError(f"{file}, line {line}: not valid CSV ({error}); is a quote not closed?")


def _choice(text: str, pair: Pair, where: str) -> Choice | None:
    """The side of a vote; None where the cell is empty."""
    vote = text.strip().lower()
    other: Choice = "b" if pair.first == "a" else "a"
    sides: dict[str, Choice | None] = {"": None, "a": pair.first, "b": other, "tie": "tie"}
    if vote not in sides:
        raise UsageError(f"{where}: {text!r} is no vote; allowed: {ALLOWED}, or nothing")
    return sides[vote]


def summarise(record: PairRecord, pairs: Sequence[Pair]) -> None:
    """Fill in what the votes come to: a majority a pair, and how far annotators agree."""
    voted = [pair for pair in pairs if pair.votes]
    decided = [Opinion(majority(_of(pair, "winner")), majority(_of(pair, "alignment_winner"))) for pair in voted]
    record.annotators = sorted({name for pair in voted for name in pair.votes})
    record.compared = len(voted)
    record.status = "complete" if len(voted) == len(pairs) else "partial"
    record.metrics = shares(decided, [pair.user for pair in voted])
    for column, name in VOTES.items():
        units = [_of(pair, name) for pair in pairs]
        double = [unit for unit in units if len(unit) > 1]
        users = [pair.user for pair, unit in zip(pairs, units, strict=True) if len(unit) > 1]
        record.metrics["both"][f"{column}_agreement"] = mean([agreement(unit) for unit in double], users)
        note = "" if double else "no pair has two votes"
        record.metrics["both"][f"{column}_alpha"] = MetricValue(value=alpha(units), n=len(double), note=note)


def _of(pair: Pair, name: str) -> list[Choice]:
    return [choice for vote in pair.votes.values() if (choice := getattr(vote, name)) is not None]


def majority(votes: Sequence[Choice]) -> Choice | None:
    """What most say; a tie where two have as many; None without votes."""
    if not votes:
        return None
    (top, count), *others = Counter(votes).most_common()
    return "tie" if others and others[0][1] == count else top


def agreement(votes: Sequence[Choice]) -> float:
    """The share of pairs of annotators who say the same."""
    pairs = list(combinations(votes, 2))
    return sum(one == other for one, other in pairs) / len(pairs)


def alpha(units: Sequence[Sequence[Choice]]) -> float | None:
    """Krippendorff's alpha for named categories: 1 - observed / expected disagreement; votes may be missing.

    None where no unit has two votes or all votes are the same, which leaves nothing to expect.
    """
    import krippendorff

    counts = np.array([[unit.count(name) for name in ("a", "b", "tie")] for unit in units if len(unit) > 1])
    if not counts.size or (counts.sum(axis=0) > 0).sum() < 2:
        return None
    return float(krippendorff.alpha(value_counts=counts, level_of_measurement="nominal"))
