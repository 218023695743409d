"""The age gate: prompts with age-coded words are never made where pictures may be sexual.

It cannot be switched off. Public prompt lists hold such rows, and attacks on an unerased model
would draw them. A word too many costs a row, which is counted; a word too few must not happen. So
common words with an innocent sense ("minor", "school") are on the list, and so is every writing of
them that a search for prompts may come up with: glued words, digits for letters, spelled letters.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from functools import cache

REASON = "age-coded words"
_ADULT = 18

# Whole words; an English plural or possessive is understood, a hyphen is any separator or none.
_WORDS = """
    babes-in-arms baby babies bambina bambine bambini bambino barely-legal boy boyhood brat cherub
    chica chico crianca elementary enfant fille fillette freshman garcon girl girlhood grader
    infancy infant jailbait junior juvenile kid kiddie kiddo kiddy kinder lad laddie lass lassie
    madchen maedchen menina menino minor neonate nephew newborn niece nina nino nursery offspring
    orphan pigtail puberty pupil putti putto ragazzina ragazzino shota shotacon son stepson tot
    tween tweenager urchin youngling youth youthful
"""

# The beginning of a word, whatever follows: "childlike", "teenaged", "lolita", "schoolgirl".
_BEGINNINGS = """
    adolesc babygirl babyboy child daughter infantil kindergart loli nymphet paedo pedo pubesc
    teen toddler underage under-age underdeveloped youngster
"""

# Anywhere in a word, so that no glued one passes: "stepchildren", "innocentschoolgirl".
_PARTS = """
    adolescen children childhood colegial collegien daughter ecolier kindergarten littlegirl
    littleboy lolicon lolita lyceen minderjahr minorenn preteen pubesc school schulerin schulkind
    schulmad teenage teengirl teenboy toddler underage younggirl youngboy
"""

# In scripts without word boundaries, or with endings that change.
_ELSEWHERE = (
    "少女", "少年", "幼女", "幼児", "幼い", "女児", "男児", "子供", "子ども", "女子高生", "小学生",
    "中学生", "高校生", "ロリ", "ショタ", "女孩", "男孩", "儿童", "兒童", "孩子", "未成年", "萝莉",
    "소녀", "소년", "어린이", "девоч", "мальчи", "ребен", "дети", "детск", "подрост",
    "школьни", "несовершеннолетн",
)  # fmt: skip

_NUMBERS = (
    "zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|thirteen|fourteen|"
    "fifteen|sixteen|seventeen"
)
_SEPARATOR = r"[\W_]*"
_AGE = rf"(?P<{{name}}>\d{{{{1,3}}}}|{_NUMBERS})"
_YEARS = rf"(?:years?|yrs?|yo|y{_SEPARATOR}o|anos|ans|anni|jahre?|jahrig)"
_AGES = re.compile(
    "|".join(
        [
            # "12 year old", "12yo", "twelve-years-old"
            rf"\b{_AGE.format(name='before')}{_SEPARATOR}{_YEARS}(?:\b|old|girl|boy)",
            # "aged 12", "age: twelve", "at the age of 12"
            rf"\b(?:aged?|ages|age of|turning|turns){_SEPARATOR}(?:between|from|about|around|only)?"
            rf"{_SEPARATOR}{_AGE.format(name='after')}\b",
            # "under 18", "below the age of 16"
            rf"\b(?:under|below|less than){_SEPARATOR}(?:the age of )?(?P<below>1?\d|eighteen)\b",
        ]
    )
)
# "9th grade", "tenth grade": whoever is in one is young.
_GRADES = re.compile(
    rf"\b(?:\d{{1,2}}(?:st|nd|rd|th)|first|second|third|fourth|fifth|sixth|seventh|eighth|ninth|"
    rf"tenth|eleventh|twelfth){_SEPARATOR}grade"
)
# Of these, any number of them is young.
_MONTHS = re.compile(r"\b\w+[\W_]*(?:months?|weeks?|days?)[\W_]*olds?\b")
# "young" says little beside a word for grown-ups, and too much without it.
_YOUNG = re.compile(
    r"\byoung(?:er|est|ish|ling|looking)?\b"
    r"(?![\W_]+(?:adults?|wom[ae]n|m[ae]n|lad(?:y|ies)|gentlem[ae]n|couples?)\b)"
)


def _any(words: str) -> str:
    return "|".join(words.replace("-", _SEPARATOR).split())


_PATTERN = re.compile(
    "|".join(
        [
            rf"\b(?:{_any(_WORDS)})(?:'?s)?\b",
            rf"\b(?:{_any(_BEGINNINGS)})",
            _any(_PARTS),
            rf"\bjunior{_SEPARATOR}high",
            r"\b(?:little|small|tiny|wee)[\W_]+(?:girl|boy|one|sister|brother|princess|angel)",
        ]
    )
)
# Digits and Cyrillic and Greek letters that are read as Latin ones.
_LOOKALIKES = str.maketrans("013457@$!|аеосрхуіѕԁһкмтнοαιε", "oieastasilaeocpxyisdhkmthoaie")
_SPELLED = re.compile(r"(?<![^\W_])(?:[^\W\d_][\W_]+){2,}[^\W\d_](?![^\W_])")
_CAMEL = re.compile(r"(?<=[a-z])(?=[A-Z])")
_SEXUAL = re.compile(
    r"nud[ei]|nudity|naked|nsfw|sex|porn|erotic|hentai|explicit|topless|breast|genital|anus|"
    r"buttocks|_exposed|fetish|lewd",
    re.IGNORECASE,
)


def is_age_coded(text: str) -> bool:
    """Whether a text has a word of the list, in any writing, or an age below 18."""
    spaced = _CAMEL.sub(" ", text)
    return any(
        _found(form)
        for writing in dict.fromkeys((text, spaced))
        for plain in [_plain(writing)]
        for form in dict.fromkeys(
            (plain, plain.translate(_LOOKALIKES), _SPELLED.sub(_joined, plain))
        )
    )


def is_sexual(words: Iterable[str]) -> bool:
    """Whether labels, filters or texts are about sexual content, so that the gate must hold."""
    return any(_SEXUAL.search(word) for word in words)


def refuses(prompt: str, sexual: bool) -> bool:
    """Whether a prompt must not be made: it is age-coded, and it or what it is for is sexual."""
    return (sexual or is_sexual([prompt])) and is_age_coded(prompt)


def _found(text: str) -> bool:
    if any(pattern.search(text) for pattern in (_PATTERN, _YOUNG, _MONTHS, _GRADES)):
        return True
    return any(part in text for part in _elsewhere()) or any(
        _young_age(match) for match in _AGES.finditer(text)
    )


@cache
def _elsewhere() -> tuple[str, ...]:
    return tuple(map(_plain, _ELSEWHERE))


def _young_age(match: re.Match[str]) -> bool:
    if match["below"]:
        return True
    said = match["before"] or match["after"]
    return not said.isdigit() or int(said) < _ADULT


def _plain(text: str) -> str:
    """Lower case, wide and joined letters in parts, without accents and invisible characters."""
    decomposed = unicodedata.normalize("NFKD", text.casefold())
    # Mn: accents. Cf: zero-width characters that split a word for a search and not for an eye.
    kept = (c for c in decomposed if unicodedata.category(c) not in ("Mn", "Cf"))
    return "".join(kept).replace("’", "'").replace("_", " ")


def _joined(match: re.Match[str]) -> str:
    """Letters with gaps as the word that they spell: "t e e n" -> "teen"."""
    return re.sub(r"[\W_]+", "", match[0])
