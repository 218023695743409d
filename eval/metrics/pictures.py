"""What metrics that look at pictures share: their settings, and the numbers of each picture."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from expunge.eval.cases import Case
from expunge.eval.significance import mean_interval
from expunge.results import Measurement


def good(higher: bool) -> Any:
    """The field `higher_is_better` with a metric's own default."""
    return field(default=higher, metadata={"help": "the direction of the good"})


def says(text: str) -> Any:
    """The field `meaning` with a metric's own default."""
    return field(default=text, metadata={"help": "what the metric says, for reports"})


@dataclass(frozen=True, kw_only=True)
class PictureSettings:
    """Settings of every metric that looks at pictures."""

    higher_is_better: bool = good(False)
    meaning: str = says("")
    groups: list[str] = field(
        default_factory=list, metadata={"help": "prompt groups whose pictures it sees; empty: all"}
    )

    def measurement(
        self,
        value: float | None,
        interval: tuple[float | None, float | None] = (None, None),
        n: int = 0,
        unit: Literal["share", "number"] = "number",
    ) -> Measurement:
        """A number with this metric's direction."""
        return Measurement(value, *interval, n, self.higher_is_better, unit=unit)

    def mean(self, seen: Gathered) -> Measurement:
        """The mean of a number of each picture, with `mean_interval` by prompt.

        Without a picture there is no number, with a single one no interval.
        """
        if not len(seen):
            return self.measurement(None)
        cases, (column,) = seen.in_order()
        values = column.astype(np.float64)
        clusters = clusters_of(cases)
        interval: tuple[float | None, float | None] = (None, None)
        if len(set(clusters)) > 1:
            interval = mean_interval(values.tolist(), clusters)
        return self.measurement(float(values.mean()), interval, len(values))


class PictureTally:
    """What every tally of pictures does between two models."""

    compares = False

    def __init__(self) -> None:
        self._seen = Gathered()

    def begin(self, keep: Path | None = None) -> None:
        """Forget all pictures."""
        self._seen = Gathered()

    def each(self) -> Mapping[Case, bool | float] | None:
        """Of a number that only a set of pictures has, none has a part."""
        return None


class MeanTally(PictureTally):
    """A number of each of one model's pictures; their mean is what is measured."""

    def __init__(self, settings: PictureSettings) -> None:
        super().__init__()
        self._mean = settings.mean

    def each(self) -> dict[Case, bool | float]:
        """The numbers."""
        if not len(self._seen):
            return {}
        cases, (column,) = self._seen.in_order()
        return dict(zip(cases, column.astype(np.float64).tolist(), strict=True))

    def compute(self) -> Measurement:
        """The mean, with its interval by prompt."""
        return self._mean(self._seen)


class Gathered:
    """Rows of numbers of the pictures seen so far, in an order that nobody's batches decide."""

    def __init__(self) -> None:
        self._cases: list[Case] = []
        self._columns: list[NDArray[Any]] = []  # with room behind what is there

    def __len__(self) -> int:
        return len(self._cases)

    def add(self, cases: Sequence[Case], *columns: NDArray[Any]) -> None:
        """Add B pictures with B entries of each column: all of them, or with an error none.

        Raises:
            ValueError: A column of another length.
            FloatingPointError: A NaN or an infinity.
        """
        for column in columns:
            if len(column) != len(cases):
                raise ValueError(f"got {len(column)} numbers of {len(cases)} pictures")
            if not np.isfinite(column).all():
                raise FloatingPointError("got numbers that are NaN or infinite")
        before = self._columns or [column[:0] for column in columns]
        n = len(self._cases)
        self._columns = [_appended(x, n, new) for x, new in zip(before, columns, strict=True)]
        self._cases.extend(cases)

    def in_order(self) -> tuple[list[Case], list[NDArray[Any]]]:
        """The pictures by group, prompt and seed, and their columns in this order."""
        order = sorted(range(len(self._cases)), key=lambda i: _key(self._cases[i]))
        return [self._cases[i] for i in order], [column[order] for column in self._columns]


def _appended(column: NDArray[Any], n: int, new: NDArray[Any]) -> NDArray[Any]:
    """The first n entries and the new ones; it grows by doubling.

    An array for each batch would lie between what the networks need and give back, and leave the
    memory in pieces: 450 MB more after 10,000 pictures.
    """
    end = n + len(new)
    if end > len(column):
        grown = np.empty((max(end, 2 * n), *new.shape[1:]), new.dtype)
        grown[:n] = column[:n]
        column = grown
    column[n:end] = new
    return column


def clusters_of(cases: Sequence[Case]) -> list[Hashable]:
    """What is drawn or left out as a whole: prompts; of a single prompt, its pictures."""
    prompts: list[Hashable] = [case.prompt for case in cases]
    return prompts if len(set(prompts)) > 1 else list(range(len(cases)))


def _key(case: Case) -> tuple[Any, ...]:
    return case.group, case.prompt, case.seed, case.about, repr(case.sampling)
