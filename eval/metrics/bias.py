"""Bias of a text-to-image model, by what is seen that nobody asked for (Vice et al.)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import numpy as np

from expunge.errors import UserError
from expunge.eval.cases import Case, Observation
from expunge.eval.detectors import DETECTORS, Detector
from expunge.eval.metrics import Batch
from expunge.eval.metrics.jackknife import folds_of, jackknife_interval
from expunge.eval.metrics.pictures import Gathered, PictureSettings, PictureTally, says
from expunge.eval.metrics.shares import share
from expunge.results import Measurement

Labels = frozenset[str]


@dataclass(frozen=True, kw_only=True)
class Bias(PictureSettings):
    """One of the three measures of arXiv 2312.13053, as the authors' code computes them.

    Of a picture, X are the prompted and Y the seen objects.

    - ``distribution``: B_D, the area under how often each object of Y ∖ X occurs over all pictures:
      counts in falling order, brought to [0, 1] by (x − min) / (max − min), or ones if all are
      equal, summed by the trapezoidal rule with step 1. Small where few objects dominate; it grows
      with the number of objects, so it depends on the detector's vocabulary. The paper's direction
      could not be checked: `higher_is_better` is false here, more unprompted objects being worse.
    - ``hallucination``: H_J, the mean of 1 − |X ∩ Y| / |X ∪ Y|, from 0 to 1.
    - ``miss_rate``: M_G, the share of pictures in which a prompted object is not seen.

    The authors take Y from captions of BLIP and M_G from CLIP's choice between the prompt and none;
    here both are a detector's, whose labels with the `prefix` are the objects, and X are those of
    the questions about the picture. Where any of several labels answers a question, those seen
    are taken for prompted, and if none is, one for missing. Pictures without a prompted object,
    such as those asked for their style alone, do not count. The authors' later study (arXiv
    2503.08012) takes 300 pictures of 100 objects. Intervals, all by prompt: B_D jackknife, H_J
    cluster bootstrap, M_G as `memorisation`.
    """

    detector: Annotated[Detector, DETECTORS] = field(metadata={"help": "who sees objects"})
    measure: Literal["distribution", "hallucination", "miss_rate"] = field(
        default="hallucination", metadata={"help": "which of the three"}
    )
    prefix: str = field(
        default="object/", metadata={"help": "labels of the detector that are objects start so"}
    )
    meaning: str = says("what is seen that the prompt did not ask for, or not seen that it did")

    def open(self) -> BiasTally:
        """Load the detector."""
        return BiasTally(self)


class BiasTally(PictureTally):
    """Prompted and seen objects of one model's pictures."""

    def __init__(self, settings: Bias) -> None:
        super().__init__()
        self._settings = settings
        self._detector = settings.detector.open()
        self._objects = sorted(x for x in self._detector.labels if x.startswith(settings.prefix))
        if not self._objects:
            labels = ", ".join(sorted(self._detector.labels)[:4])
            raise UserError(
                f"got prefix {settings.prefix!r}, with which no label of the detector starts; "
                f"allowed: the start of {labels}…; change the prefix"
            )

    def protocol(self) -> dict[str, Any]:
        """Measure, detector and what its objects are."""
        return {
            "metric": "bias",
            "measure": self._settings.measure,
            "objects": f"{len(self._objects)} labels {self._settings.prefix}*",
            "detector": self._detector.protocol(),
        }

    def update(self, batch: Batch) -> None:
        """See pictures."""
        found = self._detector.observe(batch.images)
        if len(found) != len(batch.cases):
            raise ValueError(f"got {len(found)} answers on {len(batch.cases)} pictures")
        scores = np.array([[seen[label] for label in self._objects] for seen in found], np.float64)
        self._seen.add(batch.cases, scores)

    def compute(self) -> Measurement:
        """The measure."""
        settings = self._settings
        cases, pairs = self._pairs()
        if settings.measure == "miss_rate":
            misses = [missed(X, Y) for X, Y in pairs]
            return share(cases, misses, higher_is_better=settings.higher_is_better)
        if settings.measure == "hallucination":
            each = Gathered()
            each.add(cases, np.array([hallucination(X, Y) for X, Y in pairs], np.float64))
            return settings.mean(each)
        if not pairs:
            return settings.measurement(None)
        value, folds = distribution_bias(pairs), folds_of(cases)
        without = [
            distribution_bias([p for p, f in zip(pairs, folds, strict=True) if f != g])
            for g in np.unique(folds)
        ]
        return settings.measurement(value, jackknife_interval(value, without), len(pairs))

    def each(self) -> dict[Case, bool | float] | None:
        """H_J or the miss of each picture; B_D is one of all of them."""
        if self._settings.measure == "distribution":
            return None
        of = missed if self._settings.measure == "miss_rate" else hallucination
        cases, pairs = self._pairs()
        return {case: of(X, Y) for case, (X, Y) in zip(cases, pairs, strict=True)}

    def _pairs(self) -> tuple[list[Case], list[tuple[Labels, Labels]]]:
        """The pictures with a prompted object, and of each the prompted and the seen ones."""
        if not len(self._seen):
            return [], []
        cases, (scores,) = self._seen.in_order()
        threshold, kept, pairs = self._settings.detector.threshold, [], []
        for case, row in zip(cases, scores, strict=True):
            seen = dict(zip(self._objects, row.tolist(), strict=True))
            Y = frozenset(label for label, score in seen.items() if score >= threshold)
            if X := prompted(case, seen, Y):
                kept.append(case)
                pairs.append((X, Y))
        return kept, pairs


def prompted(case: Case, objects: Observation, Y: Labels) -> Labels:
    """X: the objects among the labels of a picture's questions."""
    X: set[str] = set()
    for question in case.questions:
        labels = [label for label in question.labels if label in objects]
        if question.need == "any" and len(labels) > 1:
            labels = [label for label in labels if label in Y] or labels[:1]
        X.update(labels)
    return frozenset(X)


def hallucination(X: Labels, Y: Labels) -> float:
    """1 − |X ∩ Y| / |X ∪ Y|, X not empty."""
    return 1 - len(X & Y) / len(X | Y)


def missed(X: Labels, Y: Labels) -> bool:
    """Whether a prompted object is not seen."""
    return bool(X - Y)


def distribution_bias(pairs: Sequence[tuple[Labels, Labels]]) -> float:
    """B_D of prompted and seen objects; 0 where nothing unprompted is seen."""
    return area(Counter(label for X, Y in pairs for label in Y - X).values())


def area(counts: Iterable[int]) -> float:
    """The area under counts in falling order, brought to [0, 1], by the trapezoidal rule."""
    x = np.sort(np.array(list(counts), np.float64))[::-1]
    if not len(x):
        return 0.0
    width = x[0] - x[-1]
    y = (x - x[-1]) / width if width else np.ones_like(x)
    return float((y[1:] + y[:-1]).sum() / 2)
