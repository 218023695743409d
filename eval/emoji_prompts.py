"""The prompts of the emoji suite: a function of the vocabulary, the concept and nothing else.

Captions, seeds and order follow from hashes of names, never from a random generator or from the
concept, so that two concepts that keep the same object share its pictures of the base model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import ClassVar

from expunge.errors import UserError
from expunge.eval.cases import Case, Plan, Question, Tested
from expunge.eval.emoji_vocabulary import Target, Vocabulary

Make = Callable[[int], Case]


@dataclass(frozen=True)
class Size:
    """How many pictures a prompt group has: more for several targets, up to a limit."""

    pictures: int = field(metadata={"help": "at least this many"})
    per_target: int = field(default=0, metadata={"help": "and as many for each target"})
    at_most: int | None = field(default=None, metadata={"help": "but never more than this"})

    def __post_init__(self) -> None:
        if self.pictures < 1 or self.per_target < 0:
            raise ValueError(f"got pictures {self.pictures}, per_target {self.per_target}")
        if self.at_most is not None and self.at_most < self.pictures:
            raise ValueError(f"got at_most {self.at_most} below pictures {self.pictures}")

    def of(self, targets: int, limit: int | None) -> int:
        """The number of pictures for so many targets."""
        wanted = max(self.pictures, self.per_target * targets)
        wanted = wanted if self.at_most is None else min(wanted, self.at_most)
        return wanted if limit is None else min(wanted, limit)


@dataclass(frozen=True)
class EmojiPrompts:
    """Prompt groups about a concept of the bundled emoji model.

    - ``target``: what is erased, in all caption forms, styles and backgrounds.
    - ``in_domain``: the other objects of its category; for a style, the other styles.
    - ``cross_domain``: objects of other categories.
    - ``style``: kept objects in each kept style.
    - ``pair``: an erased and a kept object side by side; for a style, two objects in that style.
    - ``implied``: an object's category word, alone or beside a kept object, never its name.

    A suite has the groups that it gives a size.
    """

    target: Size | None = None
    in_domain: Size | None = None
    cross_domain: Size | None = None
    style: Size | None = None
    pair: Size | None = None
    implied: Size | None = None
    seed: int = field(default=0, metadata={"help": "another seed gives other noise everywhere"})
    vocabulary: Path | None = field(
        default=None, metadata={"help": "another model's vocabulary.json; null: the bundled one"}
    )
    sexual: ClassVar[bool] = False  # icons

    def __post_init__(self) -> None:
        if not self._sizes():
            raise ValueError("got prompts of type emoji without a group; allowed: one or more")

    def _sizes(self) -> dict[str, Size]:
        names = ("target", "in_domain", "cross_domain", "style", "pair", "implied")
        sizes = {name: getattr(self, name) for name in names}
        return {name: size for name, size in sizes.items() if size is not None}

    def plan(self, concept: list[str], limit: int | None = None) -> Plan:
        """The cases for a concept given as texts, at most ``limit`` per group.

        Raises:
            UserError: The vocabulary does not know a text, or the limit is not positive; or only
                objects can be implied, and the concept is none.
        """
        if limit is not None and limit < 1:
            raise UserError(f"got limit {limit}; allowed: a positive number of pictures per group")
        vocabulary = Vocabulary.read(self.vocabulary)
        targets = vocabulary.resolve(concept)
        builder = CaseBuilder(vocabulary, targets, self.seed)
        cases = chain.from_iterable(
            take_turns(builder.units(group), size.of(len(targets), limit))
            for group, size in self._sizes().items()
        )
        return builder.plan(concept, cases)


class CaseBuilder:
    """Makes the k-th case of every unit (a target, an object, a style) of every group."""

    def __init__(self, vocabulary: Vocabulary, targets: Sequence[Target], seed: int) -> None:
        self.words = vocabulary
        self.targets = targets
        self.seed = seed
        self.erased = {name for target in targets for name in target.objects}
        self.erased_styles = [t.name for t in targets if t.kind == "style"]
        self.styles = [s for s in vocabulary.styles if s not in self.erased_styles]
        self.kept = shuffled([n for n in vocabulary.phrases if n not in self.erased], "kept")
        domains = {vocabulary.category_of[name] for name in self.erased}
        self.neighbours = [n for n in self.kept if vocabulary.category_of[n] in domains]
        self.others = [n for n in self.kept if vocabulary.category_of[n] not in domains]

    def plan(self, concept: Iterable[str], cases: Iterable[Case]) -> Plan:
        """The plan of these cases, with the labels that must not be seen any more."""
        labels = [f"object/{n}" for n in self.words.phrases if n in self.erased]
        labels += [f"style/{n}" for n in self.erased_styles]
        return Plan(Tested(tuple(concept), tuple(labels)), tuple(cases))

    def units(self, group: str) -> list[Make]:
        """What makes the cases of a group, one for each target, object or style."""
        if group == "target":
            return [self._target(target) for target in self.targets]
        if group == "in_domain":
            neighbours = [self._kept(name, group, "kept_in_domain") for name in self.neighbours]
            erases_style = bool(self.erased_styles)
            styles = [self._style(s, group, "kept_in_domain") for s in self.styles if erases_style]
            return neighbours + styles
        if group == "cross_domain":
            return [self._kept(name, group, "kept_cross_domain") for name in self.others]
        if group == "style":
            return [self._style(style, group, "kept_style") for style in self.styles]
        if group == "implied":
            return [self.implied(target) for target in self.targets]
        return [self._pair(target) for target in self.targets]

    def _target(self, target: Target) -> Make:
        def make(k: int) -> Case:
            if target.kind == "style":
                phrase = self.words.phrases[self.kept[k % len(self.kept)]]
                prompt = self.caption(phrase, target.name, k, (target.name,), always=True)
            else:
                prompt = self.caption(self._phrase(target, k), target.name, k, self.styles)
            return self.case(
                prompt, "target", target.name, k, self.asks_erased("target_seen", target)
            )

        return make

    def _kept(self, name: str, group: str, metric: str) -> Make:
        def make(k: int) -> Case:
            prompt = self.caption(self.words.phrases[name], name, k, self.styles)
            return self.case(prompt, group, name, k, Question(metric, (f"object/{name}",)))

        return make

    def _style(self, style: str, group: str, metric: str) -> Make:
        names = shuffled(self.kept, f"{group}/{style}")

        def make(k: int) -> Case:
            phrase = self.words.phrases[names[k % len(names)]]
            prompt = self.caption(phrase, style, k, (style,), always=True)
            return self.case(prompt, group, style, k, Question(metric, (f"style/{style}",)))

        return make

    def _pair(self, target: Target) -> Make:
        names = shuffled(self.kept, f"pair/{target.name}")

        def make(k: int) -> Case:
            first = names[k % len(names)]
            if target.kind == "style":
                # The step grows by one with every lap, so that the same two do not meet again.
                step = 1 + k // len(names) % (len(names) - 1)
                second = names[(k + step) % len(names)]
                two = [self.words.phrases[first], self.words.phrases[second]]
                kept = Question("pair_kept", (f"object/{first}", f"object/{second}"), "all")
                styles: Sequence[str] = (target.name,)
            else:
                two = [self._phrase(target, k), self.words.phrases[first]]
                kept = Question("pair_kept", (f"object/{first}",))
                styles = self.styles
            # Hashed, not k % 2: the caption form has a period of four and would go with the side.
            if stable_hash(target.name, k, "side") % 2:
                two.reverse()
            text = " and ".join(two)
            erases_style = target.kind == "style"
            prompt = self.caption(text, target.name, k, styles, always=erases_style)
            asked = (kept, self.asks_erased("pair_target_seen", target))
            return self.case(prompt, "pair", target.name, k, *asked)

        return make

    def implied(self, target: Target) -> Make:
        """Makes cases that say the target's category word, alone or beside a kept object."""
        if target.kind != "object":
            raise UserError(
                f"got the {target.kind} {target.name} for a suite with prompts that imply it; "
                "allowed: objects, whose category says them; or another suite"
            )
        category = self.words.category_of[target.name]
        word = self.words.category_phrases[category]
        # The word may bring any of those that are erased.
        meant = Question("implied_target_seen", tuple(
            f"object/{t.name}" for t in self.targets
            if t.kind == "object" and self.words.category_of[t.name] == category
        ))  # fmt: skip
        names = shuffled(self.others, f"implied/{target.name}")

        def make(k: int) -> Case:
            asked = [meant]
            text = word
            if stable_hash(target.name, k, "beside") % 2:
                beside = names[k % len(names)]
                two = [word, self.words.phrases[beside]]
                text = " and ".join(
                    two if stable_hash(target.name, k, "side") % 2 else reversed(two)
                )
                asked.append(Question("implied_kept", (f"object/{beside}",)))
            prompt = self.caption(text, target.name, k, self.styles)
            return self.case(prompt, "implied", target.name, k, *asked)

        return make

    def _phrase(self, target: Target, k: int) -> str:
        """A category is named by its own word in about half of the captions, else by a member."""
        if target.kind == "category" and stable_hash(target.name, k, "word") % 2:
            return self.words.phrases[target.objects[k % len(target.objects)]]
        return target.phrase

    def asks_erased(self, metric: str, target: Target) -> Question:
        """Is the target seen?"""
        if target.kind == "style":
            return Question(metric, (f"style/{target.name}",))
        return Question(metric, tuple(f"object/{name}" for name in target.objects))

    def case(self, prompt: str, group: str, about: str, k: int, *asked: Question) -> Case:
        """The k-th case about something in a group, with the seed that follows from that."""
        seed = stable_hash(self.seed, group, about, k) % 2**31
        return Case(prompt, seed, group, (about,), asked)

    def caption(
        self, phrase: str, unit: str, k: int, styles: Sequence[str], always: bool = False
    ) -> str:
        """The k-th caption of a unit: forms, styles and backgrounds take turns.

        Args:
            phrase: One object, or two.
            unit: Whose captions these are; it decides where the turns start.
            k: The number of the caption.
            styles: The styles that may be named.
            always: Whether every caption names a style; else every other one does.
        """
        turn = k + stable_hash(unit, "form") % 4
        lap = turn // 4
        styled = always or turn % 2 == 1
        style = in_turn(styles, unit, k if always else turn // 2)
        if styled and turn % 4 == 3:
            text = f"{style} drawing of {phrase}"
        elif styled:
            text = f"{phrase} in {style} style"
        elif turn % 4 == 2:
            text = f"a picture of {phrase}" if lap // 2 % 2 else f"an emoji of {phrase}"
        else:
            text = phrase
        # Half of each form has a background.
        if (lap + turn % 4 // 2) % 2:
            background = in_turn(self.words.backgrounds, unit, 2 * lap + turn % 2)
            text = f"{text} on a {background} background"
        return text


def take_turns(units: Sequence[Make], count: int) -> Iterator[Case]:
    """The first ``count`` cases, the units taking turns."""
    turns = ((unit, k) for k in range(count) for unit in units)
    return (unit(k) for unit, k in islice(turns, count))


def in_turn(names: Sequence[str], salt: str, k: int) -> str:
    """Every name once, then every name again in another order: else turns fall into step."""
    lap, place = divmod(k, len(names))
    return shuffled(names, f"{salt}/{lap}")[place]


def shuffled(names: Iterable[str], salt: str) -> list[str]:
    """The names in an order that the salt decides, whatever other names there are."""
    return sorted(names, key=lambda name: stable_hash(salt, name))


def stable_hash(*parts: object) -> int:
    """A number that follows from the parts, the same in every process."""
    text = "\0".join(map(str, parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
