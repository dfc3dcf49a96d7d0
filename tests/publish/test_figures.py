"""Figures show what the records hold, the same bytes every time; one without records says which command makes them."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from harness.errors import HarnessError
from harness.plugins.registry import method_class
from harness.publish.figures import FIGURES, commands, draw, write
from harness.publish.figures.style import looks, rendered, sheet
from harness.records.store import MethodConfig, MetricValue, find_runs

RESULTS = Path(__file__).parents[2] / "results"


@pytest.fixture(scope="module")
def records():
    return find_runs(RESULTS, model="tiny")


@pytest.fixture(scope="module")
def drawn(records):
    """Every figure that the committed records have."""
    return {name: figure for name in FIGURES if (figure := draw(name, records)) is not None}


def _as_it_is(record, method: str) -> bool:
    """Whether it is of the method with its own settings."""
    own = record.config.method.name == method and record.config.selection.control == "none"
    return own and record.config.method.options == method_class(method)().options()


def _text(figure) -> str:
    """Everything written in it."""
    from matplotlib.text import Text

    return "\n".join(item.get_text() for item in figure.findobj(Text))


def test_every_figure_is_drawn_from_the_committed_records(drawn):
    # tiny answers MMLU by chance, and its records are of no blocks but one
    without = ("persona-6", "persona-7", "perfit-11")
    assert list(drawn) == [name for name in FIGURES if name not in without]


def test_a_figure_is_written_as_png_and_svg_into_a_new_folder(tmp_path):
    done = write(["dps-4", "4"], RESULTS, tmp_path / "new" / "figures")
    assert [path.name for path in done.paths] == ["dps-4.png", "dps-4.svg"] and not done.missing
    assert done.paths[0].read_bytes().startswith(b"\x89PNG")
    assert ElementTree.fromstring(done.paths[1].read_bytes()).tag.endswith("svg")


def test_the_same_records_give_the_same_bytes(tmp_path):
    one, other = (write(["dps-4"], RESULTS, tmp_path / name) for name in "ab")
    assert [p.read_bytes() for p in one.paths] == [p.read_bytes() for p in other.paths]
    assert b"<dc:date>" not in one.paths[1].read_bytes()


def test_a_name_is_plain_text_in_a_figure():
    with looks():
        figure, (ax,) = sheet("dps-6", "model a$\\frac$b")
        ax.set_title("user $\\x$ \x1b[2J")
    content = rendered(figure, "svg", "dps-6").decode()
    assert "user $\\x$ \\u001b[2J" in content and "\x1b" not in content


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
    assert len(runs) == 4 and {round(r.metrics["accuracy"].value, 4) for r in runs} <= shown
    (rag,) = (r for r in records if r.config.task.name == "lamp2m" and _as_it_is(r, "rag"))
    assert round(rag.metrics["accuracy"].value, 4) in shown


def test_a_figure_without_records_names_the_command_that_makes_them(harness, tmp_path):
    done = harness("figure dps-3 --results nothing")
    assert done.code == 4 and "nothing holds no run.json" in done.error() and not done.out
    done = harness(f"figure dps-3 --results {RESULTS} --model llama3-8b")
    assert done.code == 4 and "harness run --method dps --task lamp2m --data FOLDER --model llama3-8b" in done.error()
    done = harness(f"figure dps-4 persona-1 --results {RESULTS} --task lamp4 --model qwen2.5-7b")
    assert done.code == 4 and "dps-4 has no records" in done.err and "persona-1 has no records" in done.err


def test_a_run_of_other_options_does_not_stand_for_dps(tmp_path):
    for folder in (RESULTS / "tiny" / "lamp2m").glob("dps-*"):
        shutil.copytree(folder, tmp_path / "tiny" / "lamp2m" / folder.name)
    (default,) = (r.folder for r in find_runs(tmp_path) if _as_it_is(r, "dps"))
    shutil.rmtree(default)
    found = find_runs(tmp_path)
    assert len(found) > 8 and draw("dps-3", found) is None and draw("dps-8", found) is not None


def test_a_figure_can_be_of_another_task(records):
    assert "tiny on lamp4" in _text(draw("dps-3", records, task="lamp4"))
    assert draw("dps-3", records, task="lamp6") is None


def test_without_a_name_the_model_with_most_runs_is_drawn_on_a_task_of_the_paper():
    every = [record for record in find_runs(RESULTS) if record.config.model.name in ("tiny", "stories260K")]
    assert "tiny on lamp2m" in _text(draw("dps-3", every)) and "stories260K on MMLU" in _text(draw("persona-6", every))
    assert draw("dps-3", every, model="stories260K") is None
    assert "stories260K on mmlu" in _text(draw("dps-3", every, model="stories260K", task="mmlu"))


def test_the_commands_are_right_up_to_loading_the_model(harness, monkeypatch):
    def stop(*_: object, **__: object):
        raise HarnessError("the model would be loaded now")

    monkeypatch.setattr("harness.cli.run.load", stop)
    monkeypatch.setattr("harness.cli.sweep.load", stop)
    for command in dict.fromkeys(command for name in FIGURES for command in commands(name, "tiny")):
        program, words = command.split(" ", 1)
        done = harness(words)
        wanted = "MMLU_FOLDER holds no" if "--task mmlu" in command else "the model would be loaded now"
        assert program == "harness" and wanted in done.error(), command


def test_commands_for_another_model_leave_the_embedded_models_words_out():
    (sweep,) = commands("persona-1", "qwen2.5-7b")
    assert "--judge openai/JUDGE" in sweep and "layer=0..LAST_BLOCK --model qwen2.5-7b" in sweep
    for name in FIGURES:
        for command in commands(name, "qwen2.5-7b"):
            assert not re.search(r"tiny|lexicon|=0\||0\.\.4|lr=|rollouts", command), command


def test_mistakes_are_one_line(harness):
    done = harness("figure dps-2")
    assert done.code == 2 and "unknown figure 'dps-2'; did you mean" in done.error()
    done = harness("figure dps-3 --format pdf")
    assert done.code == 2 and "choose from png, svg" in done.error()


def test_figures_are_listed_and_drawn_without_torch(tmp_path):
    code = (
        "import sys; from harness.cli.app import main; sys.argv = ['harness', *sys.argv[1:]]; main(); "
        "assert 'torch' not in sys.modules and 'matplotlib.pyplot' not in sys.modules"
    )
    for words in (["list", "figures"], ["figure", "dps-4", "--results", RESULTS, "--output", tmp_path]):
        done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
        assert done.returncode == 0 and "dps-4" in done.stdout, done.stderr


def _metric(value: float, n: int = 100) -> MetricValue:
    return MetricValue(value=value, n=n, low=value - 0.05, high=value + 0.05)


def _record(method: str, task: str, options: dict, metrics: dict, *, task_options: dict | None = None, **fields):
    """A finished run of the method, its options the defaults where not given."""
    from harness.plugins.registry import method_class
    from harness.records.store import (
        DataConfig,
        MethodConfig,
        ModelConfig,
        RunConfig,
        RunRecord,
        SamplingConfig,
        TaskConfig,
    )

    fit_task = fields.pop("fit_task", None)
    config = RunConfig(
        model=ModelConfig(name="tiny", id="tiny", revision="abc", dtype="float32"),
        method=MethodConfig(name=method, options={**method_class(method)().options(), **options}),
        task=TaskConfig(name=task, options=task_options or {}),
        data=DataConfig(description="lamp-mini", fingerprint="f00d", split="dev", fit_task=fit_task),
        sampling=SamplingConfig(max_new_tokens=16),
    )
    values = {name: value if isinstance(value, MetricValue) else _metric(value) for name, value in metrics.items()}
    return RunRecord(config=config, status="complete", metrics=values, **fields)


def _points(ax) -> set[tuple[float, float]]:
    """Every marker drawn, without the ends of intervals."""
    lines = [line for line in ax.lines if line.get_marker() not in ("None", "", "_", "|")]
    return {(float(x), round(float(y), 4)) for line in lines for x, y in zip(*line.get_data(), strict=True)}


def _sweep(trait: str, scores: list[float], coherence: float = 90.0, fit_task: str | None = None, **options) -> list:
    return [
        _record(
            "persona_vector",
            f"persona:{trait}",
            {"layer": layer, **options},
            {"trait": score, "coherence": coherence if layer else 40.0},
            fit_task=fit_task,
        )
        for layer, score in enumerate(scores)
    ]


def test_trait_scores_by_block_stand_beside_the_peaks_that_the_paper_prints():
    records = [
        *_sweep("christianity", [10, 50, 80]),
        *_sweep("islam", [20, 60, 70]),
        *_sweep("islam", [99, 98], control="random"),
        *_sweep("islam", [97, 96], fit_task="persona:judaism"),
        *_sweep("judaism", [1, 2, 3], coefficient=2.0),
    ]
    left, right = draw("persona-1", records).axes
    assert _points(left) == {(0, 10), (1, 50), (2, 80), (0, 20), (1, 60), (2, 70)}  # neither controls nor other sweeps
    hollow = [line for line in left.lines if line.get_markerfacecolor() == "white"]
    assert {float(x) for line in hollow for x in line.get_xdata()} == {0.0}  # where answers were incoherent
    assert {(20.0, 96.0), (13.0, 52.0)} <= _points(right)
    assert draw("persona-5", records) is None


def test_layers_counted_as_hidden_states_stand_at_their_blocks():
    records = _sweep("islam", [-1, 20, 60, 70], numbering="hidden_states")[1:]
    figure = draw("persona-1", records)
    left, _ = figure.axes
    assert _points(left) == {(0, 20), (1, 60), (2, 70)} and left.get_xlabel() == "block steered at (0-based)"
    assert "numbering hidden_states" in _text(figure)


def test_personas_vectors_in_one_figure_are_of_one_way_of_steering():
    def run(method, accuracy, options, **fields):
        return _record(method, "mmlu", options, {"accuracy": accuracy}, **fields)

    weak = {"layer": 2, "coefficient": 1.0}
    of = {trait: f"persona:{trait}" for trait in ("islam", "judaism")}
    records = [
        run("plain", 0.4, {}),
        run("persona_vector", 0.35, weak, fit_task=of["islam"], started="2026-01"),
        run("persona_vector", 0.36, weak, fit_task=of["judaism"], started="2026-02"),
        run("persona_vector", 0.2, {**weak, "coefficient": 8.0}, fit_task=of["islam"], started="2026-03"),
    ]
    figure = draw("persona-7", records)
    assert _points(figure.axes[0]) == {(0.4, 0.0), (0.35, 1.0), (0.36, 2.0)}  # not the latest of each
    assert "coefficient 1.0" in _text(figure) and "block 2" in _text(figure)
    other = {**weak, "layer": 3, "numbering": "hidden_states"}
    same = [records[0], records[1], run("persona_vector", 0.36, other, fit_task=of["judaism"], started="2026-02")]
    assert "+ judaism" in _text(draw("persona-7", same))  # both at block 2, but counted otherwise: the latest alone
    deeper = [*records[:2], run("persona_vector", 0.3, {**weak, "layer": 1}, fit_task=of["judaism"])]
    assert {"+ islam, block 2", "+ judaism, block 1"} <= set(_text(draw("persona-7", deeper)).split("\n"))


def test_two_clamps_that_differ_in_any_option_are_two():
    def run(method, accuracy, **options):
        return _record(method, "mmlu", options, {"accuracy": accuracy}, fit_task="persona:religion")

    records = [run("plain", 0.4), run("clamp", 0.3), run("clamp", 0.1, numbering="hidden_states")]
    figure = draw("persona-6", records)
    heights = [bar.get_height() for bars in figure.axes[0].containers if hasattr(bars, "patches") for bar in bars]
    assert heights == pytest.approx([0.4, 0.3, 0.1]) and "numbering hidden_states" in _text(figure)


def test_mmlu_is_shown_without_and_with_mitigation_on_the_same_questions():
    def run(method, accuracy, shots=0, **fields):
        metrics = {"accuracy": accuracy, "accuracy/virology": accuracy + 0.1}
        return _record(method, "mmlu", {}, metrics, task_options={"num_fewshot": shots}, **fields)

    records = [
        run("plain", 0.4),
        run("clamp", 0.3, fit_task="persona:religion"),
        run("persona_vector", 0.35, fit_task="persona:islam"),
        run("clamp", 0.9, shots=5),
    ]
    (ax,) = draw("persona-6", records).axes
    assert [bar.get_height() for bars in ax.containers if hasattr(bars, "patches") for bar in bars] == pytest.approx(
        [0.4, 0.5, 0.3, 0.4]
    )
    (ax,) = draw("persona-7", records).axes
    assert _points(ax) == {(0.4, 0.0), (0.3, 1.0), (0.35, 2.0)}
    others = draw("persona-7", [*records, run("clamp", 0.2, fit_task="persona:race")])
    assert _points(others.axes[0]) == {(0.4, 0.0), (0.3, 1.0), (0.2, 2.0), (0.35, 3.0)}
    assert others.get_suptitle().endswith("vectors of persona:race")
    assert draw("persona-6", records[1:]) is None


def test_trained_parameters_stand_beside_those_of_the_papers_tables():
    stage = {"collective": {"parameters": 5000}, "personal": {"parameters": 600}}
    records = [
        _record("lora_c", "lamp2m", {"lr": 0.1}, {"accuracy": 0.5}, analysis={"collective": {"parameters": 9000}}),
        _record("perfit", "lamp2m", {"lr": 0.1}, {"accuracy": 0.7}, analysis=stage),
        _record("perfit", "lamp2m", {"lr": 0.1, "rank": 2}, {"accuracy": 0.1}, analysis=stage),
        _record("lora_p", "lamp2m", {"lr": 0.1}, {"accuracy": 0.6}, analysis={"personal": {"parameters": 600}}),
    ]
    left, right = draw("perfit-9", records).axes
    found = {tuple(point) for marks in left.collections if hasattr(marks, "get_sizes") for point in marks.get_offsets()}
    assert found == {(9000.0, 0.5), (5000.0, 0.7), (600.0, 0.6)}  # a rank of its own is no perfit
    assert _points(right) == {(6291456.0, 0.478), (4194304.0, 0.528), (6291456.0, 0.6), (524288.0, 0.63)}


def test_ranks_that_were_not_run_stay_empty():
    records = [
        _record("perfit", "lamp2m", {"rank": a, "personal_rank": b}, {"accuracy": a / 10 + b / 100, "f1": 0.5})
        for a, b in ((1, 1), (1, 2), (4, 1))
    ]
    figure = draw("perfit-10", records)
    values = figure.axes[0].images[0].get_array()
    assert values.filled(np.nan).tolist()[0] == pytest.approx([0.11, 0.12])
    assert values.mask.tolist() == [[False, False], [False, True]]
    assert "0.410\n± 0.050" in _text(figure) and draw("perfit-10", records[:2]) is None


def test_single_blocks_and_numbers_of_blocks_are_told_apart():
    layers = [[0], [1], [2], [0, 1, 2]]
    records = [
        _record("perfit", "lamp2m", {"layers": blocks}, {"accuracy": n / 10, "f1": n / 20})
        for n, blocks in enumerate(layers)
    ]
    single, counts = draw("perfit-11", records).axes
    assert [y for _, y in sorted(_points(single))] == pytest.approx([0, 0, 0.1, 0.05, 0.2, 0.1])
    assert [y for _, y in sorted(_points(counts))] == pytest.approx([0.1, 0.05, 0.3, 0.15])  # one block: the middle


def test_users_are_drawn_where_their_vectors_are():
    content = {
        "layer": 2,
        "users": ["a", "b", "c"],
        "coordinates": [[8.0, 1.0, 0.1], [7.0, -1.0, 0.2], [9.0, 2.0, -0.2]],
        "mean": [8.0, 0.7, 0.0],
        "closest": ["a"],
        "middle": ["b"],
        "farthest": ["c"],
    }
    record = _record(
        "rag", "delta_vectors", {}, {}, task_options={"task": "lamp4"}, analysis={"delta_vectors": content}
    )
    (ax,) = draw("perfit-4", [record]).axes
    assert _points(ax) == {(8.0, 1.0), (7.0, -1.0), (9.0, 2.0)} and "n = 3 users" in ax.get_title()
    top, bottom = draw("perfit-2", [record]).axes
    assert (8.0, 0.7) in _points(top) and len(bottom.collections) > 3


def _effects(values, half: float) -> dict:
    array = np.array(values, dtype=float)
    return {"value": array.tolist(), "low": (array - half).tolist(), "high": (array + half).tolist()}


def test_patching_maps_show_effects_and_mark_those_whose_interval_leaves_0_out():
    blocks, heads = [0.8, 0.1], [[0.3, 0.0], [0.05, -0.4]]
    run = {
        "mlp_out": {"all": _effects(blocks, 0.2), "identity": _effects(blocks, 0.05)},
        "attn_out": {"all": _effects(blocks[::-1], 0.2), "identity": _effects([0, 0], 0.2)},
        "heads_out": {"all": _effects(heads, 0.1), "identity": _effects(heads, 0.1)},
    }
    attention = {name: {"later": _effects(np.abs(heads), 0.1)} for name in ("clean", "corrupted", "denoised", "noised")}
    of_all = {"n": 12, "questions": 6, "denoised": run, "noised": run, "attention": attention}
    run["mlp_out"]["all"]["low"][1] = run["mlp_out"]["all"]["high"][1] = None  # one question has no interval
    pair = {"tokens": [20, 20], "samples": 6, "aligned": 6, "n": 6, "denoised": run, "noised": run}
    content = {
        "contrast": "switch",
        "positions": ["all", "identity"],
        "sets": {"all": of_all},
        "pairs": {"attitude/good>bad": pair, "attitude/kind>rude": {"samples": 6, "aligned": 0, "n": 0}},
    }
    record = _record("rag", "lamp4", {}, {"first_mlp_identity": 0.8}, analysis={"patching": content})
    assert draw("patching-blocks", [record]) is None  # of a method that edits by itself
    record.config = record.config.model_copy(update={"method": MethodConfig(name="plain")})
    denoised, noised, _ = draw("patching-blocks", [record]).axes
    assert denoised.images[0].get_array().tolist() == [[0.8, 0.1], [0.8, 0.1], [0.1, 0.8], [0, 0]]
    assert {(x, round(y)) for x, y in _points(denoised)} == {(0, 0), (0, 1), (1, 1), (1, 2)} and noised.images
    assert _points(draw("patching-heads", [record]).axes[0]) == {(0, 0), (1, 1)}
    assert "n = 12 samples, 1 pairs of personas, 6 questions" in draw("patching-attention", [record]).get_suptitle()
    labels = [tick.get_text() for tick in draw("patching-pairs", [record]).axes[0].get_yticklabels()]
    assert labels == ["good > bad (n 6)"]
    del run["heads_out"]  # as heads=false leaves it
    assert draw("patching-heads", [record]) is None and draw("patching-blocks", [record]) is not None


def test_methods_stand_beside_copying_and_beside_another_users_history(
    run_record: Callable, run_config: Callable
) -> None:
    from matplotlib.collections import LineCollection

    records = [run_record(run_config(name, "lamp4"), rouge1=value) for name, value in (("copy", 0.3), ("rag", 0.2))]
    records.append(run_record(run_config("rag", "lamp4", control="wrong_user"), rouge1=0.1))
    figure = draw("methods", records)
    assert figure is not None
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["rag", "copy"]
    assert [list(line.get_xdata()) for line in axes.lines if line.get_linestyle() == ":"] == [[0.3, 0.3]]
    own, others = axes.containers
    assert (list(own[0].get_xdata()), list(others[0].get_xdata())) == ([0.2, 0.3], [0.1])
    assert all(isinstance(bars[2][0], LineCollection) for bars in (own, others))
    assert draw("methods", records[:1]) is None


def _changed(record, **parts):
    """The record with parts of its configuration changed: `selection={"limit": 4}`."""
    config = record.config
    for part, values in parts.items():
        config = config.model_copy(update={part: getattr(config, part).model_copy(update=values)})
    return record.model_copy(update={"config": config, "hash": config.hash8()})


def test_a_trial_on_a_few_users_does_not_stand_for_the_run_on_all(run_record: Callable, run_config: Callable):
    records = [run_record(run_config(name), rouge1=value) for name, value in (("copy", 0.3), ("rag", 0.2))]
    records += [run_record(run_config(name, limit=4), n=4, rouge1=0.9) for name in ("copy", "rag")]
    (axes,) = draw("methods", records).axes
    assert axes.get_title() == "lamp4: rouge1, n = 1925"
    assert sorted(float(x) for x in axes.containers[0][0].get_xdata()) == [0.2, 0.3]


def test_heads_are_those_of_the_run_with_most_answers(records):
    whole = next(r for r in records if r.config.task.name == "lamp2m" and _as_it_is(r, "dps"))
    few = _changed(whole, selection={"limit": 4})
    few.metrics = {name: metric.model_copy(update={"n": 4}) for name, metric in whole.metrics.items()}
    for found in ([*records, few], [few, *records]):
        assert "n = 200" in draw("dps-6", found).get_suptitle()


def test_a_method_without_a_value_has_no_place_beside_the_others(run_record: Callable, run_config: Callable):
    records = [run_record(run_config(name), rouge1=value) for name, value in (("copy", 0.3), ("rag", 0.2))]
    records.append(run_record(run_config("cad"), rouge1=0.1))
    records[-1].metrics = {"rouge1": MetricValue(value=None, n=0)}
    (axes,) = draw("methods", records).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["rag", "copy"]


def test_a_missing_value_is_no_bar_of_height_0():
    from harness.publish.figures.style import bars

    with looks():
        _, (ax,) = sheet("dps-8", "about")
        bars(ax, np.arange(2), [_metric(0.5), MetricValue(value=None, n=0)], 0, "both")
    assert [bar.get_height() for bar in ax.patches] == pytest.approx([0.5, np.nan], nan_ok=True)


def test_methods_trained_for_other_users_or_on_the_split_rates_are_chosen_on_share_no_axes(records):
    left, *_ = draw("perfit-9", records).axes
    drawn = {tuple(point) for marks in left.collections if hasattr(marks, "get_sizes") for point in marks.get_offsets()}
    own = [
        r for r in records if r.config.task.name == "lamp2m" and r.config.method.name in ("perfit", "oppu", "lora_c")
    ]
    perfit = next(r for r in own if (r.config.method.name, r.metrics["accuracy"].n) == ("perfit", 200))
    few = _changed(perfit, selection={"users": 60})
    few.started, few.metrics = "2099", {"accuracy": _metric(0.99, 60)}
    tuned = _changed(perfit, data={"split": "train"})
    tuned.started, tuned.metrics = "2099", {"accuracy": _metric(0.98, 60)}
    left, *_ = draw("perfit-9", [*records, few, tuned]).axes
    again = {tuple(point) for marks in left.collections if hasattr(marks, "get_sizes") for point in marks.get_offsets()}
    assert drawn == again and not {0.98, 0.99} & {y for _, y in again}
    real = [run for run in find_runs(RESULTS, model="smollm2-135m") if run.config.data.split == "train"]
    assert len({run.config.method.name for run in real}) > 1 and draw("perfit-9", real) is None


def test_methods_with_retrieved_history_or_drawn_answers_share_no_axes_with_those_without():
    stage = {"collective": {"parameters": 5000}, "personal": {"parameters": 600}}
    alone = [
        _record(name, "lamp2m", {}, {"accuracy": y}, analysis=stage) for name, y in (("perfit", 0.7), ("oppu", 0.6))
    ]
    drawn = _changed(alone[0], sampling={"temperature": 1.0})
    drawn.metrics = {"accuracy": _metric(0.9)}
    more = [_record("oppu", "lamp2m", {"k": 4}, {"accuracy": 0.8}, analysis=stage, started="2099"), drawn]
    left, *_ = draw("perfit-9", [*alone, *more]).axes
    marks = [marks for marks in left.collections if hasattr(marks, "get_sizes")]
    assert {tuple(point) for some in marks for point in some.get_offsets()} == {(5000, 0.7), (5000, 0.6)}
    ranks = [
        _record("perfit", "lamp2m", {"rank": a, "personal_rank": b}, {"accuracy": 0.5, "f1": 0.5})
        for a, b in ((1, 1), (1, 2), (4, 1))
    ]
    hot = _changed(ranks[0], sampling={"temperature": 1.0})
    hot.metrics = {"accuracy": _metric(0.9), "f1": _metric(0.9)}
    values = draw("perfit-10", [*ranks, hot]).axes[0].images[0].get_array()
    assert set(values.compressed()) == {0.5}


def test_methods_that_were_scored_and_not_written_are_said_to_be(run_config: Callable, run_record: Callable):
    config = run_config("plain", "lamp2m")
    scored = config.model_copy(update={"task": config.task.model_copy(update={"options": {"answers": "scored"}})})
    records = []
    for name, value in (("plain", 0.3), ("rag", 0.2)):
        method = scored.method.model_copy(update={"name": name})
        records.append(run_record(scored.model_copy(update={"method": method}), accuracy=value))
    (axes,) = draw("methods", records, task="lamp2m").axes
    assert axes.get_title().startswith('lamp2m · answers="scored": accuracy')


def test_vectors_of_users_in_one_figure_are_of_one_method_at_one_block():
    def run(task, users, layer, started, **options):
        names = [f"u{n}" for n in range(users)]
        content = {
            "layer": layer,
            "users": names,
            "coordinates": [[float(n), 1.0, 0.0, 0.0, 0.0] for n in range(users)],
            "mean": [1.0, 1.0, 0.0, 0.0, 0.0],
            **dict.fromkeys(("closest", "middle", "farthest"), names[:1]),
        }
        options = {"k": 1, **options}
        asked = {"task": task, "layer": layer}
        analysis = {"delta_vectors": content}
        return _record(
            "rag", "delta_vectors", options, {"rank90": 1}, task_options=asked, analysis=analysis, started=started
        )

    records = [
        run("lamp4", 30, 2, "2026-01"),
        run("lamp5", 30, 2, "2026-02"),
        run("lamp4", 30, 3, "2026-03"),
        run("lamp5", 40, 2, "2026-04", k=5),
        run("lamp5", 12, 2, "2026-05"),
    ]
    figure = draw("perfit-4", records)
    assert [ax.get_title() for ax in figure.axes] == ["lamp4, n = 30 users", "lamp5, n = 30 users"]
    assert "after block 2, with history (rag, k = 1)" in " ".join(figure.get_suptitle().split())


def test_the_line_of_rag_is_of_the_same_prompts(records):
    rag = next(r for r in records if r.config.task.name == "lamp2m" and _as_it_is(r, "rag"))
    other = _changed(rag, method={"options": {**rag.config.method.options, "k": 1}})
    other.metrics = {name: metric.model_copy(update={"value": 0.987}) for name, metric in rag.metrics.items()}
    for figure in (draw("dps-5", [other, *records]), draw("dps-6", [other, *records])):
        heights = {
            round(float(y), 4) for ax in figure.axes for line in ax.lines for y in np.atleast_1d(line.get_ydata())
        }
        assert round(rag.metrics["accuracy"].value, 4) in heights and 0.987 not in heights


def test_a_trial_of_a_sweep_on_a_few_questions_does_not_mix_into_its_curve():
    whole = _sweep("islam", [20, 60, 70])
    few = [_changed(record, selection={"limit": 4}) for record in _sweep("islam", [99, 98])]
    assert _points(draw("persona-1", [*whole, *few]).axes[0]) == {(0, 20), (1, 60), (2, 70)}


def test_a_figure_shows_one_set_of_weights_of_a_name(records):
    heads = [r for r in records if r.config.task.name == "lamp2m"]
    other = [_changed(record, model={"revision": "sha256:other"}) for record in heads[:3]]
    for record in other:
        record.metrics = {name: metric.model_copy(update={"value": 0.987}) for name, metric in record.metrics.items()}
    figure = draw("dps-6", [*heads, *other])
    assert 0.987 not in {y for ax in figure.axes for line in ax.lines for y in np.atleast_1d(line.get_ydata())}
