"""A concept: what is to be erased, in words, and what must stay."""

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

from expunge.errors import UserError


@dataclass(frozen=True)
class Concept:
    """What is to be erased, as data.

    Attributes:
        name: What people call it; the first target when empty.
        targets: Texts that stand for the concept ("a bomb"); several are erased at once.
        templates: Sentences in which the targets are erased; ``{}`` is the target's place.
        anchor: The prompt that the concept is mapped to by objectives that have one.
        anchors: Of each target its own, in their order; default: `anchor` for all.
        neutral: The prompt of the unconditional prediction.
        preserve: Prompts that must stay as they are.
        tokens: Files of soft tokens (`expunge feedback`, or any textual inversion as safetensors),
            whose names, say ``<bomb>``, may then stand in all of these texts.
        images: A folder of pictures that show it, for latents (`noised`) and densities
            (`clip_images`) that name no folder of their own. What is read are still the texts.
    """

    name: str = ""
    targets: list[str] = field(default_factory=list)
    templates: list[str] = field(default_factory=lambda: ["{}"])
    anchor: str = ""
    anchors: list[str] = field(default_factory=list)
    neutral: str = ""
    preserve: list[str] = field(default_factory=list)
    tokens: list[str] = field(default_factory=list)
    images: str = ""

    def __post_init__(self) -> None:
        if not self.targets or not all(target.strip() for target in self.targets):
            raise UserError(
                f"got targets {self.targets}; allowed: one text or more, none of them empty; "
                "say for example --concept.targets '[\"a bomb\"]'"
            )
        if not self.templates or not all(t.count("{}") == 1 for t in self.templates):
            raise UserError(
                f"got templates {self.templates}; allowed: one text or more, each with one {{}}"
            )
        if self.anchors and len(self.anchors) != len(self.targets):
            raise UserError(
                f"got {len(self.anchors)} anchors of {len(self.targets)} targets; allowed: one for "
                "each target in their order, or none; say concept.anchor for one that suits all"
            )
        if not self.name:
            object.__setattr__(self, "name", self.targets[0])

    def prompts(self) -> list[str]:
        """Every target in every template."""
        return [t.replace("{}", target) for target in self.targets for t in self.templates]

    def anchor_of(self, target: str) -> str:
        """What a target is mapped to."""
        return self.anchors[self.targets.index(target)] if self.anchors else self.anchor

    def joined(self) -> "Concept":
        """All targets as one, and as its anchor theirs, each once; of one target itself."""
        if len(self.targets) == 1:
            return self
        anchors = dict.fromkeys(filter(None, map(self.anchor_of, self.targets)))
        return replace(
            self, targets=[", ".join(self.targets)], anchor=", ".join(anchors), anchors=[],
            preserve=self.retained(),
        )  # fmt: skip

    def anchored(self, prompt: str) -> str:
        """The prompt with its anchor in the place of every target."""
        return self._replaced(prompt, self.anchor_of)

    def replaced(self, prompt: str, text: str) -> str:
        """The prompt with a text in the place of every target that it names; it may be empty."""
        return self._replaced(prompt, lambda target: text)

    def _replaced(self, prompt: str, by: Callable[[str], str]) -> str:
        longest_first = sorted(self.targets, key=len, reverse=True)
        targets = "|".join(re.escape(target) for target in longest_first)
        found = re.sub(rf"(?<!\w)(?:{targets})(?!\w)", lambda m: by(m.group()), prompt)
        return " ".join(found.split())

    def target_in(self, prompt: str) -> str | None:
        """The target that a prompt names, the longest of several; None where it names none."""
        longest_first = sorted(self.targets, key=len, reverse=True)
        return next((target for target in longest_first if _mentions(prompt, target)), None)

    def retained(self) -> list[str]:
        """The prompts to preserve, less those that name a target: they cannot be both."""
        return list(self._retained)

    @cached_property
    def _retained(self) -> tuple[str, ...]:
        # Every draw of a training asks for them, and each is looked through for every target.
        return tuple(prompt for prompt in self.preserve if not self.mentioned_in(prompt))

    def texts(self) -> list[str]:
        """Every text that a model is to read."""
        return [*self.prompts(), self.anchor, *self.anchors, self.neutral, *self.preserve]

    def in_words(self) -> dict[str, Any]:
        """All of it but `images`, a path, which says nothing elsewhere; as plain values."""
        found = asdict(self)
        del found["images"]
        return found

    def mentioned_in(self, prompt: str) -> bool:
        """Whether the prompt names a target as whole words, with or without its article."""
        return any(_mentions(prompt, target) for target in self.targets)


def soft_names(text: str) -> list[str]:
    """The soft tokens that a text names: what stands between < and >, without a space."""
    return re.findall(r"<[^<>\s]+>", text)


def _mentions(prompt: str, target: str) -> bool:
    bare = re.sub(r"^(an?|the)\s+", "", target.strip(), flags=re.IGNORECASE)
    # Not \b, which finds no border beside a target that ends in "+" or "!".
    return re.search(rf"(?<!\w){re.escape(bare)}(?!\w)", prompt, flags=re.IGNORECASE) is not None
