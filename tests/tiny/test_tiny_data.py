"""lamp-mini: the shape of LaMP, the same every time, and users whose habits slip, drift and are shared as the parameters say."""

import json
import subprocess
import sys
from collections import Counter, defaultdict

import pytest

from harness.data import HistoryItem
from harness.tasks.lamp_prompts import FIELDS, FRAMES, LABELS, prompt_text, query
from harness.tiny import lamp_mini, personas, words
from harness.tiny.population import SPLITS as POPULATION
from harness.tiny.population import WORLD

SPLITS = ("train", "dev", "test")


@pytest.mark.parametrize("task", lamp_mini.TASKS)
def test_questions_have_the_official_shape(task):
    questions, golds = lamp_mini.load(task, "dev")
    assert [q["id"] for q in questions] == [g["id"] for g in golds]
    for question, gold in zip(questions, golds, strict=True):
        assert set(question) == {"id", "input", "user_id", "profile"} and set(gold) == {"id", "output"}
        assert question["input"].startswith(FRAMES[task].split("{")[0])
        assert query(task, question["input"]) != question["input"]
        assert 5 <= len(question["profile"]) <= 60
        for item in question["profile"]:
            assert set(item) == {*FIELDS[task], "id", "date"}
            assert all(isinstance(value, str) and value for value in item.values())
        dates = [item["date"] for item in question["profile"]]
        assert dates == sorted(dates)


@pytest.mark.parametrize("task", lamp_mini.TASKS)
def test_loading_twice_gives_the_same_users_and_splits_share_none(task):
    assert lamp_mini.load(task, "test") == lamp_mini.load(task, "test")
    users = [{q["user_id"] for q in lamp_mini.load(task, split)[0]} for split in SPLITS]
    assert len(set.union(*users)) == sum(map(len, users)) == sum(lamp_mini.USERS.values())


def test_the_hash_seed_of_the_process_changes_nothing():
    code = "from harness.tiny import lamp_mini as m; import json; print(json.dumps(m.load('lamp2n', 'dev')))"
    made = [
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": "."},
            capture_output=True,
            check=True,
        )
        for seed in ("1", "2")
    ]
    assert made[0].stdout == made[1].stdout


@pytest.fixture(scope="module")
def cases():
    return {
        task: [lamp_mini.case(task, "train", user) for user in range(400)]
        for task in ("lamp2m", "lamp3", "lamp4", "lamp7")
    }


@pytest.mark.parametrize("task", words.GENRES)
def test_opening_and_closing_words_are_never_in_the_input(task):
    genre = words.GENRES[task]
    for question, gold in zip(*lamp_mini.load(task, "dev"), strict=True):
        opener = next(opener for opener in genre.openers if gold["output"].startswith(opener))
        closer = next(closer for closer in genre.closers if gold["output"].endswith(closer))
        assert opener not in question["input"] and closer not in question["input"]


@pytest.mark.parametrize("task", ["lamp2m", "lamp2n"])
def test_a_topic_alone_does_not_tell_the_label(task):
    chosen = defaultdict(Counter)
    for question, gold in zip(*lamp_mini.load(task, "train"), strict=True):
        told = query(task, question["input"]).replace(",", "").replace(".", "").split()
        topic = next(topic for word in told for topic in words.TOPICS[task] if word in topic.cues)
        chosen[topic][gold["output"]] += 1
        assert gold["output"] in LABELS[task] and gold["output"] in topic.labels
    most = [max(counts.values()) / counts.total() for counts in chosen.values()]
    assert sum(most) / len(most) < 0.55


def test_histories_have_5_to_60_items_and_most_are_short(cases):
    sizes = sorted(len(made.question["profile"]) for made in cases["lamp4"])
    assert sizes[0] == 5 and 58 <= sizes[-1] <= 60 and 14 <= sizes[len(sizes) // 2] <= 22


@pytest.mark.parametrize(("task", "values"), [("lamp2m", 3), ("lamp3", 3), ("lamp4", 16), ("lamp7", 16)])
def test_habits_slip_and_drift_as_often_as_the_population_says(cases, task, values):
    slips = drifted = acts = habits = 0
    for made in cases[task]:
        drawn = made.author.habits.drawn
        assert POPULATION.slip[0] <= made.author.habits.slip <= POPULATION.slip[1]
        names = [name for name in drawn if made.author.habits.values[name] == values]
        habits, drifted = habits + len(names), drifted + sum(drawn[name].since > 0 for name in names)
        for place, shown in enumerate(made.shown):
            for name in shown.keys() & set(names):
                usual = drawn[name].now if place >= drawn[name].since else drawn[name].before
                acts, slips = acts + 1, slips + (shown[name] != usual)
    assert slips / acts == pytest.approx(POPULATION.mean_slip, abs=0.015)
    assert drifted / habits == pytest.approx(POPULATION.drift, abs=0.03)


def test_golds_slip_as_often_as_the_history(cases):
    kept = [
        made.gold["output"].startswith(words.GENRES["lamp4"].openers[made.author.habits.now(name)])
        for made in cases["lamp4"]
        for name in made.author.asked
        if name.startswith("opener")
    ]
    assert sum(kept) / len(kept) == pytest.approx(1 - POPULATION.mean_slip, abs=0.06)


def test_groups_share_habits_and_the_world_the_model_was_trained_on_has_none(cases):
    groups = Counter(made.author.habits.group for made in cases["lamp4"])
    for group, share in enumerate(POPULATION.group_shares()):
        assert groups[group] / 400 == pytest.approx(share, abs=0.06)
        own = Counter(m.author.habits.now("opener 0") for m in cases["lamp4"] if m.author.habits.group == group)
        assert own.most_common(1)[0][1] / own.total() > POPULATION.loyalty - 0.15
    free = Counter(lamp_mini.case("lamp4", "world", user, WORLD).author.habits.now("opener 0") for user in range(400))
    assert max(free.values()) < 0.15 * 400


def test_most_items_are_beside_the_point_and_some_mention_it_in_passing(cases):
    on_theme = [
        any(name in shown for name in made.author.asked if name.startswith("opener"))
        for made in cases["lamp4"]
        for shown in made.shown
    ]
    assert sum(on_theme) / len(on_theme) == pytest.approx(1 / POPULATION.themes, abs=0.03)
    topics = words.TOPICS["lamp2m"]
    passing = total = 0
    for made in cases["lamp2m"]:
        for item, shown in zip(made.question["profile"], made.shown, strict=True):
            (number,) = (int(name.removeprefix("topic ")) for name in shown)
            told = set(item["description"].replace(",", "").replace(".", "").split())
            passing += any(told & set(other.cues) for other in topics if other != topics[number])
            total += 1
    assert passing / total == pytest.approx(POPULATION.passing, abs=0.02)


def test_ratings_are_moved_by_at_most_one(cases):
    shifts = Counter()
    for made in cases["lamp3"]:
        told = set(made.question["input"].replace(".", "").split())
        level = next(level for level, feelings in words.FEELINGS.items() if told & set(feelings))
        shifts[int(made.gold["output"]) - 3 - level] += 1
    assert set(shifts) == {-1, 0, 1} and min(shifts.values()) > 60


def test_lamp1_answers_are_balanced_and_the_cited_title_shares_words_with_the_history():
    made = [lamp_mini.case("lamp1", "train", user) for user in range(600)]
    assert 250 < sum(case.gold["output"] == "[1]" for case in made) < 350
    cited = []
    for case in made:
        titles = " ".join(item["title"] for item in case.question["profile"][-5:]).split()
        first, second = case.question["input"].split(' [1]: "')[1].strip('"').split('" [2]: "')
        shared = [
            len({word for word in title.split() if word.endswith("s")} & set(titles)) for title in (first, second)
        ]
        cited.append(shared[("[1]", "[2]").index(case.gold["output"])] >= max(shared))
    assert 0.7 < sum(cited) / len(cited) < 0.9


def test_written_files_are_what_load_returns(tmp_path):
    lamp_mini.write(tmp_path)
    questions, golds = lamp_mini.load("lamp2m", "dev")
    folder = tmp_path / "LaMP_2M" / "dev"
    assert json.loads((folder / "dev_questions.json").read_text()) == questions
    assert json.loads((folder / "dev_outputs.json").read_text()) == {"task": "LaMP_2M", "golds": golds}
    assert {path.name for path in tmp_path.iterdir()} == set(lamp_mini.FOLDERS.values())


def test_a_profile_renders_through_the_official_prompt():
    question = lamp_mini.load("lamp4", "dev")[0][0]
    items = [HistoryItem(item["id"], item, "") for item in question["profile"][:2]]
    assert prompt_text("lamp4", question["input"], items).endswith(f". {question['input']}")


def test_unknown_names_are_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="lamp4"):
        lamp_mini.load("lamp8", "dev")
    with pytest.raises(ValueError, match="train"):
        lamp_mini.load("lamp4", "valid")


def test_the_generator_needs_no_torch():
    code = "import sys; from harness.tiny import lamp_mini, personas; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_persona_words_belong_to_one_persona_only():
    words = [word.lower() for lexicon in personas.LEXICONS.values() for word in lexicon]
    assert len(words) == len(set(words))
    assert not set(words) & {word.lower() for word in personas.NEUTRAL_WORDS}
    assert personas.lexicon_share("We share gumbo, and Jazz!", "African American") == 0.4
    assert not set(personas.QUESTIONS_EXTRACT) & set(personas.QUESTIONS_EVAL)
