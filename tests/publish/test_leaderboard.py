"""The leaderboard ranks only what can be ranked, and is the same file whenever and wherever it is made."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from harness.publish import leaderboard
from harness.records.store import Health, JudgeConfig, RunConfig, RunFolder, RunRecord, find_runs

Configs = Callable[..., RunConfig]
Records = Callable[..., RunRecord]


@pytest.fixture
def results(tmp_path: Path) -> Path:
    return tmp_path / "results"


def save(results: Path, record: RunRecord) -> RunRecord:
    with RunFolder.open(results, record.config) as folder:
        folder.write(record)
    return record


def rows(text: str) -> list[list[str]]:
    """The cells of every table row but the headers."""
    lines = [line for line in text.splitlines() if re.match(r"\| *(\d+|-) *\|", line)]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_methods_are_ranked_by_the_first_metric(results: Path, run_config: Configs, run_record: Records):
    for method, value in {"plain": 0.2, "cad": 0.4, "rag": 0.3}.items():
        save(results, run_record(run_config(method), rouge1=value, rougeL=1 - value))
    assert [row[1] for row in rows(leaderboard.render(results))] == ["cad", "rag", "plain"]


def test_a_lower_error_ranks_higher(results: Path, run_config: Configs, run_record: Records):
    for method, value in {"plain": 0.5, "rag": 0.3}.items():
        save(results, run_record(run_config(method, "lamp3"), mae=value))
    assert [row[1] for row in rows(leaderboard.render(results))] == ["rag", "plain"]


def test_a_row_shows_interval_n_cost_against_plain_and_the_record(
    results: Path, run_config: Configs, run_record: Records
):
    for method, value in {"plain": 0.2, "dps": 0.3}.items():
        record = run_record(run_config(method), passes=int(9000 * value), rouge1=value)
        record.cost.flops = 1e9 * value
        save(results, record)
    row = rows(leaderboard.render(results))[0]
    link = f"[dps-{record.hash}](results/llama3-8b/lamp4/dps-{record.hash}/)"
    assert row == ["1", "dps", "0.3000 [0.2900, 0.3100]", "1925", "1.50×", "1.50×", "ok", link]


def test_what_a_user_costs_is_shown_where_a_method_adapts_to_users(
    results: Path, run_config: Configs, run_record: Records
):
    save(results, run_record(run_config("plain"), rouge1=0.2))
    assert "| stored" not in leaderboard.render(results)
    record = run_record(run_config("perfit"), rouge1=0.3)
    record.cost.setup_seconds_per_user, record.cost.stored_bytes_per_user = 1.25, 4_194_304
    save(results, record)
    assert [row[6:8] for row in rows(leaderboard.render(results))] == [["1.2 s", "4.19 MB"], ["-", "-"]]


def test_cost_is_a_dash_where_plain_was_not_run(results: Path, run_config: Configs, run_record: Records):
    save(results, run_record(run_config("dps"), rouge1=0.3))
    assert rows(leaderboard.render(results))[0][4:6] == ["-", "-"]


def test_runs_on_other_samples_stand_in_another_ranking(results: Path, run_config: Configs, run_record: Records):
    save(results, run_record(run_config("plain"), rouge1=0.2))
    save(results, run_record(run_config("rag", limit=20, fingerprint="other"), n=20, rouge1=0.9))
    text = leaderboard.render(results)
    assert "## llama3-8b · lamp4 · --limit 20 only" in text
    assert [row[0] for row in rows(text)] == ["1", "1"]


def test_no_two_rankings_have_one_title(results: Path, run_config: Configs, run_record: Records):
    """Two of one task differ in its options or its split, and their titles say so."""
    written = run_config("plain")
    scored = written.model_copy(update={"task": written.task.model_copy(update={"options": {"answers": "scored"}})})
    tuned = written.model_copy(update={"data": written.data.model_copy(update={"split": "tune"})})
    for config in (written, scored, tuned):
        save(results, run_record(config, rouge1=0.2))
    titles = sorted(ranking.title for ranking in leaderboard.rankings(find_runs(results)))
    assert titles == ["llama3-8b · lamp4", 'llama3-8b · lamp4 · answers="scored"', "llama3-8b · lamp4 · split tune"]


OTHERS = {
    "weights": ("model", "revision", "other"),
    "dtype": ("model", "dtype", "bfloat16"),
    "task version": ("task", "version", 2),
}


@pytest.mark.parametrize("what", [*OTHERS, "held-out users", "judge's weights"])
def test_runs_that_share_a_models_name_and_no_more_are_ranked_apart(
    results: Path, run_config: Configs, run_record: Records, what: str
):
    one, other = run_config("plain"), run_config("rag")
    if what in OTHERS:
        part, name, value = OTHERS[what]
        other = other.model_copy(update={part: getattr(other, part).model_copy(update={name: value})})
    if what == "judge's weights":
        one, other = (
            config.model_copy(update={"judge": JudgeConfig(name="hf/judge", revision=revision)})
            for config, revision in ((one, "a"), (other, "b"))
        )
    records = [run_record(one, rouge1=0.2), run_record(other, rouge1=0.9)]
    if what == "held-out users":
        records[0].batches, records[1].batches = [["1", "2", "3"]], [["3"]]
        records[1].held_out_users = ["1", "2"]
    for record in records:
        save(results, record)
    found = leaderboard.rankings(find_runs(results))
    assert [[row.place for row in ranking.rows] for ranking in found] == [[1], [1]]
    assert len({ranking.title for ranking in found}) == 2
    assert all(ranking.title.startswith("llama3-8b · lamp4 · ") for ranking in found)


def test_users_held_out_of_another_split_leave_the_ranking_whole(run_config: Configs, run_record: Records):
    records = [run_record(run_config("plain"), rouge1=0.2), run_record(run_config("perfit"), rouge1=0.1)]
    for record in records:
        record.batches = [["1", "2"], ["3"]]
    records[1].held_out_users = ["a train user"]
    (ranking,) = leaderboard.rankings(records)
    assert [row.place for row in ranking.rows] == [1, 2]


def test_a_method_whose_answers_may_be_longer_than_the_others_says_so(run_config: Configs, run_record: Records):
    plain, rag = run_config("plain"), run_config("rag")
    rag = rag.model_copy(update={"sampling": rag.sampling.model_copy(update={"max_new_tokens": 8})})
    records = [run_record(plain, rouge1=0.2), run_record(rag, rouge1=0.1)]
    labels = [row.label for row in leaderboard.rankings(records)[0].rows]
    assert labels == ["plain", "rag"], "no answer was cut, so that how long it might be changes nothing"
    records[1].health.hit_max_tokens = 3
    labels = [row.label for row in leaderboard.rankings(records)[0].rows]
    assert labels == ["plain (--max_new_tokens 64)", "rag (--max_new_tokens 8)"]


def test_a_control_is_ranked_apart_and_named(results: Path, run_config: Configs, run_record: Records):
    save(results, run_record(run_config("rag"), rouge1=0.9))
    save(results, run_record(run_config("rag", control="wrong_user"), rouge1=0.1))
    text = leaderboard.render(results)
    assert "<summary>llama3-8b · lamp4 · --control wrong_user</summary>" in text
    assert [row[0] for row in rows(text)] == ["1", "1"]


def test_what_the_metric_gives_for_nothing_stands_first_with_its_place(
    results: Path, run_config: Configs, run_record: Records
):
    for method, value in {"plain": 0.2, "copy": 0.3, "rag": 0.4}.items():
        save(results, run_record(run_config(method), rouge1=value))
    assert [row[:2] for row in rows(leaderboard.render(results))] == [["2", "copy"], ["1", "rag"], ["3", "plain"]]


def test_the_gain_over_another_users_history_stands_beside_a_method(
    results: Path, run_config: Configs, run_record: Records
):
    save(results, run_record(run_config("plain", "lamp3"), mae=0.5))
    assert "gain over another user" not in leaderboard.render(results).partition("\n## ")[2]
    save(results, run_record(run_config("rag", "lamp3", options={"k": 5}), mae=0.3))
    save(results, run_record(run_config("rag", "lamp3", options={"k": 5}, control="wrong_user"), mae=0.4))
    save(results, run_record(run_config("rag", "lamp3", options={"k": 9}, control="wrong_user"), mae=0.9))
    assert [row[4] for row in rows(leaderboard.render(results))][:2] == ["+0.1000", "-"]
    text = leaderboard.terminal(results, 80)
    assert re.search(r"rag +0.3000 .* \+0.1000 ", text) and "- gain: over the same run with another" in text
    assert max(map(len, text.splitlines())) <= 80


def test_studies_of_a_model_are_listed_and_not_ranked(results: Path, run_config: Configs, run_record: Records):
    save(results, run_record(run_config("plain", task="patching"), effect=0.4))
    killed = save(results, run_record(run_config("rag", task="patching"), status="interrupted"))
    text = leaderboard.render(results)
    assert rows(text) == []
    assert f"[rag-{killed.hash}]" in text[: text.index("## Studies of a model")]
    assert text.index("## Studies of a model") < text.index("[plain-")


def test_health_flags_are_shown(results: Path, run_config: Configs, run_record: Records):
    record = run_record(run_config(), status="partial", rouge1=0.2)
    record.health = Health(errors=2, noop=True, unparsed=5, identical_to_base=0.4)
    save(results, record)
    expected = "**partial**, **changed nothing**, 2 failed, 5 unparsed, 40% of answers unchanged"
    assert rows(leaderboard.render(results))[0][6] == expected


def test_two_runs_of_a_method_are_told_apart_by_what_differs(results: Path, run_config: Configs, run_record: Records):
    for gamma in (1.0, 2.0):
        save(results, run_record(run_config("dps", options={"gamma": gamma, "k": 5}), rouge1=gamma / 10))
    save(results, run_record(run_config("dps", preset="released", options={"gamma": 3.0, "k": 5}), rouge1=0.05))
    assert [row[1] for row in rows(leaderboard.render(results))] == [
        "dps (gamma=2.0) (best of 2)",
        "dps (released, gamma=3.0)",
        "dps (gamma=1.0)",
    ]


def test_two_seeds_of_a_method_are_told_apart(results: Path, run_config: Configs, run_record: Records):
    for seed in (0, 1):
        save(results, run_record(run_config("rag", seed=seed), rouge1=0.2 + seed / 10))
    assert [row[1] for row in rows(leaderboard.render(results))] == ["rag (--seed 1) (best of 2)", "rag (--seed 0)"]


def test_two_fits_of_a_method_are_told_apart(results: Path, run_config: Configs, run_record: Records):
    for share, value in (("train", 0.2), ("dev:0.2", 0.3)):
        save(results, run_record(run_config("dps", fit_split=share), rouge1=value))
    save(results, run_record(run_config("rag"), rouge1=0.1))
    labels = [row[1] for row in rows(leaderboard.render(results))]
    assert labels == ["dps (--fit_split dev:0.2) (best of 2)", "rag", "dps (--fit_split train)"]


def test_a_title_says_of_held_out_users_what_is_true_of_all_its_runs(
    results: Path, run_config: Configs, run_record: Records
):
    def run(method: str, share: str | None, held_out: int, ids: str):
        record = run_record(run_config(method, fit_split=share, limit=3), rouge1=0.2)
        record.held_out_users, record.batches = [f"h{n}" for n in range(held_out)], [list(ids)]
        save(results, record)

    for args in (("rag", "train:0.5", 300, "abc"), ("plain", None, 0, "abc")):
        run(*args)
    for method in ("dps", "decore"):
        run(method, "dev:0.5", 100, "xyz")
    titles = [line for line in leaderboard.render(results).splitlines() if line.startswith("## ")]
    common = "## llama3-8b · lamp4 · --limit 3 only"
    assert sorted(titles) == [f"{common} · 100 users held out (dev:0.5)", f"{common} · held-out users differ"]


def test_an_option_at_its_default_is_not_named(results: Path, run_config: Configs, run_record: Records):
    for heads in (None, 4):
        save(results, run_record(run_config("dps", options={"gamma": 0.5, "heads": heads}), rouge1=0.2))
    assert {row[1] for row in rows(leaderboard.render(results))} == {"dps", "dps (heads=4)"}


def test_an_unfinished_run_is_named_and_not_ranked(results: Path, run_config: Configs, run_record: Records):
    record = save(results, run_record(run_config(), status="interrupted", rouge1=0.2))
    text = leaderboard.render(results)
    assert rows(text) == []
    assert f"rag-{record.hash}/) (interrupted)" in text


def test_a_metric_without_a_value_is_listed_last_and_unranked(results: Path, run_config: Configs, run_record: Records):
    empty = run_record(run_config("cad"), rouge1=0.1)
    empty.metrics["rouge1"].value = None
    save(results, empty)
    save(results, run_record(run_config("rag"), rouge1=0.2))
    assert [row[:2] for row in rows(leaderboard.render(results))] == [["1", "rag"], ["-", "cad"]]


def test_the_same_records_give_the_same_bytes_wherever_they_lie(
    results: Path, tmp_path: Path, run_config: Configs, run_record: Records
):
    for method in ("plain", "rag", "cad"):
        save(results, run_record(run_config(method), rouge1=0.2))
    shutil.copytree(results, tmp_path / "elsewhere" / "results")
    assert leaderboard.render(tmp_path / "elsewhere" / "results") == leaderboard.render(results)


def test_check_sees_a_stale_a_fresh_and_a_missing_file(
    results: Path, tmp_path: Path, run_config: Configs, run_record: Records
):
    save(results, run_record(run_config("plain"), rouge1=0.2))
    path = tmp_path / "leaderboard.md"
    assert not leaderboard.check(results, path)
    path.write_text(leaderboard.render(results), "utf-8")
    assert leaderboard.check(results, path)
    save(results, run_record(run_config("rag"), rouge1=0.3))
    assert not leaderboard.check(results, path)


def test_no_records_is_a_leaderboard_that_says_so(results: Path):
    assert "No records yet" in leaderboard.render(results)


def test_equal_values_share_a_rank(results: Path, run_config: Configs, run_record: Records):
    for method, value in {"plain": 0.2, "cad": 0.4, "rag": 0.40001, "dps": 0.3}.items():
        save(results, run_record(run_config(method), rouge1=value))
    assert [row[:2] for row in rows(leaderboard.render(results))] == [
        ["1", "rag"],
        ["1", "cad"],
        ["3", "dps"],
        ["4", "plain"],
    ]


def test_sweeps_ablations_and_controls_are_folded_and_the_run_nearest_the_defaults_is_ranked(
    results: Path, run_config: Configs, run_record: Records
):
    save(results, run_record(run_config("plain"), rouge1=0.2))
    options = {"k": 5, "control": "none", "heads": None}
    save(results, run_record(run_config("dps", options=options), rouge1=0.3))
    for change in ({"heads": 4}, {"control": "random_heads"}):
        save(results, run_record(run_config("dps", options={**options, **change}), rouge1=0.9))
    text = leaderboard.render(results)
    before, _, folded = text.partition("<details><summary>2 more: sweeps, ablations and controls</summary>")
    assert [row[:2] for row in rows(before)] == [["1", "dps"], ["2", "plain"]]
    assert sorted(row[1] for row in rows(folded)) == ['dps (control="random_heads")', "dps (heads=4)"]
    assert [row[0] for row in rows(folded)] == ["-", "-"]


def test_the_terminal_shows_rankings_in_80_columns_and_says_what_is_folded(
    results: Path, run_config: Configs, run_record: Records
):
    for heads in (None, 4, 8):
        name = "a_method_with_a_name_longer_than_the_line" if heads == 8 else "dps"
        record = run_record(run_config(name, options={"heads": heads}), rouge1=0.2)
        record.health = Health(unparsed=5, identical_to_base=0.4)
        save(results, record)
    save(results, run_record(run_config("rag", control="wrong_user"), rouge1=0.1))
    for everything in (False, True):
        text = leaderboard.terminal(results, 80, everything=everything)
        assert max(map(len, text.splitlines())) <= 80
        assert ("2 sweeps, ablations and controls are folded away" in text) is not everything
        assert ("wrong_user" in text) is everything
        assert "5 unparsed" in text


def test_the_leaderboard_of_other_records_never_overwrites_the_published_one(
    harness: Callable, run_config: Configs, run_record: Records
):
    for root in ("results", "runs"):
        save(Path(root), run_record(run_config("plain"), rouge1=0.2))
    assert harness("leaderboard --output_path leaderboard.md").code == 0
    before = Path("leaderboard.md").read_text()
    assert harness("leaderboard runs").code == 0 and Path("leaderboard.md").read_text() == before
    done = harness("leaderboard runs --output_path leaderboard.md")
    assert done.code == 2 and Path("leaderboard.md").read_text() == before
    assert "leaderboard.md is the leaderboard of `results/`, not of `runs/`" in done.error()
    Path("elsewhere").mkdir()
    shutil.copytree("runs", "elsewhere/results")
    done = harness("leaderboard elsewhere/results --output_path leaderboard.md")
    assert "not of elsewhere/results; give --output_path another file" in done.error()
