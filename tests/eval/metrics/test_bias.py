"""Distribution bias, Jaccard hallucination and generative miss rate, by hand and on the judge."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from expunge.errors import UserError
from expunge.eval.cases import Case, Observation, Question
from expunge.eval.detectors.emoji_detector import EmojiDetector
from expunge.eval.metrics import Batch
from expunge.eval.metrics.bias import Bias, area, hallucination
from expunge.results import wilson
from picture_metrics import measured

NAMES = ("object/a", "object/b", "object/c", "object/d", "style/ink")


@dataclass(frozen=True)
class Channels:
    """A detector that sees an object where a pixel of the first row is bright."""

    threshold: float = 0.5
    names: tuple[str, ...] = NAMES

    def open(self) -> "Channels":
        return self

    @property
    def labels(self) -> frozenset[str]:
        return frozenset(self.names)

    def protocol(self) -> dict[str, Any]:
        return {"detector": "channels"}

    def observe(self, images: Tensor) -> list[Observation]:
        rows: Sequence[Sequence[float]] = images[:, 0, 0, : len(self.names)].tolist()
        return [dict(zip(self.names, row, strict=True)) for row in rows]


def shown(*objects: str) -> Tensor:
    """Pictures, each of the objects that are spelt."""
    images = torch.zeros(len(objects), 3, 8, 8)
    for i, letters in enumerate(objects):
        for letter in letters:
            images[i, 0, 0, "abcdi".index(letter)] = 1
    return images


def asked(prompt: str, *labels: str, need: Any = "any", seed: int = 0) -> Case:
    questions = (Question("kept", labels, need),) if labels else ()
    return Case(prompt, seed, "kept", ("all",), questions)


CASES = [
    asked("a", "object/a"),
    asked("a and b", "object/a", "object/b", need="all"),
    asked("c or d", "object/c", "object/d"),
    asked("in ink", "style/ink"),
    asked("d", "object/d"),
]
# Seen: as asked, and b; a alone, and c and d; c; what was not asked for; nothing.
SEEN = shown("ab", "acd", "c", "abcdi", "")


def test_hallucination_is_one_minus_jaccards_index() -> None:
    found = measured(Bias(detector=Channels(), measure="hallucination"), CASES, SEEN)
    each = [1 - 1 / 2, 1 - 1 / 4, 0, 1]
    assert (found.value, found.n) == (pytest.approx(sum(each) / 4), 4)
    assert found.low < found.value < found.high
    assert hallucination(frozenset("ab"), frozenset("bcd")) == pytest.approx(3 / 4)


def test_a_miss_is_a_prompted_object_that_is_not_seen() -> None:
    found = measured(Bias(detector=Channels(), measure="miss_rate"), CASES, SEEN)
    assert (found.value, found.n, found.unit) == (2 / 4, 4, "share")
    assert found.low <= wilson(2, 4)[0]
    assert found.high >= wilson(2, 4)[1]


def test_distribution_bias_is_the_area_of_unprompted_objects() -> None:
    # Unprompted are b once, c once, d once: a flat curve of three ones.
    found = measured(Bias(detector=Channels(), measure="distribution"), CASES, SEEN)
    assert (found.value, found.n, found.unit) == (2, 4, "number")
    again = measured(
        Bias(detector=Channels(), measure="distribution"),
        [*CASES, asked("a", "object/a", seed=1)], torch.cat([SEEN, shown("abc")]),
    )  # fmt: skip
    # b and c twice, d once: 1, 1, 0.
    assert again.value == pytest.approx(1.5)


@pytest.mark.parametrize(
    ("counts", "want"),
    [([], 0), ([3], 0), ([2, 2], 1), ([1, 5, 3], 0.5 * (1 + 2 * 0.5)), ([10, 1, 1, 1], 0.5)],
)
def test_the_area_is_the_authors(counts: list[int], want: float) -> None:
    """By hand from their code: falling order, min-max, trapezoids of width 1."""
    assert area(counts) == pytest.approx(want)


def test_equal_wishes_and_pictures_have_no_bias_at_all() -> None:
    cases = [asked("a", "object/a"), asked("b", "object/b")]
    for measure in ("distribution", "hallucination", "miss_rate"):
        settings = Bias(detector=Channels(), measure=measure)  # type: ignore[arg-type]
        assert measured(settings, cases, shown("a", "b")).value == 0
        assert settings.open().compute().value is None


@pytest.mark.parametrize("measure", ["distribution", "hallucination", "miss_rate"])
def test_order_does_not_matter_and_a_failed_update_changes_nothing(measure: Any) -> None:
    settings = Bias(detector=Channels(), measure=measure)
    whole, tally = measured(settings, CASES, SEEN), settings.open()
    for i in (3, 0, 4, 2, 1):
        tally.update(Batch((CASES[i],), SEEN[i : i + 1]))
    assert tally.compute() == whole
    with pytest.raises(FloatingPointError, match="NaN"):
        tally.update(Batch(tuple(CASES), SEEN * float("nan")))
    assert tally.compute() == whole


def test_a_detector_without_objects_is_one_line() -> None:
    with pytest.raises(UserError, match=r"prefix 'thing/', with which no label .* style/ink"):
        Bias(detector=Channels(names=("style/ink",)), prefix="thing/").open()


def test_the_judge_sees_more_bias_in_spoiled_pictures(emoji: Any, spoiled: Any) -> None:
    cases, images = emoji
    found: Mapping[str, list[float]] = {
        measure: [
            measured(Bias(detector=EmojiDetector(), measure=measure), cases, x).value
            for x in (images, spoiled(0.5), spoiled(2.0))
        ]
        for measure in ("hallucination", "miss_rate")
    }
    for values in found.values():
        assert values == sorted(values)
        assert values[0] < 0.3 < 0.7 < values[2]
