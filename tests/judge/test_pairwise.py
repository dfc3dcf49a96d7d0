"""Two runs are compared blind, in both orders; a failure is missing, votes are counted as they were cast."""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from chat_server import Server

from harness.data import Example
from harness.errors import DataMissing, HarnessError, UsageError
from harness.judge.annotations import COLUMNS, VOTES, agreement, alpha, export, import_votes, majority
from harness.judge.judges import ModelJudge, open_judge
from harness.judge.pairwise import draw, judge_pairs, opinion_in, shares
from harness.judge.pairwise_record import DIMENSIONS, Opinion, find_pairs, read, read_pairs
from harness.publish.tables import render
from harness.records.store import RunConfig, RunFolder, RunRecord
from harness.task import Sample, Selection
from harness.tasks.lamp import Lamp4

TASK = Lamp4()
ITEMS = TASK.items(Selection("dev", limit=12))

Save = Callable[..., Path]


@pytest.fixture(autouse=True)
def _workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    monkeypatch.delenv("HARNESS_DATA", raising=False)


@pytest.fixture
def save(tmp_path: Path, run_config: Callable[..., RunConfig]) -> Save:
    """Writes a finished run of a method on lamp4, and gives its folder."""

    def write(method: str, answer: Callable[[Example], str] | None = None, *, items: int = 12, **config: Any) -> Path:
        answer = answer or (lambda example: f"{method.upper()} headline of {example.id}")
        made = run_config(
            method, data="lamp4: lamp-mini", **{"fingerprint": TASK.fingerprint(Selection("dev")), **config}
        )
        samples = [
            Sample(item.example.id, item.example.user.id, response=answer(item.example), targets=item.targets)
            for item in ITEMS[:items]
        ]
        with RunFolder.open(tmp_path / "results", made) as folder:
            batches = [[sample.id for sample in samples]]
            folder.write(RunRecord(config=made, status="complete", batches=batches))
            folder.append(samples)
            return folder.path

    return write


def judge_at(server: Server, model: str = "gpt-5.2") -> ModelJudge:
    judge = open_judge(f"openai/{model}", server.url, ["backoff=0.01", "timeout=2", "retries=1"])
    assert isinstance(judge, ModelJudge)
    return judge


def answers(prompt: str) -> tuple[str, str]:
    """A and B, as the judge reads them."""
    found = re.search(r"ANSWER A\n(.*)\n\nANSWER B\n(.*)\n\nRate each", prompt, re.DOTALL)
    assert found is not None
    return found[1], found[2]


def verdict(a: float, b: float, winner: str, alignment: str | None = None) -> str:
    ratings = {"A": dict.fromkeys(DIMENSIONS, a), "B": dict.fromkeys(DIMENSIONS, b)}
    return json.dumps({"ratings": ratings, "winner": winner, "alignment_winner": alignment or winner})


def prefers(method: str) -> Callable[[str], str]:
    """A judge that gives one method's answers a 5 and the other's a 3, and the answer shown first one more half."""

    def say(prompt: str) -> str:
        a, b = (5 if method.upper() in text else 3 for text in answers(prompt))
        return f"Here you are:\n```json\n{verdict(a - 0.5, b - 1, 'A' if a > b else 'B')}\n```"

    return say


# A judge


def test_a_pair_is_shown_in_both_orders_without_names(server: Server, save: Save) -> None:
    server.writes = lambda prompt: verdict(3, 3, "tie")
    a = save("cad", lambda example: f"One for {example.id}")
    b = save("dps", lambda example: f"Another for {example.id}")
    judge_pairs(a, b, judge_at(server))
    seen = [answers(prompt) for prompt in server.prompts()]
    assert len(seen) == 24
    for item in ITEMS:
        mine = [pair for pair in seen if pair[0].endswith(f" {item.example.id}")]
        assert len(mine) == 2 and mine[0] == mine[1][::-1]
    whole = " ".join(server.prompts()).lower()
    assert not re.search(r"\b(cad|dps|run_a|rag)\b", whole)
    assert ITEMS[0].example.text in " ".join(server.prompts())
    assert "newest" not in whole


def test_the_profile_is_the_newest_of_the_users_history(server: Server, save: Save) -> None:
    server.writes = lambda prompt: verdict(3, 3, "tie")
    judge_pairs(save("cad"), save("dps"), judge_at(server), profile_items=2)
    example = ITEMS[0].example
    (prompt, _) = (p for p in server.prompts() if example.text in p)
    for line, record in enumerate(example.user.history[:-3:-1], start=1):
        assert re.search(rf"^{line}\. .*title: {re.escape(record.fields['title'])}", prompt, re.MULTILINE)
    assert "\n3. " not in prompt


def test_ratings_are_means_of_both_orders_and_wins_hold_in_both(server: Server, save: Save) -> None:
    server.writes = prefers("dps")
    folder, record = judge_pairs(save("cad"), save("dps"), judge_at(server))
    assert (record.status, record.pairs, record.compared) == ("complete", 12, 12)
    for d in DIMENSIONS:
        cad, dps, difference = (record.metrics[side][d] for side in ("a", "b", "b-a"))
        assert (cad.value, dps.value, difference.value) == (2.25, 4.25, 2.0)
        assert dps.n == 12 and dps.low < 4.25 < dps.high < 5  # nobody differs so far, and 12 is not everybody
    assert (record.metrics["a"]["win"].value, record.metrics["b"]["alignment_win"].value) == (0, 1)
    assert record.metrics["both"]["orders_agree"].value == 1
    assert record.metrics["both"]["first_wins"].value == 0.5
    assert record.judging is not None and record.judging.input_tokens == 2400
    assert read(folder) == record


def test_a_judge_that_likes_whatever_stands_first_prefers_nothing(server: Server, save: Save) -> None:
    server.writes = lambda prompt: verdict(5, 1, "A")
    _, record = judge_pairs(save("cad"), save("dps"), judge_at(server))
    both = record.metrics["both"]
    assert (both["tie"].value, both["orders_agree"].value, both["first_wins"].value) == (1, 0, 1)
    assert record.metrics["a"]["style"].value == record.metrics["b"]["style"].value == 3


def test_texts_with_slots_or_braces_in_them_are_shown_as_they_are(server: Server, save: Save) -> None:
    server.writes = lambda prompt: verdict(3, 3, "tie")
    judge_pairs(save("cad", lambda e: "<second> {x} <request>"), save("dps", lambda e: "\\1 B"), judge_at(server))
    assert {answers(prompt) for prompt in server.prompts()} == {
        ("<second> {x} <request>", "\\1 B"), ("\\1 B", "<second> {x} <request>"),
    }  # fmt: skip


@pytest.mark.parametrize(
    "text",
    [
        "A is better", "{}", "[1]", "{'A': 1}", "REFUSAL",
        verdict(6, 3, "A"), verdict(0, 3, "A"), verdict(3, 3, "C"), verdict(3, 3, "A")[:-1],
        verdict(3, 3, "A").replace("style", "taste"), verdict(3, 3, "A").replace('"B"', '"C"'),
        verdict(3, 3, "A").replace("3", '"3"', 1), verdict(3, 3, "A").replace("3", "true", 1),
        verdict(3, 3, "A").replace("3", "NaN", 1), verdict(3, 3, "A").replace('"winner": "A"', '"winner": null'),
    ],
)  # fmt: skip
def test_an_opinion_is_whole_or_none(text: str) -> None:
    assert opinion_in(text, "a") is None


def test_an_opinion_is_told_apart_by_who_stood_first() -> None:
    one, other = opinion_in(verdict(5, 2, "A", "tie"), "a"), opinion_in(verdict(5, 2, "a", "b"), "b")
    assert one is not None and other is not None
    assert (one.winner, one.alignment_winner, one.a["style"], one.b["style"]) == ("a", "tie", 5, 2)
    assert (other.winner, other.alignment_winner, other.a["style"], other.b["style"]) == ("b", "a", 2, 5)


def test_refusals_and_failures_are_missing_and_asked_for_again_where_they_failed(server: Server, save: Save) -> None:
    first, second, third = (item.example.id for item in ITEMS[:3])
    server.writes = lambda prompt: "I would rather not." if f" {third}\n" in prompt else prefers("dps")(prompt)
    server.faults = lambda prompt, tries: (
        "500" if answers(prompt)[0] == f"CAD headline of {first}" else "refusal" if f" {second}\n" in prompt else ""
    )
    a, b = save("cad"), save("dps")
    _, record = judge_pairs(a, b, judge_at(server))
    assert (record.status, record.failed, record.compared) == ("partial", 1, 9)
    assert record.judging is not None
    assert (record.judging.failed, record.judging.refused, record.judging.unparsable) == (1, 2, 2)
    assert (record.metrics["b"]["win"].value, record.metrics["b"]["win"].n) == (1, 9)
    server.faults, asked = (lambda prompt, tries: ""), len(server.asked)
    folder, again = judge_pairs(a, b, judge_at(server))
    assert (again.status, again.compared, len(server.asked) - asked) == ("complete", 10, 1)
    (Path(os.environ["HARNESS_CACHE"]) / "judge.sqlite").unlink()
    before = (folder / "pairs.json").read_bytes()
    judge_pairs(a, b, judge_at(server))
    assert len(server.asked) - asked == 1  # what the record holds is not bought again either
    assert (folder / "pairs.json").read_bytes() == before
    assert len(read_pairs(folder)) == 12


def test_which_pairs_are_drawn_and_shown_how_does_not_depend_on_the_rest(save: Save) -> None:
    few = draw(save("cad", items=8), save("dps"), count=3, seed=1)
    many = draw(save("cad", items=8), save("dps"), count=8, seed=1)
    other = draw(save("cad", items=8), save("dps"), count=8, seed=2)
    assert [(pair.id, pair.first) for pair in few.pairs] == [(pair.id, pair.first) for pair in many.pairs[:3]]
    assert [pair.id for pair in other.pairs] != [pair.id for pair in many.pairs]
    assert {pair.first for pair in many.pairs} == {"a", "b"}


def test_runs_that_cannot_be_compared_are_refused(save: Save, monkeypatch: pytest.MonkeyPatch) -> None:
    a = save("cad")
    with pytest.raises(UsageError, match="are one run; give two"):
        draw(a, a, count=5, seed=0)
    with pytest.raises(UsageError, match="runs of different tasks have no pair in common"):
        draw(a, save("dps", task="lamp5"), count=5, seed=0)
    with pytest.raises(UsageError, match=r"runs of different data have no pair in common: dev .* and dev else"):
        draw(a, save("dps", fingerprint="else"), count=5, seed=0)
    b = save("dps")
    monkeypatch.setattr(Lamp4, "fingerprint", lambda self, selection: "else")
    with pytest.raises(UsageError, match=r"the runs read other data \(lamp4: lamp-mini\); give their --data"):
        draw(a, b, count=5, seed=0)


def test_word_lists_compare_nothing(save: Save) -> None:
    with pytest.raises(UsageError, match="judge 'lexicon' cannot compare two answers; give openai/<model>"):
        judge_pairs(save("cad"), save("dps"), open_judge("lexicon"))


def test_a_local_model_compares_through_the_same_door(save: Save, toy: Path) -> None:
    judge = open_judge(f"hf/{toy}")  # random, and too short a context: no pair gets an opinion, none a 0
    _, record = judge_pairs(save("cad"), save("dps"), judge, count=2, profile_items=0)
    assert record.compared == 0 and record.metrics["a"]["style"].value is None


def test_the_command_compares_and_the_table_shows_it(
    server: Server, save: Save, harness: Callable[[str], Any], tmp_path: Path
) -> None:
    server.writes = prefers("cad")
    a, b = save("cad"), save("dps")
    line = f"judge pairs {a} {b} --judge openai/gpt-5.2 --judge_base_url {server.url} --limit 10"
    done = harness(line)
    assert done.code == 0 and "n = 10 of 10 pairs" in done.out
    asked = len(server.asked)
    assert harness(line).out == done.out
    assert len(server.asked) == asked
    cells = json.loads(render(["dps-4"], tmp_path / "results", "json"))[0]["cells"]
    measured = {(c["evaluator"], c["metric"], c["method"]): c for c in cells if c["source"] == "measured"}
    assert len(measured) == 12
    best = measured["gpt-5.2", "style", "cad"]
    assert (best["printed"], best["n"], best["model"]) == ("4.25", 10, "llama3-8b")
    assert best["not_comparable"] == ["synthetic lamp-mini data", "10 pairs, published 100"]
    assert measured["gpt-5.2", "alignment_win", "cad"]["printed"] == "100"
    assert "GPT-5.2 on LLaMA-3-8B" in render(["dps-4"], tmp_path / "results", "md")


def test_a_comparison_of_other_methods_or_of_a_control_is_not_in_the_table(
    server: Server, save: Save, tmp_path: Path
) -> None:
    server.writes = prefers("dps")
    judge_pairs(save("rag"), save("dps"), judge_at(server))
    judge_pairs(save("cad"), save("dps", control="wrong_user"), judge_at(server))
    assert len(find_pairs(tmp_path / "results")) == 2
    assert "nothing compared yet" in render(["dps-4"], tmp_path / "results")


# People


def filled(file: Path, choose: Callable[[Mapping[str, str]], str], to: Path, separator: str = ",") -> Path:
    """A copy of the exported file with both votes of every row as `choose` says."""
    rows = list(csv.DictReader(io.StringIO(file.read_text(encoding="utf-8-sig"))))
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, delimiter=separator)
    writer.writeheader()
    writer.writerows({**row, **dict.fromkeys(VOTES, choose(row))} for row in rows)
    to.write_text(text.getvalue(), encoding="utf-8-sig")
    return to


def fan_of(method: str) -> Callable[[Mapping[str, str]], str]:
    return lambda row: "A" if method.upper() in row["answer_A"] else "b"


def test_annotators_see_no_names_and_their_votes_reach_the_right_side(save: Save, tmp_path: Path) -> None:
    folder, file = export(save("cad"), save("dps"), tmp_path / "annotate.csv")
    rows = list(csv.DictReader(io.StringIO(file.read_text(encoding="utf-8-sig"))))
    assert len(rows) == 12 and {row["answer_A"][:3] for row in rows} == {"CAD", "DPS"}
    header = file.read_text(encoding="utf-8-sig").splitlines()[0]
    assert header == "pair,profile,request,answer_A,answer_B,better,better_for_user,comment"
    votes = filled(file, fan_of("dps"), tmp_path / "ann.csv")
    record = import_votes(folder, [votes])
    assert (record.status, record.compared, record.annotators) == ("complete", 12, ["ann"])
    assert record.metrics["b"]["alignment_win"].value == 1 and record.metrics["a"]["win"].value == 0
    assert record.metrics["both"]["better_alpha"].note == "no pair has two votes"
    cells = json.loads(render(["dps-4"], tmp_path / "results", "json"))[0]["cells"]
    human = {c["method"]: c["printed"] for c in cells if c["source"] == "measured"}
    assert human == {"cad": "0", "dps": "100"}


def test_the_majority_decides_and_agreement_is_told(save: Save, tmp_path: Path) -> None:
    folder, file = export(save("cad"), save("dps"))
    fans = [filled(file, fan_of("dps"), tmp_path / f"{n}.csv", separator) for n, separator in enumerate(",;\t")]
    fans[2] = filled(file, fan_of("cad"), tmp_path / "2.csv")
    record = import_votes(folder, fans)
    assert record.metrics["b"]["win"].value == 1
    assert record.metrics["both"]["better_agreement"].value == pytest.approx(1 / 3)
    import_votes(folder, [filled(file, lambda row: "", tmp_path / "0.csv")])  # takes the votes back
    record = import_votes(folder, [])
    assert record.annotators == ["1", "2"]
    assert record.metrics["both"]["tie"].value == 1


def test_pairs_without_a_vote_are_missing(save: Save, tmp_path: Path) -> None:
    folder, file = export(save("cad"), save("dps"), profile_items=0)
    record = import_votes(
        folder, [filled(file, lambda row: "tie" if row["pair"].startswith("p001-") else "", tmp_path / "ann.csv")]
    )
    assert (record.status, record.compared, record.metrics["both"]["tie"].n) == ("partial", 1, 1)


def test_exporting_again_keeps_the_votes(save: Save, tmp_path: Path) -> None:
    a, b = save("cad"), save("dps")
    folder, file = export(a, b)
    import_votes(folder, [filled(file, fan_of("dps"), tmp_path / "ann.csv")])
    before = file.read_bytes()
    assert export(a, b) == (folder, file)
    assert file.read_bytes() == before
    assert import_votes(folder, []).annotators == ["ann"]
    voted = filled(file, fan_of("dps"), file).read_bytes()  # in place, rather than in a copy
    with pytest.raises(
        UsageError, match=r"annotate\.csv is there and is no empty form of these pairs: it may hold somebody's"
    ):
        export(a, b)
    assert file.read_bytes() == voted


def test_a_vote_never_reaches_another_pair_than_the_one_that_was_shown(save: Save, tmp_path: Path) -> None:
    a = save("cad", items=6)
    b = save("dps", items=12)
    folder, file = export(a, b, tmp_path / "annotate.csv", count=6)
    shown = [pair.id for pair in read_pairs(folder)]
    with RunFolder.open(tmp_path / "results", read(folder).config.runs[0]) as run:  # answers what had failed before
        run.append([Sample(i.example.id, i.example.user.id, response="CAD late", targets=i.targets) for i in ITEMS[6:]])
    assert [pair.id for pair in draw(a, b, count=6, seed=0).pairs] != shown
    with pytest.raises(UsageError, match="other pairs than the runs have now"):
        export(a, b, tmp_path / "again.csv", count=6)
    assert not (tmp_path / "again.csv").exists() and [pair.id for pair in read_pairs(folder)] == shown
    assert import_votes(folder, [filled(file, fan_of("dps"), tmp_path / "ann.csv")]).metrics["b"]["win"].value == 1


def test_a_vote_never_counts_in_another_comparison_than_it_was_cast_in(save: Save, tmp_path: Path) -> None:
    a = save("cad")
    (one, form), (other, other_form) = (export(a, save(name), tmp_path / f"{name}.csv") for name in ("dps", "rag"))
    votes = filled(other_form, lambda row: "A", tmp_path / "ann.csv")
    with pytest.raises(
        UsageError, match=r"ann\.csv, line .*: pair 'p001-\w{4}' is not of this comparison; it has 12, p001-"
    ):
        import_votes(one, [votes])
    assert not read(one).annotators and import_votes(other, [votes]).compared == 12
    assert import_votes(one, [filled(form, lambda row: "A", tmp_path / "ann.csv")]).compared == 12


def test_a_form_of_an_older_version_still_counts_where_it_belongs(save: Save, tmp_path: Path) -> None:
    """Its codes are p001 and so on, as are those in the comparison's folder, and stay."""
    a, b = save("cad"), save("dps")
    folder, form = export(a, b, tmp_path / "annotate.csv")
    other, other_form = export(a, save("rag"), tmp_path / "other.csv")
    for file in (form, other_form, folder / "pairs.jsonl", other / "pairs.jsonl"):
        file.write_bytes(re.sub(rb"\b(p0\d\d)-\w{4}\b", rb"\1", file.read_bytes()))
    before = form.read_bytes()
    assert b"p001," in before and export(a, b, form) == (folder, form) and form.read_bytes() == before
    with pytest.raises(
        UsageError,
        match=r"ann\.csv, line .*: the answers are not those of pair p001 here; the votes were cast in another",
    ):
        import_votes(folder, [filled(other_form, lambda row: "A", tmp_path / "ann.csv")])
    assert not read(folder).annotators
    assert import_votes(folder, [filled(form, fan_of("dps"), tmp_path / "ann.csv")]).metrics["b"]["win"].value == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("p003", "p999"), r"line .*: pair 'p999-(\w{4})' is not of this comparison; it has 12, p001-\1 and so on"),
        (("p003", "p002"), r"pair p002-\w{4} has votes above already"),
        (("better_for_user", "better for user"), "has no column better_for_user; keep the columns that were exported"),
        ((",A,A,", ",A,first,"), "better_for_user: 'first' is no vote; allowed: A, B or tie, or nothing"),
    ],
)
def test_a_vote_that_is_none_names_its_place(change: tuple[str, str], message: str, save: Save, tmp_path: Path) -> None:
    folder, file = export(save("cad"), save("dps"), profile_items=0)
    votes = filled(file, lambda row: "A", tmp_path / "ann.csv")
    votes.write_text(votes.read_text(encoding="utf-8").replace(*change, 1), encoding="utf-8")
    with pytest.raises(UsageError, match=message):
        import_votes(folder, [votes])
    assert not read(folder).annotators


def test_a_quote_that_is_not_closed_takes_no_votes_with_it(save: Save, tmp_path: Path) -> None:
    folder, file = export(save("cad"), save("dps"), profile_items=0)
    votes = filled(file, lambda row: "A", tmp_path / "ann.csv")
    lines = votes.read_text(encoding="utf-8-sig").splitlines()
    place = next(n for n, line in enumerate(lines) if line.startswith("p005"))
    lines[place] += '"what'
    votes.write_text("\n".join(lines))
    with pytest.raises(UsageError, match=rf"ann\.csv, line {place + 1}: not valid CSV .*is a quote not closed"):
        import_votes(folder, [votes])
    votes.write_text('pair,"better\n')
    with pytest.raises(UsageError, match=r"ann\.csv, line 1: not valid CSV"):
        import_votes(folder, [votes])
    long = filled(file, lambda row: "A", tmp_path / "ann.csv")
    longer = re.sub(r"(?m)^(p005-\w{4},)", rf"\1{'x' * 200_000}", text := long.read_text(encoding="utf-8-sig"))
    assert len(longer) > len(text)
    long.write_text(longer)
    assert import_votes(folder, [long]).compared == 12


def test_votes_need_a_comparison_for_people(server: Server, save: Save, tmp_path: Path) -> None:
    server.writes = prefers("dps")
    folder, _ = judge_pairs(save("cad"), save("dps"), judge_at(server))
    with pytest.raises(UsageError, match=r"was compared by openai/gpt-5\.2; 'harness judge export"):
        import_votes(folder, [])
    with pytest.raises(DataMissing, match=r"holds no pairs\.json"):
        import_votes(tmp_path, [])
    (folder / "pairs.json").write_text("{")
    with pytest.raises(HarnessError, match=r"pairs\.json"):
        import_votes(folder, [])


def test_the_commands_of_people_go_round(save: Save, harness: Callable[[str], Any], tmp_path: Path) -> None:
    done = harness(f"judge export {save('cad')} {save('dps')} --limit 4")
    folder = re.search(r"harness judge import (\S+) ", done.err)
    assert done.code == 0 and folder is not None
    votes = filled(Path(done.out.strip()), fan_of("cad"), tmp_path / "ann.csv")
    counted = harness(f"judge import {folder[1]} {votes}")
    assert counted.code == 0 and "n = 4 of 4 pairs" in counted.out
    assert harness(f"judge import {folder[1]} {tmp_path / 'none.csv'}").code == 2


@pytest.mark.parametrize(
    ("votes", "winner"),
    [("aab", "a"), ("abt", "tie"), ("ab", "tie"), ("aabb", "tie"), ("ttb", "tie"), ("b", "b"), ("", None)],
)
def test_two_sides_with_as_many_votes_are_a_tie(votes: str, winner: str | None) -> None:
    assert majority([{"a": "a", "b": "b", "t": "tie"}[vote] for vote in votes]) == winner  # type: ignore[misc]


def test_alpha_is_krippendorffs() -> None:
    one, other = "0100000010", "1110010000"  # his example of two observers and two categories
    units = [["ab"[int(x)], "ab"[int(y)]] for x, y in zip(one, other, strict=True)]
    assert alpha(units) == pytest.approx(0.095, abs=5e-4)  # type: ignore[arg-type]
    assert alpha([["a", "a"], ["b", "b"], ["a"]]) == 1
    assert alpha([["a", "a"], ["a", "a"]]) is None
    assert alpha([["a"], []]) is None
    assert agreement(["a", "a", "b"]) == pytest.approx(1 / 3)


# What the authors released, read and not kept


def test_our_arithmetic_gives_the_printed_numbers_from_the_released_ratings() -> None:
    folder = Path(os.environ.get("HARNESS_SHARED", "../shared/data")) / "reference_results" / "human_eval"
    if not folder.is_dir():
        pytest.skip(f"{folder} with the authors' annotations is not there (set HARNESS_SHARED)")
    rows = [json.loads(line) for line in (folder / "llm_eval_gpt5_2.jsonl").read_text().splitlines()]
    opinions = []
    for row in (row for row in rows if row["task"] == "LaMP-4"):
        raw = {**row["raw"][0], "winner": row["raw"][0]["win"], "alignment_winner": row["raw"][0]["alignment_win"]}
        opinion = opinion_in(json.dumps(raw), "a" if row["mapping"]["A"] == "cad" else "b")
        assert opinion is not None
        opinions.append(opinion)
    means = {side: [sum(getattr(o, side)[d] for o in opinions) / 100 for d in DIMENSIONS] for side in ("a", "b")}
    assert means["a"] == pytest.approx([4.45, 4.83, 3.91, 3.93, 4.21])  # CAD: the column the paper calls DPS
    assert means["b"] == pytest.approx([3.97, 4.51, 3.62, 3.63, 4.08])
    users = [str(n) for n in range(100)]
    assert shares(opinions, users)["a"]["win"].value == pytest.approx(0.54)
    votes = [json.loads(line) for line in (folder / "LaMP-4_annotations.jsonl").read_text().splitlines()]
    sides: dict[str, Any] = {"CAD": "a", "DPS": "b", "tie": "tie"}
    people = [Opinion(alignment_winner=sides[vote["winning_method_alignment"]]) for vote in votes]
    found = shares(people, [vote["id"] for vote in votes])
    assert [found[side]["alignment_win"].value for side in ("a", "b")] == pytest.approx([0.34, 0.40])
    assert found["a"]["alignment_win"].n == 50
