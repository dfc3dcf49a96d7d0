"""`harness compare` on committed records agrees with scipy, pairs exactly what both runs answered, and refuses the rest."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from harness.errors import DataMissing, UsageError
from harness.plugins.registry import method_class, task_class
from harness.records.store import RunFolder, find_runs, read_record, read_samples
from harness.statistics.answer import brief, names, sentence
from harness.statistics.compare import MAIN, compare, control_of, differences, letter
from harness.statistics.paired_tests import PERMUTATIONS, by_length, detectable, effect, flip_test, holm, patterns
from harness.task import Sample, Selection

RESULTS = Path(__file__).parents[2] / "results" / "tiny"


def committed(task: str, method: str) -> Path:
    """The record of tiny with the method's own settings."""
    (folder,) = (
        run.folder
        for run in find_runs(RESULTS.parent, model="tiny", task=task, method=method)
        if run.config.method.options == method_class(method)().options() and run.config.selection.control == "none"
    )
    assert folder
    return folder


RAG, DPS, TAGS = (committed("lamp2m", method) for method in ("rag", "dps", "plain"))
PLAIN, HEADLINES, CAD = (committed("lamp4", method) for method in ("plain", "rag", "cad"))


def _values(folder: Path, metric: str) -> dict[str, float]:
    return {sample.id: sample.metrics[metric] for sample in read_samples(folder)}


def _copy(source: Path, folder: Path, change) -> Path:
    """The record with samples changed (None drops one), under another hash."""
    shutil.copytree(source, folder)
    record = read_record(folder)
    record.hash = "0" * 8
    (folder / "run.json").write_text(record.to_json())
    lines = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    kept = [json.dumps(line) for line in map(change, lines) if line is not None]
    (folder / "samples.jsonl").write_text("".join(f"{line}\n" for line in kept))
    return folder


def test_two_committed_runs_differ_as_scipy_says():
    (row,) = compare([PLAIN, HEADLINES], ["rougeL"]).rows
    a, b = _values(PLAIN, "rougeL"), _values(HEADLINES, "rougeL")
    gain = np.array([b[i] - a[i] for i in sorted(a)])
    draws = stats.bootstrap((gain,), np.mean, method="percentile", n_resamples=5000, rng=1).confidence_interval
    exchanged = stats.permutation_test(
        (gain,), np.mean, permutation_type="samples", n_resamples=PERMUTATIONS, vectorized=True, rng=1
    )
    test = stats.ttest_1samp(gain, 0)
    found = row.effect
    assert (found.n, found.users) == (200, 200)
    assert found.difference == pytest.approx(gain.mean()) and found.b == read_record(HEADLINES).metrics["rougeL"].value
    assert (found.low, found.high) == pytest.approx(draws, abs=0.005)
    assert found.size == pytest.approx(test.statistic / math.sqrt(200))
    assert found.p == pytest.approx(exchanged.pvalue, abs=1e-4)
    assert found.helped == (gain > 0).mean() and found.harmed == (gain < 0).mean()
    assert found.worst_tenth == pytest.approx(np.sort(gain)[:20].mean())


def test_a_right_or_wrong_metric_is_tested_as_a_sign_test():
    (row,) = compare([RAG, DPS], ["accuracy"]).rows
    a, b = _values(RAG, "correct"), _values(DPS, "correct")
    worse, better = sum(a[i] > b[i] for i in a), sum(a[i] < b[i] for i in a)
    assert row.effect.p == pytest.approx(stats.binomtest(better, worse + better).pvalue, abs=0.02)
    assert row.p_holm == row.effect.p


def test_the_right_users_history_gains_clearly_over_another_users():
    own = compare([control_of(HEADLINES, "wrong_user"), HEADLINES], ["rouge1"])
    tags = compare([control_of(RAG, "wrong_user"), RAG], ["accuracy"])
    assert own.rows[0].effect.low > 0.05 and tags.rows[0].effect.low > 0.03
    assert max(own.rows[0].p_holm, tags.rows[0].p_holm) < 0.01
    assert own.sides[0].record.config.selection.control == "wrong_user"


def test_gain_goes_with_history_length_as_scipy_says():
    from harness.task import Selection
    from harness.tasks.lamp import Lamp4

    (row,) = compare([PLAIN, HEADLINES], ["rouge1"]).rows
    a, b = _values(PLAIN, "rouge1"), _values(HEADLINES, "rouge1")
    history = {item.example.id: len(item.example.user.history) for item in Lamp4().items(Selection("dev"))}
    # gains that are equal but for the last bit, as of 1/2 - 1/3 and 2/3 - 1/2, are a tie
    expected = stats.spearmanr([history[i] for i in a], [round(b[i] - a[i], 12) for i in a])
    assert (row.lengths.rho, row.lengths.p) == pytest.approx((expected.statistic, expected.pvalue))
    assert sum(group.users for group in row.lengths.groups) == 200
    assert all(x.longest < y.shortest for x, y in zip(row.lengths.groups, row.lengths.groups[1:], strict=False))


def test_users_are_exchanged_whole():
    # 4 users of 50 equal samples each: 16 sign patterns, however many samples
    a, b = np.zeros(200), np.repeat([1.0, 2.0, 3.0, 4.0], 50)
    found = effect(a, b, [f"u{i // 50}" for i in range(200)])
    assert found.p == pytest.approx(2 / 16) and found.users == 4
    assert effect(a, b, list(map(str, range(200)))).p < 0.001


def test_users_without_a_difference_leave_the_test_as_it_is():
    sums = np.array([0.3, 0.5, -0.1, 0.7, 0.2, 0.4])
    assert flip_test(sums) == flip_test(np.concatenate([sums, np.zeros(1000)]))
    assert flip_test(np.zeros(5)) == 1.0 and math.isnan(flip_test(np.ones(1)))


def test_a_detectable_difference_is_found_four_times_in_five():
    rng = np.random.default_rng(0)
    scatter = rng.normal(size=12)
    shift = detectable(scatter, np.ones(12))
    found = stats.ttest_1samp(rng.normal(shift, scatter.std(ddof=1), size=(20_000, 12)), 0, axis=1)
    assert (found.pvalue < 0.05).mean() == pytest.approx(0.8, abs=0.01)
    assert math.isnan(detectable(np.ones(12), np.ones(12)))


def test_holm_multiplies_by_what_is_left_and_never_falls():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, math.nan, 0.9])[:3:2] == pytest.approx([1.0, 1.0]) and math.isnan(holm([math.nan])[0])


def test_among_however_many_tests_a_clear_difference_is_one():
    """9,999 sign patterns have no p below .0002, which 253 pairs of runs would bring above 5 %."""
    gains = np.random.default_rng(1).normal(3, 1, 200)
    for tests in (1, 78, 124, 253, 1000):
        assert tests * flip_test(gains, patterns(tests)) < 0.026
    assert patterns(124) == PERMUTATIONS  # so that fewer tests have the numbers they had


def test_more_runs_than_letters_have_names_of_their_own():
    assert [letter(number) for number in (0, 25, 26, 27, 51, 52, 701, 702)] == [
        "A",
        "Z",
        "AA",
        "AB",
        "AZ",
        "BA",
        "ZZ",
        "AAA",
    ]


def test_a_search_without_two_runs_that_keep_their_answers_says_so(harness, tmp_path):
    for folder in (PLAIN, HEADLINES, CAD):
        shutil.copytree(folder, tmp_path / "tiny" / "lamp4" / folder.name)
    (tmp_path / "tiny" / "lamp4" / CAD.name / "samples.jsonl").unlink()
    some = harness(f"compare '{tmp_path}/tiny/lamp4/*'")
    assert some.code == 0 and f"without answers, so left out: {CAD.name}" in some.err
    (tmp_path / "tiny" / "lamp4" / PLAIN.name / "samples.jsonl").unlink()
    for asked in (f"'{tmp_path}/tiny/lamp4/*'", f"{tmp_path} --task lamp4 --model tiny"):
        done = harness(f"compare {asked}")
        assert done.code == 4 and "1 of 3 found have theirs" in done.error() and CAD.name in done.err


def test_the_family_is_every_run_and_metric_shown():
    three = compare([PLAIN, HEADLINES, CAD])
    assert [row.letter for row in three.rows] == ["B"] * 4 + ["C"] * 4
    smallest = min(three.rows, key=lambda row: row.effect.p)
    assert smallest.p_holm == pytest.approx(8 * smallest.effect.p)


def test_where_less_is_better_a_fall_is_a_gain():
    up = effect([1, 2, 3, 4], [2, 2, 4, 5], list("abcd"))
    down = effect([1, 2, 3, 4], [2, 2, 4, 5], list("abcd"), higher_is_better=False)
    assert down.difference == up.difference == 0.75
    assert (down.helped, down.harmed) == (up.harmed, up.helped) == (0, 0.75)
    assert down.worst_tenth == -1 and up.worst_tenth == 0


def test_equal_gains_have_no_effect_size_and_no_correlation():
    same = effect([0, 0, 0], [1, 1, 1], list("abc"))
    assert math.isnan(same.size) and math.isnan(same.detectable) and same.p == 0.25
    assert math.isnan(by_length([1, 1, 1], list("abc"), {"a": 1, "b": 2, "c": 3}).rho)


def test_rounding_is_neither_a_gain_nor_a_difference_between_users():
    cancel = effect([0.3, 0.7, 0.2, 0.1], [0.5, 0.5, 0.1, 0.2], list("aabb"))  # .2 and -.2 less the last bit
    assert cancel.helped == cancel.harmed == 0 and math.isnan(cancel.size) and cancel.p == 1
    equal = effect([0.1, 0.2, 0.5, 0.7], [0.2, 0.3, 0.6, 0.8], list("abcd"))  # .1 each, but for the last bit
    assert math.isnan(equal.size) and math.isnan(equal.detectable) and equal.helped == 1
    large = effect([1e9 * v for v in (0.1, 0.2, 0.5)], [1e9 * v for v in (0.2, 0.3, 0.6)], list("abc"))
    assert math.isnan(large.size) and math.isnan(large.detectable)
    lengths = {"a": 1, "b": 2, "c": 3}
    assert math.isnan(by_length([0.2 - 0.1, 0.3 - 0.2, 0.6 - 0.5], list("abc"), lengths).rho)
    tie = by_length([0.3, 0.1, 0.2, 0.0], list("abbc"), lengths)  # .3, and .1 + .2 over two
    assert tie.rho == by_length([3, 1, 2, 0], list("abbc"), lengths).rho


def test_only_what_both_runs_answered_is_paired_and_the_rest_is_counted(tmp_path):
    first = iter(range(200))

    def thinned(line):
        number = next(first)
        if number < 20:
            return None
        if number < 25:
            return {**line, "error": "too long", "metrics": {}}
        if number < 30:
            return {**line, "metrics": {**line["metrics"], "meteor": None}}
        return line

    other = _copy(HEADLINES, tmp_path / "tiny" / "lamp4" / "rag-00000000", thinned)
    found = compare([PLAIN, other])
    by_metric = {row.metric: row for row in found.rows}
    assert found.shared == {"B": 175} and by_metric["rouge1"].effect.n == 175
    assert by_metric["meteor"].effect.n == 170 and by_metric["meteor"].unpaired == 5
    assert "B: left out: 25 answered by A alone, 5 failed" in found.notes
    assert "B, meteor: 5 shared samples have no value and are no pair" in found.notes


def test_a_sample_of_another_user_is_no_pair(tmp_path):
    other = _copy(HEADLINES, tmp_path / "rag-00000000", lambda line: {**line, "user": f"other {line['user']}"})
    with pytest.raises(UsageError, match="no answered sample in common"):
        compare([PLAIN, other])


def test_runs_that_cannot_be_compared_are_refused_in_one_line(harness, tmp_path):
    def changed(**data):
        folder = _copy(HEADLINES, tmp_path / f"rag-{len(list(tmp_path.iterdir()))}", lambda line: line)
        record = json.loads((folder / "run.json").read_text())
        record["config"]["data"].update(data)
        (folder / "run.json").write_text(json.dumps(record))
        return folder

    for others, said in (
        (RAG, "runs of different tasks cannot be compared"),
        (changed(split="test"), "runs of different splits cannot be compared"),
        (changed(fingerprint="f00d"), "runs of different data cannot be compared"),
        (PLAIN, "are one run; give two"),
        ("--metric bleu", "metric 'bleu' cannot be compared; means over samples are: rouge1,"),
        ("--format html", "choose from terminal, md, csv, json"),
        ("", "give two runs or more, or one and --control wrong_user"),
    ):
        second = f"{HEADLINES} {others}" if str(others).startswith("--") else others
        done = harness(f"compare {PLAIN} {second}")
        assert done.code == 2 and said in done.error() and not done.out


def test_a_run_without_samples_or_control_says_how_to_get_them(harness, tmp_path):
    shutil.copy(HEADLINES / "run.json", tmp_path)
    done = harness(f"compare {tmp_path} {PLAIN}")
    assert done.code == 4 and "run the same command again to get it back" in done.error()
    done = harness(f"compare {PLAIN} --control wrong_user")
    assert done.code == 4 and "--control wrong_user" in done.error()
    with pytest.raises(UsageError, match="is a control itself"):
        control_of(control_of(RAG, "wrong_user"), "shuffled")
    with pytest.raises(DataMissing, match="no record under control shuffled"):
        control_of(RAG, "shuffled")


def test_a_run_that_is_not_done_is_named_and_not_taken_for_one_without_a_mean(harness, tmp_path):
    folder = tmp_path / "rag-running"
    shutil.copytree(RAG, folder)
    record = read_record(folder)
    record.status, record.metrics, record.hash = "running", {}, "0" * 8
    (folder / "run.json").write_text(record.to_json())
    done = harness(f"compare {DPS} {folder}")
    assert done.code == 4 and "rag-running is running and has no metrics yet" in done.error()


def test_every_format_says_the_same_numbers(harness):
    command = f"compare {RAG} {DPS} --metric accuracy"
    content = json.loads(harness(f"{command} --format json").out)
    (line,) = csv.DictReader(io.StringIO(harness(f"{command} --format csv").out))
    (row,) = content["rows"]
    assert row["difference"] == float(line["difference"])
    assert "method.name rag -> dps" in content["runs"][1]["differs"]
    shown = harness(f"{command} --details").out
    said = f"{row['difference']:+.3f} [{row['low']:.3f}, {row['high']:.3f}]"
    assert said in shown and f"| {said}" in harness(f"{command} --format md").out
    assert "not means over samples, so not compared: f1, f1_lenient" in harness(f"compare {RAG} {DPS} --metric all").out


@pytest.mark.parametrize("width", [80, 120])
def test_a_comparison_fits_the_terminal_and_says_all_that_markdown_says(harness, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    command = f"compare {control_of(RAG, 'wrong_user')} {RAG} {DPS} --metric all"
    shown, markdown = harness(command).out, harness(f"{command} --format md").out
    assert max(map(len, shown.splitlines())) <= width
    rows = [line.split("|") for line in markdown.splitlines() if line.startswith("| ")]
    assert all(cell.strip() in " ".join(shown.split()) for row in rows[1:] for cell in row)


def test_without_the_data_the_lengths_of_histories_are_not_known(harness, tmp_path):
    def moved(source: Path, name: str) -> Path:
        folder = _copy(source, tmp_path / name, lambda line: line)
        record = json.loads((folder / "run.json").read_text())
        record["config"]["data"]["fingerprint"] = "f00d"
        record["hash"] = name
        (folder / "run.json").write_text(json.dumps(record))
        return folder

    done = harness(f"compare {moved(PLAIN, 'a')} {moved(HEADLINES, 'b')} --metric rouge1 --details")
    assert done.code == 0 and "gain against history length is not shown: the runs read other data" in done.out


def test_comparing_imports_no_torch():
    code = (
        "import sys; sys.argv = ['harness', 'compare', *sys.argv[1:]]\n"
        "from harness.cli.app import main; main(); assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code, RAG, DPS], capture_output=True, text=True)
    assert done.returncode == 0 and "accuracy" in done.stdout, done.stderr


def test_where_no_metric_is_a_mean_over_samples_that_is_said_whatever_is_asked_for(tmp_path, run_config, run_record):
    folders = []
    for method in ("plain", "rag"):
        config = run_config(method)
        with RunFolder.open(tmp_path, config) as folder:
            folder.write(run_record(config, corpus_bleu=0.5))
            folder.append([Sample("1", "u", response="A", metrics={"length": 1.0})])
            folders.append(folder.path)
    for asked in ([], [MAIN], ["rougeL"]):
        with pytest.raises(UsageError, match="no metric of these runs is a mean over samples"):
            compare(folders, asked)


def test_users_whose_ids_differ_in_a_nul_at_the_end_are_two():
    users = ["ann", "ann\0", "bob"]
    found = effect([0.0, 0.0, 0.0], [1.0, 0.0, 1.0], users)
    assert found.users == 3 and found.helped == pytest.approx(2 / 3)
    by = by_length([1.0, 0.0, 1.0], users, {"ann": 3, "ann\0": 1, "bob": 2})
    assert [(group.shortest, group.gain) for group in by.groups] == [(1, 0.0), (2, 1.0), (3, 1.0)]


def test_where_all_histories_are_of_one_length_the_shortest_asked_for_keeps_them_all(tmp_path, run_config, run_record):
    lines = [{"user": f"u{n}", "input": "x", "target": "a b c", "history": ["a", "b", "c"]} for n in range(3)]
    (tmp_path / "equal.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    name = f"users:{tmp_path}/equal.jsonl"
    fingerprint, folders = task_class(name)().fingerprint(Selection("dev")), []
    for method in ("plain", "rag"):
        config = run_config(method, name, fingerprint=fingerprint)
        with RunFolder.open(tmp_path, config) as folder:
            folder.write(run_record(config, rouge1=0.5))
            folder.append([Sample(str(n + 1), f"u{n}", response="a", metrics={"rouge1": n / 2}) for n in range(3)])
            folders.append(folder.path)
    found = compare(folders, min_history=2)
    assert found.shared == {"B": 3} and found.rows[0].lengths is None
    assert "gain against history length is not shown: all histories are of one length" in found.notes
    with pytest.raises(UsageError, match="no user has 4 items of history; the longest history has 3"):
        compare(folders, min_history=4)


def test_mmlu_is_compared_question_by_question(tmp_path, run_config, run_record):
    folders = []
    for method, right in (("plain", {0, 1, 2}), ("rag", {0, 1, 2, 3, 4})):
        config = run_config(method, "mmlu")
        with RunFolder.open(tmp_path, config) as folder:
            folder.write(run_record(config, accuracy=len(right) / 10))
            folder.append(
                [
                    Sample(f"virology/{i}", "one user", response="A", metrics={"accuracy": float(i in right)})
                    for i in range(10)
                ]
            )
            folders.append(folder.path)
    found = compare(folders)
    assert found.unit == "item" and found.rows[0].effect.users == 10
    assert found.rows[0].effect.helped == 0.2 and found.rows[0].lengths is None


def test_a_comparison_is_answered_in_80_columns_with_ranks_costs_and_a_sentence(harness):
    said = harness(f"compare {RAG} {DPS} {RESULTS / 'lamp2m'}/plain-* --baseline plain").out
    lines = said.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[2].split()[:2] == ["rank", "run"] and lines[2].endswith("operations")
    assert {tuple(line.split()[:2]) for line in lines[4:7]} == {("1", "rag"), ("1", "dps"), ("3", "plain")}
    sentence = next(line for line in lines if line.startswith(("rag and", "dps and", "Of ")))
    assert "beat plain (+" in sentence and "nothing separates them" in said and "costs least." in " ".join(said.split())


def test_the_sentence_says_who_wins_who_loses_and_what_nothing_separates():
    found = compare([RAG, DPS, TAGS], [MAIN])
    assert re.fullmatch(
        r"plain lies below rag \(-\.24, p [=<] \.\d+\); nothing separates dps from rag\.", sentence(found)
    )
    assert [found.rank(letter) for letter in "ABC"] == [1, 1, 3]


def test_every_two_runs_are_tested_as_alone_and_corrected_for_all_pairs():
    found = compare([RAG, DPS, TAGS], [MAIN])
    alone = compare([RAG, DPS], [MAIN]).rows[0].effect
    pair = next(one for one in found.between if (one.first, one.second) == ("A", "B"))
    assert (pair.gain, pair.p) == (pytest.approx(alone.difference), alone.p)
    assert [one.p_holm for one in found.between] == holm([one.p for one in found.between])


def test_users_with_long_histories_are_tested_alone(harness):
    from harness.task import Selection
    from harness.tasks.lamp import Lamp4

    history = {item.example.user.id: len(item.example.user.history) for item in Lamp4().items(Selection("dev"))}
    found = compare([PLAIN, HEADLINES], [MAIN], min_history=12)
    kept = [s for s in read_samples(HEADLINES) if history[s.user] >= 12]
    assert found.rows[0].effect.users == len(kept) < 200
    assert found.rows[0].effect.b == pytest.approx(np.mean([s.metrics["rouge1"] for s in kept]))
    assert f"Of {len(kept)} users with 12 or more items of history: rag beats plain" in sentence(found)
    done = harness(f"compare {PLAIN} {HEADLINES} --min_history 1000")
    assert done.code == 2 and "no user has 1000 items of history; the longest history has" in done.error()


def test_runs_are_found_by_task_and_model_and_held_against_plain(harness):
    folder = RESULTS.parent
    said = harness(f"compare {folder} --task LaMP-4 --model tiny").out
    assert " beat plain (" in " ".join(said.split()) and "wrong_user" not in said
    assert harness(f"compare {folder} --task lamp4 --model none").error().startswith("harness: no finished run of none")
    several = harness(f"compare {folder} --model tiny")
    assert several.code == 2 and "name one of each: --model tiny --task" in several.error()


def test_runs_of_one_method_are_told_apart_by_what_differs():
    drawn = sorted((RESULTS / "lamp2m").glob("dps-*"))
    sides = compare([RAG, *drawn], [MAIN]).sides
    labels = list(names(sides).values())
    assert labels[0] == "rag" and len(set(labels)) == len(labels)
    assert any("heads=4" in label for label in labels)


def test_a_name_that_a_run_shares_with_its_control_is_the_run(harness, tmp_path):
    for run in (HEADLINES, control_of(HEADLINES, "wrong_user")):
        shutil.copytree(run, tmp_path / "runs/tiny/lamp4" / run.name)
    name = f"runs/tiny/lamp4/{HEADLINES.name.rpartition('-')[0]}"
    done = harness(f"compare {name} --control wrong_user")
    assert done.code == 0 and HEADLINES.name.rpartition("-")[0] in done.out, done.err


def test_runs_of_other_weights_under_one_name_are_said_to_differ(tmp_path):
    other = _copy(HEADLINES, tmp_path / "rag", lambda line: line if line["id"] != "lamp4_dev_0" else None)
    record = read_record(other)
    model = record.config.model.model_copy(update={"revision": "sha256:other", "dtype": "bfloat16"})
    record.config = record.config.model_copy(update={"model": model})
    (other / "run.json").write_text(record.to_json())
    found = compare([PLAIN, other], [MAIN])
    differs = [one.partition(" ")[0] for one in differences(*(side.config for side in found.sides))]
    assert {"model.revision", "model.dtype"} <= set(differs)
    said = " ".join(brief(found).split())
    assert "rag: differs from plain also in model.revision" in said and "model.dtype float32 -> bfloat16" in said
    assert "also in" not in brief(compare([PLAIN, HEADLINES], [MAIN])), "the method is what is compared"


def test_the_first_runs_number_is_the_one_the_differences_are_taken_from(tmp_path):
    """Also where another run answered a few samples alone."""
    ids = list(_values(CAD, "rouge1"))[:10]
    few = _copy(CAD, tmp_path / "cad", lambda line: line if line["id"] in ids else None)
    found = compare([PLAIN, few, HEADLINES], [MAIN])
    said = brief(found)
    shown = {line.split()[1]: float(line.split()[2]) for line in said.splitlines() if re.match(r"\d ", line)}
    assert shown["plain"] == round(read_record(PLAIN).metrics["rouge1"].value, 3)
    assert shown["rag"] - shown["plain"] == pytest.approx(found.rows[1].effect.difference, abs=0.001)
    assert "cad: left out: 190 answered by plain alone" in " ".join(said.split())


def test_what_a_search_leaves_out_is_said(harness, tmp_path):
    """Runs under other conditions than those with most methods, such as fewer users."""
    for folder in (PLAIN, HEADLINES):
        shutil.copytree(folder, tmp_path / "few" / "tiny" / "lamp4" / folder.name)
    few = _copy(CAD, tmp_path / "few" / "tiny" / "lamp4" / "cad", lambda line: line)
    record = read_record(few)
    record.config = record.config.model_copy(
        update={"selection": record.config.selection.model_copy(update={"limit": 4})}
    )
    (few / "run.json").write_text(record.to_json())
    done = harness(f"compare {tmp_path}/few --task lamp4 --model tiny")
    assert done.code == 0 and "cad" not in done.out
    assert "compared: tiny · lamp4; under other conditions, so left out: tiny · lamp4 · --limit 4 only" in done.err


def test_a_run_that_took_no_operations_has_a_known_cost():
    found = compare([PLAIN, committed("lamp4", "copy")], [MAIN])
    assert found.sides[1].record.operations == 0 and " 0.00x" in brief(found)


def test_an_option_of_the_task_that_one_run_was_not_given_is_its_default(run_config):
    def asked(task="mmlu", fit_task=None, **options):
        config = run_config(task=task)
        data = config.data.model_copy(update={"fit_task": fit_task, "fit_options": options if fit_task else {}})
        mine = config.task.model_copy(update={"options": {} if fit_task else options})
        return config.model_copy(update={"task": mine, "data": data})

    bare, cloze = asked(subjects="virology"), asked(subjects="virology", format="cloze")
    assert differences(bare, cloze) == ["task.options.format letters -> cloze"]
    assert differences(cloze, bare) == ["task.options.format cloze -> letters"]
    assert differences(bare, asked(subjects="virology", format="letters")) == []
    both = differences(asked(num_fewshot=5), asked(format="cloze"))
    assert set(both) == {"task.options.num_fewshot 5 -> 0", "task.options.format letters -> cloze"}
    fitted = differences(asked(fit_task="lamp2m"), asked(fit_task="lamp2m", answers="scored"))
    assert fitted == ["data.fit_options.answers written -> scored"]
    gone = differences(asked(fit_task="./gone.py"), asked(fit_task="./gone.py", flavour="b"))
    assert gone == ["data.fit_options.flavour default -> b"]


def test_a_comparison_says_which_task_option_sets_its_runs_apart(harness, tmp_path):
    other = _copy(RAG, tmp_path / "rag-scored", lambda line: line)
    record = read_record(other)
    task = record.config.task.model_copy(update={"options": {"answers": "scored"}})
    record.config = record.config.model_copy(update={"task": task})
    (other / "run.json").write_text(record.to_json())
    for form in ("--details", "--format json", ""):
        said = harness(f"compare {TAGS} {other} --metric accuracy {form}").out
        assert "task.options.answers written -> scored" in " ".join(said.split())
