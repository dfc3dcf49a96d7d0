"""The report page: its data files, and the page itself in a headless Chromium where one is installed."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from harness.errors import DataMissing, UsageError
from harness.publish import report
from harness.publish.report import content, items
from harness.publish.report.items import groups, read_items
from harness.records.store import RunConfig, RunFolder, RunRecord, find_runs, read_samples
from harness.run.control import controlled
from harness.task import Sample, Selection
from harness.tasks.lamp import Lamp4

Configs = Callable[..., RunConfig]
Records = Callable[..., RunRecord]

HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=alert(1)> \u2028 \ud800 <b>bold</b>"
SCORES = {"plain": 0.2, "rag": 0.5, "dps": 0.4}


def save(results: Path, record: RunRecord, samples: list[Sample]) -> None:
    with RunFolder.open(results, record.config) as folder:
        folder.append(samples)
        folder.write(record)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, run_config: Configs, run_record: Records) -> Path:
    """Three methods and a control on 20 items of lamp-mini, one answer of which is hostile; two of them on MMLU."""
    root = tmp_path_factory.mktemp("report") / "results"
    task = Lamp4()
    data = {"fingerprint": task.fingerprint(Selection("dev")), "limit": 20}
    items = task.items(Selection("dev", limit=20))
    for method, control in (("plain", "none"), ("rag", "none"), ("dps", "none"), ("rag", "wrong_user")):
        score = SCORES[method] if control == "none" else 0.1
        record = run_record(run_config(method, control=control, **data), n=20, rouge1=score)
        record.health.hit_max_tokens = 1
        if method == "dps":
            heads = [[1, 0, 0.5], [0, 1, 0.1], [0, 0, 0.0], [1, 1, -0.2]]
            record.analysis = {"k": 1, "heads": heads, "pcs": [[0.0, 0.1], [0.5, -0.2]], "intervals": [[0.4, 0.6]]}
        answers = [
            Sample(
                item.example.id,
                item.example.user.id,
                response=HOSTILE if (method, at) == ("dps", 0) else f"{method} answers {item.targets[0]}",
                targets=item.targets,
                metrics={"rouge1": score + at / 100},
            )
            for at, item in enumerate(items)
        ]
        if method == "plain":
            answers[1] = replace(answers[1], response=None, metrics={}, error="<i>too long</i>")
        save(root, record, answers)
    for method, accuracy in (("plain", 0.6), ("rag", 0.55)):
        save(root, run_record(run_config(method, "mmlu"), accuracy=accuracy), [])
    return root


@pytest.fixture(scope="module")
def page(results: Path) -> Path:
    return report.write(results, results.parent / "report")


def given(page: Path, name: str) -> Any:
    """What a data file hands to the page."""
    text = (page.parent / "data" / f"{name}.js").read_text("ascii")
    start = f'report.put("{name}",'
    assert text.startswith(start) and text.endswith(");\n")
    return json.loads(text[len(start) : -len(");\n")])


def key(page: Path, method: str, control: str = "none") -> str:
    runs = given(page, "runs")["runs"]
    return next(
        name for name, run in runs.items() if (run["task"], run["method"], run["control"]) == ("lamp4", method, control)
    )


def test_a_data_file_is_one_call_in_ascii_without_a_tag(page: Path):
    files = list((page.parent / "data").rglob("*.js"))
    assert len(files) > 10
    for file in files:
        text = file.read_text("ascii")
        assert "<" not in text and text.count("\n") == 1
        given(page, file.relative_to(page.parent / "data").with_suffix("").as_posix())


def test_answers_reach_the_page_unchanged(page: Path):
    samples = given(page, f"samples/{key(page, 'dps')}")["samples"]
    assert next(iter(samples.values()))["response"] == HOSTILE
    failed = list(given(page, f"samples/{key(page, 'plain')}")["samples"].values())[1]
    assert failed["error"] == "<i>too long</i>" and failed["scores"] == [None]


def test_queries_and_the_histories_that_were_given_are_read_from_the_data(page: Path):
    group = given(page, "runs")["groups"][0]
    shown = given(page, f"items/{group['name']}")["items"]
    items = Lamp4().items(Selection("dev", limit=20))
    for control in ("none", "wrong_user"):
        for item in controlled(items, control, seed=0):
            texts = {record.fields["text"] for record in item.example.user.history}
            excerpt = shown[item.example.id]["history"][control]
            assert shown[item.example.id]["query"] == item.example.text
            assert excerpt and {dict(fields)["text"] for fields in excerpt} <= texts


def test_without_the_data_the_page_has_the_answers_and_says_why_it_has_no_queries(
    tmp_path: Path, run_config: Configs, run_record: Records
):
    answer = Sample("1", "u", response="a", targets=("b",), metrics={"rouge1": 0.5})
    save(tmp_path / "results", run_record(run_config("plain"), rouge1=0.5), [answer])
    page = report.write(tmp_path / "results", tmp_path / "report")
    items = given(page, f"items/{given(page, 'runs')['groups'][0]['name']}")
    assert items["items"] == {"1": {"user": "u", "targets": ["b"]}}
    assert "not at hand (LaMP); give its folder as --data" in items["why_no_text"]


def test_gains_and_losses_are_differences_to_plain_on_the_same_samples(page: Path):
    (found,) = given(page, "runs")["trade_offs"]
    assert (found["gain"], found["utility"]) == ("lamp4 rouge1", "mmlu accuracy")
    points = {point["run"].split("/")[-1].split("-")[0]: point for point in found["points"]}
    assert points["plain"]["gain"][0] == points["plain"]["utility"][0] == 0
    assert points["rag"]["gain"] == pytest.approx([0.3, 0.29, 0.31])
    assert points["rag"]["utility"] == pytest.approx([-0.05, -0.06, -0.04])


def test_a_lower_error_is_a_gain(run_config: Configs, run_record: Records, tmp_path: Path):
    for method, (mae, accuracy) in {"plain": (0.8, 0.6), "rag": (0.5, 0.6)}.items():
        save(tmp_path, run_record(run_config(method, "lamp3"), mae=mae), [])
        save(tmp_path, run_record(run_config(method, "mmlu"), accuracy=accuracy), [])
    page = report.write(tmp_path, tmp_path.parent / "report")
    (found,) = given(page, "runs")["trade_offs"]
    assert found["points"][0]["gain"] == pytest.approx([0.3, 0.29, 0.31])


def test_a_persona_s_change_stands_against_mmlu_without_a_history(
    run_config: Configs, run_record: Records, tmp_path: Path
):
    for method, trait, accuracy in (("plain", 0.9, 0.6), ("clamp", 0.2, 0.5)):
        save(tmp_path, run_record(run_config(method, "persona:religion", options={"k": 5}), trait=trait), [])
        for k in (0, 5):
            save(tmp_path, run_record(run_config(method, "mmlu", options={"k": k}), accuracy=accuracy + k / 100), [])
    (found,) = given(report.write(tmp_path, tmp_path.parent / "report"), "runs")["trade_offs"]
    clamp = next(point for point in found["points"] if "clamp" in point["run"])
    assert (found["gain"], len(found["points"])) == ("persona:religion trait", 2)
    assert clamp["gain"][0] == pytest.approx(-0.7)
    assert clamp["utility"][0] < 0


def test_the_model_with_most_runs_comes_first_and_what_ranks_them(
    run_config: Configs, run_record: Records, tmp_path: Path
):
    for method, task, model in (
        ("plain", "lamp4", "alone"),
        ("plain", "lamp4", "often"),
        ("rag", "lamp4", "often"),
        ("rag", "lamp1", "often"),
    ):
        save(tmp_path, run_record(run_config(method, task, model), rouge1=0.5), [])
    shown = given(report.write(tmp_path, tmp_path.parent / "report"), "runs")
    ranked = [(ranking["model"], ranking["task"]) for ranking in shown["rankings"]]
    assert ranked == [("often", "lamp4"), ("often", "lamp1"), ("alone", "lamp4")]
    assert [run["model"] for run in shown["runs"].values()] == ["often"] * 3 + ["alone"]


def test_the_model_that_real_users_were_asked_of_comes_before_one_with_more_runs(
    run_config: Configs, run_record: Records, tmp_path: Path
):
    for method, data, model in (
        ("plain", "lamp4: lamp-mini (synthetic)", "tiny"),
        ("rag", "lamp4: lamp-mini (synthetic)", "tiny"),
        ("plain", "LaMP's user split", "zebra"),
    ):
        save(tmp_path, run_record(run_config(method, model=model, data=data), rouge1=0.5), [])
    shown = given(report.write(tmp_path, tmp_path.parent / "report"), "runs")
    assert [ranking["model"] for ranking in shown["rankings"]] == ["zebra", "tiny"]


def test_a_report_is_replaced_and_anything_else_is_left_alone(results: Path, tmp_path: Path):
    page = report.write(results, tmp_path / "report")
    stale = page.parent / "data" / "stale.js"
    stale.write_text("")
    report.write(results, tmp_path / "report")
    assert not stale.exists()
    (tmp_path / "report" / "CNAME").write_text("mine")
    assert (report.write(results, tmp_path / "report").parent / "CNAME").read_text() == "mine"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("")
    with pytest.raises(UsageError, match="holds something else than a report"):
        report.write(results, tmp_path / "mine")


def test_a_report_that_is_not_finished_leaves_the_old_one_and_can_be_made_again(
    results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    page = report.write(results, tmp_path / "report")
    before = {path: path.read_bytes() for path in page.parent.rglob("*") if path.is_file()}
    with monkeypatch.context() as patch:
        patch.setattr(report.content, "answers", lambda samples: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            report.write(results, tmp_path / "report")
    assert {path: path.read_bytes() for path in tmp_path.joinpath("report").rglob("*") if path.is_file()} == before
    assert report.write(results, tmp_path / "report") == page
    assert [path.name for path in tmp_path.iterdir()] == ["report"]


def test_without_records_there_is_no_report(tmp_path: Path):
    with pytest.raises(DataMissing, match="no records in"):
        report.write(tmp_path, tmp_path / "report")


def test_the_command_prints_where_the_page_is(harness: Callable, results: Path):
    done = harness(f"report --results {results} --output page")
    assert (done.code, done.out) == (0, "page/index.html\n")


# In a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium without a window. Both programs are given by path, so selenium looks for nothing on the network."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("no Chromium with chromedriver here (Debian: apt install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    window = webdriver.Chrome(options=options, service=Service(driver))
    yield window
    window.quit()


@pytest.fixture
def open_page(browser: Any, page: Path) -> Iterator[Callable[..., Any]]:
    """Opens a view and waits until it is drawn; when the test ends, nothing must stand in the console."""

    def show(view: str, path: Path = page, **params: str) -> Any:
        from urllib.parse import urlencode

        browser.get("about:blank")
        browser.set_window_size(1280, 900)
        browser.get(f"{path.as_uri()}#/{view}?{urlencode(params)}")
        until(lambda: browser.execute_script("return document.getElementById('main').dataset.view") == view)
        return browser

    browser.get_log("browser")
    yield show
    assert browser.get_log("browser") == []


def until(holds: Callable[[], object], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "the page does not come to it"
        time.sleep(0.02)


def texts(browser: Any, selector: str) -> list[str]:
    script = "return [...document.querySelectorAll(arguments[0])].map((element) => element.textContent.toWellFormed())"
    return browser.execute_script(script, selector)


def press(browser: Any, key: str) -> None:
    from selenium.webdriver.common.action_chains import ActionChains

    ActionChains(browser).send_keys(key).perform()


VIEWS = ("leaderboard", "samples", "tables", "figures", "trade-off", "heads")


@pytest.mark.parametrize("view", VIEWS)
def test_every_view_is_drawn_from_the_disk_alone_and_fits_narrow_windows(open_page: Callable, view: str):
    browser = open_page(view)
    assert texts(browser, "main h2, main figure") and not texts(browser, ".warning")
    asked = "return [...document.querySelectorAll('script, link, img')].map((element) => element.src || element.href)"
    loaded = browser.execute_script(asked)
    assert loaded and all(name.startswith("file:///") for name in loaded)
    for width in (1280, 800):
        browser.set_window_size(width, 900)
        assert browser.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")


def test_a_click_on_a_column_sorts_and_another_turns_it_round(open_page: Callable):
    browser = open_page("leaderboard", task="lamp4", controls="no")
    methods = "a.method"
    assert texts(browser, methods) == ["rag", "dps", "plain"]
    for order, direction in ((["plain", "dps", "rag"], "ascending"), (["rag", "dps", "plain"], "descending")):
        browser.find_element("css selector", "th.of-score button").click()
        assert texts(browser, methods) == order
        assert browser.find_element("css selector", "th.of-score").get_attribute("aria-sort") == direction
    assert "sort=score+reversed" in browser.current_url


def test_filters_leave_what_fits_and_the_address_keeps_them(open_page: Callable):
    browser = open_page("leaderboard")
    assert len(texts(browser, ".ranking")) == 3
    search = browser.find_element("css selector", "input[type=search]")
    search.send_keys("-rag")
    until(lambda: "rag" not in texts(browser, "a.method"))
    assert texts(browser, "a.method") == ["dps", "plain", "plain"]
    browser.refresh()
    until(lambda: texts(browser, "a.method") == ["dps", "plain", "plain"])


def test_words_of_the_filter_mean_or_and_commas_part_them(open_page: Callable):
    browser = open_page("leaderboard", task="lamp4", controls="no", method="dps, plain, -control")
    assert texts(browser, "a.method") == ["dps", "plain"]
    browser = open_page("leaderboard", task="lamp4", controls="no", method="rag, -rag")
    assert texts(browser, "a.method") == []


def test_columns_say_what_they_mean_where_they_stand(open_page: Callable):
    browser = open_page("leaderboard")
    titles = browser.execute_script(
        "return [...document.querySelectorAll('th button')].map((one) => [one.textContent, one.title])"
    )
    said = dict(titles)
    assert "relative to plain" in said["tokens"] and "without the method" in said["health"]
    assert "passes" not in said and "tokens" in texts(browser, ".legend dt")


def test_minus_control_leaves_out_what_ran_with_another_history(open_page: Callable):
    every = texts(open_page("leaderboard"), ".ranking h2")
    shown = texts(open_page("leaderboard", method="-control"), ".ranking h2")
    assert shown == [title for title in every if "--control" not in title] != every
    (only,) = texts(open_page("leaderboard", method="control"), ".ranking h2")
    assert "--control wrong_user" in only


def test_words_are_explained_where_they_stand(open_page: Callable):
    assert any("Preference contribution score" in text for text in texts(open_page("heads"), "main .note"))
    browser = open_page("samples")
    heads = browser.execute_script(
        "return [...document.querySelectorAll('.answers thead th')].map((one) => [one.textContent, one.title])"
    )
    assert dict(heads)["history"] == "Items of history in the prompt" and dict(heads)["tokens"] == "Read + written"
    assert "null" not in dict(heads).values()
    explained = browser.execute_script("return legend(['accuracy_lenient', 'meteor_unsplit', 'rouge1']).textContent")
    assert "searched for a label" in explained and "taken as one sentence" in explained


def test_a_long_view_begins_with_what_stands_in_it(open_page: Callable):
    browser = open_page("figures")
    named = texts(browser, ".contents a")
    assert named == texts(browser, "figcaption b") and len(named) > 10


def test_items_are_ordered_and_filtered_by_the_length_of_the_history(open_page: Callable):
    def lengths(browser: Any) -> list[int]:
        return [int(text.partition("history ")[2].split(" ")[0]) for text in texts(browser, "#items small")]

    until(lambda: lengths(open_page("samples", order="long")))
    found = lengths(open_page("samples", order="long"))
    assert found == sorted(found, reverse=True) and len(set(found)) > 1
    least = found[len(found) // 2]
    assert min(lengths(open_page("samples", order="short", least=str(least)))) >= least


def test_gains_stand_against_operations_too(page: Path, open_page: Callable):
    costs = given(page, "runs")["costs"]
    assert all(point["utility"][0] > 0 for one in costs for point in one["points"])
    if costs:
        browser = open_page("trade-off", of=str(len(given(page, "runs")["trade_offs"])))
        assert any("operations an answer, relative to plain" in text for text in texts(browser, "text.title"))


def test_correct_is_called_accuracy(run_config: Configs, run_record: Records, tmp_path: Path):
    for method in ("plain", "rag"):
        record = run_record(run_config(method, "lamp2m"), accuracy=0.5)
        record.cost.flops = 1e9
        save(tmp_path / "results", record, [Sample("1", "u", response="a", metrics={"correct": 1.0})])
    overview = given(report.write(tmp_path / "results", tmp_path / "report"), "runs")
    assert overview["groups"][0]["metrics"] == [{"name": "correct", "title": "accuracy", "higher_is_better": True}]
    (cost,) = overview["costs"]
    assert [point["utility"][0] for point in cost["points"]] == [1.0, 1.0]


def test_a_run_s_samples_are_loaded_when_they_are_looked_at(open_page: Callable, page: Path):
    browser = open_page("leaderboard")
    loaded = "return [...document.scripts].map((script) => script.src).filter((src) => src.includes('/samples/'))"
    assert browser.execute_script(loaded) == []
    browser.find_element("link text", "Side by side").click()
    until(lambda: texts(browser, ".answers tbody th"))
    assert texts(browser, ".answers tbody th") == ["reference", "plain", "rag", "dps", "rag · wrong user"]
    assert len(browser.execute_script(loaded)) == 4


def test_what_a_model_wrote_stays_text(open_page: Callable):
    browser = open_page("samples")
    shown = texts(browser, ".answers td.text")
    assert all(word in shown[3] for word in HOSTILE.replace("\ud800", "\ufffd").split())
    assert "owned" not in browser.title
    assert browser.execute_script("return document.querySelectorAll('main script, main img, main b.bold').length") == 0
    press(browser, "j")
    until(lambda: "failed: <i>too long</i>" in texts(browser, ".answers .failed"))


def test_words_that_differ_from_the_reference_are_marked(open_page: Callable):
    browser = open_page("samples", item=Lamp4().items(Selection("dev", limit=3))[2].example.id)
    row = browser.find_element("xpath", "//table[@class='answers']//tr[th='rag']")
    assert [mark.text for mark in row.find_elements("tag name", "ins")] == ["rag answers"]
    assert row.find_elements("tag name", "del") == []


@pytest.mark.parametrize(
    ("before", "after", "parts"),
    [
        ("a b c", "a b c", [["same", "a b c"]]),
        ("a b c", "a x c", [["same", "a"], ["del", "b"], ["ins", "x"], ["same", "c"]]),
        ("", "a b", [["ins", "a b"]]),
        ("a b", "", [["del", "a b"]]),
    ],
)
def test_a_difference_leads_from_one_text_to_the_other(open_page: Callable, before: str, after: str, parts: Any):
    assert open_page("leaderboard").execute_script("return wordDiff(...arguments)", before, after) == parts


def test_the_keyboard_is_enough(open_page: Callable):
    browser = open_page("leaderboard")
    press(browser, "?")
    assert browser.find_element("css selector", "dialog[open] h2").text == "Keys"
    press(browser, "\ue00c")  # escape
    press(browser, "j")
    press(browser, "j")
    focused = "return document.activeElement.textContent"
    assert browser.execute_script(focused) == texts(browser, "a.method")[1]
    press(browser, "2")
    until(lambda: texts(browser, "#items [aria-current]"))
    first = texts(browser, "#items [aria-current]")
    press(browser, "j")
    assert texts(browser, "#items [aria-current]") != first
    press(browser, "k")
    assert texts(browser, "#items [aria-current]") == first


def test_arrow_keys_walk_over_heads_and_say_their_score(open_page: Callable):
    browser = open_page("heads")
    browser.execute_script("document.querySelector('.atlas td').focus()")
    press(browser, "\ue015")  # down: layer 1, head 0
    said = browser.find_element("id", "head").text
    assert said == ("layer 1, head 0: PCS 0.5 nats per token (95 %: 0.4 to 0.6), place 1 of 4, one of the heads chosen")
    assert len(texts(browser, ".atlas td")) == 4


def test_a_run_is_shown_with_its_configuration_health_and_cost(open_page: Callable, page: Path):
    browser = open_page("run", run=key(page, "dps"))
    facts: Mapping[str, str] = dict(zip(texts(browser, "dt"), texts(browser, "dd"), strict=True))
    assert (facts["hit max tokens"], facts["forward passes"], facts["dtype"]) == ("1", "1000", "float32")
    assert texts(browser, "h3")[:3] == ["Metrics", "Health", "Cost"]


def test_twenty_runs_of_two_thousand_samples_are_quick(
    browser: Any, open_page: Callable, tmp_path: Path, run_config: Configs, run_record: Records
):
    """The bounds are generous: a machine that is busy takes several times what an idle one does."""
    answers = [f"an answer to item {at} in a dozen words that a model might write" for at in range(2000)]
    for seed in range(20):
        samples = [
            Sample(str(at), str(at % 500), response=text, targets=(text,), metrics={"rouge1": (at * seed % 7) / 7})
            for at, text in enumerate(answers)
        ]
        save(tmp_path / "results", run_record(run_config("rag", seed=seed), rouge1=seed / 100), samples)
    page = report.write(tmp_path / "results", tmp_path / "report")
    open_page("leaderboard", page, variants="shown")
    ready = browser.execute_script("return performance.getEntriesByType('navigation')[0].domContentLoadedEventEnd")
    assert ready < 2000 and len(texts(browser, "a.method")) == 20
    start = time.monotonic()
    open_page("samples", page, order="differ")
    assert len(texts(browser, "#items li")) == 2000
    assert time.monotonic() - start < 10


def test_the_committed_records_have_a_query_for_every_item():
    results = Path(__file__).parents[2] / "results"
    runs = find_runs(results, model="tiny", task="lamp4")
    samples = {items.key(run): read_samples(results / items.key(run)) for run in runs}
    (group,) = groups(runs, samples)
    found = read_items(group)["items"]
    assert len(found) == 200 and all(item["query"] and item["history"] for item in found.values())


def test_the_runs_of_a_group_stand_baselines_first_and_controls_last(page: Path):
    group = given(page, "runs")["groups"][0]
    expected = [("plain", "none"), ("rag", "none"), ("dps", "none"), ("rag", "wrong_user")]
    assert group["runs"] == [key(page, *run) for run in expected]
    assert content.UTILITY == "mmlu" and group["metrics"] == [
        {"name": "rouge1", "title": "rouge1", "higher_is_better": True}
    ]
