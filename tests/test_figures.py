"""Figures show what the records hold, the same bytes every time; one without records says which command makes them."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from harness.figures import FIGURES, commands, draw, write
from harness.records import find_runs

RESULTS = Path(__file__).parents[1] / "results"
DPS = [name for name in FIGURES if name.startswith("dps-")]


@pytest.fixture(scope="module")
def records():
    return find_runs(RESULTS, model="tiny")


@pytest.fixture(scope="module")
def drawn(records):
    """Every figure that the committed records have."""
    return {name: figure for name in FIGURES if (figure := draw(name, records)) is not None}


def _text(figure) -> str:
    """Everything written in it."""
    from matplotlib.text import Text

    return "\n".join(item.get_text() for item in figure.findobj(Text))


def test_every_dps_figure_is_drawn_from_the_committed_records(drawn):
    assert set(DPS) <= set(drawn)


def test_a_figure_is_written_as_png_and_svg_into_a_new_folder(tmp_path):
    done = write(["dps-4", "4"], RESULTS, tmp_path / "new" / "figures")
    assert [path.name for path in done.paths] == ["dps-4.png", "dps-4.svg"] and not done.missing
    assert done.paths[0].read_bytes().startswith(b"\x89PNG")
    assert ElementTree.fromstring(done.paths[1].read_bytes()).tag.endswith("svg")


def test_the_same_records_give_the_same_bytes(tmp_path):
    one, other = (write(["dps-4"], RESULTS, tmp_path / name) for name in "ab")
    assert [p.read_bytes() for p in one.paths] == [p.read_bytes() for p in other.paths]
    assert b"<dc:date>" not in one.paths[1].read_bytes()


def test_a_figure_says_what_it_is_its_model_data_and_n(drawn):
    for name, figure in drawn.items():
        title, about = figure.get_suptitle().split("\n", 1)
        assert title == f"{FIGURES[name].title} ({FIGURES[name].place})" and "tiny" in about
        assert re.search(r"\bn = \d+|\d+ users|\d+ samples", _text(figure)), name


def test_axes_are_labelled(drawn):
    for name, figure in drawn.items():
        for ax in figure.axes:
            ticks = [tick.get_text() for tick in ax.get_xticklabels()]
            assert ax.get_xlabel() or ax.get_ylabel() or any(ticks), name


def test_metrics_by_heads_are_the_records_own(records, drawn):
    (ax,) = drawn["dps-6"].axes
    accuracy = next(line for line in ax.lines if len(line.get_ydata()) == 4)
    runs = {r.analysis["k"]: r for r in records if r.config.method.options.get("heads") in (2, 4, 8)}
    assert accuracy.get_ydata()[1:] == pytest.approx([runs[k].metrics["accuracy"].value for k in (2, 4, 8)])


def test_controls_show_each_draw_and_what_rag_reaches(records, drawn):
    last = drawn["dps-5"].axes[3]
    shown = {round(float(y), 4) for line in last.lines for y in np.atleast_1d(line.get_ydata())}
    runs = [
        r for r in records if r.config.task.name == "lamp2m" and "random" in r.config.method.options.get("control", "")
    ]
    assert len(runs) == 6 and {round(r.metrics["accuracy"].value, 4) for r in runs} <= shown
    assert 0.845 in shown


def test_a_figure_without_records_names_the_command_that_makes_them(harness, tmp_path):
    done = harness("figure dps-3 --results nothing")
    assert done.code == 4 and "harness run --method dps --task lamp2m" in done.error() and not done.out
    done = harness(f"figure dps-3 --results {RESULTS} --model llama3-8b")
    assert done.code == 4 and "harness run --method dps --task lamp2m --model llama3-8b" in done.error()
    done = harness("figure all --results nothing")
    assert done.code == 0 and not done.out
    assert all(f"{name} has no records; make them: harness " in done.err for name in FIGURES)


def test_a_run_of_other_options_does_not_stand_for_dps(tmp_path):
    for folder in (RESULTS / "tiny" / "lamp2m").glob("dps-*"):
        shutil.copytree(folder, tmp_path / "tiny" / "lamp2m" / folder.name)
    shutil.rmtree(tmp_path / "tiny" / "lamp2m" / "dps-af6142b9")  # the defaults
    found = find_runs(tmp_path)
    assert len(found) == 11 and draw("dps-3", found) is None and draw("dps-8", found) is not None


def test_a_figure_can_be_of_another_task(records):
    assert "tiny on lamp4" in _text(draw("dps-3", records, task="lamp4"))
    assert draw("dps-3", records, task="mmlu") is None


def test_commands_are_lines_that_the_command_line_takes(harness):
    for name in FIGURES:
        for command in commands(name, "tiny"):
            words = command.split(" ", 1)
            assert words[0] == "harness" and harness(f"{words[1]} --help").code == 0


def test_mistakes_are_one_line(harness):
    done = harness("figure dps-2")
    assert done.code == 2 and "unknown figure 'dps-2'; did you mean" in done.error()
    done = harness("figure dps-3 --format pdf")
    assert done.code == 2 and "choose from png, svg" in done.error()


def test_figures_are_listed_and_drawn_without_torch(tmp_path):
    code = (
        "import sys; from harness.cli import main; sys.argv = ['harness', *sys.argv[1:]]; main(); "
        "assert 'torch' not in sys.modules and 'matplotlib.pyplot' not in sys.modules"
    )
    for words in (["list", "figures"], ["figure", "dps-4", "--results", RESULTS, "--output", tmp_path]):
        done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
        assert done.returncode == 0 and "dps-4" in done.stdout, done.stderr
