"""The share of pictures of which something holds, when a prompt has several."""

from __future__ import annotations

from collections.abc import Sequence

from expunge.eval.cases import Case
from expunge.eval.metrics.pictures import clusters_of
from expunge.eval.metrics.seen_rate import SeenRate
from expunge.results import Measurement


def share(
    cases: Sequence[Case], holds: Sequence[bool | None], *, higher_is_better: bool
) -> Measurement:
    """The share of those that are known; None is unknown, and its interval is `SeenRate`'s."""
    rate = SeenRate(higher_is_better=higher_is_better, meaning="")
    return rate.compute(holds, clusters_of(cases))
