"""lamp-mini: the shape of LaMP, the same every time, and habits that only the history shows."""

import json
import subprocess
import sys
from collections import Counter, defaultdict

import pytest

from harness.data import Record
from harness.tasks.lamp_prompts import FIELDS, FRAMES, LABELS, prompt_text, query
from harness.tiny import lamp_mini, personas

SPLITS = ("train", "dev", "test")


@pytest.mark.parametrize("task", lamp_mini.TASKS)
def test_questions_have_the_official_shape(task):
    questions, golds = lamp_mini.load(task, "dev")
    assert [q["id"] for q in questions] == [g["id"] for g in golds]
    for question, gold in zip(questions, golds, strict=True):
        assert set(question) == {"id", "input", "user_id", "profile"} and set(gold) == {"id", "output"}
        assert question["input"].startswith(FRAMES[task].split("{")[0])
        assert query(task, question["input"]) != question["input"]
        assert len(question["profile"]) >= 3
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


@pytest.mark.parametrize("task", lamp_mini.GENRES)
def test_opening_and_closing_words_are_in_the_history_and_not_in_the_input(task):
    genre = lamp_mini.GENRES[task]
    for question, gold in zip(*lamp_mini.load(task, "dev"), strict=True):
        opener = next(opener for opener in genre.openers if gold["output"].startswith(opener))
        closer = next(closer for closer in genre.closers if gold["output"].endswith(closer))
        assert opener not in question["input"] and closer not in question["input"]
        for item in question["profile"]:
            written = item["text"] if task == "lamp7" else item["title"]
            assert written.startswith(opener) and written.endswith(closer)


@pytest.mark.parametrize("task", ["lamp2m", "lamp2n"])
def test_a_topic_alone_does_not_tell_the_label_and_the_history_does(task):
    chosen = defaultdict(Counter)
    for question, gold in zip(*lamp_mini.load(task, "train"), strict=True):
        words = set(query(task, question["input"]).replace(",", "").replace(".", "").split())
        (topic,) = (topic for topic in lamp_mini.TOPICS[task] if words & set(topic.cues))
        chosen[topic][gold["output"]] += 1
        shown = {item["tag" if task == "lamp2m" else "category"] for item in question["profile"]}
        assert gold["output"] in LABELS[task] and shown & set(topic.labels) == {gold["output"]}
    for counts in chosen.values():
        assert max(counts.values()) < 0.5 * counts.total()


def test_rating_habits_move_scores_by_at_most_one_and_evenly():
    shifts = Counter()
    for question, gold in zip(*lamp_mini.load("lamp3", "train"), strict=True):
        words = set(question["input"].replace(".", "").split())
        level = next(level for level, feelings in lamp_mini.FEELINGS.items() if words & set(feelings))
        shifts[int(gold["output"]) - 3 - level] += 1
    assert set(shifts) == {-1, 0, 1} and min(shifts.values()) > 150


def test_lamp1_answers_are_balanced_and_the_related_title_is_of_the_users_field():
    questions, golds = lamp_mini.load("lamp1", "train")
    assert 250 < sum(gold["output"] == "[1]" for gold in golds) < 350
    for question, gold in zip(questions, golds, strict=True):
        own = next(
            set(row) for row in lamp_mini.FIELDS_OF_STUDY if set(row) & set(question["profile"][0]["title"].split())
        )
        first, second = query("lamp1", question["input"]), question["input"].split('[2]: "')[1].strip('"')
        related = second if gold["output"] == "[2]" else first.removesuffix(second)
        assert own & set(related.split())


def test_written_files_are_what_load_returns(tmp_path):
    lamp_mini.write(tmp_path)
    questions, golds = lamp_mini.load("lamp2m", "dev")
    folder = tmp_path / "LaMP_2M" / "dev"
    assert json.loads((folder / "dev_questions.json").read_text()) == questions
    assert json.loads((folder / "dev_outputs.json").read_text()) == {"task": "LaMP_2M", "golds": golds}
    assert {path.name for path in tmp_path.iterdir()} == set(lamp_mini.FOLDERS.values())


def test_a_profile_renders_through_the_official_prompt():
    question = lamp_mini.load("lamp4", "dev")[0][0]
    items = [Record(item["id"], item, "") for item in question["profile"][:2]]
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
