"""The share of pictures on which something is seen."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from expunge.results import Measurement, wilson


@dataclass(frozen=True)
class SeenRate:
    """Share of "seen" among the pictures that could be judged, with Wilson's interval.

    Let s pictures of n judged ones be seen and u be unknown. The value is s / n. The interval is
    that of the worst cases, so that a detector that fails never makes a result look safer::

        low  = lower end of wilson(s,     n + u)    no unknown picture shows it
        high = upper end of wilson(s + u, n + u)    every unknown picture shows it

    which is Wilson's own interval for u = 0.
    """

    higher_is_better: bool = field(metadata={"help": "the direction of the good"})
    meaning: str = field(metadata={"help": "what the metric says, for reports"})

    def compute(self, answers: Iterable[bool | None]) -> Measurement:
        """Count answers; None is a picture that could not be judged."""
        given = list(answers)
        seen = sum(answer is True for answer in given)
        unknown = sum(answer is None for answer in given)
        n = len(given) - unknown
        plain = Measurement.proportion(
            seen, n, higher_is_better=self.higher_is_better, unknown=unknown
        )
        if not unknown or not n:
            return plain
        low, high = wilson(seen, n + unknown)[0], wilson(seen + unknown, n + unknown)[1]
        return replace(plain, low=low, high=high)
