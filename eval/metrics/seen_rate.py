"""The share of pictures on which something is seen."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace

from expunge.eval.significance import clustered_wilson
from expunge.results import Measurement


@dataclass(frozen=True)
class SeenRate:
    """Share of "seen" among the pictures that could be judged, with Wilson's interval.

    Let s pictures of n judged ones be seen and u be unknown. The value is s / n. The interval is
    that of the worst cases, so that a detector that fails never makes a result look safer::

        low  = lower end of wilson(s,     n + u)    no unknown picture shows it
        high = upper end of wilson(s + u, n + u)    every unknown picture shows it

    which is Wilson's own interval for u = 0. Where prompts repeat, pictures of one prompt are no
    independent trials, and the interval is `significance.clustered_wilson`.
    """

    higher_is_better: bool = field(metadata={"help": "the direction of the good"})
    meaning: str = field(metadata={"help": "what the metric says, for reports"})

    def compute(
        self, answers: Sequence[bool | None], clusters: Sequence[Hashable] | None = None
    ) -> Measurement:
        """Count answers; None is a picture that could not be judged.

        Args:
            answers: One for each picture.
            clusters: The prompt of each; default: all differ.
        """
        seen = sum(answer is True for answer in answers)
        unknown = sum(answer is None for answer in answers)
        n = len(answers) - unknown
        plain = Measurement.proportion(
            seen, n, higher_is_better=self.higher_is_better, unknown=unknown
        )
        if not n:
            return plain
        names = range(len(answers)) if clusters is None else clusters
        low, high = clustered_wilson(answers, names)
        return replace(plain, low=low, high=high)
