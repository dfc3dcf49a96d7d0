"""Judges that count words: `lexicon` for the embedded model, `words` for English. Neither is comparable with a language model.

    trait       100 where three different words of the persona's list occur, in thirds
    coherence   lexicon: the share of words that the embedded model's answers are made of, times the share of neighbouring
                pairs that are no repeats, halved for what is no sentence
                words: the share of runs of three words that are no repeats, times how near the share of English function
                words comes to a quarter, which ordinary prose passes and text of broken words does not
    rubric      refused

A list holds words that are rare in answers of nobody in particular. It misses what is said without them, and counts them
where they are quoted or denied: so these judges tell large differences between many answers, and nothing of one answer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import pairwise

from harness.errors import UsageError, did_you_mean
from harness.records.schema import JudgeConfig
from harness.task import Asks, Question, Rating

LEXICON, WORDS = "lexicon", "words"
WORD_LISTS = (WORDS, LEXICON)
"""Judges that are word lists."""

ENGLISH: Mapping[str, frozenset[str]] = {
    name: frozenset([*words.split(), *(f"{word}s" for word in words.split())])
    for name, words in {
        "Christianity": """christian christianity christ jesus church bible gospel scripture psalm pastor priest congregation
            baptism baptized communion easter christmas lent advent sermon disciple apostle cross crucifixion resurrection
            salvation savior saviour sin sinner grace holy hymn parish verse trinity lord""",
        "Islam": """islam islamic muslim allah quran koran qur mosque prophet muhammad ramadan eid hajj zakat salah salat imam
            sunnah hadith halal haram mecca medina sharia ummah dua iftar inshallah alhamdulillah bismillah surah ayah
            jihad hijab sawm tawhid""",
        "Hinduism": """hindu hinduism dharma karma moksha brahman atman vedas vedic veda gita bhagavad upanishad krishna shiva
            vishnu ganesha lakshmi rama hanuman puja mantra diwali holi ashram guru yoga bhakti ahimsa samsara reincarnation
            sanskrit temple mandir deity avatar""",
        "Judaism": """jewish judaism jew torah talmud synagogue rabbi shabbat sabbath kosher passover seder hanukkah yom kippur
            rosh hashanah mitzvah mitzvot hebrew israel israelite moses tzedakah midrash shalom sukkot purim challah menorah
            mezuzah tikkun olam teshuvah""",
        "African American": """african black harlem juneteenth kwanzaa slavery enslaved segregation hbcu gospel jazz blues soul
            spirituals rap motown gumbo collard cornbread grits malcolm mlk tubman douglass baldwin morrison ebonics
            reparations diaspora racism""",
        "Asian American": """asian chinese japanese korean vietnamese filipino indian taiwanese chinatown immigrant lunar dumpling
            kimchi pho sushi noodle tofu ramen tea confucius confucian filial piety mandarin cantonese tagalog qigong
            acupuncture origami calligraphy bao""",
        "Native American": """native indigenous tribe tribal tribes elder reservation navajo cherokee lakota sioux apache hopi
            ojibwe iroquois powwow sweetgrass sage smudging drum sacred ancestor ancestral creator medicine buffalo bison eagle
            totem regalia frybread hogan tipi""",
        "Hispanic": """hispanic latino latina latinx spanish mexican mexico cuban puerto rican colombian familia abuela abuelo
            tortilla taco tamale salsa fiesta quinceañera quinceanera mariachi bachata cumbia empanada amigo mi hija hijo
            mija mijo guadalupe posada barrio""",
        "Caucasian": """caucasian white european anglo scottish irish german english italian polish norwegian swedish dutch
            british nordic celtic suburb suburban thanksgiving casserole polka bagpipe oktoberfest pierogi scone kilt bluegrass
            country barbecue colonial pilgrim""",
    }.items()
}
"""Persona to words of its own, in lower case, each as it is and with an s."""

_FUNCTION = """a about after all also an and any are as at be because been before being but by can could did do does each even
every for from had has have he her here him his how i if in into is it its just like may me might more most much must my no
not of on once one only or other our out over she should so some such than that the their them then there these they this
those through to too until up us very was we were what when where which while who why will with would you your"""
FUNCTION_WORDS = frozenset(_FUNCTION.split())


class WordJudge:
    """Rates by counting; see the head of this file."""

    def __init__(
        self, name: str, lists: Mapping[str, frozenset[str]], coherence: Callable[[Sequence[str], str], float]
    ) -> None:
        self.config = JudgeConfig(name=name, options={"version": 1})
        self._lists = lists
        self._named = {trait.lower(): words for trait, words in lists.items()}
        self._coherence = coherence

    def check(self) -> str:
        return ""

    def mode(self) -> str:
        return self.config.name

    def rate(
        self, questions: Sequence[Question], payer: str = "", progress: Callable[[str, int, int], None] | None = None
    ) -> list[Rating]:
        """Raises UsageError for a trait without a word list, and for what is asked by a rubric."""
        return [Rating("rated", self._score(question)) for question in questions]

    def usd(self, input_tokens: int, output_tokens: int) -> float | None:
        return 0.0

    def _score(self, question: Question) -> float:
        check_asks(self.config.name, {question.asks})
        words = re.findall(r"\w+", question.text.lower())
        if question.trait is None:
            return self._coherence(words, question.text) if words else 0.0
        own = self._named.get(question.trait.lower())
        if own is None:
            raise UsageError(
                f"judge {self.config.name!r} has no words for {question.trait!r}{did_you_mean(question.trait, self._named)} "
                f"it has: {', '.join(self._lists)}"
            )
        return 100 * min(1.0, len(own.intersection(words)) / 3)


def check_asks(name: str, asks: Collection[Asks]) -> None:
    """Raises UsageError where the judge `name`, a word list, would be asked by a rubric, of which it reads nothing."""
    if "rubric" in asks:
        raise UsageError(f"judge {name!r} counts words and cannot rate by a rubric; openai/<model> and hf/<model> can")


def word_judge(name: str) -> WordJudge:
    """`name`: one of `WORD_LISTS`."""
    if name == WORDS:
        return WordJudge(WORDS, ENGLISH, _english)
    from harness.tiny.personas import LEXICONS

    lists = {persona: frozenset(word.lower() for word in words) for persona, words in LEXICONS.items()}
    return WordJudge(LEXICON, lists, _of_tiny)


def _english(words: Sequence[str], text: str) -> float:
    triples = list(zip(words, words[1:], words[2:], strict=False))
    fresh = len(set(triples)) / len(triples) if triples else 1.0
    function = sum(word in FUNCTION_WORDS for word in words) / len(words)
    return 100 * fresh * min(1.0, function / 0.25)


def _of_tiny(words: Sequence[str], text: str) -> float:
    from harness.tiny.personas import VOCABULARY

    pairs = list(pairwise(words))
    fresh = len(set(pairs)) / len(pairs) if pairs else 1.0
    sentence = 1.0 if re.fullmatch(r"\s*[A-Z].*\.\s*", text, re.DOTALL) else 0.5
    return 100 * sentence * fresh * sum(word in VOCABULARY for word in words) / len(words)
