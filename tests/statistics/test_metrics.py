"""Metrics equal a plain recomputation with the libraries; a number is never a different number, only a missing one."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from nltk.tokenize.destructive import NLTKWordTokenizer
from nltk.tokenize.punkt import PunktSentenceTokenizer
from nltk.translate.meteor_score import single_meteor_score
from rouge_score.rouge_scorer import RougeScorer
from sklearn.metrics import accuracy_score, f1_score, mean_absolute_error, root_mean_squared_error

from harness.statistics import metrics
from harness.task import Metric, Sample
from harness.tasks.lamp import Lamp, Lamp1, Lamp2M, Lamp2N, Lamp3, Lamp4
from harness.tasks.lamp_prompts import LABELS

MOVIES, CITES = LABELS["lamp2m"], LABELS["lamp1"]
NEWS = LABELS["lamp2n"]


@pytest.mark.parametrize(
    ("answer", "official", "lenient"),
    [
        (" comedy\n", "comedy", "comedy"),
        ("Comedy.", None, "comedy"),
        ('The tag is "dark comedy".', None, "dark comedy"),
        ("sci fi", None, "sci-fi"),
        ("comedy, action", None, "comedy"),
        ("I would say action\nor comedy or romance", None, "action"),
        ("It is action or comedy", None, None),
        ("tragicomedy", None, None),
        ("", None, None),
    ],
)
def test_movie_tags_are_parsed_exactly_and_leniently(answer, official, lenient):
    assert metrics.parse_label(answer, MOVIES) == official
    assert metrics.parse_label_leniently(answer, MOVIES) == lenient


@pytest.mark.parametrize(
    ("answer", "official", "lenient"),
    [("[2]", "[2]", "[2]"), ("2", None, "[2]"), ("Reference [1] is it", None, "[1]"), ("[1] or [2]?", None, "[1]"),
     ("12", None, None), ("both [1] and [2]", None, None)],
)  # fmt: skip
def test_citations_are_parsed_exactly_and_leniently(answer, official, lenient):
    assert metrics.parse_label(answer, CITES) == official
    assert metrics.parse_label_leniently(answer, CITES) == lenient


def test_and_is_an_ampersand_to_the_lenient_parse():
    assert metrics.parse_label_leniently("Science and Technology", NEWS) == "science & technology"


@pytest.mark.parametrize(
    ("answer", "official", "lenient"),
    [("4", 4, 4), (" 4.5\n", 4.5, 4.5), ("10", 10, None), ("-1", -1, None), ("four", None, None), ("4 stars", None, 4),
     ("4 out of 5", None, 4), ("I give it 2/5.", None, 2), ("On a scale of 1 to 5: 3", None, 3), ("2 or 3?", None, 2),
     ("either 2 or 3", None, None), ("nan", None, None), ("-inf", None, None), ("1e400", None, None), ("", None, None)],
)  # fmt: skip
def test_ratings_are_parsed_by_float_and_leniently(answer, official, lenient):
    assert metrics.parse_rating(answer) == official
    assert metrics.parse_rating_leniently(answer) == lenient


@pytest.mark.parametrize(
    ("target", "reads"),
    [
        ("Hello, friend 5!", True),
        ("\u201cHello\u201d \u2013 \u2764\ufe0f \u2026", True),
        ("Gr\u00fc\u00dfe", False),
        ("cafe\u0301", False),
        ("\u0434\u0430", False),
        ("\u8c22\u8c22", False),
        ("\u0663", False),
    ],
)
def test_rouge_reads_a_target_whose_letters_its_tokens_hold(target: str, reads: bool) -> None:
    assert metrics.rouge_reads(target) == reads


@pytest.mark.parametrize(("gold", "counted_as"), [(1, 5), (2, 5), (3, 5), (4, 1), (5, 1)])
def test_an_answer_that_is_no_rating_counts_as_the_farthest(gold, counted_as):
    assert metrics.rating_or_farthest(None, gold) == counted_as
    assert metrics.rating_or_farthest(7.0, gold) == 7


@pytest.mark.parametrize("seed", range(20))
def test_macro_f1_equals_scikit_learn_over_the_full_label_list(seed):
    rng = np.random.default_rng(seed)
    golds, answers = rng.integers(6, size=30), rng.integers(-1, 8, size=30)
    expected = f1_score(golds, answers, labels=list(range(8)), average="macro", zero_division=0)
    assert metrics.macro_f1(golds, answers, 8) == pytest.approx(expected, abs=1e-12)


def test_macro_f1_has_an_interval_only_where_every_label_is_the_gold_of_five_users():
    def macro_f1(golds: list[int]) -> Metric:
        samples = [Sample(str(i), f"u{i}") for i in range(len(golds))]
        return metrics.macro_f1_metric(samples, np.array(golds), np.array([golds[0], *golds[:-1]]), ["a", "b", "c"])

    whole, rare, absent = macro_f1([0, 1, 2] * 5), macro_f1([0, 1] * 5 + [2] * 4), macro_f1([0, 1] * 7)
    assert whole.low is not None and whole.high is not None and not whole.note
    assert whole.value is not None and whole.low <= whole.value <= whole.high
    assert (rare.low, rare.high, rare.note) == (
        None,
        None,
        "labels that are the gold of fewer than 5 users: 1; no interval",
    )
    assert (absent.low, absent.note) == (None, "labels without a gold here, which count 0: 1 of 3; no interval")


NASTY = st.one_of(
    st.sampled_from(["", " ", "\0", "\n[1]", "[1]\u200b", "[ 1 ]", "COMEDY", "comedy ", "sci-fi\n", "sports", "nan", "-inf",
                     "Infinity", "1e400", "-1e308", "1e154", "1_0", "0x5", "٣", "５", "4,5", "5.0", " 3 ", "0", "99", "-0.0",
                     "None", "True", "5 stars", "<s>", "{}", "ﬁve", "½", "🙂", "it's [2]", "1.", ".5", "+4", "1e0"]),
    st.text(max_size=12),
)  # fmt: skip
"""Answers made to break a parse."""


def graded(task: Lamp, answers: list[tuple[str, str]]) -> dict[str, Metric]:
    samples = [
        Sample(str(i), f"u{i % 3}", response=answer, targets=(gold,)) for i, (answer, gold) in enumerate(answers)
    ]
    return dict(task.aggregate([task.grade(sample) for sample in samples]))


@given(st.data(), st.sampled_from([Lamp1(), Lamp2M(), Lamp2N()]))
@settings(max_examples=20, deadline=None)
def test_classification_equals_the_official_evaluation_whatever_the_answers(data, task):
    labels = list(LABELS[task.name])
    pairs = data.draw(
        st.lists(st.tuples(NASTY | st.sampled_from(labels), st.sampled_from(labels)), min_size=1, max_size=40)
    )
    number = [
        [labels.index(t) if (t := text.strip()) in labels else -1 for text in side] for side in zip(*pairs, strict=True)
    ]
    answers, golds = number
    result = graded(task, pairs)
    assert result["accuracy"].value == pytest.approx(accuracy_score(golds, answers), abs=1e-12)
    expected = f1_score(golds, answers, labels=range(len(labels)), average="macro", zero_division=0)
    assert result["f1"].value == pytest.approx(expected, abs=1e-12)
    unparsed = answers.count(-1)
    assert (f"{unparsed} of {len(pairs)} unparsed" in result["accuracy"].note) == (unparsed > 0)


@given(st.lists(st.tuples(NASTY, st.sampled_from("12345")), min_size=1, max_size=40))
@example([("", "1"), ("1E100", "1")])
@settings(max_examples=30, deadline=None)
def test_ratings_equal_the_official_evaluation_and_what_breaks_it_is_counted(pairs):
    def official(text: str, gold: float) -> float:
        try:
            return float(text.strip())
        except ValueError:
            return 1.0 if abs(1 - gold) > abs(5 - gold) else 5.0

    golds = [float(gold) for _, gold in pairs]
    answers = [official(text, gold) for (text, _), gold in zip(pairs, golds, strict=True)]
    broken = [not abs(answer) <= 1e150 for answer in answers]  # nan, inf, and squares that are no number
    answers = [official("", gold) if bad else a for a, gold, bad in zip(answers, golds, broken, strict=True)]
    result = graded(Lamp3(), pairs)
    assert result["mae"].value == pytest.approx(mean_absolute_error(golds, answers), rel=1e-12)
    assert result["rmse"].value == pytest.approx(root_mean_squared_error(golds, answers), rel=1e-12)
    strange = sum(not 1 <= answer <= 5 for answer in answers)
    assert (f"{strange} outside 1 to 5" in result["mae"].note) == (strange > 0)
    unparsed = sum(metrics.parse_rating(text) is None for text, _ in pairs)
    assert (f"{unparsed} of {len(pairs)} unparsed" in result["rmse"].note) == (unparsed > 0)
    lenient = result["mae_lenient"].value
    assert lenient is not None
    assert 0 <= lenient <= 4


@given(st.lists(st.tuples(NASTY, NASTY.filter(str.strip)), min_size=1, max_size=8))
@settings(max_examples=12, deadline=None)
def test_rouge_is_the_plain_mean_of_rouge_scores_whatever_the_answers(pairs):
    scorer = RougeScorer(["rouge1", "rougeL"], use_stemmer=False)
    scores = [scorer.score(gold.strip(), answer.strip()) for answer, gold in pairs]
    result = graded(Lamp4(), pairs)
    for name in ("rouge1", "rougeL"):
        assert result[name].value == pytest.approx(
            sum(score[name].fmeasure for score in scores) / len(pairs), abs=1e-12
        )


def test_rouge_equals_rouge_score_without_stemming():
    response, target = "The cats were running home fast", "the cat runs home, fast"
    expected = RougeScorer(["rouge1", "rougeL"], use_stemmer=False).score(target, response)
    assert metrics.rouge(response, target) == (expected["rouge1"].fmeasure, expected["rougeL"].fmeasure)
    assert metrics.rouge("猫が走る", "猫が走る") == (0, 0)


def sample(user: str, **numbers: float | None) -> Sample:
    return Sample("i", user, metrics=numbers)


def test_a_mean_has_its_interval_over_users_and_a_root_is_taken_after_it():
    samples = [sample(str(i % 5), error=float(i)) for i in range(10)]
    metric = metrics.mean(samples, "error", root=True)
    assert metric.value == pytest.approx(math.sqrt(4.5))
    assert metric.n == 10
    assert metric.low is not None
    assert metric.high is not None
    assert metric.low < math.sqrt(4.5) < metric.high


def test_what_cannot_be_known_is_missing_and_not_nan():
    assert metrics.mean([], "x").value is None
    assert metrics.mean([sample("a", x=1.0), sample("a", x=2.0)], "x").low is None
    partly = metrics.mean([sample("a", x=1.0), sample("b", x=None)], "x", missing="no x: fetch x")
    assert (partly.value, partly.n, partly.note) == (None, 1, "no x: fetch x")


SENTENCES = [
    "One sentence", "Ends with a stop.", 'He said "wow!" and left', "What? Yes! No...", "U.S. troops leave",
    "Dr. Who arrives. He stays.", "wait.. what", "it's 5.30 a.m. now", "(Done.) Next", "", "a , b", "1. 2. 3. go",
    "Mr. & Mrs. X... again?! ok", "can't gonna won't.", 'End."Start', "so cool!! :) @me #tag",
]  # fmt: skip


@pytest.mark.parametrize("text", SENTENCES)
def test_a_text_that_needs_no_punkt_has_the_same_words_however_it_is_split(text):
    class AnySplit(PunktSentenceTokenizer):
        def text_contains_sentbreak(self, text):
            return choice.random() < 0.5

    split = metrics.tokenise(text).split
    if split is None:
        assert metrics.tokenise(text).unsplit
        return
    for seed in range(10):
        choice = random.Random(seed)
        assert [word for part in AnySplit().tokenize(text) for word in NLTKWordTokenizer().tokenize(part)] == split


def test_a_stop_inside_a_text_needs_punkt_and_other_sentence_ends_do_not(monkeypatch):
    def no_punkt(text):
        raise LookupError("punkt_tab")

    monkeypatch.setattr("nltk.tokenize.word_tokenize", no_punkt)
    assert metrics.tokenise("Gone. Now what").split is None
    assert metrics.tokenise("Gone! Now what?").split == ["Gone", "!", "Now", "what", "?"]


def test_without_wordnet_meteor_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setattr(metrics, "_DEBIAN_WORDNET", tmp_path)
    monkeypatch.setattr("nltk.data.path", [str(tmp_path)])
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path))
    metrics._wordnet.cache_clear()
    try:
        assert metrics.meteor("a", "a") == (None, None)
        assert metrics.wordnet_missing().startswith("METEOR needs WordNet; 'harness data get wordnet' gets it")
    finally:
        metrics._wordnet.cache_clear()


def test_meteor_equals_nltks_with_synonyms():
    if metrics.wordnet_missing():
        pytest.skip(metrics.wordnet_missing())
    target, response = "The large dog ran across a field.", "a big hound is running over the fields"
    reference, hypothesis = NLTKWordTokenizer().tokenize(target), response.split()
    score = metrics.meteor(response, target)
    wordnet: Any = metrics._wordnet()
    assert score.split == score.unsplit == single_meteor_score(reference, hypothesis, wordnet=wordnet)
    without: Any = NoSynonyms()
    assert score.split is not None
    assert score.split > single_meteor_score(reference, hypothesis, wordnet=without) > 0


class NoSynonyms:
    def synsets(self, word):
        return []


def test_meteor_equals_nltks_own_with_its_own_wordnet_reader(tmp_path):
    """Debian's WordNet lacks `lexnames`, which nltk's reader opens and METEOR does not use."""
    lexnames = Path(os.environ.get("HARNESS_SHARED", "../shared/data")) / "wordnet_lexnames/lexnames"
    debian = metrics._DEBIAN_WORDNET
    if not lexnames.is_file() or not (debian / "index.sense").is_file():
        pytest.skip(
            f"needs {lexnames} (set HARNESS_SHARED) and {debian} (apt install wordnet-base wordnet-sense-index)"
        )
    folder = tmp_path / "corpora/wordnet"
    folder.mkdir(parents=True)
    for file in [lexnames, *debian.glob("*.exc"), *debian.glob("data.*"), *debian.glob("index.*")]:
        shutil.copyfile(file, folder / file.name)
    words = ["big", "large", "hound", "dog", "dogs", "running", "ran", "quickly", "fast", "a", "the", "home", "house"]
    draw = random.Random(0)
    pairs = [[" ".join(draw.choices(words, k=draw.randint(1, 9))) for _ in "ab"] for _ in range(200)]
    code = (
        "import json, sys; from nltk.translate.meteor_score import meteor_score as score; "
        "print([score([target.split()], answer.split()) for answer, target in json.load(sys.stdin)])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], input=json.dumps(pairs), env={**os.environ, "NLTK_DATA": str(tmp_path)},
        capture_output=True, check=True, text=True,
    )  # fmt: skip
    assert [metrics.meteor(*pair).split for pair in pairs] == json.loads(done.stdout)


def test_meteor_of_several_sentences_is_evaluates_or_missing():
    if metrics.wordnet_missing():
        pytest.skip(metrics.wordnet_missing())
    score = metrics.meteor("It rained. We left", "We left. It rained")
    assert score.unsplit is not None
    if score.split is not None:  # punkt_tab is installed
        words = ["It", "rained", ".", "We", "left"], ["We", "left", ".", "It", "rained"]
        wordnet: Any = metrics._wordnet()
        assert score.split == single_meteor_score(words[1], words[0], wordnet=wordnet)


def test_importing_metrics_loads_no_scoring_library():
    code = "import sys, harness.statistics.metrics; assert not {'torch', 'nltk', 'rouge_score', 'sklearn'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(metrics.__file__).parents[1])
