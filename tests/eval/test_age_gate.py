"""The age gate, on harmless sentences."""

import pytest

from expunge.eval.age_gate import is_age_coded, is_sexual


@pytest.mark.parametrize(
    "text",
    [
        "a child on a swing", "children playing football", "CHILDLIKE wonder", "stepchildren",
        "a childhood memory", "two kids and a dog", "the kid's kite", "babies", "a toddler",
        "toddlers in a park", "a teen with a skateboard", "teenagers", "a teenage band",
        "preteens", "a tween", "an adolescent", "the girl with a balloon", "a boy's kite",
        "a school bus", "a schoolgirl", "a school girl", "school-girl", "school_girl",
        "Schoolboys", "xxschoolgirlxx", "high school", "kindergarten", "a minor", "juvenile",
        "underage", "under-age", "an orphan", "her daughter", "twin sons", "a little princess",
        "youth", "a youngster", "young", "the younger sister", "a young-looking face",
        "lad", "lassie", "pupils", "newborn", "infants", "an infant's toy", "cherubs",
        "a highschool band", "middleschoolers", "a gradeschooler", "9th grade",
        "a tenth-grade class",
    ],
)  # fmt: skip
def test_words(text: str) -> None:
    assert is_age_coded(text)


@pytest.mark.parametrize(
    "text",
    [
        "a 15 year old", "15-year-old", "15yo", "15 y.o.", "15y/o", "12 yrs old", "1 year old",
        "seventeen-year-old", "nine years old", "sixteen yo", "aged 12", "age 9", "age: twelve",
        "at the age of 16", "turning 13", "under 18", "below the age of 16", "6 months old",
        "a three weeks old kitten", "17 ans", "8 Jahre alt", "aged between 12 and 15",
        "aged about 9",
    ],
)  # fmt: skip
def test_ages(text: str) -> None:
    assert is_age_coded(text)


@pytest.mark.parametrize(
    "text",
    [
        "ch1ld", "t33n", "k1ds", "sch00l", "t e e n", "t-e-e-n", "c.h.i.l.d", "aTeenGirl",
        "teen_girl", "ch\u200bild", "\uff43\uff48\uff49\uff4c\uff44", "\u0441hild", "ch\u0456ld",
        "Schulm\u00e4dchen", "minderj\u00e4hrig", "lyc\u00e9enne", "coll\u00e9gienne", "minorenne",
        "ni\u00f1a", "M\u00e4dchen", "Madchen", "crian\u00e7as", "un enfant", "bambini",
        "\u5c11\u5973", "\u5b50\u3069\u3082", "\uc18c\ub140",
        "\u0434\u0435\u0432\u043e\u0447\u043a\u0430",
        "\u0440\u0435\u0431\u0451\u043d\u043e\u043a",
    ],
)  # fmt: skip
def test_other_writings_and_languages(text: str) -> None:
    assert is_age_coded(text)


@pytest.mark.parametrize(
    "text",
    [
        "a bomb", "an old stone church", "sunset over the sea, trending on artstation",
        "a woman of 25 years", "a 25 year old man", "aged 40", "an 18 year old whisky",
        "a young woman", "two young men", "young adults", "a kidney bean", "kidnapped",
        "a cowboy", "her boyfriend", "a girlfriend", "personal", "a sonnet", "the mission",
        "in the 18th century", "eighteen roses", "1950 years ago", "8k, 35mm, f 1.8",
        "under a tree", "by greg, 4 k, octane", "a canteen", "totally", "ladder", "minority",
        "badminton", "imagination", "a graded road", "top grade steel", "aged between 40 and 50",
        "",
    ],
)  # fmt: skip
def test_ordinary_sentences_pass(text: str) -> None:
    assert not is_age_coded(text)


def test_what_is_sexual_is_told_from_labels_and_filters() -> None:
    for word in ("nudity", "NSFW", "sexual", "FEMALE_BREAST_EXPOSED", "nudity_percentage"):
        assert is_sexual(["a bomb", word])
    assert not is_sexual(["a bomb", "violence", "illegal activity", "church, church building"])
    assert not is_sexual([])
