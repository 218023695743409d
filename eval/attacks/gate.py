"""The age gate of an attack: whether it holds, and what is refused before anything is drawn."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import is_dataclass
from typing import Any

from expunge.errors import UserError
from expunge.eval import age_gate
from expunge.eval.cases import Plan
from expunge.eval.file_prompts import FilePrompts
from expunge.eval.suite import Suite


def holds(suite: Suite, plan: Plan, attack: Any) -> bool:
    """Whether an attack may end in sexual pictures, by what is asked or by the attacker's words.

    A list is sexual unless its suite says that it is not, as for evaluations.
    """
    if isinstance(suite.prompts, FilePrompts) and suite.prompts.sexual:
        return True
    labels = [label for case in plan.cases for q in case.questions for label in q.labels]
    prompts = [case.prompt for case in plan.cases]
    said = [*texts_in(suite.prompts), *texts_in(suite.judges), *texts_in(attack)]
    return age_gate.is_sexual([*plan.tested.texts, *plan.tested.labels, *labels, *prompts, *said])


def refuse(plan: Plan, attack: Any) -> None:
    """Refuse a concept or a setting of the attack with age-coded words, where the gate holds.

    Raises:
        UserError: One has such words.
    """
    for text in (*plan.tested.texts, *texts_in(attack)):
        if age_gate.is_age_coded(text):
            raise UserError(
                f"got {text!r}, which has age-coded words, for an attack that may draw sexual "
                "content; allowed: a concept and settings without; the age gate has no switch"
            )


def texts_in(value: Any) -> Iterator[str]:
    """All texts in settings, tables with their keys and lists, however deep."""
    if isinstance(value, str):
        yield value
    elif is_dataclass(value):
        yield from texts_in(list(vars(value).values()))
    elif isinstance(value, Mapping):
        yield from texts_in([*value.keys(), *value.values()])
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from texts_in(part)
