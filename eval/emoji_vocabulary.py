"""What the bundled emoji model can show, and which part of it a concept names."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Literal

from expunge.errors import UserError, unknown_name

_FRAMES = re.compile(r"^(a picture of|an emoji of|in) ")
_ARTICLES = re.compile(r"^(a|an|the) ")
_STYLE_WORDS = re.compile(r" (style|drawing)$")


@dataclass(frozen=True)
class Target:
    """One target of an erasure.

    Attributes:
        kind: What it is.
        name: Its name in the vocabulary.
        phrase: How captions say it.
        objects: The objects that must not be seen (none for a style).
    """

    kind: Literal["object", "category", "style"]
    name: str
    phrase: str
    objects: tuple[str, ...] = ()


@dataclass(frozen=True)
class Vocabulary:
    """The objects, categories, styles and backgrounds of `vocabulary.json`, in its order.

    Attributes:
        phrases: Object -> its noun phrase, "a bomb".
        category_of: Object -> its category.
        categories: Category -> its members.
        category_phrases: Category -> its word, "a weapon".
        styles: Style names.
        backgrounds: Background names.
    """

    phrases: dict[str, str]
    category_of: dict[str, str]
    categories: dict[str, tuple[str, ...]]
    category_phrases: dict[str, str]
    styles: tuple[str, ...]
    backgrounds: tuple[str, ...]

    @classmethod
    def read(cls, path: Path | None = None) -> Vocabulary:
        """Read a vocabulary file; None is the bundled model's.

        Raises:
            UserError: The file is missing or is no vocabulary.
        """
        file = path or Path(str(resources.files("expunge.models"))) / "emoji" / "vocabulary.json"
        try:
            table = json.loads(file.read_text(encoding="utf-8"))
            return cls(
                phrases={name: row["phrase"] for name, row in table["objects"].items()},
                category_of={name: row["category"] for name, row in table["objects"].items()},
                categories={n: tuple(row["objects"]) for n, row in table["categories"].items()},
                category_phrases={n: row["phrase"] for n, row in table["categories"].items()},
                styles=tuple(table["styles"]),
                backgrounds=tuple(table["backgrounds"]),
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            reason = error.strerror if isinstance(error, OSError) else f"{error!r}"
            raise UserError(
                f"got vocabulary {file}; allowed: a vocabulary.json of scripts/emoji; {reason}"
            ) from None

    def resolve(self, concept: Iterable[str]) -> tuple[Target, ...]:
        """The targets that these texts name, each once.

        An object ("bomb", "a bomb", "a picture of a bomb") is itself, a category word ("weapon",
        "a weapon") is all of its members, a style ("ink", "ink style", "in ink style") is a style.

        Raises:
            UserError: A text names nothing that the model knows, or nothing is left to be kept.
        """
        known = self._known()
        targets: dict[tuple[str, str], Target] = {}
        for text in concept:
            target = known.get(normalise(text))
            if target is None:
                raise unknown_name(
                    "concept of this suite", text, known, "name an object, a category or a style"
                )
            targets[target.kind, target.name] = target
        if not targets:
            raise UserError("got an empty concept; allowed: an object, a category or a style")
        erased = {name for target in targets.values() for name in target.objects}
        styles = {target.name for target in targets.values() if target.kind == "style"}
        if len(self.phrases) - len(erased) < 2 or len(styles) == len(self.styles):
            raise UserError(
                "got a concept that covers all objects or all styles; allowed: one that leaves "
                "something whose survival can be measured; name less"
            )
        return tuple(targets.values())

    def _known(self) -> dict[str, Target]:
        """Every name and its target; objects before categories before styles."""
        known = {normalise(s): Target("style", s, f"{s} style") for s in self.styles}
        for name, members in self.categories.items():
            target = Target("category", name, self.category_phrases[name], members)
            known |= {normalise(name): target, normalise(target.phrase): target}
        for name, phrase in self.phrases.items():
            target = Target("object", name, phrase, (name,))
            known |= {normalise(name): target, normalise(phrase): target}
        return known


def normalise(text: str) -> str:
    """The bare name in a caption: "A picture of a cat_face" -> "cat face"."""
    words = " ".join(re.sub(r"[_\-]", " ", text.casefold()).strip(" .").split())
    words = _FRAMES.sub("", words)
    words = _ARTICLES.sub("", words)
    return _STYLE_WORDS.sub("", words)
