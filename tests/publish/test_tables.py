"""Published numbers are the paper's to the digit; measured ones beside them say when they cannot be compared."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shlex
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from statistics import fmean

import pytest
import typer

from harness.cli.app import app
from harness.engine.flops import SIZES
from harness.errors import UsageError
from harness.publish.tables import FORMATS, TABLES, commands, formats, grids, parameters, published, render, table
from harness.publish.tables.differences import verdict
from harness.publish.tables.grid import Grid
from harness.publish.tables.measured import NOT_OFFICIAL
from harness.records.store import Health, MetricValue, RunConfig, RunFolder, RunRecord, TaskConfig
from harness.run.cell import Settings, grid
from harness.run.sweep import points

RESULTS = Path(__file__).parents[2] / "results"

Configs = Callable[..., RunConfig]
Records = Callable[..., RunRecord]

AS_PRINTED = {
    "dps-1": """
        0.1681 0.1498 0.1568 0.3530 0.3068 0.3925 0.3368 0.2893 0.2813
        0.1768 0.1572 0.1626 0.4010 0.3527 0.4004 0.3231 0.2764 0.2729
        0.1694 0.1508 0.1592 0.3636 0.3117 0.4079 0.3365 0.2877 0.2795
        0.1787 0.1596 0.1650 0.3243 0.2787 0.3826 0.3389 0.2898 0.2884
        0.1580 0.1392 0.1255 0.4197 0.3780 0.4381 0.3590 0.3106 0.3384
        0.1581 0.1305 0.1232 0.4311 0.3729 0.4565 0.3470 0.3065 0.3173
        0.1642 0.1473 0.1272 0.4277 0.3746 0.4596 0.3524 0.3046 0.3246
        0.1627 0.1450 0.1318 0.4071 0.3421 0.4230 0.3533 0.2981 0.3269
        0.1361 0.1132 0.0980 0.4375 0.3712 0.4561 0.3342 0.2916 0.3097
        0.1299 0.1085 0.0908 0.4135 0.3648 0.4419 0.3407 0.2927 0.2978
        0.1362 0.1136 0.0962 0.4364 0.3733 0.4605 0.3291 0.2852 0.3026
        0.1536 0.1366 0.1399 0.3983 0.3350 0.4162 0.3441 0.2998 0.2990
    """,
    "dps-2": """
        0.6240 0.6070 0.4552 0.3839 0.4426 0.9300
        0.6232 0.6200 0.4639 0.4034 0.4442 0.9458
        0.6156 0.5961 0.2800 0.1643 0.4200 0.8718
        0.6356 0.6288 0.4610 0.3910 0.4236 0.9278
        0.6230 0.6250 0.1850 0.1181 0.3180 0.6240
        0.5400 0.5891 0.2320 0.1217 0.3250 0.6325
        0.6790 0.6795 0.2412 0.0958 0.3200 0.6300
        0.6932 0.7078 0.3902 0.3202 0.3276 0.6719
    """,
    "dps-3": """
        6.57 6.96 1.06×
        13.04 13.43 1.03×
        26.80 27.21 1.02×
    """,
    "dps-4": """
        34 40
        3.97 4.45
        4.51 4.83
        3.62 3.91
        3.63 3.93
        4.08 4.21
    """,
    "dps-5": """
        Gen. ~1.5K ~18K
        Gen. ~1.2K ~14K
        Gen. ~1.0K ~12K
        Cls. ~2.0K ~20K
        Cls. ~1.8K ~16K
        Reg. ~2.5K ~25K
    """,
    "perfit-1": """
        1 3.65 4 14.60 20 72.90
        4 0.98 40 9.77 203 49.56
        3 0.73 32 7.81 177 43.21
    """,
    "perfit-2": """
        0.787 0.538 0.478 0.425 0.223 0.491
        0.591 0.397 0.528 0.383 0.183 0.502
        0.810 0.589 0.600 0.493 0.179 0.443
        0.818 0.586 0.630 0.518 0.179 0.443
        0.0058 0.0117 0.0078 0.0010 0.0117 0.0015
        93.75 81.25 91.67 98.44 87.50 97.66
    """,
    "perfit-3": """
        0.030 0.029 0.145 0.118 0.126 0.123
        0.098 0.082 0.149 0.121 0.135 0.124
        0.101 0.085 0.152 0.122 0.149 0.140
        0.106 0.088 0.167 0.132 0.136 0.130
        0.110 0.092 0.169 0.135 0.164 0.157
        0.104 0.086 0.156 0.125 0.132 0.127
        0.186 0.167 0.476 0.415 0.527 0.474
        0.120 0.108 0.489 0.435 0.398 0.333
        0.191 0.171 0.519 0.442 0.539 0.483
        0.207 0.186 0.521 0.451 0.525 0.472
        0.0117 0.0015 0.0039 0.0010 0.0078 0.0039
        87.50 97.66 95.83 98.44 91.67 93.75
    """,
    "perfit-4": """
        0.818 0.586 0.630 0.518 0.195 0.175 0.525 0.472
        0.792 0.529 0.466 0.415 0.189 0.169 0.493 0.450
        0.803 0.604 0.620 0.496 0.194 0.175 0.483 0.438
        0.801 0.594 0.599 0.473 0.190 0.171 0.478 0.433
        0.591 0.397 0.528 0.383 0.120 0.108 0.398 0.333
    """,
    "perfit-5": """
        829/100 3,181 92.1 - 3,302 55.6 92.6 - 15
        274/49 3,662 68.2 - 6,033 219.9 63.5 - 15
        1,543/100 22,388 128.7 - 112 959.8 211.9 - 5
        19,899/101 7,275 33.9 9.2 6,275 270.1 25.2 11.1 -
        14,581/101 16,075 162.1 9.7 107 442.9 171.6 10.3 -
        13,337/100 14,826 29.7 18.3 109 121.2 29.4 18.0 -
    """,
    "persona-1": """
        86.19 88.88 86.83 86.77
        0.39 1.04 0.39 0.45
    """,
    # as the repository's files write them: GEMMA-2-2B, LLAMA-3.2-3B, LLAMA-3.1-8B, MINISTRAL-8B-INSTRUCT, GEMMA-2-9B, GEMMA-2-27B
    "lamp-dev": """
        0.1298 0.1184 - - 0.3014 0.2487
        0.1785 0.1631 - - 0.3181 0.2699
        - - 0.4612 0.4114 - -
        0.1174 0.1043 - - 0.2319 0.1833
        0.1735 0.1586 - - 0.2669 0.221
        - - 0.3784 0.3322 - -
        0.115 0.1053 - - 0.2528 0.201
        0.1904 0.1759 - - 0.3291 0.2793
        - - 0.435 0.3831 - -
        0.1346 0.1218 - - 0.3554 0.3086
        0.196 0.1805 - - 0.4169 0.364
        - - 0.4727 0.4195 - -
        0.1391 0.1263 - - 0.3119 0.2611
        0.2033 0.1884 - - 0.4125 0.3573
        - - 0.4842 0.4365 - -
        0.1409 0.1268 - - 0.2605 0.2149
        0.2152 0.1976 - - 0.4235 0.3691
        - - 0.481 0.4313 - -
    """,
}
"""The cells of the tables, row by row, copied from their text apart from the YAML files. `829/100` is one cell."""
CELLS = {"dps-1": 108, "dps-2": 48, "dps-3": 9, "dps-4": 12, "dps-5": 18, "persona-1": 8} | {
    "lamp-dev": 108,  # 60 numbers
    "perfit-1": 18, "perfit-2": 36, "perfit-3": 72, "perfit-4": 40, "perfit-5": 54,
}  # fmt: skip
"""Counted on the papers' pages."""


@pytest.fixture
def save(tmp_path: Path):
    def write(record: RunRecord) -> RunRecord:
        with RunFolder.open(tmp_path, record.config) as folder:
            folder.write(record)
        return record

    return write


def flat(text: str) -> str:
    """Without the line breaks of a terminal."""
    return " ".join(text.split())


def measured(results: Path, id: str = "dps-1") -> dict[tuple[str, str, str, str], dict]:
    cells = json.loads(render([id], results, "json"))[0]["cells"]
    return {(c["model"], c["method"], c["task"], c["metric"]): c for c in cells if c["source"] == "measured"}


# Published


@pytest.mark.parametrize("id", AS_PRINTED)
def test_every_cell_is_what_the_paper_prints(id: str):
    printed = [line.split() for line in AS_PRINTED[id].strip().splitlines()]
    assert [[cell.text.replace(" ", "") for cell in row.cells] for row in table(id).rows] == printed


def test_each_table_has_as_many_cells_as_the_paper():
    assert {id: sum(len(row.cells) for row in t.rows) for id, t in published().items()} == CELLS
    assert sum(CELLS.values()) - CELLS["lamp-dev"] == 423  # of the three papers


def test_every_table_is_transcribed():
    assert set(AS_PRINTED) == set(TABLES)


@pytest.mark.parametrize("id", TABLES)
def test_no_two_cells_of_a_table_mean_the_same(id: str):
    meanings = [frozenset(cell.keys.items()) for row in table(id).rows for cell in row.cells]
    assert len(set(meanings)) == len(meanings)


def test_a_cell_says_what_it_measures():
    cell = table("dps-2").rows[-1].cells[-1]
    assert cell.keys == {"model": "qwen2-7b", "method": "dps", "task": "lamp3", "metric": "rmse", "split": "dev"}
    assert cell.value == 0.6719


def test_words_have_no_value_and_round_figures_do():
    first = table("dps-5").rows[0]
    assert [cell.value for cell in first.cells] == [None, 1500.0, 18000.0]
    assert table("dps-3").rows[0].cells[2].value == 1.06
    assert [cell.value for cell in table("perfit-5").rows[0].cells[:4]] == [None, 3181.0, 92.1, None]


def test_a_row_of_parameters_says_which_stage_each_number_is_of():
    (row,) = (row for row in table("perfit-2").rows if row.keys.get("metric") == "parameter_reduction")
    keys = {"model": "llama2-7b", "method": "perfit", "task": "lamp2n", "metric": "parameter_reduction"}
    assert [cell.keys for cell in row.cells[:2]] == [{**keys, "stage": "1"}, {**keys, "stage": "2"}]


def test_the_best_published_cell_of_each_model_and_column_is_bold(tmp_path: Path):
    text = render(["dps-2"], tmp_path, "md")
    dola, dps = (next(line for line in text.splitlines() if f" {m} " in line) for m in ("DoLa", "DPS (ours)"))
    assert "**0.4200**" in dola  # lower is better for MAE
    assert "**0.6356**" in dps
    assert "**0.9278**" not in dps


def test_a_bare_number_means_the_dps_paper(tmp_path: Path):
    assert render(["1"], tmp_path) == render(["dps-1"], tmp_path) == render(["DPS-1"], tmp_path)


def test_an_unknown_table_suggests_the_nearest():
    with pytest.raises(UsageError, match=r"unknown table 'dsp-1'; did you mean 'dps-1'\? 'harness list tables'"):
        table("dsp-1")


def test_an_unknown_format_suggests_the_nearest(tmp_path: Path):
    with pytest.raises(UsageError, match="did you mean 'latex'"):
        render(["1"], tmp_path, "latec")


def test_the_formats_offered_are_the_formats_written():
    assert set(FORMATS) == {"terminal", *formats.FORMATS}


def test_without_records_the_table_says_how_to_make_them(tmp_path: Path):
    assert "harness table --missing" in render(["1"], tmp_path)
    assert "harness table --missing" not in render(["1"], tmp_path, published_only=True)


# Measured


def test_what_holds_of_every_run_beside_a_table_is_said_in_a_footnote(
    tmp_path: Path, save, run_config: Configs, run_record: Records
):
    for method in ("plain", "rag", "copy"):
        options = {"k": 7, "retriever": "bm25", "seed": 0} if method == "rag" else {}
        save(run_record(run_config(method, "lamp5", "smollm2-135m", options=options), n=2500, rouge1=0.3))
    text = flat(render(["lamp-dev"], tmp_path, "md", model="smollm2-135m"))
    assert "LaMP's own prompt, published a role and past pairs between tags" in text
    assert "another retriever than the published Contriever" in text
    cells = measured(tmp_path, "lamp-dev")
    assert next(method for _, method, task, metric in cells if (task, metric) == ("lamp5", "rouge1")) == "copy"
    assert "rag k=7" in {method for _, method, *_ in cells}


def test_no_command_fills_a_cell_without_a_number(tmp_path: Path):
    asked = [cell for line in commands(["lamp-dev"], tmp_path) for cell in cells_of(line)]
    assert {task for _, method, _, task in asked if method == "plain"} == {"lamp4", "lamp7"}


def test_a_measured_cell_stands_under_the_published_one(tmp_path: Path, save, run_config: Configs, run_record: Records):
    save(run_record(run_config(method="dps"), rouge1=0.18))
    lines = render(["1"], tmp_path, "md").splitlines()
    at = next(i for i, line in enumerate(lines) if "DPS (ours)" in line)
    assert "0.1787" in lines[at]
    assert "measured" in lines[at + 1]
    assert "0.1800 ±0.0100 (n=1925)" in lines[at + 1]
    assert "difference" in lines[at + 2]
    assert "+0.0013" in lines[at + 2]
    assert "†" not in "\n".join(lines)


@pytest.mark.parametrize(
    ("config", "record", "reason"),
    [
        ({"data": "lamp-mini (synthetic)"}, {}, "synthetic lamp-mini data"),
        ({"limit": 20}, {}, "--limit 20"),
        ({"users": 9}, {}, "--users 9"),
        ({"split": "test"}, {}, "split test, published dev"),
        ({"fit_split": "dev:0.2"}, {}, "dev:0.2 held out"),
        ({}, {"n": 1500}, "1500 lamp4 items, the split of the paper has 1925"),
        ({}, {"status": "partial"}, "run incomplete"),
    ],
)
def test_a_cell_that_cannot_be_compared_carries_a_dagger_and_its_reason(
    tmp_path: Path, save, run_config: Configs, run_record: Records, config: dict, record: dict, reason: str
):
    save(run_record(run_config(**config), rouge1=0.2, **record))
    cell = measured(tmp_path)["llama3-8b", "rag", "lamp4", "rouge1"]
    assert any(reason in given for given in cell["not_comparable"])
    text = render(["1"], tmp_path)
    assert re.search(r"measured †a +0.2000", text)
    assert reason in flat(text)


def test_answers_sampled_where_the_paper_decodes_greedily_are_not_comparable(
    tmp_path: Path, save, run_config: Configs, run_record: Records
):
    for method in ("cad", "perfit"):
        config = as_perfit_samples(run_config(method, model="llama2-7b"))
        save(run_record(config, n=6275, rouge1=0.2))
    greedy = measured(tmp_path)["llama2-7b", "cad", "lamp4", "rouge1"]["not_comparable"]
    assert "lamp4 sampled at temperature 0.1" in " ".join(greedy)
    assert measured(tmp_path, "perfit-3")["llama2-7b", "perfit", "lamp4", "rouge1"]["not_comparable"] == []


def as_perfit_samples(config: RunConfig) -> RunConfig:
    drawn = {"temperature": 0.1, "top_k": 10, "top_p": 0.9}
    return config.model_copy(update={"sampling": config.sampling.model_copy(update=drawn)})


@pytest.mark.parametrize(
    ("drawn", "said"),
    [
        ({}, "lamp4 answered greedily, published with --temperature 0.1 --top_k 10 --top_p 0.9"),
        ({"temperature": 0.1, "top_k": 0, "top_p": 1.0}, "lamp4 sampled at temperature 0.1, published with"),
        ({"temperature": 1.0, "top_k": 10, "top_p": 0.9}, "lamp4 sampled at temperature 1, top_k 10, top_p 0.9"),
    ],
)
def test_answers_drawn_otherwise_than_the_papers_are_not_comparable(
    tmp_path: Path, save, run_config: Configs, run_record: Records, drawn: dict, said: str
):
    config = run_config("plain", model="llama2-7b")
    sampling = config.sampling.model_copy(update=drawn)
    save(run_record(config.model_copy(update={"sampling": sampling}), n=6275, rouge1=0.2))
    (reason,) = measured(tmp_path, "perfit-3")["llama2-7b", "plain", "lamp4", "rouge1"]["not_comparable"]
    assert reason.startswith(said)


@pytest.mark.parametrize("screen", [None, "bound"])
def test_what_a_method_decides_by_the_model_is_no_setting_of_it(
    tmp_path: Path, save, run_config: Configs, run_record: Records, screen: str | None
):
    save(run_record(run_config("dps", options={"screen": screen}), rouge1=0.2))
    assert measured(tmp_path)["llama3-8b", "dps", "lamp4", "rouge1"]["not_comparable"] == []
    save(run_record(run_config("dps", options={"screen": 60}, seed=1), rouge1=0.9))
    assert measured(tmp_path)["llama3-8b", "dps", "lamp4", "rouge1"]["value"] == 0.2


def test_options_of_a_task_that_the_paper_did_not_use_are_a_reason(
    tmp_path: Path, save, run_config: Configs, run_record: Records
):
    task = TaskConfig(name="lamp4", options={"split_by": "time", "most_active": 100})
    config = as_perfit_samples(run_config("plain", model="llama2-7b")).model_copy(update={"task": task})
    save(run_record(config, n=6275, rouge1=0.2))
    key = ("llama2-7b", "plain", "lamp4", "rouge1")
    assert measured(tmp_path, "perfit-3")[key]["not_comparable"] == []  # whose users these are
    reasons = measured(tmp_path)[key]["not_comparable"]
    assert "lamp4 with split_by=time, most_active=100" in reasons


def test_reasons_that_differ_in_a_count_are_one_footnote_and_each_cell_keeps_its_own(
    tmp_path: Path, save, run_config: Configs, run_record: Records
):
    for method, errors in (("rag", 3), ("cad", 5), ("dps", 12)):
        record = run_record(run_config(method), status="partial", rouge1=0.2)
        record.health = Health(errors=errors)
        save(record)
    cells = measured(tmp_path)
    said = [cells["llama3-8b", method, "lamp4", "rouge1"]["not_comparable"] for method in ("rag", "dps")]
    assert said == [["3 lamp4 samples failed"], ["12 lamp4 samples failed"]]
    text = flat(render(["1"], tmp_path))
    assert "a: 3 to 12 lamp4 samples failed." in text and "b:" not in text


def test_data_that_is_less_than_lamps_is_a_reason(tmp_path: Path, save, run_config: Configs, run_record: Records):
    (fingerprint,) = (print for print, said in NOT_OFFICIAL.items() if "1925 lamp4" in said)
    config = run_config("plain")
    data = config.data.model_copy(update={"fingerprint": fingerprint})
    save(run_record(config.model_copy(update={"data": data}), rouge1=0.2))
    reasons = measured(tmp_path)["llama3-8b", "plain", "lamp4", "rouge1"]["not_comparable"]
    assert reasons == ["96 of 1925 lamp4 profiles are whole"]


def test_a_column_shows_answers_that_were_written_before_those_that_were_scored(
    tmp_path: Path, save, run_config: Configs, run_record: Records
):
    for answers, value in (("written", 0.1), ("scored", 0.4)):
        task = TaskConfig(name="lamp2m", options={} if answers == "written" else {"answers": answers})
        config = run_config("plain", "lamp2m", "smollm2-135m").model_copy(update={"task": task})
        record = run_record(config, accuracy=value)
        record.started = f"2026-0{2 if answers == 'scored' else 1}-01T00:00:00Z"
        save(record)
    assert measured(tmp_path, "dps-2")["smollm2-135m", "plain", "lamp2m", "accuracy"]["value"] == 0.1


def test_models_the_paper_lacks_stand_in_the_order_of_the_leaderboard(
    tmp_path: Path, save, run_config: Configs, run_record: Records
):
    save(run_record(run_config("plain", model="a-model", data="lamp-mini (synthetic)"), rouge1=0.2))
    save(run_record(run_config("plain", model="z-model"), rouge1=0.2))
    assert list(dict.fromkeys(model for model, *_ in measured(tmp_path))) == ["z-model", "a-model"]


def test_failed_samples_are_a_reason(tmp_path: Path, save, run_config: Configs, run_record: Records):
    record = run_record(run_config(), status="partial", rouge1=0.2)
    record.health = Health(errors=3)
    save(record)
    assert measured(tmp_path)["llama3-8b", "rag", "lamp4", "rouge1"]["not_comparable"] == ["3 lamp4 samples failed"]


def test_a_fit_on_the_train_split_is_comparable(tmp_path: Path, save, run_config: Configs, run_record: Records):
    save(run_record(run_config(method="dps", fit_split="train"), rouge1=0.2))
    assert measured(tmp_path)["llama3-8b", "dps", "lamp4", "rouge1"]["not_comparable"] == []


def test_a_model_the_paper_lacks_gets_its_own_rows_and_label(
    tmp_path: Path, save, run_config: Configs, run_record: Records
):
    for method in ("zebra", "rag", "plain", "dps"):
        save(run_record(run_config(method=method, model="tiny", data="lamp-mini"), rouge1=0.3))
    text = render(["1"], tmp_path, "md")
    tail = text[text.index("tiny (embedded, synthetic lamp-mini data; not comparable)") :]
    assert re.findall(r"\| +(DPS \(ours\)|plain|rag|zebra) ", tail) == ["DPS (ours)", "plain", "rag", "zebra"]


def test_a_missing_metric_says_why(tmp_path: Path, save, run_config: Configs, run_record: Records):
    record = run_record(run_config(), rouge1=0.2)
    save(
        record.model_copy(
            update={"metrics": {**record.metrics, "meteor": MetricValue(value=None, n=0, note="no WordNet")}}
        )
    )
    text = render(["1"], tmp_path, "md")
    assert "-†a" in text
    assert "a: no WordNet" in text
    assert "-†a" in render(["1"], tmp_path)  # where the other cells of the line have no footnote


@pytest.mark.parametrize("split", ["train", "tune"])
def test_what_a_method_scores_on_the_split_its_rate_was_chosen_on_is_in_no_cell(
    tmp_path: Path, save, run_config: Configs, run_record: Records, split: str
):
    config = run_config()
    chosen = config.model_copy(update={"data": config.data.model_copy(update={"split": split})})
    save(run_record(chosen, rouge1=0.9))
    assert "0.9000" not in render(["1"], tmp_path)


def test_measured_cells_are_ranked_only_where_they_saw_the_same_samples(
    tmp_path: Path, save, run_config: Configs, run_record: Records
):
    save(run_record(run_config(method="rag"), rouge1=0.2))
    save(run_record(run_config(method="plain"), rouge1=0.1))
    assert measured(tmp_path)["llama3-8b", "rag", "lamp4", "rouge1"]["best"]
    failed = run_record(run_config(method="pag"), n=1924, status="partial", rouge1=0.3)
    failed.health.errors = 1
    save(failed)
    assert measured(tmp_path)["llama3-8b", "rag", "lamp4", "rouge1"]["best"]
    assert not measured(tmp_path)["llama3-8b", "pag", "lamp4", "rouge1"]["best"]
    save(run_record(run_config(method="cad", fingerprint="0ther"), rouge1=0.3))
    assert not any(cell["best"] for cell in measured(tmp_path).values())


def test_users_held_out_of_one_run_alone_leave_nothing_best(
    tmp_path: Path, save, run_config: Configs, run_record: Records
):
    save(run_record(run_config(method="plain", limit=200), n=200, rouge1=0.1))
    held = run_record(run_config(method="rag", limit=200), n=200, rouge1=0.2)
    held.held_out_users, held.batches = ["1", "2"], [["3"]]
    save(held)
    assert not any(cell["best"] for cell in measured(tmp_path).values())


def test_a_models_rows_are_of_one_set_of_weights_and_the_others_are_said(
    tmp_path: Path, save, run_config: Configs, run_record: Records
):
    for method, value in (("plain", 0.1), ("rag", 0.2)):
        save(run_record(run_config(method=method), rouge1=value))
    other = run_config(method="cad")
    save(
        run_record(other.model_copy(update={"model": other.model.model_copy(update={"dtype": "bfloat16"})}), rouge1=0.9)
    )
    assert {method for _, method, _, _ in measured(tmp_path)} == {"plain", "rag"}
    said = "of llama3-8b, runs with other weights or another dtype are not shown: 1 beside the 2 of one"
    assert said in flat(render(["1"], tmp_path)) and said not in flat(render(["1"], tmp_path, model="qwen2-7b"))


def test_of_several_runs_the_comparable_and_complete_one_is_shown_and_the_rest_counted(
    tmp_path: Path, save, run_config: Configs, run_record: Records
):
    save(run_record(run_config(limit=50), n=50, rouge1=0.9))
    save(run_record(run_config(seed=2), status="partial", rouge1=0.8))
    shown = save(run_record(run_config(), rouge1=0.2))
    assert measured(tmp_path)["llama3-8b", "rag", "lamp4", "rouge1"]["record"].endswith(f"rag-{shown.hash}")
    assert f"2 more of rag, llama3-8b, lamp4 not shown beside rag-{shown.hash}" in flat(render(["1"], tmp_path))


@pytest.mark.parametrize("status", ["running", "failed", "interrupted"])
def test_an_unfinished_run_is_no_measurement(
    tmp_path: Path, save, run_config: Configs, run_record: Records, status: str
):
    save(run_record(run_config(), status=status, rouge1=0.2))
    assert measured(tmp_path) == {}


def test_a_control_is_no_measurement_of_its_method(tmp_path: Path, save, run_config: Configs, run_record: Records):
    save(run_record(run_config(control="wrong_user"), rouge1=0.2))
    assert measured(tmp_path) == {}


@pytest.mark.parametrize(
    "options", [{"control": "random_heads"}, {"control": "random_mask"}], ids=lambda options: options["control"]
)
def test_a_control_inside_the_method_never_stands_for_it(
    tmp_path: Path, save, run_config: Configs, run_record: Records, options: dict
):
    save(run_record(run_config(method="dps", options=options), rouge1=0.9))
    assert measured(tmp_path) == {}


def test_defaults_are_shown_before_sweeps_and_a_sweep_alone_says_what_it_is(
    tmp_path: Path, save, run_config: Configs, run_record: Records
):
    save(run_record(run_config(method="dps", options={"heads": 8, "gamma": 0.5}), rouge1=0.9))
    cell = measured(tmp_path)["llama3-8b", "dps", "lamp4", "rouge1"]
    assert cell["not_comparable"] == ["dps with heads=8"]
    save(run_record(run_config(method="dps", options={"heads": None, "gamma": 0.5}, limit=5), n=5, rouge1=0.2))
    assert measured(tmp_path)["llama3-8b", "dps", "lamp4", "rouge1"]["value"] == 0.2


def test_the_authors_settings_are_comparable_and_stand_behind_the_papers(
    tmp_path: Path, save, run_config: Configs, run_record: Records
):
    released = {"gamma": "entropy", "discover_operator": "uniform", "decode_operator": "uniform", "temperature": 1.0}
    save(run_record(run_config(method="dps", preset="released", options=released), rouge1=0.9))
    cell = measured(tmp_path)["llama3-8b", "dps", "lamp4", "rouge1"]
    assert (cell["value"], cell["not_comparable"]) == (0.9, [])
    save(run_record(run_config(method="dps"), rouge1=0.2))
    assert measured(tmp_path)["llama3-8b", "dps", "lamp4", "rouge1"]["value"] == 0.2


def test_a_row_of_other_options_is_filled_by_runs_with_them(
    tmp_path: Path, save, run_config: Configs, run_record: Records
):
    for k in (1, 4, 5):
        save(run_record(run_config(model="llama2-7b", options={"k": k}), n=6275, rouge1=k / 10))
    cells = measured(tmp_path, "perfit-3")
    shown = {method: cells["llama2-7b", method, "lamp4", "rouge1"]["value"] for method in ("rag k=1", "rag k=4", "rag")}
    assert shown == {"rag k=1": 0.1, "rag k=4": 0.4, "rag": 0.5}
    assert ("llama2-7b", "rag k=2", "lamp4", "rouge1") not in cells


def test_an_ablation_fills_its_own_row_alone(tmp_path: Path, save, run_config: Configs, run_record: Records):
    config = run_config(method="perfit", model="llama2-7b", preset="stage1", options={"ablation": "stage1"})
    save(run_record(as_perfit_samples(config), n=6275, rouge1=0.18))
    assert measured(tmp_path, "perfit-3") == {}
    cells = measured(tmp_path, "perfit-4")
    assert {method for _, method, _, _ in cells} == {"perfit ablation=stage1"}
    assert cells["llama2-7b", "perfit ablation=stage1", "lamp4", "rouge1"]["not_comparable"] == []


def test_one_model_can_be_shown_alone(tmp_path: Path, save, run_config: Configs, run_record: Records):
    save(run_record(run_config(model="tiny"), rouge1=0.2))
    cells = json.loads(render(["1"], tmp_path, "json", model="qwen2-7b"))[0]["cells"]
    assert {cell["model"] for cell in cells} == {"qwen2-7b"}


def test_a_model_that_no_table_and_no_record_has_is_a_mistake_and_not_an_empty_table(harness: Callable):
    done = harness(f"table 1 persona-1 --model llama3_8b --results {RESULTS}")
    assert done.code == 2 and not done.out
    assert "no rows of 'llama3_8b'; did you mean 'llama3-8b'? the tables and records have llama3-8b, " in done.error()
    done = harness(f"table 2 --model mistral-7b --results {RESULTS}")
    assert done.code == 2
    assert "Note: no rows of mistral-7b." in flat(render(["1", "2"], RESULTS, model="mistral-7b"))


def test_measured_only_leaves_the_published_out(tmp_path: Path, save, run_config: Configs, run_record: Records):
    save(run_record(run_config(), rouge1=0.2))
    cells = json.loads(render(["1"], tmp_path, "json", measured_only=True))[0]["cells"]
    assert {cell["source"] for cell in cells} == {"measured"}


# Differences and verdicts


def differences(results: Path, id: str = "dps-1") -> list[dict]:
    return [cell for cell in json.loads(render([id], results, "json"))[0]["cells"] if cell["source"] == "difference"]


@pytest.mark.parametrize(
    ("rouge1", "outside"),
    [(0.1787, False), (0.18874, False), (0.18876, True), (0.16866, False), (0.1686, True)],  # ± 0.01, ± half a digit
)
def test_a_cell_is_outside_where_its_interval_misses_the_print_by_more_than_rounding(
    tmp_path: Path, save, run_config: Configs, run_record: Records, rouge1: float, outside: bool
):
    save(run_record(run_config(method="dps"), rouge1=rouge1))
    (cell,) = differences(tmp_path)
    assert cell["outside_tolerance"] is outside
    assert cell["value"] == pytest.approx(rouge1 - 0.1787)
    assert ("!" in render(["1"], tmp_path).partition("Published:")[0]) is outside


def test_a_cell_with_a_dagger_has_a_difference_and_no_verdict(
    tmp_path: Path, save, run_config: Configs, run_record: Records
):
    save(run_record(run_config(method="dps", limit=20), rouge1=0.9))
    (cell,) = differences(tmp_path)
    assert (cell["printed"], cell["outside_tolerance"]) == ("+0.7213", None)
    assert verdict(grids(["dps-1"], tmp_path)).compared == 0


def test_a_difference_of_nothing_has_no_minus(tmp_path: Path, save, run_config: Configs, run_record: Records):
    save(run_record(run_config(method="dps"), rouge1=0.178699))
    assert differences(tmp_path)[0]["printed"] == "+0.0000"


def test_a_verdict_names_each_cell_outside(tmp_path: Path, save, run_config: Configs, run_record: Records):
    save(run_record(run_config(method="dps"), rouge1=0.2, rougeL=0.16))
    found = verdict(grids([], tmp_path))
    assert found.compared == 2
    assert found.outside == (
        "dps-1 llama3-8b dps lamp4 rouge1: measured - published = +0.0213, 95 % 0.1900 to 0.2100, n=1925",
    )


def test_check_exits_5_and_names_the_cells_on_stderr(
    tmp_path: Path, save, harness, run_config: Configs, run_record: Records
):
    save(run_record(run_config(method="dps"), rouge1=0.1787))
    done = harness(f"table dps-1 --check --results {tmp_path}")
    assert (done.code, done.err) == (0, "1 comparable cells, none outside tolerance\n")
    save(run_record(run_config(method="cad"), rouge1=0.5))
    done = harness(f"table dps-1 --check --results {tmp_path}")
    assert done.code == 5
    assert "dps-1 llama3-8b cad lamp4 rouge1: measured - published = +0.3319" in done.err
    assert done.error() == "harness: 1 of 2 comparable cells are outside tolerance"
    assert done.out.startswith("dps-1: Results")


def test_no_committed_record_is_outside_tolerance():
    assert verdict(grids([], RESULTS)).outside == ()


# What is missing


def cells_of(command: str) -> set[tuple[str, str, str, str]]:
    """(model, method, option, task with its settings) of every run that a command makes; raises where an option does not exist."""
    words = shlex.split(command)
    assert words[0] == "harness"
    group = typer.main.get_command(app)
    sub = group.get_command(None, words[1])  # type: ignore[attr-defined]
    given = sub.make_context(words[1], words[2:]).params
    if words[1] == "data":
        return set()
    settings = points(given["set"]) if words[1] == "sweep" else {"": given["set"]}
    return {
        (given["model"], cell.method_name, " ".join(chosen), " ".join([cell.task_name, *given["task_set"]]))
        for chosen in settings.values()
        for cell in grid(
            given["method"], given["task"], Settings(), chosen, given["task_set"], fit_task=given["fit_task"]
        )
    }


def test_what_is_missing_is_exactly_the_cells_that_nothing_fills(
    tmp_path: Path, save, run_config: Configs, run_record: Records
):
    save(run_record(run_config(method="cad"), rouge1=0.2))
    save(run_record(run_config(method="dps", limit=20), rouge1=0.2))  # cannot be compared
    lines = commands(["dps-1", "dps-2"], tmp_path)
    asked = [cell for line in lines for cell in cells_of(line)]
    wanted = {
        (row.keys["model"], row.keys["method"], "", column.keys["task"])
        for id in ("dps-1", "dps-2")
        for row in table(id).rows
        for column in table(id).columns
    }
    assert set(asked) == wanted - {("llama3-8b", "cad", "", "lamp4")}
    assert len(asked) == len(set(asked))
    runs = [line for line in lines if line.startswith("harness run")]
    assert len(runs) == 4  # a load a model, and one more for the method that has a cell


@pytest.mark.parametrize("model", [None, "tiny", "org/other"])
def test_every_command_can_be_given_and_asks_for_each_row_once(tmp_path: Path, model: str | None):
    lines = commands([], tmp_path, model=model)
    asked = [cell for line in lines for cell in cells_of(line)]
    assert len(asked) == len(set(asked))
    assert {"k=1", "k=2", "k=4"} <= {
        options for _, method, options, task in asked if method == "rag" and task.startswith("lamp4")
    }
    assert {f"ablation={name}" for name in ("stage1", "stage2_cp", "stage2_p")} <= {
        options for _, _, options, _ in asked
    }
    of_papers = {row.keys["model"] for t in published().values() for row in t.rows if "model" in row.keys}
    assert {cell[0] for cell in asked} == ({model} if model else of_papers)
    assert [line for line in lines if "--data" in line] == (
        [] if model else [line for line in lines if "--model" in line and re.search("task[ =]lamp", line)]
    )


def test_of_tables_whose_records_are_committed_tiny_lacks_what_it_cannot_run_alone(harness: Callable):
    done = harness(f"table dps-1 dps-2 dps-3 --missing --model tiny --results {RESULTS}")
    # no head of tiny copies a rating from the text, so decore has none to contrast with
    assert (done.code, done.out) == (
        0,
        f"harness run --method decore --task lamp3 --model tiny --output_path {RESULTS}\n",
    )


def test_downloads_are_asked_for_where_the_folder_lacks_the_files(tmp_path: Path):
    folder = tmp_path / "my files"
    (folder / "LaMP_5" / "dev").mkdir(parents=True)
    (folder / "LaMP_5" / "dev" / "dev_questions.json").write_text("[]")
    lines = commands(["dps-1"], tmp_path, data=str(folder))
    assert lines[:2] == [f"harness data get {task} --split user --dest '{folder}'" for task in ("lamp4", "lamp7")]
    assert all(line.endswith(f"--data '{folder}' --output_path {tmp_path}") for line in lines[2:])


def test_a_comparison_is_asked_for_once_its_two_runs_are_there(
    tmp_path: Path, save, run_config: Configs, run_record: Records
):
    runs = [save(run_record(run_config(method=method), rouge1=0.2)) for method in ("cad", "dps")]
    folders = [str(tmp_path / "llama3-8b" / "lamp4" / f"{run.config.method.name}-{run.hash}") for run in runs]
    assert commands(["dps-4"], tmp_path) == [f"harness judge pairs {folders[0]} {folders[1]} --judge openai/gpt-5.2"]


# The papers' arithmetic


@pytest.mark.parametrize("id", ["perfit-2", "perfit-3"])
def test_rank_times_layers_gives_every_printed_digit_of_the_parameters(tmp_path: Path, id: str):
    cells = [c for c in json.loads(render([id], tmp_path, "json"))[0]["cells"] if c["metric"].startswith("parameter_")]
    printed, computed = ([c["printed"] for c in cells if c["source"] == s] for s in ("published", "computed"))
    assert len(printed) == 12
    assert computed == printed


def test_measured_parameters_are_those_of_the_trained_modules(
    tmp_path: Path, save, run_config: Configs, run_record: Records
):
    for method, collective, personal in (("perfit", 393_216, 786_432), ("oppu", 6_291_456, 4_194_304)):
        record = run_record(run_config(method, "lamp2n", "llama2-7b"), n=6033, accuracy=0.8)
        save(
            record.model_copy(
                update={"analysis": {"collective": {"parameters": collective}, "personal": {"parameters": personal}}}
            )
        )
    cells = json.loads(render(["perfit-2"], tmp_path, "json"))[0]["cells"]
    measured = [c for c in cells if c["source"] == "measured" and c["metric"].startswith("parameter_")]
    assert [(c["task"], c["stage"], c["printed"]) for c in measured] == [
        ("lamp2n", "1", "0.0058"), ("lamp2n", "2", "0.0117"), ("lamp2n", "1", "93.75"), ("lamp2n", "2", "81.25"),
    ]  # fmt: skip


def test_the_arithmetic_is_of_llama_2_and_of_oppus_adapters():
    llama = SIZES["llama2-7b"]
    assert parameters.weights(llama) == 6_738_415_616
    adapters = [2 * llama.width * 8 * parameters.LORA_MATRICES[stage] * llama.layers for stage in ("1", "2")]
    assert adapters == [6_291_456, 4_194_304]
    # a rank's bias is one weight beside 8192, which moves no printed digit
    for row in (row for id in ("perfit-2", "perfit-3") for row in table(id).rows if row.rank_layers):
        if row.keys["metric"] == "parameter_percent":
            biased = [100 * (2 * 4096 + 1) * n / 6_738_415_616 for n in row.rank_layers]
            assert [f"{value:.4f}" for value in biased] == [cell.text for cell in row.cells]


def test_the_mean_reduction_is_not_what_the_abstract_says():
    rows = [row for id in ("perfit-2", "perfit-3") for row in table(id).rows if row.rank_layers]
    printed = [cell.value for row in rows if row.keys["metric"] == "parameter_reduction" for cell in row.cells]
    both_stages = [sum(row.rank_layers[i : i + 2]) for row in rows[::2] for i in (0, 2, 4)]
    assert f"{fmean(printed):.2f}" == "92.93"
    assert f"{fmean(100 * (1 - n / (768 + 512)) for n in both_stages):.2f}" == "92.60"  # OPPU: 8 x (3 and 2) x 32
    assert all(number in " ".join(table("perfit-2").errata) for number in ("92.93", "92.60", "92.3 "))


def test_per_mille_follows_from_users_and_width_but_for_one_cell(tmp_path: Path):
    cells = [c for c in json.loads(render(["perfit-1"], tmp_path, "json"))[0]["cells"] if c["metric"] == "per_mille"]
    printed, computed = ([c["printed"] for c in cells if c["source"] == s] for s in ("published", "computed"))
    assert len(computed) == 9
    assert [pair for pair in zip(printed, computed, strict=True) if len(set(pair)) == 2] == [("72.90", "72.99")]
    assert "72.99, printed 72.90" in table("perfit-1").errata[0]


def test_where_dps_is_best_is_what_the_notes_say(tmp_path: Path):
    cells = json.loads(render(["dps-1", "dps-2"], tmp_path, "json", published_only=True))
    best = [c for made in cells for c in made["cells"] if c["best"] and c["method"] == "dps"]
    assert sum(c["task"] in ("lamp4", "lamp5", "lamp7") for c in best) == 12
    for model, task, metrics in (
        ("qwen2-7b", "lamp4", {"meteor"}), ("qwen2-7b", "lamp7", set()), ("mistral-7b", "lamp7", {"rouge1", "rougeL"}),
        ("llama3-8b", "lamp3", set()), ("qwen2-7b", "lamp3", set()),
    ):  # fmt: skip
        assert {c["metric"] for c in best if (c["model"], c["task"]) == (model, task)} == metrics


# What the papers' own material says of their numbers


@pytest.fixture(scope="module")
def released() -> Path:
    folder = Path(os.environ.get("HARNESS_SHARED", "../shared/data")) / "reference_results"
    if not folder.is_dir():
        pytest.skip(f"no {folder} (set HARNESS_SHARED)")
    return folder


def released_rows(released: Path) -> list[dict[str, str]]:
    with (released / "results" / "evaluation_table_combined.tsv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def test_the_released_ratings_average_to_table_4_with_cad_and_dps_exchanged(released: Path):
    lines = (released / "human_eval" / "llm_eval_gpt5_2.jsonl").read_text("utf-8").splitlines()
    parsed = [line["parsed"] for line in map(json.loads, lines) if line["task"] == "LaMP-4"]
    assert len(parsed) == 100
    for row in table("dps-4").rows[1:]:
        means = {m: fmean(pair["ratings"][m][row.keys["metric"]] for pair in parsed) for m in ("dps", "cad")}
        assert [f"{means['dps']:.2f}", f"{means['cad']:.2f}"] == [cell.text for cell in row.cells]  # printed: CAD, DPS
    assert Counter(pair["winner"] for pair in parsed) == {"cad": 54, "dps": 29, "tie": 17}


def test_the_released_annotations_are_fifty(released: Path):
    lines = (released / "human_eval" / "LaMP-4_annotations.jsonl").read_text("utf-8").splitlines()
    votes = Counter(json.loads(line)["winning_method_alignment"] for line in lines)
    assert votes == {"DPS": 20, "CAD": 17, "tie": 13}
    assert [cell.value for cell in table("dps-4").rows[0].cells] == [100 * 17 / 50, 100 * 20 / 50]


def test_the_note_on_table_1_is_what_the_released_results_say(released: Path):
    models = {
        "LLaMA3-8b-Instruct": "llama3-8b",
        "Qwen2-7B-Instruct": "qwen2-7b",
        "Mistral-7B-Instruct-v0.3": "mistral-7b",
    }
    methods = {"ContextAwareDecoding": "cad", "DPSWeightedSoft": "dps", "DeCoReVanilla": "decore", "DoLa": "dola"}
    metrics = {"r1": "rouge1", "rL": "rougeL", "meteor": "meteor"}
    published = {
        tuple(cell.keys[key] for key in ("model", "method", "task", "metric")): cell.text
        for row in table("dps-1").rows
        for cell in row.cells
    }
    differing, agreeing = {}, 0
    for line in released_rows(released):
        for name, value in (pair.split("=") for pair in line["metrics"].split(", ")):
            task = line["task"].lower().replace("-", "")
            key = (models.get(line["model"]), methods.get(line["method"]), task, metrics.get(name))
            if key in published:
                agreeing += published[key] == value
                if published[key] != value:
                    differing[key] = round(float(published[key]) - float(value), 4)
    assert (agreeing, len(differing), {key[1] for key in differing}) == (30, 21, {"dps"})
    large = sorted(gap for gap in differing.values() if abs(gap) > 0.001)
    assert (len(large), large[0], large[-1]) == (13, 0.0098, 0.0203)
    assert max(abs(gap) for gap in differing.values() if abs(gap) <= 0.001) == 0.0004


def test_the_released_cad_of_llama_is_its_greedy_baseline(released: Path):
    of = {(row["method"], row["task"]): row["metrics"] for row in released_rows(released) if "LLaMA3" in row["model"]}
    cad = {task: metrics for (method, task), metrics in of.items() if method == "ContextAwareDecoding"}
    assert cad == {task: metrics for (method, task), metrics in of.items() if method == "Baseline"}
    assert sum(metrics.count("=") for metrics in cad.values()) == 15


def test_the_released_dola_of_titles_has_a_part_of_the_items(released: Path):
    runs = json.loads((released / "results" / "evaluation_summary_combined.json").read_text("utf-8"))
    run = runs["LaMP-5|LLaMA3-8b-Instruct|DoLa"]
    printed = [cell.text for cell in table("dps-1").rows[2].cells[3:6]]
    assert [f"{run[metric]:.4f}" for metric in ("rouge-1", "rouge-L", "meteor")] == printed
    assert run["total_samples"] == 973


def test_words_of_tweets_are_near_the_token_counts_of_table_5(released: Path):
    lamp = released.parent / "lamp"
    if not (lamp / "LaMP_7").is_dir():
        pytest.skip(f"no {lamp / 'LaMP_7'} (set HARNESS_SHARED)")
    (made,) = grids(["perfit-5"], RESULTS, data=str(lamp))
    (line,) = (line for line in made.lines if line.source == "measured" and line.keys["task"] == "lamp7")
    counted = {
        column.keys["metric"]: entry.text for column, entry in zip(made.table.columns, line.entries, strict=True)
    }
    assert (counted["users"], counted["input_length"], counted["output_length"]) == ("- / 1,500", "30.1", "17.3")
    assert "30.1 in, 17.3 out" in table("perfit-5").errata[1]


# Users' vectors and the data


def test_ranks_of_user_vectors_stand_under_the_papers(tmp_path: Path, run_config: Configs, run_record: Records):
    def save(model: str, task: str, k: int, n: int, **metrics: float) -> None:
        config = run_config("rag", "delta_vectors", model, options={"k": k})
        config = config.model_copy(update={"task": TaskConfig(name="delta_vectors", options={"task": task})})
        record = run_record(config, n=n, **metrics)
        with RunFolder.open(tmp_path, config) as folder:
            folder.write(record)

    save("llama2-7b", "lamp2n", 1, 274, rank80=1.0, per_mille80=3.6496)
    save("llama2-7b", "lamp5", 1, 99, rank80=4.0, per_mille80=40.4)
    save("tiny", "lamp4", 5, 200, rank80=2.0, per_mille80=10.0)
    (made,) = json.loads(render(["perfit-1"], tmp_path, "json"))
    cells = {(c["source"], c["model"], c["task"], c["metric"], c["energy"]): c for c in made["cells"]}
    same = cells["difference", "llama2-7b", "lamp2n", "per_mille", "0.8"]
    assert (same["printed"], same["outside_tolerance"]) == ("+0.00", False)
    assert cells["measured", "llama2-7b", "lamp5", "rank", "0.8"]["not_comparable"] == ["99 users, the paper has 14581"]
    assert cells["measured", "tiny", "lamp4", "rank", "0.8"]["not_comparable"] == ["rag with k=5"]
    asked = [line for line in commands(["perfit-1"], tmp_path) if line.startswith("harness run")]
    assert [task for task in ("lamp2n", "lamp5", "lamp7") if f"task={task}" in "".join(asked)] == ["lamp5", "lamp7"]


def test_a_trial_on_a_few_users_or_another_block_stands_for_no_ranks_of_all(
    tmp_path: Path, run_config: Configs, run_record: Records
):
    def save(n: int, users: int | None, started: str, **asked: int) -> None:
        config = run_config("rag", "delta_vectors", "llama2-7b", options={"k": 1}, users=users)
        task = TaskConfig(name="delta_vectors", options={"task": "lamp2n", **asked})
        record = run_record(config.model_copy(update={"task": task}), n=n, rank80=n / 100)
        record.started = started
        with RunFolder.open(tmp_path, record.config) as folder:
            folder.write(record)

    save(274, None, "2026-01")
    save(10, 10, "2026-02")
    save(274, None, "2026-03", layer=3)
    (made,) = json.loads(render(["perfit-1"], tmp_path, "json"))
    (cell,) = (c for c in made["cells"] if c["source"] == "measured")
    assert (cell["value"], cell["n"], cell["not_comparable"]) == (2.74, 274, [])


def test_statistics_are_counted_in_the_files_given(tmp_path: Path):
    folder = tmp_path / "LaMP_7" / "dev"
    folder.mkdir(parents=True)
    texts, profile = ["a b c", "d e f g h"], [{"id": "1", "text": "t"}, {"id": "2", "text": "u"}]
    questions = [
        {"id": str(i), "user_id": "u", "input": f"Paraphrase the following tweet: {text}", "profile": profile}
        for i, text in enumerate(texts)
    ]
    (folder / "dev_questions.json").write_text(json.dumps(questions))
    golds = [{"id": str(i), "output": "one two"} for i in range(2)]
    (folder / "dev_outputs.json").write_text(json.dumps({"task": "LaMP_7", "golds": golds}))

    def counted(id: str) -> dict[str, str]:
        (made,) = json.loads(render([id], tmp_path, "json", data=str(tmp_path)))
        return {c["metric"]: c["printed"] for c in made["cells"] if c["source"] == "measured"}

    assert counted("dps-5") == {"type": "Gen.", "users": "1", "instances": "2"}
    assert counted("perfit-5") == {
        "users": "- / 1", "queries": "2", "history_items": "2.0", "input_length": "8.0", "output_length": "2.0",
    }  # fmt: skip


def test_a_file_that_cannot_be_read_is_said_and_the_other_tasks_are_counted(tmp_path: Path):
    for task in ("LaMP_4", "LaMP_7"):
        (tmp_path / task).mkdir()
    (tmp_path / "LaMP_4" / "dev_questions.json").write_text("[")
    (tmp_path / "LaMP_4" / "dev_outputs.json").write_text(json.dumps({"task": "LaMP_4", "golds": []}))
    question = {"id": "1", "input": "Paraphrase the following tweet: a b", "profile": [{"id": "2", "text": "u"}]}
    (tmp_path / "LaMP_7" / "dev_questions.json").write_text(json.dumps([question]))
    golds = {"task": "LaMP_7", "golds": [{"id": "1", "output": "c"}]}
    (tmp_path / "LaMP_7" / "dev_outputs.json").write_text(json.dumps(golds))
    (made,) = grids(["dps-5"], tmp_path, data=str(tmp_path))
    assert [line.keys["task"] for line in made.lines if line.source == "measured"] == ["lamp7"]
    assert any("LaMP_4/dev_questions.json is not valid JSON" in remark for remark in made.remarks), made.remarks


def test_oppus_files_have_the_users_of_perfit_themselves(tmp_path: Path):
    (tmp_path / "tweet_paraphrase").mkdir()
    users = [
        {
            "user_id": n,
            "profile": [{"id": f"{n}{i}", "text": "a tweet"} for i in range(3)],
            "query": [
                {"id": f"q{n}{i}", "input": "Paraphrase the following tweet: a b", "gold": "c"} for i in range(2)
            ],
        }
        for n in range(3)
    ]
    for name, part in (("user_others", users[:2]), ("user_more_100_history", users[2:])):
        (tmp_path / "tweet_paraphrase" / f"{name}.json").write_text(json.dumps(part))
    (made,) = json.loads(render(["perfit-5"], tmp_path, "json", data=str(tmp_path)))
    counted = [(c["printed"], c["not_comparable"]) for c in made["cells"] if c["source"] == "measured"]
    assert [text for text, _ in counted] == ["2 / 1", "4", "6.0", "1.0", "2", "3.0", "6.0", "1.0"]
    assert not any(reasons for _, reasons in counted)
    lines = commands(["perfit-3"], tmp_path, data=str(tmp_path))
    assert all("--task_set" not in line for line in lines if line.startswith("harness run"))
    assert [line for line in lines if "data get" in line] == [
        f"harness data get {task} --split user --dest {tmp_path}" for task in ("lamp4", "lamp5")
    ]


def test_the_embedded_users_are_counted_where_no_files_are_given(tmp_path: Path):
    (made,) = json.loads(render(["dps-5"], tmp_path, "json"))
    users = [c for c in made["cells"] if (c["source"], c["metric"]) == ("measured", "users")]
    assert {(c["printed"], *c["not_comparable"]) for c in users} == {("200", "synthetic lamp-mini data")}


# What decoding costs


def cost_cells(results: Path, model: str | None = None) -> dict[tuple[str, str, str], list[str]]:
    """(source, prompt length, metric of the first cell) -> the cells as printed."""
    lines: dict[tuple[str, str, str], list[str]] = {}
    for cell in json.loads(render(["dps-3"], results, "json", model=model))[0]["cells"]:
        metric = cell["metric"].removeprefix("overhead_").replace("overhead", "tflop")
        lines.setdefault((cell["source"], cell["prompt_tokens"], metric), []).append(cell["printed"])
    return lines


@pytest.mark.parametrize(
    ("length", "counted"), [("512", "7.76 8.25 1.06×"), ("1024", "15.33 15.82 1.03×"), ("2048", "31.29 31.80 1.02×")]
)
def test_the_formula_prints_what_the_paper_prints_beside_the_true_count(tmp_path: Path, length: str, counted: str):
    cells = cost_cells(tmp_path)
    assert cells["formula", length, "tflop"] == cells["published", length, "tflop"]
    assert cells["counted", length, "tflop"] == counted.split()


def test_the_true_count_says_which_positions_pay_the_vocabulary_head(tmp_path: Path):
    assert "vocabulary head at its 32 answer positions (0.034 TFLOP)" in flat(render(["dps-3"], tmp_path))


def test_a_model_the_paper_did_not_count_is_counted_when_asked_for(tmp_path: Path):
    cells = cost_cells(tmp_path, model="qwen2-7b")
    assert cells["counted", "512", "tflop"] == ["7.23", "7.69", "1.06×"]
    assert not [source for source, _, _ in cells if source == "published"]


def test_runs_of_the_same_prompts_show_their_operations_and_seconds(
    tmp_path: Path, save, run_config: Configs, run_record: Records
):
    for method, seconds, flops in (("rag", 2.0, 8e12), ("dps", 3.0, 9e12), ("cad", 9.0, 9e13)):
        record = run_record(run_config(method=method, model="tiny", options={"k": 5}), rouge1=0.1)
        record.cost.seconds, record.cost.flops, record.cost.prefill_tokens = seconds, flops, 4 * 700
        record.batches = [["a", "b"], ["c", "d"]]
        save(record)
    cells = cost_cells(tmp_path)
    assert cells["measured", "700", "seconds"] == ["0.5 s", "0.75 s"]  # of two times on a busy machine no overhead
    assert cells["counted", "700", "tflop"] == ["2", "2.25", "1.12×"]
    assert "700 (lamp4, T ≤ 64)" in render(["dps-3"], tmp_path)


def test_runs_of_a_model_stand_together_whenever_they_were_made(
    tmp_path: Path, save, run_config: Configs, run_record: Records
):
    for day, (model, task) in enumerate([("mine", "lamp4"), ("yours", "lamp4"), ("mine", "lamp5")]):
        for method in ("rag", "dps"):
            record = run_record(run_config(method=method, model=model, task=task), rouge1=0.1)
            record.started = f"2026-01-0{day + 1}T00:00:00+00:00"
            record.cost.seconds = record.cost.flops = 1.0
            record.batches = [["a"]]
            save(record)
    lines = render(["dps-3"], tmp_path).splitlines()
    assert [lines.count(name) for name in ("mine", "yours")] == [1, 1]


@pytest.mark.parametrize("other", [{"options": {"k": 1}}, {"fingerprint": "0ther"}, {"seed": 1}])
def test_runs_of_other_prompts_are_not_compared(
    tmp_path: Path, save, run_config: Configs, run_record: Records, other: dict
):
    for method, config in (("rag", {"options": {"k": 5}}), ("dps", {"options": {"k": 5}, **other})):
        record = run_record(run_config(method=method, **config), rouge1=0.1)
        record.cost.seconds = record.cost.flops = 1.0
        record.batches = [["a"]]
        save(record)
    assert not [source for source, _, _ in cost_cells(tmp_path) if source == "measured"]


# Formats


@pytest.fixture
def results(tmp_path: Path, save, run_config: Configs, run_record: Records) -> Path:
    save(run_record(run_config(method="rag", model="my_model|50%", data="lamp-mini"), rouge1=0.25))
    save(run_record(run_config(method="plain", model="my_model|50%", data="lamp-mini"), rouge1=0.125))
    return tmp_path


def test_csv_has_one_line_a_cell(results: Path):
    rows = list(csv.DictReader(io.StringIO(render(["1", "3"], results, "csv"))))
    assert len(rows) == 108 + 3 * 9 + 2
    assert {row["source"] for row in rows} == {"published", "measured", "formula", "counted"}
    rag = next(row for row in rows if row["method"] == "rag")
    assert (rag["model"], rag["value"], rag["n"], rag["best"]) == ("my_model|50%", "0.25", "1925", "True")


def test_every_row_of_a_markdown_table_has_the_same_columns(results: Path):
    rows = [line for line in render(["1"], results, "md").splitlines() if line.startswith("|")]
    assert len({len(re.findall(r"(?<!\\)\|", row)) for row in rows}) == 1


def test_latex_is_balanced_tabulars_with_as_many_cells_a_row_as_columns(results: Path):
    text = render([], results, "latex")
    tabulars = re.findall(r"\\begin\{tabular\}\{(l+)\}(.*?)\\end\{tabular\}", text, re.DOTALL)
    assert len(tabulars) == text.count(r"\begin{tabular}") == text.count(r"\end{tabular}") == len(TABLES)
    for columns, body in tabulars:
        rows = re.findall(r"^(?!\\hline)(.*)\\\\$", body, re.MULTILINE)
        assert {len(re.findall(r"(?<!\\)&", row)) for row in rows} == {len(columns) - 1}
    body = "\n".join(line for line in text.splitlines() if not line.startswith("%"))
    assert r"my\_model|50\%" in body
    assert re.search(r"(?<!\\)[%_#]", body) is None
    assert body.count("{") == body.count("}")
    assert body.isascii()


def test_terminal_marks_the_best_with_a_star_or_in_bold(results: Path):
    assert "0.2500*" in render(["1"], results)
    assert "\x1b[1m0.2500\x1b[0m" in render(["1"], results, color=True)


def test_what_is_bold_is_what_has_a_star(results: Path):
    starred, bold = render(["1"], results), render(["1"], results, color=True)
    assert re.findall(r"([\d.]+)\*", starred) == re.findall(r"\x1b\[1m([\d.]+)\x1b\[0m", bold)


@pytest.mark.parametrize("width", [80, 120])
def test_the_terminal_layout_fits_the_terminal_and_shows_every_cell(results: Path, width: int):
    text = render([], RESULTS, width=width)
    assert max(map(len, text.splitlines())) <= width
    shown = render(["dps-1"], results, width=width)
    assert all(cell.text in shown for row in table("dps-1").rows for cell in row.cells)


def test_a_terminal_says_n_once_and_where_it_differs(tmp_path: Path, save, run_config: Configs, run_record: Records):
    for method in ("rag", "cad", "dps"):
        save(run_record(run_config(method=method), rouge1=0.2))
    save(run_record(run_config(method="plain"), n=9, rouge1=0.2))
    assert "n of measured cells: LLaMA-3-8B 1925, plain lamp4 9." in flat(render(["1"], tmp_path))


def test_tables_of_the_committed_records_are_printed_without_torch():
    code = """
import pathlib, sys
from harness.publish.tables import render
render([], pathlib.Path(sys.argv[1]))
print("torch" in sys.modules)
"""
    command = [sys.executable, "-c", code, str(RESULTS)]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout == "False\n"


def test_what_the_missing_commands_take_is_said_beside_them(harness: Callable):
    from harness.publish.tables.missing import estimate

    said = estimate(
        [
            "harness data get lamp4",
            "harness run --method plain --method rag --task lamp4 --task lamp7 --model llama3-8b",
            "harness sweep --method perfit --task lamp7 --set 'layers=0|1|2' --model llama3-8b --judge openai/x",
        ]
    )
    assert said.startswith("about 7 runs: 16 GB of disk for weights") and "3 judged" in said and "(not of 1)" in said
    paid = estimate(["harness run --method plain --task persona:religion --model qwen2-7b --judge openai/gpt-4.1-mini"])
    assert "1 judged for about $0.7" in paid
    pairs = estimate(["harness judge pairs a b --judge openai/gpt-5.2"])
    assert "1 judged for about $1.0" in pairs
    done = harness("table dps-1 --missing --model llama3-8b")
    assert "hours on one H100" in done.err and done.err.endswith("no judge\n") and "hours" not in done.out


@pytest.mark.parametrize("option", ["--format csv", "--published_only", "--measured_only", "--check"])
def test_missing_refuses_what_says_how_a_table_is_printed(harness: Callable, option: str):
    done = harness(f"table --missing {option}")
    assert done.code == 2 and done.err.strip().endswith(f"leave {option.split()[0]} out")


def test_reasons_that_differ_only_in_how_many_are_one_footnote():
    grid = Grid(table("dps-1"))
    assert grid.mark(["12 texts lack x", "synthetic"]) == ("a", "b")
    assert grid.mark(["synthetic", "3 texts lack x", "lamp4 --limit 12"]) == ("b", "a", "c")
    assert grid.footnotes == {"a": "3 to 12 texts lack x", "b": "synthetic", "c": "lamp4 --limit 12"}


def test_a_part_of_a_table_that_has_no_number_is_not_printed(
    tmp_path: Path, save, run_config: Configs, run_record: Records
):
    save(run_record(run_config(), rouge1=0.2))
    shown = render(["dps-1"], tmp_path, measured_only=True, width=80).partition("lamp4 =")[0]
    assert "lamp4" in shown and "lamp7" not in shown
