"""The emoji model's objects said otherwise: paraphrases, typos, other languages, category words.

An erasure that reads only the object's own name lets these through. A base model that does not
understand them shows nothing either, so the numbers mean something beside the base's alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib import resources
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

import yaml

from expunge.errors import UserError
from expunge.eval.cases import Case, Plan, Question
from expunge.eval.emoji_prompts import CaseBuilder, Make, Size, in_turn, stable_hash, take_turns
from expunge.eval.emoji_vocabulary import Target, Vocabulary
from expunge.schema import read_yaml

TYPOS = ("swapped", "left out", "doubled", "next key", "digit", "split")
_KEYS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
_DIGITS = {"o": "0", "i": "1", "l": "1", "e": "3", "a": "4", "s": "5", "t": "7", "b": "8", "g": "9"}


@dataclass(frozen=True)
class OtherWords:
    """How an object can be said without its name, and what lies near it.

    Attributes:
        paraphrases: English noun phrases.
        translations: (language, noun phrase) pairs.
        nearest: Other objects, the nearest in the guide's text space first.
    """

    paraphrases: tuple[str, ...]
    translations: tuple[tuple[str, str], ...]
    nearest: tuple[str, ...]


@dataclass(frozen=True)
class WordList:
    """The words of `emoji_words.yaml`.

    Attributes:
        frames: Language -> captions around a noun phrase.
        objects: Object -> its other words.
    """

    frames: dict[str, tuple[str, ...]]
    objects: dict[str, OtherWords]

    @classmethod
    def read(cls, path: Path | None = None) -> WordList:
        """Read a word list; None is the bundled model's.

        Raises:
            UserError: The file is missing or is no word list.
        """
        file = path or Path(str(resources.files("expunge.eval"))) / "emoji_words.yaml"
        try:
            table: dict[str, Any] = read_yaml(file.read_text(encoding="utf-8"))
            return cls(
                frames={language: tuple(rows) for language, rows in table["frames"].items()},
                objects={
                    name: OtherWords(
                        tuple(row["paraphrases"]),
                        tuple(row["translations"].items()),
                        tuple(row["nearest"]),
                    )
                    for name, row in table["objects"].items()
                },
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"got word list {file}; allowed: a YAML file like expunge's emoji_words.yaml; "
                f"{reason}"
            ) from None

    def of(self, name: str) -> OtherWords:
        """The other words for an object.

        Raises:
            UserError: There are none.
        """
        if name not in self.objects:
            raise UserError(
                f"got the object {name}, for which the word list has no words; allowed: "
                f"{', '.join(self.objects)}; or give another list as prompts.words"
            )
        return self.objects[name]


@dataclass(frozen=True)
class EmojiWords:
    """Prompt groups that mean an object of the bundled emoji model and do not spell its name.

    - ``paraphrase``: described in other English words.
    - ``typo``: its name with a slip of the fingers, or a digit for a letter.
    - ``translation``: in German, French, Spanish, Portuguese or Italian.
    - ``implied``: its category word, alone or beside a kept object.
    - ``nearest``: the objects nearest to it in the guide's text space, which must stay.

    A suite has the groups that it gives a size.
    """

    paraphrase: Size | None = None
    typo: Size | None = None
    translation: Size | None = None
    implied: Size | None = None
    nearest: Size | None = None
    seed: int = field(default=0, metadata={"help": "another seed gives other noise everywhere"})
    vocabulary: Path | None = field(
        default=None, metadata={"help": "another model's vocabulary.json; null: the bundled one"}
    )
    sexual: ClassVar[bool] = False  # icons
    words: Path | None = field(
        default=None, metadata={"help": "another vocabulary's word list; null: the bundled one"}
    )

    def __post_init__(self) -> None:
        if not self._sizes():
            raise ValueError(
                "got prompts of type emoji_words without a group; allowed: one or more"
            )

    def _sizes(self) -> dict[str, Size]:
        names = ("paraphrase", "typo", "translation", "implied", "nearest")
        sizes = {name: getattr(self, name) for name in names}
        return {name: size for name, size in sizes.items() if size is not None}

    def plan(self, concept: list[str], limit: int | None = None) -> Plan:
        """The cases for a concept given as texts, at most ``limit`` per group.

        Raises:
            UserError: The vocabulary does not know a text, or it is no object; the limit is not
                positive.
        """
        if limit is not None and limit < 1:
            raise UserError(f"got limit {limit}; allowed: a positive number of pictures per group")
        vocabulary = Vocabulary.read(self.vocabulary)
        targets = vocabulary.resolve(concept)
        for target in targets:
            if target.kind != "object":
                raise UserError(
                    f"got the {target.kind} {target.name} for a suite of other words for objects; "
                    "allowed: objects; or another suite"
                )
        builder = _Builder(vocabulary, targets, self.seed, WordList.read(self.words))
        cases = chain.from_iterable(
            take_turns(builder.units(group), size.of(len(targets), limit))
            for group, size in self._sizes().items()
        )
        return builder.plan(concept, cases)


class _Builder(CaseBuilder):
    """Makes the k-th case of every target of every group."""

    def __init__(
        self, vocabulary: Vocabulary, targets: tuple[Target, ...], seed: int, others: WordList
    ) -> None:
        super().__init__(vocabulary, targets, seed)
        self.others_of = others.of
        self.frames = others.frames
        named = (vocabulary.phrases.values(), vocabulary.category_phrases.values())
        self.known = {word for phrases in named for phrase in phrases for word in phrase.split()}
        self.known |= {*vocabulary.styles, *vocabulary.backgrounds}

    def units(self, group: str) -> list[Make]:
        make = {
            "paraphrase": self._paraphrase,
            "typo": self._typo,
            "translation": self._translation,
            "implied": self.implied,
            "nearest": self._nearest,
        }[group]
        return [make(target) for target in self.targets]

    def _paraphrase(self, target: Target) -> Make:
        words = self.others_of(target.name).paraphrases

        def make(k: int) -> Case:
            # Each caption form with each paraphrase: the forms have a period of four.
            text = in_turn(words, f"paraphrase/{target.name}", k // 4)
            prompt = self.caption(text, target.name, k, self.styles)
            return self._said(prompt, "paraphrase", target, k)

        return make

    def _typo(self, target: Target) -> Make:
        def make(k: int) -> Case:
            kind = in_turn(TYPOS, f"typo/{target.name}", k)
            name = misspelt(target.name, kind, (target.name, k), self.known)
            text = target.phrase.replace(target.name, name)
            prompt = self.caption(text, target.name, k, self.styles)
            return self._said(prompt, "typo", target, k)

        return make

    def _translation(self, target: Target) -> Make:
        pairs = dict(self.others_of(target.name).translations)

        def make(k: int) -> Case:
            language = in_turn(list(pairs), f"translation/{target.name}", k)
            frame = in_turn(self.frames[language], f"{target.name}/{language}", k // len(pairs))
            return self._said(frame.format(pairs[language]), "translation", target, k)

        return make

    def _nearest(self, target: Target) -> Make:
        names = [n for n in self.others_of(target.name).nearest if n not in self.erased]

        def make(k: int) -> Case:
            name = names[k % len(names)]
            prompt = self.caption(
                self.words.phrases[name], f"{target.name}/{name}", k // len(names), self.styles
            )
            asked = Question("nearest_kept", (f"object/{name}",))
            return self.case(prompt, "nearest", f"{name} ({target.name})", k, asked)

        return make

    def _said(self, prompt: str, group: str, target: Target, k: int) -> Case:
        asked = self.asks_erased(f"{group}_target_seen", target)
        return self.case(prompt, group, target.name, k, asked)


def misspelt(name: str, kind: str, salt: object, known: set[str]) -> str:
    """A name with one slip of the given kind, at a place that the salt decides.

    Where the kind cannot be done, or would spell a known word, the next place or kind is taken.
    """
    start = TYPOS.index(kind)
    for turn in range(len(TYPOS)):
        now = TYPOS[(start + turn) % len(TYPOS)]
        places = sorted(range(len(name)), key=lambda i: stable_hash(salt, now, i))
        for i in places:
            slip = _slip(name, now, i)
            if (
                slip is not None
                and slip != name
                and not known & set(slip.split()) - set(name.split())
            ):
                return slip
    raise ValueError(f"got {name!r}, which cannot be misspelt; allowed: a word of letters")


def _slip(name: str, kind: str, i: int) -> str | None:
    before, letter, after = name[:i], name[i], name[i + 1 :]
    if not letter.isalpha():
        return None
    if kind == "swapped":
        return before + after[0] + letter + after[1:] if after[:1].isalpha() else None
    if kind == "left out":
        return before + after
    if kind == "doubled":
        return before + letter + letter + after
    if kind == "digit":
        return before + _DIGITS[letter] + after if letter in _DIGITS else None
    if kind == "split":
        return f"{before} {letter}{after}" if before[-1:].isalpha() else None
    row = next((keys for keys in _KEYS if letter in keys), letter)
    place = row.index(letter)
    beside = row[place + 1 : place + 2] or row[place - 1]
    return before + beside + after
