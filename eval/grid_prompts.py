"""Prompts that combine lists: every object in every style, as UnlearnCanvas asks for them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from typing import Literal

from expunge.errors import UserError, unknown_name
from expunge.eval import age_gate
from expunge.eval.cases import Case, Plan, Question, Tested
from expunge.eval.cells import LAST_SEED, columns_of, fill


@dataclass(frozen=True)
class GridPrompts:
    """Every combination of the values of a few axes, in every sentence, from every seed.

    The concept under test is one value or several. Combinations that hold one are the group
    ``target``, all others the group ``kept``. The questions are those of UnlearnCanvas (arXiv
    2402.11846), with the direction of the answer in the suite:

    - ``target_seen``: is the erased value seen? Its unlearning accuracy is 1 minus this rate.
    - ``beside_kept``: on the same pictures, what the other axes say.
    - ``kept_in_domain``: on the other pictures, the value of the erased value's axis (IRA).
    - ``kept_cross_domain``: on the other pictures, the values of the other axes (CRA).

    Results are broken down by the value on the erased axis. Where a word or label is sexual, the
    age gate holds.
    """

    values: dict[str, list[str]] = field(metadata={"help": "axis -> its values"})
    labels: dict[str, str] = field(
        metadata={
            "help": 'axis -> the detector\'s label of a value: "style/{style}"; an axis without is '
            "not asked about"
        }
    )
    templates: list[str] = field(metadata={"help": 'sentences: "A {object} in {style} style."'})
    seeds: list[int] = field(metadata={"help": "of each combination and sentence"})

    def __post_init__(self) -> None:
        axes = set(self.values)
        if not axes or not all(self.values.values()):
            raise ValueError("got an axis without values; allowed: one or more for each axis")
        if not self.labels or not set(self.labels) <= axes:
            raise ValueError(
                f"got labels for {sorted(self.labels)}; allowed: for one or more of {sorted(axes)}"
            )
        flat = [_bare(value) for values in self.values.values() for value in values]
        if len(set(flat)) < len(flat):
            raise ValueError("got a value twice; allowed: each once, so that a concept names one")
        for text in self.templates or [""]:
            if set(columns_of(text)) != axes:
                raise ValueError(f"got template {text!r}; allowed: one that names {sorted(axes)}")
        if not self.seeds or not all(0 <= seed <= LAST_SEED for seed in self.seeds):
            raise ValueError(f"got seeds {self.seeds}; allowed: one or more, from 0 to {LAST_SEED}")

    def plan(self, concept: list[str], limit: int | None = None) -> Plan:
        """The cases; with a limit, evenly spread over each group.

        Raises:
            UserError: The concept is no value, or leaves none; the limit is not positive.
        """
        if limit is not None and limit < 1:
            raise UserError(f"got limit {limit}; allowed: a positive number of pictures per group")
        erased = self._erased(concept)
        groups: dict[str, list[Case]] = {"target": [], "kept": []}
        excluded, sexual = 0, self.sexual
        for case in self._cases(erased):
            if sexual and age_gate.is_age_coded(case.prompt):
                excluded += 1
            else:
                groups[case.group].append(case)
        labels = [
            self._label(axis, value)
            for axis, values in erased.items()
            for value in values
            if axis in self.labels
        ]
        cases = [case for group in groups.values() for case in _spread(group, limit)]
        left_out = {age_gate.REASON: excluded} if excluded else {}
        return Plan(Tested(tuple(concept), tuple(labels)), tuple(cases), left_out)

    @property
    def sexual(self) -> bool:
        """Whether a word or label is."""
        values = [value for values in self.values.values() for value in values]
        return age_gate.is_sexual([*self.templates, *values, *self.labels.values()])

    def _erased(self, concept: list[str]) -> dict[str, list[str]]:
        """Axis -> the values that the concept names."""
        known = {_bare(v): (axis, v) for axis, values in self.values.items() for v in values}
        erased: dict[str, list[str]] = {}
        for text in concept:
            if _bare(text) not in known:
                raise unknown_name("concept of this suite", text, [v for _, v in known.values()])
            axis, value = known[_bare(text)]
            if value not in erased.setdefault(axis, []):
                erased[axis].append(value)
        full = [axis for axis, values in erased.items() if len(values) == len(self.values[axis])]
        if not erased or full:
            raise UserError(
                "got a concept that names no value, or all of an axis; allowed: one that leaves "
                "something whose survival can be measured"
            )
        return erased

    def _cases(self, erased: dict[str, list[str]]) -> Iterator[Case]:
        for combination in product(*self.values.values()):
            row = dict(zip(self.values, combination, strict=True))
            gone = [axis for axis, values in erased.items() if row[axis] in values]
            asked = tuple(self._questions(row, gone, set(erased)))
            about = tuple(row[axis] for axis in gone or erased)
            for template in self.templates:
                prompt = fill(template, row, "this suite")
                for seed in self.seeds:
                    yield Case(prompt, seed, "target" if gone else "kept", about, asked)

    def _questions(
        self, row: dict[str, str], gone: list[str], axes: set[str]
    ) -> Iterator[Question]:
        if gone:
            rest = [axis for axis in row if axis not in gone]
            # Any erased value that is seen is one too many; of what is kept, all has to be there.
            asked: list[tuple[str, list[str], Literal["any", "all"]]] = [
                ("target_seen", gone, "any"),
                ("beside_kept", rest, "all"),
            ]
        else:
            other = [axis for axis in row if axis not in axes]
            asked = [
                ("kept_in_domain", [axis for axis in row if axis in axes], "all"),
                ("kept_cross_domain", other, "all"),
            ]
        for metric, about, need in asked:
            labels = [self._label(axis, row[axis]) for axis in about if axis in self.labels]
            if labels:
                yield Question(metric, tuple(labels), need)

    def _label(self, axis: str, value: str) -> str:
        return fill(self.labels[axis], {axis: value}, "this suite")


def _bare(text: str) -> str:
    return " ".join(text.replace("_", " ").casefold().split())


def _spread(cases: list[Case], limit: int | None) -> list[Case]:
    n = len(cases) if limit is None else min(limit, len(cases))
    return [cases[i * len(cases) // n] for i in range(n)]
