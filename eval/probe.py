"""What a suite says of a model in the middle of its training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from expunge.errors import UserError


@dataclass(frozen=True)
class Probe:
    """A few pictures of a suite, of the student as it would be exported now.

    Attributes:
        suite: Its name or file.
        every: Steps between two looks.
        limit: Pictures a group; a look draws that many of each.
        stop: End the training when what is to go is seen in at most `erased` of its pictures and
            everything that is to stay in at least `kept` of what the base shows.
        erased: Share of pictures.
        kept: Share of the base's own rate.
    """

    suite: str = "emoji"
    every: int = 20
    limit: int = 8
    stop: bool = False
    erased: float = 0.05
    kept: float = 0.95

    def __post_init__(self) -> None:
        if min(self.every, self.limit) < 1 or not (0 <= self.erased < 1 and 0 < self.kept <= 1):
            raise ValueError(
                f"got probe {self}; allowed: every and limit 1 or more, erased from 0 to below 1, "
                "kept above 0 to 1"
            )

    def open(self, pipeline: Any, targets: Sequence[str]) -> Watch:
        """What looks at a model; the base is looked at now.

        Args:
            pipeline: Whose UNet has no adapter yet.
            targets: What is erased.

        Raises:
            UserError: The suite does not know the targets.
        """
        return Watch(self, pipeline, targets)


class Watch:
    """Looks at the same prompts and seeds each time.

    Attributes:
        base: The rates of the model as it was.
    """

    def __init__(self, how: Probe, pipeline: Any, targets: Sequence[str]) -> None:
        from expunge.eval.suite import load_suite

        self.how, self.pipeline = how, pipeline
        self.suite = load_suite(how.suite)
        self.cases = self.suite.plan(list(targets), how.limit).cases
        self.counters = self.suite.counters()
        asked = {q.metric for case in self.cases for q in case.questions}
        if all(self.counters[name].higher_is_better for name in asked):
            raise UserError(
                f"got probe.suite {how.suite}, which does not ask whether the concept is gone; "
                "allowed: a suite with a counter of which lower is better; choose another"
            )
        self.detector = self.suite.detector.open()
        self.base = self()

    def __call__(self) -> dict[str, float]:
        """The rate of every metric; what could not be judged counts as neither gone nor kept."""
        from expunge.eval.judging import AT_ONCE, observe
        from expunge.eval.production import to_pixels
        from expunge.generation import generate

        images = generate(
            self.pipeline,
            [case.prompt for case in self.cases],
            [case.seed for case in self.cases],
            steps=self.suite.steps,
            guidance_scale=self.suite.guidance_scale,
        )
        answers: dict[str, list[bool]] = {name: [] for name in self.counters}
        threshold, pixels = self.suite.detector.threshold, to_pixels(images)
        looks = [
            look
            for start in range(0, len(pixels), AT_ONCE)
            for look in observe(pixels[start : start + AT_ONCE], self.detector)
        ]
        for case, look in zip(self.cases, looks, strict=True):
            for q in case.questions:
                worst = not self.counters[q.metric].higher_is_better
                seen = worst if look.seen is None else q.answer(look.seen, threshold)
                answers[q.metric].append(seen)
        return {name: sum(given) / len(given) for name, given in answers.items() if given}

    def satisfied(self, rates: dict[str, float]) -> bool:
        """Whether training may end: erased and kept, and asked to stop then."""
        return self.how.stop and self.good(rates)

    def good(self, rates: dict[str, float]) -> bool:
        """Whether it is erased and kept."""
        return all(
            rate >= self.how.kept * self.base[name]
            if self.counters[name].higher_is_better
            else rate <= self.how.erased
            for name, rate in rates.items()
        )
