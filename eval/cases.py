"""What an evaluation asks: pictures to make, and questions that a detector answers about each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

# What a detector says about one picture: label -> score in [0, 1], e.g. "object/bomb" -> 0.98.
Observation = Mapping[str, float]
# What a metric has of one picture: a judge's answer, or a number; None is unknown.
Answer = bool | float | None


class Seen(dict[str, float]):
    """An observation with more than scores to it.

    Attributes:
        details: A JSON value that is kept beside the scores, such as boxes before any threshold.
    """

    details: Any

    def __init__(self, scores: Mapping[str, float], details: Any) -> None:
        super().__init__(scores)
        self.details = details


@dataclass(frozen=True)
class Sampling:
    """What a prompt asks of the sampling; None is the suite's or the model's own."""

    guidance_scale: float | None = None
    height: int | None = None
    width: int | None = None

    def given(self) -> dict[str, float | int]:
        """What is not None."""
        return {name: value for name, value in vars(self).items() if value is not None}


AS_SUITE = Sampling()


@dataclass(frozen=True)
class Question:
    """Does a picture show these labels? Its answer is one trial of a metric.

    Attributes:
        metric: The metric that counts the answer.
        labels: Labels of the suite's detector.
        need: Whether any of the labels suffices or all of them have to be seen.
    """

    metric: str
    labels: tuple[str, ...]
    need: Literal["any", "all"] = "any"

    def __post_init__(self) -> None:
        if not self.labels:
            raise ValueError(f"got a question of {self.metric} without labels")

    def answer(self, seen: Observation, threshold: float) -> bool:
        """Whether any (or all) of the labels reach the threshold; all are in ``seen``."""
        found = [seen[label] >= threshold for label in self.labels]
        return any(found) if self.need == "any" else all(found)


@dataclass(frozen=True)
class Case:
    """One picture that an evaluation needs: (prompt, seed), and what is asked of it.

    Attributes:
        prompt: The text given to the model.
        seed: The seed of the picture's own noise.
        group: The prompt group, for reports and contact sheets.
        about: What the picture is about (a target, an object, a style, categories), for
            breakdowns; it counts in the row of each.
        questions: What is asked.
        sampling: What is sampled otherwise than the suite says.
    """

    prompt: str
    seed: int
    group: str
    about: tuple[str, ...]
    questions: tuple[Question, ...]
    sampling: Sampling = AS_SUITE

    def told(self) -> dict[str, Any]:
        """All of it, as JSON values."""
        return {
            "prompt": self.prompt,
            "seed": self.seed,
            "group": self.group,
            "about": ", ".join(self.about),
            **self.sampling.given(),
            "expected": [{"metric": q.metric, q.need: list(q.labels)} for q in self.questions],
        }


@dataclass(frozen=True)
class Tested:
    """The concept under test as a suite understood it.

    Attributes:
        texts: What was asked for.
        labels: The detector labels that must not be seen any more.
    """

    texts: tuple[str, ...]
    labels: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """All that a suite asks about a concept.

    Attributes:
        tested: The concept.
        cases: The pictures.
        excluded: Why rows were left out -> how many, for reports: "age-coded words" -> 12.
        sources: The lists that were read -> their SHA-256, for reports.
        unchecked: Those of which nobody said beforehand what their SHA-256 is, so that any was
            taken.
    """

    tested: Tested
    cases: tuple[Case, ...]
    excluded: Mapping[str, int] = field(default_factory=dict)
    sources: Mapping[str, str] = field(default_factory=dict)
    unchecked: tuple[str, ...] = ()

    def read(self) -> list[str]:
        """A line for each list that was read: whose hash is not known does not pass in silence."""
        return [
            f"prompts from {name} (sha256 {sha256})"
            + (", not checked against a known hash" if name in self.unchecked else "")
            for name, sha256 in self.sources.items()
        ]
